"""Plans are pure: what they promise holds for every shape, without a GPU."""

import re

import numpy as np
import pytest
from compile_table import shape

from mla_fp8._cuda import jit
from mla_fp8._plan import selection as _plan_select
from mla_fp8._plan import topk as _plan
from mla_fp8._plan.kernel import Device, divider

H200 = Device("sm_90a", 132, shared_bytes=227 << 10)
A100 = Device("sm_80", 108)
SHAPES = [
    shape(total_seq_len=tokens, batch=batch, max_keys=keys, depth=depth, num_heads=heads)
    for tokens, batch in ((1, 1), (7, 3), (64, 64), (4096, 1), (100000, 7))
    for keys in (0, 1, 127, 8192, 1 << 20)
    for depth, heads in ((128, 64), (256, 128), (32, 1))
]


@pytest.mark.parametrize("device", [A100, Device("sm_80", 1)])
def test_blocks_cover_every_token_and_key_once(device):
    for s in SHAPES:
        for plan in (
            _plan.plan_scores(s, device),
            _plan.plan_topk(s, 2048, False, False, device).scoring,
        ):
            assert plan.route == "portable"
            parameters = dict(plan.score.parameters)
            keys_per_tile = parameters["kWarps"] * parameters["kKeysPerWarp"]
            assert plan.score.threads == 32 * parameters["kWarps"]
            key_tiles = -(-s.max_keys // keys_per_tile)
            token_tiles = -(-plan.cut.chunk_tokens // plan.tokens_per_tile)
            assert plan.blocks == key_tiles * token_tiles
            assert plan.cut.row_stride >= s.max_keys
            warps = plan.locate_blocks(s.total_seq_len, 0) * (plan.locate.threads // 32)
            assert warps >= s.total_seq_len


@pytest.mark.parametrize("k", [1, 2048, 4096, 65536])
@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("device", [H200, A100])
def test_scratch_is_bounded_whatever_the_shape(device, values, by_score, k):
    for s in SHAPES:
        topk = _plan.plan_topk(s, k, by_score, values, device)
        plan = topk.scoring
        assert 1 <= plan.cut.chunk_tokens <= s.total_seq_len
        assert topk.own_values <= (not values)
        scores = 4 * topk.buffers * plan.cut.row_stride
        beside = 4 * k * topk.own_values + 8 * k * by_score
        located = 16 * s.total_seq_len + 32 * min(plan.launches, 64) * plan.blocks
        if plan.cut.packed:  # a row may begin at the end of a window
            located += scores + 12 * plan.launches
            assert not by_score
            assert plan.cut.chunk_keys == s.max_keys
            assert plan.cut.window == plan.cut.chunk_tokens * plan.cut.row_stride
            assert plan.launches * plan.cut.window >= s.total_seq_len * plan.cut.row_stride
        needed = plan.cut.chunk_tokens * (scores + beside) + located
        parts = 6 + topk.buffers  # each begins on a multiple of 256 bytes
        assert needed <= topk.scratch.end <= needed + 256 * parts
        assert topk.scratch.end <= 64 << 20
        if plan.cut.chunk_keys < s.max_keys:  # what came before is taken up again, with its scores
            assert values or topk.own_values
            assert plan.skip == 0
            assert plan.cut.chunk_keys >= _plan_select.STREAM_K
            assert plan.cut.chunk_keys % 64 == 0


def test_decode_has_all_scores_in_memory_up_to_a_bound():
    for batch in (1, 64, 256, 1000):
        for new in (1, 4):
            s = shape(total_seq_len=new * batch, batch=batch, max_new=new, max_keys=1 << 20)
            plan = _plan.plan_topk(s, 2048, False, False, H200)
            fits = 4 * new * batch << 20 <= _plan.FEW_SCRATCH_BYTES
            assert plan.buffers == 2 - fits
            assert plan.scratch.end <= _plan.FEW_SCRATCH_BYTES + (1 << 20)
            assert not plan.scoring.cut.packed  # nobody has counted when scoring begins


@pytest.mark.parametrize(("k", "tokens"), [(2048, 2561), (4096, 1281), (2048, 100_000)])
@pytest.mark.parametrize("values", [False, True])
def test_without_keys_nothing_is_scored_beside_selection(values, k, tokens):
    """No launch has shares then, and a scoring kernel would read them from nowhere."""
    plan = _plan.plan_topk(shape(total_seq_len=tokens, max_keys=0), k, True, values, H200)
    assert plan.scoring.launches == 0
    assert plan.buffers == 1
    assert plan.scratch.end <= 64 << 20


def test_selection_has_blocks_of_its_own_while_scoring_goes_on():
    for s in SHAPES:
        plan = _plan.plan_topk(s, 2048, False, False, H200)
        if plan.buffers == 1:
            assert plan.select_blocks == 0
            assert plan.scoring.launches <= 1
        else:
            assert 0 < plan.select_blocks <= 66
            reserved = plan.scoring.reserved
            if reserved:  # how many is known when lengths are
                assert len(reserved) == _plan.RESERVED_LENGTHS
                assert plan.scoring.blocks == 132
                assert plan.select_blocks == max(reserved)
                assert all(0 < blocks <= 66 for blocks in reserved)
            else:
                assert plan.scoring.blocks + plan.select_blocks == 132
            tile = dict(plan.scoring.locate.parameters)["kTileTokens"]
            tokens = plan.scoring.cut.chunk_tokens
            assert tokens % tile == 0 or tokens == s.total_seq_len
            assert plan.select.shared_bytes <= H200.shared_bytes


def test_tokens_of_one_sequence_share_keys_only_while_blocks_are_plenty():
    few = _plan.plan_scores(shape(total_seq_len=8, batch=1, max_keys=8192), A100)
    many = _plan.plan_scores(shape(total_seq_len=4096, batch=1, max_keys=65536), A100)
    decode = _plan.plan_scores(shape(total_seq_len=64, batch=64, max_keys=65536), A100)
    assert few.tokens_per_tile == 1
    assert many.tokens_per_tile == _plan.MAX_TOKENS_PER_TILE
    assert decode.tokens_per_tile == 1


def test_threads_are_those_of_the_template():
    """sort_topk fixes its block size: one thread per digit."""
    text = (jit.kernel_folder() / "sort_topk.cu").read_text()
    constants = dict(re.findall(r"constexpr int (k\w+) = (.*?);", text))
    assert constants["kThreads"] == "kDigits"
    assert int(constants["kDigits"]) == _plan_select.SORT_THREADS


def test_plans_are_cached_by_shape():
    plans = [_plan.plan_topk(shape(num_heads=12), 64, False, True, H200) for _ in range(2)]
    assert plans[0] is plans[1]


def test_route_is_a_matter_of_heads_depth_and_scales_alone():
    """Lengths and batches must not change the kernel: nor, then, any bit of a score."""
    for heads, depth, groups, kv_heads, fits in (
        (64, 128, 1, 1, True),
        (8, 64, 1, 1, True),
        (128, 128, 1, 1, True),
        (24, 128, 1, 1, False),
        (64, 256, 1, 1, False),
        (64, 128, 2, 1, False),
        (64, 128, 1, 8, False),
    ):
        routes = {
            _plan.plan_scores(
                shape(
                    num_heads=heads,
                    depth=depth,
                    scale_groups=groups,
                    kv_heads=kv_heads,
                    total_seq_len=new * batch,
                    batch=batch,
                    max_new=new,
                    max_keys=keys,
                    page_size=page_size,
                ),
                H200,
            ).route
            for new, batch, keys in ((1, 1, 1), (1, 64, 1 << 20), (4096, 1, 4096), (3, 5, 70000))
            for page_size in (1, 48, 64)
        }
        assert routes == {"hopper" if fits else "portable"}
        s = shape(num_heads=heads, depth=depth, scale_groups=groups, kv_heads=kv_heads)
        assert {_plan.plan_scores(s, d).route for d in (A100, Device("sm_90", 132))} == {"portable"}


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


def test_every_block_of_every_hopper_launch_gets_a_share():
    for s in SHAPES:
        plan = _plan.plan_topk(s, 64, False, False, H200).scoring
        score = dict(plan.score.parameters)
        parts = -(-s.total_seq_len // plan.cut.chunk_tokens) * -(
            -s.max_keys // max(plan.cut.chunk_keys, 1)
        )
        assert plan.launches == (parts if plan.route == "hopper" else 0)
        tile = score["kTokens"] * score["kTokenGroups"] if plan.launches else 0
        assert dict(plan.locate.parameters)["kTileTokens"] == tile
        warps = plan.locate_blocks(s.total_seq_len, plan.launches) * (plan.locate.threads // 32)
        assert warps >= s.total_seq_len + plan.launches * plan.blocks


@pytest.mark.parametrize("heads", _plan.HOPPER_HEADS)
def test_with_few_tokens_a_sequence_scoring_shares_its_work_out_itself(heads):
    most = min(256 // heads, 16)
    for new in (1, most, most + 1):
        s = shape(total_seq_len=300, batch=150, num_heads=heads, max_new=new)
        plan = _plan.plan_topk(s, 64, False, False, H200).scoring
        assert (plan.locate is None) == (new <= most)
        assert (plan.launches == 0) == (new <= most)


def test_copy_engine_copies_what_divides_a_page_and_its_numbers_hold():
    for page_size, rows in ((1, 1), (8, 8), (48, 16), (64, 64), (96, 32), (256, 64)):
        plan = _plan.plan_scores(shape(page_size=page_size), H200)
        assert dict(plan.score.parameters)["kBoxRows"] == rows
    huge = _plan.plan_scores(shape(num_blocks=2**25), H200)
    assert dict(huge.score.parameters)["kBoxRows"] == 1


@pytest.mark.parametrize("heads", _plan.HOPPER_HEADS)
def test_hopper_tiles_hold_a_sequences_tokens_or_are_full(heads):
    for new in (0, 1, 2, 3, 4, 8, 30, 100, 4096):
        plan = _plan.plan_scores(shape(num_heads=heads, max_new=new), H200)
        p = dict(plan.score.parameters)
        assert plan.blocks == H200.multiprocessors
        columns = p["kTokens"] * heads
        assert columns <= 256
        assert plan.score.threads == 128 * (p["kTokenGroups"] * p["kKeyGroups"] + 1)
        if p["kTokenGroups"] == 1:
            assert max(new, 1) <= p["kTokens"] < 2 * max(new, 1)
            assert p["kKeyGroups"] == (4 if columns <= 64 else 2)
        else:
            assert (p["kTokenGroups"], p["kKeyGroups"]) == (2, 1)
            assert columns == min(256, 16 * heads)
            assert p["kTokens"] < new


def test_only_a_dense_matrix_is_filled():
    assert _plan.plan_scores(SHAPES[0], H200).fill is not None
    assert _plan.plan_topk(SHAPES[0], 8, False, False, H200).scoring.fill is None
    assert _plan.plan_scores(SHAPES[0], A100).fill is None


def test_few_rows_are_shared_among_blocks_which_all_run_at_once():
    for rows in (1, 2, 8, 9, 32, 33, 66, 67, 4096):
        for columns in (0, 1, 8192, 16384, 100_000, 1 << 20):
            for k in (1, 2048, 4096, 4097):
                kernel = _plan_select.select_kernel(rows, columns, k, H200, values=False)
                blocks = dict(kernel.parameters).get("kCluster", 1)
                assert blocks == 1 or rows * blocks <= 132
                assert blocks == 1 or columns >= 8192 * blocks
                short = rows <= 32 and columns <= 16384
                assert (blocks > 1) == (rows <= 66 and columns >= 16384 and not short)
                old = _plan_select.select_kernel(rows, columns, k, A100, values=False)
                assert dict(old.parameters).get("kCluster", 1) == 1
                assert kernel.template == "select_topk" or k <= 4096
                assert kernel.shared_bytes <= H200.shared_bytes
                assert old.shared_bytes <= A100.shared_bytes
