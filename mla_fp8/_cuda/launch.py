"""A kernel with its parameter struct, launched many times.

CuPy's own call converts every argument of every launch, which takes 25 us for thirty arguments.
Here the struct stays, and a launch sets the fields that have changed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from mla_fp8._cuda import jit
from mla_fp8._cuda.params import PARAMS, fields_of
from mla_fp8._plan.kernel import Device, Kernel

_FORMATS: dict[str, Any] = {"u8": "Q", "i8": "q", "u4": "I", "i4": "i", "f4": "f"}


class Struct:
    """The bytes of a struct, whose fields are set by name."""

    def __init__(self, dtype: np.dtype, **values: Any) -> None:
        self.bytes = bytearray(dtype.itemsize + 64)  # Params may end in up to 63 bytes of padding
        self._fields: dict[str, Any] = {}
        for name, kind, offset in fields_of(dtype):
            view = memoryview(self.bytes)[offset : offset + kind.itemsize]
            form = _FORMATS.get(kind.str[1:])  # none for a struct or an array
            self._fields[name] = view.cast(form) if form else view
        self.size = dtype.itemsize
        self.set(**values)

    def set(self, **values: Any) -> None:
        """Set fields: numbers, or the bytes of a nested struct or array.

        Raises
        ------
        KeyError
            If there is no such field.
        """
        fields = self._fields
        for name, value in values.items():
            if type(value) is bytes:
                fields[name][:] = value
            elif type(value) is Struct:
                fields[name][:] = value.bytes[: value.size]
            else:
                fields[name][0] = value


class Launch(Struct):
    """A kernel and its ``Params``.

    What an address points to must live until the kernel is done. ``early``: the kernel may begin
    while the one before it on the stream still runs (programmatic dependent launch); it waits for
    that one's results itself.
    """

    def __init__(
        self, kernel: Kernel, device: Device, *, early: bool = False, **values: Any
    ) -> None:
        from cuda.bindings import driver

        super().__init__(PARAMS[kernel.template].dtype, **values)
        self._driver, self._template = driver, kernel.template
        self._launch, self._success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS
        function = jit.load(kernel, device.arch, device.ordinal).kernel.ptr
        self._function = driver.CUfunction(function)
        start = ctypes.addressof((ctypes.c_char * len(self.bytes)).from_buffer(self.bytes))
        self._pointers = (ctypes.c_void_p * 1)(start)  # of the one parameter
        self._parameters = ctypes.addressof(self._pointers)
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

    def __call__(self, blocks: int, stream: int) -> None:
        """Launch so many blocks on the stream with that handle."""
        if (blocks, stream) != self._on:
            self._config.gridDimX, self._config.hStream = blocks, self._driver.CUstream(stream)
            self._on = blocks, stream
        (status,) = self._launch(self._config, self._function, self._parameters, 0)
        if status != self._success:
            raise RuntimeError(f"launching {self._template}: {status.name}")
