"""Checks of the operation's plain parameters: integers, mask, row order."""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

import numpy as np

MAX_HEADS = 128
DEPTHS = (32, 64, 128, 256)
GRANULARITIES = (32, 64, 128, 256)
MAX_K = 65536
K_RANGE = range(1, MAX_K + 1)
KPOOL_RANGE = range(1, 65)
KEY_STEP_RANGE = range(1, 257)
SORTS = ("position", "score")


class Mask(str, Enum):
    """Which keys a token sees: all keys of its sequence, or the keys up to its own."""

    NULL = "null"
    CAUSAL = "causal"

    @classmethod
    def _missing_(cls, value: object) -> Mask | None:
        names = {"NULL": cls.NULL, "CAUSAL": cls.CAUSAL}
        return names.get(str(value))

    def __repr__(self) -> str:
        return repr(self.value)


class Output(str, Enum):
    """What a row of results holds of each selected key: its position, its slot, or both."""

    POSITIONS = "positions"
    SLOTS = "slots"
    BOTH = "both"


_OUTPUTS = {output.value: output for output in Output}


def brief(value: Any, most: int = 60) -> str:
    """``value`` as text of at most ``most`` characters, for an error message."""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_mask(mask: Any) -> Mask:
    """``mask`` as a `Mask`."""
    if not isinstance(mask, str):
        raise TypeError(f"mask must be 'null' or 'causal'; got {type(mask).__name__}")
    try:
        return Mask(mask)
    except ValueError:
        raise ValueError(f"mask must be 'null' or 'causal'; got {brief(mask)}") from None


def check_int(name: str, value: Any, allowed: range | tuple[int, ...]) -> int:
    """``value`` as a Python int, if it is an integer in ``allowed``."""
    if type(value) is int and value in allowed:
        return value
    if isinstance(allowed, range):
        expected = f"an integer from {allowed.start} to {allowed.stop - 1}"
    else:
        expected = f"one of {', '.join(map(str, allowed))}"
    try:
        # Reading a device scalar copies it to the host, which blocks and breaks a graph capture.
        on_device = hasattr(value, "__cuda_array_interface__")
        number = None if on_device or isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be {expected}, on the host; got {type(value).__name__}")
    if number not in allowed:
        raise ValueError(f"{name} must be {expected}; got {brief(number)}")
    return number


def either(numbers: tuple[int, ...]) -> str:
    """The numbers as a choice, for an error message."""
    return " or ".join(map(str, numbers))


def check_bool(name: str, value: Any) -> bool:
    """``value`` as a bool, if it is one."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__}")
    return bool(value)


def finer_granularities(depth: int) -> tuple[int, ...]:
    """The granularities that give a key of ``depth`` channels more than one scale."""
    return tuple(g for g in GRANULARITIES if g < depth)


def scale_groups(name: str, depth: int, granularity: int) -> int:
    """Scales per key: ``depth / granularity``, or 1 if the granularity is at least ``depth``."""
    if granularity >= depth:
        return 1
    allowed = finer_granularities(depth)
    if granularity not in allowed:
        expected = ", ".join(map(str, allowed)) + (" or " if allowed else "")
        raise ValueError(f"{name} must be {expected}>= depth ({depth}); got {granularity}")
    return depth // granularity


def allowed_groups(depth: int) -> tuple[int, ...]:
    """The numbers of scales that a key of ``depth`` channels may have."""
    return (1, *(depth // granularity for granularity in finer_granularities(depth)))


def check_sort(sort: Any) -> bool:
    """Whether rows are ordered by score rather than by position."""
    if not isinstance(sort, str) or sort not in SORTS:
        raise ValueError(f"sort must be {' or '.join(map(repr, SORTS))}; got {brief(sort)}")
    return bool(sort == "score")


def check_output(output: Any) -> Output:
    """``output`` as an `Output`."""
    if type(output) is Output:
        return output
    found = _OUTPUTS.get(output) if isinstance(output, str) else None
    if found is None:
        raise ValueError(f"output must be {' or '.join(map(repr, _OUTPUTS))}; got {brief(output)}")
    return found
