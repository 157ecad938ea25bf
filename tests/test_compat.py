"""`mla_fp8.compat.deep_gemm` against DeepGEMM's formula, written in torch and float64."""

import doctest

import numpy as np
import pytest
from properties import SCORE_GATE, assert_helpful, score_gap

from mla_fp8.cli.fuzz_data import NAN_CODES

HEADS, DEPTH, PAGE = 8, 64, 64


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: compat NOT tested")


@pytest.fixture
def gemm(torch):
    from mla_fp8.compat import deep_gemm

    return deep_gemm


def _codes(torch, seed: int, *shape: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)


def _floats(torch, seed: int, *shape: int, low: float = -1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * (2 - low) + low


def reference(torch, q, keys, scales, weights):
    """DeepGEMM's formula: logits [tokens, keys] in float64."""
    dots = torch.einsum("mhd,nd->hmn", q.double(), keys.double() * scales.double()[:, None])
    return (dots.relu() * weights.double().T[:, :, None]).sum(0)


def assert_same(found, want, seen) -> None:
    """Equal at DeepGEMM's own measure where a key is seen, and -inf elsewhere."""
    found, want, seen = (np.asarray(x.cpu()) for x in (found, want, seen))
    assert found.dtype == np.float32
    assert found.shape == want.shape
    np.testing.assert_array_equal(found != -np.inf, seen)
    assert score_gap(found[seen], want[seen]) < SCORE_GATE
    error = np.abs(found[seen] - want[seen]).max(initial=0)
    assert error <= 2e-3 * np.abs(want[seen]).max(initial=0)


# ---- contiguous keys


def _contiguous(torch, tokens: int, keys: int, heads: int = HEADS, depth: int = DEPTH):
    generator = torch.Generator().manual_seed(tokens + keys)
    start = torch.randint(-2, keys, (tokens,), generator=generator, dtype=torch.int32)
    length = torch.randint(-1, keys + 3, (tokens,), generator=generator, dtype=torch.int32)
    kv = _codes(torch, 1, keys, depth), _floats(torch, 2, keys, low=0.1)
    return (
        _codes(torch, 0, tokens, heads, depth),
        kv,
        _floats(torch, 3, tokens, heads),
        start,
        (start + length),
    )


def _moved(arguments, device):
    return [
        tuple(x.to(device) for x in a) if isinstance(a, tuple) else a.to(device) for a in arguments
    ]


def _seen(torch, start, stop, keys: int):
    column = torch.arange(keys)
    return (column >= start[:, None]) & (column < stop[:, None])


@pytest.mark.parametrize(
    ("tokens", "keys"), [(5, 192), (3, 64), (7, 130), (200, 37), (1, 1), (4, 0), (0, 5)]
)
def test_contiguous_keys(tokens, keys, device, torch, gemm):
    q, kv, weights, start, stop = arguments = list(_contiguous(torch, tokens, max(keys, 1)))
    arguments[1] = kv = tuple(x[:keys] for x in kv)
    here = _moved(arguments, device)
    found = gemm.fp8_mqa_logits(*here)
    assert str(found.device).startswith(device)
    want, seen = reference(torch, q, *kv, weights), _seen(torch, start, stop, keys)
    assert_same(found, want, seen)
    here[1] = here[1][0].view(torch.uint8), here[1][1][:, None]
    here[0] = here[0].view(torch.uint8)
    assert torch.equal(gemm.fp8_mqa_logits(*here), found)
    dirty = gemm.fp8_mqa_logits(*here, clean_logits=False).cpu()
    assert torch.equal(dirty[seen], found.cpu()[seen])


@pytest.mark.parametrize(("heads", "depth"), [(1, 32), (4, 128), (32, 128), (64, 128), (128, 256)])
def test_contiguous_keys_of_other_shapes(heads, depth, device, torch, gemm):
    arguments = _contiguous(torch, 6, 150, heads, depth)
    q, kv, weights, start, stop = arguments
    want = reference(torch, q, *kv, weights)
    assert_same(
        gemm.fp8_mqa_logits(*_moved(arguments, device)), want, _seen(torch, start, stop, 150)
    )


@pytest.mark.parametrize("block_logits", [1 << 25, 400])
@pytest.mark.parametrize("keys", [128, 131])
def test_compressed_logits(keys, block_logits, device, torch, gemm, monkeypatch):
    """Column j is key start + j. Blocks of a few rows give what one block gives."""
    monkeypatch.setattr(gemm, "_BLOCK_LOGITS", block_logits)
    q, kv, weights, start, stop = _contiguous(torch, 9, keys)
    start = start.clamp(min=0)
    stop = stop.clamp(max=keys)
    most = max(int((stop - start).max()), 1)
    here = _moved((q, kv, weights, start, stop), device)
    found = gemm.fp8_mqa_logits(*here, clean_logits=False, max_seqlen_k=most).cpu()
    assert found.shape == (9, most)
    full = torch.full((9, keys), -torch.inf)
    for t, (first, last) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        if first < last:
            full[t, first:last] = found[t, : last - first]
    assert_same(full, reference(torch, q, *kv, weights), _seen(torch, start, stop, keys))
    assert_same(gemm.fp8_mqa_logits(*here).cpu(), full.double(), _seen(torch, start, stop, keys))


# ---- fused pages


def fuse(torch, values, scales):
    """Fused pages uint8 [num_blocks, page, 1, depth + 4] of codes [.., page, depth] and scales."""
    blocks, page, depth = values.shape
    bytes_ = [values.reshape(blocks, -1).view(torch.uint8), scales.view(torch.uint8)]
    return torch.cat(bytes_, dim=1).view(blocks, page, 1, depth + 4)


def _between(torch, cache, before: int, after: int):
    """The pages of a larger buffer, in which other bytes stand before and after each page."""
    blocks = cache.shape[0]
    wide = torch.nn.functional.pad(cache.reshape(blocks, -1), (before, after), value=255)
    return wide[:, before : wide.shape[1] - after].view(cache.shape)


class Paged:
    """A batch of sequences in fused pages; pages that nobody holds, and page tails, are NaN."""

    def __init__(self, torch, lens, next_n, page=PAGE, spare_pages=2):
        generator = torch.Generator().manual_seed(page)
        batch, longest = len(lens), max(lens)
        used = [-(-n // page) for n in lens]
        blocks = sum(used) + 3
        order = iter(torch.randperm(blocks, generator=generator).tolist())
        self.q = _codes(torch, 0, batch, next_n, HEADS, DEPTH)
        self.weights = _floats(torch, 3, batch * next_n, HEADS)
        values = torch.full((blocks, page, DEPTH), int(NAN_CODES[0]), dtype=torch.uint8)
        scales = torch.full((blocks, page), torch.nan)
        self.table = torch.full((batch, -(-longest // page) + spare_pages), -1, dtype=torch.int32)
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.keys, self.scales = [], []
        for b, count in enumerate(lens):
            keys, factors = _codes(torch, b, count, DEPTH), _floats(torch, b, count, low=0.1)
            self.keys.append(keys)
            self.scales.append(factors)
            for p in range(used[b]):
                self.table[b, p] = block = next(order)
                rows = slice(p * page, min((p + 1) * page, count))
                values[block, : rows.stop - rows.start] = keys[rows].view(torch.uint8)
                scales[block, : rows.stop - rows.start] = factors[rows]
        self.cache = fuse(torch, values, scales)

    def want(self, torch, columns: int, seen_keys):
        """Logits and what is seen, if token j of sequence b sees ``seen_keys[b, j]`` keys."""
        batch, next_n = self.q.shape[:2]
        logits = torch.zeros(batch * next_n, columns, dtype=torch.float64)
        for b, (keys, scales) in enumerate(zip(self.keys, self.scales, strict=True)):
            rows = slice(b * next_n, (b + 1) * next_n)
            found = reference(torch, self.q[b], keys, scales, self.weights[rows])[:, :columns]
            logits[rows, : found.shape[1]] = found
        seen = torch.arange(columns) < seen_keys.reshape(-1, 1)
        return logits, seen

    def arguments(self, device, lens=None):
        lens = self.lens if lens is None else lens
        given = self.q, self.cache, self.weights, lens, self.table
        return [x.to(device) for x in given]


def _causal(torch, lens, next_n: int):
    return lens[:, None] - next_n + 1 + torch.arange(next_n)


@pytest.mark.parametrize("page", [64, 32, 5])
@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_pages(next_n, page, device, torch, gemm):
    paged = Paged(torch, [70, 4, 200, 64], next_n, page)
    here = paged.arguments(device)
    meta = gemm.get_paged_mqa_logits_metadata(here[3], page, 132)
    assert (tuple(meta.shape), meta.dtype, meta.device) == ((133, 2), torch.int32, here[0].device)
    found = gemm.fp8_paged_mqa_logits(*here, meta, 256, clean_logits=True)
    seen_keys = _causal(torch, paged.lens, next_n)
    assert_same(found, *paged.want(torch, 256, seen_keys))
    # the newer form of lengths, one for each token
    here = paged.arguments(device, seen_keys.int().contiguous())
    again = gemm.fp8_paged_mqa_logits(*here, None, 256, clean_logits=True)
    assert_same(again, *paged.want(torch, 256, seen_keys))


def test_lengths_of_each_token(device, torch, gemm):
    """They need not grow; some are 0, as in rows that fill up a batch."""
    paged = Paged(torch, [70, 9, 200], 3)
    lens = torch.tensor([[3, 70, 10], [0, 0, 0], [200, 1, 199]], dtype=torch.int32)
    here = paged.arguments(device, lens)
    found = gemm.fp8_paged_mqa_logits(*here, None, 220, clean_logits=True)
    assert_same(found, *paged.want(torch, 220, lens))
    dirty = gemm.fp8_paged_mqa_logits(*here, None, 220).cpu()
    _, seen = paged.want(torch, 220, lens)
    assert torch.equal(dirty[seen], found.cpu()[seen])


@pytest.mark.parametrize("columns", [2, 63, 100, 201, 1000])
def test_widths_below_and_above_the_table(columns, device, torch, gemm):
    paged = Paged(torch, [70, 2, 200], 2, spare_pages=0)
    found = gemm.fp8_paged_mqa_logits(*paged.arguments(device), None, columns)
    assert_same(found, *paged.want(torch, columns, _causal(torch, paged.lens, 2)))


def test_lengths_of_zero_see_nothing(device, torch, gemm):
    paged = Paged(torch, [70, 2], 2)
    lens = torch.tensor([0, 1], dtype=torch.int32)
    here = paged.arguments(device, lens)
    found = gemm.fp8_paged_mqa_logits(*here, None, 80)
    assert_same(found, *paged.want(torch, 80, _causal(torch, lens, 2)))
    q, cache, *rest = here
    none = gemm.fp8_paged_mqa_logits(q[:0], cache, *(x[:0] for x in rest), None, 9)
    assert tuple(none.shape) == (0, 9), "an empty batch"


def test_pages_between_other_bytes(device, torch, gemm):
    """Blocks may be farther apart than they are long, and begin off a multiple of 16 bytes."""
    paged = Paged(torch, [70, 9, 200], 1)
    here = paged.arguments(device)
    want = gemm.fp8_paged_mqa_logits(*here, None, 200)
    for before, after in ((16, 32), (4, 8)):
        view = _between(torch, here[1], before, after)
        assert not view.is_contiguous()
        found = gemm.fp8_paged_mqa_logits(here[0], view, *here[2:], None, 200)
        assert_same(found, want.double().cpu(), want.cpu() != -torch.inf)


# ---- errors


CONTIGUOUS = {
    "q": (lambda t, a: [a[0].float(), *a[1:]], "q", "float32"),
    "heads": (lambda t, a: [a[0][:, :0], *a[1:]], "q", "0 of depth 64"),
    "depth": (lambda t, a: [a[0][..., :48], *a[1:]], "q", "depth 48"),
    "array": (lambda t, a: [a[0].view(t.uint8).numpy(), *a[1:]], "q", "ndarray"),
    "kv": (lambda t, a: [a[0], a[1][0], *a[2:]], "kv", "Tensor"),
    "keys": (lambda t, a: [a[0], (a[1][0][:, :32], a[1][1]), *a[2:]], "kv", "(130, 32)"),
    "scales": (lambda t, a: [a[0], (a[1][0], a[1][1][:-1]), *a[2:]], "kv", "(129,)"),
    "weights": (lambda t, a: [*a[:2], a[2][:, :-1], *a[3:]], "weights", "(7, 7)"),
    "start": (lambda t, a: [*a[:3], a[3].long(), a[4]], "cu_seq_len_k_start", "int64"),
    "end": (lambda t, a: [*a[:4], a[4][:-1]], "cu_seq_len_k_end", "(6,)"),
    "device": (lambda t, a: [*a[:2], a[2].to("meta"), *a[3:]], "weights", "meta"),
    "clean": (lambda t, a: [*a, True, 5], "clean_logits", "True"),
    "max": (lambda t, a: [*a, False, -1], "max_seqlen_k", "-1"),
    "max type": (lambda t, a: [*a, False, t.tensor(5)], "max_seqlen_k", "Tensor"),
}
PAGED = {
    "q": (lambda t, a: [a[0][0], *a[1:]], "q", "(2, 8, 64)"),
    "cache": (lambda t, a: [a[0], a[1][..., :-4], *a[2:]], "kv_cache", "(9, 64, 1, 64)"),
    "cache dtype": (lambda t, a: [a[0], a[1].view(t.int8), *a[2:]], "kv_cache", "int8"),
    "cache pages": (lambda t, a: [a[0], a[1].repeat(1, 2, 1, 1)[:, ::2], *a[2:]], "kv_cache", "68"),
    "cache start": (lambda t, a: [a[0], _between(t, a[1], 2, 2), *a[2:]], "kv_cache", "strides"),
    "empty pages": (lambda t, a: [a[0], a[1][:, :0], *a[2:]], "block_kv", "0"),
    "weights": (lambda t, a: [*a[:2], a[2].double(), *a[3:]], "weights", "float64"),
    "lens": (lambda t, a: [*a[:3], a[3][:1], *a[4:]], "context_lens", "(1,)"),
    "lens 2": (lambda t, a: [*a[:3], a[3][:, None], *a[4:]], "context_lens", "(2, 1)"),
    "table": (lambda t, a: [*a[:4], a[4].long(), *a[5:]], "block_table", "int64"),
    "most": (lambda t, a: [*a[:6], 1], "max_context_len", "1"),
    "most type": (lambda t, a: [*a[:6], 9.0], "max_context_len", "float"),
}


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_wrong_arguments_of_contiguous_keys_are_named(name, torch, gemm):
    change, *words = CONTIGUOUS[name]
    arguments = change(torch, _contiguous(torch, 7, 130))
    with pytest.raises((ValueError, TypeError)) as caught:
        gemm.fp8_mqa_logits(*arguments)
    assert_helpful(caught.value, *words)


@pytest.mark.parametrize("name", PAGED)
def test_wrong_arguments_of_pages_are_named(name, torch, gemm):
    change, *words = PAGED[name]
    paged = Paged(torch, [70, 200], 2)
    arguments = change(torch, [*paged.arguments("cpu"), None, 256])
    with pytest.raises((ValueError, TypeError)) as caught:
        gemm.fp8_paged_mqa_logits(*arguments)
    assert_helpful(caught.value, *words)


# ---- graphs and the compiler


def _calls(torch, gemm, device):
    """Both functions as calls on (queries, the other arguments)."""
    q, *rest = _moved(_contiguous(torch, 20, 130), device)
    paged = Paged(torch, [70, 9, 200], 2)
    paged_q, *pages = paged.arguments(device)
    lens = _causal(torch, paged.lens, 2).int().contiguous().to(device)
    per_token = [*pages[:2], lens, pages[3]]
    return {
        "contiguous": (lambda q: gemm.fp8_mqa_logits(q, *rest), q),
        "compressed": (lambda q: gemm.fp8_mqa_logits(q, *rest, False, 64), q),
        "pages": (lambda q: gemm.fp8_paged_mqa_logits(q, *pages, None, 200), paged_q),
        "lengths of tokens": (
            lambda q: gemm.fp8_paged_mqa_logits(q, *per_token, None, 200, True),
            paged_q,
        ),
    }


CALLS = ("contiguous", "compressed", "pages", "lengths of tokens")


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
@pytest.mark.parametrize("name", CALLS)
def test_the_compiler_traces_whole_calls(name, device, torch, gemm):
    call, q = _calls(torch, gemm, device)[name]
    torch.compiler.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert torch.equal(compiled(q), call(q))
    other = q.view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
    assert torch.equal(compiled(other), call(other))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_graphs_capture_calls(name, cupy, torch, gemm):
    call, q = _calls(torch, gemm, "cuda")[name]
    other = q.view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
    want = call(other)
    assert not torch.equal(call(q), want)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(q)
    for _ in range(2):
        found.zero_()
        q.copy_(other)
        graph.replay()
        assert torch.equal(found, want)


@pytest.mark.filterwarnings("default")
def test_examples_in_docstrings(torch, gemm):
    results = doctest.testmod(gemm)
    assert results.failed == 0
    assert results.attempted > 10


@pytest.mark.gpu
@pytest.mark.parametrize("next_n", [1, 2])
def test_pages_give_the_same_bits_as_split_pools(next_n, cupy, torch, gemm):
    """On one GPU the layout changes no bit."""
    from mla_fp8 import torch_ops

    paged = Paged(torch, [70, 4, 200, 64], next_n)
    q, cache, weights, lens, table = paged.arguments("cuda")
    found = gemm.fp8_paged_mqa_logits(q, cache, weights, lens, table, None, 256)
    flat, blocks = cache.view(cache.shape[0], -1), cache.shape[0]
    values = flat[:, : PAGE * DEPTH].contiguous().view(blocks, 1, 1, PAGE, 1, DEPTH)
    scales = flat[:, PAGE * DEPTH :].contiguous().view(torch.float32)
    offsets = torch.arange(5, dtype=torch.int32, device="cuda") * next_n
    want = torch_ops.index_scores(
        q.view(-1, HEADS, DEPTH),
        weights,
        offsets,
        values,
        None,
        table,
        (next_n, 256),
        scales.view(blocks, 1, 1, PAGE, 1, 1),
        0,
        k_total_lengths=lens,
    )
    assert torch.equal(found, want[:, :256])
