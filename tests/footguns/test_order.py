"""Traps: threads, streams, processes, and the order in which things live and die."""

from __future__ import annotations

import contextvars
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import (
    EMULATED,
    ROOT,
    Backend,
    eagerly,
    equal,
    info,
    is_ours,
    on,
    outcome,
    replays,
    same_as_eager,
)
from tests.models import Net

# Whether we tell of a trap is asked only by tests that say so.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Runs each in a thread of its own, with the switches of this one; returns their outcomes."""
    done: list[Any] = [None] * len(functions)

    def work(index: int) -> None:
        with torch.no_grad():
            done[index] = outcome(functions[index])

    contexts = [contextvars.copy_context() for _ in functions]
    threads = [
        threading.Thread(target=context.run, args=(work, index), daemon=True)
        for index, context in enumerate(contexts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hangs"
    return done


def call_in_rounds(
    which: int, model: Any, gate: threading.Barrier, device: torch.device, *, copied: bool
) -> None:
    """All call at once; each looks at what it got while nobody calls, as reading alone is no trap."""
    for step in range(30):
        x = torch.full((1 + (step + which) % 4, 8), float(which * 100 + step), device=device)
        gate.wait(30)
        out = model(x)
        gate.wait(30)
        got = outcome(out.clone)
        if copied or not is_ours(got):
            equal(got, eagerly(model, x))


@pytest.mark.parametrize("stale", ["error", "copy"])
def test_threads_call_one_module(backend: Backend, stale: Any) -> None:
    """One fills the static input while the other's replay reads it; the first calls meet, too."""
    model = cuda_graphed(Net(backend.device), sizes=(1, 2, 4), stale=stale, pool=backend.pool())
    gate, copied = threading.Barrier(4), stale == "copy"
    work = [
        partial(call_in_rounds, which, model, gate, backend.device, copied=copied) for which in range(4)
    ]
    assert in_threads(*work) == [None] * 4
    told = info(model)  # while another thread holds an output, a call runs eagerly
    assert told.hits > 4
    assert told.hits + told.misses == told.calls


@pytest.mark.parametrize("stale", ["error", "copy"])
def test_threads_call_modules_of_one_pool(backend: Backend, stale: Any) -> None:
    """Graphs of one memory may not run at the same time, whichever modules they belong to."""
    pool, gate, copied = backend.pool(), threading.Barrier(3), stale == "copy"
    models = [cuda_graphed(Net(backend.device), sizes=(2, 4), stale=stale, pool=pool) for _ in range(3)]
    work = [
        partial(call_in_rounds, which, model, gate, backend.device, copied=copied)
        for which, model in enumerate(models)
    ]
    assert in_threads(*work) == [None] * 3
    assert all(info(model).hits >= 10 for model in models)


def test_another_thread_works_eagerly_while_this_one_captures(backend: Backend) -> None:
    """The other thread's operations end in the graph, and its allocations in the pool."""
    stop = threading.Event()
    wrong: list[int] = []

    def background() -> None:
        while not stop.is_set():
            a = torch.full((16, 16), 3.0, device=backend.device)
            if (a @ a)[0, 0].item() != 144:
                wrong.append(1)

    def capture() -> None:
        try:
            for _ in range(6):
                same_as_eager(cuda_graphed(Net(backend.device), sizes=(1, 2, 4)), backend.randn(3, 8))
        finally:
            stop.set()

    assert in_threads(background, capture) == [None] * 2
    assert not wrong


def test_another_thread_holds_an_output(backend: Backend) -> None:
    """This thread's replay overwrites the output while the other one reads it."""
    model = cuda_graphed(lambda x: x * 2, sizes=(2,), pool=backend.pool())
    x = backend.randn(2, 8)
    replays(model, x)
    held, overwritten = threading.Event(), threading.Event()

    def holds() -> Any:
        out = model(x)
        held.set()
        assert overwritten.wait(30)
        return outcome(out.clone)

    def overwrites() -> None:
        assert held.wait(30)
        equal(model(x + 1), (x + 1) * 2)
        overwritten.set()

    got, done = in_threads(holds, overwrites)
    assert done is None
    assert is_ours(got) or torch.equal(got, x * 2), got


def test_another_thread_goes_on_holding_outputs(backend: Backend) -> None:
    """The graphs of this thread share a lane with them, and would never run again."""
    pool, x = backend.pool(), backend.randn(2, 8)
    theirs, mine = (cuda_graphed(Net(backend.device), sizes=(2,), pool=pool) for _ in range(2))
    replays(theirs, x)
    replays(mine, x)
    held: list[Tensor] = []
    in_threads(lambda: held.append(theirs(x)))
    before = info(mine).hits
    for _ in range(10):
        equal(mine(x), eagerly(mine, x))
    assert info(mine).hits == before + 5, info(mine)
    equal(held[0], eagerly(theirs, x))


def test_a_thread_without_the_switches_of_this_one(backend: Backend, net: Net, x: Tensor) -> None:
    """A replay returns no gradients where that thread needs them: grad mode is a thread's own."""
    replays(net, x)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(net(x)))
    thread.start()
    thread.join()
    assert results[0].requires_grad
    equal(results[0].detach(), eagerly(net, x))


@on("cuda", "cuda-portable")
def test_stream_changes_between_two_calls(backend: Backend, net: Net) -> None:
    """Two replays of one memory run at once."""
    side = torch.cuda.Stream()
    x = backend.randn(2, 8)
    replays(net, x)
    for step in range(20):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if step % 2 else torch.cuda.default_stream()):
            torch.cuda._sleep(1_000_000)
            given = torch.full((2, 8), float(step), device=backend.device)
            got = net(given).clone()
        torch.cuda.synchronize()
        equal(got, eagerly(net, given))
    assert info(net).hits >= 20


@on("cuda", "cuda-portable")
def test_input_is_made_on_a_side_stream(backend: Backend, net: Net) -> None:
    """The input is copied on the stream of the call, which has to wait for the caller's event."""
    side = torch.cuda.Stream()
    replays(net, backend.randn(2, 8))
    for step in range(10):
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)
            x = torch.full((2, 8), float(step), device=backend.device)
        torch.cuda.current_stream().wait_stream(side)
        equal(net(x), eagerly(net, x))


@on("cuda", "cuda-portable")
def test_a_side_stream_still_reads_the_last_output(backend: Backend, net: Net) -> None:
    """The next replay overwrites the output, unless the caller waits for the side stream."""
    side = torch.cuda.Stream()
    x = backend.randn(2, 8)
    replays(net, x)
    for step in range(10):
        given = torch.full((2, 8), float(step), device=backend.device)
        out = net(given)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)
            got = out.clone()
        torch.cuda.current_stream().wait_stream(side)
        del out
        net(x)
        torch.cuda.synchronize()
        equal(got, eagerly(net, given))


@on("cuda", "cuda-portable")
def test_forward_uses_side_streams(backend: Backend) -> None:
    """Streams that are forked and joined by events are captured."""
    side = torch.cuda.Stream()

    def forward(x: Tensor) -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 2
        z = x + 1
        torch.cuda.current_stream().wait_stream(side)
        return y + z

    model = cuda_graphed(forward, sizes=(2, 4))
    for batch in (4, 3, 2, 3):
        same_as_eager(model, backend.randn(batch, 8))


def child_returns(work: Callable[[], bool], seconds: float = 30) -> int:
    """Forks, runs `work` in the child, and returns its exit code: 0 where it returned True."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and forks, from 3.12 on
        pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    for _ in range(int(seconds * 50)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def agrees(model: Any, x: Tensor) -> bool:
    got = outcome(model, x)
    return is_ours(got) or torch.allclose(got, eagerly(model, x), atol=1e-5)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@EMULATED
@needs_fork
def test_process_forks(backend: Backend, net: Net, x: Tensor) -> None:
    """The child has the parent's graphs, and memory of its own. Data loaders fork."""
    replays(net, x)
    assert child_returns(lambda: all(agrees(net, backend.randn(b, 8)) for b in (2, 4, 3, 2))) == 0
    replays(net, x)


@EMULATED
@needs_fork
def test_fork_child_captures(backend: Backend, net: Net, x: Tensor) -> None:
    """The child captures on the parent's device state."""
    other = cuda_graphed(Net(backend.device), sizes=(2,))
    replays(other, x)
    assert child_returns(lambda: all(agrees(net, backend.randn(b, 8)) for b in (2, 4, 3, 2))) == 0
    replays(net, x)


@EMULATED
@needs_fork
def test_process_forks_while_another_thread_holds_the_pool(backend: Backend, x: Tensor) -> None:
    """The child copies a held lock that nobody lets go, so a fork has to wait for it."""
    pool = backend.pool()
    model = cuda_graphed(Net(backend.device), sizes=(2,), pool=pool)
    replays(model, x)
    held = threading.Event()

    def holds() -> None:
        with pool.lock:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=holds, daemon=True)
    thread.start()
    assert held.wait(10)
    assert child_returns(lambda: agrees(model, x), 15) == 0
    thread.join()
    replays(model, x)


def run_script(backend: Backend, code: str) -> subprocess.CompletedProcess[str]:
    cuda = backend.device.type == "cuda"
    portable = backend.launch == "torch"
    switches = {"GRAPHCACHE_EMULATE": "01"[not cuda], "GRAPHCACHE_PORTABLE": "01"[portable]}
    start = f"import torch, graphcache\nfrom torch import nn\ndevice = {str(backend.device)!r}\n"
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=ROOT,
        env=os.environ | switches,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


SCRIPT = """
torch.set_grad_enabled(False)
model = graphcache.cuda_graphed(nn.Linear(8, 8).to(device), sizes=(2, 4))
x = torch.randn(2, 8, device=device)
out = [model(x) for _ in range(3 if FIRST else 6)][-1]
assert model.forward.cache_info().hits >= 2, model.forward.cache_info().eager
print("fine")
"""


@pytest.mark.programs
def test_first_call_of_a_process(backend: Backend) -> None:
    """Libraries are imported, and initialise themselves, in the middle of the capture."""
    done = run_script(backend, "FIRST = True" + SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@pytest.mark.programs
def test_process_exits_with_live_graphs(backend: Backend) -> None:
    """Graphs are destroyed after the driver is gone: a crash, or a hang, at exit."""
    done = run_script(backend, "FIRST = False" + SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_module_is_deleted_while_its_output_is_held(backend: Backend) -> None:
    """The graph's memory goes with it, and the next module gets it."""
    pool, x = backend.pool(), backend.randn(2, 8)
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), pool=pool)
    replays(model, x)
    want, out = eagerly(model, x), model(x)
    del model
    gc.collect()
    equal(out, want)
    for _ in range(3):
        other = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), pool=pool)
        replays(other, backend.randn(2, 8))
        del other
        gc.collect()
        got = outcome(out.clone)
        assert is_ours(got) or torch.equal(got, want)


@pytest.mark.parametrize("what", ["clear", "trim", "drop"])
def test_a_pool_is_cleared_while_outputs_are_held(backend: Backend, what: str) -> None:
    """Held outputs read memory that was given back, or that belongs to others by now."""
    pool, x = backend.pool(), backend.randn(2, 8)
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), pool=pool)
    replays(model, x)
    want, out = eagerly(model, x), model(x)
    if what == "clear":
        model.forward.cache_clear()
    elif what == "trim":
        pool.trim()
    else:
        del model, pool
    gc.collect()
    litter = [torch.full((2, 8), 9.0, device=backend.device) for _ in range(64)]
    got = outcome(out.clone)
    assert is_ours(got) or torch.equal(got, want)
    if what != "drop":
        replays(model, x)
        got = outcome(out.clone)
        assert is_ours(got) or torch.equal(got, want)
    assert litter


def test_input_is_deleted_at_once(backend: Backend, net: Net) -> None:
    """A graph that remembered the input's address would read another tensor."""
    for step in range(6):
        got = net(torch.full((2, 8), float(step), device=backend.device))
        equal(got, eagerly(net, torch.full((2, 8), float(step), device=backend.device)))


def test_a_bound_argument_is_freed_and_its_address_comes_again(backend: Backend) -> None:
    """The graph reads another tensor at the captured address, with another size of its storage."""
    model = cuda_graphed(lambda x, table: x + table.sum(0), sizes=(2,), bind="table")
    x, memory = backend.randn(2, 8), backend.randn(8, 8)
    for rows in (4, 8, 4, 6):
        memory.normal_()
        # A storage of its own over that memory, as if the allocator had given the address again.
        same_as_eager(model, x, torch.from_dlpack(memory[:rows])[:4])
    assert info(model).hits


@pytest.fixture
def group() -> Iterator[torch.distributed.ProcessGroup]:
    """Of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def test_forward_waits_for_other_processes(
    backend: Backend, x: Tensor, group: torch.distributed.ProcessGroup
) -> None:
    """One rank captures, or compares, where another one does not, and both wait."""

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        torch.distributed.all_reduce(y, group=group)
        return y

    model = cuda_graphed(forward, sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="waits for other processes: .*allreduce_"):
        equal(model(x), x * 2)
    equal(model(x), x * 2)
    assert info(model).hits == 0
