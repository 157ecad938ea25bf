"""What a launch is of: a GPU's facts, and a template with its parameters."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
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
