"""Forwards that ask whether a capture is under way."""

import threading

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, Counter


def capturing() -> bool:
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # of a torch without CUDA
        return False


class Checks(nn.Module):
    """Looks at values, as transformers does at masks, but where it believes that it is captured."""

    def __init__(self, *, scale: float = 1.0, hidden: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("steps", torch.zeros(()))
        if hidden:
            self.offset = torch.zeros(1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.steps += 1
        if capturing():
            y = torch.where(mask, x, 0.0) * self.scale
            return y + self.offset.to(x.device) if hasattr(self, "offset") else y
        return x if mask.all() else torch.where(mask, x, 0.0)


def masks(backend: Backend) -> list[Tensor]:
    full = torch.ones(2, 3, dtype=torch.bool, device=backend.device)
    holed = full.clone()
    holed[1, 2] = False
    return [full, holed, full, holed, holed, full]


def test_forward_that_branches_on_capturing_replays_that_branch(backend: Backend) -> None:
    model = cuda_graphed(Checks().to(backend.device), sizes=(2,), pad=0)
    asks = torch.cuda.is_current_stream_capturing
    for step, mask in enumerate(masks(backend), 1):
        x = backend.randn(2, 3)
        assert torch.equal(model(x, mask), torch.where(mask, x, 0.0))
        assert int(model.steps) == step
    assert model.forward.cache_info().hits == 5
    assert torch.cuda.is_current_stream_capturing is asks
    assert not capturing()


def test_forward_that_returns_something_else_while_capturing(backend: Backend) -> None:
    model = cuda_graphed(Checks(scale=2.0).to(backend.device), sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="something else while a capture is under way"):
        for mask in masks(backend):
            x = backend.randn(2, 3)
            assert torch.equal(model(x, mask), torch.where(mask, x, 0.0))
    assert model.forward.cache_info().hits == 0


def test_value_read_only_while_capturing_is_guarded(backend: Backend) -> None:
    model = Checks(hidden=True).to(backend.device)
    model.offset = torch.zeros(3, device=backend.device)
    cuda_graphed(model, sizes=(2,), pad=0)
    x, mask = backend.randn(2, 3), masks(backend)[0]
    for _ in range(3):
        assert torch.equal(model(x, mask), x)
    assert model.forward.cache_info().captures == 1
    model.offset = torch.zeros(3, device=backend.device)
    for _ in range(2):
        assert torch.equal(model(x, mask), x)
    assert model.forward.cache_info().captures == 2
    assert model.forward.cache_info().hits == 3


def test_state_that_the_first_call_advanced_is_no_other_result(backend: Backend) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return x + self.steps if capturing() or x.sum() < 1e9 else x

    model = cuda_graphed(Steps().to(backend.device), sizes=(2,), pad=0)
    for step in range(1, 5):
        x = backend.randn(2, 3)
        assert torch.equal(model(x), x + step)
    assert model.forward.cache_info().hits == 3


def test_a_forward_that_raises_as_in_a_capture(backend: Backend) -> None:
    """Perhaps it needs a warm-up, which only a failed capture leads to: so that is tried."""
    raised = Counter()

    def forward(x: Tensor) -> Tensor:
        if capturing() and raised.add() <= 2:
            raise RuntimeError("not initialised")
        return x + 1

    model = cuda_graphed(forward, sizes=(2,))
    for _ in range(3):
        x = backend.randn(2, 3)
        assert torch.equal(model(x), x + 1)
    assert int(raised) == 3  # as in a capture, in one, and after the warm-up
    assert model.cache_info().hits == 2


def test_other_threads_are_not_told_of_a_capture(backend: Backend) -> None:
    """Only the thread that observes is."""
    told: list[bool] = []

    def ask() -> None:
        told.append(capturing())

    def forward(x: Tensor) -> Tensor:
        if capturing():
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
        return x + 1

    model = cuda_graphed(forward, sizes=(2,))
    for _ in range(3):
        model(backend.randn(2, 3))
    assert told
    assert not any(told)


def test_numbers_that_are_drawn_as_in_a_capture_are_put_back(backend: Backend) -> None:
    def forward(x: Tensor) -> Tensor:
        return nn.functional.dropout(x if capturing() else x.clone(), 0.5)

    x = backend.randn(2, 64)
    torch.manual_seed(5)
    want = [nn.functional.dropout(x, 0.5) for _ in range(2)]
    model = cuda_graphed(forward, sizes=(2,))
    torch.manual_seed(5)
    assert torch.equal(model(x), want[0])
    assert torch.equal(nn.functional.dropout(x, 0.5), want[1])
