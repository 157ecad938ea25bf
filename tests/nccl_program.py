"""What each process with a GPU runs: ``python tests/nccl_program.py MODE``, see `MODES`.

The environment says which rank it is (`mla_fp8.distributed.rank_of_process`). The last line it
prints begins with "passed" or says what failed. A process ends even if threads of NCCL still wait.
"""

import os
import signal
import sys
import time
import traceback

import cupy
import numpy as np
from generators import Spec
from properties import same_bits
from sharding import SPECS, operator, shard_for, sharded

from mla_fp8.distributed import (
    index_topk_sharded,
    index_topk_split_rows,
    nccl_communicator,
    rank_of_process,
    split_rows_workspace,
)

BATCHES = 200
TIMEOUT = 4.0  # seconds, after which survivors give up
RANK, SIZE, LOCAL = rank_of_process()
LAST = RANK == SIZE - 1


def random_spec(number: int) -> Spec:
    """A ragged batch; few shapes of kernels, because each is compiled."""
    rng = np.random.default_rng(number)
    batch = int(rng.integers(1, 7))
    longest = int(rng.choice([5, 100, 3000]))
    most_new = int(rng.choice([1, 8, 150]))
    return Spec(
        tuple(map(int, rng.integers(0, most_new + 1, batch))),
        tuple(map(int, rng.integers(0, longest, batch))),
        num_heads=int(rng.choice([8, 64])),
        page_size=16,
        k=64,
        kpool=int(rng.choice([1, 1, 4])),
        mask=str(rng.choice(["causal", "null"])),
        values=str(rng.choice(["normal", "plateau", "negative_zero", "special_gates"])),
        index_dtype=str(rng.choice(["uint32", "int32"])),
        slack=(0, int(rng.choice([0, 5000]))),
        seed=number,
    )


def check_batch(comm, number: int) -> None:
    """Both ways to split a batch give the bits that this GPU gives alone."""
    case = random_spec(number).build()
    op, here = operator(case), case.to(cupy)
    options = {"sort": ("position", "score")[number % 2], "return_scores": True}
    want = op(*here.args, **options)
    options |= {"comm": comm, "check": number % 8 == 0, "timeout": (None, 60.0)[number // 2 % 2]}
    found = index_topk_split_rows(op, *here.args, **options)
    for name, ours, theirs in zip(("indices", "scores"), found, want, strict=True):
        assert same_bits(ours, theirs), f"{name} by rows, batch {number}: {case.spec}"
    for interleaved in (False, True):
        shard = shard_for(case, RANK, SIZE, interleaved)
        own = sharded(case, shard, seed=RANK).to(cupy)
        place = {"key_start": shard.start, "key_step": shard.step}
        found = index_topk_sharded(op, *own.args, **options, **place)
        for name, ours, theirs in zip(("indices", "scores"), found, want, strict=True):
            text = f"{name} by keys, interleaved {interleaved}, batch {number}: {case.spec}"
            assert same_bits(ours, theirs), text


def batches() -> None:
    """Many random batches."""
    comm = nccl_communicator()
    for number in range(BATCHES):
        check_batch(comm, number)
    print(f"passed: {BATCHES} batches on rank {RANK} of {SIZE}")


def graph() -> None:
    """Both functions in a CUDA graph, which is replayed on other queries."""
    comm = nccl_communicator()
    case = SPECS["random"].build()
    op, whole = operator(case), case.to(cupy)
    own = sharded(case, shard_for(case, RANK, SIZE, True), seed=RANK).to(cupy).replace(q=whole.q)
    place = {"key_start": RANK, "key_step": SIZE}
    memory = op.workspace(*own.args, **place, return_scores=True)
    rows = split_rows_workspace(op, *whole.args, comm=comm)
    calls = {
        "keys": lambda: index_topk_sharded(op, *own.args, **place, comm=comm, workspace=memory),
        "rows": lambda: index_topk_split_rows(op, *whole.args, comm=comm, workspace=rows),
    }
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.Device().synchronize()
    for name, call in calls.items():
        with stream, cupy.cuda.using_allocator(pool.malloc):
            call()
            stream.synchronize()
            stream.begin_capture()
            found = call()
            captured = stream.end_capture()
        for replay in range(3):
            whole.q[...] = cupy.roll(whole.q, 1 + replay, axis=1)
            cupy.cuda.Device().synchronize()
            captured.launch(stream)
            stream.synchronize()
            assert same_bits(found, op(*whole.args)), f"{name}, replay {replay}"
        del captured  # NCCL waits for it when the communicator is dropped
    print(f"passed: graphs on rank {RANK} of {SIZE}")


def _give_up(call) -> None:
    """The call raises after the timeout and says so; NCCL must not hold the process up."""
    begin = time.monotonic()
    try:
        call()
    except (TimeoutError, ConnectionError) as error:
        took = time.monotonic() - begin
        assert took < TIMEOUT + 20, f"{took} s"
        print(f"passed: {type(error).__name__} after {took:.1f} s: {error}")
        return
    raise AssertionError("there was no error")


def killed() -> None:
    """The last rank is killed between two calls."""
    comm = nccl_communicator()
    check_batch(comm, 0)
    cupy.cuda.Device().synchronize()
    if LAST:
        time.sleep(1)  # until the others have read what this rank sent
        print("passed: about to be killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    case = SPECS["random"].build()
    args = case.to(cupy).args
    _give_up(lambda: index_topk_split_rows(operator(case), *args, comm=comm, timeout=TIMEOUT))


def silent() -> None:
    """The last rank is there and never calls."""
    comm = nccl_communicator()
    if LAST:
        time.sleep(TIMEOUT + 4)
        print("passed: never called")
        return
    case = SPECS["random"].build()
    args = case.to(cupy).args
    given = {"comm": comm, "key_start": RANK, "key_step": SIZE, "timeout": TIMEOUT}
    _give_up(lambda: index_topk_sharded(operator(case), *args, **given))


def absent() -> None:
    """The last rank never comes to the meeting."""
    if LAST:
        print("passed: did not come")
        return
    _give_up(lambda: nccl_communicator(timeout=TIMEOUT))


def crowded() -> None:
    """All ranks use the same GPU, which NCCL refuses once they have met."""
    cupy.cuda.Device(0).use()
    _give_up(lambda: nccl_communicator(timeout=60))


MODES = {mode.__name__: mode for mode in (batches, graph, killed, silent, absent, crowded)}

if __name__ == "__main__":
    try:
        cupy.cuda.Device(LOCAL % cupy.cuda.runtime.getDeviceCount()).use()
        MODES[sys.argv[1]]()
        time.sleep(1)  # until other GPUs have read what this rank has sent
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        print(f"failed: {sys.argv[1]} on rank {RANK} of {SIZE}")
        status = 1
    sys.stdout.flush()
    os._exit(status)  # threads of NCCL may still wait for a rank
