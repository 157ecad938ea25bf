"""What all kinds of fuzz cases share: how a case is made smaller, and how it is printed."""

from __future__ import annotations

import dataclasses
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_fp8.cli.compare import demand, demand_same

_SHRINKING_SECONDS = 30.0


@dataclass(frozen=True)
class Recipe:
    """A case as plain values: `check` makes its arrays, the same ones every time.

    The defaults of a kind's fields are its simplest case. A subclass raises ValueError for values
    that do not go together.
    """

    seed: int = 0

    def check(self, backend: str) -> list[str]:
        """Run the case on "numpy" or "cuda" and return the routes that it took.

        Raises
        ------
        Mismatch
            If a result is not what the contract says. Another exception is a fault as well.
        """
        raise NotImplementedError

    def features(self) -> list[str]:
        """What this case tries, for the counts."""
        raise NotImplementedError

    def smaller(self) -> Iterator[dict[str, Any]]:
        """Changes of fields that make the case simpler, the boldest first; some may be invalid."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        for field in changed:
            yield {field.name: field.default}
        for field in changed:
            for value in _nearer(getattr(self, field.name), field.default):
                yield {field.name: value}

    def snippet(self, backend: str) -> str:
        """Python code that runs this case again."""
        fields = dataclasses.fields(self)
        given = {f.name: getattr(self, f.name) for f in fields}
        shown = [f"{f.name}={given[f.name]!r}" for f in fields if given[f.name] != f.default]
        name, module = type(self).__name__, type(self).__module__
        lines = "".join(f"    {value},\n" for value in shown)
        case = f"{name}(\n{lines})" if lines else f"{name}()"
        return f"from {module} import {name}\n\ncase = {case}\ncase.check({backend!r})\n"


def _nearer(value: Any, default: Any) -> Iterator[Any]:
    """Values between ``value`` and the default."""
    if isinstance(value, bool) or isinstance(default, bool):
        return
    if isinstance(value, int):
        least = default if isinstance(default, int) else 0
        for nearer in (least + (value - least) // 2, value - 1):
            if least < nearer < value:
                yield nearer
    elif isinstance(value, tuple):
        for i, element in enumerate(value):
            yield value[:i] + value[i + 1 :]
            if isinstance(element, int):
                for nearer in (0, element // 2, element - 1):
                    if 0 <= nearer < element:
                        yield (*value[:i], nearer, *value[i + 1 :])


def failure(recipe: Recipe, backend: str, routes: list[str] | None = None) -> Exception | None:
    """What is wrong with a case, warnings included; None if all is well.

    The routes that it took are added to ``routes``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            taken = recipe.check(backend)
            if routes is not None:
                routes += taken
        except Exception as error:
            return error
    return None


def described(error: Exception) -> str:
    """One line: the kind of an error, its message, and the check or the code that raised it."""
    helpers = demand.__name__, demand_same.__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name not in helpers]
    where = f" ({frames[-1].name}, {Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def shrink(recipe: Recipe, backend: str, error: Exception) -> tuple[Recipe, Exception]:
    """A simpler case that fails in the same way, and its error.

    The search is greedy: the first simpler case that still fails is taken, until none fails or
    half a minute is over.
    """
    deadline = time.monotonic() + _SHRINKING_SECONDS
    found = True
    while found:
        found = False
        for change in recipe.smaller():
            if time.monotonic() > deadline:
                break
            try:
                candidate = dataclasses.replace(recipe, **change)
            except ValueError:
                continue
            if candidate == recipe:
                continue
            other = failure(candidate, backend)
            if type(other) is type(error):
                recipe, error, found = candidate, other, True
                break
    return recipe, error
