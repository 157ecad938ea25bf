"""Compile every template for every target and print what it takes; needs NVRTC, not a GPU.

``python tests/compile_table.py`` exits non-zero where a kernel does not compile, spills or has
another fault (`compiled.faults`). It takes minutes, so CI runs it once, and pytest compiles a few
of the kernels only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

from compiled import faults, usage
from rich.console import Console
from rich.table import Table

from mla_fp8._check.shape import Shape
from mla_fp8._plan.kernel import SHARED_KILOBYTES, Device, Kernel
from mla_fp8._plan.keys import (
    BY_POSITION,
    BY_SLOT,
    BY_TOKEN,
    NUMBER_TYPES,
    WriteForm,
    hadamard_kernel,
    per_number_kernel,
)
from mla_fp8._plan.merge import merge_kernel
from mla_fp8._plan.scoring import HOPPER_DEPTHS, plan_scores
from mla_fp8._plan.selection import plan_select, translate_kernel
from mla_fp8._plan.topk import plan_topk
from mla_fp8._plan.tuning import H200

ARCHS = tuple(SHARED_KILOBYTES)


def archs(kernel: Kernel) -> list[str]:
    """The targets that a kernel is for.

    A target must have the shared memory, and clusters if the kernel asks for them. Scoring with
    wgmma is for sm_90a alone, and so are the scheduler that writes its work ranges (tiles), the
    selection that runs beside it (several rows in a block), and that of decode (kLocates).
    """
    macros = dict(kernel.macros)
    hopper = macros.get("kRows", 1) > 1 or macros.get("kTileTokens", 0) > 0
    hopper = hopper or macros.get("kLocates", 0) == 1
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


def with_slots(kernels: Iterable[Kernel]) -> Iterator[Kernel]:
    """The selection kernels among them, for output="both", and one of each form for "slots".

    Slots in place of positions (1) are a part of slots beside them (2): in a table of both, no
    kernel had more registers with 1 than with 2. Clusters of 2, 4 and 8 blocks run the same code,
    and 4 have the most registers with slots; 8 are here where a block finds its rows itself.
    """
    in_place = set()
    for kernel in kernels:
        macros = dict(kernel.macros)
        if not macros.get("kOwnScores") or macros["kTopK"] not in (2048, 65536):
            continue
        if macros.get("kCluster", 1) in (2, 8) and not macros["kLocates"]:
            continue
        form = kernel.template, macros["kLocates"], macros.get("kRows", 1)
        for slots in (2,) if form in in_place else (1, 2):
            yield replace(kernel, macros=tuple({**macros, "kSlots": slots}.items()))
        in_place.add(form)


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
    shapes += [shape(num_heads=12, key_alignment=alignment) for alignment in (4, 1)]
    found = [plan_scores(shapes[0], device, H200).kernel]
    doors = [{"key_alignment": alignment} for alignment in (4, 1)]
    doors += [{"kpool": kpool, "key_step": step} for kpool, step in ((4, 1), (1, 3), (4, 2))]
    for new, changes in product((1, 4096), doors):
        plan = plan_scores(shape(max_new=new, **changes), hopper, H200)
        found += [plan.schedule, plan.kernel]
    for heads, depth in product((4, 8, 16, 32, 64, 128), HOPPER_DEPTHS):
        if depth == HOPPER_DEPTHS[0] and heads not in (8, 128):
            continue
        for new, page_size in ((1, 64), (1, 1), (2, 16), (4, 64), (4096, 64), (4096, 1)):
            s = shape(num_heads=heads, depth=depth, max_new=new, page_size=page_size)
            plan = plan_scores(s, hopper, H200)
            found += [plan.schedule, plan.kernel, plan.fill]
    for s in shapes:
        found += plan_topk(s, 2048, True, False, device, H200).kernels
    for k in (1, 2048, 4096, 65536):
        for rows, columns in ((1, 5000), (1, 20000), (8, 1 << 20), (20, 1 << 17), (200, 1 << 20)):
            for own in (False, True) if k in (2048, 65536) else (k == 1,):
                options = {"values": not own, "own_scores": own}
                found.append(plan_select(rows, columns, k, hopper, H200, **options).kernel)
        for new, rows, columns in (
            *((1, 1, 8192), (1, 1, 1 << 20)),  # decode
            *((4096, 200, 1 << 20), (4096, 10000, 5000)),
        ):
            s = shape(total_seq_len=rows, max_new=new, max_keys=columns)
            for by_score, values in ((False, False), (True, True)):
                found += plan_topk(s, k, by_score, values, hopper, H200).kernels
    found = [kernel for kernel in found if kernel]
    found += list(with_slots(found))
    for slots, sharded in ((2, True), (2, False), (1, False), (0, True)):
        found.append(translate_kernel(2048, slots, sharded))
    found.append(merge_kernel(8, 2048, 2048, False, False, True, device))  # 256 threads, 2 blocks
    for lists, width, k in ((8, 4096, 4096), (2, 2048, 2048), (3, 2047, 64), (3, 40000, 65536)):
        for by_score, values in ((False, False), (True, True)):
            found.append(merge_kernel(lists, width, k, by_score, values, not values, device))
    found += writers()
    return list(dict.fromkeys(found))


def writers() -> list[Kernel]:
    """The kernels that write keys and transform them."""
    found = []
    for number in NUMBER_TYPES.values():
        for depth, groups in ((32, 1), (128, 1), (256, 8)):
            found.append(WriteForm(depth, groups, number, True, 16, BY_SLOT).kernel)
        for depth, groups in ((64, 2), (128, 4)):
            found.append(WriteForm(depth, groups, number, False, 1, BY_POSITION).kernel)
        found.append(WriteForm(128, 1, number, True, 4, BY_POSITION).kernel)
        found.append(WriteForm(128, 1, number, True, 16, BY_TOKEN).kernel)
        found += [hadamard_kernel(depth, number, depth > 32) for depth in (32, 128, 256)]
        found += [per_number_kernel(template, number) for template in ("rope", "pool_keys")]
    return found


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
