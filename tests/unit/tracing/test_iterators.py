"""Iterators that a forward advances."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend
from tests.models import model_of


def in_order() -> Iterator[float]:
    yield from (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    "make",
    [
        itertools.count,
        in_order,
        lambda: iter([1, 2, 3, 4, 5, 6]),
        lambda: iter(dict.fromkeys(range(6))),
        lambda: itertools.cycle([1, 2]),
        lambda: map(float, range(6)),
        lambda: np.arange(6.0).flat,
    ],
    ids=["count", "generator", "list", "dict", "cycle", "map", "numpy"],
)
@pytest.mark.parametrize("deep", [False, True])
def test_an_iterator_goes_on(backend: Backend, make: Callable[[], Iterator[float]], deep: bool) -> None:
    """A replay advances nothing, and a capture does once too often."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return x * next(m.held["numbers"] if deep else m.held)

    held, want = make(), make()
    model = cuda_graphed(model_of(forward, {"numbers": held} if deep else held), sizes=(2,))
    x = backend.randn(2, 3)
    with pytest.warns(GraphCacheWarning, match="it reads an iterator, held"):
        for _ in range(5):
            assert torch.equal(model(x), x * next(want))


def test_iterators_that_do_no_harm(backend: Backend, tmp_path: Path) -> None:
    """Those of one call, those of classes written in Python, which are looked into, and files."""

    class Own:
        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            raise StopIteration

    def forward(m: Any, x: Tensor) -> Tensor:
        numbers = iter(range(3))
        own, file, plain = m.held
        assert list(own) == []
        assert not file.closed
        x = x * next(numbers) + next(m.parameters()) + sum(i for i in numbers)
        return [x + i for i, _ in enumerate(plain)][-1]

    with (tmp_path / "file").open("w") as file:
        model = model_of(forward, (Own(), file, [1.0, 2.0]))
        model.weight = nn.Parameter(torch.ones(3, device=backend.device))
        cuda_graphed(model, sizes=(2,))
        x = backend.randn(2, 3)
        for _ in range(3):
            assert torch.equal(model(x), x * 0 + model.weight + 3 + 1)
    assert model.forward.cache_info().hits == 2
