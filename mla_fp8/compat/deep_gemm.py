"""DeepGEMM's functions for the scores of the indexer, under its names and in its argument order. ::

    from mla_fp8.compat.deep_gemm import fp8_paged_mqa_logits

Tensors of torch go in and come out. Logits are the scores of `mla_fp8.index_scores`: ``weights``
are the gates, and a key scale multiplies each column. They run on every GPU from sm_80 on and on
the CPU, for 1 to 128 heads and depths of 32, 64, 128 or 256. The functions read no value back to
the host, so CUDA graphs can capture them and ``torch.compile`` can trace them.

`mla_fp8.torch_ops.select_topk` selects from the logits. `mla_fp8.torch_ops.index_topk` scores and
selects in one call, without a matrix of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_fp8 import torch_ops
from mla_fp8._check.parameters import DEPTHS, MAX_HEADS
from mla_fp8._check.shape import MOST
from mla_fp8._plan.scoring import head_columns

_FP8 = (torch.float8_e4m3fn, torch.uint8)
_FLOAT, _INT, _BYTES = (torch.float32,), (torch.int32,), (torch.uint8,)
_PAGE = 64  # rows that the tensor copy engine takes at once
_BLOCK_LOGITS = 1 << 25  # logits that are masked or gathered at once, to bound temporary memory


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Tensor:
    """Return the logits of queries over contiguous keys; each query sees one range of keys.

    Parameters
    ----------
    q : float8_e4m3fn or uint8, [seq_len, num_heads, head_dim]
        Queries.
    kv : (float8_e4m3fn or uint8 [seq_len_kv, head_dim], float32 [seq_len_kv] or [seq_len_kv, 1])
        Keys and their scales.
    weights : float32, [seq_len, num_heads]
        Gates of the heads.
    cu_seq_len_k_start, cu_seq_len_k_end : int32, [seq_len]
        Query ``t`` sees the keys ``cu_seq_len_k_start[t]`` up to, but not including,
        ``cu_seq_len_k_end[t]``.
    clean_logits : bool
        Write -inf for keys that a query does not see. Otherwise these logits are unspecified.
    max_seqlen_k : int
        If it is not 0, logits are compressed: column ``j`` belongs to key
        ``cu_seq_len_k_start[t] + j``. ``clean_logits`` must be False then.

    Returns
    -------
    logits : float32, [seq_len, seq_len_kv], or [seq_len, max_seqlen_k] if they are compressed
        Rows may be farther apart than they are long, as DeepGEMM's are.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.

    Notes
    -----
    The ranges are known on the device alone. Queries are scored in groups of 4 to 32 neighbours.
    A group is scored against all keys up to the last that one of its queries sees, so keys before a
    range are scored too, and then masked. For many sequences, `mla_fp8.torch_ops.index_scores` is
    faster: it knows from ``input_row_offsets`` which keys belong to a query. If ``seq_len_kv`` is
    not a multiple of 64, the keys are copied once.

    Examples
    --------
    >>> import torch
    >>> from mla_fp8.compat.deep_gemm import fp8_mqa_logits
    >>> q, k = torch.ones(2, 1, 32), torch.arange(1.0, 4)[:, None] * torch.ones(32)
    >>> q, k = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn)
    >>> start, end = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    >>> fp8_mqa_logits(q, (k, torch.ones(3)), torch.ones(2, 1), start, end)
    tensor([[32., 64., -inf],
            [-inf, 64., 96.]])
    """
    if not isinstance(kv, tuple | list) or len(kv) != 2:
        raise TypeError(f"kv must be a pair (keys, scales); got {type(kv).__name__}")
    tokens, heads, depth = _queries(q, "seq_len", "num_heads", "head_dim")
    keys, scales = kv
    (count, _) = _check("kv[0]", keys, _FP8, ("seq_len_kv", depth), q)
    if isinstance(scales, Tensor) and scales.dim() == 2:
        _check("kv[1]", scales, _FLOAT, (count, 1), q)
    else:
        _check("kv[1]", scales, _FLOAT, (count,), q)
    _check("weights", weights, _FLOAT, (tokens, heads), q)
    _check("cu_seq_len_k_start", cu_seq_len_k_start, _INT, (tokens,), q)
    _check("cu_seq_len_k_end", cu_seq_len_k_end, _INT, (tokens,), q)
    _check_count("max_seqlen_k", max_seqlen_k, 0)
    if max_seqlen_k and clean_logits:
        raise ValueError("clean_logits must be False with max_seqlen_k; got True")
    if tokens == 0 or count == 0:
        return q.new_full((tokens, max_seqlen_k or count), -torch.inf, dtype=torch.float32)

    q, weights = q.contiguous(), weights.contiguous()
    rows, group = _PAGE * -(-count // _PAGE), _group_of(heads)
    # One page holds all keys, so the table has one entry for each group.
    k_blocks = _whole_rows(keys.view(torch.uint8), rows).view(1, 1, 1, rows, 1, depth)
    k_scales = _whole_rows(scales.view(count), rows).view(1, 1, 1, rows, 1, 1)

    def score(begin: int, end: int) -> Tensor:
        """Scores of some tokens over the keys of their groups; each row has all columns."""
        new = end - begin
        groups = -(-new // group)
        offsets = torch.arange(groups + 1, dtype=torch.int32, device=q.device) * group
        ends = cu_seq_len_k_end[begin:end].clamp(0, count)
        ends = torch.nn.functional.pad(ends, (0, groups * group - new)).view(groups, group)
        return torch_ops.index_scores(
            q[begin:end],
            weights[begin:end],
            offsets.clamp(max=new),
            k_blocks,
            None,
            torch.zeros((groups, 1), dtype=torch.int32, device=q.device),
            (min(group, new), rows),
            k_scales,
            0,
            mask="null",
            k_total_lengths=ends.amax(dim=1),
            check=False,
        )

    start, stop = cu_seq_len_k_start[:, None], cu_seq_len_k_end[:, None]
    step = max(1, _BLOCK_LOGITS // max(rows, max_seqlen_k))
    blocks = [(first, min(first + step, tokens)) for first in range(0, tokens, step)]
    if max_seqlen_k:
        place = torch.arange(max_seqlen_k, device=q.device)
        logits = q.new_empty((tokens, max_seqlen_k), dtype=torch.float32)
        for begin, end in blocks:
            columns = (start[begin:end] + place).clamp(0, count - 1)
            logits[begin:end] = score(begin, end).gather(1, columns)
        return logits
    logits = score(0, tokens)[:, :count]
    if clean_logits:
        column = torch.arange(count, dtype=torch.int32, device=q.device)
        for begin, end in blocks:
            unseen = (column < start[begin:end]) | (column >= stop[begin:end])
            logits[begin:end].masked_fill_(unseen, -torch.inf)
    return logits


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Any,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Any = None,
) -> Tensor:
    """Return the logits of each sequence's new tokens over its keys in fused pages.

    Parameters
    ----------
    q : float8_e4m3fn or uint8, [batch, next_n, num_heads, head_dim]
        Queries of the ``next_n`` new tokens of each sequence.
    kv_cache : uint8, [num_blocks, block_kv, 1, head_dim + 4]
        Fused pages: the values of a page's ``block_kv`` keys, then their float32 scales. Blocks may
        be farther apart than they are long. They are read in place.
    weights : float32, [batch * next_n, num_heads]
        Gates of the heads.
    context_lens : int32, [batch] or [batch, next_n]
        [batch]: the keys of each sequence, the new tokens counted; new token ``j`` sees
        ``context_lens[b] - next_n + j + 1`` of them. [batch, next_n]: how many keys each token
        sees.
    block_table : int32, [batch, max_blocks]
        The block that holds each page of a sequence.
    schedule_meta : object
        Not needed: work is scheduled on the device. `get_paged_mqa_logits_metadata` makes one.
    max_context_len : int
        Columns of the result, at least ``next_n``. Keys from this one on are not scored.
    clean_logits : bool
        Only for ``context_lens`` [batch, next_n]: whether to write -inf for keys that a token does
        not see, but another new token of its sequence sees. If False, it has their logits.
    indices : object
        Not needed: it says which tokens belong to one request, and no logit depends on that.

    Returns
    -------
    logits : float32, [batch * next_n, max_context_len]
        -inf for keys that a token does not see, but see ``clean_logits``.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong. The message names it.

    Examples
    --------
    One sequence with two keys in block 1, the second of which belongs to the new token:

    >>> import torch
    >>> from mla_fp8.compat.deep_gemm import fp8_paged_mqa_logits
    >>> cache = torch.zeros(2, 64 * 36, dtype=torch.uint8)
    >>> cache[1, : 2 * 32] = 0x38  # 1.0 in E4M3
    >>> cache[1, 64 * 32 :].view(torch.float32)[:2] = torch.tensor([2.0, 3.0])
    >>> q = torch.full((1, 1, 1, 32), 0x38, dtype=torch.uint8)
    >>> lens, table = torch.tensor([[2], [1]], dtype=torch.int32)
    >>> one = torch.ones(1, 1)
    >>> fp8_paged_mqa_logits(q, cache.view(2, 64, 1, 36), one, lens, table[None], None, 3)
    tensor([[64., 96., -inf]])
    """
    batch, next_n, heads, depth = _queries(q, "batch", "next_n", "num_heads", "head_dim")
    tokens = batch * next_n
    fused = "num_blocks", "block_kv", 1, depth + 4
    _, page_size, _, _ = _check("kv_cache", kv_cache, _BYTES, fused, q)
    _check_count("block_kv", page_size, 1)
    _check("weights", weights, _FLOAT, (tokens, heads), q)
    per_token = isinstance(context_lens, Tensor) and context_lens.dim() == 2
    _check("context_lens", context_lens, _INT, (batch, next_n)[: 1 + per_token], q)
    _, pages = _check("block_table", block_table, _INT, (batch, "max_blocks"), q)
    _check_count("max_context_len", max_context_len, next_n)
    if tokens == 0:
        return q.new_empty((0, max_context_len), dtype=torch.float32)
    values, scales = _views(kv_cache, page_size, depth)
    missing = -(-max_context_len // page_size) - pages
    if missing > 0:  # the result is wider than the table: no length reaches these entries
        block_table = torch.nn.functional.pad(block_table, (0, missing), value=-1)
    logits = torch_ops.index_scores(
        q.reshape(tokens, heads, depth),
        weights.contiguous(),
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * next_n,
        values,
        None,
        block_table.contiguous(),
        (next_n, max_context_len - next_n),
        scales,
        0,
        mask="null" if per_token else "causal",
        k_total_lengths=context_lens.amax(dim=1) if per_token else context_lens.contiguous(),
        check=False,
    )
    if clean_logits and per_token and next_n > 1:
        column = torch.arange(max_context_len, dtype=torch.int32, device=q.device)
        logits.masked_fill_(column >= context_lens.reshape(tokens, 1), -torch.inf)
    return logits


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Any = None
) -> Tensor:
    """Return a tensor of the form of DeepGEMM's schedule; `fp8_paged_mqa_logits` does not read it.

    Parameters
    ----------
    context_lens : int32, [batch] or [batch, next_n]
        As for `fp8_paged_mqa_logits`; only its device matters.
    block_kv : int
        Keys per page; it has no effect.
    num_sms : int
        Multiprocessors of the GPU.
    indices : object
        It has no effect.

    Returns
    -------
    int32, [num_sms + 1, 2]
        Zeros.

    Examples
    --------
    >>> import torch
    >>> from mla_fp8.compat.deep_gemm import get_paged_mqa_logits_metadata
    >>> get_paged_mqa_logits_metadata(torch.zeros(3, dtype=torch.int32), 64, 132).shape
    torch.Size([133, 2])
    """
    return context_lens.new_zeros((num_sms + 1, 2), dtype=torch.int32)


def _check(
    name: str,
    tensor: Any,
    dtypes: tuple[torch.dtype, ...],
    axes: tuple[str | int, ...],
    beside: Tensor | None = None,
) -> tuple[int, ...]:
    """The shape of a tensor, if its dtype, its extents and its device are right."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch tensor; got {type(tensor).__name__}")
    shape = tuple(tensor.shape)
    fits = len(axes) == len(shape) and all(
        isinstance(axis, str) or axis == extent for axis, extent in zip(axes, shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be {names} [{', '.join(map(str, axes))}]; "
            f"got {str(tensor.dtype).removeprefix('torch.')} {shape}"
        )
    if beside is not None and tensor.device != beside.device:
        raise ValueError(f"{name} must be on {beside.device} like q; got {tensor.device}")
    return shape


def _check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an integer from ``least`` to the most keys of a sequence."""
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, on the host; got {type(value).__name__}")
    if not least <= value <= MOST:
        raise ValueError(f"{name} must be from {least} to {MOST}; got {value}")


def _queries(q: Any, *axes: str) -> tuple[int, ...]:
    """The shape of ``q``, if the operation takes its heads and depth."""
    shape = _check("q", q, _FP8, axes)
    if shape[-1] not in DEPTHS or not 1 <= shape[-2] <= MAX_HEADS:
        raise ValueError(
            f"q must have 1 to {MAX_HEADS} heads of depth {', '.join(map(str, DEPTHS))}; "
            f"got {shape[-2]} of depth {shape[-1]}"
        )
    return shape


def _group_of(heads: int) -> int:
    """Tokens of a tile of the Hopper kernel: more in a group would see the keys of the last."""
    return 2 * min(256 // head_columns(heads), 16)


def _whole_rows(given: Tensor, rows: int) -> Tensor:
    """``given`` with so many rows; what a copy has after the last one is never read."""
    if given.shape[0] == rows:
        return given.contiguous()
    whole = given.new_empty((rows, *given.shape[1:]))
    whole[: given.shape[0]] = given
    return whole


def _views(kv_cache: Tensor, page_size: int, depth: int) -> tuple[Tensor, Tensor]:
    """The values and the scales of fused pages, as two pools over the same memory."""
    blocks, width = kv_cache.shape[0], page_size * (depth + 4)
    try:
        pages = kv_cache.view(blocks, width)
        scales = pages[:, page_size * depth :].view(torch.float32)
    except RuntimeError:
        raise ValueError(
            "kv_cache must have contiguous pages that begin on multiples of 4 bytes; got strides "
            f"{kv_cache.stride()} for shape {tuple(kv_cache.shape)}"
        ) from None
    values = pages[:, : page_size * depth].view(blocks, 1, 1, page_size, 1, depth)
    return values, scales.view(blocks, 1, 1, page_size, 1, 1)
