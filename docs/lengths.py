"""Draw docs/lengths.svg: time and memory of the whole operation over the length of the sequence.

Times are those of docs/benchmarks.md; memory is what the plan says (pure, no GPU).
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from mla_fp8._check.problem import Shape
from mla_fp8._plan import topk as _plan
from mla_fp8._plan.kernel import Device

H200 = Device("sm_90a", 132, shared_bytes=227 << 10)
HEADS, TOKENS, K = 32, 4096, 2048
LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576]
# Microseconds at 32 heads, 4096 new tokens: whole operation, DeepGEMM's scoring alone.
MEASURED = {
    4096: (182.2, 137.8),
    8192: (352.7, 276.5),
    32768: (1259.7, 1216.3),
    65536: (2449.4, 2663.5),
    262144: (9992.9, 10464.5),
}


def scratch(keys: int) -> int:
    """Bytes that a call with so many keys takes."""
    pages = keys // 64
    shape = Shape(
        HEADS, 128, 1, 1, True, TOKENS, 1, pages, 1, 64, pages, TOKENS, keys, False, False
    )
    return _plan.plan_topk(shape, K, False, False, H200).scratch.end


def main() -> None:
    """Write the drawing beside this file."""
    matplotlib.rcParams["svg.hashsalt"] = "mla_fp8"  # the same bytes every time
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    lengths = list(MEASURED)
    for i, name in enumerate(("whole operation", "DeepGEMM, scoring alone")):
        time.plot(lengths, [pair[i] / 1000 for pair in MEASURED.values()], "o-", label=name)
    time.set(title="Time, ms (32 heads, 4096 new tokens)", xlabel="keys")
    memory.plot(LENGTHS, [scratch(n) / 2**20 for n in LENGTHS], "o-", label="scratch_bytes")
    every = [4 * TOKENS * n / 2**20 for n in LENGTHS]
    memory.plot(LENGTHS, every, "o-", label="all scores")
    memory.set(title="Memory beside the output, MiB", xlabel="keys")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    path = Path(__file__).with_name("lengths.svg")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
