"""What one replayed call does: one launch, no allocation, no synchronisation; and who serves it."""

from __future__ import annotations

import contextvars
import gc
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import graphcache
from graphcache import cuda_graphed
from graphcache.dispatch.cache import GraphCache
from tests.conftest import MLP, Backend, close, eager


def on(*backends: str) -> Callable[[Any], Any]:
    """Runs a test on these backends only."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.parametrize(
        "backend", [pytest.param(name, marks=skip) for name in backends], indirect=True
    )


@pytest.fixture
def misses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of forwards whose calls native code left to Python."""
    seen: list[str] = []
    serve = GraphCache.__call__

    def noted(self: GraphCache, *arguments: Any) -> Any:
        seen.append(self.name)
        return serve(self, *arguments)

    monkeypatch.setattr(GraphCache, "__call__", noted)
    return seen


# Which calls Python never sees


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Fields:
    x: Tensor
    flag: bool = True


def everything(
    x: Tensor, /, y: Any = None, *more: Tensor, z: Tensor | None = None, **rest: Tensor
) -> dict[str, Any]:
    named = [*more, *([z] if z is not None else []), *rest.values()]
    extra = sum((tensor for tensor in named), torch.zeros_like(x))
    inner = y["k"][0] if isinstance(y, dict) else y.x if isinstance(y, Fields) else extra
    return {"sum": (x + inner, [extra * 2]), "pair": Pair(x, inner), "none": None}


def calls(x: Tensor) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    return {
        "positional": ((x,), {}),
        "keyword": ((x,), {"z": x * 2}),
        "unknown keywords": ((x,), {"b": x, "a": x * 3}),
        "in another order": ((x,), {"a": x * 3, "z": x, "b": x}),
        "varargs": ((x, 3.5, x, x * 4), {}),
        "dict": ((x, {"k": [x * 5], "n": (1, "a", None)}), {}),
        "dataclass": ((x, Fields(x * 6, False)), {}),
        "ordered dict": ((x, OrderedDict(k=(x * 7,))), {}),
    }


@pytest.mark.parametrize("style", calls(torch.ones(1)))
def test_any_style_of_call_is_served_natively(backend: Backend, misses: list[str], style: str) -> None:
    graphed = cuda_graphed(everything, sizes=(2, 4))
    for batch in (4, 3, 1, 2):
        args, kwargs = calls(backend.randn(batch, 3))[style]
        graphed(*args, **kwargs)
    misses.clear()
    for batch in (1, 2, 3, 4, 3, 1):
        args, kwargs = calls(backend.randn(batch, 3))[style]
        got, wanted = graphed(*args, **kwargs), everything(*args, **kwargs)
        assert type(got["pair"]) is Pair
        assert got["none"] is None
        assert got["pair"].a is args[0]
        for mine, theirs in ((got["sum"][0], wanted["sum"][0]), (got["pair"].b, wanted["pair"].b)):
            assert torch.equal(mine, theirs)
        assert torch.equal(got["sum"][1][0], wanted["sum"][1][0])
    assert misses == []


def test_many_signatures_at_once_are_served_natively(backend: Backend, misses: list[str]) -> None:
    graphed = cuda_graphed(everything, sizes=(4,))
    for batch in (3, 2, 2):
        for args, kwargs in calls(backend.randn(batch, 3)).values():
            graphed(*args, **kwargs)
    misses.clear()
    for _ in range(2):
        for args, kwargs in calls(backend.randn(2, 3)).values():
            assert torch.equal(graphed(*args, **kwargs)["sum"][0], everything(*args, **kwargs)["sum"][0])
    assert misses == []


def test_keywords_in_another_order_are_the_same_signature(backend: Backend, misses: list[str]) -> None:
    graphed = cuda_graphed(lambda a, b, c=1: a - b * c, sizes=(2,))
    x, y = backend.randn(2), backend.randn(2)
    graphed(a=x, b=y)
    misses.clear()
    for args, kwargs in (
        ((), {"b": y, "a": x}),
        ((x,), {"b": y}),
        ((x, y, 1), {}),
        ((), {"c": 1, "b": y, "a": x}),
    ):
        assert torch.equal(graphed(*args, **kwargs), x - y)
    assert misses == []


def test_constants_are_told_apart_by_type_and_value(backend: Backend) -> None:
    def forward(x: Tensor, k: Any) -> Tensor:
        return x * (2 if k is True else 3 if type(k) is int else 4 if str(k) == "0.0" else 5)

    graphed = cuda_graphed(forward, sizes=(2,))
    x = backend.randn(2)
    for _ in range(3):
        for k in (True, 1, 1.0, 0.0, -0.0, "0.0", None, float("nan")):
            assert torch.equal(graphed(x, k), forward(x, k)), k


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x[:, :2],
        lambda x: x[0],
        lambda x: x.as_subclass(Subclass),
        lambda x: x.to_sparse(),
        lambda x: x[:0],
        nn.Parameter,
        lambda x: (x,),
        lambda x: None,
    ],
    ids=["dtype", "shape", "dimensions", "subclass", "layout", "empty", "parameter", "nested", "none"],
)
def test_what_does_not_match_is_not_taken_for_it(
    backend: Backend, change: Callable[[Tensor], Any]
) -> None:
    def forward(x: Any) -> Any:
        return x if x is None else x[0] * 2 if isinstance(x, tuple) else x * 2

    graphed = cuda_graphed(forward, sizes=(3,))
    x = backend.randn(3, 3)
    for _ in range(3):
        graphed(x)
    for _ in range(3):
        got, wanted = graphed(change(x)), forward(change(x))
        assert type(got) is type(wanted)
        if isinstance(wanted, Tensor):
            assert torch.equal(got.to_dense(), wanted.to_dense())
            assert got.layout == wanted.layout
    assert torch.equal(graphed(x), x * 2)


class Subclass(torch.Tensor):
    pass


def test_gradients_are_needed_for_an_argument_later(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x * 2, sizes=(3,))
    x = backend.randn(3)
    with torch.enable_grad():
        for _ in range(3):
            graphed(x)
        wants = x.clone().requires_grad_()
        graphed(wants).sum().backward()
    assert wants.grad is not None
    assert wants.grad.eq(2).all()
    assert graphed.cache_info().hits == 2


def test_modes_are_told_apart(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    kind = backend.device.type
    for _ in range(3):
        mlp(x)
        with torch.inference_mode():
            assert mlp(x).is_inference()
        with torch.autocast(kind, dtype=torch.bfloat16):
            assert mlp(x).dtype is torch.bfloat16
        assert mlp(x).dtype is torch.float32
        mlp.train()
        mlp(x)
        mlp.eval()
    assert mlp.forward.cache_info().signatures == 4
    assert mlp.forward.cache_info().hits == 8


def test_switches_hold_for_native_calls_too(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    mlp(x)
    mlp(x)
    with graphcache.disabled():
        mlp(x)
    if backend.name == "emulated":
        contextvars.Context().run(mlp, x)  # emulation is on in this test's context only
        assert mlp.forward.cache_info().eager.keys() >= {
            "CPU tensors (graphcache.emulate() emulates graphs there)"
        }
    assert mlp.forward.cache_info().eager["disabled"] == 1
    mlp(x)
    assert mlp.forward.cache_info().hits == 2


def test_what_was_cleared_is_not_served(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    mlp(x)
    mlp(x)
    mlp.forward.cache_clear()
    assert mlp.forward.cache_info().calls == 0
    assert close(mlp(x), eager(mlp, x))
    assert mlp.forward.cache_info().hits == 0
    assert close(mlp(x), eager(mlp, x))
    assert mlp.forward.cache_info().hits == 1


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


def launches_of(call: Callable[[], Any]) -> Counter[str]:
    """What ten calls ask of the driver."""
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
def test_the_profile_sees_launches_outside_a_graph(
    backend: Backend, replayed: Callable[[], Any]
) -> None:
    """The test above can fail: on the portable path, copies come before the graph."""
    names = launches_of(replayed)
    assert sum(count for name, count in names.items() if "GraphLaunch" not in name) >= 10, names


@on("cuda")
def test_a_graph_begins_with_its_staging_node(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x, y: x + y, sizes=(4,))
    x = backend.randn(4)
    graphed(x, x)
    (entry,) = graphed._cache().store.entries.values()
    assert entry.buckets[4].graph.node.nodes == 2  # one kernel for both inputs, and the addition


def test_memory_formats_are_told_apart(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x * 2, sizes=(4,))
    x = backend.randn(3, 2, 5, 5)
    for _ in range(4):
        for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
            got = graphed(given)
            assert torch.equal(got, given * 2)
            assert got.stride() == (given * 2).stride()
    assert graphed.cache_info().hits == 4


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
