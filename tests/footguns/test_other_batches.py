"""Traps: what one batch does not show of others, and what captures at other sizes leave behind."""

from __future__ import annotations

import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import cuda_graphed
from graphcache.runtime.undo_log import UndoLog
from tests.helpers import Backend, graphed_twin, in_step, info, same_as_eager

pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")

BATCHES = (8, 8, 8, 4, 2, 1, 4, 2, 8, 3, 3)


class Table(nn.Module):
    """Makes something for each batch that is new, and keeps it in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.made, self.items = how, {}, []
        self.grown: Tensor | None = None
        self.default = lambda x, made={}: made.setdefault(len(x), row(x))

    def forward(self, x: Tensor) -> Tensor:
        name = f"row{len(x)}"
        if self.how == "dict":
            if len(x) not in self.made:
                self.made[len(x)] = row(x)
            return x + self.made[len(x)]
        if self.how == "buffer":
            if not hasattr(self, name):
                self.register_buffer(name, row(x), persistent=False)
            return x + getattr(self, name)
        if self.how == "attribute":
            if not hasattr(self, name):
                setattr(self, name, row(x))
            return x + getattr(self, name)
        if self.how == "default argument":
            return x + self.default(x)
        if self.how == "list":
            while len(self.items) < len(x):
                self.items.append(row(x[: len(self.items) + 1]))
            return x + self.items[len(x) - 1]
        if self.grown is None or len(self.grown) < len(x):
            self.grown = row(x)
        return x + self.grown[: len(x)]


def row(x: Tensor) -> Tensor:
    return torch.arange(float(len(x)), device=x.device)[:, None] * 0.5


@pytest.mark.parametrize("how", ["dict", "buffer", "attribute", "default argument", "list", "grown"])
def test_a_table_gets_an_entry_for_each_batch(backend: Backend, how: str) -> None:
    """The table holds memory of the pool, for batches that nobody called; eager calls read that, too."""
    twin, model = Table(how), cuda_graphed(Table(how), sizes=(1, 2, 4, 8))
    for batch in BATCHES:
        in_step(model, twin, backend.randn(batch, 3))
        assert model.made.keys() == twin.made.keys()
        assert dict(model.named_buffers()).keys() == dict(twin.named_buffers()).keys()
        assert model._non_persistent_buffers_set == twin._non_persistent_buffers_set
        assert len(model.items) == len(twin.items)
    with graphcache.disabled():
        in_step(model, twin, backend.randn(1, 3))
    x = backend.randn(2, 3).requires_grad_()
    with torch.enable_grad():
        assert torch.equal(model(x), twin(x))


def test_a_table_settles_batch_by_batch(backend: Backend) -> None:
    """A capture for each new entry would never end, and eager for ever would be slow."""
    twin, model = Table("dict"), cuda_graphed(Table("dict"))
    for batch in (*range(1, 13), *range(1, 13), *range(1, 13)):
        in_step(model, twin, backend.randn(batch, 3))
    assert info(model).hits >= 12


def test_warmup_leaves_no_table_behind(backend: Backend) -> None:
    """A warm-up fills the table with memory of the pool."""
    twin, model = Table("dict"), cuda_graphed(Table("dict"), sizes=(1, 2, 4, 8))
    model.forward.warmup(backend.randn(8, 3))
    assert not model.made
    for batch in (8, 8, 4, 2, 1):
        in_step(model, twin, backend.randn(batch, 3))


class Bookkeeping(nn.Module):
    """Notes the batch in Python, in many ways."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.numbers, self.small = 0, numpy.zeros(2), False
        self.config = {"rows": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.batch = len(x)
        self.config["rows"] = len(x)
        self.numbers[0] = len(x)
        type(self).count = len(x)
        try:
            x[3]
        except IndexError:
            self.small = True
        return x * 2

    def state(self) -> tuple[Any, ...]:
        return self.batch, self.config, self.numbers.tolist(), self.small, type(self).count


def test_bookkeeping_of_the_batch_is_as_eager_leaves_it(backend: Backend) -> None:
    """An attribute, a counter of numpy and a flag of an exception stay as the last capture set them."""

    class Twin(Bookkeeping):
        pass

    twin, model = Twin(), cuda_graphed(Bookkeeping(), sizes=(1, 2, 4, 8))
    for batch in (8, 8, 8, 4, 4, 4, 8, 2, 8):
        in_step(model, twin, backend.randn(batch, 3))
        assert model.state() == twin.state()


def test_memo_of_a_function_holds_what_eager_asks_for(backend: Backend) -> None:
    """The memo gets entries of sizes that nobody called."""

    @lru_cache
    def scale(rows: int) -> float:
        return 1.0 + rows

    model = cuda_graphed(lambda x: x * scale(8) + scale(len(x)), sizes=(1, 2, 4, 8))
    for _ in range(3):
        same_as_eager(model, backend.randn(8, 3), times=1)
    assert info(model).sizes == (1, 2, 4, 8)
    assert scale.cache_info().currsize == 1
    same_as_eager(model, backend.randn(4, 3))


def test_warmup_leaves_no_result_in_a_memo(backend: Backend) -> None:
    """The memo holds a result that nobody asked for."""

    @lru_cache
    def scale(rows: int) -> float:
        return 1.0 + rows

    model = cuda_graphed(lambda x: x * scale(len(x)), sizes=(4,))
    model.warmup(backend.randn(4, 3))
    assert scale.cache_info().currsize == 0


def test_cached_property_is_made_by_the_caller_only(backend: Backend) -> None:
    """The property is made inside a capture, in memory of the pool."""

    class Lazy(nn.Module):
        @cached_property
        def small(self) -> Tensor:
            return torch.ones(3, device=backend.device)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.small if len(x) < 4 else x

    model = cuda_graphed(Lazy(), sizes=(2, 8))
    for _ in range(2):
        same_as_eager(model, backend.randn(8, 3), times=1)
    assert "small" not in vars(model)
    same_as_eager(model, backend.randn(2, 3))


HELP = 2.0


def test_a_global_that_only_large_batches_read(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of the large size keeps the old value: nobody saw the helper run."""

    def helper(x: Tensor) -> Tensor:
        return x * HELP

    model = cuda_graphed(lambda x: helper(x) if len(x) > 4 else x + 1, sizes=(4, 8))
    same_as_eager(model, backend.randn(2, 3))
    same_as_eager(model, backend.randn(8, 3))
    assert info(model).hits
    monkeypatch.setitem(globals(), "HELP", 7.0)
    same_as_eager(model, backend.randn(8, 3))


def test_an_attribute_that_only_a_batch_of_one_reads(backend: Backend) -> None:
    """The graph of size 1 keeps the old value."""

    class Single(nn.Module):
        temperature = 2.0

        def single(self, x: Tensor) -> Tensor:
            return x * self.temperature

        def forward(self, x: Tensor) -> Tensor:
            return self.single(x) if len(x) == 1 else x + 1

    model = cuda_graphed(Single())
    for batch in (4, 1, 8, 1):
        same_as_eager(model, backend.randn(batch, 3))
    model.temperature = 5.0
    same_as_eager(model, backend.randn(1, 3))


def test_guards_of_a_smaller_size_outlive_a_larger_one(backend: Backend) -> None:
    """A second capture forgets what the first one depends on."""

    class Small(nn.Module):
        temperature = 2.0

        def small(self, x: Tensor) -> Tensor:
            return x * self.temperature

        def forward(self, x: Tensor) -> Tensor:
            return self.small(x) if len(x) < 8 else x + 1

    model = cuda_graphed(Small())
    for batch in (4, 8, 4):
        same_as_eager(model, backend.randn(batch, 3))
    model.temperature = 5.0
    same_as_eager(model, backend.randn(4, 3))


def test_other_code_at_one_padded_batch_is_found(backend: Backend) -> None:
    """The code of batch 5 reads a value that no guard knows, and which makes no difference yet."""

    class Five(nn.Module):
        gain = 1.0

        def five(self, x: Tensor) -> Tensor:
            return x * self.gain

        def forward(self, x: Tensor) -> Tensor:
            return self.five(x) + 1 if len(x) == 5 else x + 1

    model = cuda_graphed(Five(), sizes=(8,))
    for batch in (8, 5, 5, 5):
        same_as_eager(model, backend.randn(batch, 3))
    model.gain = 3.0
    same_as_eager(model, backend.randn(5, 3))


def test_code_is_made_anew_at_each_call(backend: Backend) -> None:
    """The forward looks as if it ran other code at each batch."""

    def forward(x: Tensor) -> Tensor:
        pair = namedtuple("Pair", "a b")(x * 2, x + 1)
        return pair.a + pair.b

    model = cuda_graphed(forward, sizes=(4,))
    for batch in (4, 3, 3, 2, 2, 3):
        x = backend.randn(batch, 3)
        torch.testing.assert_close(model(x), forward(x))
    assert info(model).hits == 3, info(model)


def test_only_large_batches_write_to_the_argument(backend: Backend) -> None:
    """The argument of a large batch is a static input: the caller's stays as it was."""

    def forward(x: Tensor) -> Tensor:
        if len(x) > 4:
            x.mul_(2)
        return x + 1

    model = cuda_graphed(forward, sizes=(4, 8))
    for batch in (2, 8, 8, 8, 2):
        x = backend.randn(batch, 3)
        y = x.clone()
        assert torch.equal(model(x), forward(y))
        assert torch.equal(x, y)


def test_only_large_batches_draw_random_numbers(backend: Backend) -> None:
    """The graph of the large size repeats its numbers, or padded rows draw some."""
    model = cuda_graphed(
        lambda x: x + torch.rand_like(x) * 0 + torch.rand(()).to(x) if len(x) > 4 else x
    )
    for batch in (2, 8, 8, 8, 5):
        x = backend.randn(batch, 3)
        torch.manual_seed(1)
        want = x + torch.rand_like(x) * 0 + torch.rand(()).to(x) if batch > 4 else x
        torch.manual_seed(1)
        assert torch.equal(model(x), want)


class Counting(nn.Module):
    """Counts in a tensor, at large batches only."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            self.count.add_(1)
        return x * 2


def test_a_comparison_counts_once(backend: Backend) -> None:
    """The replays that a comparison makes advance the counter, six times for one call."""
    twin = Counting(backend.device)
    model = graphed_twin(twin, sizes=(2, 4))
    for batch in (2, 3, 3, 4, 3):
        in_step(model, twin, backend.randn(batch, 3))


class LastPlace(nn.Module):
    """Fills a place of a cache at each call; the first call gets the last one there is."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, 3, device=device))
        self.register_buffer("at", torch.tensor(7, device=device))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.index_copy_(0, self.at[None], x.sum(0, keepdim=True))
        self.at.add_(1)
        return x + self.cache.sum(0)


def test_first_call_fills_the_last_place_of_a_cache(backend: Backend) -> None:
    """A second run writes past the end, which ends the process' use of the device."""
    twin = LastPlace(backend.device)
    model = graphed_twin(twin, sizes=(1, 2, 4), pad=0)
    for batch in (4, 2, 4, 4, 1):
        in_step(model, twin, backend.randn(batch, 3))
        twin.at.zero_(), model.at.zero_()
    assert info(model).sizes == (1, 2, 4)


def test_forward_waits_for_its_threads(backend: Backend) -> None:
    """The first call holds a lock that the threads of the forward wait for."""
    parts = [cuda_graphed(lambda x: x * 2), cuda_graphed(lambda x: x * 3)]
    done: list[Tensor] = []

    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.workers = [ThreadPoolExecutor(2)]

        def forward(self, x: Tensor) -> Tensor:
            def run(part: Any) -> None:
                with graphcache.emulate(), torch.no_grad():
                    part(x)

            list(self.workers[0].map(run, parts))
            return x + 1

    def main() -> None:
        with graphcache.emulate(), torch.no_grad():
            model = cuda_graphed(Threaded(), sizes=(2, 4), stale="copy")
            done.extend(model(x) for _ in range(4))

    x = backend.randn(4, 3)
    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join(60)
    assert len(done) == 4
    assert all(torch.equal(out, x + 1) for out in done)
    told = any("another thread captures into the same pool" in info(part).eager for part in parts)
    assert told or backend.device.type == "cuda"  # there the stream of the capture may be asked first


def test_lines_of_the_forward_are_printed_by_its_callers(
    backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captures at other sizes print lines of batches that nobody called."""

    def forward(x: Tensor) -> Tensor:
        print(f"batch {len(x)}")
        return x * 2

    model = cuda_graphed(forward, sizes=(1, 2, 4))
    for _ in range(3):
        same_as_eager(model, backend.randn(4, 3), times=1)
    assert set(capsys.readouterr().out.split("\n")) == {"batch 4", ""}


def test_rows_that_are_written_are_all_that_is_copied(backend: Backend) -> None:
    """To put a cache back by copying all of it takes as much memory again."""
    cache = torch.zeros(1 << 16, 8, device=backend.device)
    index = torch.tensor([3, 5], device=backend.device)
    aten = torch.ops.aten
    rows = torch.ones(2, 8, device=backend.device)
    for func, args in (
        (aten.index_copy_.default, (cache, 0, index, rows)),
        (aten.index_put_.default, (cache, [index], rows)),
        (aten.scatter_.src, (cache, 0, index[:, None].expand(2, 8), rows)),
    ):
        log = UndoLog(limit=1024)
        log.before(func, args, cache)
        assert log.is_complete
        func(*args)
        assert cache.sum() == 16
        with log.undone():
            assert cache.sum() == 0
        assert cache.sum() == 16
        log.undo()
        assert cache.sum() == 0
    log = UndoLog(limit=1024)
    log.before(aten.mul_.Scalar, (cache, 2), cache)
    assert not log.is_complete
