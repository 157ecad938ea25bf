"""As much of CuPy and NCCL as ranks use, without a GPU."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class StubOfArray(SimpleNamespace):
    """A piece of a GPU's memory."""

    def __init__(self) -> None:
        super().__init__(data=SimpleNamespace(ptr=64), nbytes=4)


class StubOfCuPy(SimpleNamespace):
    """As much of CuPy as a collective with a timeout uses, without a GPU."""

    def __init__(self, *, done: bool = True) -> None:
        stub, stub.recorded, stub.waited = self, [], []

        class Event:
            def __init__(self, disable_timing: bool) -> None:
                assert disable_timing

            def record(self, stream) -> None:
                stub.recorded.append(self)

            @property
            def done(self) -> bool:
                assert self in stub.recorded, "an event that was not recorded counts as done"
                return done

        self.nccl = SimpleNamespace(
            available=True,
            groupStart=lambda: None,
            groupEnd=lambda: None,
            get_unique_id=lambda: b"id",
        )
        stream = SimpleNamespace(ptr=0, wait_event=stub.waited.append)
        self.cuda = SimpleNamespace(
            nccl=self.nccl, Event=Event, Device=nullcontext, get_current_stream=lambda: stream
        )
        self.zeros = lambda *_: StubOfArray()

    def replace_cupy(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setitem(sys.modules, "cupy.cuda", self.cuda)


class StubOfNccl:
    """A communicator of NCCL; ``gather`` is what a collective does."""

    def __init__(self, gather, async_error=None) -> None:
        self.allGather, self._async_error = gather, async_error
        self.aborted, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def size(self):
        return 2

    def rank_id(self):
        return 1

    def check_async_error(self):
        if self._async_error:
            raise self._async_error

    def abort(self):
        self.aborted.set()
        self.may_end.wait(30)
