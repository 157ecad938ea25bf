"""PagedKeyCache against a dict of lists: any order of calls, on small pages and small pools.

A token is a number, the row of `BANK` that is its key in all layers. Numbers are given once, so two
sequences that hold the same number have it from a common ancestor.
"""

import copy
import pickle

import numpy as np
import pytest
from properties import host, same_bits

from mla_fp8 import CacheFull, MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8
from mla_fp8.cli.fuzz_data import encode

hypothesis = pytest.importorskip(
    "hypothesis", reason="hypothesis is not installed: the life of a cache was NOT tested"
)
stateful = pytest.importorskip("hypothesis.stateful")
st, rule, invariant = hypothesis.strategies, stateful.rule, stateful.invariant

DEPTH, HEADS, K = 32, 2, 3
UNUSED = 0xFFFFFFFF
CANARY = 0xA5
BETWEEN = 8  # bytes between the pages of a caller's buffer


def _bank() -> np.ndarray:
    """Keys [tokens, layers, kv_heads, depth] that float16 holds exactly, zeros and NaN among them.

    One mantissa has 8 bits, so that bfloat16 holds them too.
    """
    rng = np.random.default_rng(0)
    keys = rng.integers(-64, 64, (4096, 3, HEADS, DEPTH)) / 16
    keys *= 2.0 ** rng.integers(-4, 4, (4096, 3, HEADS, 1))
    keys[rng.random(4096) < 0.02] = 0
    keys[rng.random(keys.shape) < 0.001] = np.nan
    return keys.astype(np.float32)


BANK = _bank()
CODES, SCALES = fp8.quantize(BANK)
DENSE = fp8.dequantize(CODES, SCALES)
COUNTS = st.lists(st.integers(0, 4), min_size=8, max_size=8)
NUMBERS = st.integers(0, 2**16)
RNG = np.random.default_rng(1)
QUERIES = encode(RNG.standard_normal((64, HEADS, DEPTH)))
GATES = RNG.standard_normal((64, HEADS)).astype(np.float32)


class CacheMachine(stateful.RuleBasedStateMachine):
    xp = np

    @stateful.initialize(
        page_size=st.integers(1, 3),
        batch=st.integers(0, 3),
        layers=st.integers(1, 3),
        kv_heads=st.integers(1, HEADS),
        blocks=st.none() | st.integers(0, 12),
        layout=st.sampled_from(["split", "fused", "a caller's buffer"]),
    )
    def start(self, page_size, batch, layers, kv_heads, blocks, layout):
        self.layers, self.kv_heads = (layers, kv_heads) if layout == "split" else (1, 1)
        self.page_size, self.fixed = page_size, blocks is not None or layout[0] == "a"
        self.memory = None
        if layout[0] == "a":
            pages = page_size * (DEPTH + 4)
            self.memory = self.xp.full((blocks or 9, pages + BETWEEN), CANARY, np.uint8)
            buffer = self.memory[:, :pages].reshape(-1, page_size, 1, DEPTH + 4)
            self.cache = PagedKeyCache.from_fused(buffer, page_size=page_size, batch=batch)
        else:
            extents = {"num_layers": self.layers, "kv_heads": self.kv_heads, "page_size": page_size}
            options = extents | {"num_blocks": blocks, "layout": layout}
            self.cache = PagedKeyCache(batch, DEPTH, xp=self.xp, **options)
        self.rows = batch  # of the lookup table
        self.tokens = {b: [] for b in range(batch)}  # of each sequence in use
        self.new = dict.fromkeys(self.tokens, 0)
        self.given = 0

    # ---- what the model knows

    def keys(self, numbers, dtype=np.float32):
        """[layers, tokens, kv_heads, depth] in the module of the cache."""
        keys = BANK[numbers, : self.layers, : self.kv_heads].swapaxes(0, 1)
        return self.xp.ascontiguousarray(self.xp.asarray(keys.astype(dtype)))

    def some(self, order: int) -> list[int]:
        """Some of the sequences in use, in any order."""
        rng = np.random.default_rng(order)
        live = rng.permutation(sorted(self.tokens))
        return live[: rng.integers(0, live.size + 1)].tolist()

    def one(self, number: int) -> int:
        live = sorted(self.tokens)
        return live[number % len(live)]

    def pages(self, b: int) -> list[int]:
        held = -(-len(self.tokens[b]) // self.page_size)
        return host(self.cache.k_lookup_table)[b, :held].tolist()

    def blocks_needed(self, counts: dict[int, int]) -> int:
        """Free pages that new tokens need. The last to write to a shared page keeps it."""
        holders: dict[int, int] = {}
        for b in self.tokens:
            for page in self.pages(b):
                holders[page] = holders.get(page, 0) + 1
        needed = 0
        for b, count in counts.items():
            length = len(self.tokens[b])
            needed += -(-(length + count) // self.page_size) - -(-length // self.page_size)
            if count and length % self.page_size:
                last = self.pages(b)[-1]
                holders[last] -= 1
                needed += holders[last] > 0
        return needed

    def snapshot(self):
        """All that may be seen of the cache."""
        cache = self.cache
        tables = host(cache.k_lookup_table).tolist(), host(cache.input_row_offsets).tolist()
        kept = [host(cache.gather(b, i)).tobytes() for b in self.tokens for i in range(self.layers)]
        return tables, kept, cache.lengths.tolist(), repr(cache), cache._pages.references.tolist()

    def add_tokens(self, counts: dict[int, int], act) -> None:
        """Call ``act`` with new tokens; it must raise `CacheFull` if, and only if, it has to."""
        cache, needed = self.cache, self.blocks_needed(counts)
        numbers = {}
        for b, count in counts.items():
            numbers[b] = list(range(self.given, self.given + count))
            self.given += count
        if self.fixed and needed > cache.free_blocks:
            before = self.snapshot()
            with pytest.raises(CacheFull, match=f"need {needed} more blocks"):
                act(numbers)
            assert self.snapshot() == before
            return
        used = cache.num_blocks - cache.free_blocks + needed
        act(numbers)
        assert cache.num_blocks - cache.free_blocks == used
        self.new = {b: len(numbers.get(b, ())) for b in self.tokens}
        for b in numbers:
            self.tokens[b] += numbers[b]

    # ---- rules

    @rule(counts=COUNTS, dtype=st.sampled_from([np.float16, np.float32, np.float64]))
    def append_to_all(self, counts, dtype):
        def act(numbers):
            self.cache.append([self.keys(numbers.get(b, []), dtype) for b in range(self.rows)])

        self.add_tokens({b: counts[b % 8] for b in self.tokens}, act)

    @rule(counts=COUNTS, order=NUMBERS)
    def append_to_some(self, counts, order):
        def act(numbers):
            self.cache.append([self.keys(n) for n in numbers.values()], list(numbers))

        self.add_tokens(dict(zip(self.some(order), counts, strict=False)), act)

    @rule(counts=COUNTS, order=NUMBERS, as_list=st.booleans())
    def allocate_and_write(self, counts, order, as_list):
        def act(numbers):
            chosen = list(numbers)
            self.cache.allocate([len(n) for n in numbers.values()], chosen)
            for layer in reversed(range(self.layers)):
                keys = [self.keys(n)[layer] for n in numbers.values()]
                if not as_list:
                    keys = self.keys([i for n in numbers.values() for i in n])[layer]
                self.cache.write(layer, keys, chosen)

        self.add_tokens(dict(zip(self.some(order), counts, strict=False)), act)

    @stateful.precondition(lambda self: self.tokens)
    @rule(number=NUMBERS, share=st.floats(0, 1))
    def truncate(self, number, share):
        b = self.one(number)
        length = round(share * len(self.tokens[b]))
        self.cache.truncate(b, length)
        self.new[b] = max(self.new[b] - len(self.tokens[b][length:]), 0)
        del self.tokens[b][length:]

    @stateful.precondition(lambda self: self.tokens)
    @rule(number=NUMBERS)
    def free(self, number):
        b = self.one(number)
        self.cache.free(b)
        del self.tokens[b], self.new[b]

    @stateful.precondition(lambda self: self.rows < 8)
    @rule()
    def add(self):
        self.started(self.cache.add_sequence(), [])

    @stateful.precondition(lambda self: self.tokens and self.rows < 8)
    @rule(number=NUMBERS)
    def fork(self, number):
        b = self.one(number)
        free = self.cache.free_blocks
        self.started(self.cache.fork(b), list(self.tokens[b]))
        assert self.cache.free_blocks == free

    def started(self, b: int, tokens: list[int]) -> None:
        assert b == min(set(range(self.rows + 1)) - set(self.tokens))
        self.rows = max(self.rows, b + 1)
        self.tokens[b], self.new[b] = tokens, 0

    @rule(how=st.sampled_from([copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]))
    def go_on_with_a_copy(self, how):
        before = self.snapshot()
        old, self.cache = self.cache, how(self.cache)
        assert self.snapshot() == before
        for array in (*old._pool.arrays, old._pages.table):
            array[...] = 1  # a copy shares no memory
        self.memory = None
        assert self.snapshot() == before

    @rule(order=NUMBERS, layer=NUMBERS)
    def operate(self, order, layer):
        """The operation finds what it finds in a fresh cache with the same keys."""
        chosen, layer = self.some(order), layer % self.layers
        sizes = {b: self.new[b] for b in chosen}
        total = sum(sizes.values())
        q, qs = self.xp.asarray(QUERIES[:total]), self.xp.asarray(GATES[:total])
        op = MLAIndexerRaggedFloat8Paged(HEADS, DEPTH, K)
        offsets, view = self.cache.row_offsets(chosen), self.cache.view(layer, chosen)
        found = op(q, qs, offsets, *view, return_scores=True)
        if not chosen:
            return
        cut = {b: len(self.tokens[b]) - sizes[b] for b in chosen}
        fresh = PagedKeyCache.from_dense(
            [self.keys(self.tokens[b][: cut[b]]) for b in chosen], page_size=4
        )
        fresh.append([self.keys(self.tokens[b][cut[b] :]) for b in chosen])
        want = op(q, qs, fresh.input_row_offsets, *fresh.view(layer), return_scores=True)
        assert all(map(same_bits, found, want))

    # ---- what is always true

    @invariant()
    def it_holds_the_tokens(self):
        cache = self.cache
        assert cache.batch == self.rows
        assert cache.sequences.tolist() == sorted(self.tokens)
        lengths = [len(self.tokens.get(b, ())) for b in range(self.rows)]
        assert cache.lengths.tolist() == lengths
        for layer in range(self.layers):
            for b, numbers in self.tokens.items():
                want = DENSE[numbers, layer, : self.kv_heads]
                # A product with a NaN has other bits on a GPU.
                np.testing.assert_array_equal(host(cache.gather(b, layer)), want)

    @invariant()
    def views_name_its_pages_and_slots(self):
        cache, size = self.cache, self.page_size
        table, slots = host(cache.k_lookup_table), host(cache.slots())
        codes, scales = host(cache.k_blocks).view(np.uint8), host(cache.k_scales)
        new = [self.new.get(b, 0) for b in range(self.rows)]
        assert host(cache.input_row_offsets).tolist() == [0, *np.cumsum(new, dtype=int)]
        assert slots.dtype == np.int64
        expected, numbers = [], []
        for b in self.tokens:
            held = -(-len(self.tokens[b]) // size)
            assert (table[b, :held] < cache.num_blocks).all()
            assert (table[b, held:] == UNUSED).all()
        for b in sorted(self.tokens):
            for at in range(len(self.tokens[b]) - self.new[b], len(self.tokens[b])):
                expected.append(int(table[b, at // size]) * size + at % size)
                numbers.append(self.tokens[b][at])
        assert slots.tolist() == expected
        where = slots // size, 0, slice(None), slots % size
        chosen = numbers, slice(self.layers), slice(self.kv_heads)
        assert same_bits(codes[where], CODES.view(np.uint8)[chosen])
        assert same_bits(scales[where], SCALES[chosen])
        lengths = [len(self.tokens.get(b, ())) for b in range(self.rows)]
        assert host(cache.view().k_cache_lengths).tolist() == np.subtract(lengths, new).tolist()
        unused = [b for b in range(self.rows) if b not in self.tokens]
        assert (table[unused] == UNUSED).all()

    @invariant()
    def pages_are_shared_among_relatives_and_none_is_lost(self):
        cache, size = self.cache, self.page_size
        holders: dict[int, list[tuple[int, int]]] = {}
        for b in self.tokens:
            for column, page in enumerate(self.pages(b)):
                holders.setdefault(page, []).append((b, column))
        for places in holders.values():
            first = {self.tokens[b][column * size] for b, column in places}
            assert len(first) == 1, "sequences without a common token share a page"
            assert len({b for b, _ in places}) == len(places)
        pages = cache._pages
        counts = [len(holders.get(page, ())) for page in range(cache.num_blocks)]
        assert pages.references.tolist() == counts
        assert cache.free_blocks == counts.count(0)
        free = pages._free[: pages.free_count].tolist()
        assert sorted(free) == [page for page, count in enumerate(counts) if not count]

    @invariant()
    def nothing_is_written_between_pages(self):
        if self.memory is not None:
            assert (host(self.memory)[:, -BETWEEN:] == CANARY).all()


def _run(machine, examples: int) -> None:
    """The same examples every time."""
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=25,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    stateful.run_state_machine_as_test(machine, settings=settings)


def test_a_cache_is_a_dict_of_lists():
    _run(CacheMachine, 60)


@pytest.mark.gpu
def test_a_cache_on_a_gpu_is_a_dict_of_lists(cupy):
    _run(type("OnGpu", (CacheMachine,), {"xp": cupy}), 15)
