"""Device facts, kernel specialisations, and arithmetic on whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WARP = 32
OLDEST = 80  # compute capability 8.0 is the first with the tensor-core instruction that we use
# Shared memory that a block may have, in KiB, on the targets that CI compiles for.
SHARED_KILOBYTES = {"sm_80": 163, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120a": 99}


@dataclass(frozen=True)
class Device:
    """The facts about a GPU that plans depend on."""

    arch: str  # compiler target: sm_80, sm_90a, ...
    multiprocessors: int
    ordinal: int = 0
    shared_bytes: int = 99 << 10  # shared memory that a block may have

    @property
    def clusters(self) -> bool:
        """Whether the GPU has clusters and programmatic dependent launch: from Hopper on."""
        return int(self.arch[3:].rstrip("a")) >= 90


@dataclass(frozen=True)
class Kernel:
    """A specialisation of a template in ``kernels/``, and its launch configuration."""

    template: str
    macros: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int = 0  # dynamic shared memory


def architecture(compute_capability: int) -> str:
    """The compiler target of a GPU, from sm_90 on with ``a`` for architecture-specific code."""
    return f"sm_{compute_capability}{'a' if compute_capability >= 90 else ''}"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def divider(divisor: int) -> tuple[np.uint32, np.uint32]:
    """Factor and shift with which ``n // divisor == (2 * n * factor >> 32) >> shift``, n < 2 ** 31.

    Granlund and Montgomery, Division by invariant integers using multiplication (PLDI 1994).
    """
    shift = (divisor - 1).bit_length()
    return np.uint32(ceil_div(1 << (31 + shift), divisor)), np.uint32(shift)


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``max(n, 1)``."""
    return 1 << max(n - 1, 0).bit_length()
