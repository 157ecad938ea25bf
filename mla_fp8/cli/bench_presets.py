"""Named sets of shapes, and one shape from flags, for ``python -m mla_fp8 bench``.

Their groups are those of `cases`, so that results can be compared with those of whole groups.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from mla_fp8 import presets
from mla_fp8._check.parameters import KPOOL_RANGE
from mla_fp8.cli.bench_calls import operator
from mla_fp8.cli.cases import Case, ragged_lengths
from mla_fp8.cli.command import CommandError, check_int

DECODE_TOKENS = 8  # most new tokens of a sequence in decode
DATA = "random", "real-like", "zeros", "ascending", "descending", "equal", "two values"
SMALLER = 64  # on the CPU presets have so many times fewer tokens, keys and selected keys
PRESETS = {
    "quick": "a few shapes of each kind",
    "prefill": "thousands of new tokens of one sequence",
    "decode": "one or two new tokens of 1 to 256 sequences",
    "ragged": "sequences of very different lengths, also together with prefill",
    "longcontext": "up to a million keys",
    "models": "decode and prefill with the parameters of mla_fp8.presets",
}


def _case(new: tuple[int, ...], keys: tuple[int, ...], num_heads: int = 64) -> Case:
    group = "topk" if max(new) > DECODE_TOKENS else "decode topk"
    if len(set(zip(new, keys, strict=True))) > 1:
        group = "mixed topk"
    return Case(group, num_heads, new, keys)


def _even(batch: int, new: int, keys: int, num_heads: int = 64) -> Case:
    return _case((new,) * batch, (keys,) * batch, num_heads)


def _ragged() -> list[Case]:
    lengths = ragged_lengths(48, 64, 131072)
    ones, chunk = (1,) * 48, ((512, 512), (16384, 4096))
    return [
        _case(ones, lengths),
        _case(tuple(min(64, n) for n in lengths), lengths),
        _case(*chunk),
        _case(ones + chunk[0], lengths + chunk[1]),
    ]


def _models() -> list[Case]:
    models = {n: m for n, m in vars(presets).items() if isinstance(m, presets.Preset)}
    shapes = _even(16, 1, 131072), _even(1, 4096, 65536)
    return [
        replace(
            shape,
            model=name,
            num_heads=model.num_heads,
            depth=model.depth,
            k=model.k,
            kpool=model.kpool,
            page_size=model.page_size,
        )
        for (name, model), shape in product(models.items(), shapes)
    ]


def preset(name: str, *, small: bool) -> list[Case]:
    """The cases of a preset; ``small``: for the CPU."""
    decode = (1, 32768), (1, 131072), (16, 131072), (64, 131072), (256, 32768)
    found = {
        "quick": lambda: [
            _even(1, 1, 131072),
            _even(16, 1, 131072),
            _even(1, 4096, 16384),
            _ragged()[0],
        ],
        "prefill": lambda: [
            _even(1, 4096, keys, heads) for heads in (64, 128) for keys in (16384, 65536, 131072)
        ],
        "decode": lambda: [
            *(_even(batch, 1, keys) for batch, keys in decode),
            _even(64, 2, 32768),
        ],
        "ragged": _ragged,
        "longcontext": lambda: [
            _even(1, 1, 1 << 20),
            _even(8, 1, 1 << 20),
            _even(1, 256, 1 << 20),
            _even(1, 1024, 1 << 18),
        ],
        "models": _models,
    }[name]()
    return [_smaller(case) for case in found] if small else found


def _smaller(case: Case) -> Case:
    new = tuple(max(1, t // SMALLER) for t in case.new)
    keys = tuple(max(t, n // SMALLER) for t, n in zip(new, case.keys, strict=True))
    return replace(case, new=new, keys=keys, k=case.k // SMALLER)


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise CommandError(f"{flag} must be a number, or several with commas; got {text}") from None


def one(
    *,
    heads: int = 64,
    depth: int = 128,
    k: int = 2048,
    kpool: int = 1,
    batch: int = 1,
    new: str = "1",
    keys: str = "131072",
    page: int = 64,
    data: str = "random",
) -> Case:
    """The case that flags describe: ``batch`` times the sequences of ``new`` and ``keys``.

    Raises
    ------
    CommandError
        If a flag is out of range.
    """
    check_int("--batch", batch, range(1, 1 << 16))
    check_int("--page", page, range(1, 1 << 16))
    check_int("--kpool", kpool, KPOOL_RANGE)
    if data not in DATA:
        raise CommandError(f"--data must be one of {', '.join(DATA)}; got {data}")
    tokens, lengths = _numbers("--new", new), _numbers("--keys", keys)
    count = max(len(tokens), len(lengths))
    tokens, lengths = (n * count if len(n) == 1 else n for n in (tokens, lengths))
    if len(tokens) != len(lengths):
        raise CommandError(
            f"--new must have as many numbers as --keys, or one; got {len(tokens)} and "
            f"{len(lengths)}"
        )
    for length, of_sequence in zip(lengths, tokens, strict=True):
        check_int("--keys", length, range(kpool, 1 << 24))
        check_int("--new", of_sequence, range(1, length + 1))
    shape = _case((*tokens,) * batch, (*lengths,) * batch, heads)
    case = replace(shape, depth=depth, k=k, kpool=kpool, page_size=page, data=data)
    try:
        operator(case)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None
    return case
