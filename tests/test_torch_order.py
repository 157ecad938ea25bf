"""Selection against a sort that others wrote: torch's stable one, on our own dense scores."""

import numpy as np
import pytest
from generators import Spec
from properties import host

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores


def _random_spec(seed: int) -> Spec:
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 7))
    return Spec(
        seq_lens=tuple(int(n) for n in rng.integers(0, 40, batch)),
        cache_lens=tuple(int(n) for n in rng.integers(0, 3000, batch)),
        num_heads=int(rng.choice([2, 8, 64])),
        depth=64,
        k=int(rng.choice([1, 64, 500, 2048])),
        page_size=int(rng.choice([16, 64])),
        mask=str(rng.choice(["causal", "null"])),
        values=str(rng.choice(["normal", "plateau"])),
        seed=seed,
    )


@pytest.mark.parametrize("tens", range(10))
def test_a_hundred_ragged_batches(tens, xp):
    torch = pytest.importorskip("torch", reason="torch is not installed: sets were NOT compared")
    for seed in range(10 * tens, 10 * tens + 10):
        case = _random_spec(seed).build()
        here, op = case.to(xp), MLAIndexerRaggedFloat8Paged(**case.params)
        found = host(op(*here.args))
        dense = torch.as_tensor(index_scores(*here.args, mask=case.spec.mask))
        order = torch.sort(dense, dim=1, descending=True, stable=True).indices.cpu().numpy()
        seen = (dense > -torch.inf).sum(dim=1).cpu().numpy()
        for t, row in enumerate(found):
            count = min(case.spec.k, int(seen[t]))
            np.testing.assert_array_equal(row[:count], np.sort(order[t, :count]), err_msg=f"{seed}")
            assert (row[count:] == -1).all()
