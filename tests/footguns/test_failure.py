"""Traps: a capture, a comparison or a replay fails."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheWarning, cuda_graphed
from graphcache.pool import Lane
from tests.helpers import (
    Backend,
    Capturing,
    Counter,
    eagerly,
    equal,
    hidden,
    info,
    outcome,
    replays,
    same_as_eager,
)
from tests.models import Net

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


@torch.library.custom_op("footguns::failing", mutates_args=())
def failing(x: Tensor) -> Tensor:
    if FAILS[0]:
        raise ValueError("the kernel refuses")
    return x * 2


FAILS = [True]


def warned_once(
    model: Any, *calls: tuple[Any, ...], match: str, want: Callable[..., Any] | None = None
) -> None:
    """One warning for all the calls, which names this file and a line; every result is eager's."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for args in calls:
            equal(model(*args), (want or partial(eagerly, model))(*args))
    texts = [str(w.message) for w in told if issubclass(w.category, GraphCacheWarning)]
    assert len(texts) == 1, texts
    assert f"{__file__}:" in texts[0]
    assert match in texts[0]
    assert info(model).hits == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_an_intermediate_is_kept_where_nothing_watches(backend: Backend, frozen: bool) -> None:
    """A replay appends nothing, and what the capture appended is memory of the graph."""
    there = hidden()
    kept = next(there)

    def forward(x: Tensor) -> Tensor:
        next(there).append(x * 2)
        return next(there)[-1] + 1

    model = cuda_graphed(forward, sizes=(2, 4))
    by = "container" if frozen else "list"
    with (
        frozen_objects() if frozen else nullcontext(),
        pytest.warns(GraphCacheWarning, match=rf"made \(float32\[2, 8\]\) and that a {by}.* keeps"),
    ):
        for number, batch in enumerate((2, 2, 2, 2), 1):
            x = backend.randn(batch, 8)
            equal(model(x), x * 2 + 1)
            assert len(kept) == number
            equal(kept[-1], x * 2)
    assert info(model).hits == 0


def test_capture_changes_a_flag_by_itself(backend: Backend, x: Tensor) -> None:
    """The capture runs the forward's Python once more; the graph has the branch of the changed flag."""
    runs = Counter()

    class Warms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            if runs.add() == 2:
                self.scale = 3.0
            return x * self.scale

    model = cuda_graphed(Warms(), sizes=(2,))
    equal(model(x), x)
    for _ in range(3):
        model.scale = 1.0
        equal(model(x), x)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """As servers do after their start: what there is by then is told of no more."""
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if before == 0:
            gc.unfreeze()


def test_objects_were_frozen(backend: Backend, x: Tensor) -> None:
    """Intermediates are freed in a capture; `gc.freeze` hides them from a search."""
    model = cuda_graphed(Net(backend.device), sizes=(2, 4))
    with frozen_objects():
        replays(model, x)


def test_item(backend: Backend) -> None:
    """`.item()` ends the capture, or its value is frozen."""
    model = cuda_graphed(lambda x: x * x.max().item(), sizes=(2, 4))
    warned_once(model, *((backend.randn(b, 8),) for b in (2, 2, 3, 4, 3)), match="host")


def test_item_of_a_replaced_value(backend: Backend) -> None:
    """`.item()` ends the capture, under a condition that the first call does not meet."""

    class Sometimes(nn.Module):
        check = False

        def forward(self, x: Tensor) -> Tensor:
            return x * x.max().item() if self.check else x * 2

    model = cuda_graphed(Sometimes(), sizes=(2,))
    for check in (False, True, False, True):
        model.check = check
        for _ in range(3):
            same_as_eager(model, backend.randn(2, 8), times=1)


def test_cpu(backend: Backend) -> None:
    """A copy to the host waits for the device, which ends a capture."""
    model = cuda_graphed(lambda x: x + x.cpu().to(x.device), sizes=(2, 4))
    warned_once(model, *((backend.randn(b, 8),) for b in (2, 2, 3)), match="a value on the host: `.cpu")


@pytest.mark.parametrize("mask", [lambda x: x[x > 0].sum() + x, lambda x: x.nonzero().sum() + x])
def test_nonzero_and_masks(backend: Backend, mask: Callable[[Tensor], Tensor]) -> None:
    """Shapes that depend on values end the capture."""
    model = cuda_graphed(mask, sizes=(2, 4))
    warned_once(model, *((backend.randn(b, 8),) for b in (2, 2, 3)), match="depends on values")


def test_an_exception_while_capturing_only(backend: Backend) -> None:
    """The graph, the stream and the generator are left half done; the caller has a result already."""

    def picky(x: Tensor) -> Tensor:
        if Capturing():
            raise KeyError("not now")
        return x * 2

    model = cuda_graphed(picky, sizes=(2,), pool=(pool := backend.pool()))
    for _ in range(5):
        x = backend.randn(2, 8)
        equal(model(x), x * 2)
    in_good_order(backend, pool)


def test_a_failed_capture_is_not_tried_on_every_call(backend: Backend, monkeypatch: Any) -> None:
    """Each call pays for an attempt, which costs many times an eager call."""
    attempts: list[int] = []
    capture = Lane.capture

    def counted(self: Lane, *args: Any) -> Any:
        attempts.append(1)
        return capture(self, *args)

    monkeypatch.setattr(Lane, "capture", counted)
    model = cuda_graphed(lambda x: x * (x.sum().item() if Capturing() else x.sum()), sizes=(2, 4))
    for batch in (2, 3, 4) * 10:
        same_as_eager(model, backend.randn(batch, 8), times=1)
    assert 1 <= len(attempts) <= 4
    assert info(model).captures == 0


def test_an_exception_at_the_first_call(backend: Backend, x: Tensor) -> None:
    """The exception ends the capture for good, though only that call was wrong."""
    model = cuda_graphed(lambda x: x @ backend.randn(8, 2) if broken else x * 2, sizes=(2,))
    broken = True
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :5])
    broken = False
    replays(model, x)


def test_a_custom_op_fails(backend: Backend, x: Tensor) -> None:
    """An exception of the kernel ends the capture, at first or later."""
    model = cuda_graphed(lambda x: failing(x) + 1, sizes=(2,), pool=(pool := backend.pool()))
    FAILS[0] = True
    for _ in range(2):
        with pytest.raises(ValueError, match="the kernel refuses"):
            model(x)
    FAILS[0] = False
    same_as_eager(model, x)
    in_good_order(backend, pool)


def test_out_of_memory_half_way_down_the_ladder(backend: Backend, monkeypatch: Any) -> None:
    """The capture of a size fails; the sizes that fit must stay."""
    capture, attempts = Lane.capture, []

    def scarce(self: Lane, *args: Any) -> Any:
        attempts.append(1)
        if len(attempts) == 2:
            raise torch.OutOfMemoryError("pretended")
        return capture(self, *args)

    monkeypatch.setattr(Lane, "capture", scarce)
    model = cuda_graphed(Net(backend.device), sizes=(1, 2, 4, 8), pool=(pool := backend.pool()))
    for batch in (8, 4, 3, 2, 1, 7, 8, 3):
        same_as_eager(model, backend.randn(batch, 8), times=2)
    assert len(attempts) == 4
    assert info(model).sizes == (1, 2, 8)
    assert info(model).hits >= 8
    in_good_order(backend, pool)


def test_out_of_memory_at_every_size(backend: Backend, monkeypatch: Any) -> None:
    """No size fits, and each call tries again."""
    attempts: list[int] = []

    def none_left(self: Lane, *args: Any) -> Any:
        attempts.append(1)
        raise torch.OutOfMemoryError("pretended")

    model = cuda_graphed(Net(backend.device), sizes=(2, 4), pool=(pool := backend.pool()))
    with monkeypatch.context() as patch:
        patch.setattr(Lane, "capture", none_left)
        for batch in (2, 2, 3, 4, 2):
            same_as_eager(model, backend.randn(batch, 8), times=2)
    assert len(attempts) <= 4
    in_good_order(backend, pool)


def in_good_order(backend: Backend, pool: graphcache.GraphPool) -> None:
    """Another module captures and replays, the generator works, and the stream is the caller's."""
    x = backend.randn(2, 8)
    replays(cuda_graphed(Net(backend.device), sizes=(2, 4), pool=pool), x)
    drop = cuda_graphed(nn.Dropout(0.5), sizes=(2,), pool=pool)
    for _ in range(3):
        torch.manual_seed(5)
        got, after = drop(x).clone(), torch.rand(3, device=backend.device)
        torch.manual_seed(5)
        equal(got, eagerly(drop, x))
        equal(after, torch.rand(3, device=backend.device))
    assert info(drop).hits == 2
    assert gc.isenabled()
    if backend.device.type == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_process_goes_on_after_every_kind_of_failure(backend: Backend, x: Tensor) -> None:
    """One failure leaves the generator, the allocator or the stream in the middle of a capture."""
    pool = backend.pool()
    drop = cuda_graphed(nn.Dropout(0.5), sizes=(2,), pool=pool)
    drop(x)
    for bad in (
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0].sum() + x,
        lambda x: x + x.cpu().to(x.device),
        lambda x: torch.nn.functional.dropout(x) * x.sum().item(),
    ):

        def hidden(x: Tensor, bad: Any = bad) -> Tensor:
            return bad(x) if Capturing() else x * 2

        equal(cuda_graphed(hidden, sizes=(2, 4), pool=pool)(x), x * 2)
        cuda_graphed(bad, sizes=(2, 4), pool=pool)(x)
    in_good_order(backend, pool)
    torch.manual_seed(3)
    got = drop(x).clone()
    torch.manual_seed(3)
    equal(got, eagerly(drop, x))


def test_an_error_in_a_replayed_call_leaves_the_next_one_alone(backend: Backend, net: Net) -> None:
    """A wrong argument is copied into the graph's memory, or raises half way."""
    replays(net, x := backend.randn(2, 8))
    for bad in (backend.randn(2, 7), "text", None):
        assert isinstance(outcome(net, bad), Exception)
        same_as_eager(net, x, times=1)
    assert isinstance(outcome(net), TypeError)
    assert isinstance(outcome(net, x, x), TypeError)
    replays(net, x)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_kernel_runs_where_no_capture_sees_it(backend: Backend, missing: int) -> None:
    """A kernel on the legacy stream runs while a graph is captured, and in no replay."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = x * 2, x + 1
        if not Capturing():
            outputs[missing].mul_(3)
        return outputs

    model = cuda_graphed(forward, sizes=(2, 4))
    x = backend.randn(2, 8)
    with pytest.warns(GraphCacheWarning, match="its graph returns something else"):
        equal(model(x)[missing], forward(x)[missing])
    for batch in (2, 3, 4):
        x = backend.randn(batch, 8)
        equal(model(x)[missing], forward(x)[missing])
    assert info(model).hits == 0


def test_no_memory_is_left_to_compare_a_replay(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph needs no more memory, and serves."""

    def fails(*_: object) -> bool:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("graphcache.capture.verify.same", fails)
    replays(cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,)), backend.randn(2, 8))


def test_forward_names_the_default_stream(backend: Backend) -> None:
    """The default stream is not that of the capture, which ends or misses the kernels."""
    cuda = backend.name == "cuda"

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        with torch.cuda.stream(torch.cuda.default_stream()) if cuda else nullcontext():
            y.mul_(3)
        return y

    model = cuda_graphed(forward, sizes=(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphCacheWarning)
        for _ in range(3):
            x = backend.randn(2, 8)
            equal(model(x), x * 6)
    assert info(model).hits == (0 if cuda else 2)


def test_interrupted_while_capturing(backend: Backend) -> None:
    """Ctrl-C leaves a lock or a capture behind."""
    presses = hidden(True)

    def interrupted(x: Tensor) -> Tensor:
        if Capturing() and next(presses):
            next(presses).clear()
            raise KeyboardInterrupt
        return x * 2

    model = cuda_graphed(interrupted, sizes=(2, 4), pool=(pool := backend.pool()))
    x = backend.randn(2, 8)
    with pytest.raises(KeyboardInterrupt):
        deque(map(model, [x] * 3))
    same_as_eager(model, x)
    in_good_order(backend, pool)
