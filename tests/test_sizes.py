"""Which sizes calls need: what is counted and timed, what is suggested, and which graphs do not pay."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheError, OptionError, cuda_graphed
from graphcache.capture import bucket as timing
from graphcache.capture.sizes import padded_size
from graphcache.pool import Lane
from graphcache.report.suggest_sizes import best_sizes, interpolated
from tests.conftest import MLP, Backend, close, eager


def cost_of(sizes: tuple[int, ...], batches: dict[int, int], cost: Callable[[int], float]) -> float:
    return sum(calls * cost(padded_size(sizes, rows) or -1) for rows, calls in batches.items())


@pytest.mark.parametrize("seed", range(40))
def test_the_best_sizes_are_those_of_a_search_through_all(seed: int) -> None:
    rng = random.Random(seed)
    batches = {rng.randint(1, 40): rng.randint(1, 50) for _ in range(rng.randint(1, 9))}
    times = list(itertools.accumulate(rng.choice((0, 0, 1, 7)) + rng.random() for _ in range(41)))
    for count in range(1, 11):
        found = best_sizes(batches, count, lambda size: times[size])
        assert len(found) == min(count, len(batches))
        assert found == tuple(sorted(found))
        every = (
            (*chosen, max(batches))
            for chosen in itertools.combinations(sorted(batches)[:-1], len(found) - 1)
        )
        least = min(cost_of(sizes, batches, lambda size: times[size]) for sizes in every)
        assert cost_of(found, batches, lambda size: times[size]) == pytest.approx(least)


def test_many_batches_are_no_long_search() -> None:
    sizes = best_sizes(dict.fromkeys(range(1, 2049), 1), 32, float)
    assert sizes == tuple(range(64, 2049, 64))


def test_times_in_between_are_interpolated() -> None:
    of = interpolated({4: 10.0, 8: 14.0, 16: 14.0})
    assert [of(size) for size in (1, 4, 6, 8, 12, 16, 32)] == [7, 10, 12, 14, 14, 14, 14]
    assert interpolated({8: 1.0, 10: 9.0})(1) == 0.0


def test_calls_are_counted_by_batch(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2, 4))
    for batch in (3, 3, 1, 4, 4, 4, 9, 3):  # counted natively, by Python, and where it runs eagerly
        mlp(backend.randn(batch, 8))
    assert mlp.forward.cache_info().batches == {1: 1, 3: 3, 4: 3, 9: 1}
    mlp.forward.cache_clear()
    assert mlp.forward.cache_info().batches == {}


def test_sizes_are_suggested_by_rows_until_there_are_times(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(8,))
    for batch, calls in ((1, 20), (2, 1), (5, 9), (8, 1)):
        for _ in range(calls):
            mlp(backend.randn(batch, 8))
    mlp(backend.randn(12, 8))
    told = mlp.forward.suggest_sizes(3)
    assert told.sizes == (1, 5, 12)
    assert told.unit == "rows"
    assert told.expected == pytest.approx((20 * 1 + 10 * 5 + 2 * 12) / 32)
    assert told.now == pytest.approx((31 * 8 + 12) / 32)
    assert told.saved == pytest.approx(1 - told.expected / told.now)
    assert told.uncovered == 1
    assert str(told) == (
        "sizes=(1, 5, 12): 2.938 rows a call instead of 8.125 (63.8% saved); "
        "1 calls were above the largest size, and ran eagerly"
    )
    cuda_graphed(mlp, sizes=told.sizes)
    assert close(mlp(x := backend.randn(4, 8)), eager(mlp, x))


def test_sizes_can_be_asked_for_in_a_class(backend: Backend) -> None:
    class Graphed(MLP):
        forward = cuda_graphed(MLP.forward)

    model = Graphed().to(backend.device)
    model(backend.randn(3, 8))
    assert model.forward.suggest_sizes(5).sizes == (3,)


def test_no_suggestion_says_why(backend: Backend) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            return x + self.steps

    model = cuda_graphed(Steps().to(backend.device))
    with pytest.raises(GraphCacheError, match=r"no call of .*Steps.forward was counted.*real traffic"):
        model.forward.suggest_sizes(3)
    for count in (0, -1, 2.0, True, None):
        with pytest.raises(OptionError, match=r"suggest_sizes\(.*\); give how many"):
            model.forward.suggest_sizes(count)
    with pytest.warns(graphcache.GraphCacheWarning, match="pad="):
        model(backend.randn(3, 8))
    with pytest.raises(GraphCacheError, match=r"exactly the sizes .* pad does not say"):
        model.forward.suggest_sizes(3)


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
    backend: Backend, mlp: MLP, watch: Any, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Its memory may have gone to something else since: nobody asked for the eager call."""
    cuda_graphed(mlp, sizes=(4,), pool=backend.pool())
    watch.shows = [0.0, 20e-6]
    x = backend.randn(batch, 8)
    expected = eager(mlp, x)
    for _ in range(3):
        mlp(x)
    linear, full = nn.functional.linear, []  # which no code of the user's names, so nothing watches

    def fails(*_: Tensor) -> Tensor:
        full.append(1)
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(nn.functional, "linear", fails)
    served = mlp.forward.cache_info().hits
    try:
        for _ in range(timing.AFTER + 2 * timing.SETTLED):
            assert close(mlp(x), expected)
    finally:
        monkeypatch.setattr(nn.functional, "linear", linear)
    assert full
    assert mlp.forward.cache_info().hits == served + timing.AFTER + 2 * timing.SETTLED


@pytest.mark.parametrize("value", [1, -0.1, "5%", float("nan")])
def test_a_share_that_makes_no_sense(value: Any) -> None:
    with pytest.raises(OptionError, match=r"min_gain=.*such as 0\.05"):
        cuda_graphed(MLP(), min_gain=value)


def test_bytes_that_weak_references_save(backend: Backend) -> None:
    model = cuda_graphed(nn.Identity(), sizes=(1,))  # makes nothing
    model(backend.randn(1, 8))
    assert model.forward.cache_info().saved_bytes == 0

    def doubled(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y[:, :2]

    row = 1024 * 4
    for weak in (True, False):
        graphed = cuda_graphed(doubled, sizes=(1, 2, 8), pool=backend.pool(weak=weak))
        graphed(backend.randn(8, 1024))
        assert graphed.cache_info().saved_bytes == (row * (1 + 2) if weak else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU")
def test_the_ladder_leaves_memory_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device were nearly full: the size that takes what is left is not kept."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    reserved = torch.cuda.memory_reserved  # by this process: others may use the device, too
    end = reserved() + (192 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (end - reserved(), total))
    pool = graphcache.GraphPool("cuda")
    with torch.no_grad():
        model = cuda_graphed(lambda x: x * 2, sizes=(1, 2, 4, 128), pool=pool)
        x = torch.ones(3, 1 << 18, device="cuda")
        for _ in range(4):
            assert torch.equal(model(x), x * 2)
    assert model.cache_info().sizes == (1, 2, 4)
    assert pool.memory().reserved < 64 << 20
