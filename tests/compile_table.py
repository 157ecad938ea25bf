"""Compile every template for every target and print what it takes; needs NVRTC, not a GPU.

``python tests/compile_table.py`` exits non-zero where a kernel does not compile, spills or has
another fault (`compiled.faults`). It takes minutes, so CI runs it once, and pytest compiles a few
of the kernels only.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from compiled import faults, usage
from rich.console import Console
from rich.table import Table

from mla_fp8._check.shape import Shape
from mla_fp8._plan.kernel import SHARED_KILOBYTES, Device, Kernel
from mla_fp8._plan.scoring import HOPPER_DEPTHS, HOPPER_HEADS, plan_scores
from mla_fp8._plan.selection import plan_select
from mla_fp8._plan.topk import plan_topk
from mla_fp8._plan.tuning import H200

ARCHS = tuple(SHARED_KILOBYTES)


def archs(kernel: Kernel) -> list[str]:
    """The targets that a kernel is for.

    A target must have the shared memory, and clusters if the kernel asks for them. Scoring with
    wgmma is for sm_90a alone, and so are the scheduler that writes its work ranges (tiles) and the
    selection that runs beside it (several rows in a block).
    """
    macros = dict(kernel.macros)
    hopper = macros.get("kRows", 1) > 1 or macros.get("kTileTokens", 0) > 0
    if kernel.template.endswith("_sm90") or hopper:
        return ["sm_90a"]
    found = [arch for arch in ARCHS if kernel.shared_bytes <= SHARED_KILOBYTES[arch] << 10]
    one_block = macros.get("kCluster", 1) == 1
    return [arch for arch in found if one_block or Device(arch, 1).clusters]


def shape(num_heads=64, depth=128, kv_heads=1, scale_groups=1, **changes) -> Shape:
    """A call's shape: 4096 tokens of 4 sequences against up to 6400 keys."""
    fields = {
        "num_heads": num_heads,
        "depth": depth,
        "kv_heads": kv_heads,
        "scale_groups": scale_groups,
        "causal": True,
        "total_seq_len": 4096,
        "batch": 4,
        "num_blocks": 400,
        "num_layers": 1,
        "page_size": 64,
        "pages_per_seq": 100,
        "max_new": 4096,
        "max_keys": 6400,
        "signed_offsets": False,
        "signed_lengths": False,
    }
    return Shape(**{**fields, **changes})


def kernels() -> list[Kernel]:
    """Every template, with parameters from every corner of what the package takes."""
    device, hopper = Device("sm_80", 108), Device("sm_90a", 132, shared_bytes=227 << 10)
    shapes = [
        *(shape(num_heads=heads) for heads in (1, 8, 16, 32, 64, 100, 128)),
        *(shape(depth=depth) for depth in (32, 64, 256)),
        *(shape(depth=256, scale_groups=groups) for groups in (2, 4, 8)),
        *(shape(scale_groups=groups) for groups in (2, 4)),
        shape(kv_heads=8, scale_groups=2),
        shape(num_heads=128, kv_heads=128, depth=256, scale_groups=8),
        shape(causal=False, signed_offsets=True, signed_lengths=True),
        shape(total_lengths=True),
    ]
    found = [plan_scores(shapes[0], device, H200).kernel]
    for heads in HOPPER_HEADS:
        for depth in HOPPER_DEPTHS:
            for new, page_size in ((1, 64), (1, 1), (2, 16), (4, 64), (4096, 64), (4096, 1)):
                s = shape(num_heads=heads, depth=depth, max_new=new, page_size=page_size)
                plan = plan_scores(s, hopper, H200)
                found += [plan.schedule, plan.kernel, plan.fill]
    for s in shapes:
        found += plan_topk(s, 2048, True, False, device, H200).kernels
    for k in (1, 2048, 4096, 65536):
        for rows, columns in ((1, 5000), (1, 20000), (8, 1 << 20), (20, 1 << 17), (200, 1 << 20)):
            for own in (False, True):
                options = {"values": not own, "own_scores": own}
                found.append(plan_select(rows, columns, k, hopper, H200, **options).kernel)
        for rows, columns in ((1, 1 << 20), (200, 1 << 20), (10000, 5000)):
            s = shape(total_seq_len=rows, max_keys=columns)
            for by_score, values in ((False, False), (True, True)):
                found += plan_topk(s, k, by_score, values, hopper, H200).kernels
    return list(dict.fromkeys(kernel for kernel in found if kernel))


def main() -> int:
    """Print the table and count the kernels with faults."""
    table = Table("template", "macros", *(a + "\nregs" for a in ARCHS), "shared", "faults")
    jobs = [(kernel, arch) for kernel in kernels() for arch in archs(kernel)]
    with ThreadPoolExecutor(os.cpu_count()) as workers:  # NVRTC releases the interpreter's lock
        results = dict(zip(jobs, workers.map(lambda job: usage(*job), jobs), strict=True))
    faulty = 0
    for kernel in kernels():
        found = {arch: results[kernel, arch] for arch in archs(kernel)}
        wrong = [f"{arch}: {words}" for arch in found for words in faults(kernel, found[arch])]
        faulty += bool(wrong)
        table.add_row(
            kernel.template,
            " ".join(f"{name}={value}" for name, value in kernel.macros),
            *(str(found[arch].registers) if arch in found else "" for arch in ARCHS),
            str(kernel.shared_bytes or max(u.shared for u in found.values())),
            "\n".join(wrong),
        )
    Console(width=150).print(table)
    return faulty


if __name__ == "__main__":
    raise SystemExit(main())
