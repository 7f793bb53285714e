"""Attributes and lists that a forward changes are noticed."""

import functools
import gc
import tempfile
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend
from tests.models import MLP


def test_attributes_that_every_call_changes_are_noticed(backend: Backend) -> None:
    class Counts(nn.Module):
        step = 0

        def forward(self, x: Tensor) -> Tensor:
            self.step += 1
            return x * self.step

    model = cuda_graphed(Counts(), sizes=(2,))
    x = torch.ones(2, 1, device=backend.device)
    assert model(x)[0].item() == 1
    assert model(x)[0].item() == 2
    with pytest.warns(GraphCacheWarning, match="changes attributes, which no graph replays: step"):
        assert model(x)[0].item() == 3
    assert model(x)[0].item() == 4
    assert model.forward.cache_info().hits == 0


collections = 0


def test_finalizers_are_no_part_of_the_forward(backend: Backend) -> None:
    """As pytest plug-ins and profilers count collections, which happen at any time."""

    def count(phase: str, _: object) -> None:
        global collections
        collections += 1

    class Littering(MLP):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(10):
                cycle: list[Any] = []
                cycle.append(cycle)
            return super().forward(x)

    model = cuda_graphed(Littering().to(backend.device), sizes=(4,))
    thresholds = gc.get_threshold()
    gc.callbacks.append(count)
    try:
        gc.set_threshold(1)
        for _ in range(3):
            model(backend.randn(4, 8))
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(count)
    assert collections > 0
    assert model.forward.cache_info().hits == 2


def test_temporary_file_names_draw_no_random_numbers(backend: Backend) -> None:
    """Triton writes such files where it compiles a kernel, at the first call of a process."""
    compiled = functools.cache(lambda: tempfile.TemporaryDirectory().cleanup())

    def forward(x: Tensor) -> Tensor:
        compiled()
        return x + 1

    model = cuda_graphed(forward, sizes=(2,))
    for _ in range(3):
        x = backend.randn(2, 3)
        assert torch.equal(model(x), x + 1)
    assert model.cache_info().hits == 2


@pytest.mark.parametrize("on_the_host", [False, True])
def test_attributes_that_the_first_call_fills_are_fine(backend: Backend, on_the_host: bool) -> None:
    """Also with what no graph can hold: a table that is copied from the host."""

    class Lazy(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None and on_the_host:
                self.table = torch.tensor(array("f", [0, 1, 2]), device=x.device)
            elif self.table is None:
                self.table = torch.arange(3.0, device=x.device)
            return x + self.table

    model = cuda_graphed(Lazy(), sizes=(2,))
    for _ in range(4):
        x = backend.randn(2, 3)
        assert torch.equal(model(x), x + torch.arange(3.0, device=backend.device))
    assert model.forward.cache_info().hits == 2


class Collects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        return x + 1


class Measures(Collects):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.norm().item())
        return x + 1


@pytest.mark.parametrize(
    ("kind", "why"), [(Collects, "changes attributes"), (Measures, "reads a value on the host")]
)
def test_lists_that_the_forward_appends_to_are_noticed(
    backend: Backend, kind: type[Collects], why: str
) -> None:
    """The third call tells, and names what else is in the way."""
    model = cuda_graphed(kind(), sizes=(2,))
    x = backend.randn(2, 3)
    model(x)
    model(x)
    with pytest.warns(GraphCacheWarning, match=why):
        model(x)
    model(x)
    assert len(model.seen) == 4
