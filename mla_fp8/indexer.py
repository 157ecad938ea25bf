"""The public operation: `MLAIndexerRaggedFloat8Paged`, and as plain functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_fp8._backend import backend_of
from mla_fp8._check import problem as _problem
from mla_fp8._check.arrays import Array, as_array, empty_beside
from mla_fp8._check.parameters import (
    DEPTHS,
    MAX_HEADS,
    MAX_K,
    Mask,
    check_int,
    check_mask,
    check_sort,
    scale_groups,
)
from mla_fp8._check.problem import Problem
from mla_fp8._streams import in_order


@dataclass(frozen=True)
class MLAIndexerRaggedFloat8Paged:
    """The lightning indexer: exact top-k keys per query token, from FP8 scores on a paged cache.

    ``score[t, s] = k_scales[s] * sum_h qs[t, h] * max(0, q[t, h] . k[s])`` over the keys ``s``
    that token ``t`` sees; the row of ``t`` holds the positions of the ``k`` largest. An instance
    holds its parameters and nothing else: it may be shared by threads, pickled, compared, reused.

    Parameters
    ----------
    num_heads : int
        Query heads, 1 to 128.
    depth : int
        Channels per head: 32, 64, 128 or 256.
    k : int
        Indices per token, 1 to 65536.
    quantization_granularity : int
        Channels per key scale: 32, 64 or 128 below ``depth``, or anything from ``depth`` on for one
        scale per key.
    mask : {"causal", "null"} or Mask
        "causal": a token sees the keys up to its own; "null": all keys of its sequence.

    Raises
    ------
    ValueError, TypeError
        If a parameter is out of its range or no integer.

    Notes
    -----
    Modular MAX's ``mo.mla.indexer.ragged.float8.paged``, of the DeepSeek-V3.2 sparse attention.
    """

    num_heads: int = 128
    depth: int = 128
    k: int = 2048
    quantization_granularity: int = 128
    mask: Mask | str = Mask.CAUSAL

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        heads = check_int("num_heads", self.num_heads, range(1, MAX_HEADS + 1))
        set_field(self, "num_heads", heads)
        set_field(self, "depth", check_int("depth", self.depth, DEPTHS))
        set_field(self, "k", check_int("k", self.k, range(1, MAX_K + 1)))
        name, everything = "quantization_granularity", range(1, 2**31)
        set_field(self, name, check_int(name, self.quantization_granularity, everything))
        scale_groups(name, self.depth, self.quantization_granularity)
        set_field(self, "mask", check_mask(self.mask))

    def _problem(
        self, arguments: tuple[Any, ...], check: bool | None, k_total_lengths: Any = None
    ) -> Problem:
        return _problem.scoring_problem(
            *arguments,
            num_heads=self.num_heads,
            depth=self.depth,
            groups=scale_groups(
                "quantization_granularity", self.depth, self.quantization_granularity
            ),
            causal=self.mask is Mask.CAUSAL,
            check=check,
            k_total_lengths=k_total_lengths,
        )

    @in_order("q")
    def execute(
        self,
        output_indices: Any,
        q: Any,
        qs: Any,
        input_row_offsets: Any,
        k_blocks: Any,
        k_cache_lengths: Any,
        k_lookup_table: Any,
        k_max_lengths: Any,
        k_scales: Any,
        layer_idx: Any,
    ) -> None:
        """Write the top-k key positions of every token into ``output_indices``.

        The original operation's arguments in its order. All arrays C-contiguous, of one library and
        device.

        Parameters
        ----------
        output_indices : int32, [total_seq_len, k]
            Written whole: ascending positions, then -1.
        q : float8_e4m3fn or uint8, [total_seq_len, num_heads, depth]
            Queries.
        qs : float32, [total_seq_len, num_heads]
            Gate of each head, with softmax scale, head weight and query scale folded in.
        input_row_offsets : uint32 or int32, [batch + 1]
            Sequence ``b`` has the tokens from ``input_row_offsets[b]`` up to, without,
            ``input_row_offsets[b + 1]``.
        k_blocks : float8_e4m3fn or uint8, [num_blocks, 1, num_layers, page_size, kv_heads, depth]
            Key pages, the keys of the new tokens included.
        k_cache_lengths : uint32 or int32, [batch]
            Tokens cached before this call, **the new ones not counted**. For lengths that count
            them, see ``k_total_lengths`` of `__call__`.
        k_lookup_table : uint32 or int32, [batch, pages_per_seq]
            Block of each page of each sequence; past the last used page it may hold anything.
        k_max_lengths : uint32 or int32, [1, 2]
            Upper bounds of [new tokens, cached tokens] over the batch; on the host, or on the
            device, where it is not read.
        k_scales : float32, [num_blocks, 1, num_layers, page_size, kv_heads, groups]
            Key scales, finite and >= 0.
        layer_idx : int
            Layer of the cache to read.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong; it is named, and nothing has been written.
        """
        cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
        arguments = q, qs, input_row_offsets, *cached
        if output_indices is None:
            raise TypeError("output_indices must be an array int32 [total_seq_len, k]; got None")
        problem = self._problem(arguments, None)
        _run_topk(problem, self.k, "position", output_indices, False, "output_indices")

    @in_order("q")
    def __call__(
        self,
        q: Any,
        qs: Any,
        input_row_offsets: Any,
        k_blocks: Any,
        k_cache_lengths: Any,
        k_lookup_table: Any,
        k_max_lengths: Any,
        k_scales: Any,
        layer_idx: Any,
        *,
        k_total_lengths: Any = None,
        out: Any = None,
        return_scores: bool = False,
        sort: str = "position",
        check: bool | None = None,
        workspace: Any = None,
    ) -> Any:
        """Return the top-k key positions of every token.

        The inputs are those of `execute`, with the additions below.

        Parameters
        ----------
        q, ..., layer_idx
            See `execute`.
        k_total_lengths : uint32 or int32, [batch], optional
            Lengths that count the new tokens, as serving engines have them; ``k_cache_lengths`` is
            None then. ``k_max_lengths`` stays a bound of what was cached before. Where a total is
            less than the new tokens, which ``check`` refuses, the last of them sees as many keys as
            it says, and under the causal mask each before it one less.
        out : array or tuple of arrays, optional
            Where to write: int32 [total_seq_len, k], with ``return_scores`` a tuple of it and
            float32 [total_seq_len, k].
        return_scores : bool
            Return the scores as well, -inf beside each -1.
        sort : {"position", "score"}
            Ascending position, or higher score first and among equals the smaller position.
        check : bool, optional
            Whether to look at values (offsets, lengths, page numbers, key scales) and raise on
            wrong ones. By default those on the host are checked, and those on a device only where
            the environment says ``MLA_FP8_CHECK=1``: reading them back waits for the device.
            Unchecked wrong values never fault: what they lose, and nothing else, is missing.
        workspace : uint8, [at least `scratch_bytes`], optional
            Scratch memory, from `workspace`; by default it is taken for the call, of CuPy or torch.
            With it and ``out`` a call allocates nothing and may be captured in a CUDA graph, which
            then serves every batch of these shapes: lengths, offsets, pages and tables may change
            between replays. Calls that may run at one time must not share it.

        Returns
        -------
        indices : int32, [total_seq_len, k]
            The first ``min(k, keys seen)`` entries are distinct positions, the others -1. Like all
            results an array of the library of ``q``, on its device and in its stream order.
        scores : float32, [total_seq_len, k]
            Only with ``return_scores``.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong; it is named, and nothing has been written.
        RuntimeError
            If a CUDA graph is being captured and there is no ``workspace``.
        """
        cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
        arguments = q, qs, input_row_offsets, *cached
        problem = self._problem(arguments, check, k_total_lengths)
        return _run_topk(problem, self.k, sort, out, return_scores, workspace=workspace)

    def scratch_bytes(
        self,
        *arguments: Any,
        k_total_lengths: Any = None,
        return_scores: bool = False,
        sort: str = "position",
    ) -> int:
        """Return how many bytes of device memory a call takes beside its output, at most.

        Parameters
        ----------
        *arguments
            Those of a call, in its order. Shapes and, if on the host, ``k_max_lengths`` count.
        k_total_lengths, return_scores, sort
            See `__call__`.

        Returns
        -------
        int
            0 for arrays on the host.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong; it is named.
        """
        problem = self._problem(arguments, False, k_total_lengths)
        backend, by_score = backend_of(problem.xp), check_sort(sort)
        size: int = backend.scratch_bytes(problem, self.k, by_score, return_scores)
        return size

    @in_order("arguments", written=True)
    def workspace(self, *arguments: Any, **options: Any) -> Array:
        """Return scratch memory for such calls, one at a time: uint8, [`scratch_bytes`].

        It is an array of the library of ``q``, but CuPy's for JAX, whose arrays can't be written.
        Parameters and errors are those of `scratch_bytes`.
        """
        size = self.scratch_bytes(*arguments, **options)
        return empty_beside(as_array("q", arguments[0]), (size,), np.uint8)

    def warmup(
        self,
        *arguments: Any,
        k_total_lengths: Any = None,
        return_scores: bool = False,
        sort: str = "position",
    ) -> None:
        """Compile and load what such a call needs, from this thread; launch nothing.

        Parameters and errors are those of `scratch_bytes`.
        """
        problem = self._problem(arguments, False, k_total_lengths)
        by_score = check_sort(sort)
        backend_of(problem.xp).warmup(problem, self.k, by_score, return_scores)


def _run_topk(
    problem: Problem,
    k: int,
    sort: str,
    out: Any,
    return_scores: bool,
    out_name: str = "out",
    workspace: Any = None,
) -> Any:
    by_score, rows, inputs = check_sort(sort), problem.shape.total_seq_len, problem.inputs
    selection = _problem.selection(
        rows, k, by_score, out, return_scores, inputs, out_name, workspace
    )
    backend_of(problem.xp).index_topk(problem, selection)
    if out is not None:
        return out
    return (selection.indices, selection.values) if return_scores else selection.indices


@in_order("q")
def index_topk(
    q: Any,
    qs: Any,
    input_row_offsets: Any,
    k_blocks: Any,
    k_cache_lengths: Any,
    k_lookup_table: Any,
    k_max_lengths: Any,
    k_scales: Any,
    layer_idx: Any,
    *,
    k: int,
    mask: Mask | str = Mask.CAUSAL,
    k_total_lengths: Any = None,
    out: Any = None,
    return_scores: bool = False,
    sort: str = "position",
    check: bool | None = None,
) -> Any:
    """Return the top-k key positions of every token; the arrays' extents are the parameters.

    Arguments, result and errors are those of `MLAIndexerRaggedFloat8Paged`; ``num_heads`` and
    ``depth`` are extents of ``q``, the granularity follows from the last extent of ``k_scales``.

    Parameters
    ----------
    q, ..., layer_idx
        See `MLAIndexerRaggedFloat8Paged.execute`.
    k : int
        Indices per token, 1 to 65536.
    mask : {"causal", "null"} or Mask
        Which keys a token sees.
    k_total_lengths, out, return_scores, sort, check
        See `MLAIndexerRaggedFloat8Paged.__call__`.

    Returns
    -------
    indices : int32, [total_seq_len, k]
    scores : float32, [total_seq_len, k]
        Only with ``return_scores``.
    """
    k = check_int("k", k, range(1, MAX_K + 1))
    cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
    arguments = q, qs, input_row_offsets, *cached
    causal = check_mask(mask) is Mask.CAUSAL
    problem = _problem.scoring_problem(
        *arguments, causal=causal, check=check, k_total_lengths=k_total_lengths
    )
    return _run_topk(problem, k, sort, out, return_scores)


@in_order("q")
def index_scores(
    q: Any,
    qs: Any,
    input_row_offsets: Any,
    k_blocks: Any,
    k_cache_lengths: Any,
    k_lookup_table: Any,
    k_max_lengths: Any,
    k_scales: Any,
    layer_idx: Any,
    *,
    mask: Mask | str = Mask.CAUSAL,
    k_total_lengths: Any = None,
    out: Any = None,
    check: bool | None = None,
) -> Array:
    """Return all scores as a dense matrix, for looking at.

    Parameters
    ----------
    q, ..., layer_idx
        See `MLAIndexerRaggedFloat8Paged.execute`.
    mask : {"causal", "null"} or Mask
        Which keys a token sees.
    out : float32, [total_seq_len, max_keys], optional
        Where to write.
    k_total_lengths, check
        See `MLAIndexerRaggedFloat8Paged.__call__`.

    Returns
    -------
    scores : float32, [total_seq_len, max_keys]
        -inf where the token does not see the key. ``max_keys`` is the sum of ``k_max_lengths``, at
        most ``pages_per_seq * page_size``, and just that where ``k_max_lengths`` is on a device.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong; it is named, and nothing has been written.
    """
    cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
    arguments = q, qs, input_row_offsets, *cached
    causal = check_mask(mask) is Mask.CAUSAL
    problem = _problem.scoring_problem(
        *arguments, causal=causal, check=check, k_total_lengths=k_total_lengths
    )
    extent = (problem.shape.total_seq_len, problem.shape.max_keys)
    if out is None:
        scores = empty_beside(problem.q, extent, np.float32)
    else:
        scores = _problem.dense_output(out, extent, problem.inputs)
    backend_of(problem.xp).index_scores(problem, scores)
    return scores if out is None else out
