"""Arrays of other libraries, by DLPack and by __cuda_array_interface__."""

import numpy as np
import pytest
from generators import ARGUMENTS, FP8, Case, Spec
from properties import POISON, assert_helpful, host, same_bits

from mla_fp8 import MLAIndexerRaggedFloat8Paged, index_scores, index_topk, select_topk

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


def _assert_same_answers(arguments, xp) -> None:
    """The operation and the functions, given wrapped arrays, answer in their own library."""
    case = SPEC.build()
    here, op = case.to(xp, device_max_lengths=True), MLAIndexerRaggedFloat8Paged(**case.params)
    for ours, theirs in zip(
        op(*arguments, return_scores=True), op(*here.args, return_scores=True), strict=True
    ):
        assert isinstance(ours, xp.ndarray)
        assert same_bits(ours, theirs)
    out = xp.full((case.tokens, SPEC.k), POISON, np.int32)
    op.execute(out, *arguments)
    assert same_bits(out, op(*here.args))
    assert same_bits(index_scores(*arguments), index_scores(*here.args))


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
    _assert_same_answers(arguments, xp)

    op = MLAIndexerRaggedFloat8Paged(**case.params)
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


@pytest.mark.parametrize("float8", [False, True], ids=["uint8", "float8"])
def test_jax_on_the_host(float8):
    jax = pytest.importorskip("jax")
    case = SPEC.build()
    with jax.default_device(jax.devices("cpu")[0]):
        arguments = [
            jax.numpy.asarray(array.view(FP8) if float8 and array.dtype == np.uint8 else array)
            for array in map(host, case.args[:-1])
        ]
    _assert_same_answers([*arguments, case.layer_idx], np)
