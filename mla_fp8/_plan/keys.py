"""The kernels that write keys and transform them: their macros and grids."""

from __future__ import annotations

from typing import NamedTuple

from mla_fp8._plan.kernel import Kernel

# Values of macros and of fields, as the kernels define them.
NUMBER_TYPES = {"uint16": 0, "float16": 1, "float32": 2}  # floats.cuh; uint16: bits of bfloat16
INDEX_TYPES = {"int32": 0, "uint32": 1, "int64": 2}  # write_keys.cu
BY_SLOT, BY_POSITION, BY_TOKEN = range(3)  # kPlacedBy of write_keys.cu

THREADS = 256
_WRITTEN_AT_ONCE = 2 * 16 * THREADS  # numbers that a block of write_keys takes: kRows * kChannels


class WriteForm(NamedTuple):
    """What a specialisation of ``write_keys`` depends on."""

    depth: int
    groups: int
    number_type: int
    keys_aligned: bool  # every row begins on 16 bytes
    values_alignment: int  # 16, 4 or 1
    placed_by: int

    @property
    def kernel(self) -> Kernel:
        """The kernel with these macros."""
        macros = (
            ("kThreads", THREADS),
            ("kDepth", self.depth),
            ("kScaleGroups", self.groups),
            ("kNumberType", self.number_type),
            ("kKeysAligned", int(self.keys_aligned)),
            ("kValuesAlignment", self.values_alignment),
            ("kPlacedBy", self.placed_by),
        )
        return Kernel("write_keys", macros, THREADS)

    def blocks(self, rows: int) -> int:
        """Thread blocks for this many rows of keys."""
        return -(-rows * self.depth // _WRITTEN_AT_ONCE)


def per_number_kernel(template: str, number_type: int) -> Kernel:
    """``rope`` or ``pool_keys`` for numbers of this type."""
    macros = (("kThreads", THREADS), ("kNumberType", number_type))
    return Kernel(template, macros, THREADS)


def hadamard_kernel(depth: int, number_type: int, aligned: bool) -> Kernel:
    """``hadamard`` for rows that all begin on 16 bytes, or for any rows."""
    macros = (
        ("kThreads", THREADS),
        ("kDepth", depth),
        ("kNumberType", number_type),
        ("kAligned", int(aligned)),
    )
    return Kernel("hadamard", macros, THREADS)


def thread_blocks(threads: int) -> int:
    """Thread blocks that have at least this many threads."""
    return -(-threads // THREADS)
