"""Versions of tensors: by them autograd finds out that what it saved was changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, info


class Counts(nn.Module):
    """Writes to a buffer, and reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(4, 3))
        self.register_buffer("scale", torch.ones(3))
        self.count: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count[1:3].add_(1)
        self.count.mul_(2)
        return x * self.scale + self.count[:1]


def raises(read: Tensor, call: Callable[[], Any]) -> bool:
    """Return True if autograd notices that `call` changed a tensor that it saved."""
    with torch.enable_grad():
        weight = torch.ones_like(read, requires_grad=True)
        loss = (weight * read).sum()
    call()
    try:
        loss.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_replay_raises_the_versions_that_eager_raises(backend: Backend, inference: bool) -> None:
    model = Counts().to(backend.device)
    cuda_graphed(model)
    x = backend.randn(4, 3)

    def call() -> None:
        with torch.inference_mode(inference):
            model(x)

    call()
    for _ in range(3):
        assert raises(model.count, call)
        assert raises(model.count[0], call)
        assert raises(model.count.detach(), call)
        assert not raises(model.count.data, call)  # with a version of its own, as in eager
        assert not raises(model.scale, call)
    assert info(model).hits == 15


def test_replay_raises_the_version_of_a_written_argument(backend: Backend) -> None:
    def forward(x: Tensor, cache: Tensor) -> Tensor:
        cache[0].add_(x[0])
        return x + cache.sum()

    model = cuda_graphed(forward, sizes=(4,), pad=0)
    x, cache = backend.randn(4, 3), backend.randn(2, 3)
    model(x, cache), model(x, cache)
    for passed in (cache, cache[:], cache.data):
        assert raises(passed, lambda passed=passed: model(x, passed))  # type: ignore[misc]
    assert not raises(x, lambda: model(x, cache))
    assert not raises(cache.data, lambda: model(x, cache))
    assert info(model).hits > 3


def test_replay_raises_the_versions_of_the_object_it_is_passed(backend: Backend) -> None:
    """Also of one that took the place of another."""

    class Cache:
        def __init__(self) -> None:
            self.keys, self.table = backend.randn(2, 3), backend.randn(3)

    def forward(x: Tensor, cache: Cache) -> Tensor:
        cache.keys[0].add_(x[0])
        return x + cache.keys.sum() + cache.table

    model = cuda_graphed(forward, sizes=(4,), pad=0)
    x = backend.randn(4, 3)
    for _ in range(3):
        cache = Cache()
        model(x, cache), model(x, cache), model(x, cache)
        assert raises(cache.keys, lambda cache=cache: model(x, cache))  # type: ignore[misc]
        assert not raises(cache.table, lambda cache=cache: model(x, cache))  # type: ignore[misc]
        del cache
    assert info(model).hits > 6, info(model)


@pytest.mark.parametrize("stale", ["copy", "error"])
def test_saved_output_is_right_or_raises_when_overwritten(backend: Backend, stale: str) -> None:
    model = cuda_graphed(nn.Linear(3, 3).to(backend.device), sizes=(4,), stale=stale)
    model(backend.randn(4, 3))
    saved = model(backend.randn(4, 3))
    right = saved.sum(0)
    with torch.enable_grad():
        weight = torch.ones(3, device=backend.device, requires_grad=True)
        loss = (saved * weight).sum()
    del saved
    model(backend.randn(4, 3))
    if stale == "copy":
        loss.backward()
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, right)
    else:
        with pytest.raises(RuntimeError, match="graphcache: this tensor is an output of call 2"):
            loss.backward()
