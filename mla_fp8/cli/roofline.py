"""What the machine can do, measured where the benchmark runs: copies and matrix products.

A time as a share of the roofline is the time that the machine needs at least, over the time that
was taken. At least it needs the longer of two: moving the bytes as fast as a copy does, and
multiplying as fast as the vendor's matrix product does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mla_fp8.cli.timer import Timer, Variant, gpu_torch, wall_samples

_GPU_COPY_BYTES, _CPU_COPY_BYTES = 1 << 30, 1 << 27
_GPU_SIDE, _CPU_SIDE = 8192, 1024  # of the square matrices


@dataclass(frozen=True)
class Roofline:
    """Rates that were measured.

    Parameters
    ----------
    copy_tb_per_s : float
        Terabytes per second of a copy, bytes read plus bytes written.
    tflops : float, optional
        TFLOP/s of a matrix product; None if nothing here can multiply as the kernels do.
    product : str
        Which matrix product.
    """

    copy_tb_per_s: float
    tflops: float | None
    product: str

    def percent(self, flop: float, moved: float, microseconds: float) -> float:
        """The least time for this work, as a percentage of the time taken."""
        least = 1e-6 * moved / self.copy_tb_per_s
        if self.tflops is not None:
            least = max(least, 1e-6 * flop / self.tflops)
        return round(100 * least / microseconds, 1)

    def __str__(self) -> str:
        copy = f"copy {self.copy_tb_per_s:.3g} TB/s"
        if self.tflops is None:
            return f"{copy} ({self.product} not measured: percentages are of the copy's rate alone)"
        return f"{copy}, {self.product} {self.tflops:.4g} TFLOP/s"


def _cublas() -> Variant | None:
    """cuBLASLt's FP8 product, if torch is here and the GPU has one."""
    torch = gpu_torch()
    if torch is None:
        return None
    shape = _GPU_SIDE, _GPU_SIDE
    a, b = (torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def call() -> Any:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        call()
    except RuntimeError:  # before compute capability 8.9
        return None
    return Variant([call])


def on_gpu(timer: Timer) -> Roofline:
    """The rates of the current GPU."""
    import cupy

    source = cupy.zeros(_GPU_COPY_BYTES, np.uint8)
    copy = Variant([partial(cupy.copyto, cupy.empty_like(source), source)])
    variants, product = {(0, "copy"): copy}, _cublas()
    if product is not None:
        variants[0, "product"] = product
    times = {name: float(np.median(found)) for name, found in timer.samples(variants, 20).items()}
    variants.clear()
    del source, copy
    cupy.get_default_memory_pool().free_all_blocks()
    return _roofline(
        2 * _GPU_COPY_BYTES,
        times[0, "copy"],
        _GPU_SIDE,
        times.get((0, "product")),
        f"cuBLASLt FP8 {_GPU_SIDE}^3",
    )


def on_cpu() -> Roofline:
    """The rates of NumPy on this CPU, with float64 products, which its backend computes."""
    source = np.zeros(_CPU_COPY_BYTES, np.uint8)
    a = np.random.default_rng(0).random((_CPU_SIDE, _CPU_SIDE))
    calls = {
        "copy": partial(np.copyto, np.empty_like(source), source),
        "product": partial(np.matmul, a, a, np.empty_like(a)),
    }
    times = {name: float(np.median(found)) for name, found in wall_samples(calls, 7).items()}
    product = f"NumPy float64 {_CPU_SIDE}^3"
    return _roofline(2 * _CPU_COPY_BYTES, times["copy"], _CPU_SIDE, times["product"], product)


def _roofline(
    moved: int, copy_us: float, side: int, product_us: float | None, product: str
) -> Roofline:
    tflops = None if product_us is None else 2e-6 * float(side) ** 3 / product_us
    return Roofline(1e-6 * moved / copy_us, tflops, product)
