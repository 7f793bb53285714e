"""Graphs that gain nothing against eager are found by timing them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from graphcache.capture import bucket as timing
from graphcache.pool import Lane
from tests.helpers import Backend, close, eager, hidden
from tests.models import MLP


class Watch:
    """Shows what a test says, and that the device is done when it says so."""

    shows: list[float]
    done = True

    def __init__(self) -> None:
        self._seconds = 0.0

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None:
        self._seconds = self.shows.pop(0)

    def is_done(self) -> bool:
        return self.done

    def seconds(self) -> float:
        return self._seconds


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> type[Watch]:
    class Told(Watch):
        pass

    monkeypatch.setattr(Lane, "stopwatch", lambda _: Told())
    return Told


def call(model: nn.Module, backend: Backend, batch: int, times: int) -> None:
    for _ in range(times):
        x = backend.randn(batch, 8)
        assert close(model(x), eager(model, x))


def test_each_size_is_timed_once(backend: Backend, mlp: MLP, watch: Any) -> None:
    cuda_graphed(mlp, sizes=(2, 4))
    watch.shows = [100e-6, 20e-6, 200e-6, 30e-6]
    call(mlp, backend, 4, 1 + timing.AFTER)
    assert mlp.forward.cache_info().times == {}
    runs = int(mlp.runs)
    call(mlp, backend, 4, 1)
    assert int(mlp.runs) == runs + 2  # itself, and what it is compared with
    assert mlp.forward.cache_info().times == {}
    call(mlp, backend, 4, 3 + 2 * timing.SETTLED)
    info = mlp.forward.cache_info()
    assert info.times == {4: (100e-6, 20e-6)}
    assert info.times[4].gain == pytest.approx(0.8)
    assert info.eager == {"the first call of a signature": 1, "timed beside its graph": 1}
    assert str(info).splitlines()[-1].split()[-3:] == ["20.0", "100.0", "80%"]
    call(mlp, backend, 2, 5 + timing.AFTER)
    assert mlp.forward.cache_info().times == {2: (200e-6, 30e-6), 4: (100e-6, 20e-6)}
    assert mlp.forward.suggest_sizes(2).unit == "us"
    assert mlp.forward.suggest_sizes(1).expected == pytest.approx(20.0)
    assert not watch.shows


def test_a_forward_that_writes_state_is_not_run_eagerly_for_it(backend: Backend, watch: Any) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            return x + self.steps

    model = cuda_graphed(Steps().to(backend.device), sizes=(2,), pad=0, min_gain=0.5)
    watch.shows = [20e-6]
    for step in range(1, timing.AFTER + 2 * timing.SETTLED):
        assert model(torch.zeros(2, 1, device=backend.device))[1].item() == step
    assert model.forward.cache_info().times == {2: (None, 20e-6)}
    assert model.forward.cache_info().misses == 1


def test_a_graph_that_gains_nothing_is_told_of(backend: Backend, mlp: MLP, watch: Any) -> None:
    cuda_graphed(mlp, sizes=(2, 4))
    watch.shows = [100e-6, 99e-6]
    call(mlp, backend, 4, timing.AFTER + 2 * timing.SETTLED)
    info = mlp.forward.cache_info()
    assert info.notes == ("size 4: a replay takes 99% of eager's time",)
    assert info.sizes == (2, 4)


def test_a_graph_that_gains_too_little_goes(backend: Backend, mlp: MLP, watch: Any) -> None:
    pool = backend.pool()
    cuda_graphed(mlp, sizes=(2, 4, 8), min_gain=0.05, pool=pool)
    watch.shows = [100e-6, 96e-6, 100e-6, 50e-6]
    call(mlp, backend, 4, timing.AFTER + timing.SETTLED + 2)
    assert mlp.forward.cache_info().sizes == (2, 4, 8)
    call(mlp, backend, 4, 1)
    assert mlp.forward.cache_info().sizes == (2, 8)
    hits = mlp.forward.cache_info().hits
    call(mlp, backend, 4, 3)
    call(mlp, backend, 3, 3)  # not by the graph of 8 rows
    info = mlp.forward.cache_info()
    assert info.hits == hits
    assert info.eager["its graph saves less than min_gain"] == 1 + 3 + 3
    assert info.times[4].gain == pytest.approx(0.04)
    assert "4 (gone)" in str(info)
    call(mlp, backend, 2, timing.AFTER + 2 * timing.SETTLED)
    assert mlp.forward.cache_info().sizes == (2, 8)
    assert mlp.forward.cache_info().hits > hits + timing.AFTER


def test_a_device_that_lags_behind_is_asked_again(backend: Backend, mlp: MLP, watch: Any) -> None:
    cuda_graphed(mlp, sizes=(4,), min_gain=0.05)
    watch.shows, watch.done = [100e-6, 96e-6], False
    call(mlp, backend, 4, timing.AFTER + 3 * timing.SETTLED)
    assert mlp.forward.cache_info().times == {4: (None, None)}
    watch.done = True
    call(mlp, backend, 4, 1 + timing.SETTLED)
    assert mlp.forward.cache_info().sizes == ()


@pytest.mark.parametrize("batch", [4, 3])
def test_eager_runs_out_of_memory_where_the_graph_does_not(
    backend: Backend, watch: Any, batch: int
) -> None:
    """Its memory may have gone to something else since: nobody asked for the eager call."""
    steps = hidden(nn.functional.relu)  # nothing watches what lies there

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return next(steps)[0](x) * 2

    model = cuda_graphed(Calls(), sizes=(4,), pool=backend.pool())
    watch.shows = [0.0, 20e-6]
    x = backend.randn(batch, 8)
    for _ in range(3):
        model(x)
    full = []

    def fails(*_: Tensor) -> Tensor:
        full.append(1)
        raise torch.OutOfMemoryError("pretended")

    steps.items[0] = fails
    served = model.forward.cache_info().hits
    for _ in range(timing.AFTER + 2 * timing.SETTLED):
        assert close(model(x), x.relu() * 2)
    assert full
    assert model.forward.cache_info().hits == served + timing.AFTER + 2 * timing.SETTLED
