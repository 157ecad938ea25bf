"""Arrays of other libraries, by DLPack and by __cuda_array_interface__, in and out."""

import os

import ml_dtypes
import numpy as np
import pytest
from generators import ARGUMENTS, FP8, Case, Spec
from properties import POISON, assert_helpful, same_bits

from mla_fp8 import (
    MLAIndexerRaggedFloat8Paged,
    PagedKeyCache,
    fp8,
    index_scores,
    index_topk,
    select_topk,
)

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the whole GPU
SPEC = Spec((3, 1), (40, 90), num_heads=4, depth=64, page_size=16, k=20, fp8_dtype="uint8")


class OnlyDLPack:
    """Nothing but the two methods of the protocol."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnlyCudaArrayInterface:
    def __init__(self, array):
        self._array = array  # keeps the memory alive
        self.__cuda_array_interface__ = array.__cuda_array_interface__


def _wrapped(here: Case, wrap) -> list:
    return [wrap(getattr(here, name)) for name in ARGUMENTS[:-1]] + [here.layer_idx]


def _assert_same_answers(arguments, xp, kind=None) -> None:
    """The operation and the functions answer as for ``xp``, in arrays of type ``kind``."""
    kind = kind or xp.ndarray
    case = SPEC.build()
    here, op = case.to(xp, device_max_lengths=True), MLAIndexerRaggedFloat8Paged(**case.params)
    for ours, theirs in zip(
        op(*arguments, return_scores=True), op(*here.args, return_scores=True), strict=True
    ):
        assert isinstance(ours, kind)
        assert same_bits(ours, theirs)
    named = dict(zip(ARGUMENTS, arguments, strict=True))
    for ours, theirs in (
        (op(**named, workspace=op.workspace(*arguments)), op(*here.args)),
        (index_topk(*arguments, k=7, sort="score"), index_topk(*here.args, k=7, sort="score")),
        (index_scores(*arguments), index_scores(*here.args)),
        (select_topk(named["qs"], None, 3), select_topk(here.qs, None, 3)),
    ):
        assert isinstance(ours, kind)
        assert same_bits(ours, theirs)
    out = xp.full((case.tokens, SPEC.k), POISON, np.int32)
    op.execute(out, *arguments)
    assert same_bits(out, op(*here.args))


def test_dlpack_alone(xp):
    here = SPEC.build().to(xp, device_max_lengths=True)
    _assert_same_answers(_wrapped(here, OnlyDLPack), xp)
    scores = xp.asarray(np.random.default_rng(0).random((2, 50), np.float32))
    assert same_bits(select_topk(OnlyDLPack(scores), None, 5), select_topk(scores, None, 5))


class WithDtype(OnlyDLPack):
    """A library whose words for dtypes are its own."""

    def __init__(self, array):
        super().__init__(array)
        self.dtype = f"<dtype: '{array.dtype}'>"


def test_dtypes_in_words_of_their_own(xp):
    here = SPEC.build().to(xp, device_max_lengths=True)
    _assert_same_answers(_wrapped(here, WithDtype), xp)


@pytest.mark.gpu
def test_cuda_array_interface_alone(cupy):
    here = SPEC.build().to(cupy, device_max_lengths=True)
    _assert_same_answers(_wrapped(here, OnlyCudaArrayInterface), cupy)


@pytest.mark.gpu
@pytest.mark.parametrize("wrap", [OnlyDLPack, OnlyCudaArrayInterface])
def test_outputs_of_other_libraries(wrap, cupy):
    case = SPEC.build()
    here, op = case.to(cupy), MLAIndexerRaggedFloat8Paged(**case.params)
    memory = cupy.full((case.tokens, SPEC.k), POISON, np.int32)
    out = wrap(memory)
    assert op(*here.args, out=out) is out
    assert same_bits(memory, op(*here.args))


@pytest.mark.parametrize("wrap", [OnlyDLPack])
def test_wrong_foreign_arrays_are_named(wrap, xp):
    here = SPEC.build().to(xp, device_max_lengths=True)
    arguments = _wrapped(here.replace(qs=here.qs[:, :-1].copy()), wrap)
    with pytest.raises(ValueError, match="qs") as caught:
        index_topk(*arguments, k=5)
    assert_helpful(caught.value, "qs", "(4, 3)")


def _torch_arguments(torch, device: str, float8: bool) -> list:
    case = SPEC.build()
    tensors = [torch.from_numpy(getattr(case, name).copy()) for name in ARGUMENTS[:-1]]
    if float8:
        tensors = [t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for t in tensors]
    return [tensor.to(device) for tensor in tensors] + [case.layer_idx]


def _check_torch(torch, device: str, float8: bool, xp) -> None:
    case = SPEC.build()
    arguments = _torch_arguments(torch, device, float8)
    _assert_same_answers(arguments, xp, torch.Tensor)

    op = MLAIndexerRaggedFloat8Paged(**case.params)
    for result in (op(*arguments), op.workspace(*arguments)):
        assert isinstance(result, torch.Tensor)
        assert result.device == arguments[0].device
    want = op(*case.to(xp).args, return_scores=True)
    shape = (case.tokens, SPEC.k)
    indices = torch.full(shape, POISON, dtype=torch.int32, device=device)
    scores = torch.zeros(shape, dtype=torch.float32, device=device)
    assert op(*arguments, out=indices) is indices
    assert same_bits(indices.cpu().numpy(), want[0])
    indices.fill_(POISON)
    given = op(*arguments, out=(indices, scores), return_scores=True)
    assert given[0] is indices
    assert given[1] is scores
    for tensor, array in zip(given, want, strict=True):
        assert same_bits(tensor.cpu().numpy(), array)
    with pytest.raises(ValueError, match=r"q must .*contiguous"):
        op(arguments[0].transpose(0, 1).contiguous().transpose(0, 1), *arguments[1:])


@pytest.mark.parametrize("float8", [False, True], ids=["uint8", "float8"])
def test_torch_on_the_host(float8):
    torch = pytest.importorskip("torch")
    _check_torch(torch, "cpu", float8, np)


@pytest.mark.gpu
@pytest.mark.parametrize("float8", [False, True], ids=["uint8", "float8"])
def test_torch_on_the_gpu(float8, cupy):
    torch = pytest.importorskip("torch")
    _check_torch(torch, "cuda", float8, cupy)


@pytest.mark.parametrize(
    "change",
    [
        lambda torch, t: t.requires_grad_(),
        lambda torch, t: t.to_sparse(),
        lambda torch, t: t.to("meta"),
        lambda torch, t: t.bfloat16(),
    ],
    ids=["requires_grad", "sparse", "meta", "bfloat16"],
)
def test_torch_tensors_without_readable_floats_are_named(change):
    """torch's own complaint does not say which argument it is about."""
    torch = pytest.importorskip("torch")
    arguments = _torch_arguments(torch, "cpu", float8=False)
    arguments[1] = change(torch, arguments[1])
    with pytest.raises((TypeError, ValueError)) as caught:
        index_topk(*arguments, k=5)
    assert_helpful(caught.value, "qs")


def _check_jax(jax, device, float8: bool, xp) -> None:
    case = SPEC.build()
    arguments = [
        jax.device_put(
            array.view(FP8) if float8 and array.dtype == np.uint8 else array.copy(), device
        )
        for array in case.args[:-1]
    ]
    _assert_same_answers([*arguments, case.layer_idx], xp, jax.Array)
    assert index_topk(*arguments, case.layer_idx, k=3).devices() == {device}


@pytest.mark.parametrize("float8", [False, True], ids=["uint8", "float8"])
def test_jax_on_the_host(float8):
    jax = pytest.importorskip("jax")
    _check_jax(jax, jax.devices("cpu")[0], float8, np)


@pytest.mark.gpu
@pytest.mark.parametrize("float8", [False, True], ids=["uint8", "float8"])
def test_jax_on_the_gpu(float8, cupy):
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA: {error}")
    with cupy.cuda.Stream(non_blocking=True):
        _check_jax(jax, device, float8, cupy)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # Numba's own, on the way to its first array
@pytest.mark.parametrize("bound", [False, True], ids=["default stream", "own stream"])
def test_numba_on_the_gpu(bound, cupy):
    """An array that is bound to a stream is used on that."""
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("this Numba finds no GPU")
    case = SPEC.build()
    stream = cuda.stream() if bound else 0
    arrays = [cuda.to_device(array, stream=stream) for array in case.args[:-1]]
    _assert_same_answers([*arrays, case.layer_idx], cupy, type(arrays[0]))
    if bound:
        assert int(index_topk(*arrays, case.layer_idx, k=3).stream) == int(stream)


def _check_fp8(x, like, kind, float8_dtype: str) -> None:
    """`fp8` on ``x`` gives what it gives on ``like``, in arrays of type ``kind``."""
    for ours, theirs in zip(fp8.quantize(x, 32), fp8.quantize(like, 32), strict=True):
        assert isinstance(ours, kind)
        if ours.dtype == theirs.dtype:
            assert same_bits(ours, theirs)
    values, scales = fp8.quantize(x, 32)
    assert str(values.dtype) == float8_dtype
    assert same_bits(fp8.dequantize(values, scales), fp8.dequantize(*fp8.quantize(like, 32)))
    assert same_bits(fp8.encode(x), fp8.encode(like))
    assert same_bits(fp8.decode(values), fp8.decode(fp8.quantize(like, 32)[0]))
    for result in (fp8.dequantize(values, scales), fp8.encode(x), fp8.decode(values)):
        assert isinstance(result, kind)
    assert same_bits(
        PagedKeyCache.from_dense([x]).k_scales, PagedKeyCache.from_dense([like]).k_scales
    )


_FLOATS = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
_ROUNDED = _FLOATS.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_fp8_of_bfloat16_in_numpy():
    _check_fp8(_FLOATS.astype(ml_dtypes.bfloat16), _ROUNDED, np.ndarray, "float8_e4m3fn")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_in_torch(dtype, device, request):
    torch = pytest.importorskip("torch")
    if device == "cuda":
        request.getfixturevalue("cupy")
    x = torch.from_numpy(_ROUNDED).to(device, getattr(torch, dtype))
    like = _ROUNDED
    _check_fp8(x, like, torch.Tensor, "torch.float8_e4m3fn")
    with pytest.raises(TypeError, match=r"x must be an array.*grad"):
        fp8.quantize(x.requires_grad_())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_in_jax(dtype):
    jax = pytest.importorskip("jax")
    x = jax.device_put(_ROUNDED, jax.devices("cpu")[0]).astype(dtype)
    _check_fp8(x, _ROUNDED, jax.Array, "float8_e4m3fn")
