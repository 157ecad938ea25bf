"""The operator's parameters, and what can be told of a call without making it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mla_fp8._backend import backend_of
from mla_fp8._check.arrays import Array, empty_beside
from mla_fp8._check.interop import as_array
from mla_fp8._check.parameters import (
    DEPTHS,
    K_RANGE,
    KPOOL_RANGE,
    MAX_HEADS,
    Mask,
    Output,
    check_int,
    check_mask,
    check_output,
    check_sort,
    scale_groups,
)
from mla_fp8._check.problem import Inputs, Problem, check_problem
from mla_fp8._check.shape import Parameters
from mla_fp8._check.streams import in_order


@dataclass(frozen=True)
class Operator:
    """The checked parameters of `MLAIndexerRaggedFloat8Paged`, which documents them."""

    num_heads: int = 128
    depth: int = 128
    k: int = 2048
    quantization_granularity: int = 128
    mask: Mask | str = Mask.CAUSAL
    kpool: int = 1

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        heads = check_int("num_heads", self.num_heads, range(1, MAX_HEADS + 1))
        set_field(self, "num_heads", heads)
        set_field(self, "depth", check_int("depth", self.depth, DEPTHS))
        set_field(self, "k", check_int("k", self.k, K_RANGE))
        name = "quantization_granularity"
        granularity = check_int(name, self.quantization_granularity, range(1, 2**31))
        set_field(self, name, granularity)
        scale_groups(name, self.depth, granularity)
        set_field(self, "mask", check_mask(self.mask))
        set_field(self, "kpool", check_int("kpool", self.kpool, KPOOL_RANGE))

    @cached_property
    def _parameters(self) -> Parameters:
        name, depth = "quantization_granularity", self.depth
        groups = scale_groups(name, depth, self.quantization_granularity)
        return Parameters(self.num_heads, depth, groups, self.mask is Mask.CAUSAL, self.kpool)

    def _problem(self, inputs: Inputs, check: bool | None) -> Problem:
        return check_problem(inputs, self._parameters, check)

    def scratch_bytes(self, *inputs: Any, for_scores: bool = False, **options: Any) -> int:
        """Return how many bytes of scratch memory a call needs.

        Parameters
        ----------
        *inputs
            ``q, ..., layer_idx`` of a call, in its order. Of device arrays, values do not matter.
        for_scores : bool
            Whether the call is to `scores`.
        **options
            ``k_total_lengths``, ``key_start``, ``key_step``, ``output``, ``return_scores`` and
            ``sort`` of the call, see `__call__`; the last three have no effect on `scores`.

        Returns
        -------
        int
            0 for arrays on the host.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it.
        """
        arguments = self._planned(*inputs, **options)
        backend = backend_of(arguments[0].xp)
        size: int = (
            backend.scores_workspace_bytes(arguments[0])
            if for_scores
            else backend.topk_workspace_bytes(*arguments)
        )
        return size

    def _planned(
        self,
        *inputs: Any,
        k_total_lengths: Any = None,
        key_start: Any = None,
        key_step: int = 1,
        output: str = "positions",
        return_scores: bool = False,
        sort: str = "position",
    ) -> tuple[Problem, int, bool, bool, Output]:
        """The problem, k, whether by score, whether with scores, and the output of a call."""
        if len(inputs) != len(names := Inputs._fields[:9]):
            raise TypeError(f"the inputs must be {', '.join(names)}; got {len(inputs)} of them")
        more = {"k_total_lengths": k_total_lengths, "key_start": key_start, "key_step": key_step}
        problem = self._problem(Inputs(*inputs)._replace(**more), False)
        return problem, self.k, check_sort(sort), return_scores, check_output(output)

    @in_order("inputs", written=True)
    def workspace(self, *inputs: Any, **options: Any) -> Array:
        """Return scratch memory for one call at a time: uint8, [`scratch_bytes`].

        Parameters and errors are those of `scratch_bytes`. The library is that of ``q``, but CuPy
        for JAX, whose arrays cannot be written.

        Examples
        --------
        >>> import numpy as np
        >>> from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache
        >>> cache = PagedKeyCache.from_dense([np.ones((4, 32), np.float32)])
        >>> q, qs = np.zeros((4, 2, 32), np.uint8), np.ones((4, 2), np.float32)
        >>> inputs = q, qs, cache.input_row_offsets, *cache.view()
        >>> op = MLAIndexerRaggedFloat8Paged(2, 32, k=1, quantization_granularity=32)
        >>> memory, out = op.workspace(*inputs), np.empty((4, 1), np.int32)
        >>> memory.nbytes  # NumPy needs none
        0
        >>> op(*inputs, out=out, workspace=memory) is out
        True
        """
        size = self.scratch_bytes(*inputs, **options)
        return empty_beside(as_array("q", inputs[0]), (size,), np.uint8)

    def warmup(self, *inputs: Any, **options: Any) -> None:
        """Compile and load the kernels of such a call, for the calling thread. Nothing is launched.

        Parameters and errors are those of `scratch_bytes`.
        """
        arguments = self._planned(*inputs, **options)
        backend_of(arguments[0].xp).warmup(*arguments)
