"""Parameters of the models that use this operation, one `Preset` each.

``docs/models.md`` says where the numbers come from, and which steps of each model's indexer this
package leaves to the caller.

Examples
--------
>>> from mla_fp8 import presets
>>> presets.glm_5_3_flash.operator()  # doctest: +ELLIPSIS
MLAIndexerRaggedFloat8Paged(num_heads=32, depth=128, k=512, ..., kpool=4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_fp8.cache import PagedKeyCache
from mla_fp8.indexer import MLAIndexerRaggedFloat8Paged


@dataclass(frozen=True)
class Preset:
    """The indexer of a model: parameters of its operator and of its cache.

    Parameters
    ----------
    num_heads : int
        Query heads of the indexer.
    k : int
        Cached rows that a token selects.
    kpool : int
        Tokens that a cached row stands for.
    depth : int
        Channels per head.
    page_size : int
        Rows per page. The operation takes any; engines use this one.
    power_of_two : bool
        Whether key scales are powers of two (``ue8m0``).

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import fp8, presets
    >>> model = presets.deepseek_v3_2
    >>> cache = model.cache(batch=1)
    >>> cache.append([np.ones((3, model.depth), np.float32)])
    >>> q, q_scales = fp8.quantize(np.ones((3, model.num_heads, model.depth), np.float32))
    >>> op = model.operator(k=2)
    >>> op(q, q_scales[..., 0], cache.input_row_offsets, *cache.view())
    array([[ 0, -1],
           [ 0,  1],
           [ 0,  1]], dtype=int32)
    """

    num_heads: int
    k: int
    kpool: int = 1
    depth: int = 128
    page_size: int = 64
    power_of_two: bool = True

    def operator(self, **changes: Any) -> MLAIndexerRaggedFloat8Paged:
        """Return the model's operator.

        Parameters
        ----------
        **changes
            Parameters of `MLAIndexerRaggedFloat8Paged` that differ from the preset's, for example
            ``k`` or ``mask``.

        Returns
        -------
        MLAIndexerRaggedFloat8Paged

        Raises
        ------
        ValueError, TypeError
            If a parameter is wrong or unknown.
        """
        own = {"num_heads": self.num_heads, "depth": self.depth, "k": self.k, "kpool": self.kpool}
        return MLAIndexerRaggedFloat8Paged(**(own | changes))

    def cache(self, batch: int, **options: Any) -> PagedKeyCache:
        """Return an empty cache for the model's keys.

        With ``kpool`` above 1 its rows are pooled keys, and the lengths in its views count rows.
        The operator needs lengths in tokens in their place.

        Parameters
        ----------
        batch : int
            Number of sequences.
        **options
            Parameters of `PagedKeyCache` beside or instead of the preset's, for example ``xp`` or
            ``num_layers``.

        Returns
        -------
        PagedKeyCache

        Raises
        ------
        ValueError, TypeError
            If a parameter is wrong or unknown.
        """
        own = {
            "depth": self.depth,
            "page_size": self.page_size,
            "power_of_two": self.power_of_two,
        }
        return PagedKeyCache(batch, **(own | options))


#: DeepSeek-V3.2.
deepseek_v3_2 = Preset(num_heads=64, k=2048)
#: GLM-5, GLM-5.1 and GLM-5.2.
glm_5 = Preset(num_heads=32, k=2048)
#: GLM-5.3-Flash: a row is a pool of 4 tokens.
glm_5_3_flash = Preset(num_heads=32, k=512, kpool=4)  # 512 pools are 2048 tokens
#: DeepSeek-V4-Flash, its compressed sparse layers.
deepseek_v4_flash = Preset(num_heads=64, k=512, kpool=4)
#: DeepSeek-V4-Pro, its compressed sparse layers.
deepseek_v4_pro = Preset(num_heads=64, k=1024, kpool=4)
#: Hy4.
hy_v4 = Preset(num_heads=16, k=2048)
