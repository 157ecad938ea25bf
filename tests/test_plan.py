"""Plans are pure: what they promise holds for every shape, without a GPU."""

import re

import pytest
from compile_table import shape

from mla_fp8 import _jit, _plan
from mla_fp8._plan import Device

H200 = Device("sm_90a", 132)
SHAPES = [
    shape(total_seq_len=tokens, batch=batch, max_keys=keys, depth=depth, num_heads=heads)
    for tokens, batch in ((1, 1), (7, 3), (64, 64), (4096, 1), (100000, 7))
    for keys in (0, 1, 127, 8192, 1 << 20)
    for depth, heads in ((128, 64), (256, 128), (32, 1))
]


@pytest.mark.parametrize("device", [H200, Device("sm_80", 1)])
def test_blocks_cover_every_token_and_key_once(device):
    for s in SHAPES:
        for plan in (
            _plan.plan_scores(s, device),
            _plan.plan_topk(s, 2048, False, False, device).scoring,
        ):
            parameters = dict(plan.score.parameters)
            keys_per_tile = parameters["kWarps"] * parameters["kKeysPerWarp"]
            assert plan.score.threads == 32 * parameters["kWarps"]
            key_tiles = -(-s.max_keys // keys_per_tile)
            token_tiles = -(-plan.chunk_tokens // plan.tokens_per_tile)
            assert plan.blocks == key_tiles * token_tiles
            assert plan.row_stride >= s.max_keys
            assert plan.locate_blocks * (plan.locate.threads // 32) >= s.total_seq_len


def test_scores_between_the_kernels_are_bounded():
    for s in SHAPES:
        for k in (1, 65536):
            plan = _plan.plan_topk(s, k, True, True, H200).scoring
            assert 1 <= plan.chunk_tokens <= s.total_seq_len
            one_row = 4 * max(plan.row_stride, k)
            held = plan.chunk_tokens * one_row
            assert held <= max(_plan.SCRATCH_BYTES, one_row)


def test_tokens_of_one_sequence_share_keys_only_while_blocks_are_plenty():
    few = _plan.plan_scores(shape(total_seq_len=8, batch=1, max_keys=8192), H200)
    many = _plan.plan_scores(shape(total_seq_len=4096, batch=1, max_keys=65536), H200)
    decode = _plan.plan_scores(shape(total_seq_len=64, batch=64, max_keys=65536), H200)
    assert few.tokens_per_tile == 1
    assert many.tokens_per_tile == _plan.MAX_TOKENS_PER_TILE
    assert decode.tokens_per_tile == 1


def test_threads_are_those_of_the_template():
    """sort_topk fixes its block size: one thread per digit."""
    text = (_jit.kernel_folder() / "sort_topk.cu").read_text()
    constants = dict(re.findall(r"constexpr int (k\w+) = (.*?);", text))
    assert constants["kThreads"] == "kDigits"
    assert int(constants["kDigits"]) == _plan.SORT_THREADS


def test_plans_are_cached_by_shape():
    plans = [_plan.plan_topk(shape(num_heads=12), 64, False, True, H200) for _ in range(2)]
    assert plans[0] is plans[1]
