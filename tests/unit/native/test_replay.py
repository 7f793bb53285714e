"""A replay allocates nothing, synchronises nothing and launches once."""

from __future__ import annotations

import contextvars
import gc
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from graphcache import cuda_graphed
from tests.helpers import Backend, close, eager, on
from tests.models import MLP


def in_threads(*functions: Callable[[], None]) -> None:
    """Runs each in a thread of its own, with the switches of this one."""
    contexts = [contextvars.copy_context() for _ in functions]
    threads = [
        threading.Thread(target=context.run, args=(function,))
        for context, function in zip(contexts, functions, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_take_turns(backend: Backend) -> None:
    """Results are compared while no other thread may replay: outputs are valid until one does."""
    models = [cuda_graphed(MLP().to(backend.device).eval(), sizes=(2, 4)) for _ in range(2)]
    inputs = [backend.randn(batch, 8) for batch in (1, 2, 3, 4)]
    wanted = [[eager(model, x) for x in inputs] for model in models]
    for model in models:
        for x in inputs * 2:
            model(x)
    wrong: list[Any] = []
    turn = threading.Lock()

    def work(which: int) -> None:
        for step in range(60):
            index = (step * 7 + which) % 4
            with turn, torch.no_grad():
                if not close(models[which](inputs[index]), wanted[which][index]):
                    wrong.append((which, step))

    def hammer() -> None:
        for step in range(60):
            with torch.no_grad():
                models[step % 2](inputs[step % 4])

    in_threads(partial(work, 0), partial(work, 1))
    assert wrong == []
    in_threads(hammer, hammer, hammer)
    for model, results in zip(models, wanted, strict=True):
        for x, result in zip(inputs, results, strict=True):
            assert close(model(x), result)


def test_random_numbers_advance_the_generator(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x + torch.rand_like(x), sizes=(4,))
    x = torch.zeros(4, device=backend.device)

    def draw(function: Callable[[Tensor], Tensor]) -> list[list[float]]:
        torch.manual_seed(5)
        return [function(x).tolist() for _ in range(4)]

    draw(graphed)
    drawn = draw(graphed)
    assert len({tuple(row) for row in drawn}) == 4
    assert draw(graphed) == drawn
    after = torch.rand(2, device=backend.device)
    draw(graphed)
    assert torch.equal(torch.rand(2, device=backend.device), after)
    assert graphed.cache_info().hits == 15


def kinds() -> Counter[type]:
    return Counter(map(type, gc.get_objects()))


def test_no_object_of_python_stays_behind(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2, 4))
    x = backend.randn(3, 8)
    for _ in range(100):  # past the comparison with eager that comes after 64
        mlp(x)
    kinds()  # `isinstance` keeps what it learned
    gc.collect()
    gc.disable()
    try:
        before = kinds()
        for _ in range(100):
            mlp(x)
        more = kinds() - before
        assert {kind: number for kind, number in more.items() if number > 2} == {}
    finally:
        gc.enable()


# On the device


@pytest.fixture
def replayed(backend: Backend) -> Callable[[], Any]:
    """A call that is replayed, padded, with an input that lies elsewhere each time."""
    model = cuda_graphed(MLP(64).to(backend.device).eval(), sizes=(4, 8))
    inputs = [backend.randn(5, 64) for _ in range(3)]
    for x in inputs:
        model(x)
    turn = iter(range(10**9))

    def call() -> None:
        model(inputs[next(turn) % 3])

    call()
    return call


@on("cuda", "cuda-portable")
def test_no_allocation_and_no_synchronisation(backend: Backend, replayed: Callable[[], Any]) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(50):
            replayed()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@on("cuda")
def test_one_launch_for_each_call(backend: Backend, replayed: Callable[[], Any]) -> None:
    names = launches_of(replayed)
    assert sum(names.values()) in (0, 10), names  # torch's profiler may not list the driver's launch
    assert all("GraphLaunch" in name for name in names), names


def plain(model: Any, xs: list[Tensor]) -> Any:
    for x in xs:
        model(x)


def to_a_name(model: Any, xs: list[Tensor]) -> Any:
    for x in xs:
        out = model(x)
    return out


def to_a_part(model: Any, xs: list[Tensor]) -> Any:
    for x in xs:
        last = model(x)[:, -1]
    return last


def fed_back(model: Any, xs: list[Tensor]) -> Any:
    h = xs[0]
    for _ in xs:
        h = model(h)
    return h


def to_a_dict(model: Any, xs: list[Tensor]) -> Any:
    kept = {}
    for x in xs:
        kept["out"] = model(x)
    return kept


def of_a_generator(model: Any, xs: list[Tensor]) -> Any:
    last = None
    for out in (model(x) for x in xs):
        last = out
    return last


def to_a_list(model: Any, xs: list[Tensor]) -> Any:
    return [model(x) for x in xs]


LOOPS = [to_a_name, to_a_part, fed_back, to_a_dict, of_a_generator, to_a_list]


# Strided arguments, but for the loop that feeds dense results back.
CASES = [
    (loop, strided) for loop in LOOPS for strided in (False, True) if not (strided and loop is fed_back)
]


@pytest.mark.parametrize(
    ("loop", "strided"), CASES, ids=lambda case: getattr(case, "__name__", str(case))
)
def test_held_outputs_take_no_launch(backend: Backend, loop: Callable[..., Any], strided: bool) -> None:
    """On the CPU, operations are counted; on CUDA also launches, and allocations."""
    if backend.launch == "torch":
        pytest.skip("inputs and outputs are copied by torch there")
    model: Any = cuda_graphed(MLP(64).to(backend.device).eval(), sizes=(8,))
    rows = [backend.randn(8, 64) for _ in range(10)]
    xs = list(torch.stack(rows, 1).unbind(1)) if strided else rows
    plain(model, xs)
    want = operations_of(lambda: plain(model, xs))
    assert operations_of(lambda: loop(model, xs)) == want
    assert model.forward.cache_info().copied >= 9
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        loop(model, xs)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= len(xs)


def operations_of(call: Callable[[], Any]) -> Counter[str]:
    """Returns the operations of torch that make or copy memory, and the driver calls, of one call."""
    cuda = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + cuda]) as profiler:
            call()
            if cuda:
                torch.cuda.synchronize()
    parts = ("Launch", "Memcpy", "Memset", "::clone", "::copy_", "::empty", "::contiguous")
    names = (event.name for event in profiler.events() or ())
    return Counter(name for name in names if any(part in name for part in parts))


def launches_of(call: Callable[[], Any]) -> Counter[str]:
    """Returns the driver calls of ten calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(10):
                call()
            torch.cuda.synchronize()
    parts = ("Launch", "Memcpy", "Memset", "StreamSynchronize", "EventSynchronize", "StreamWait")
    names = [event.name for event in profiler.events() or ()]
    return Counter(n for n in names if n.startswith("cu") and any(part in n for part in parts))


@on("cuda-portable")
def test_profile_sees_launches_outside_a_graph(backend: Backend, replayed: Callable[[], Any]) -> None:
    """The test above can fail: on the portable path, copies come before the graph."""
    names = launches_of(replayed)
    assert sum(count for name, count in names.items() if "GraphLaunch" not in name) >= 10, names


@on("cuda")
def test_a_graph_begins_with_its_staging_node(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x, y: x + y, sizes=(4,))
    x = backend.randn(4)
    graphed(x, x)
    (entry,) = graphed._cache().store.entries
    assert entry.buckets[4].graph.node.nodes == 2  # one kernel for both inputs, and the addition


def test_inside_the_comparison_of_another_it_is_inlined(backend: Backend) -> None:
    inner = cuda_graphed(MLP().to(backend.device).eval(), sizes=(3, 4))
    outer = cuda_graphed(lambda x: inner(x) + 1, sizes=(4,))
    x = backend.randn(3, 8)
    for _ in range(3):
        inner(x)
    hits = inner.forward.cache_info().hits
    for _ in range(3):  # eager and captured; eager and compared; replayed
        assert close(outer(x), eager(inner, x) + 1)
    assert outer.cache_info().hits == 1
    assert inner.forward.cache_info().hits == hits
