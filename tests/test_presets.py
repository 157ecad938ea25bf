"""Presets: the numbers of each model, and a small problem on each."""

import numpy as np
import pytest
from properties import host

from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache, expand_pools, fp8, presets

MODELS = {  # heads, k, kpool
    "deepseek_v3_2": (64, 2048, 1),
    "glm_5": (32, 2048, 1),
    "glm_5_3_flash": (32, 512, 4),
    "deepseek_v4_flash": (64, 512, 4),
    "deepseek_v4_pro": (64, 1024, 4),
    "hy_v4": (16, 2048, 1),
}


def test_every_preset_is_here():
    found = {n for n, value in vars(presets).items() if isinstance(value, presets.Preset)}
    assert found == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_numbers(name):
    heads, k, kpool = MODELS[name]
    op = getattr(presets, name).operator()
    assert op == MLAIndexerRaggedFloat8Paged(heads, 128, k, 128, "causal", kpool)


@pytest.mark.parametrize("name", MODELS)
def test_a_small_problem(name, xp):
    """Every row that a token sees is selected, because k covers them."""
    model, rng = getattr(presets, name), np.random.default_rng(0)
    op, kpool, new, cached = model.operator(), model.kpool, 3, 300
    rows = (new + cached) // kpool
    cache = model.cache(1, xp=xp)
    cache.append([xp.asarray(rng.standard_normal((rows, 128), np.float32))])
    offsets = xp.asarray(np.array([0, new], np.uint32))
    lengths = xp.asarray(np.array([cached], np.uint32))
    bounds = np.array([[new, cached]], np.uint32)
    view = cache.view()._replace(k_cache_lengths=lengths, k_max_lengths=bounds)
    q, qs = fp8.quantize(xp.asarray(rng.standard_normal((new, op.num_heads, 128), np.float32)))
    found = op(q, qs[..., 0], offsets, *view)
    assert found.shape == (new, op.k)
    for i, row in enumerate(host(found)):
        seen = (cached + i + 1) // kpool
        assert row[:seen].tolist() == list(range(seen))
        assert (row[seen:] == -1).all()
    if kpool > 1:
        tokens = expand_pools(found, offsets, lengths, kpool)
        assert tokens.shape == (new, op.k * kpool + kpool - 1)


def test_the_cache_of_a_preset(xp):
    cache = presets.deepseek_v3_2.cache(2, num_layers=3, page_size=16, xp=xp)
    assert isinstance(cache, PagedKeyCache)
    cache.append([xp.full((3, 5, 1, 128), 3.0, np.float32)] * 2)
    assert cache.k_blocks.shape[1:] == (1, 3, 16, 1, 128)
    used = host(cache.k_scales)[host(cache.k_lookup_table)[:, 0].astype(int)][:, :, :, :5]
    assert (used == 2.0**-7).all()  # 3 / 448, rounded up to a power of two


def test_changes():
    op = presets.glm_5.operator(k=7, mask="null")
    assert op == MLAIndexerRaggedFloat8Paged(32, 128, 7, 128, "null")
    with pytest.raises(AttributeError):
        presets.glm_5.k = 3
    with pytest.raises(ValueError, match="k must be"):
        presets.glm_5.operator(k=0)
    with pytest.raises(TypeError, match="heads"):
        presets.glm_5.operator(heads=3)
    with pytest.raises(ValueError, match="page_size must be"):
        presets.glm_5.cache(1, page_size=0)
