"""``python -m mla_fp8 warmup``: compile kernels ahead, for the GPU here or another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

from rich.console import Console
from rich.progress import track

from mla_fp8 import _jit, _plan, info
from mla_fp8._kernel import SHARED_KILOBYTES, Device, Kernel
from mla_fp8._parameters import Mask, check_int, scale_groups
from mla_fp8._problem import Shape
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged

_NEW = (1, 2, 4, 8, 16, 4096)  # tokens of a sequence
_BATCHES = (1, 16, 64, 256)
_KEYS = (4096, 16384, 32768, 131072, 1 << 20)
_WORKERS = 4


def _device(arch: str | None) -> Device | None:
    """The first GPU, or one of an architecture that need not be here."""
    gpus = info.gpus()
    if arch is None:
        if not gpus:
            return None
        from mla_fp8 import _launch

        return _launch.device_facts(0)
    return Device(arch, 132, shared_bytes=SHARED_KILOBYTES.get(arch, 99) << 10)


def kernels(op: MLAIndexerRaggedFloat8Paged, page_size: int, device: Device) -> list[Kernel]:
    """What calls with usual batches, lengths and options need."""
    groups = scale_groups("quantization_granularity", op.depth, op.quantization_granularity)
    found: dict[Kernel, None] = {}
    options = product((False, True), repeat=2)
    for (by_score, values), new, batch, keys in product(options, _NEW, _BATCHES, _KEYS):
        shape = Shape(
            num_heads=op.num_heads,
            depth=op.depth,
            kv_heads=1,
            scale_groups=groups,
            causal=op.mask is Mask.CAUSAL,
            total_seq_len=new * batch,
            batch=batch,
            num_blocks=keys // page_size + 1,
            num_layers=1,
            page_size=page_size,
            pages_per_seq=keys // page_size + 1,
            max_new=new,
            max_keys=keys,
            signed_offsets=False,
            signed_lengths=False,
        )
        plan = _plan.plan_topk(shape, op.k, by_score, values, device)
        needed = plan.scoring.locate, plan.scoring.score, plan.select, plan.sort
        found |= dict.fromkeys(kernel for kernel in needed if kernel)
    return list(found)


def run(
    num_heads: int,
    depth: int,
    k: int,
    quantization_granularity: int,
    mask: str,
    page_size: int,
    arch: str | None,
) -> int:
    """Compile into the kernel cache what an operation with these parameters needs."""
    console = Console()
    try:
        op = MLAIndexerRaggedFloat8Paged(num_heads, depth, k, quantization_granularity, mask)
        check_int("page_size", page_size, range(1, 1 << 16))
    except (TypeError, ValueError) as error:
        console.print(f"warmup: {error}")
        return 2
    device = _device(arch)
    if device is None:
        console.print("warmup: no usable NVIDIA GPU here; --arch says for which to compile")
        return 2
    wanted = kernels(op, page_size, device)
    missing = [kernel for kernel in wanted if not _jit.cubin_path(kernel, device.arch).exists()]
    with ThreadPoolExecutor(_WORKERS) as workers:
        done = workers.map(lambda kernel: _jit.ensure_cubin(kernel, device.arch), missing)
        for _ in track(done, "Compiling", len(missing), console=console, disable=not missing):
            pass
    console.print(
        f"{len(wanted)} kernels for {device.arch}: {len(missing)} compiled, the others were there",
        f"({_jit.cache_folder()})",
        soft_wrap=True,
    )
    return 0
