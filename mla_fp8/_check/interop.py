"""Arrays of other libraries as NumPy or CuPy arrays, without copies.

torch, JAX, Numba and every library with DLPack or ``__cuda_array_interface__`` are read in place.
An array that cannot be read raises an error that names the argument.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mla_fp8._check.arrays import (
    FLOAT,
    INSTALL,
    Array,
    cast_hint,
    dtype_names,
    is_array,
    is_cupy,
    namespace_of,
)
from mla_fp8._check.parameters import brief

_FP8_ARGUMENTS = ("q", "k_blocks", "values")
_DTYPE_NAME = re.compile(r"bool|(b?float|complex|u?int)\d{1,3}(_\w{1,20})?")
_DLPACK_CPU = (1, 3)  # kDLCPU, kDLCUDAHost
DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


class _Borrowed(threading.local):
    """Arrays over device memory of libraries other than CuPy and torch, while `streams` asks."""

    arrays: list[Array] | None = None


borrowed = _Borrowed()


def _cupy_or_error(name: str) -> Any:
    """CuPy, or an error that names the argument that needs it."""
    try:
        import cupy
    except ImportError:
        raise TypeError(f"{name} is a GPU array, which needs CuPy: {INSTALL}") from None
    return cupy


def torch_of(obj: object) -> Any:
    """The module torch if ``obj`` is a tensor, else None. It is never imported here."""
    torch = sys.modules.get("torch")
    return torch if isinstance(obj, getattr(torch, "Tensor", ())) else None


def _base_array(name: str, obj: Array) -> Array:
    """The plain array under a subclass, which may redefine operators. Masks are refused."""
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
    """``obj.view(dtype)`` for an array of NumPy, torch or JAX."""
    torch = torch_of(obj)
    return obj.view(dtype if torch is None else getattr(torch, dtype))


def _float8_as_bytes(name: str, obj: Any) -> Any:
    """FP8 arrays of torch or JAX as uint8, because no protocol carries FP8 dtypes to CuPy.

    (torch's ``__cuda_array_interface__`` raises KeyError on them.)
    """
    if is_array(obj):
        return obj
    dtype = str(getattr(obj, "dtype", ""))
    if "float8" not in dtype:
        return obj
    if name not in _FP8_ARGUMENTS:  # scales as float8_e8m0fnu, for example
        check_dtypes({name: obj}, {name: FLOAT})
    if not dtype.endswith("float8_e4m3fn"):
        raise TypeError(f"{name} must be float8_e4m3fn (or uint8); got {dtype}")
    return reinterpret(obj, "uint8")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn another library's error (torch's for a tensor that requires grad) into a TypeError."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{name} must"):
            raise
        raise TypeError(
            f"{name} must be an array that can be read in place; got: {brief(error, 300)}"
        ) from error


def _lives_on_gpu(name: str, obj: Any) -> bool:
    """Whether ``obj`` is an array on a GPU, found without converting it."""
    if isinstance(obj, np.ndarray):
        return False
    if is_cupy(obj) or (torch_of(obj) is not None and obj.is_cuda):
        return True
    if not hasattr(obj, "__dlpack_device__"):
        if hasattr(obj, "__cuda_array_interface__"):
            return True
        hint = " (numpy.asarray or numpy.stack makes one)" if isinstance(obj, list | tuple) else ""
        raise TypeError(
            f"{name} must be an array (NumPy, CuPy, or one with __cuda_array_interface__ or "
            f"DLPack); got {type(obj).__name__}{hint}"
        )
    device = obj.__dlpack_device__()[0]
    if device not in _DLPACK_CPU + DLPACK_CUDA:
        raise TypeError(f"{name} must live on the CPU or a CUDA GPU; got DLPack device {device}")
    return device in DLPACK_CUDA


class _WithoutStream:
    """An array's ``__cuda_array_interface__`` without its stream.

    CuPy would make the host wait for that stream; `streams` lets the call's stream wait instead.
    """

    def __init__(self, obj: Any) -> None:
        self.owner = obj  # keeps the memory alive
        self.__cuda_array_interface__ = {**obj.__cuda_array_interface__, "stream": None}


def _from_tensor(cupy: Any, tensor: Any) -> Array:
    """A CUDA tensor of torch as a CuPy array.

    An empty tensor has no memory to tell its GPU by, so the tensor's ordinal is passed on.
    """
    interface = tensor.__cuda_array_interface__
    address, size = interface["data"][0], tensor.numel() * tensor.element_size()
    memory = cupy.cuda.UnownedMemory(address, size, tensor, tensor.get_device())
    start = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(interface["shape"], interface["typestr"], start, interface["strides"])


def as_array(name: str, obj: Any) -> Array:
    """``obj`` as a NumPy or CuPy array over the same memory."""
    if is_array(obj):
        return _base_array(name, obj)
    with _naming(name):
        obj = _float8_as_bytes(name, obj)
        if _lives_on_gpu(name, obj):
            cupy = _cupy_or_error(name)
            if torch_of(obj) is not None:
                return _from_tensor(cupy, obj)
            # DLPack is preferred, because it asks the owner to order the streams.
            by_dlpack = hasattr(obj, "__dlpack__")
            array = cupy.from_dlpack(obj) if by_dlpack else cupy.asarray(_WithoutStream(obj))
            if borrowed.arrays is not None:
                borrowed.arrays.append(array)
            return array
        # NumPy's own protocol, which torch's CPU tensors have too, keeps the memory writable.
        return np.asarray(obj) if hasattr(obj, "__array__") else np.from_dlpack(obj)


def as_floats(name: str, obj: Any) -> Array:
    """`as_array`, except that bfloat16 becomes a float32 copy: CuPy and DLPack lack bfloat16."""
    bits, is_bfloat16 = as_bits(name, obj)
    array = as_array(name, bits)
    if not is_bfloat16:
        return array
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def as_bits(name: str, obj: Any) -> tuple[Any, bool]:
    """``obj``, but the bits of bfloat16 as its library's int16; and whether it is bfloat16."""
    is_plain = is_array(obj) and obj.dtype.kind == "f"  # the usual case, without text
    if is_plain or not str(getattr(obj, "dtype", "")).endswith("bfloat16"):
        return obj, False
    if getattr(obj, "requires_grad", False):  # torch would not complain once it is a view
        raise TypeError(f"{name} must be an array; got a tensor that requires grad: use detach()")
    return reinterpret(obj, "int16"), True


def as_arrays(
    given: dict[str, Any],
    dtypes: dict[str, tuple[Any, ...]] | None = None,
    written: Iterable[str] = (),
) -> tuple[Any, dict[str, Array]]:
    """The namespace, numpy or cupy, and all of ``given`` as its arrays, on one device.

    ``dtypes`` is for `check_dtypes`, and ``written`` are the names for `check_mutable`.
    """
    cupy, objects = sys.modules.get("cupy"), given.values()
    if cupy is not None and {*map(type, objects)} == {cupy.ndarray}:
        devices = {obj.data.device_id for obj in objects}
        if len(devices) == 1:  # the usual case, recognised in a microsecond
            return cupy, given
    check_mutable({name: given[name] for name in written})
    check_dtypes(given, dtypes or {})
    kinds = {}
    for name, obj in given.items():
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


def library_of(obj: Any) -> str:
    """ "jax" or "numba" if ``obj`` is such an array, else ""."""
    root = type(obj).__module__.partition(".")[0]
    return {"jax": "jax", "jaxlib": "jax", "numba": "numba", "numba_cuda": "numba"}.get(root, "")


def check_mutable(given: dict[str, Any]) -> None:
    """Raise on an array of JAX, which a call would write to."""
    for name, obj in given.items():
        if not is_array(obj) and library_of(obj) == "jax":
            raise TypeError(f"{name} must be writable; got a JAX array, which is immutable")


def check_dtypes(given: dict[str, Any], dtypes: dict[str, tuple[Any, ...]]) -> None:
    """Raise if another library's array has a wrong dtype.

    It comes before conversion, because some dtypes cannot be exchanged at all. NumPy and CuPy
    arrays, and objects without a dtype, are left to `check_form`.
    """
    for name, obj in given.items():
        if name not in dtypes or is_array(obj) or not hasattr(obj, "dtype"):
            continue
        found = str(obj.dtype).rpartition(".")[2]
        is_known = _DTYPE_NAME.fullmatch(found)  # a library's own words are left to the exchange
        if is_known and found not in [dtype.name for dtype in dtypes[name]]:
            raise ValueError(
                f"{name} must be {dtype_names(dtypes[name])}; got {found}"
                f"{cast_hint(found, dtypes[name])}"
            )
