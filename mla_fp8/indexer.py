"""The public operator `MLAIndexerRaggedFloat8Paged`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_fp8._backend import backend_of
from mla_fp8._check.outputs import check_dense, check_selection
from mla_fp8._check.problem import Inputs
from mla_fp8._check.streams import RepeatedOrder, in_order
from mla_fp8._operator import Operator
from mla_fp8.bound import BoundCall


@dataclass(frozen=True)
class MLAIndexerRaggedFloat8Paged(Operator):
    """The lightning indexer: exact top-k keys per query token, from FP8 scores on a paged cache.

    ``score[t, s] = k_scales[s] * sum_h qs[t, h] * max(0, q[t, h] . k[s])`` over the keys ``s``
    that token ``t`` sees; the row of ``t`` holds the positions of the ``k`` largest scores. An
    instance holds its parameters and nothing else: threads may share it, and it can be pickled and
    compared.

    Parameters
    ----------
    num_heads : int
        Query heads, 1 to 128.
    depth : int
        Channels per head: 32, 64, 128 or 256.
    k : int
        Indices per token, 1 to 65536.
    quantization_granularity : int
        Channels per key scale: 32, 64 or 128 if that is less than ``depth``. Any value from
        ``depth`` on means one scale per key.
    mask : {"causal", "null"} or Mask
        "causal": a token sees the keys up to its own; "null": all keys of its sequence.
    kpool : int
        Tokens that a cached row stands for, 1 to 64. With 4, row ``j`` of the cache stands for the
        tokens ``4 j`` to ``4 j + 3``, and a token sees it once it sees the last of them. Lengths
        and offsets count tokens; pages, positions and ``k`` count rows.

    Raises
    ------
    ValueError, TypeError
        If a parameter is out of range or not an integer.

    Notes
    -----
    The operation is ``mo.mla.indexer.ragged.float8.paged`` of Modular MAX, the key selector of
    DeepSeek-V3.2's sparse attention.

    Examples
    --------
    One sequence of four new tokens, whose keys grow, and two query heads:

    >>> import numpy as np
    >>> from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache
    >>> keys = np.arange(1, 5, dtype=np.float32)[:, None] * np.ones(32, np.float32)
    >>> cache = PagedKeyCache.from_dense([keys])
    >>> q = np.full((4, 2, 32), 0x38, np.uint8)  # 1.0 in E4M3
    >>> qs = np.full((4, 2), 0.5, np.float32)
    >>> op = MLAIndexerRaggedFloat8Paged(num_heads=2, depth=32, k=2, quantization_granularity=32)
    >>> op(q, qs, cache.input_row_offsets, *cache.view())
    array([[ 0, -1],
           [ 0,  1],
           [ 1,  2],
           [ 2,  3]], dtype=int32)
    """

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

        The arguments are those of the original operation, in its order. All arrays are
        C-contiguous and on one device, except ``k_max_lengths``, which may be on the host, and the
        strides of blocks and layers in ``k_blocks`` and ``k_scales``, which are free.

        Parameters
        ----------
        output_indices : int32, [total_seq_len, k]
            Every element is written: ascending positions, then -1.
        q : float8_e4m3fn or uint8, [total_seq_len, num_heads, depth]
            Queries.
        qs : float32, [total_seq_len, num_heads], or None
            Gate of each head, with softmax scale, head weight and query scale folded in. None
            means 1 for every head.
        input_row_offsets : uint32 or int32, [batch + 1]
            The tokens of sequence ``b`` are ``input_row_offsets[b]`` up to, but not including,
            ``input_row_offsets[b + 1]``.
        k_blocks : float8_e4m3fn or uint8, [num_blocks, 1, num_layers, page_size, kv_heads, depth]
            Key pages. They already hold the keys of the new tokens. On a GPU, keys are read
            fastest if every block begins on a multiple of 16 bytes.
        k_cache_lengths : uint32 or int32, [batch]
            Tokens cached before this call, **the new ones not counted**. For lengths that count
            them, see ``k_total_lengths`` of `__call__`.
        k_lookup_table : uint32 or int32, [batch, pages_per_seq]
            The block that holds each page of a sequence. Entries after the last used page are
            ignored.
        k_max_lengths : uint32 or int32, [1, 2]
            Upper bounds of [new tokens, cached tokens] over the batch. On a device it is not read,
            and the bounds follow from the shapes.
        k_scales : float32, [num_blocks, 1, num_layers, page_size, kv_heads, groups]
            Key scales, finite and >= 0; ``groups`` is ``depth / quantization_granularity``, at
            least 1.
        layer_idx : int
            Layer of the cache to read.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it, and nothing has been written.
        """
        if output_indices is None:
            raise TypeError("output_indices must be an array int32 [total_seq_len, k]; got None")
        cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
        problem = self._problem(Inputs(q, qs, input_row_offsets, *cached), None)
        selection = check_selection(
            problem.inputs, self.k, "position", False, output_indices, None, "output_indices"
        )
        backend_of(problem.xp).index_topk(problem, selection)

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
        key_start: Any = None,
        key_step: int = 1,
        output: str = "positions",
        out: Any = None,
        return_scores: bool = False,
        sort: str = "position",
        check: bool | None = None,
        workspace: Any = None,
    ) -> Any:
        """Return the top-k key positions of every token.

        Parameters
        ----------
        q, ..., layer_idx
            See `execute`.
        k_total_lengths : uint32 or int32, [batch], optional
            Lengths that count the new tokens, as serving engines keep them; ``k_cache_lengths``
            must be None then. ``k_max_lengths`` still bounds the cached tokens without the new
            ones. A total below the number of new tokens is wrong input (see ``check``). Unchecked,
            the last token sees that many keys, and each before it one fewer under a causal mask.
        key_start : int, or uint32 or int32, [batch], optional
            For a shard: the position, in its sequence, of the first row that this cache holds. With
            None and a ``key_step`` of 1, the cache has whole sequences: lengths must fit the table.
        key_step : int
            For a shard: row ``j`` of a sequence in this cache is row ``key_start + key_step * j``
            of the whole sequence; 1 to 256. Lengths, offsets and returned positions are those of
            whole sequences. A contiguous shard before the last must end where a page ends, and
            table entries after it must be 4294967295 (or -1).
        output : {"positions", "slots", "both"}
            "slots": ``block * page_size + offset`` instead of each position, in the order of the
            positions. "both": positions and slots.
        out : array or tuple of arrays, optional
            Where to write: int32 [total_seq_len, k]. With ``output="both"`` or ``return_scores`` a
            tuple of the results in the order below.
        return_scores : bool
            Return the scores as well, -inf beside each -1.
        sort : {"position", "score"}
            Order of a row: ascending position, or higher score first and, among equal scores, the
            smaller position first.
        check : bool, optional
            Whether to read values (offsets, lengths, page numbers, key scales) and raise on wrong
            ones. By default values on the host are checked. Values on a device are checked only if
            the environment variable ``MLA_FP8_CHECK`` is 1, because reading them waits for the
            device. Wrong values that are not checked never fault and never add keys: the keys that
            they would address are missing from the result.
        workspace : uint8, [at least `scratch_bytes`], optional
            Scratch memory, from `workspace`. By default it is allocated for the call. With it and
            ``out`` a call allocates nothing, and can be captured in a CUDA graph after one call
            outside. The graph serves every batch of these shapes: lengths, offsets, pages and
            tables may change between replays. Concurrent calls must not share a workspace.

        Returns
        -------
        indices : int32, [total_seq_len, k]
            The first ``min(k, keys seen)`` entries are distinct positions (or slots), the others
            -1. Results are arrays of the library of ``q``, on its device and in its stream order.
        slots : int32, [total_seq_len, k]
            Only with ``output="both"``.
        scores : float32, [total_seq_len, k]
            Only with ``return_scores``.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it, and nothing has been written.
        RuntimeError
            If a CUDA graph is being captured and there is no ``workspace``.
        """
        cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
        more = k_total_lengths, key_start, key_step
        problem = self._problem(Inputs(q, qs, input_row_offsets, *cached, *more), check)
        selection = check_selection(
            problem.inputs, self.k, sort, return_scores, out, workspace, output=output
        )
        backend_of(problem.xp).index_topk(problem, selection)
        return selection.results if out is None else out

    def bind(
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
        key_start: Any = None,
        key_step: int = 1,
        output: str = "positions",
        out: Any = None,
        return_scores: bool = False,
        sort: str = "position",
        check: bool | None = None,
        workspace: Any = None,
    ) -> BoundCall:
        """Check a call once, to make it many times on the same arrays: a `BoundCall`.

        Nothing is computed or written yet.

        Parameters
        ----------
        q, ..., layer_idx
            See `execute`. What is on the host and no array to read, as ``k_max_lengths`` and an
            integer ``key_start``, keeps its value of now.
        k_total_lengths, ..., return_scores, sort
            See `__call__`. Results and a workspace that are not given are allocated now.
        check : bool, optional
            As for `__call__`, but values are read now and not again.
        workspace : uint8, [at least `scratch_bytes`], optional
            See `__call__`. Nothing else may use it while a call runs.

        Returns
        -------
        BoundCall
            It takes no arguments, and returns what `__call__` does: the same arrays each time.

        Raises
        ------
        ValueError, TypeError
            If an argument is wrong. The message names it, and nothing has been written.
        RuntimeError
            If a CUDA graph is being captured: bind before, and capture the bound call.
        """
        cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
        more = k_total_lengths, key_start, key_step
        inputs = Inputs(q, qs, input_row_offsets, *cached, *more)
        outputs = out if isinstance(out, tuple) else (out,)
        order = RepeatedOrder(q, (*inputs, *outputs, workspace))
        with order.binding():
            problem = self._problem(inputs, check)
            selection = check_selection(
                problem.inputs, self.k, sort, return_scores, out, workspace, output=output
            )
            run = backend_of(problem.xp).bind_topk(problem, selection)
            results = order.given_back(selection.results) if out is None else out
        return BoundCall(run, order, results)

    @in_order("q")
    def scores(
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
        key_start: Any = None,
        key_step: int = 1,
        out: Any = None,
        check: bool | None = None,
        workspace: Any = None,
    ) -> Any:
        """Return the scores of all keys as a dense matrix; ``k`` has no effect.

        Parameters
        ----------
        q, ..., layer_idx
            See `execute`.
        k_total_lengths, key_start, key_step, check
            See `__call__`.
        out : float32, [total_seq_len, max_keys], optional
            Where to write.
        workspace : uint8, [at least `scratch_bytes`], optional
            Scratch memory, from `workspace` with ``for_scores=True``; see `__call__`.

        Returns
        -------
        scores : float32, [total_seq_len, max_keys]
            Column ``j`` is row ``j`` of the cache; -inf where the token does not see it.
            ``max_keys`` is ``pages_per_seq * page_size``, or less if ``k_max_lengths`` is on the
            host and its sum bounds the visible rows by less.

        Raises
        ------
        ValueError, TypeError, RuntimeError
            See `__call__`.
        """
        cached = k_blocks, k_cache_lengths, k_lookup_table, k_max_lengths, k_scales, layer_idx
        more = k_total_lengths, key_start, key_step
        problem = self._problem(Inputs(q, qs, input_row_offsets, *cached, *more), check)
        scores, memory = check_dense(problem.inputs, problem.shape.max_keys, out, workspace)
        backend_of(problem.xp).index_scores(problem, scores, memory)
        return scores if out is None else out
