"""What every answer must satisfy. The assertions take arrays of either backend."""

from __future__ import annotations

import re

import numpy as np
import pytest
from generators import ARGUMENTS

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores
from mla_fp8.cli import oracle
from mla_fp8.cli.compare import SCORE_ERROR, assert_scores_close, host, same_bits
from mla_fp8.cli.compare import SCORE_GATE as SCORE_GATE  # for tests that import it from here
from mla_fp8.cli.compare import guarded as guarded
from mla_fp8.cli.compare import score_gap as score_gap

POISON = 0x5A5A5A5A


def assert_well_formed(indices, selectable: np.ndarray, k: int, sort: str = "position") -> None:
    """Distinct selectable positions, then -1 and nothing but -1; ascending if so sorted."""
    rows = host(indices)
    assert rows.dtype == np.int32
    assert rows.shape == (len(selectable), k)
    for t, (row, allowed) in enumerate(zip(rows, selectable, strict=True)):
        count = min(k, int(allowed.sum()))
        chosen = row[:count]
        assert (row[count:] == -1).all(), f"row {t}: entries after {count} are not -1"
        assert ((chosen >= 0) & (chosen < len(allowed))).all(), f"row {t}: out of range"
        assert allowed[chosen].all(), f"row {t}: a key that the token does not see"
        assert len(np.unique(chosen)) == count, f"row {t}: repeated position"
        if sort == "position":
            assert (np.diff(chosen) > 0).all(), f"row {t}: not ascending"


def assert_exact_topk(indices, scores, selectable, sort: str = "position") -> None:
    """Exactly the top of the total order over these float32 scores."""
    rows, scores = host(indices), host(scores)
    assert scores.dtype == np.float32
    for t, row in enumerate(rows):
        want = oracle.expected_topk(scores[t], selectable[t], len(row), sort)
        np.testing.assert_array_equal(row, want, err_msg=f"row {t} by {sort}")


def assert_scores_aligned(scores, indices, dense) -> None:
    """Returned scores are those of the positions beside them, bit for bit; -inf beside -1."""
    scores, indices, dense = host(scores), host(indices), host(dense)
    assert scores.dtype == np.float32
    assert scores.shape == indices.shape
    chosen = indices >= 0
    assert np.isneginf(scores[~chosen]).all()
    rows = np.nonzero(chosen)[0]
    assert same_bits(scores[chosen], dense[rows, indices[chosen]].astype(np.float32))


def assert_set_close(indices, want: oracle.Expected, magnitude: np.ndarray, error: float) -> None:
    """Against reference scores, a swapped pair lies within the score error at the boundary."""
    for t, row in enumerate(host(indices)):
        reference = oracle.best_first(want.scores[t], want.selectable[t])[: len(row)]
        swapped = np.setxor1d(row[row >= 0], reference)
        if len(swapped) == 0:
            continue
        scores, edge = want.scores[t, swapped], want.scores[t, reference[-1]]
        allowed = 2 * error * max(magnitude[t, swapped].max(), magnitude[t, reference[-1]])
        same = (scores == edge) | (np.isnan(scores) & np.isnan(edge))
        with np.errstate(invalid="ignore"):  # inf - inf is covered by `same`
            near = np.abs(scores - edge) <= allowed
        assert (same | near).all(), f"row {t}: swapped {swapped[~(same | near)]} far from the edge"


def check_case(case, xp, *, device_max_lengths: bool = False, check=None) -> None:
    """The whole contract on one host case: scores, sets, both orders, against the oracle."""
    want = oracle.evaluate(case, device_max_lengths=device_max_lengths)
    magnitude = oracle.evaluate(case, device_max_lengths=device_max_lengths, absolute=True).scores
    here = case.to(xp, device_max_lengths=device_max_lengths)
    error = SCORE_ERROR[xp.__name__]
    options = {"mask": case.spec.mask, "kpool": case.spec.kpool, "check": check}
    dense = index_scores(*here.args, **options)
    assert_scores_close(dense, want, magnitude, error)
    op = MLAIndexerRaggedFloat8Paged(**case.params)
    for sort in ("position", "score"):
        indices, scores = op(*here.args, return_scores=True, sort=sort, check=check)
        assert same_bits(op(*here.args, sort=sort, check=check), indices), "without scores"
        assert_well_formed(indices, want.selectable, case.spec.k, sort)
        assert_exact_topk(indices, dense, want.selectable, sort)
        assert_scores_aligned(scores, indices, dense)
    assert_set_close(indices, want, magnitude, error)


def one_element_on(xp, array):
    """The same values one element past an aligned address."""
    buffer = xp.empty(array.size + 1, array.dtype)
    buffer[1:] = array.ravel()
    return buffer[1:].reshape(array.shape)


def sanitized(names, small) -> list:
    """Parameters of a test, of which those in ``small`` also run under compute-sanitizer."""

    def marked(name):
        return pytest.param(
            *(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.sanitize
        )

    return [marked(name) if name in small else name for name in names]


def message_of(call) -> str:
    """The message of the error that a call raises, which is not long."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert len(str(caught.value)) < 400
    return str(caught.value)


def assert_helpful(error, names: str, came: str = "") -> None:
    """Names the argument (one of those that disagree), says what was expected and what came."""
    text = str(error)
    assert any(re.search(rf"\b{name}\b", text) for name in names.split("|")), text
    assert re.search(r"\b(must|expected|needs?)\b", text), text
    assert re.search(r"\bgot\b", text), text
    assert came in text, text


def takes_no_memory(work, attempts=10):
    """Whether some of several runs of ``work`` leave the free memory of the GPU as it is.

    Other processes use the GPU too, so one changed number says nothing. A leak changes all of them.
    """
    import cupy

    def free():
        cupy.cuda.Device().synchronize()
        return cupy.cuda.Device().mem_info[0], cupy.get_default_memory_pool().total_bytes()

    changed = []
    for _ in range(attempts):
        before = free()
        work()
        changed.append(free() != before)
    return not all(changed)


def tensors_on_gpu(torch, case) -> list:
    """A call's arguments as tensors; the maxima stay on the host."""
    tensors = [torch.from_numpy(host(getattr(case, name)).copy()) for name in ARGUMENTS[:-1]]
    bounds = ARGUMENTS.index("k_max_lengths")
    moved = [t if i == bounds else t.to("cuda") for i, t in enumerate(tensors)]
    torch.cuda.synchronize()
    return [*moved, case.layer_idx]
