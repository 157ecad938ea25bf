"""Scores as they really come, and worse: selection must be as fast on them as on random data.

``rows`` makes scores by themselves. ``real_queries`` and ``real_keys`` make what gives such scores
from a whole call: queries and keys with a common direction, key scales that are log-normal and grow
with position; gates are of both signs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

ROWS = (
    "normal",
    "negative heavy tail",
    "-1/|n|",
    "-exp(2n)",
    "cauchy",
    "log-normal 3",
    "two bulks",
    "ten outliers",
    "ten negative outliers",
    "half of the rows negative",
    "half zeros",
    "k-th is zero",
    "last bits",
    "ascending",
    "all equal",
)
Normal = Callable[[tuple[int, ...]], Any]  # float32 of the standard normal distribution


def rows(name: str, count: int, columns: int, seed: int = 0) -> np.ndarray:
    """float32 scores [count, columns] of the pattern ``name``; at least ten columns."""
    rng = np.random.default_rng(seed)
    shape = count, columns
    n = rng.standard_normal(shape, np.float32)

    def heavy() -> np.ndarray:
        place = np.arange(columns, dtype=np.float32) / columns
        tail = np.exp(1.5 * rng.standard_normal(columns, np.float32) + 3 * place)
        rows: np.ndarray = tail * (1 + np.float32(0.3) * n)
        return rows

    def outliers(value: float) -> np.ndarray:
        return np.where(np.arange(columns) % (columns // 10) == 5, np.float32(value), n)

    made: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: n,
        "negative heavy tail": lambda: -heavy(),
        "-1/|n|": lambda: -1 / np.abs(n),
        "-exp(2n)": lambda: -np.exp(2 * n),
        "cauchy": lambda: n / rng.standard_normal(shape, np.float32),
        "log-normal 3": lambda: np.exp(3 * n),
        "two bulks": lambda: np.where(np.arange(columns) % 16 == 0, n * np.float32(1e-3) + 5, n),
        "ten outliers": lambda: outliers(1e3),
        "ten negative outliers": lambda: outliers(-1e6),
        "half of the rows negative": lambda: (
            heavy() * np.where(np.arange(count) % 2, 1, -1)[:, None]
        ),
        "half zeros": lambda: np.where(rng.random(shape, np.float32) < 0.5, 0, n),
        "k-th is zero": lambda: np.where(
            rng.random(shape, np.float32) < 1 - 1500 / columns, 0, np.abs(n)
        ),
        "last bits": lambda: 1 + n * np.float32(1e-6),
        "ascending": lambda: np.sort(n, axis=1),
        "all equal": lambda: np.ones_like(n),
    }
    with np.errstate(divide="ignore"):
        return np.ascontiguousarray(made[name](), np.float32)


def real_queries(normal: Normal, common: Any, tokens: int, heads: int) -> Any:
    """Queries [tokens, heads, depth] that share some of a direction ``common`` [depth]."""
    shape = heads, len(common)
    return normal((tokens, *shape)) + common / 2 + normal((1, *shape)) / 2


def real_keys(normal: Normal, common: Any, place: Any) -> tuple[Any, Any]:
    """Keys of one sequence at ``place`` (0 to 1), and factors for their scales once quantised."""
    keys = normal((len(place), len(common))) + common / 2
    return keys, np.exp(1.5 * normal((len(place),)) + 3 * place)


def real_problem(
    tokens: int, keys: int, heads: int, depth: int = 128, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys, gates [tokens, heads] and the keys' factors, in NumPy."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    common = normal((depth,))
    queries = real_queries(normal, common, tokens, heads)
    values, factors = real_keys(normal, common, np.arange(keys, dtype=np.float32) / keys)
    return queries, values, normal((tokens, heads)), factors
