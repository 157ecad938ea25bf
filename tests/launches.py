"""Calls of the CUDA backend without a GPU.

The host code runs unchanged, on stand-ins for CuPy, for the loaded kernels and for the driver's
launch function, which hands each launch to a `Machine`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
from compile_table import shape
from machine import (
    ADDRESS,
    ARRAYS,
    BLOCK_STRIDE,
    HERE,
    INDICES,
    LAYER,
    LAYER_STRIDE,
    MEMORY,
    POISON,
    SCALES_STRIDE,
    SCORES,
    SLOTS,
    VALUES,
    Machine,
)
from machine_batch import KEY_START, Batch

import mla_fp8
from mla_fp8._check.outputs import Selection
from mla_fp8._check.parameters import Output
from mla_fp8._check.problem import Problem
from mla_fp8._cuda import jit, stages
from mla_fp8._cuda.launch import Launch
from mla_fp8._cuda.params import PARAMS, struct_type
from mla_fp8._plan.kernel import Device, Kernel
from mla_fp8._plan.topk import TopkPlan
from mla_fp8._plan.tuning import Tuning
from mla_fp8._plan.workspace import Workspace

_machine: Machine  # of the call that is running
_captured: list[Callable[[], None]] | None = None  # what a capture under way has recorded


def _now_or_captured(step: Callable[[], None]) -> None:
    """What goes to a stream: a step of the machine, or of the graph that is captured."""
    step() if _captured is None else _captured.append(step)


class _Event:
    def __init__(self, **_: bool) -> None:
        self.machine: Machine | None = None


class _Stream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __enter__(self) -> None:
        _current.append(self)

    def __exit__(self, *_: object) -> None:
        _current.pop()

    def record(self, event: _Event) -> _Event:
        def step() -> None:
            event.machine, event.done = _machine, _machine.done[self.ptr]
            event.joined = self.ptr in _machine.joined

        _now_or_captured(step)
        return event

    def wait_event(self, event: _Event) -> None:
        def step() -> None:
            assert event.machine is _machine, "the event has not been recorded in this call"
            _machine.done[self.ptr] |= event.done
            _machine.joined |= {self.ptr} if event.joined else set()

        _now_or_captured(step)

    def is_capturing(self) -> bool:
        return self is _current[0] and _is_captured[0]

    def begin_capture(self, mode: int) -> None:
        global _captured
        assert mode == _THREAD_LOCAL
        _captured = []

    def end_capture(self) -> _Graph:
        global _captured
        steps, _captured = _captured, None
        return _Graph(self.ptr, steps)


_THREAD_LOCAL = 1
_current = [_Stream(HERE)]  # CuPy's current streams, the innermost last
_is_captured = [False]  # whether the caller captures its stream


class _Graph:
    """What was captured on a stream."""

    def __init__(self, ptr: int, steps: list[Callable[[], None]]) -> None:
        self.ptr, self.steps = ptr, steps

    def launch(self, stream: _Stream) -> None:
        """Run the steps after the work of the stream, which waits for them."""
        assert not stream.is_capturing()
        _machine.done[self.ptr] |= _machine.done[stream.ptr]
        _machine.joined.add(self.ptr)
        for step in self.steps:
            step()
        _machine.done[stream.ptr] |= _machine.done[self.ptr]


class _PoisonedLaunch(Launch):
    """A launch none of whose parameters is set yet."""

    def __init__(self, kernel: Kernel, device: Device, *, early: bool = False) -> None:
        super().__init__(kernel, device, early=early)
        ctypes.memset(self._memory, POISON[0], len(self._memory))


def _poisoned_struct(dtype: np.dtype) -> type:
    struct = struct_type(dtype)
    return lambda: struct.from_buffer_copy(POISON * ctypes.sizeof(struct))


@cache
def _backend() -> ModuleType:
    """`mla_fp8._cuda.backend` on a stand-in for CuPy, beside the real one."""
    handles = map(_Stream, itertools.count(HERE + 1))
    runtime = SimpleNamespace(streamCaptureModeThreadLocal=_THREAD_LOCAL)
    cuda = SimpleNamespace(
        Device=lambda ordinal: _Ordinal(id=ordinal),
        Event=_Event,
        get_current_stream=lambda: _current[-1],
        runtime=runtime,
    )
    modules = {"cupy": SimpleNamespace(cuda=cuda)}
    for name in ("pipeline", "bound", "backend"):
        path = f"{mla_fp8.__path__[0]}/_cuda/{name}.py"
        spec = importlib.util.spec_from_file_location(f"mla_fp8._cuda.{name}_without_cupy", path)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, modules):
            spec.loader.exec_module(module)
        modules[f"mla_fp8._cuda.{name}"] = module
    for name in ("pipeline", "bound"):
        modules[f"mla_fp8._cuda.{name}"].new_stream = lambda: next(handles)
    module.device_facts = _DEVICES.__getitem__
    return module


_DEVICES: dict[int, Device] = {}  # by ordinal
_KERNELS: list[Kernel] = []  # by handle


def _load(kernel: Kernel, arch: str, ordinal: int) -> SimpleNamespace:
    _KERNELS.append(kernel)
    return SimpleNamespace(kernel=SimpleNamespace(ptr=len(_KERNELS) - 1))


def _launch(config, function, parameters: int, extra: int) -> tuple[int]:
    """In place of ``cuLaunchKernelEx``."""
    _machine.driver_calls += 1
    kernel = _KERNELS[int(function)]
    address = ctypes.c_void_p.from_address(parameters).value
    raw = ctypes.string_at(address, PARAMS[kernel.template].dtype.itemsize)
    assert (config.blockDimX, config.sharedMemBytes) == (kernel.threads, kernel.shared_bytes)
    where = config.gridDimX, int(config.hStream)
    _now_or_captured(lambda: _machine.launch(kernel, raw, *where))
    return (0,)


@contextmanager
def _running(batch: Batch, device: Device) -> Iterator[Machine]:
    """The backend's launches go to the machine."""
    from cuda.bindings import driver

    global _machine
    _machine = Machine(batch, device)
    _machine.driver_calls = 0
    _DEVICES[device.ordinal] = device
    with (
        mock.patch.object(driver, "cuLaunchKernelEx", _launch),
        mock.patch.object(jit, "load", _load),
        mock.patch.object(stages, "Launch", _PoisonedLaunch),
        mock.patch.object(stages, "struct_type", _poisoned_struct),
        mock.patch.object(stages, "tensor_map", return_value=(ctypes.c_uint64 * 16)()),
    ):
        yield _machine
    _machine.assert_ordered()


class _Ordinal(SimpleNamespace):
    """In place of a CuPy device."""

    def __enter__(self) -> _Ordinal:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _array(address: int, ordinal: int = 0, **more: object) -> SimpleNamespace:
    """In place of an array at an address."""
    data = SimpleNamespace(ptr=address)
    return SimpleNamespace(data=data, device=_Ordinal(id=ordinal), **{"size": 1, **more})


def _selection(
    k: int,
    by_score: bool,
    values: bool,
    memory: int | None,
    size: int,
    output: Output = Output.POSITIONS,
) -> Selection:
    scores = _array(VALUES) if values else None
    slots = _array(SLOTS) if output is Output.BOTH else None
    workspace = _array(memory, size=size) if memory else None
    return Selection(k, by_score, _array(INDICES), scores, workspace, output, slots)


def _problem(batch: Batch, device: Device) -> Problem:
    strides = {
        "k_blocks": (BLOCK_STRIDE, BLOCK_STRIDE, LAYER_STRIDE),
        "k_scales": (SCALES_STRIDE, SCALES_STRIDE, LAYER_STRIDE),
    }
    arrays = {
        name: _array(ADDRESS[name], ordinal=device.ordinal, strides=strides.get(name))
        for name in ARRAYS
    }
    if batch.starts is None:
        arrays["key_starts"] = None
    key_start = KEY_START if batch.shape.sharded and batch.starts is None else 0
    return Problem(batch.shape, None, LAYER, key_start, arrays, *arrays.values())


def run_topk(
    batch: Batch,
    k: int,
    by_score: bool,
    values: bool,
    device: Device,
    tuning: Tuning,
    memory: int | None = MEMORY,
    output: Output = Output.POSITIONS,
) -> tuple[Machine, TopkPlan]:
    """The launches of the whole operation on a batch, and their plan.

    ``memory``: where the workspace is; None: the call allocates it.
    """
    problem, backend = _problem(batch, device), _backend()
    with _running(batch, device) as machine:
        plan = backend.topk_plan(problem, k, by_score, values, tuning, output)
        selection = _selection(k, by_score, values, memory, plan.workspace.size, output)
        backend.index_topk(problem, selection, tuning)
    return machine, plan


def run_bound(
    batch: Batch,
    k: int,
    by_score: bool,
    values: bool,
    device: Device,
    tuning: Tuning,
    output: Output = Output.POSITIONS,
    *,
    captured: bool = False,
) -> list[Machine]:
    """The launches of `run_topk` and those of two bound calls, which may be captured."""
    problem, backend = _problem(batch, device), _backend()
    machine, plan = run_topk(batch, k, by_score, values, device, tuning, output=output)
    selection = _selection(k, by_score, values, MEMORY, plan.workspace.size, output)
    machines = [machine]
    with _running(batch, device) as machine:
        call = backend.bind_topk(problem, selection, tuning)
        assert not machine.blocks, "binding launches nothing"
    for _ in range(2):
        with _running(batch, device) as machine, mock.patch.object(jit, "load", None):
            _is_captured[0] = captured
            try:
                call()
            finally:
                _is_captured[0] = False
        assert machine.driver_calls == (len(machine.blocks) if captured else 0)
        machines.append(machine)
    return machines


def run_scores(batch: Batch, device: Device) -> tuple[Machine, Workspace]:
    """The launches that write all scores of a batch to `SCORES`, and their workspace."""
    problem, backend = _problem(batch, device), _backend()
    with _running(batch, device) as machine:
        workspace = backend.plan_scores(batch.shape, device, backend.H200).lay_out()
        backend.index_scores(problem, _array(SCORES), _array(MEMORY, size=workspace.size))
    return machine, workspace


def run_select(
    rows: int, columns: int, k: int, by_score: bool, values: bool, device: Device
) -> tuple[Machine, Workspace]:
    """The launches that select from a caller's rows at `SCORES`, and their workspace."""
    s = shape(total_seq_len=rows, batch=1, max_keys=columns, causal=False, signed_lengths=True)
    batch = Batch(s, np.array([0, rows], np.uint32), np.array([columns], np.int32))
    scores = _array(SCORES, shape=(rows, columns), ordinal=device.ordinal)
    lengths = _array(ADDRESS["k_cache_lengths"], dtype=np.dtype(np.int32))
    backend = _backend()
    with _running(batch, device) as machine:
        size = backend.select_workspace_bytes(scores, lengths, k, by_score, values)
        selection = _selection(k, by_score, values, MEMORY, size)
        backend.select_topk(scores, lengths, selection)
        workspace = backend._select_workspace(rows, columns, k, by_score, values)
    return machine, workspace


def regions(workspace: Workspace, memory: int = MEMORY, **results: tuple[int, int]):
    """Memory that may be used, by name: the parts of a workspace, and results (start, size)."""
    w = workspace
    starts = [(name, getattr(w, name)) for name in ("token_rows", "work_ranges", "windows")]
    starts += [("scores", start) for start in w.scores]
    starts += [("values", w.values), *(("spare", start) for start in w.spare)]
    ends = [start for _, start in starts[1:]] + [w.size]
    found = [
        (n, memory + start, memory + end) for (n, start), end in zip(starts, ends, strict=True)
    ]
    return found + [(name, start, start + size) for name, (start, size) in results.items()]


def run_topk_without_memory(batch: Batch, k: int, device: Device, tuning: Tuning) -> None:
    """A call whose workspace the GPU has no room for; it must launch nothing."""

    def refuse(size: int) -> None:
        raise MemoryError(f"{size} are too many")

    with mock.patch.object(_backend().cupy.cuda, "alloc", refuse, create=True):
        try:
            run_topk(batch, k, True, False, device, tuning, memory=None)
        finally:
            assert not _machine.blocks
