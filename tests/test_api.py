"""The public names and their signatures: a change here is a change for every user."""

import inspect
import re

import pytest

import mla_fp8
from mla_fp8 import CacheView, Mask, MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8

PAGES = "k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx"
INPUTS = f"q, qs, input_row_offsets, {PAGES}"
LENGTHS = "k_total_lengths=None, key_start=None, key_step=1"
OUTPUT = "output='positions'"
ROWS = "return_scores=False, sort='position'"
MEMORY = "check=None, workspace=None"
FUNCTIONS = {
    "expand_pools": (
        "(rows, input_row_offsets, k_cache_lengths, kpool, *, k_total_lengths=None, "
        "mask='causal', out=None, check=None)"
    ),
    "index_scores": f"({INPUTS}, *, mask='causal', kpool=1, {LENGTHS}, out=None, {MEMORY})",
    "index_topk": (
        f"({INPUTS}, *, k, mask='causal', kpool=1, {LENGTHS}, {OUTPUT}, out=None, {ROWS}, {MEMORY})"
    ),
    "pool_keys": "(keys, kpool, weights=None)",
    "quantize_queries": (
        "(q, weights, softmax_scale=None, *, head_scale=None, power_of_two=False)"
    ),
    "select_topk": (
        "(scores, lengths=None, k=2048, *, sort='position', return_scores=False, out=None, "
        f"{MEMORY})"
    ),
    "write_keys": (
        "(keys, k_blocks, k_scales, layer_idx=0, *, slots=None, sequences=None, positions=None, "
        "k_lookup_table=None, power_of_two=False)"
    ),
    "merge_topk": ("(indices, scores, *, k=None, sort='position', return_scores=False, out=None)"),
    "topk_workspace": "(scores, lengths=None, k=2048, *, sort='position', return_scores=False)",
}
NUMBERS = {
    "decode": "(values)",
    "dequantize": "(values, scales)",
    "encode": "(x)",
    "hadamard": "(x)",
    "quantize": "(x, granularity=None, *, power_of_two=False)",
    "rope": "(x, cos, sin, *, interleaved)",
}
OPERATOR = {
    "__init__": (
        "(self, num_heads=128, depth=128, k=2048, quantization_granularity=128, mask='causal', "
        "kpool=1)"
    ),
    "__call__": f"(self, {INPUTS}, *, {LENGTHS}, {OUTPUT}, out=None, {ROWS}, {MEMORY})",
    "bind": f"(self, {INPUTS}, *, {LENGTHS}, {OUTPUT}, out=None, {ROWS}, {MEMORY})",
    "execute": f"(self, output_indices, {INPUTS})",
    "scores": f"(self, {INPUTS}, *, {LENGTHS}, out=None, {MEMORY})",
    "scratch_bytes": "(self, *inputs, for_scores=False, **options)",
    "warmup": "(self, *inputs, **options)",
    "workspace": "(self, *inputs, **options)",
}
FORM = "page_size=64, granularity=None, power_of_two=False"
POOL = f"{FORM}, num_blocks=None, layout='split'"
CACHE = {
    "__init__": f"(self, batch, depth, *, num_layers=1, kv_heads=1, {POOL}, xp=numpy)",
    "add_sequence": "(self)",
    "allocate": "(self, new, sequences=None)",
    "append": "(self, keys, sequences=None)",
    "fork": "(self, sequence)",
    "free": "(self, sequence)",
    "from_dense": f"(cls, keys, *, {POOL})",
    "from_fused": "(cls, buffer, *, page_size, batch=0, power_of_two=False)",
    "gather": "(self, sequence, layer=0)",
    "row_offsets": "(self, sequences=None)",
    "slots": "(self, sequences=None)",
    "truncate": "(self, sequence, length)",
    "view": "(self, layer=0, sequences=None)",
    "write": "(self, layer, keys, sequences=None)",
} | dict.fromkeys(
    (
        "batch",
        "buffer",
        "free_blocks",
        "input_row_offsets",
        "k_blocks",
        "k_lookup_table",
        "k_scales",
        "lengths",
        "num_blocks",
        "sequences",
    ),
    "property",
)


def signature(function) -> str:
    """Names, order, kinds and defaults, without annotations."""
    found = inspect.signature(function)
    empty = inspect.Parameter.empty
    bare = [p.replace(annotation=empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=empty))
    return re.sub(r"<module '(\w+)' from '.*?'>", r"\1", text)


def members(owner) -> dict[str, str]:
    """Signatures of the public methods and properties of a class and its bases."""
    found = {}
    everything = {k: v for base in owner.__mro__[-2::-1] for k, v in vars(base).items()}
    for name, member in everything.items():
        member = getattr(member, "__func__", member)  # of a class method
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if isinstance(member, property):
            found[name] = "property"
        elif inspect.isroutine(member):
            found[name] = signature(member)
    return found


def test_names():
    classes = ["BoundCall", "CacheFull", "CacheView", "Mask", "PagedKeyCache"]
    classes += ["MLAIndexerRaggedFloat8Paged"]
    assert sorted(mla_fp8.__all__) == sorted([*classes, "fp8", "presets", *FUNCTIONS])


@pytest.mark.parametrize(
    ("module", "functions"), [(mla_fp8, FUNCTIONS), (fp8, NUMBERS)], ids=["mla_fp8", "fp8"]
)
def test_functions(module, functions):
    assert {name: signature(getattr(module, name)) for name in functions} == functions


@pytest.mark.parametrize(
    ("owner", "expected"),
    [(MLAIndexerRaggedFloat8Paged, OPERATOR), (PagedKeyCache, CACHE)],
    ids=["operator", "cache"],
)
def test_methods(owner, expected):
    assert members(owner) == expected


def test_tuples_and_enums():
    assert ", ".join(CacheView._fields) == PAGES
    assert [mask.value for mask in Mask] == ["null", "causal"]
