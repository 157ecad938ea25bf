"""Sparse attention from hidden states to output: write keys, select, attend to what was selected.

One attention layer of the kind of DeepSeek-V3.2, small and with random weights, decodes a few
tokens of two sequences. When k covers all tokens, the result is that of dense attention. When it
does not, a table shows the difference. On the GPU if torch and CuPy find one, else on the CPU.

python examples/sparse_attention_torch.py
"""

import importlib.util

import numpy as np
import torch

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, fp8, quantize_queries

on_gpu = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
device, xp = ("cuda", importlib.import_module("cupy")) if on_gpu else ("cpu", np)
HIDDEN, HEADS, DEPTH, ROPE, VALUE = 256, 16, 128, 64, 64  # DEPTH and ROPE as in DeepSeek-V3.2
PAGE, BLOCKS, PROMPTS, STEPS = 64, 16, [300, 90], 4
torch.manual_seed(0)


def linear(inputs, outputs):
    return torch.nn.Linear(inputs, outputs, bias=False, device=device).requires_grad_(False)


# Attention's own projections. All heads share one key and one value per token, as in MLA's decode.
query, key_value = linear(HIDDEN, HEADS * DEPTH), linear(HIDDEN, DEPTH + VALUE)
output = linear(HEADS * VALUE, HIDDEN)
# Trained heads attend sharply, and partly to the same tokens. Plain random weights do neither.
shared = torch.randn(1, DEPTH, HIDDEN, device=device)
own = torch.randn(HEADS, DEPTH, HIDDEN, device=device)
query.weight.copy_(((shared + 0.7 * own) * 4 * HIDDEN**-0.5).flatten(0, 1))
# A trained indexer has learnt where attention will look; this one has attention's weights.
index_query, index_key = query, linear(HIDDEN, DEPTH)
index_key.weight.copy_(key_value.weight[:DEPTH])
head_weight = linear(HIDDEN, HEADS)


def rotate(x, positions):
    """Half-split RoPE on the first ROPE channels, as in the indexer of DeepSeek-V3.2."""
    angle = positions[:, None] * 10000 ** (-torch.arange(0, ROPE, 2, device=device) / ROPE)
    return fp8.rope(x.contiguous(), angle.cos(), angle.sin(), interleaved=False)


class Layer:
    """The layer with its two caches: FP8 index keys in pages, and keys and values for attention."""

    def __init__(self, k):
        # One call serves the whole batch, whatever the sequences' lengths.
        self.op = MLAIndexerRaggedFloat8Paged(num_heads=HEADS, depth=DEPTH, k=k)
        batch = len(PROMPTS)
        self.cache = PagedKeyCache(batch, DEPTH, page_size=PAGE, num_blocks=BLOCKS, xp=xp)
        # Both caches have the same pages, so a slot of one is a row of the other.
        self.pool = torch.zeros(BLOCKS * PAGE, DEPTH + VALUE, device=device)

    def __call__(self, hidden, new):
        """Outputs [tokens, HIDDEN] of hidden states; ``new[b]`` tokens belong to sequence b."""
        tokens = len(hidden)
        self.cache.allocate(new)
        pairs = zip(self.cache.lengths, new, strict=True)
        place = [torch.arange(length - n, length) for length, n in pairs]
        positions = torch.cat(place).to(device)
        slots = torch.as_tensor(self.cache.slots(), device=device)

        # 1. Attention's keys and values of the new tokens go into the pool.
        q = rotate(query(hidden).view(tokens, HEADS, DEPTH), positions)
        key, value = key_value(hidden).split([DEPTH, VALUE], dim=1)
        self.pool[slots] = torch.cat([rotate(key, positions), value], dim=1)

        # 2. The indexer's keys go into its cache: RoPE, Hadamard transform, FP8. The transform
        # changes no dot product, but spreads outliers before numbers are rounded.
        self.cache.write(0, fp8.hadamard(rotate(index_key(hidden), positions)))

        # 3. The same for its queries. Query scale, head weight and softmax scale make up a gate.
        q_index = rotate(index_query(hidden).view(tokens, HEADS, DEPTH), positions)
        weights = 1 + head_weight(hidden) / 10
        q8, gates = quantize_queries(fp8.hadamard(q_index), weights, power_of_two=True)

        # 4. Each token selects k of the keys up to its own: rows of the pool, -1 padded.
        offsets, view = self.cache.input_row_offsets, self.cache.view()
        chosen = self.op(q8, gates, offsets, *view, output="slots")

        # 5. Attention over the chosen rows alone: [tokens, k] in place of [tokens, all].
        keys, values = self.pool[chosen.clamp(min=0).long()].split([DEPTH, VALUE], dim=2)
        logits = torch.einsum("thd,tsd->ths", q, keys) * DEPTH**-0.5
        logits = logits.masked_fill((chosen < 0)[:, None], -torch.inf)
        mixed = torch.einsum("ths,tsv->thv", logits.softmax(dim=2), values)
        return output(mixed.flatten(1))


def dense(hidden):
    """The same layer over a whole sequence [tokens, HIDDEN], with torch's dense attention."""
    positions = torch.arange(len(hidden), device=device)
    q = rotate(query(hidden).view(-1, HEADS, DEPTH), positions)
    key, value = key_value(hidden).split([DEPTH, VALUE], dim=1)
    key, value = (x.expand(HEADS, *x.shape) for x in (rotate(key, positions), value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return output(attend(q.transpose(0, 1), key, value, is_causal=True).transpose(0, 1).flatten(1))


# Hidden states of the prompts and of the tokens to come. A real model computes them layer by layer.
states = [torch.randn(n + STEPS, HIDDEN, device=device) for n in PROMPTS]
wanted = [dense(state) for state in states]
print(f"on {device}: difference from dense attention, as a part of its norm")
for k in (512, 64, 16):
    layer, differences = Layer(k), []
    for step in range(STEPS + 1):  # prefill of whole prompts, then one token a sequence
        rows = [slice(0, n) if step == 0 else slice(n + step - 1, n + step) for n in PROMPTS]
        hidden = torch.cat([state[row] for state, row in zip(states, rows, strict=True)])
        found = layer(hidden, [row.stop - row.start for row in rows])
        want = torch.cat([out[row] for out, row in zip(wanted, rows, strict=True)])
        differences.append(float((found - want).norm() / want.norm()))
    print(f"k = {k:3}: prefill {differences[0]:.1e}, decode {max(differences[1:]):.1e}")
    if k >= max(map(len, states)):
        assert max(differences) < 1e-4, "k covers every token: this is dense attention"
    else:
        assert differences[0] > 1e-3, "fewer keys than tokens: an approximation"
