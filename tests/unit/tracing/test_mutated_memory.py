"""State that a forward writes: caches, counters, statistics, random numbers."""

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, eager, state_of
from tests.models import Cached


def test_a_counter_advances_once_a_call(backend: Backend) -> None:
    model = cuda_graphed(Cached().to(backend.device), sizes=(1, 2, 4), pad={"slots": -1})
    for step, batch in enumerate((4, 3, 3, 1, 2, 4, 0, 7), 1):
        model(backend.randn(batch, 2), torch.arange(batch, device=backend.device))
        assert model.steps.item() == step


def test_padded_rows_write_to_the_sink_only(backend: Backend) -> None:
    model = cuda_graphed(Cached().to(backend.device), sizes=(4, 8), pad={"slots": -1})
    plain = Cached().to(backend.device)
    for batch in (8, 3, 3, 5, 5, 2, 2, 8, 1, 1, 4):
        x = backend.randn(batch, 2)
        slots = torch.randperm(8, device=backend.device)[:batch]
        assert torch.allclose(model(x, slots), plain(x, slots))
        assert torch.allclose(model.cache[:-1], plain.cache[:-1])
    told = model.forward.cache_info()
    assert told.misses == 1 + 4
    assert told.padded_rows == 1 + 3 + 2 + 3


def test_views_of_state_that_follow_the_batch(backend: Backend) -> None:
    """Outside memory can't be cut as a graph's own can: at another batch the view is another one."""

    class Views(nn.Module):
        def __init__(self, view) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(18.0).view(9, 2))
            self.register_buffer("steps", torch.zeros(()))
            self.view = view

        def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
            self.steps.add_(1)
            cache.add_(0)
            return x + 1, self.view(self.table, cache, x.shape[0])

    cache = torch.arange(20.0, device=backend.device).view(10, 2)
    for view in (
        lambda table, cache, n: table[:n],
        lambda table, cache, n: table[-n:],
        lambda table, cache, n: table[n],
        lambda table, cache, n: cache[:n],
        lambda table, cache, n: cache[n],
    ):
        model = cuda_graphed(Views(view).to(backend.device), sizes=(4, 8), pad=0)
        for batch in (3, 3, 8, 5, 5, 3):
            x = backend.randn(batch, 2)
            first, second = model(x, cache)
            assert torch.equal(first, x + 1)
            assert torch.equal(second, view(model.table, cache, batch))
        assert model.forward.cache_info().padded_rows == 0
        assert "views other memory" in model.forward.cache_info().notes[0]


def test_without_pad_state_is_captured_at_exact_sizes(backend: Backend) -> None:
    model = cuda_graphed(Cached().to(backend.device), sizes=(4, 8))
    plain = Cached().to(backend.device)
    slots = torch.arange(8, device=backend.device)
    with pytest.warns(GraphCacheWarning, match=r"(?s)exactly the batch sizes.*pad=\{"):
        model(backend.randn(3, 2).zero_(), slots[:3])
    plain(backend.randn(3, 2).zero_(), slots[:3])
    for batch in (3, 5, 3, 5, 4):  # without a second warning
        x = backend.randn(batch, 2)
        assert torch.allclose(model(x, slots[:batch]), plain(x, slots[:batch]))
        assert torch.allclose(model.cache, plain.cache)
    told = model.forward.cache_info()
    assert told.sizes == (3, 4, 5)  # sizes outside `sizes` included
    assert told.padded_rows == 0
    assert told.replays == {3: 2, 5: 1}
    assert "pad does not say" in told.notes[0]


def test_mutated_argument_is_bound_and_reaches_the_caller(backend: Backend) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
            cache.index_add_(0, slots, x)
            return cache[slots]

    model = cuda_graphed(Writes(), sizes=(2, 4), pad={"slots": 8})
    cache = torch.zeros(9, 2, device=backend.device)
    expected = cache.clone()
    for batch in (4, 3, 2, 4, 3):
        x, slots = backend.randn(batch, 2), torch.arange(batch, device=backend.device)
        out = model(x, cache, slots)
        expected.index_add_(0, slots, x)
        assert torch.allclose(out, expected[slots])
        assert torch.allclose(cache[:-1], expected[:-1])
    assert model.forward.cache_info().misses == 2


def test_another_cache_is_another_capture_and_the_first_stays(backend: Backend) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache.add_(x.sum())
            return x + 1

    model = cuda_graphed(Writes(), sizes=(3,), pad=0)
    caches = [torch.zeros(5, device=backend.device) for _ in range(2)]
    x = torch.ones(3, 1, device=backend.device)
    for _ in range(3):
        for cache in caches:
            model(x, cache)
    assert [cache[0].item() for cache in caches] == [9.0, 9.0]
    assert model.forward.cache_info().captures == 2


def test_an_argument_that_carries_the_batch_and_is_written(backend: Backend) -> None:
    model = cuda_graphed(lambda x, out: out.copy_(x * 2), sizes=(4,), pad=0)
    for batch in (3, 3, 3, 4, 2, 2):
        x, out = backend.randn(batch, 2), torch.zeros(batch, 2, device=backend.device)
        assert model(x, out) is out
        assert torch.equal(out, x * 2)
    assert model.cache_info().padded_rows == 0
    assert "an argument that is bound by address carries the batch" in model.cache_info().notes[0]


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_writing_to_an_output_of_a_graph(backend: Backend) -> None:
    """The output lies in memory that the graph itself overwrites, so that call runs eagerly."""
    model = cuda_graphed(lambda x, h: h.add_(x), sizes=(2,))
    make = cuda_graphed(lambda x: x * 2, sizes=(2,))
    x = torch.ones(2, 2, device=backend.device)
    make(x)
    for _ in range(3):
        h = make(x)
        assert model(x, h) is h
        assert h.eq(3).all()
    assert "is the output of a graph" in " ".join(model.cache_info().eager)


def test_random_numbers_are_those_of_eager(backend: Backend) -> None:
    """Padded rows would draw too, so a forward that draws is captured at exact sizes."""
    model = cuda_graphed(nn.Dropout(0.5), sizes=(4,))
    xs = [torch.ones(batch, 16, device=backend.device) for batch in (3, 3, 4, 3, 2, 4)]
    torch.manual_seed(5)
    mine = [model(x).clone() for x in xs]
    torch.manual_seed(5)
    theirs = [eager(model, x) for x in xs]
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    assert model.forward.cache_info().replays == {3: 2, 4: 1}


def test_batch_norm_in_training_updates_its_statistics_once(backend: Backend) -> None:
    model = nn.BatchNorm1d(3).to(backend.device)
    plain = nn.BatchNorm1d(3).to(backend.device)
    cuda_graphed(model, sizes=(4,))
    for index in range(4):
        x = backend.randn(4, 3)
        if index == 0:
            with pytest.warns(GraphCacheWarning, match="writes to state"):
                out = model(x)
        else:
            out = model(x)
        assert torch.allclose(out, plain(x), atol=1e-5)
        for name, tensor in state_of(model).items():
            assert torch.allclose(tensor, plain.state_dict()[name])
    assert model.forward.cache_info().hits == 3
