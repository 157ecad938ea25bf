"""A row of the benchmark's result: what its fields are, and which rows are of the same case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mla_fp8.cli.cases import Case
from mla_fp8.cli.roofline import Roofline
from mla_fp8.cli.timer import spread

Row = dict[str, Any]

# What is timed of the same case: fields of a row, and what tables call them.
TIMES = {
    "us": "scoring",
    "topk_us": "whole operation",
    "real_us": "whole, real-like data",
    "eager_us": "whole, called on an idle device",
    "host_us": "until the call returns",
    "bound_us": "until a bound call returns",
}
PEERS = {"deepgemm_us": "DeepGEMM, scores only", "torch_topk_us": "our scores + torch.topk"}
_DEFAULTS = {  # of fields that older files and rows of other groups lack
    "heads": 0,
    "depth": 128,
    "k": 2048,
    "kpool": 1,
    "page": 64,
    "data": "random",
    "model": "",
}


def row(case: Case, samples: Mapping[str, Sequence[float]], roofline: Roofline) -> Row:
    """The row of a case from samples in microseconds by name: ``ours`` and the others' names."""
    found: Row = {
        "group": case.group,
        "heads": case.num_heads,
        "depth": case.depth,
        "k": case.k,
        "page": case.page_size,
        "data": case.data,
        "shape": case.name,
        "pairs": case.pairs,
    }
    if case.kpool > 1:
        found["kpool"] = case.kpool
    if case.model:
        found["model"] = case.model
    time = float(np.median(samples["ours"]))
    found |= spread("us", samples["ours"])
    found["tflops"] = _digits(1e-6 * case.flop / time)
    found["tb_per_s"] = _digits(1e-6 * case.bytes / time)
    found["roofline_percent"] = roofline.percent(case.flop, case.bytes, time)
    for name in ("deepgemm", "torch_topk", "topk", "real", "eager", "host", "bound"):
        if name in samples:
            found |= spread(f"{name}_us", samples[name])
    if "topk" in samples:
        whole = float(np.median(samples["topk"]))
        found["topk_roofline_percent"] = roofline.percent(case.flop, case.whole_bytes, whole)
        if "real" in samples:
            found["real_ratio"] = round(float(np.median(samples["real"])) / whole, 3)
        if "torch_topk" in samples:
            found["torch_topk_speedup"] = round(float(np.median(samples["torch_topk"])) / whole, 3)
    if "deepgemm" in samples:
        found["speedup"] = round(float(np.median(samples["deepgemm"])) / time, 3)
    return found


def _digits(rate: float) -> float:
    return float(f"{rate:.5g}")


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for rows of the same case, older files included; ragged ones may differ in pairs."""
    own = (row.get(name, default) for name, default in _DEFAULTS.items())
    return (row["group"], row["shape"], *own)


def label(row: Mapping[str, Any]) -> str:
    """The case of a row in words; what is usual is left out."""
    words = [row["model"]] if row.get("model") else []
    words.append(row["shape"])
    if row.get("heads"):
        words.append(f"{row['heads']} heads")
    for name in ("depth", "k", "kpool", "page"):
        if row.get(name, _DEFAULTS[name]) != _DEFAULTS[name]:
            words.append(f"{name} {row[name]}")
    if row.get("data", "random") != "random":
        words.append(row["data"])
    return ", ".join(words)
