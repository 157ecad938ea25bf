"""The operators of `mla_fp8.torch_ops`, eager, compiled and captured, against the package."""

import doctest
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from generators import ARGUMENTS, Spec
from properties import POISON, same_bits

from mla_fp8 import index_scores as plain_scores
from mla_fp8 import index_topk as plain_topk
from mla_fp8 import select_topk as plain_select

# torch compiles through modules that warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")
SPEC = Spec((3, 1), (70, 130), num_heads=8, depth=64, k=20, fp8_dtype="uint8", index_dtype="int32")
OPTIONS = {
    "positions": {},
    "null": {"mask": "null"},
    "slots": {"output": "slots"},
    "both": {"output": "both"},
    "scores": {"return_scores": True, "sort": "score"},
    "all": {"output": "both", "return_scores": True},
    "pooled": {"kpool": 4},
    "shard": {"key_start": 1, "key_step": 2},
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: torch_ops NOT tested")


@pytest.fixture
def ops(torch):
    from mla_fp8 import torch_ops

    torch.compiler.reset()
    return torch_ops


def _backend(device: str) -> str:
    return "aot_eager" if device == "cpu" else "inductor"  # inductor needs a C++ compiler there


def _arguments(torch, device, spec=SPEC, bounds=True) -> list:
    """The arguments of a call; the maxima as a pair of integers, or None."""
    case = spec.build()
    arguments = [torch.from_numpy(getattr(case, name).copy()).to(device) for name in ARGUMENTS[:-1]]
    most = case.k_max_lengths[0].tolist() if bounds else None
    arguments[ARGUMENTS.index("k_max_lengths")] = most
    return [*arguments, case.layer_idx]


def _plain(arguments) -> list:
    """The same call for the functions of `mla_fp8`."""
    most = arguments[6]
    q, table, blocks = arguments[0], arguments[5], arguments[3]
    most = most or [len(q), table.shape[1] * blocks.shape[3]]
    return [*arguments[:6], np.array([most], np.int32), *arguments[7:]]


def _listed(results) -> list:
    return list(results) if isinstance(results, tuple) else [results]


def _assert_equal(found, want) -> None:
    found, want = _listed(found), _listed(want)
    assert len(found) == len(want)
    for ours, theirs in zip(found, want, strict=True):
        assert ours.device == theirs.device
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("bounds", [True, False], ids=["bounds", "no bounds"])
@pytest.mark.parametrize("name", OPTIONS)
def test_index_topk_is_that_of_the_package(name, bounds, device, torch, ops):
    arguments, options = _arguments(torch, device, bounds=bounds), OPTIONS[name]
    want = plain_topk(*_plain(arguments), k=SPEC.k, **options)
    _assert_equal(ops.index_topk(*arguments, k=SPEC.k, **options), want)
    out = tuple(torch.full_like(w, POISON) for w in _listed(want))
    out = out if len(out) > 1 else out[0]
    assert ops.index_topk(*arguments, k=SPEC.k, **options, out=out) is out
    _assert_equal(out, want)


@pytest.mark.parametrize("name", ["positions", "null", "pooled", "shard"])
def test_index_scores_is_that_of_the_package(name, device, torch, ops):
    arguments, options = _arguments(torch, device), OPTIONS[name]
    want = plain_scores(*_plain(arguments), **options)
    _assert_equal(ops.index_scores(*arguments, **options), want)
    out = torch.full_like(want, float("nan"))
    assert ops.index_scores(*arguments, **options, out=out) is out
    _assert_equal(out, want)


@pytest.mark.parametrize("options", [{}, {"sort": "score", "return_scores": True}])
def test_select_topk_is_that_of_the_package(options, device, torch, ops):
    scores = plain_scores(*_plain(_arguments(torch, device)))
    lengths = torch.tensor([5, 0, 70, 131], dtype=torch.int32, device=device)
    for given in (None, lengths):
        want = plain_select(scores, given, 7, **options)
        _assert_equal(ops.select_topk(scores, given, 7, **options), want)
        out = tuple(torch.full_like(w, POISON) for w in _listed(want))
        out = out if len(out) > 1 else out[0]
        assert ops.select_topk(scores, given, 7, **options, out=out) is out
        _assert_equal(out, want)


def test_lengths_gates_and_starts_in_their_other_forms(device, torch, ops):
    """Total lengths, no gates, a start of each sequence, and FP8 tensors instead of bytes."""
    arguments = _arguments(torch, device)
    new = arguments[2].diff().int()
    starts = torch.tensor([1, 0], dtype=torch.int32, device=device)
    options = {"k_total_lengths": arguments[4] + new, "key_start": starts, "key_step": 2, "k": 20}
    arguments[1] = arguments[4] = None
    for i in (0, 3):
        arguments[i] = arguments[i].view(torch.float8_e4m3fn)
    want = plain_topk(*_plain(arguments), **options)
    _assert_equal(ops.index_topk(*arguments, **options), want)
    options.pop("k")
    _assert_equal(
        ops.index_scores(*arguments, **options), plain_scores(*_plain(arguments), **options)
    )


def test_large_bounds_are_those_of_the_shapes(device, torch, ops):
    arguments = _arguments(torch, device, bounds=False)
    want = ops.index_scores(*arguments)
    arguments[6] = (2**31, 2**32 - 1)
    _assert_equal(ops.index_scores(*arguments), want)


# ---- registration


def _registered(torch, ops, device):
    """Each operator with arguments and options of its schema."""
    inputs = [*_arguments(torch, device), None, None]
    keys = {"mask": "causal", "kpool": 1, "key_start": 0, "key_step": 1, "check": None}
    topk = {"k": 20, "output": "both", "sort": "score", "return_scores": True, **keys}
    scores = torch.rand(4, 133, device=device)
    select = {"sort": "position", "return_scores": True, "check": None}
    indices = [torch.zeros(4, 20, dtype=torch.int32, device=device) for _ in range(2)]
    values = torch.zeros(4, 20, device=device)
    calls = torch.ops.mla_fp8
    return {
        "index_topk": (calls.index_topk, inputs, topk),
        "index_topk_out": (calls.index_topk_out, [[*indices, values], *inputs], topk),
        "index_scores": (calls.index_scores, inputs, keys),
        "index_scores_out": (calls.index_scores_out, [scores, *inputs], keys),
        "select_topk": (calls.select_topk, [scores, None, 20], select),
        "select_topk_out": (
            calls.select_topk_out,
            [[indices[0], values], scores, None, 20],
            select,
        ),
    }


NAMES = [
    name + out for name in ("index_topk", "index_scores", "select_topk") for out in ("", "_out")
]


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_registered_as_torch_asks(name, device, torch, ops):
    """Schema, aliases, and the shapes and dtypes of the fake kernel."""
    operator, arguments, options = _registered(torch, ops, device)[name]
    torch.library.opcheck(operator.default, tuple(arguments), options)


@pytest.mark.parametrize("name", OPTIONS)
def test_fake_kernels_know_the_shapes(name, torch, ops):
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments, options = _arguments(torch, "cpu"), OPTIONS[name]
    keys = {n: v for n, v in options.items() if n not in ("output", "sort", "return_scores")}
    want = [
        *_listed(ops.index_topk(*arguments, k=20, **options)),
        ops.index_scores(*arguments, **keys),
    ]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        found = [
            *_listed(ops.index_topk(*fakes, k=20, **options)),
            ops.index_scores(*fakes, **keys),
        ]
    for fake, real in zip(found, want, strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


# ---- the compiler and graphs


def _whole(ops, arguments, out=None):
    """A function of queries and gates around the operators, as a model has them."""
    rest = arguments[2:]

    def function(q, qs):
        qs = qs * 2 + 1  # torch's own work before and after
        slots = ops.index_topk(q, qs, *rest, k=20, output="slots", out=out)
        best = ops.select_topk(ops.index_scores(q, qs, *rest), None, 5)
        return slots + 1, best * 2

    return function


@pytest.mark.parametrize("with_out", [False, True], ids=["fresh", "out"])
def test_the_compiler_takes_a_whole_function(with_out, device, torch, ops):
    arguments = _arguments(torch, device)
    out = torch.zeros(4, 20, dtype=torch.int32, device=device) if with_out else None
    function = _whole(ops, arguments, out)
    compiled = torch.compile(function, fullgraph=True, backend=_backend(device))
    for q in (arguments[0], arguments[0].flip(0)):
        want = [x.clone() for x in function(q, arguments[1])]
        if with_out:
            out.zero_()
        _assert_equal(tuple(compiled(q, arguments[1])), tuple(want))
        if with_out:
            assert torch.equal(out + 1, want[0])


def test_the_compiler_takes_sizes_that_change(device, torch, ops):
    """Bounds, tokens and k become symbols: two compilations serve all sizes."""
    seen = []

    def count(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda *arguments, k: ops.index_topk(*arguments, k=k), fullgraph=True, backend=count
    )
    for i, lengths in enumerate([(3, 1), (5, 2), (4, 6), (7, 3)]):
        spec = Spec(**{**vars(SPEC), "seq_lens": lengths, "cache_lens": (70 + i, 130 + i)})
        arguments = _arguments(torch, device, spec)
        arguments[6] = tuple(arguments[6])
        k = 20 + i
        _assert_equal(compiled(*arguments, k=k), ops.index_topk(*arguments, k=k))
    assert len(seen) <= 3


@pytest.mark.gpu
def test_the_compiler_makes_graphs(cupy, torch, ops):
    """``mode="reduce-overhead"`` captures the operators, and their scratch memory, itself."""
    arguments = _arguments(torch, "cuda")
    function = _whole(ops, arguments)
    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for shift in range(6):
        q = arguments[0].roll(shift, 0)
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in compiled(q, arguments[1])]
        _assert_equal(tuple(found), tuple(function(q, arguments[1])))


LARGE = Spec((2048,), (14336,), num_heads=8, depth=64, k=64, fp8_dtype="uint8", index_dtype="int32")


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [SPEC, LARGE], ids=["small", "many launches"])
@pytest.mark.parametrize("name", ["index_topk", "index_scores", "select_topk"])
def test_graphs_capture_calls_without_a_workspace(name, spec, cupy, torch, ops):
    arguments = _arguments(torch, "cuda", spec)
    q, qs, *rest = arguments
    scores = torch.rand(4, 5000, device="cuda")
    call, here = {
        "index_topk": (lambda q: ops.index_topk(q, qs, *rest, k=64, sort="score"), q),
        "index_scores": (lambda q: ops.index_scores(q, qs, *rest), q),
        "select_topk": (lambda s: ops.select_topk(s, None, 64, sort="score"), scores),
    }[name]
    other = here.flip(0).clone()
    want = call(other)
    assert not torch.equal(call(here), want)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(here)
    filler = [torch.full_like(found, 7) for _ in range(8)]  # memory that others take meanwhile
    for _ in range(2):
        found.fill_(-2)
        here.copy_(other)
        graph.replay()
        assert torch.equal(found, want)
    assert all(bool((f == 7).all()) for f in filler)


# ---- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 0}, "k must"),
        ({"k": 70000}, "k must"),
        ({"mask": "none"}, "mask must"),
        ({"kpool": 0}, "kpool must"),
        ({"key_step": 0}, "key_step must"),
        ({"key_start": -1}, "key_start must"),
        ({"output": "pages"}, "output must"),
        ({"sort": "up"}, "sort must"),
        ({"out": "small"}, "out must"),
        ({"qs": "narrow"}, "qs must"),
        ({"k_max_lengths": (1, 2, 3)}, "k_max_lengths must"),
        ({"k_max_lengths": (-1, 2)}, "k_max_lengths must"),
        ({"layer_idx": 1}, "layer_idx must"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(changes, words, device, torch, ops):
    names = dict(zip(ARGUMENTS, _arguments(torch, device), strict=True))
    out = torch.full((4, 20), POISON, dtype=torch.int32, device=device)
    options = {"k": 20, "out": out} | names | changes
    if changes.get("qs"):
        options["qs"] = names["qs"][:, :-1].contiguous()
    if changes.get("out"):
        options["out"] = out[:, :-1]
    with pytest.raises((ValueError, TypeError), match=f"^{words}"):
        ops.index_topk(**options)
    assert (out == POISON).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kpool": 0}, "kpool must"),
        ({"key_step": 0}, "key_step must"),
        ({"k_lookup_table": 0}, "k_lookup_table must"),
        ({"k_blocks": 0}, "k_blocks must"),
        ({"q": (0, 0, 0)}, "q must"),
    ],
)
@pytest.mark.parametrize("bounds", [True, False])
def test_wrong_arguments_are_named_before_there_are_results(bounds, changes, words, torch, ops):
    names = dict(zip(ARGUMENTS, _arguments(torch, "cpu", bounds=bounds), strict=True))
    for name, change in changes.items():  # an array loses its first axes
        names[name] = names[name][change] if name in names else change
    with pytest.raises(ValueError, match=f"^{words}"):
        ops.index_scores(**names)
    if "q" in changes:
        with pytest.raises(ValueError, match=f"^{words}"):
            ops.index_topk(**names, k=3)


def test_negative_k_is_named(torch, ops):
    with pytest.raises(ValueError, match=r"^k must"):
        ops.index_topk(*_arguments(torch, "cpu"), k=-1)
    with pytest.raises(ValueError, match=r"^k must"):
        ops.select_topk(torch.zeros(3, 4), k=-1)


def test_key_start_may_be_a_tensor_without_axes(device, torch, ops):
    arguments = _arguments(torch, device)
    want = ops.index_scores(*arguments, key_start=3)
    assert same_bits(ops.index_scores(*arguments, key_start=torch.tensor(3)), want)
    for start in (torch.tensor(1.5), torch.tensor(3, device=device).float()):
        with pytest.raises((TypeError, ValueError), match=r"^key_start must"):
            ops.index_scores(*arguments, key_start=start)


def test_arrays_that_are_not_tensors_are_named(torch, ops):
    arguments = _arguments(torch, "cpu")
    arguments[0] = arguments[0].numpy()
    with pytest.raises((RuntimeError, TypeError), match="'q'"):
        ops.index_topk(*arguments, k=5)


def test_torch_is_imported_in_two_modules_alone():
    package = Path(plain_topk.__code__.co_filename).parent
    torch = re.compile(r"^ *(import|from) torch\b", re.MULTILINE)
    files = [path for path in package.rglob("*.py") if torch.search(path.read_text("utf-8"))]
    names = {path.relative_to(package).as_posix() for path in files}
    assert names == {"torch_ops.py", "compat/deep_gemm.py"}


def test_options_are_those_of_the_package(ops):
    """The arguments differ by ``workspace`` alone."""
    for ours, theirs in (
        (ops.index_topk, plain_topk),
        (ops.index_scores, plain_scores),
        (ops.select_topk, plain_select),
    ):
        names = [n for n in inspect.signature(theirs).parameters if n != "workspace"]
        assert list(inspect.signature(ours).parameters) == names


def test_examples_in_docstrings(ops):
    results = doctest.testmod(ops)
    assert results.failed == 0
    assert results.attempted > 10
