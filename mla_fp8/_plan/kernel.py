"""What a launch is of: a GPU's facts, and a template with its parameters; and whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WARP = 32
OLDEST = 80  # the first compute capability with the tensor-core product we use
# Shared memory that a block may have, for the targets that CI compiles.
SHARED_KILOBYTES = {"sm_80": 163, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120a": 99}


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    arch: str  # compiler target: sm_80, sm_90a, ...
    multiprocessors: int
    ordinal: int = 0
    shared_bytes: int = 99 << 10  # that a block may have

    @property
    def clusters(self) -> bool:
        """Whether blocks see one another's shared memory, and launches may begin early."""
        return int(self.arch[3:].rstrip("a")) >= 90


@dataclass(frozen=True)
class Kernel:
    """A template of ``kernels/``, its parameters by name, and what a block of it takes."""

    template: str
    parameters: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int = 0  # asked for at launch


def architecture(compute_capability: int) -> str:
    """The compiler target of a GPU: with its own instructions (``a``) where there are any."""
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
    """The least power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()
