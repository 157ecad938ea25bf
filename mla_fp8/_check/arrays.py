"""Checks of NumPy and CuPy arrays: dtype, shape, memory layout, overlap.

CuPy is never imported here: a process that holds a CuPy array has imported it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from mla_fp8._check.parameters import brief

Array = Any  # numpy.ndarray or cupy.ndarray; CuPy may be absent and ships no type stubs

# One axis of an expected shape: a name (any extent), an extent, or a name with an extent or None.
Axis = str | int | tuple[str, int | None]

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
CODES = (FP8, np.dtype(np.uint8))  # FP8 numbers, and their bits
INDEX = (np.dtype(np.uint32), np.dtype(np.int32))
FLOAT = (np.dtype(np.float32),)
POOLS = ("k_blocks", "k_scales")  # the strides of their blocks and layers are free
_MOST_WORK = 10_000  # candidates of NumPy's overlap test; a fused page needs fewer than ten
INSTALL = "pip install -e '.[cuda13]' (or '.[cuda12]') in a checkout of mla_fp8"


def is_cupy(obj: object) -> bool:
    """Whether ``obj`` is a CuPy array."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(obj, cupy.ndarray)


def is_array(obj: object) -> bool:
    """Whether ``obj`` is a NumPy or CuPy array."""
    return isinstance(obj, np.ndarray) or is_cupy(obj)


def namespace_of(array: Array) -> Any:
    """The module, numpy or cupy, that ``array`` belongs to."""
    return sys.modules["cupy"] if is_cupy(array) else np


def device_of(array: Array) -> AbstractContextManager[Any]:
    """A context in which CuPy works on the device of ``array``; it does nothing for NumPy."""
    return array.device if is_cupy(array) else nullcontext()


def empty_beside(array: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array in the library and on the device of ``array``."""
    with device_of(array):
        return namespace_of(array).empty(shape, dtype)


def dtype_names(dtypes: tuple[Any, ...]) -> str:
    """The names of dtypes, for an error message."""
    return " or ".join(dtype.name for dtype in dtypes)


def cast_hint(found: str, dtypes: tuple[Any, ...]) -> str:
    """How to cast the dtype ``found`` to one of ``dtypes``; empty if a cast would not be right."""
    wanted = [dtype.name for dtype in dtypes]
    if found not in wanted and "float32" in wanted and "float" in found:
        return ": cast it with .astype('float32'), in torch with .float()"
    if found not in wanted and "int32" in wanted and found.lstrip("u").startswith("int"):
        return ": cast it with .astype('int32'), in torch with .to(torch.int32)"
    return ""


@lru_cache(maxsize=1024)
def check_form(
    name: str, dtype: Any, shape: tuple[int, ...], dtypes: tuple[Any, ...], axes: tuple[Axis, ...]
) -> None:
    """Raise unless ``dtype`` is one of ``dtypes`` and ``shape`` has the extents in ``axes``."""
    extents = [axis[1] if isinstance(axis, tuple) else axis for axis in axes]
    fits = len(extents) == len(shape) and all(
        extent is None or isinstance(extent, str) or extent == found
        for extent, found in zip(extents, shape, strict=True)
    )
    if dtype not in dtypes or not fits:
        words = [
            (axis[0] if axis[1] is None else f"{axis[0]} = {axis[1]}")
            if isinstance(axis, tuple)
            else str(axis)
            for axis in axes
        ]
        raise ValueError(
            f"{name} must be {dtype_names(dtypes)} [{', '.join(words)}]; "
            f"got {brief(dtype)} {shape}{cast_hint(str(dtype), dtypes)}"
        )


def check_start(name: str, array: Array, multiple: int = 0) -> None:
    """Raise unless a GPU array starts on a multiple of ``multiple`` bytes; 0: of its item size.

    A misaligned load is an error that ends the CUDA context.
    """
    if isinstance(array, np.ndarray):
        return
    multiple = multiple or array.itemsize
    if array.data.ptr % multiple:
        raise ValueError(
            f"{name} must start at a multiple of {multiple} bytes; got address {array.data.ptr:#x}"
        )


def check_aligned(name: str, array: Array) -> None:
    """Raise unless every element of a GPU array, which may be strided, is aligned."""
    check_start(name, array)
    if not isinstance(array, np.ndarray) and any(s % array.itemsize for s in array.strides):
        raise ValueError(
            f"{name} must have strides that are multiples of {array.itemsize} bytes; "
            f"got {array.strides}"
        )


def check_contiguous(name: str, array: Array, multiple: int = 0) -> None:
    """Raise unless ``array`` is C-contiguous and passes `check_start`."""
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous; got strides {array.strides} for shape {array.shape} "
            "(ascontiguousarray makes a copy)"
        )
    if not isinstance(array, np.ndarray) and array.data.ptr % (multiple or array.itemsize):
        check_start(name, array, multiple)


def check_pool(name: str, array: Array) -> None:
    """Raise unless the last three axes of a pool of pages are contiguous.

    The strides of blocks and layers are free: they may leave room for other bytes.
    """
    page = array[:1, :1, :1]
    if not page.flags.c_contiguous:
        raise ValueError(
            f"{name} must be contiguous in its last three axes; got strides {array.strides} for "
            f"shape {array.shape} (ascontiguousarray makes a copy)"
        )
    check_aligned(name, array)


def check_array(
    name: str, array: Array, dtypes: tuple[Any, ...], axes: tuple[Axis, ...], multiple: int = 0
) -> None:
    """Raise unless ``array`` passes `check_form` and `check_contiguous`."""
    check_form(name, array.dtype, array.shape, dtypes, axes)
    check_contiguous(name, array, multiple)


def alignment_of(bits: int) -> int:
    """The largest of 16, 4 and 1 bytes that kernels load at once from an address.

    ``bits``: the address and the strides, joined by ``|``.
    """
    return 16 if bits % 16 == 0 else 4 if bits % 4 == 0 else 1


class _Memory:
    """Memory, which may be a device's, for NumPy to compare; it is never read."""

    def __init__(
        self, address: int, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{itemsize}",
        }


def share_memory(a: Array, b: Array) -> bool:
    """Whether two arrays, which may be strided and on a device, have a byte in common.

    True as well where strides are so unlike that it takes too much work to tell.
    """
    if a.size == 0 or b.size == 0:
        return False
    return _share(*((_address(x), x.itemsize, x.shape, x.strides) for x in (a, b)))


@lru_cache(maxsize=1024)
def _share(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """`share_memory` of what `_Memory` takes. Cached, because calls in a loop repeat it."""
    memory = np.asarray(_Memory(*a)), np.asarray(_Memory(*b))
    try:
        return np.shares_memory(*memory, max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _address(array: Array) -> int:
    """Where the first element of an array stands."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def _bounds(array: Array) -> tuple[int, int]:
    """The first and the past-the-end address of a strided array."""
    start = _address(array)
    steps = [s * (n - 1) for s, n in zip(array.strides, array.shape, strict=True)]
    low = sum(step for step in steps if step < 0)
    return start + low, start + sum(step for step in steps if step > 0) + array.itemsize


def check_writable(outputs: dict[str, Array], inputs: dict[str, Array]) -> None:
    """Raise if an output is read-only, or overlaps an input or another output.

    Only `POOLS` may have gaps. Every other array fills ``nbytes`` from its address on.
    """
    on_host = isinstance(next(iter(outputs.values())), np.ndarray)
    taken: list[tuple[str, int, int]] = []  # name, first and past-the-end address
    given = inputs | outputs
    for name, array in given.items():
        if name in POOLS and not array.flags.c_contiguous:
            start, stop = _bounds(array)
        else:  # the usual case, without a call
            start = array.ctypes.data if on_host else array.data.ptr
            stop = start + array.nbytes
        if name in outputs:
            if on_host and not array.flags.writeable:
                raise ValueError(f"{name} must be writable; got a read-only array")
            for other, low, high in taken:
                if start < high and low < stop and share_memory(array, given[other]):
                    raise ValueError(
                        f"{name} must not overlap {other}; got memory shared between the two"
                    )
        taken.append((name, start, stop))
