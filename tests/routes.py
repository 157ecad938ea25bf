"""A batch for each way through the kernels, small enough for every test of wrong values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from generators import Case, Spec

from mla_fp8 import MLAIndexerRaggedFloat8Paged
from mla_fp8._check.problem import Inputs
from mla_fp8._plan.kernel import Device
from mla_fp8._plan.scoring import Route
from mla_fp8._plan.topk import Mode, TopkPlan, plan_topk
from mla_fp8._plan.tuning import H200, Tuning


@dataclass(frozen=True)
class Way:
    """A batch, the bytes of scores that may wait for their selection, and where it then goes."""

    spec: Spec
    route: Route
    mode: Mode = Mode.SEQUENTIAL
    score_bytes: int | None = None  # None: as the package has it

    @property
    def tuning(self) -> Tuning:
        size = self.score_bytes
        return Tuning(prefill_bytes=size, decode_bytes=size) if size else H200

    def plan(self, device: Device, case: Case, **options) -> TopkPlan:
        """The plan of a call on a batch like this one, by position and without scores."""
        op = MLAIndexerRaggedFloat8Paged(**case.params)
        problem = op._problem(Inputs(*case.args)._replace(**options), False)
        return plan_topk(problem.shape, self.spec.k, False, False, device, self.tuning)

    def use(self, xp, monkeypatch) -> None:
        """Lead the calls of this test that way."""
        if xp.__name__ == "numpy" or self.score_bytes is None:
            return
        from mla_fp8._cuda import backend

        if backend.device_facts(xp.cuda.Device().id).arch != "sm_90a":
            pytest.skip("needs a Hopper GPU: others score all of a call before they select")
        monkeypatch.setattr(backend.index_topk, "__defaults__", (self.tuning,))


def longer(spec: Spec, times: int) -> Spec:
    """Sequences of so many times as many tokens, for caches whose rows stand that far apart."""
    pairs = zip(spec.seq_lens, spec.cache_lens, strict=True)
    cached = tuple(times * (new + cached) - new for new, cached in pairs)
    return dataclasses.replace(spec, cache_lens=cached)


# Sequences without new tokens and without cached ones, and rows that see fewer than k keys.
_PREFILL = {"num_heads": 8, "depth": 64, "page_size": 16, "k": 30}
_DECODE = {"num_heads": 32, "page_size": 16, "k": 30}
WAYS = {
    "portable": Way(
        Spec((3, 0, 2, 4), (40, 70, 3, 17), num_heads=4, depth=32, page_size=8, k=20),
        Route.PORTABLE,
    ),
    "granules": Way(
        Spec((3, 0, 2, 4), (40, 70, 3, 17), num_heads=4, granularity=32, page_size=8, k=20),
        Route.PORTABLE,
    ),
    "decode": Way(Spec((1, 2, 0, 1), (130, 67, 9, 0), **_DECODE), Route.DECODE),
    "decode, parts": Way(
        Spec((1, 2, 1, 2) * 20, (130, 67, 9, 0) * 20, **{**_DECODE, "num_heads": 8, "depth": 64}),
        Route.DECODE,
        Mode.PARTS,
        60_000,
    ),
    "prefill": Way(Spec((70, 3, 0, 33), (40, 70, 9, 0), **_PREFILL), Route.PREFILL),
    "prefill, windows": Way(
        Spec((150, 3, 0, 70), (0, 70, 9, 120), **_PREFILL), Route.PREFILL, Mode.WINDOWS, 150_000
    ),
    "prefill, parts": Way(
        Spec((20, 3, 0, 10), (4300, 70, 5, 0), **{**_PREFILL, "page_size": 64}),
        Route.PREFILL,
        Mode.PARTS,
        50_000,
    ),
}
