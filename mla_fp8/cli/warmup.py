"""``python -m mla_fp8 warmup``: compile kernels ahead, for the GPU here or another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

from rich.progress import track

from mla_fp8._check.parameters import Mask, check_int, scale_groups
from mla_fp8._check.shape import Shape
from mla_fp8._cuda import cubins, jit
from mla_fp8._plan.kernel import SHARED_KILOBYTES, Device, Kernel
from mla_fp8._plan.topk import plan_topk
from mla_fp8._plan.tuning import H200
from mla_fp8.cli import info
from mla_fp8.cli.command import CommandError, Console
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged

_NEW = (1, 2, 4, 8, 16, 4096)  # new tokens of a sequence
_BATCHES = (1, 16, 64, 256)
_KEYS = (4096, 16384, 32768, 131072, 1 << 20)
_WORKERS = 4


def _device(arch: str | None) -> Device:
    """The first GPU, or a GPU of an architecture, which need not be here."""
    if arch is not None:
        if arch not in (allowed := jit.architectures()):
            raise CommandError(f"--arch must be one of {', '.join(allowed)}; got {arch}")
        return Device(arch, 132, shared_bytes=SHARED_KILOBYTES.get(arch, 99) << 10)
    if not info.gpus():
        raise CommandError("no usable NVIDIA GPU here; --arch says for which to compile")
    from mla_fp8._cuda import backend

    return backend.device_facts(0)


def kernels(op: MLAIndexerRaggedFloat8Paged, page_size: int, device: Device) -> list[Kernel]:
    """The kernels of calls with usual batches, lengths and options."""
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
        plan = plan_topk(shape, op.k, by_score, values, device, H200)
        found |= dict.fromkeys(plan.kernels)
    return list(found)


def run(
    num_heads: int,
    depth: int,
    k: int,
    quantization_granularity: int,
    mask: str,
    page_size: int,
    arch: str | None,
) -> None:
    """Compile into the kernel cache what an operation with these parameters needs."""
    try:
        op = MLAIndexerRaggedFloat8Paged(num_heads, depth, k, quantization_granularity, mask)
        check_int("page_size", page_size, range(1, 1 << 16))
        device = _device(arch)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from None
    try:
        folder = cubins.cache_folder()
        cubins.try_out(folder)
    except OSError as error:
        raise CommandError(
            f"no kernels can be kept: {error}; set MLA_FP8_CACHE_DIR to another folder"
        ) from None
    console = Console()
    wanted = kernels(op, page_size, device)
    missing = [kernel for kernel in wanted if not jit.is_kept(kernel, device.arch)]
    workers = ThreadPoolExecutor(_WORKERS)
    try:
        done = workers.map(lambda kernel: jit.ensure_cubin(kernel, device.arch), missing)
        for _ in track(done, "Compiling", len(missing), console=console, disable=not missing):
            pass
    finally:
        workers.shutdown(cancel_futures=True)  # after Ctrl-C only what has begun is waited for
    console.print(
        f"{len(wanted)} kernels for {device.arch}: {len(missing)} compiled, the others were there",
        f"({folder})",
        soft_wrap=True,
        markup=False,
    )
