"""Other libraries' arrays as NumPy or CuPy arrays, without copies, or an error with their name."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from mla_fp8._check.parameters import brief

Array = Any  # numpy.ndarray or cupy.ndarray; CuPy may be absent, and ships no type stubs

# An axis of an array: its name if the extent may be anything (or None), its extent, or both.
Axis = str | int | tuple[str, int | None]

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_ARGUMENTS = ("q", "k_blocks", "values")
_DTYPE_NAME = re.compile(r"bool|(b?float|complex|u?int)\d{1,3}(_\w{1,20})?")
INSTALL = "pip install -e '.[cuda13]' (or '.[cuda12]') in a checkout of mla_fp8"
_DLPACK_CPU = (1, 3)  # kDLCPU, kDLCUDAHost
DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


class _Borrowed(threading.local):
    """Arrays over device memory that others than CuPy and torch own, if somebody collects them."""

    arrays: list[Array] | None = None


borrowed = _Borrowed()


def cupy_or_error(name: str) -> Any:
    """CuPy, for an argument that needs it."""
    try:
        import cupy
    except ImportError:
        raise TypeError(f"{name} is a GPU array, which needs CuPy: {INSTALL}") from None
    return cupy


def is_cupy(obj: object) -> bool:
    """Whether ``obj`` is a CuPy array."""
    cupy = sys.modules.get("cupy")  # nobody holds a CuPy array who has not imported CuPy
    return cupy is not None and isinstance(obj, cupy.ndarray)


def torch_of(obj: object) -> Any:
    """torch, if ``obj`` is a tensor of it, else None. Never imported: who holds a tensor has."""
    torch = sys.modules.get("torch")
    return torch if isinstance(obj, getattr(torch, "Tensor", ())) else None


def _is_array(obj: object) -> bool:
    return isinstance(obj, np.ndarray) or is_cupy(obj)


def namespace_of(array: Array) -> Any:
    """The module, numpy or cupy, that ``array`` belongs to."""
    return sys.modules["cupy"] if is_cupy(array) else np


def device_of(array: Array) -> AbstractContextManager[Any]:
    """A context in which CuPy works on the device of ``array``; nothing to do for NumPy."""
    return array.device if is_cupy(array) else nullcontext()


def empty_beside(array: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array where ``array`` lives."""
    with device_of(array):
        return namespace_of(array).empty(shape, dtype)


def _base_array(name: str, obj: Array) -> Array:
    """The plain array under a subclass, whose operators are its own; no masks."""
    if type(obj) is np.ndarray:
        return obj
    if isinstance(obj, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be an array without a mask; got {type(obj).__name__} "
            "(.filled(value) makes one)"
        )
    if isinstance(obj, np.ndarray):
        return np.asarray(obj)
    cupy = sys.modules["cupy"]
    return obj if type(obj) is cupy.ndarray else obj.view(cupy.ndarray)


def reinterpret(obj: Any, dtype: str) -> Any:
    """``obj.view(dtype)``, an array of NumPy, torch or JAX."""
    torch = torch_of(obj)
    return obj.view(dtype if torch is None else getattr(torch, dtype))


def _float8_as_bytes(name: str, obj: Any) -> Any:
    """FP8 of torch or JAX as uint8: neither exchange protocol carries these dtypes to CuPy.

    (torch's ``__cuda_array_interface__`` raises KeyError on them.)
    """
    if _is_array(obj):
        return obj
    dtype = str(getattr(obj, "dtype", ""))
    if "float8" not in dtype:
        return obj
    if name not in _FP8_ARGUMENTS:  # scales (float8_e8m0fnu), or what has none
        check_dtypes({name: obj}, {name: (np.dtype(np.float32),)})
    if not dtype.endswith("float8_e4m3fn"):
        raise TypeError(f"{name} must be float8_e4m3fn (or uint8); got {dtype}")
    return reinterpret(obj, "uint8")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Other libraries' errors (torch's on a tensor that requires grad, say) under our name."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{name} must"):
            raise
        raise TypeError(
            f"{name} must be an array that can be read in place; got: {brief(error, 300)}"
        ) from error


def _lives_on_gpu(name: str, obj: Any) -> bool:
    """Whether ``obj`` is an array on a GPU, told without converting it; TypeError if it is none."""
    if isinstance(obj, np.ndarray):
        return False
    if is_cupy(obj) or (torch_of(obj) is not None and obj.is_cuda):
        return True
    if not hasattr(obj, "__dlpack_device__"):
        if hasattr(obj, "__cuda_array_interface__"):
            return True
        raise TypeError(
            f"{name} must be an array (NumPy, CuPy, or one with __cuda_array_interface__ or "
            f"DLPack); got {type(obj).__name__}"
        )
    device = obj.__dlpack_device__()[0]
    if device not in _DLPACK_CPU + DLPACK_CUDA:
        raise TypeError(f"{name} must live on the CPU or a CUDA GPU; got DLPack device {device}")
    return device in DLPACK_CUDA


class _WithoutStream:
    """An array's ``__cuda_array_interface__`` without its stream: CuPy makes the host wait for it.

    `_streams` lets the call's stream wait instead.
    """

    def __init__(self, obj: Any) -> None:
        self.owner = obj  # keeps the memory alive
        self.__cuda_array_interface__ = {**obj.__cuda_array_interface__, "stream": None}


def _from_tensor(cupy: Any, tensor: Any) -> Array:
    """A torch tensor as a CuPy array, of the right GPU also where it is empty and has no memory."""
    interface = tensor.__cuda_array_interface__
    address, size = interface["data"][0], tensor.numel() * tensor.element_size()
    memory = cupy.cuda.UnownedMemory(address, size, tensor, tensor.get_device())
    start = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(interface["shape"], interface["typestr"], start, interface["strides"])


def as_array(name: str, obj: Any) -> Array:
    """``obj`` as a NumPy or CuPy array over the same memory."""
    if _is_array(obj):
        return _base_array(name, obj)
    with _naming(name):
        obj = _float8_as_bytes(name, obj)
        if _lives_on_gpu(name, obj):
            cupy = cupy_or_error(name)
            if torch_of(obj) is not None:
                return _from_tensor(cupy, obj)
            # DLPack, where there is both, for it asks the owner to order streams.
            by_dlpack = hasattr(obj, "__dlpack__")
            array = cupy.from_dlpack(obj) if by_dlpack else cupy.asarray(_WithoutStream(obj))
            if borrowed.arrays is not None:
                borrowed.arrays.append(array)
            return array
        # torch on the CPU also speaks NumPy's own protocol, which keeps the memory writable.
        return np.asarray(obj) if hasattr(obj, "__array__") else np.from_dlpack(obj)


def as_floats(name: str, obj: Any) -> Array:
    """`as_array`, and bfloat16, which neither CuPy nor an exchange protocol has, as float32."""
    if not str(getattr(obj, "dtype", "")).endswith("bfloat16"):
        return as_array(name, obj)
    if getattr(obj, "requires_grad", False):  # torch itself does not mind once it is a view
        raise TypeError(f"{name} must be an array; got a tensor that requires grad: use detach()")
    bits = as_array(name, reinterpret(obj, "int16")).view(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_arrays(
    given: dict[str, Any], dtypes: dict[str, tuple[Any, ...]] | None = None
) -> tuple[Any, dict[str, Array]]:
    """All of ``given``, by `check_dtypes`, as arrays of one namespace and device; the namespace."""
    cupy, objects = sys.modules.get("cupy"), given.values()
    if cupy is not None and {type(obj) for obj in objects} == {cupy.ndarray}:
        devices = {obj.data.device_id for obj in objects}
        if len(devices) == 1:  # nearly always, and told in a microsecond
            return cupy, given
    check_dtypes(given, dtypes or {})
    kinds = {}
    for name, obj in given.items():
        if _is_array(obj):
            kinds[name] = not isinstance(obj, np.ndarray)
            continue
        with _naming(name):
            kinds[name] = _lives_on_gpu(name, _float8_as_bytes(name, obj))
    first, on_gpu = next(iter(kinds.items()))
    words = {False: "a NumPy (host) array", True: "a CuPy (GPU) array"}
    for name, kind in kinds.items():
        if kind != on_gpu:
            raise TypeError(
                f"{name} must be {words[on_gpu]} like {first}; got {words[kind]}: "
                "host and device arrays don't mix"
            )
    arrays = {name: as_array(name, obj) for name, obj in given.items()}
    if on_gpu:
        for name, array in arrays.items():
            if array.device != arrays[first].device:
                raise ValueError(
                    f"{name} must be on GPU {arrays[first].device.id} like {first}; "
                    f"got GPU {array.device.id}"
                )
    return namespace_of(arrays[first]), arrays


def _names(dtypes: tuple[Any, ...]) -> str:
    return " or ".join(dtype.name for dtype in dtypes)


def cast_hint(found: str, dtypes: tuple[Any, ...]) -> str:
    """How a dtype becomes one of ``dtypes``, where a cast is what is missing."""
    wanted = [dtype.name for dtype in dtypes]
    if found not in wanted and "float32" in wanted and "float" in found:
        return ": cast it with .astype('float32'), in torch with .float()"
    if found not in wanted and "int32" in wanted and found.lstrip("u").startswith("int"):
        return ": cast it with .astype('int32'), in torch with .to(torch.int32)"
    return ""


def check_dtypes(given: dict[str, Any], dtypes: dict[str, tuple[Any, ...]]) -> None:
    """Raise on another library's array of a wrong dtype, which may not be exchangeable at all.

    What says nothing of its dtype, or is NumPy's or CuPy's, is left to `check_form`.
    """
    for name, obj in given.items():
        if name not in dtypes or _is_array(obj) or not hasattr(obj, "dtype"):
            continue
        found = str(obj.dtype).rpartition(".")[2]
        is_one = _DTYPE_NAME.fullmatch(found)  # or it is for the exchange to tell
        if is_one and found not in [dtype.name for dtype in dtypes[name]]:
            raise ValueError(
                f"{name} must be {_names(dtypes[name])}; got {found}"
                f"{cast_hint(found, dtypes[name])}"
            )


@lru_cache(maxsize=1024)
def check_form(
    name: str, dtype: Any, have: tuple[int, ...], dtypes: tuple[Any, ...], axes: tuple[Axis, ...]
) -> None:
    """Raise unless ``dtype`` is one of ``dtypes`` and ``have`` is as ``axes`` say."""
    extents = [axis[1] if isinstance(axis, tuple) else axis for axis in axes]
    fits = len(extents) == len(have) and all(
        extent is None or isinstance(extent, str) or extent == found
        for extent, found in zip(extents, have, strict=True)
    )
    if dtype not in dtypes or not fits:
        words = [
            (axis[0] if axis[1] is None else f"{axis[0]} = {axis[1]}")
            if isinstance(axis, tuple)
            else str(axis)
            for axis in axes
        ]
        raise ValueError(
            f"{name} must be {_names(dtypes)} [{', '.join(words)}]; "
            f"got {brief(dtype)} {have}{cast_hint(str(dtype), dtypes)}"
        )


def check_aligned(name: str, array: Array, multiple: int = 0) -> None:
    """Raise unless a GPU array starts at a multiple of so many bytes; 0: of its item size.

    A load from elsewhere would end the CUDA context.
    """
    if isinstance(array, np.ndarray):
        return
    multiple = multiple or array.itemsize
    if array.data.ptr % multiple:
        raise ValueError(
            f"{name} must start at a multiple of {multiple} bytes; got address {array.data.ptr:#x}"
        )
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(
            f"{name} must have strides that are multiples of {array.itemsize} bytes; "
            f"got {array.strides}"
        )


def plain(name: str, array: Array, multiple: int = 0) -> Array:
    """``array`` if it is in C order and `check_aligned`; FP8 comes back as uint8."""
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous; got strides {array.strides} for shape {array.shape} "
            "(ascontiguousarray makes a copy)"
        )
    if isinstance(array, np.ndarray):
        return array.view(np.uint8) if array.dtype == FP8 else array  # CuPy has no such type
    if array.data.ptr % (multiple or array.itemsize):
        check_aligned(name, array, multiple)
    return array


def check_array(
    name: str, array: Array, dtypes: tuple[Any, ...], axes: tuple[Axis, ...], multiple: int = 0
) -> Array:
    """`plain` of ``array``, if it passes `check_form`."""
    check_form(name, array.dtype, array.shape, dtypes, axes)
    return plain(name, array, multiple)


def check_outputs(outputs: dict[str, Array], inputs: dict[str, Array]) -> None:
    """Raise unless ``outputs`` may be written and overlap neither ``inputs`` nor one another."""
    on_host = isinstance(next(iter(outputs.values())), np.ndarray)
    ranges = []  # name, first and past-the-end address
    for name, array in inputs.items():
        start = array.ctypes.data if on_host else array.data.ptr
        ranges.append((name, start, start + array.nbytes))
    for name, array in outputs.items():
        if on_host and not array.flags.writeable:
            raise ValueError(f"{name} must be writable; got a read-only array")
        start = array.ctypes.data if on_host else array.data.ptr
        stop = start + array.nbytes
        for other, low, high in ranges:
            if start < high and low < stop:
                raise ValueError(
                    f"{name} must not overlap {other}; got memory shared between the two"
                )
        ranges.append((name, start, stop))
