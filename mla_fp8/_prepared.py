"""A kernel with its arguments laid out once, to be launched many times: 5 us of host time each.

CuPy's own call looks at every argument every time, some 25 us for thirty of them.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import cupy
import numpy as np

from mla_fp8 import _jit
from mla_fp8._plan import Device, Kernel

_FORMATS = {"u8": "Q", "i8": "q", "u4": "I", "i4": "i", "f4": "f"}


class Prepared:
    """A kernel and its arguments: arrays, NumPy scalars of the exact type, or bytes of a structure.

    The arrays must live as long as this does.
    """

    def __init__(self, kernel: Kernel, device: Device, *arguments: Any) -> None:
        from cuda.bindings import driver

        self._launch, self._success = driver.cuLaunchKernel, driver.CUresult.CUDA_SUCCESS
        self._kernel = kernel
        self._function = _jit.load(kernel, device.arch, device.ordinal).kernel.ptr
        self._bytes = bytearray()
        self._places: list[tuple[str, int]] = []
        for argument in arguments:
            given = np.uintp(argument.data.ptr) if isinstance(argument, cupy.ndarray) else argument
            raw = given if isinstance(given, bytes) else given.tobytes()
            kind = "" if isinstance(given, bytes) else _FORMATS[given.dtype.str[1:]]
            self._places.append((kind, len(self._bytes)))
            self._bytes += raw.ljust(-(-len(raw) // 8) * 8, b"\0")
        start = ctypes.addressof((ctypes.c_char * len(self._bytes)).from_buffer(self._bytes))
        addresses = [start + place for _, place in self._places]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._address = ctypes.addressof(self._pointers)

    def change(self, first: int, *values: float) -> None:
        """Replace arguments from number ``first`` on."""
        for (kind, place), value in zip(self._places[first:], values, strict=False):
            struct.pack_into(kind, self._bytes, place, value)

    def __call__(self, blocks: int, stream: Any = None) -> None:
        """Launch so many blocks, on CuPy's current stream or another."""
        to = (stream or cupy.cuda.get_current_stream()).ptr
        kernel = self._kernel
        grid, block = (blocks, 1, 1), (kernel.threads, 1, 1)
        (status,) = self._launch(
            self._function, *grid, *block, kernel.shared_bytes, to, self._address, 0
        )
        if status != self._success:
            raise RuntimeError(f"launching {kernel.template}: {status.name}")
