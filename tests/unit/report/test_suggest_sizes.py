"""The best sizes for the batches that were seen."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheError, OptionError, cuda_graphed
from graphcache.capture.default_sizes import padded_size
from graphcache.report.suggest_sizes import best_sizes, interpolated
from tests.helpers import Backend, close, eager
from tests.models import MLP


def cost_of(sizes: tuple[int, ...], batches: dict[int, int], cost: Callable[[int], float]) -> float:
    return sum(calls * cost(padded_size(sizes, rows) or -1) for rows, calls in batches.items())


@pytest.mark.parametrize("seed", range(40))
def test_best_sizes_equal_those_of_a_full_search(seed: int) -> None:
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
