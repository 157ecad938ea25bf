"""The NumPy backend: the functions that `_cuda.backend` has, too."""

from mla_fp8._reference.keys import hadamard, pool_keys, quantize_queries, rope, write_keys
from mla_fp8._reference.merge import merge_topk
from mla_fp8._reference.operation import (
    bind_topk,
    index_scores,
    index_topk,
    scores_workspace_bytes,
    select_topk,
    select_workspace_bytes,
    topk_workspace_bytes,
    warmup,
)

__all__ = [
    "bind_topk",
    "hadamard",
    "index_scores",
    "index_topk",
    "merge_topk",
    "pool_keys",
    "quantize_queries",
    "rope",
    "scores_workspace_bytes",
    "select_topk",
    "select_workspace_bytes",
    "topk_workspace_bytes",
    "warmup",
    "write_keys",
]
