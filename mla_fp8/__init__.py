"""The lightning indexer for NumPy and CuPy: exact top-k of FP8 scores on paged keys."""

from mla_fp8 import fp8, presets
from mla_fp8._cache.pages import CacheFull
from mla_fp8._cache.sequences import CacheView
from mla_fp8._check.parameters import Mask
from mla_fp8.bound import BoundCall
from mla_fp8.cache import PagedKeyCache
from mla_fp8.functions import index_scores, index_topk
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged
from mla_fp8.keys import pool_keys, quantize_queries, write_keys
from mla_fp8.pools import expand_pools
from mla_fp8.topk import merge_topk, select_topk, topk_workspace

__version__ = "0.1.0"

__all__ = [
    "BoundCall",
    "CacheFull",
    "CacheView",
    "MLAIndexerRaggedFloat8Paged",
    "Mask",
    "PagedKeyCache",
    "expand_pools",
    "fp8",
    "index_scores",
    "index_topk",
    "merge_topk",
    "pool_keys",
    "presets",
    "quantize_queries",
    "select_topk",
    "topk_workspace",
    "write_keys",
]
