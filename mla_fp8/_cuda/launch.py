"""A kernel with its parameter struct, launched many times.

CuPy's own call converts every argument of every launch, which takes 25 us for thirty arguments.
Here the struct stays between launches, and a call sets the fields that differ.
"""

from __future__ import annotations

import ctypes

from mla_fp8._cuda import jit
from mla_fp8._cuda.params import PARAMS, struct_type
from mla_fp8._plan.kernel import Device, Kernel


class Launch:
    """A kernel and its ``Params``; `params` is the host's copy of the struct.

    The memory that an address points to must live until the kernel has ended. ``early``: the kernel
    may begin while the kernel before it on the stream still runs (programmatic dependent launch);
    it waits for that kernel's results itself.
    """

    def __init__(self, kernel: Kernel, device: Device, *, early: bool = False) -> None:
        from cuda.bindings import driver

        struct = struct_type(PARAMS[kernel.template].dtype)
        # The driver copies sizeof(Params), which may end in up to 63 bytes of padding.
        self._memory = ctypes.create_string_buffer(ctypes.sizeof(struct) + 64)
        self.params = struct.from_buffer(self._memory)
        self._driver, self._template = driver, kernel.template
        self._launch, self._success = driver.cuLaunchKernelEx, driver.CUresult.CUDA_SUCCESS
        function = jit.load(kernel, device.arch, device.ordinal).kernel.ptr
        self._function = driver.CUfunction(function)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._memory))
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
        """Launch this many blocks on the stream with this handle."""
        if (blocks, stream) != self._on:
            self._config.gridDimX, self._config.hStream = blocks, self._driver.CUstream(stream)
            self._on = blocks, stream
        (status,) = self._launch(self._config, self._function, self._parameters, 0)
        if status != self._success:
            raise RuntimeError(f"launching {self._template}: {status.name}")
