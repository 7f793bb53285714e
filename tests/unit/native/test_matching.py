"""Native code serves any style of call, and takes no call for another."""

from __future__ import annotations

import contextvars
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import cuda_graphed
from graphcache.dispatch.cache import GraphCache
from tests.helpers import Backend, close, eager
from tests.models import MLP


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
@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_call_that_does_not_match_is_a_miss(backend: Backend, change: Callable[[Tensor], Any]) -> None:
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


def test_cleared_graphs_are_not_served(backend: Backend, mlp: MLP) -> None:
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


def test_memory_formats_are_told_apart(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x * 2, sizes=(4,))
    x = backend.randn(3, 2, 5, 5)
    for _ in range(4):
        for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
            got = graphed(given)
            assert torch.equal(got, given * 2)
            assert got.stride() == (given * 2).stride()
    assert graphed.cache_info().hits == 4
