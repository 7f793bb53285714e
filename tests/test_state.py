"""Contract 1, 5 and 6: how often the forward runs, and what it writes, is what eager would do."""

import functools
import gc
import tempfile
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.conftest import MLP, Backend, eager, hidden


def test_the_first_call_runs_once_and_captures_execute_nothing(backend: Backend, mlp: MLP) -> None:
    """One run for the call, one for each size: a capture runs Python, but no kernel."""
    cuda_graphed(mlp, sizes=(1, 2, 4))
    x = backend.randn(4, 8)
    mlp(x)
    assert int(mlp.runs) == 1 + 3
    mlp(x)
    assert int(mlp.runs) == 1 + 3
    mlp(x[:3])  # the first padded replay of size 4 is compared with eager
    assert int(mlp.runs) == 1 + 3 + 1
    for batch in (4, 3, 4, 3):
        mlp(x[:batch])
    assert int(mlp.runs) == 1 + 3 + 1


class Cached(nn.Module):
    """A KV cache as in a decode step: one row of state for each slot, and a counter of steps."""

    def __init__(self, slots: int = 8) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(slots + 1, 2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        self.steps.add_(1)
        self.cache[slots] = self.cache[slots] + x
        return self.cache[slots] * 2


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_counter_advances_once_a_call(backend: Backend) -> None:
    model = cuda_graphed(Cached().to(backend.device), sizes=(1, 2, 4), pad={"slots": -1})
    for step, batch in enumerate((4, 3, 3, 1, 2, 4, 0, 7), 1):
        model(backend.randn(batch, 2), torch.arange(batch, device=backend.device))
        assert model.steps.item() == step


def test_padded_rows_write_to_the_sink_only(backend: Backend) -> None:
    model = cuda_graphed(Cached().to(backend.device), sizes=(4, 8), pad={"slots": -1})
    plain = Cached().to(backend.device)
    for batch in (8, 3, 5, 2, 8, 1, 4):
        x = backend.randn(batch, 2)
        slots = torch.randperm(8, device=backend.device)[:batch]
        assert torch.allclose(model(x, slots), plain(x, slots))
        assert torch.allclose(model.cache[:-1], plain.cache[:-1])
    told = model.forward.cache_info()
    assert told.misses == 1
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
    with pytest.warns(GraphCacheWarning, match=r"exactly the batch sizes.*pad=\{'argument': value\}"):
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


def test_a_written_argument_is_bound_and_its_mutation_reaches_the_caller(backend: Backend) -> None:
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
    assert model.forward.cache_info().misses == 1


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


def test_writing_to_an_output_of_a_graph(backend: Backend) -> None:
    """It lies in memory that the graph itself overwrites, so that call runs eagerly."""
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


def test_warmup_captures_and_changes_nothing(backend: Backend) -> None:
    model = cuda_graphed(Cached().to(backend.device), sizes=(2, 4), pad={"slots": -1})
    before = state_of(model)
    torch.manual_seed(3)
    random = torch.rand(1)
    torch.manual_seed(3)
    slots = torch.arange(3, device=backend.device)
    model.forward.warmup(torch.ones(3, 2, device=backend.device), slots)
    assert torch.equal(torch.rand(1), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(model).items())
    told = model.forward.cache_info()
    assert told.captures == 2
    assert told.calls == 0
    out = model(torch.ones(3, 2, device=backend.device), slots)
    assert out.eq(2).all()
    assert model.forward.cache_info().replays == {4: 1}
    model.forward.warmup(torch.ones(3, 2, device=backend.device), slots)  # nothing left to do
    assert model.forward.cache_info().captures == 2


def test_a_warmup_that_captures_nothing_says_so(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    with torch.enable_grad(), pytest.warns(GraphCacheWarning, match="captured nothing: gradients"):
        mlp.forward.warmup(backend.randn(2, 8))


def test_what_needs_a_warm_up_gets_one_without_its_effects(backend: Backend) -> None:
    """A library that refuses to work in a capture until it has seen the size, as autotuners do."""
    there = hidden()  # where nothing watches, as in a library
    tuned = next(there)

    class Tuned(Cached):
        def forward(self, x: Tensor, slots: Tensor) -> Tensor:
            if x.shape[0] not in next(there):
                if capturing:
                    raise RuntimeError("not while a capture is under way")
                next(there).append(x.shape[0])
            return super().forward(x, slots)

    capturing = Capturing()
    model = cuda_graphed(Tuned().to(backend.device), sizes=(2, 4), pad={"slots": -1})
    for step, batch in enumerate((3, 3, 2, 4), 1):
        model(torch.ones(batch, 2, device=backend.device), torch.arange(batch).to(backend.device))
        assert model.steps.item() == step
    assert model.cache[:4, 0].tolist() == [4, 4, 3, 1]
    assert set(tuned) == {2, 3, 4}
    assert model.forward.cache_info().hits == 3


class Capturing:
    """True while a graph is being captured, on either runtime."""

    def __bool__(self) -> bool:
        # Not by torch.cuda, which says so too where a forward is observed as in a capture.
        if torch.cuda.is_available() and torch._C._cuda_isCurrentStreamCapturing():
            return True
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        return any(type(mode).__name__ == "_Recorder" for mode in modes)


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


def test_what_the_garbage_collector_runs_is_none_of_the_forward(backend: Backend) -> None:
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


def test_names_of_temporary_files_are_no_random_numbers_of_the_forward(backend: Backend) -> None:
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
