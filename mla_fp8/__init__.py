"""The lightning indexer for NumPy and CuPy: exact top-k of FP8 scores on paged keys."""

from mla_fp8 import fp8, presets
from mla_fp8._check.parameters import Mask
from mla_fp8.cache import CacheView, PagedKeyCache
from mla_fp8.functions import index_scores, index_topk
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged
from mla_fp8.pools import expand_pools
from mla_fp8.topk import select_topk, topk_workspace

__version__ = "0.1.0"

__all__ = [
    "CacheView",
    "MLAIndexerRaggedFloat8Paged",
    "Mask",
    "PagedKeyCache",
    "expand_pools",
    "fp8",
    "index_scores",
    "index_topk",
    "presets",
    "select_topk",
    "topk_workspace",
]
