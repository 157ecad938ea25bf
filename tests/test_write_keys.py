"""write_keys: every byte of the pool is what the definition says, and no other byte changes."""

import numpy as np
import pytest
from properties import host, same_bits, sanitized
from quantised import (
    BFLOAT16,
    CANARY,
    KEY_DTYPES,
    LAYOUTS,
    Bfloat16,
    hard_rows,
    make_pool,
    on,
    quantised,
)

from mla_fp8 import fp8, write_keys

GROUPS = {32: [1], 64: [1, 2], 128: [1, 2, 4], 256: [1, 2, 4, 8]}


def _check(xp, keys, form, layer=0, power_of_two=False, places=None, **given) -> None:
    """Write on ``xp``, and compare the whole buffer with tokens written one by one.

    ``places`` are the (block, offset) of each token, or None; the other arguments are the call's.
    """
    pool, wanted = make_pool(xp, *form), make_pool(np, *form)
    heads, depth, groups = form[4:]
    codes, scales = quantised(keys.reshape(-1, heads, depth), groups, power_of_two)
    for token, place in enumerate(places):
        if place is not None:
            block, offset = place
            wanted.k_blocks[block, 0, layer, offset] = codes[token]
            wanted.k_scales[block, 0, layer, offset] = scales[token]
    given = {name: xp.asarray(array) for name, array in given.items()}
    result = write_keys(
        on(xp, keys), pool.k_blocks, pool.k_scales, layer, power_of_two=power_of_two, **given
    )
    assert result is None
    got, want = host(pool.buffer), wanted.buffer
    wrong = np.flatnonzero(got != want)
    assert not wrong.size, (
        f"{wrong.size} bytes; at {wrong[0]}: {got[wrong[0]]}, not {want[wrong[0]]}"
    )


def _places_of_slots(slots, blocks, page_size):
    """(block, offset) of each slot; None for slots that do not exist."""
    return [divmod(int(s), page_size) if 0 <= s < blocks * page_size else None for s in slots]


@pytest.mark.parametrize("depth", sanitized(GROUPS, [128]))
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_every_dtype_depth_and_granularity(dtype, depth, xp):
    keys = hard_rows(70, depth, dtype)
    slots = np.random.default_rng(1).permutation(80)[:70].astype(np.int32)
    for groups in GROUPS[depth] if dtype == BFLOAT16 else [1]:
        for power_of_two in (False, True):
            form = ("contiguous", 5, 1, 16, 1, depth, groups)
            places = _places_of_slots(slots, 5, 16)
            _check(xp, keys, form, power_of_two=power_of_two, places=places, slots=slots)


@pytest.mark.parametrize(("heads", "page_size"), sanitized([(1, 1), (2, 3), (1, 64)], [(2, 3)]))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, heads, page_size, xp):
    blocks = 192 // page_size
    for dtype, depth, groups in ((BFLOAT16, 128, 1), (np.float32, 64, 2)):
        keys = hard_rows(77 * heads, depth, dtype).reshape(77, heads, depth)
        slots = np.random.default_rng(2).permutation(192)[:77].astype(np.int64)
        form = (layout, blocks, 3, page_size, heads, depth, groups)
        places = _places_of_slots(slots, blocks, page_size)
        _check(xp, keys, form, layer=1, places=places, slots=slots)


@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_keys_that_begin_at_any_address(dtype, xp):
    """Kernels read 16 bytes at once only where rows are aligned to them."""
    depth = 64
    numbers = hard_rows(33, depth, dtype).reshape(-1)
    bits = numbers.view(np.uint16 if numbers.itemsize == 2 else np.uint32)
    moved = xp.zeros(bits.size + 1, bits.dtype)
    moved[1:] = xp.asarray(bits)
    keys = moved[1:].reshape(33, depth)
    if dtype != BFLOAT16:
        keys = keys.view(dtype)
    elif xp is np:
        keys = keys.view(BFLOAT16)
    else:
        keys = Bfloat16(keys.view(np.int16))
    pool = make_pool(xp, "contiguous", 1, 1, 33, 1, depth, 2)
    write_keys(keys, pool.k_blocks, pool.k_scales, slots=xp.arange(33))
    codes, scales = quantised(numbers.reshape(33, depth), 2)
    assert same_bits(pool.k_blocks[0, 0, 0, :, 0], codes)
    assert same_bits(pool.k_scales[0, 0, 0, :, 0], scales)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_slots_that_do_not_exist_write_nothing(dtype, xp):
    least = np.iinfo(dtype).min
    slots = [3, -1, 11, 12, 13, least, -least - 1, 2**31 - 1, 0, -12, 7]
    keys = hard_rows(len(slots), 32, np.float32)
    form = ("fused", 4, 2, 3, 1, 32, 1)
    places = _places_of_slots(slots, 4, 3)
    assert sum(place is None for place in places) == 7
    _check(xp, keys, form, layer=1, places=places, slots=np.array(slots, dtype))


def test_int64_slots_are_not_cut_to_32_bits(xp):
    keys = hard_rows(3, 32, np.float32)
    slots = np.array([2**32 + 1, -(2**32) + 1, 2**63 - 1])
    _check(xp, keys, ("contiguous", 4, 1, 3, 1, 32, 1), places=[None] * 3, slots=slots)


@pytest.mark.parametrize("table_dtype", [np.uint32, np.int32])
@pytest.mark.parametrize("dtype", sanitized([np.int32, np.uint32, np.int64], [np.int64]))
def test_by_sequence_and_position(dtype, table_dtype, xp):
    table = np.array([[4, 0, 7], [2, 0xFFFFFFFF, 5], [1, 6, 8]], np.uint32).view(table_dtype)
    pairs = [(0, 0), (0, 5), (0, 6), (1, 4), (1, 7), (1, 8), (2, 5), (2, 6), (2, 9), (2, 8)]
    pairs += [(3, 0), (0, 9), (2, 2)]
    if dtype != np.uint32:
        pairs += [(-1, 1), (1, -1)]
    places = []
    for sequence, position in pairs:
        inside = 0 <= sequence < 3 and 0 <= position < 9
        block = int(table.view(np.uint32)[sequence, position // 3]) if inside else 99
        places.append((block, position % 3) if block < 8 else None)
    assert sum(place is not None for place in places) == 7
    sequences, positions = np.array(pairs, dtype).T
    given = {"sequences": np.ascontiguousarray(sequences), "k_lookup_table": table}
    given["positions"] = np.ascontiguousarray(positions)
    for heads, depth in ((1, 64), (2, 32)):
        keys = hard_rows(len(pairs) * heads, depth, np.float16).reshape(-1, heads, depth)
        form = ("layer-major", 8, 2, 3, heads, depth, 1)
        _check(xp, keys, form, layer=1, places=places, **given)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_huge_sequences_and_positions(dtype, xp):
    most = np.iinfo(dtype).max
    numbers = np.array([0, most, most, 2**31, 0], dtype)
    given = {
        "sequences": numbers,
        "positions": np.ascontiguousarray(numbers[::-1]),
        "k_lookup_table": np.zeros((1, 1), np.int32),
    }
    keys = hard_rows(5, 32, np.float32)
    places = [
        (0, 0) if s == 0 and p == 0 else None for s, p in zip(numbers, numbers[::-1], strict=True)
    ]
    assert places == [(0, 0), None, None, None, (0, 0)]
    keys[4] = keys[0]
    _check(xp, keys, ("contiguous", 1, 1, 1, 1, 32, 1), places=places, **given)


def test_the_last_of_two_tokens_stays_in_numpy():
    keys = hard_rows(40, 32, np.float32)
    slots = np.resize([3, 1], 40)
    places = _places_of_slots(slots, 1, 4)
    _check(np, keys, ("contiguous", 1, 1, 4, 1, 32, 1), places=places, slots=slots)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
def test_every_16_bit_number_against_every_magnitude(dtype, power_of_two, xp):
    """Each row holds numbers of all codes beside one that decides the scale."""
    depth, rng = 128, np.random.default_rng(3)
    bits = rng.permutation(1 << 16).astype(np.uint16).reshape(-1, depth)
    keys = bits.view(dtype)
    slots = np.arange(len(keys))
    form = ("contiguous", len(keys) // 64, 1, 64, 1, depth, 4)
    places = _places_of_slots(slots, len(keys) // 64, 64)
    _check(xp, keys, form, power_of_two=power_of_two, places=places, slots=slots)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_random_floats_of_close_magnitudes(power_of_two, xp):
    """Quotients near ties: the division must round to nearest before the code is rounded."""
    depth, rng = 256, np.random.default_rng(4)
    rows = 4096
    scale = rng.random((rows, 1)) * 2.0 ** rng.integers(-126, 119, (rows, 1))
    halves = (rng.integers(0, 16, (rows, depth)) + 16.5) * 2.0 ** rng.integers(
        -10, 4, (rows, depth)
    )
    x = (halves * scale).astype(np.float32)
    x[:, 0] = (448 * scale[:, 0]).astype(np.float32)
    x = x.view(np.uint32) + rng.integers(-2, 3, x.shape).astype(np.uint32)
    keys = x.view(np.float32)
    slots = np.arange(rows)
    form = ("contiguous", rows // 64, 1, 64, 1, depth, 1)
    places = _places_of_slots(slots, rows // 64, 64)
    _check(xp, keys, form, power_of_two=power_of_two, places=places, slots=slots)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_equals_quantize(groups, power_of_two, xp):
    keys = hard_rows(96, 128, np.float32)
    pool = make_pool(xp, "contiguous", 1, 1, 96, 1, 128, groups)
    write_keys(
        xp.asarray(keys),
        pool.k_blocks,
        pool.k_scales,
        slots=xp.arange(96),
        power_of_two=power_of_two,
    )
    with np.errstate(all="ignore"):
        values, scales = fp8.quantize(xp.asarray(keys), 128 // groups, power_of_two=power_of_two)
    assert same_bits(pool.k_blocks[0, 0, 0, :, 0], host(values).view(np.uint8))
    assert same_bits(pool.k_scales[0, 0, 0, :, 0], scales)


@pytest.mark.parametrize("tokens", [0, 1, 31, 257])
def test_token_counts(tokens, xp):
    keys = hard_rows(max(tokens, 12), 32, np.float16)[:tokens]
    slots = np.arange(tokens)[::-1].copy()
    form = ("contiguous", 86, 1, 3, 1, 32, 1)
    _check(xp, keys, form, places=_places_of_slots(slots, 86, 3), slots=slots)


def test_float8_pools_are_written_in_place():
    keys = hard_rows(4, 32, np.float32)
    pool = make_pool(np, "contiguous", 1, 1, 4, 1, 32, 1)
    values = pool.k_blocks.view(fp8.FP8)
    write_keys(keys, values, pool.k_scales, slots=np.arange(4))
    assert same_bits(values[0, 0, 0, :, 0].view(np.uint8), quantised(keys, 1)[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_tensors(dtype, device, request):
    torch = pytest.importorskip("torch")
    if device == "cuda":
        request.getfixturevalue("cupy")
    keys = torch.from_numpy(hard_rows(40, 64, np.float32)).to(getattr(torch, dtype))
    page = torch.full((3, 16 * (64 + 4)), CANARY, dtype=torch.uint8, device=device)
    k_blocks = page[:, : 16 * 64].view(torch.float8_e4m3fn).view(3, 1, 1, 16, 1, 64)
    k_scales = page[:, 16 * 64 :].view(torch.float32).view(3, 1, 1, 16, 1, 1)
    slots = torch.arange(44, 4, -1, device=device)
    write_keys(keys.to(device), k_blocks, k_scales, slots=slots)
    codes, scales = quantised(keys.float().numpy(), 1)
    want = np.full((3, 16 * 68), CANARY, np.uint8)
    values = want[:, : 16 * 64].reshape(3, 16, 64)  # a copy
    factors = want[:, 16 * 64 :].copy().view(np.float32)
    places = slots.cpu().numpy()
    values[places // 16, places % 16], factors[places // 16, places % 16] = codes, scales[:, 0]
    want = np.concatenate([values.reshape(3, -1), factors.view(np.uint8)], axis=1)
    assert same_bits(page, want)
