"""The scheduler's closed forms against counts over every token and key.

``scheduler.cuh`` and ``row_layout.cuh`` are compiled for the CPU, with warps of one lane. Shuffles
and ballots are then trivial, and everything else is the code that the kernels run.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(__file__).parents[1] / "kernels" / "include"
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

# What CUDA has and C++ has not. A lane outside of the warp has the value of the only lane.
SHIM = r"""
#include <initializer_list>
#include <cstring>
#define __device__
#define __forceinline__ inline
static struct { unsigned x; } threadIdx;
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __shfl_sync(unsigned, T v, int) { return v; }
template <class T> T __shfl_up_sync(unsigned, T v, int) { return v; }
inline unsigned __ballot_sync(unsigned, bool p) { return p; }
template <class T> T __reduce_max_sync(unsigned, T v) { return v; }
template <class T> T __reduce_min_sync(unsigned, T v) { return v; }
inline void __syncthreads() {}
static struct { unsigned x = 1; } blockDim;
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float v) { return __builtin_log2f(v); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
#define MIN_MAX(T) \
    constexpr T min(T a, T b) { return b < a ? b : a; } \
    constexpr T max(T a, T b) { return a < b ? b : a; }
MIN_MAX(int) MIN_MAX(unsigned) MIN_MAX(long long)
constexpr unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
"""
SOURCE = r"""
#include "row_layout.cuh"
// Walks through the work of all blocks. Writes the block, the cursor's token, tokens, key, key_end
// and seen for each part of a tile, and returns how many there are.
template <int tile, int half>
static int walk(const ScoringLaunch& launch, int blocks, int* out, int64* units) {
    int n = 0;
    *units = 0;
    for (int block = 0; block < blocks; ++block) {
        const WorkRange range = find_work_range<tile, half>(launch, block, blocks);
        *units += range.units;
        WorkCursor<tile, 1 << 20, half> at(launch, range);
        while (at.key < at.key_end) {
            for (int value : {block, at.token, at.tokens(), at.key, at.key_end, at.seen}) {
                out[n++] = value;
            }
            at.advance();
        }
    }
    return n / 6;
}
extern "C" int walk_all(const ScoringLaunch* launch, int tile, int half, int blocks, int* out,
                        int64* units) {
#define CASE(T) if (tile == T) \
    return half == 64 ? walk<T, 64>(*launch, blocks, out, units) \
                      : walk<T, 128>(*launch, blocks, out, units);
    CASE(1) CASE(4) CASE(32)
    return -1;
}
extern "C" void locate(const ScoringLaunch* launch, int token, TokenRow* row) {
    *row = locate_token(*launch, token);
}
extern "C" int64 packed_elements(const ScoringLaunch* launch) {
    return for_each_sequence(*launch, [](const PackedSequence&) {});
}
"""


def _ints(names):
    return [(name, ctypes.c_int) for name in names.split()]


class Batch(ctypes.Structure):
    """`RaggedBatch` of scheduler.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_row_offsets", "lengths", "key_starts")),
        *_ints("batch_size total_tokens max_kv_len unscored_kv_len key_start key_step kpool"),
        *_ints("causal signed_offsets signed_lengths total_lengths"),
    )


class Launch(Batch):
    """`ScoringLaunch` of scheduler.cuh."""

    _fields_ = _ints("first_token end_token first_key num_keys")


@pytest.fixture(scope="module", params=[(1, 1), (3, 1), (1, 8), (4, 3)], ids=str)
def scheduler(request, tmp_path_factory):
    """The scheduler for one kpool and key_step."""
    kpool, key_step = request.param
    folder = tmp_path_factory.mktemp("scheduler")
    for name in ("common", "scheduler", "row_layout", "token_row", "warp_scan"):
        text = (KERNELS / f"{name}.cuh").read_text()
        (folder / f"{name}.cuh").write_text(text.replace("kWarpSize = 32;", "kWarpSize = 1;"))
    (folder / "shim.h").write_text(SHIM)
    (folder / "walk.cpp").write_text(SOURCE)
    options = ["-std=c++17", "-w", "-shared", "-fPIC", "-fno-builtin", "-include", "shim.h"]
    macro = f"-DkTokensPerKey={kpool * key_step}"
    command = [COMPILER, *options, macro, "walk.cpp", "-o", "walk.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    library = ctypes.CDLL(str(folder / "walk.so"))
    library.packed_elements.restype = ctypes.c_longlong
    return library, kpool, key_step


def _pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def _kv_lens(launch, offsets, lengths, starts):
    """How many cached keys each token sees, counted key by key; and each token's sequence."""
    found = np.zeros(launch.total_tokens, np.int64)
    sequences = np.full(launch.total_tokens, -1)
    for b in range(launch.batch_size):
        begin, end = int(offsets[b]), int(offsets[b + 1])
        cached = int(lengths[b]) - (end - begin if launch.total_lengths else 0)
        # Key j is visible once the last token of its place among all keys has been seen.
        places = int(starts[b]) + launch.key_step * np.arange(launch.max_kv_len, dtype=np.int64)
        needed = (places + 1) * launch.kpool
        for t in range(begin, end):
            seen = cached + (t - begin + 1 if launch.causal else end - begin)
            found[t] = np.count_nonzero(needed <= seen)
            sequences[t] = b
    return found, sequences


def _random_launch(rng, kpool, key_step):
    batch = int(rng.integers(1, 6))
    new = rng.integers(0, int(rng.choice([2, 40, 90])), batch) * rng.integers(0, 2, batch)
    offsets = np.append(0, np.cumsum(new)).astype(np.uint32)
    step = kpool * key_step
    max_keys = int(rng.integers(1, 300))
    lengths = rng.integers(0, int(rng.choice([2, max_keys * step + 100])), batch)
    total = bool(rng.integers(2))
    lengths = (lengths + (new if total else 0)).astype(np.uint32)
    if total and rng.integers(2):
        lengths[0] = rng.integers(0, new[0] + 1)  # counts fewer tokens than there are
    per_sequence = bool(rng.integers(2))
    most = int(rng.choice([1, 2 * key_step + 1, 200]))
    starts = rng.integers(0, most, batch if per_sequence else 1).astype(np.uint32)
    tokens = int(offsets[-1])
    first = int(rng.integers(0, tokens + 1)) if rng.integers(2) else 0
    first_key = 64 * int(rng.integers(0, max_keys // 64 + 1)) if rng.integers(2) else 0
    launch = Launch(
        _pointer(offsets),
        _pointer(lengths),
        _pointer(starts) if per_sequence else None,
        batch_size=batch,
        total_tokens=tokens,
        max_kv_len=max_keys,
        unscored_kv_len=int(rng.choice([0, 0, 1, 5, 64])),
        key_start=0 if per_sequence else int(starts[0]),
        key_step=key_step,
        kpool=kpool,
        causal=int(rng.integers(2)),
        total_lengths=total,
        first_token=first,
        end_token=int(rng.integers(first, tokens + 1)) if rng.integers(2) else tokens,
        first_key=first_key,
        num_keys=min(max_keys - first_key, int(rng.choice([64, 1 << 20]))),
    )
    return launch, offsets, lengths, starts if per_sequence else np.repeat(starts, batch)


def _units(keys, tokens, tile, half):
    unit = half if tokens <= tile // 2 else 64
    if unit > 64 and tokens == 1 and tile >= 8:
        unit *= 2
    return -(-keys // unit)


def test_blocks_share_the_work_and_score_each_visible_key_once(scheduler):
    """Each token gets the keys that it sees, once; tiles are counted as they are walked."""
    library, kpool, key_step = scheduler
    out = np.zeros((50_000, 6), np.int32)
    units = ctypes.c_longlong()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        launch, *arrays = _random_launch(rng, kpool, key_step)
        tile, half = int(rng.choice([1, 4, 32])), int(rng.choice([64, 128]))
        blocks = int(rng.integers(1, 40))
        to = _pointer(out), ctypes.byref(units)
        parts = library.walk_all(ctypes.byref(launch), tile, half, blocks, *to)
        scored = np.zeros((launch.total_tokens, launch.num_keys), int)
        of_block = np.zeros(blocks, int)
        for block, token, tokens, key, key_end, seen in out[:parts]:
            of_block[block] += _units(key_end - key, tokens, tile, half)
            shown = (np.arange(key, key_end) + 1) * kpool * key_step - 1
            for i in range(tokens):  # the test of sm90_consumer.cuh
                scored[token + i, key:key_end] += not launch.causal or shown - i <= seen
        kv_lens, _ = _kv_lens(launch, *arrays)
        tokens = np.arange(launch.total_tokens)
        wanted = (tokens >= launch.first_token) & (tokens < launch.end_token)
        wanted &= kv_lens > launch.unscored_kv_len
        ends = np.where(wanted, kv_lens, 0) - launch.first_key
        expected = np.arange(launch.num_keys) < ends[:, None]
        np.testing.assert_array_equal(scored, expected, f"seed {seed}")
        assert of_block.sum() == units.value, seed
        assert of_block.max() - of_block.min() <= 1, seed


def test_a_token_row_says_how_many_keys_the_token_sees(scheduler):
    """`locate_token`, and packed rows as long as the longest of a sequence."""
    library, kpool, key_step = scheduler
    for seed in range(30):
        launch, *arrays = _random_launch(np.random.default_rng(seed), kpool, key_step)
        kv_lens, sequences = _kv_lens(launch, *arrays)
        row = np.zeros(2, np.int64)
        for token in range(launch.total_tokens):
            library.locate(ctypes.byref(launch), token, _pointer(row))
            assert row.view(np.int32)[:2].tolist() == [sequences[token], kv_lens[token]], seed
        longest = np.array([kv_lens[sequences == s].max() for s in sequences], int)
        assert library.packed_elements(ctypes.byref(launch)) == (-(-longest // 4) * 4).sum(), seed
