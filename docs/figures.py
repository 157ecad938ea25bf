"""Write the table and the plots of ``docs/benchmarks.md`` from ``docs/data/``.

``python docs/figures.py`` rewrites what stands between the ``figures.py`` markers of the page and
of the README, and draws ``docs/benchmarks.svg`` (needs matplotlib). ``docs/data/bench.json`` is
what ``python -m mla_fp8 bench --only all --json docs/data/bench.json`` writes;
``docs/data/gpus.json`` is what ``--only gpus`` writes on a machine with several GPUs, and
``docs/data/peers.json`` holds the times of other libraries' selections, measured once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = {
    "docs": DOCS / "benchmarks.md",
    "readme": DOCS.parent / "README.md",
    "testing": DOCS / "testing.md",
    "many_gpus": DOCS / "howto" / "many_gpus.md",
}
HEADS = 64
# Group and shape (sequences x new tokens x keys) of each line, and what the page calls it.
LINES = {
    ("topk", "1 x 4096 x 16384"): "prefill, 4096 new tokens, 16384 keys",
    ("topk", "1 x 4096 x 65536"): "prefill, 4096 new tokens, 65536 keys",
    ("topk", "1 x 4096 x 131072"): "prefill, 4096 new tokens, 131072 keys",
    ("decode topk", "1 x 1 x 32768"): "decode, 1 sequence of 32768 keys",
    ("decode topk", "1 x 1 x 131072"): "decode, 1 sequence of 131072 keys",
    ("decode topk", "16 x 1 x 131072"): "decode, 16 sequences of 131072 keys",
    ("decode topk", "256 x 1 x 32768"): "decode, 256 sequences of 32768 keys",
    ("mixed topk", "48 x 1 x 63..131071"): "decode, 48 sequences of 64 to 131072 keys",
}
DOORS = {  # what is compared, and what the page calls it and its reference
    "fused": ("reading the fused page of serving engines", "split pools"),
    "slots": ("slots instead of positions", "positions"),
    "kpool 4": ("`kpool=4`, this many tokens", "a plain call over a quarter of the keys"),
    "merge": ("`merge_topk`: 8 lists of 2048, 4096 rows", "scoring of one rank, 4096 x 65536"),
    "write bfloat16": ("`write_keys`, 1M tokens, bfloat16", "a copy of as many bytes"),
    "write float16": ("`write_keys`, 1M tokens, float16", "a copy of as many bytes"),
    "write float32": ("`write_keys`, 1M tokens, float32", "a copy of as many bytes"),
    "write bfloat16, fused": ("the same into fused pages, bfloat16", "a copy of as many bytes"),
}
SPLITS = {  # the shape and what the ranks share, and what the page calls it
    ("1 x 1 x 1048576", "keys"): "decode, 1 sequence of 1048576 keys, by keys",
    ("16 x 1 x 262144", "keys"): "decode, 16 sequences of 262144 keys, by keys",
    ("1 x 2048 x 262144", "keys"): "prefill, 2048 new tokens, 262144 keys, by keys",
    ("1 x 2048 x 262144", "rows"): "prefill, 2048 new tokens, 262144 keys, by rows",
}
PROJECTED = 8, 64  # ranks, whose own parts are measured on one GPU
SEVERAL_GPUS = """\
## Several GPUs

`NCCL_NVLS_ENABLE=0 python -m mla_fp8 bench --only gpus --json docs/data/gpus.json` starts a process
for each GPU; the variable turns NVLink multicast off.
Commit {commit}, {count} of {gpu}, 64 heads, k = 2048, causal, keys interleaved. In the same run
every result was compared with that of one GPU, bit by bit. Times are medians of 21 replays of a
CUDA graph, of the slowest rank, with a cold L2; all GPUs begin a sample together. *Own
selection*, *what travels* and *merge or reorder* are the parts of the time of {count} GPUs, each
measured by itself: a rank's call, NCCL's all-gather, and `merge_topk` by keys or a copy into the
order of the tokens by rows ([data/gpus.json](data/gpus.json)).
"""
PROJECTION = """\
## More GPUs than were measured

![Parts of the time by the number of GPUs](../pictures/many_gpus.svg)

**This is a projection, not a measurement of 8 or 64 GPUs.** A rank's own selection and the merge
are measured, on one GPU: the call on an eighth or a 64th of the keys or tokens, and `merge_topk` of
8 or 64 lists. What travels is computed from {count} GPUs: the smallest all-gather took
{latency} µs, the largest moved {rate} GB/s, and each GPU receives the lists of all others. So it
supposes that all GPUs are linked as these {count} are, and that NCCL takes no longer to start with
more of them; between hosts both are optimistic. Above each bar stands the speed-up over one GPU.

By keys, what a rank receives grows with the number of ranks, and its own work shrinks: past some
number of GPUs, more of them make a call slower. By rows, what travels stays the same.
"""
README_LINES = [
    ("topk", "1 x 4096 x 65536"),
    ("decode topk", "1 x 1 x 131072"),
    ("decode topk", "16 x 1 x 131072"),
]


def load(name: str) -> dict[str, Any]:
    """A file of ``docs/data/``."""
    found: dict[str, Any] = json.loads((DOCS / "data" / name).read_text(encoding="utf-8"))
    return found


def find(bench: dict[str, Any], group: str, shape: str, heads: int = HEADS) -> dict[str, Any]:
    """The row of a shape on random data and pages of 64 keys."""
    wanted = {"group": group, "shape": shape, "heads": heads, "data": "random", "page": 64}
    for row in bench["rows"]:
        if all(row.get(name) == value for name, value in wanted.items()):
            return dict(row)
    raise KeyError(f"bench.json has no row with {wanted}")


def lengths(bench: dict[str, Any], group: str, batch: int, new: int | None) -> dict[int, dict]:
    """Rows of a group by the number of keys: so many sequences, of equally many new tokens."""
    pattern = re.compile(rf"{batch} x {'[0-9]+' if new is None else new} x ([0-9]+)")
    found = {}
    for row in bench["rows"]:
        wanted = {"group": group, "heads": HEADS, "data": "random", "page": 64}
        match = pattern.fullmatch(row["shape"])
        if match and all(row.get(name) == value for name, value in wanted.items()):
            found.setdefault(int(match[1]), row)
    return dict(sorted(found.items()))


def microseconds(time: float | None) -> str:
    """Three digits."""
    if time is None:
        return "–"
    return f"{time:.0f}" if time >= 100 else f"{time:.1f}"


def ratio(theirs: float | None, ours: float) -> str:
    """The speed-up over a peer: above 1 is faster."""
    return "–" if theirs is None else f"{theirs / ours:.2f}"


def table(bench: dict[str, Any], peers: dict[str, Any], lines: list[tuple[str, str]]) -> str:
    """The whole operation beside its peers."""
    selected = {row["shape"]: row["exact_us"] / row["deepgemm_us"] for row in peers["rows"]}
    text = [
        "| whole operation | µs | real-like data, µs "
        "| speed-up over DeepGEMM + fastest exact top-k | speed-up over DeepGEMM, scores only |",
        "|---|---|---|---|---|",
    ]
    for group, shape in lines:
        row = find(bench, group, shape)
        ours, scores_only = row["topk_us"], row.get("deepgemm_us")
        both = scores_only * selected[shape] if scores_only and shape in selected else None
        cells = LINES[group, shape], microseconds(ours), microseconds(row.get("real_us"))
        ratios = ratio(both, ours), ratio(scores_only, ours)
        text.append("| " + " | ".join((*cells, *ratios)) + " |")
    return "\n".join(text)


def doors(found: dict[str, Any]) -> str:
    """Other layouts, outputs, shards and writers beside what they are compared with."""
    text = [f"Commit {found['commit']}, {found['gpu']['name']}.", ""]
    text += ["| | µs | compared with | µs | ratio of the times |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        what, reference = DOORS[row["data"]]
        shape = f", {row['shape']}" if row["data"] in ("fused", "slots", "kpool 4") else ""
        times = microseconds(row["us"]), microseconds(row["compared_us"])
        text.append(
            f"| {what}{shape} | {times[0]} | {reference} | {times[1]} | {row['ratio']:.3f} |"
        )
    return "\n".join(text)


def gpus(found: dict[str, Any]) -> str:
    """The section on several GPUs beside one, with the parts of their time."""
    count = found["rows"][0]["gpus"]
    heads = ("one GPU", f"{count} GPUs", "speed-up", "own selection", "what travels")
    text = [SEVERAL_GPUS.format(commit=found["commit"], count=count, gpu=found["gpu"]["name"])]
    text.append(f"| µs | {' | '.join(heads)} | merge or reorder | bytes a rank sends |")
    text.append("|---|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        parts = ("one_us", "us", "local_us", "gather_us", "merge_us")
        one, whole, *rest = (microseconds(row[name]) for name in parts)
        cells = SPLITS[row["shape"], row["data"]], one, whole, f"{row['speedup']:.2f} ×", *rest
        text.append("| " + " | ".join((*cells, str(row["gathered_bytes"]))) + " |")
    return "\n".join(text)


def projection(found: dict[str, Any]) -> str:
    """The section on more GPUs than were measured."""
    latency, rate = link(found["rows"])
    count = found["rows"][0]["gpus"]
    return PROJECTION.format(latency=f"{latency:.0f}", rate=f"{rate / 1000:.0f}", count=count)


def link(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Microseconds that the smallest exchange takes, and bytes per microsecond of the largest."""
    small, large = (choose(rows, key=lambda row: row["gathered_bytes"]) for choose in (min, max))
    sent = (large["gpus"] - 1) * large["gathered_bytes"]
    return small["gather_us"], sent / (large["gather_us"] - small["gather_us"])


def projected(row: dict[str, Any], latency: float, rate: float) -> dict[int, tuple[float, ...]]:
    """By number of GPUs: microseconds of a rank's own selection, of what travels, of the merge.

    All three of one GPU and of the measured number are measured. Of more, what travels is
    computed; the rows of a rank shrink with the number of ranks, its lists do not.
    """
    found = {1: (row["one_us"], 0.0, 0.0)}
    found[row["gpus"]] = row["local_us"], row["gather_us"], row["merge_us"]
    for count in PROJECTED:
        sent = row["gathered_bytes"]
        if row["data"] == "rows":
            sent = sent * row["gpus"] / count
        travels = latency + (count - 1) * sent / rate
        found[count] = row[f"local{count}_us"], travels, row[f"merge{count}_us"]
    return dict(sorted(found.items()))


def draw_gpus(found: dict[str, Any], path: Path) -> None:
    """The parts of the time by the number of GPUs, a plot for each case."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = found["rows"]
    latency, rate = link(rows)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, len(rows), figsize=(13, 3.6), layout="constrained")
        for panel, row in zip(axes, rows, strict=True):
            times = projected(row, latency, rate)
            names = [f"{n}" if n in (1, row["gpus"]) else f"{n}\nprojected" for n in times]
            below = [0.0] * len(times)
            for part, label in enumerate(("own selection", "what travels", "merge or reorder")):
                heights = [parts[part] for parts in times.values()]
                panel.bar(names, heights, bottom=below, label=label)
                below = [a + b for a, b in zip(below, heights, strict=True)]
            for place, total in enumerate(below):
                speed_up = f"{row['one_us'] / total:.1f} ×"
                panel.text(place, total, speed_up, ha="center", va="bottom", fontsize=8)
            title = SPLITS[row["shape"], row["data"]].replace(", ", "\n", 1)
            panel.set_title(title, fontsize=8)
            panel.set_ylim(top=1.15 * max(map(sum, times.values())))
            panel.tick_params(axis="x", labelsize=7)
        axes[0].set_ylabel("µs, sum of the parts")
        axes[0].set_xlabel("GPUs")
        axes[-1].legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None}, transparent=True)


def compat(lines: list[dict[str, Any]]) -> str:
    """`mla_fp8.compat.deep_gemm` beside DeepGEMM, on DeepGEMM's shapes."""
    text = [
        "| | difference | µs | DeepGEMM, µs |",
        "|---|---|---|---|",
    ]
    for row in lines:
        if row["kind"] == "prefill" and not row["compressed"]:
            ranges = "context-parallel ranges" if row["cp"] else "causal"
            name = f"`fp8_mqa_logits`, {row['S']} x {row['KV']}, {ranges}"
        elif row["kind"] == "paged" and row["lens"] == "causal":
            name = f"`fp8_paged_mqa_logits`, {row['B']} x {row['next_n']} x about {row['avg_kv']}"
        else:
            continue
        times = microseconds(row["ours_us"]), microseconds(row["theirs_us"])
        text.append(f"| {name} | {row['diff']:.0e} | {times[0]} | {times[1]} |")
    return "\n".join(text)


def machine(bench: dict[str, Any]) -> str:
    """The GPU, the versions and the commit of the figures."""
    gpu, versions = bench["gpu"], bench["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    before, after = bench["cublaslt_tflops"]
    lines = [f"- {gpu['name']}, {gpu['multiprocessors']} multiprocessors; {packages}."]
    if before is not None:
        lines.append(
            f"- cuBLASLt FP8 8192³ in the same run: {before:.0f} TFLOP/s before, {after:.0f} after."
        )
    if "commit" in bench:
        lines.append(f"- All figures are of commit {bench['commit']}.")
    if "note" in bench:
        lines.append(f"- {bench['note']}")
    return "\n".join(lines)


def load_lines(name: str) -> list[dict[str, Any]]:
    """A file of ``docs/data/`` with an object on each line."""
    text = (DOCS / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def fuzz_counts() -> str:
    """The cases of each recorded run of ``mla_fp8 fuzz``, by route and feature."""
    runs = [load(path.name) for path in sorted((DOCS / "data").glob("fuzz_*.json"))]
    rows = [
        ["", *(run["backend"] for run in runs)],
        ["---", *("---:" for _ in runs)],
        ["seed", *(str(run["seed"]) for run in runs)],
        ["cases", *(str(run["cases"]) for run in runs)],
        ["failed", *(str(len(run["failed"])) for run in runs)],
    ]
    for kind in ("routes", "features"):
        for name in sorted({name for run in runs for name in run[kind]}):
            rows.append([name, *(str(run[kind].get(name, 0)) for run in runs)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill(text: str, bench: dict[str, Any], peers: dict[str, Any]) -> str:
    """A page with its generated parts written anew."""
    several = load("gpus.json") if (DOCS / "data" / "gpus.json").exists() else None
    parts = {  # of several GPUs nothing is said before it has been measured
        "gpus": gpus(several) if several else "",
        "projection": projection(several) if several else "",
        "doors": doors(load("doors.json")),
        "compat": compat(load_lines("deepgemm_grid.jsonl")),
        "machine": machine(bench),
        "fuzz": fuzz_counts(),
        "table": table(bench, peers, list(LINES)),
        "readme": table(bench, peers, README_LINES),
    }
    for name, part in parts.items():
        begin, end = f"<!-- figures.py: {name} -->\n", "\n<!-- figures.py: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end.lstrip())}", re.DOTALL)
        text = pattern.sub(lambda _, whole=begin + part + end: whole, text)
    return text


def draw(bench: dict[str, Any], peers: dict[str, Any], path: Path) -> None:
    """Three plots: prefill, decode, and where the time goes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
        _draw_prefill(axes[0], bench)
        _draw_decode(axes[1], bench, peers["copy_tb_per_s"])
        _draw_parts(axes[2], bench)
        for panel in axes[:2]:
            panel.set_xscale("log", base=2)
            panel.set_xlabel("keys")
            panel.grid(alpha=0.25)
        for panel in axes:
            panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        figure.savefig(path, metadata={"Date": None}, transparent=True)


def style() -> dict[str, Any]:
    """Colours and fonts of plots, for pages that are white or black."""
    plain = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    found: dict[str, Any] = dict.fromkeys(plain, "#7d8590")
    found |= {"svg.hashsalt": "mla_fp8", "svg.fonttype": "none", "legend.frameon": False}
    return found | {"font.size": 9}


def _draw_prefill(axes: Any, bench: dict[str, Any]) -> None:
    scoring = lengths(bench, "prefill", 1, None)
    whole = lengths(bench, "topk", 1, 4096)
    flop = {n: row["tflops"] * row["us"] for n, row in (scoring | whole).items()}
    peer = {n: row["deepgemm_us"] for n, row in scoring.items() if "deepgemm_us" in row}
    for name, times, mark in (
        ("scoring", {n: row["us"] for n, row in scoring.items()}, "o-"),
        ("DeepGEMM, scores only", peer, "s--"),
        ("whole operation", {n: row["topk_us"] for n, row in whole.items()}, "^-"),
    ):
        axes.plot(list(times), [flop[n] / times[n] for n in times], mark, label=name)
    ceiling = [figure for figure in bench["cublaslt_tflops"] if figure is not None]
    if ceiling:
        mean = sum(ceiling) / len(ceiling)
        axes.axhline(mean, color="#7d8590", linestyle=":", label="cuBLASLt FP8 8192³")
    axes.set(title="Prefill, TFLOP/s", ylim=(0, None))


def _draw_decode(axes: Any, bench: dict[str, Any], copy_tb_per_s: float) -> None:
    for batch, color in ((1, "C0"), (64, "C1")):
        scoring = lengths(bench, "decode", batch, 1)
        whole = lengths(bench, "decode topk", batch, 1)
        keys = sorted(scoring | whole)
        # A key's values and scale are read, its score is written.
        limit = [1e-6 * batch * n * (128 + 4 + 4) / copy_tb_per_s for n in keys]
        name = f"{batch} sequence{'s' * (batch > 1)}"
        axes.plot(list(whole), [row["topk_us"] for row in whole.values()], "^-", color=color,
                  label=f"{name}: whole operation")  # fmt: skip
        axes.plot(list(scoring), [row["us"] for row in scoring.values()], "o--", color=color,
                  label=f"{name}: scoring")  # fmt: skip
        axes.plot(keys, limit, ":", color=color, label=f"{name}: memory, {copy_tb_per_s} TB/s")
    axes.set(title="Decode, µs", yscale="log")


def _draw_parts(axes: Any, bench: dict[str, Any]) -> None:
    rows = [(LINES[line], find(bench, *line)) for line in LINES]
    rows = [(name.replace(", ", "\n", 1), row) for name, row in rows if "us" in row][::-1]
    names = [name for name, _ in rows]
    scoring = [100 * row["us"] / row["topk_us"] for _, row in rows]
    axes.barh(names, scoring, label="scoring, by itself")
    rest = [max(100 - part, 0) for part in scoring]
    axes.barh(names, rest, left=scoring, label="the rest: selection that scoring does not hide")
    axes.set(title="Where the time goes, %", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize=7)


def main() -> None:
    """Write the pages and the drawing."""
    bench, peers = load("bench.json"), load("peers.json")
    for path in PAGES.values():
        text = path.read_text(encoding="utf-8")
        path.write_text(fill(text, bench, peers), encoding="utf-8")
    draw(bench, peers, DOCS / "benchmarks.svg")
    if (DOCS / "data" / "gpus.json").exists():
        draw_gpus(load("gpus.json"), DOCS / "pictures" / "many_gpus.svg")


if __name__ == "__main__":
    main()
