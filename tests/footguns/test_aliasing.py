"""Traps: arguments, outputs and state share memory, or the forward changes its arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import (
    Backend,
    eagerly,
    equal,
    in_step,
    info,
    is_ours,
    outcome,
    replays,
    same_as_eager,
)
from tests.models import Net, Scaled, Steps

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def writes_second(x: Tensor, state: Tensor) -> Tensor:
    state.add_(1)
    return x + state


def check_aliased(model: Any, forward: Any, *pairs: tuple[Tensor, Tensor]) -> None:
    """Calls both on clones that share memory as the arguments do."""
    for x, state in pairs:
        got, want = [], []
        for call, kept in ((model, got), (forward, want)):
            x_, state_ = copy.deepcopy((x, state))  # keeps what shares a storage
            result = outcome(call, x_, state_)
            kept.extend([result] if isinstance(result, Exception) else [result.clone(), x_, state_])
        if not is_ours(got[0]):
            equal(got, want)


def pair(backend: Backend, *, aliased: bool) -> tuple[Tensor, Tensor]:
    state = backend.randn(4, 8)
    return (state if aliased else backend.randn(4, 8)), state


def test_an_argument_is_written_and_read_as_another_one(backend: Backend) -> None:
    """The graph reads a copy of x that was made before the write."""
    model = cuda_graphed(writes_second, sizes=(4,))
    check_aliased(model, writes_second, *(pair(backend, aliased=True) for _ in range(4)))


def test_a_written_argument_is_read_as_another_one_later(backend: Backend) -> None:
    """The graph writes one address and reads another; in a later call both are one tensor."""
    model = cuda_graphed(writes_second, sizes=(4,))
    x, state = pair(backend, aliased=False)
    for _ in range(3):
        want = state.clone()
        equal(model(x, state), writes_second(x, want))
        equal(state, want)
    assert info(model).hits
    for _ in range(3):
        want = state.clone()
        got = outcome(model, state, state)
        if not is_ours(got):
            equal(got, writes_second(want, want))
            equal(state, want)
    want = state.clone()
    equal(model(x, state), writes_second(x, want))


def test_a_view_of_a_written_argument_is_read_later(backend: Backend) -> None:
    """The graph writes one address and reads another; in a later call one is a slice of the other."""
    forward = lambda x, state: state.add_(1).sum() + x  # noqa: E731
    model = cuda_graphed(forward, sizes=(2,))
    x, state = backend.randn(2, 8), backend.randn(6, 8)
    for _ in range(3):
        want = state.clone()
        equal(model(x, state), forward(x, want))
    assert info(model).hits
    for rows in (slice(2, 4), slice(0, 2)):
        want = state.clone()
        got = outcome(model, state[rows], state)
        if not is_ours(got):
            equal(got, forward(want[rows], want))
            equal(state, want)


def test_argument_is_a_view_of_the_mutated_cache(backend: Backend) -> None:
    """The graph reads a copy of x that was made before the cache was written."""
    model, twin = (Steps(lambda state, x: state.add_(1)).to(backend.device) for _ in range(2))
    cuda_graphed(model, sizes=(2,))
    for _ in range(4):
        want, got = twin(twin.state.expand(2, 8)), outcome(lambda: model(model.state.expand(2, 8)))
        equal(got, want)
        equal(model.state, twin.state)


class WritesCache(nn.Module):
    """Writes all of a cache, then reads its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.add_(1)
        return x * 2


def test_an_argument_is_a_view_of_a_written_cache_later(backend: Backend) -> None:
    """The graph reads a copy of the argument, which in a later call is a row of the cache."""
    model, twin = (WritesCache().to(backend.device) for _ in range(2))
    cuda_graphed(model, sizes=(2,))
    for _ in range(3):
        in_step(model, twin, backend.randn(2, 8))
    assert info(model).hits
    for _ in range(3):
        want = twin(twin.cache[1:3]).clone()
        got = outcome(lambda: model(model.cache[1:3]))
        if not is_ours(got):
            equal(got, want)
            equal(model.cache, twin.cache)
    in_step(model, twin, backend.randn(2, 8))


def test_an_argument_is_a_parameter_of_the_module(net: Net, x: Tensor) -> None:
    """The graph reads a copy of `model.embedding.weight`, as it may: it only reads."""
    replays(net, x)
    same_as_eager(net, net.up.weight.data[:2])
    same_as_eager(net, net.up.weight[:4])


def test_an_output_is_a_view_of_an_argument(backend: Backend) -> None:
    """The output is a view of the static input, which the next call overwrites."""
    model = cuda_graphed(lambda x: (x[:, 1:], x.t()), sizes=(2,))
    kept = []
    for _ in range(4):
        x = backend.randn(2, 8)
        part, turned = model(x)
        equal((part, turned), (x[:, 1:], x.t()))
        part.zero_()
        kept.append(outcome(turned.clone))
        equal(model(x)[1].shape, x.t().shape)
    assert info(model).hits


def test_an_output_is_a_view_of_an_argument_from_another_mode(backend: Backend) -> None:
    """The output is a view of the static input, an inference tensor that autograd refuses."""
    model = cuda_graphed(lambda x: (x[:, 1:], x + 1), sizes=(2, 4))
    for batch in (4, 4, 3, 2, 3):
        plain = backend.randn(batch, 8)
        with torch.inference_mode():
            part, made = model(plain)
            inner = plain + 0
        assert (part.is_inference(), made.is_inference()) == (False, True)
        part, made = model(inner)
        assert (part.is_inference(), made.is_inference()) == (True, False)
    assert info(model).hits >= 5


def test_argument_is_returned_as_it_is(backend: Backend) -> None:
    """The graph changes and returns its static input, where eager changes the caller's object."""
    model = cuda_graphed(lambda x: x.relu_(), sizes=(2,))
    for _ in range(4):
        x = backend.randn(2, 8)
        want = x.relu()
        assert model(x) is x
        equal(x, want)


def test_an_argument_is_written_through_a_view(backend: Backend) -> None:
    """`x[:, 0] = 0` in the forward changes the static input, not the caller's tensor."""

    def forward(x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x * 2

    model = cuda_graphed(forward, sizes=(2, 4))
    for batch in (2, 2, 4, 3, 3, 2):
        mine = backend.randn(batch, 8)
        theirs = mine.clone()
        equal(model(mine), forward(theirs))
        equal(mine, theirs)


def test_an_argument_is_written_under_a_condition(backend: Backend) -> None:
    """The write is missing from the graph: a flag of the module turned it off at the first call."""

    class Sometimes(nn.Module):
        write = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if self.write else x * 2

    model = cuda_graphed(Sometimes(), sizes=(2,))
    for call in range(8):
        model.write = call % 4 >= 2
        mine = backend.randn(2, 8)
        theirs = mine.clone()
        equal(model(mine), eagerly(model, theirs))
        equal(mine, theirs)


def test_one_tensor_is_passed_for_two_arguments(backend: Backend) -> None:
    """Each argument has a static input of its own, of which one may stay empty."""
    model = cuda_graphed(lambda x, y: x * 2 + y, sizes=(2, 4))
    for batch in (2, 3, 4, 3):
        x, y = backend.randn(batch, 8), backend.randn(batch, 8)
        for pair_ in ((x, x), (x, y), (y, y), (y, x)):
            same_as_eager(model, *pair_, times=2)
    assert info(model).hits >= 12


def test_an_expanded_argument(backend: Backend) -> None:
    """The static input has strides of zero: writing one row writes all."""
    model = cuda_graphed(lambda x: x * 2, sizes=(2, 4))
    for batch in (4, 3, 3, 2):
        same_as_eager(model, backend.randn(1, 8).expand(batch, 8))
    assert info(model).hits


@dataclass
class SimpleBatch:
    x: Tensor
    count: int = 1


def changes(**items: Any) -> Callable[[Tensor, Any], Tensor]:
    def forward(x: Tensor, other: Any) -> Tensor:
        for name, item in items.items():
            setattr(other, name, item)
        return x * 2

    return forward


def puts(x: Tensor, other: Any) -> Tensor:
    other["count"] = 2
    return x * 2


def replaces(x: Tensor, other: Any) -> Tensor:
    other["x"] = x
    return x * 2


def transposes(x: Tensor, other: Tensor) -> Tensor:
    other.t_()
    return x * 2


CHANGED: dict[str, tuple[Callable[[Tensor, Any], Tensor], Callable[[Tensor], Any], str]] = {
    "dictionary": (puts, lambda x: {"count": 1}, "other"),
    "tensor in a dictionary": (replaces, lambda x: {"x": x.clone()}, r"other\['x'\]"),
    "list": (lambda x, other: other.append(2) or x * 2, lambda x: [1], "other"),
    "field": (changes(count=2), SimpleBatch, "other"),
    "attribute": (changes(scale=2.0), Scaled, r"other has attributes .*\(scale\)"),
    "tensor": (changes(scale=2.0), lambda x: x.clone(), r"other has attributes \(scale\)"),
    "shape": (transposes, lambda x: x[:, :3].clone(), "the shape of a tensor"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_container_argument_is_changed(backend: Backend, name: str) -> None:
    """The caller's container changes at capture only; replays leave it as it is."""
    forward, make, what = CHANGED[name]
    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    with pytest.warns(
        GraphCacheWarning, match=f"it changes an argument, which no graph replays: {what}"
    ):
        model(x, make(x))
    for _ in range(2):
        mine, theirs = make(x), make(x)
        equal(model(x, mine), forward(x, theirs))
        if isinstance(mine, Tensor):
            assert mine.shape == theirs.shape
            assert mine.__dict__ == theirs.__dict__
        else:
            assert repr(mine) == repr(theirs)
            assert getattr(mine, "scale", None) == getattr(theirs, "scale", None)
