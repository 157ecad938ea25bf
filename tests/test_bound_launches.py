"""What a bound call launches, on stand-ins for a GPU: what a call of the operator launches."""

from collections import Counter

import launches
import numpy as np
import pytest
from test_scratch import DEVICES, _batch, _limited, _log, _shape

from mla_fp8._check.parameters import Output


def _done(machine):
    """What the launches did, without what depends on the handles of streams."""
    return (
        machine.blocks,
        machine.accesses,
        *(a.tolist() for a in (machine.scored, machine.selected, machine.sorted)),
    )


@pytest.mark.parametrize("captured", [False, True])
def test_a_bound_call_launches_what_a_call_launches(captured):
    """Replayed, or added to the graph of a caller who captures. Nothing is loaded for it."""
    rng, seen = np.random.default_rng(3), Counter()
    for _ in range(150):
        s, k = _shape(rng), _log(rng, 1, 9000)
        by_score, values = map(bool, rng.integers(0, 2, 2))
        tuning, device = _limited(1 << int(rng.integers(12, 24))), DEVICES[rng.integers(4)]
        batch, output = _batch(rng, s, False), [*Output][rng.integers(3)]
        options = batch, k, by_score, values, device, tuning, output
        plain, *calls = launches.run_bound(*options, captured=captured)
        assert all(_done(call) == _done(plain) for call in calls)
        seen[launches.run_topk(*options[:6], output=output)[1].mode] += 1
    assert len(seen) == 3, seen
