"""Plans keep their promises for every shape; they are pure, so no GPU is needed."""

import dataclasses
import itertools

import numpy as np
import pytest
from compile_table import shape

from mla_fp8._plan.kernel import Device, divider
from mla_fp8._plan.scoring import Route, head_columns, plan_scores, route_of
from mla_fp8._plan.selection import MAX_FILTER_K, plan_select
from mla_fp8._plan.topk import SELECTION_LENGTHS, Mode, plan_topk
from mla_fp8._plan.tuning import H200 as TUNED
from mla_fp8._plan.tuning import Tuning
from mla_fp8._plan.workspace import Split, lay_out

H200 = Device("sm_90a", 132, shared_bytes=227 << 10)
A100 = Device("sm_80", 108, shared_bytes=163 << 10)
L40 = Device("sm_89", 142)
DEVICES = [H200, A100, L40, Device("sm_80", 1)]
SHAPES = [
    shape(total_seq_len=tokens, batch=batch, max_keys=keys, depth=depth, num_heads=heads)
    for tokens, batch in ((1, 1), (7, 3), (64, 64), (4096, 1), (100000, 7))
    for keys in (0, 1, 127, 8192, 1 << 20)
    for depth, heads in ((128, 64), (256, 128), (32, 1))
]
DECODE = [
    shape(total_seq_len=new * batch, batch=batch, max_new=new, max_keys=keys)
    for new, batch in itertools.product((1, 4), (1, 64, 1000))
    for keys in (0, 8192, 1 << 20)
]


def _plans(device, k=2048, by_score=False, values=False, tuning=TUNED):
    for s in SHAPES + DECODE:
        yield s, plan_topk(s, k, by_score, values, device, tuning)


# ---- how the work is split


def _coverage(split):
    """How often each (token, key) is in a part."""
    found = np.zeros((split.tokens, max(split.keys, 1)), int)
    for part in split.parts:
        found[part.first_token : part.end_token, part.first_key :][:, : max(part.num_keys, 1)] += 1
    return found


@pytest.mark.parametrize(("part_tokens", "part_keys"), [(1, 1), (3, 7), (10, 5), (100, 40), (4, 0)])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (10, 40), (11, 41), (5, 0)])
def test_each_token_and_key_is_in_one_part(tokens, keys, part_tokens, part_keys):
    split = Split(tokens, keys, part_tokens, part_keys, max(part_keys, keys))
    assert (_coverage(split) == 1).all()
    for part in split.parts:
        assert 0 < part.end_token - part.first_token <= split.part_rows
        assert part.num_keys <= max(part_keys, 1)


def test_windows_have_room_for_all_rows():
    for tokens, keys, rows in ((1, 1, 1), (79, 1280, 4), (100000, 8192, 77)):
        split = Split(tokens, keys, rows, keys, keys, packed=True)
        assert len(split.parts) * split.window_size >= tokens * split.row_stride
        assert split.buffer_bytes >= 4 * (split.window_size + split.row_stride)


def test_buffers_of_a_workspace_do_not_overlap():
    for s, plan in _plans(H200, by_score=True):
        w = plan.workspace
        starts = [w.token_rows, w.work_ranges, w.windows, *w.scores, w.values, *w.spare, w.size]
        assert starts == sorted(starts)
        assert all(start % 256 == 0 for start in starts)
        assert w.work_ranges - w.token_rows >= 16 * s.total_seq_len
        ends = [*w.scores[1:], w.values]
        for start, end in zip(w.scores, ends, strict=True):
            assert end - start >= plan.scoring.split.buffer_bytes


@pytest.mark.parametrize("k", [1, 2048, 4096, 65536])
@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("device", [H200, A100])
def test_a_workspace_is_bounded_whatever_the_shape(device, values, by_score, k):
    for s, plan in _plans(device, k, by_score, values):
        split = plan.scoring.split
        limit = TUNED.decode_bytes if plan.scoring.route is Route.DECODE else TUNED.prefill_bytes
        assert plan.workspace.size <= limit + (4 << 20)
        assert split.part_tokens <= s.total_seq_len
        assert not (plan.keeps_values and values)
        assert not (split.packed and by_score)
        if split.part_keys < s.max_keys:  # selection needs the scores of the parts before
            assert values or plan.keeps_values
            assert plan.scoring.unscored_kv_len == 0
            assert split.part_keys >= min(MAX_FILTER_K, s.max_keys)


def test_a_smaller_budget_gives_a_smaller_workspace():
    for s in SHAPES[:-6]:  # the longest rows do not fit into the smallest budget
        sizes = [
            plan_topk(s, 64, False, False, H200, Tuning(prefill_bytes=1 << bits)).workspace.size
            for bits in (22, 24, 26, 28)
        ]
        assert sizes == sorted(sizes)


def test_decode_is_split_only_if_its_scores_exceed_the_budget():
    for s, plan in _plans(H200):
        if plan.scoring.route is Route.DECODE:
            fits = 4 * s.total_seq_len * s.max_keys <= TUNED.decode_bytes
            assert (plan.mode is Mode.SEQUENTIAL) == fits
            assert plan.mode is not Mode.WINDOWS  # no scheduler that could fill windows


@pytest.mark.parametrize(("k", "tokens"), [(2048, 2561), (4096, 1281), (2048, 100_000)])
@pytest.mark.parametrize("values", [False, True])
def test_without_keys_nothing_is_scheduled(values, k, tokens):
    s = shape(total_seq_len=tokens, max_keys=0)
    plan = plan_topk(s, k, True, values, H200, TUNED)
    assert plan.scoring.scheduled_launches == 0
    assert plan.mode is Mode.SEQUENTIAL


def test_plans_are_cached_by_shape():
    first, second = (plan_topk(shape(num_heads=12), 64, False, True, H200, TUNED) for _ in range(2))
    assert first is second


# ---- scoring


def test_the_route_depends_on_depth_and_scales_alone():
    """The routes round differently, and no bit of a score may depend on lengths or batches."""
    for heads, depth, groups, kv_heads, fits in (
        (64, 128, 1, 1, True),
        (8, 64, 1, 1, True),
        (128, 128, 1, 1, True),
        (24, 128, 1, 1, True),
        (4, 64, 1, 1, True),
        (64, 256, 1, 1, False),
        (64, 128, 2, 1, False),
        (64, 128, 1, 8, False),
    ):
        sizes = {"num_heads": heads, "depth": depth, "scale_groups": groups, "kv_heads": kv_heads}
        templates = set()
        for new, batch, keys in ((1, 1, 1), (1, 64, 1 << 20), (4096, 1, 4096), (3, 5, 70000)):
            for page_size in (1, 48, 64):
                calls = {"total_seq_len": new * batch, "batch": batch, "max_new": new}
                s = shape(**sizes, **calls, max_keys=keys, page_size=page_size)
                templates.add(plan_scores(s, H200, TUNED).kernel.template)
        assert templates == {"index_scores_sm90" if fits else "index_scores"}
        for device in (A100, Device("sm_90", 132)):
            assert route_of(shape(**sizes), device) is Route.PORTABLE


@pytest.mark.parametrize("device", DEVICES)
def test_portable_blocks_cover_every_token_and_key(device):
    for s in SHAPES:
        topk = plan_topk(s, 2048, False, False, device, TUNED).scoring
        for plan in (plan_scores(s, device, TUNED), topk):
            if plan.route is not Route.PORTABLE:
                continue
            macros = dict(plan.kernel.macros)
            keys = macros["kWarps"] * macros["kKeysPerWarp"]
            assert plan.kernel.threads == 32 * macros["kWarps"]
            tokens = min(plan.split.part_tokens, s.total_seq_len)
            tiles = plan.blocks * plan.tile_tokens * keys
            assert tiles >= tokens * s.max_keys
            if s.max_keys:  # none of the blocks is without tokens or keys
                assert tiles < (tokens + plan.tile_tokens) * (s.max_keys + keys)


@pytest.mark.parametrize("device", [H200, A100])
def test_the_scheduler_has_a_warp_for_each_token_row_and_work_range(device):
    for s, topk in _plans(device):
        plan = topk.scoring
        if plan.schedule is None:
            assert plan.route is Route.DECODE
            continue
        warps = plan.schedule.threads // 32
        for launches in {1, plan.scheduled_launches}:
            needed = s.total_seq_len + launches * plan.blocks
            assert needed <= plan.schedule_blocks(s.total_seq_len, launches) * warps


def test_portable_tokens_share_keys_only_if_blocks_are_plenty():
    def tile(**sizes):
        return plan_scores(shape(**sizes), A100, TUNED).tile_tokens

    assert tile(total_seq_len=8, batch=1, max_keys=8192) == 1
    assert tile(total_seq_len=4096, batch=1, max_keys=65536) == TUNED.portable_tile_tokens
    assert tile(total_seq_len=64, batch=64, max_keys=65536) == 1  # no keys in common


@pytest.mark.parametrize("heads", [1, 2, 4, 7, 8, 12, 16, 32, 48, 64, 100, 128])
def test_hopper_tiles_hold_the_tokens_of_a_sequence_or_are_full(heads):
    decode, columns = [], head_columns(heads)
    assert columns in (8, 16, 32, 64, 128)
    assert heads <= columns < max(2 * heads, 9)
    for new in range(1, 40):
        s = shape(total_seq_len=4000, batch=200, num_heads=heads, max_new=new)
        plan = plan_topk(s, 64, False, False, H200, TUNED).scoring
        macros = dict(plan.kernel.macros)
        tokens, consumers = macros["kTokens"], macros["kTokenGroups"] * macros["kKeyGroups"]
        assert (macros["kHeads"], macros["kHeadColumns"]) == (heads, columns)
        assert tokens * columns <= 256  # what the registers of a warpgroup hold
        assert plan.kernel.threads == 128 * (consumers + 1)
        assert plan.tile_tokens == tokens * macros["kTokenGroups"]
        decode.append(plan.route is Route.DECODE)
        if plan.route is Route.DECODE:  # blocks find their own work
            assert plan.schedule is None
            assert new <= tokens < 2 * new
            assert macros["kKeyGroups"] > 1
        else:
            assert dict(plan.schedule.macros)["kTileTokens"] == plan.tile_tokens
            assert macros["kKeyGroups"] == 1
            assert 2 * tokens * columns > 256 or tokens == 16
    assert decode[0]
    assert not decode[-1]
    assert decode == sorted(decode, reverse=True)


def test_scheduler_and_scoring_count_work_in_the_same_units():
    for tuning in (TUNED, dataclasses.replace(TUNED, half_tile_unit_keys=64)):
        for s, topk in _plans(H200, tuning=tuning):
            plan = topk.scoring
            if plan.route is Route.PREFILL:
                units = [
                    dict(kernel.macros)["kHalfTileUnitKeys"]
                    for kernel in (plan.schedule, plan.kernel)
                ]
                assert units == [tuning.half_tile_unit_keys] * 2, s


def test_tma_boxes_divide_pages_and_coordinates_fit():
    for page_size in (1, 8, 48, 64, 96, 256):
        box = plan_scores(shape(page_size=page_size), H200, TUNED).box_rows
        assert page_size % box == 0
        assert 64 % box == 0
    assert plan_scores(shape(page_size=64), H200, TUNED).box_rows == 64
    # Coordinates are int32, so threads copy the keys of a larger pool.
    assert plan_scores(shape(num_blocks=2**30), H200, TUNED).box_rows == 64
    assert plan_scores(shape(num_blocks=2**31), H200, TUNED).box_rows == 1
    for alignment in (4, 1):
        plan = plan_scores(shape(key_alignment=alignment), H200, TUNED)
        assert plan.box_rows == 1
        assert dict(plan.kernel.macros)["kKeyAlignment"] == alignment


def test_only_a_dense_matrix_is_filled():
    assert plan_scores(SHAPES[0], H200, TUNED).fill is not None
    assert plan_topk(SHAPES[0], 8, False, False, H200, TUNED).scoring.fill is None
    assert plan_scores(SHAPES[0], A100, TUNED).fill is None  # the kernel itself writes -inf


# ---- selection


def test_selection_has_multiprocessors_while_scoring_goes_on():
    seen = set()
    for s, plan in _plans(H200):
        scoring, blocks = plan.scoring, plan.selection_blocks
        seen.add(plan.mode)
        if not plan.mode.pipelined:
            assert blocks == ()
            continue
        assert all(0 < n <= H200.multiprocessors // 2 for n in blocks)
        if plan.mode is Mode.WINDOWS:  # the scheduler takes the number for the lengths it finds
            assert len(blocks) == SELECTION_LENGTHS
            assert scoring.blocks == H200.multiprocessors
        else:
            assert scoring.blocks + blocks[0] == H200.multiprocessors
        tokens = scoring.split.part_tokens
        assert tokens % scoring.tile_tokens == 0 or tokens == s.total_seq_len
    assert seen == set(Mode)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own_scores", [False, True])
@pytest.mark.parametrize("k", [1, 2048, 4096, 4097, 65536])
def test_selection_kernels_fit_the_gpu(k, own_scores, device):
    for rows in (1, 2, 8, 9, 32, 33, 66, 67, 4096):
        for columns in (0, 1, 8192, 16384, 16385, 100_000, 1 << 20):
            plan = plan_select(rows, columns, k, device, TUNED, values=False, own_scores=own_scores)
            assert plan.kernel.shared_bytes <= device.shared_bytes
            assert plan.kernel.threads <= 1024
            assert plan.kernel.template == "topk_histogram" or k <= MAX_FILTER_K
            assert plan.blocks(rows) >= rows * plan.cluster
            if plan.cluster > 1:  # all clusters run at once, and each block has enough to do
                assert device.clusters
                assert plan.blocks(rows) <= device.multiprocessors
                assert columns >= TUNED.cluster_columns * plan.cluster


def test_long_rows_are_shared_by_more_blocks_if_they_are_few():
    def cluster(rows, columns):
        return plan_select(rows, columns, 2048, H200, TUNED, values=False).cluster

    for columns in (1 << 15, 1 << 17, 1 << 20):
        clusters = [cluster(rows, columns) for rows in (1, 8, 9, 33, 67, 1000)]
        assert clusters == sorted(clusters, reverse=True)
        assert clusters[0] > 1
        assert clusters[-1] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_of_a_call_fit_the_gpu(device):
    for k, by_score, values in itertools.product((4096, 65536), (False, True), (False, True)):
        for _, plan in _plans(device, k, by_score, values):
            for kernel in plan.kernels:
                assert kernel.threads <= 1024
                assert kernel.shared_bytes <= device.shared_bytes


def test_sorting_a_given_selection_keeps_scores_that_the_caller_does_not_get():
    split = Split(10, 500, 10, 500, 500)
    kept = lay_out(split, k=7, keeps_values=True, sorts=True)
    given = lay_out(split, k=7, keeps_values=False, sorts=True)
    assert kept.spare[0] - kept.values >= 4 * 7 * 10
    assert given.spare[0] == given.values


# ---- arithmetic


def test_divider_divides():
    rng = np.random.default_rng(0)
    powers = [2**i + d for i in range(1, 31) for d in (-1, 0, 1)]
    for divisor in [*range(1, 300), *powers, *map(int, rng.integers(1, 2**31, 200))]:
        factor, shift = map(int, divider(divisor))
        last = (2**31 - 1) // divisor * divisor
        chosen = [0, 1, divisor - 1, divisor, divisor + 1, last - 1, last, 2**31 - 1]
        for n in [*chosen, *map(int, rng.integers(0, 2**31, 20))]:
            if 0 <= n < 2**31:
                assert (2 * n * factor >> 32) >> shift == n // divisor, (n, divisor)
