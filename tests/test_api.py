"""The public names and their signatures: a change here is a change for every user."""

import inspect

import pytest

import mla_fp8
from mla_fp8 import fp8

PAGES = "k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx"
INPUTS = f"q, qs, input_row_offsets, {PAGES}"


def signature(function) -> str:
    """Names, order, kinds and defaults, without annotations."""
    found = inspect.signature(function)
    empty = inspect.Parameter.empty
    bare = [p.replace(annotation=empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=empty))


def members(owner) -> dict[str, str]:
    """Signatures of the public methods and properties of a class."""
    found = {}
    for name, member in vars(owner).items():
        member = getattr(member, "__func__", member)  # of a class method
        if isinstance(member, property):
            found[name] = "property"
        elif inspect.isroutine(member) and (name in ("__init__", "__call__") or name[0] != "_"):
            found[name] = signature(member)
    return found
