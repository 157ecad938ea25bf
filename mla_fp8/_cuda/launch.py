"""A kernel with its arguments laid out once, to be launched many times.

CuPy's own call looks at every argument every time, some 25 us for thirty of them.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np

from mla_fp8._cuda import jit
from mla_fp8._plan.kernel import Device, Kernel

_FORMATS = {"u8": "Q", "i8": "q", "u4": "I4x", "i4": "i4x", "f4": "f4x"}  # 8 bytes each
ADDRESS = np.uintp(0)  # in place of an argument to be set


class Prepared:
    """A kernel and its arguments: NumPy scalars of the exact type, or bytes of a structure.

    What an address points to must live until the launches are done. ``early``: a launch may begin
    while the one before it on the stream still runs, which the kernel must wait for itself.
    """

    def __init__(
        self, kernel: Kernel, device: Device, *arguments: Any, early: bool = False
    ) -> None:
        from cuda.bindings import driver

        self._driver, self._template = driver, kernel.template
        self._launch, self._success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS
        function = jit.load(kernel, device.arch, device.ordinal).kernel.ptr
        self._function = driver.CUfunction(function)
        self._bytes = bytearray()
        self._places: list[int] = []
        self._formats: list[str] = []
        for given in arguments:
            raw = given if isinstance(given, bytes) else given.tobytes()
            self._formats.append("" if isinstance(given, bytes) else _FORMATS[given.dtype.str[1:]])
            self._places.append(len(self._bytes))
            self._bytes += raw.ljust(-(-len(raw) // 8) * 8, b"\0")
        self._structs: dict[tuple[int, int], struct.Struct] = {}
        start = ctypes.addressof((ctypes.c_char * len(self._bytes)).from_buffer(self._bytes))
        addresses = [start + place for place in self._places]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._address = ctypes.addressof(self._pointers)
        self._config = config = driver.CUlaunchConfig()
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX, config.sharedMemBytes = kernel.threads, kernel.shared_bytes
        if early:
            attribute = driver.CUlaunchAttribute()
            names = driver.CUlaunchAttributeID
            attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        self._on = (0, -1)  # blocks, stream

    def change(self, first: int, *values: float) -> None:
        """Replace arguments from number ``first`` on."""
        packer = self._structs.get((first, len(values)))
        if packer is None:
            form = "=" + "".join(self._formats[first : first + len(values)])
            packer = self._structs[first, len(values)] = struct.Struct(form)
        packer.pack_into(self._bytes, self._places[first], *values)

    def change_bytes(self, number: int, value: bytes) -> None:
        """Replace a structure."""
        self._bytes[self._places[number] : self._places[number] + len(value)] = value

    def __call__(self, blocks: int, stream: int) -> None:
        """Launch so many blocks on the stream of that handle."""
        if (blocks, stream) != self._on:
            self._config.gridDimX, self._config.hStream = blocks, self._driver.CUstream(stream)
            self._on = blocks, stream
        (status,) = self._launch(self._config, self._function, self._address, 0)
        if status != self._success:
            raise RuntimeError(f"launching {self._template}: {status.name}")
