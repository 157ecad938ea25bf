"""The Hopper route: its bits against an emulation of the tensor cores, its reach, its tiles."""

import dataclasses
from itertools import pairwise

import hopper
import numpy as np
import pytest
from generators import Spec
from properties import SCORE_GATE, guarded, host, one_element_on, same_bits, score_gap

from mla_fp8 import index_scores
from mla_fp8.cli import oracle

TILES = {  # new tokens per sequence: one each, a few, several tiles of many
    "decode": ((1, 1, 1), (200, 63, 64)),
    "speculative": ((2, 3, 0, 1), (130, 700, 5, 0)),
    "prefill": ((130, 0, 7), (5, 9, 250)),
}


@pytest.fixture
def portable(monkeypatch):
    """Leaves the GPU without its architecture-specific instructions, as far as plans know."""
    from mla_fp8._cuda import backend

    facts = backend.device_facts

    def forget() -> None:  # pipelines are kept by shape
        backend._topk_pipeline.cache_clear()
        backend._scores_pipeline.cache_clear()

    def plain(ordinal):
        return dataclasses.replace(facts(ordinal), arch="sm_90")

    def use() -> None:
        monkeypatch.setattr(backend, "device_facts", plain)
        forget()

    yield use
    forget()


def sequences(case):
    """Of each sequence: its tokens, and where its keys stand in `k_blocks` and `k_scales`."""
    page_size = case.k_blocks.shape[3]
    ends = pairwise(map(int, case.input_row_offsets))
    for pages, cached, (first, last) in zip(
        case.k_lookup_table, case.k_cache_lengths, ends, strict=True
    ):
        position = np.arange(int(cached) + last - first)
        page = pages[position // page_size].astype(np.int64)
        yield slice(first, last), (page, 0, case.layer_idx, position % page_size, 0)


def expected(case) -> np.ndarray:
    """The dense scores of a host case by `hopper.scores`."""
    selectable = oracle.evaluate(case).selectable
    found = np.full(selectable.shape, -np.inf, np.float32)
    for tokens, slots in sequences(case):
        mine = hopper.scores(
            case.q[tokens].view(np.uint8),
            case.qs[tokens],
            case.k_blocks.view(np.uint8)[slots],
            case.k_scales[slots][:, 0],
        )
        found[tokens, : mine.shape[1]] = mine
    return np.where(selectable, found, np.float32(-np.inf))


def with_keys(case, seed):
    """The same keys, scales and queries by position, whatever the pages."""
    rng = np.random.default_rng(seed)
    keys, scales = case.k_blocks.view(np.uint8).copy(), case.k_scales.copy()
    for _, slots in sequences(case):
        count = len(slots[0])
        keys[slots] = rng.integers(0, 0x7F, (count, keys.shape[-1]))
        scales[slots] = rng.uniform(0.5, 2, (count, 1))
    q = rng.integers(0, 0x7F, case.q.shape).astype(np.uint8)
    q[:, ::2] |= 0x80
    return case.replace(
        q=q.view(case.q.dtype),
        qs=rng.standard_normal(case.qs.shape).astype(np.float32),
        k_blocks=keys.view(case.k_blocks.dtype),
        k_scales=scales,
    )


def test_emulated_products_are_exact_where_nothing_is_cut():
    q, keys = np.full((1, 64), 0x38, np.uint8), np.full((2, 64), 0x40, np.uint8)  # 1 and 2
    keys[1, ::2] = 0xC0
    assert hopper.dot_products(q, keys).tolist() == [[128.0, 0.0]]


def test_emulated_products_are_cut_towards_zero_below_the_largest():
    """448 * 448 has exponent 2 ** 16 by its factors: what is below 2 ** 3 disappears."""
    q, keys = np.zeros((1, 64), np.uint8), np.zeros((1, 64), np.uint8)
    q[0, :2], keys[0, :2] = (0x7E, 0x38), (0x7E, 0x4F)  # 448 * 448 + 1 * 7.5
    assert hopper.dot_products(q, keys) == 448 * 448
    q[0, 1] = 0x40  # + 2 * 7.5, of which 8 remains; and 14 significant bits of the sum
    assert hopper.dot_products(q, keys) == np.trunc((448 * 448 + 8) / 16) * 16
    q[0, 1] = 0x80 | 0x40
    assert hopper.dot_products(q, keys) == 448 * 448 - 8 - (448 * 448 - 8) % 16


def test_emulated_fma_rounds_once():
    one, tiny = np.float32(1), np.float32(2**-24)
    a = np.array([one + 2 * tiny], np.float32)
    assert hopper.fma(a, a, np.array([-1], np.float32)) == np.float32(2**-22 + 2**-46)
    ones = np.array([one])
    assert hopper.fma(np.array([tiny]), ones, ones) == one, "half way: to even"
    above = np.float32(2**-24 + 2**-47)
    assert hopper.fma(np.array([above]), ones, ones) == one + 2 * tiny


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["normal", "wide", "plateau", "nan_codes", "special_gates"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("heads", "depth"), [(8, 64), (8, 128), (16, 128), (32, 128), (64, 64), (64, 128), (128, 128)]
)
def test_device_has_the_emulated_bits(heads, depth, tile, values, hopper_gpu):
    new, cached = TILES[tile]
    if tile == "prefill" and heads > 32:
        new, cached = (19, 0, 3), (5, 9, 250)
    case = Spec(new, cached, num_heads=heads, depth=depth, values=values).build()
    with np.errstate(invalid="ignore"):
        want = expected(case)
    got = host(index_scores(*case.to(hopper_gpu).args))
    nan = np.isnan(want)
    assert (np.isnan(got) == nan).all()
    assert same_bits(got[~nan], want[~nan])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "tile"), [(8, "decode"), (64, "speculative"), (8, "prefill"), (128, "prefill")]
)
def test_page_size_does_not_matter(heads, tile, hopper_gpu):
    new, cached = TILES[tile]
    longest = max(map(sum, zip(new, cached, strict=True)))  # tables differ in what they could hold
    want = None
    for page_size in (1, 4, 16, 48, 64, 128, 256):
        case = Spec(new, cached, num_heads=heads, page_size=page_size).build()
        case = with_keys(case, seed=3)
        got = host(index_scores(*case.to(hopper_gpu).args))[:, :longest]
        want = got if want is None else want
        assert same_bits(got, want), page_size


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_one_token_at_a_time_has_the_bits_of_many(heads, hopper_gpu):
    case = Spec((70, 1), (700, 30), num_heads=heads).build()
    dense = host(index_scores(*case.to(hopper_gpu).args))
    for count in (1, 2, 3, 5):
        part = host(index_scores(*case.chunk(0, 40, 40 + count).to(hopper_gpu).args))
        assert same_bits(part[:, :741], dense[40 : 40 + count, :741])


@pytest.mark.gpu
@pytest.mark.parametrize("new", [1, 40])
@pytest.mark.parametrize(("heads", "page_size"), [(8, 1), (64, 16), (128, 64)])
def test_long_rows_repeat_where_their_pages_do(heads, page_size, new, hopper_gpu):
    """Every block goes round its ring of stages and through several batches of table entries."""
    period, rounds = 4096, 80
    case = Spec((new,), (period - new,), num_heads=heads, depth=64, page_size=page_size).build()
    length = rounds * period
    case = case.replace(
        k_lookup_table=np.tile(case.k_lookup_table, rounds),
        k_cache_lengths=np.array([length - new], np.uint32),
        k_max_lengths=np.array([[new, length - new]], np.uint32),
    )
    got = host(index_scores(*case.to(hopper_gpu).args)).reshape(new, rounds, period)
    short = case.replace(k_cache_lengths=np.array([period], np.uint32))
    want = host(index_scores(*short.to(hopper_gpu).args))[:, :period]
    assert np.isfinite(want).all()
    for r in range(rounds - 1):  # in the last the causal mask ends the rows
        assert same_bits(got[:, r], want), r


@pytest.mark.gpu
@pytest.mark.parametrize("new", [1, 40])
def test_scales_need_no_more_than_their_own_alignment(new, hopper_gpu):
    here = Spec((new,), (700,), num_heads=16).build().to(hopper_gpu)
    odd = here.replace(k_scales=one_element_on(hopper_gpu, here.k_scales))
    assert odd.k_scales.data.ptr % 16 != 0
    assert same_bits(host(index_scores(*odd.args)), host(index_scores(*here.args)))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "depth"), [(8, 64), (32, 128), (64, 128), (128, 128)])
@pytest.mark.parametrize("mask", ["causal", "null"])
@pytest.mark.parametrize("new", [(40, 1, 3), (1, 4, 3)])
def test_routes_agree_within_the_gate(new, mask, heads, depth, hopper_gpu, portable):
    case = Spec(new, (300, 1000, 5), num_heads=heads, depth=depth).build().to(hopper_gpu)
    fast = host(index_scores(*case.args, mask=mask))
    portable()
    plain = host(index_scores(*case.args, mask=mask))
    assert not same_bits(fast, plain), "the same route twice"
    seen = np.isfinite(plain)
    assert (np.isfinite(fast) == seen).all()
    assert score_gap(fast[seen], plain[seen]) < SCORE_GATE


@pytest.mark.gpu
def test_more_sequences_than_a_warp_and_than_blocks(hopper_gpu):
    rng = np.random.default_rng(0)
    new, cached = rng.integers(0, 4, 301), rng.integers(0, 200, 301)
    case = Spec(tuple(map(int, new)), tuple(map(int, cached)), num_heads=8, depth=64).build()
    assert same_bits(host(index_scores(*case.to(hopper_gpu).args)), expected(case))


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("heads", "tile", "page_size"),
    [
        (8, "decode", 1),
        (8, "decode", 64),
        (64, "speculative", 1),
        (64, "speculative", 16),
        (8, "prefill", 1),
        (8, "prefill", 16),
        (128, "prefill", 1),
        (128, "prefill", 64),
    ],
)
def test_small_grid_stays_inside_its_buffers(heads, tile, page_size, hopper_gpu):
    new, cached = TILES[tile]
    case = Spec(new, cached, num_heads=heads, page_size=page_size, spare_pages=1).build()
    here = case.to(hopper_gpu)
    out, intact = guarded(hopper_gpu, (case.tokens, oracle.max_keys(case)), np.float32)
    index_scores(*here.args, out=out)
    intact()
    seen = oracle.evaluate(case).selectable
    assert (np.isfinite(host(out)) == seen).all()
