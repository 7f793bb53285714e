"""A first call runs the forward once; warm-up, failure, threads and logging."""

import gc
import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import _C, GraphCacheWarning, cuda_graphed
from graphcache.report.reasons import Reason
from tests.helpers import Backend, Capturing, Counter, close, eager, hidden, state_of
from tests.models import MLP, Cached


def test_process_is_in_good_order_after_a_failed_capture(backend: Backend, mlp: MLP) -> None:
    """The operation is hidden from the first call, so that the capture itself fails."""
    there = hidden()  # where nothing watches
    calls = next(there)

    def sometimes(x: Tensor) -> Tensor:
        next(there).append(1)
        return x * 2 if len(next(there)) == 1 else x * x.sum().item()

    cuda_graphed(mlp, sizes=(2,), pool=(pool := backend.pool()))
    x = backend.randn(2, 8)
    mlp(x)
    drop = cuda_graphed(nn.Dropout(0.5), sizes=(2,), pool=pool)
    drop(x)
    for _ in range(2):
        failing = cuda_graphed(sometimes, sizes=(2, 4), pool=pool)
        calls.clear()
        with pytest.warns(GraphCacheWarning, match="can't be captured"):
            assert torch.equal(failing(x), x * 2)
    if backend.name == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert gc.isenabled()
    torch.manual_seed(1)
    first = torch.rand(3, device=backend.device)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, device=backend.device), first)
    assert close(mlp(x), eager(mlp, x))  # graphs of before still replay
    assert mlp.forward.cache_info().hits == 1
    torch.manual_seed(2)
    dropped = drop(x).clone()
    torch.manual_seed(2)
    assert torch.equal(dropped, eager(drop, x))
    later = cuda_graphed(MLP().to(backend.device), sizes=(2,), pool=pool)  # and new ones are made
    later(x)
    assert close(later(x), eager(later, x))
    assert later.forward.cache_info().hits == 1


def test_a_capture_that_failed_is_under_way_nowhere(backend: Backend) -> None:
    """Not in the allocator of pinned host memory either, whose filter would point to a dead graph."""
    x = backend.randn(2, 2)
    lane = (pool := backend.pool()).lane()
    with pytest.raises(RuntimeError):
        lane.capture(lambda: [x * x.sum().item()])
    assert not lane.open
    if backend.name == "cuda":
        with pytest.raises(RuntimeError, match="not currently recording"):
            _C.end_host_capture(*lane.arena.pool.id)
    graph, (output,) = pool.lane().capture(lambda: [x * 2])
    graph.replay()
    assert torch.equal(output, x * 2)


def test_an_attribute_that_cannot_be_searched_costs_no_result(backend: Backend) -> None:
    class Strange:
        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            raise ValueError("not to be looked at")

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strange = Strange()

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = backend.randn(2, 2)
    model = cuda_graphed(Holds(), sizes=(2,))
    for _ in range(3):
        assert torch.equal(model(x), x * 2)
    assert model.forward.cache_info().hits == 2


def test_a_result_that_changes_its_structure(backend: Backend) -> None:
    calls = Counter()

    def forward(x: Tensor) -> Any:
        return (x * 2, object()) if calls.add() == 4 else x * 2

    model = cuda_graphed(forward, sizes=(4,))
    x = backend.randn(3, 2)
    model(x)
    with pytest.warns(GraphCacheWarning, match="object of type builtins.object"):
        out = model(x)
    assert torch.equal(out[0], x * 2)


def test_an_exception_of_the_forward_is_the_callers(backend: Backend) -> None:
    def forward(x: Tensor) -> Tensor:
        if explain:
            raise ZeroDivisionError("mine")
        return x * 2

    explain = True
    model = cuda_graphed(forward, sizes=(2,))
    with pytest.raises(ZeroDivisionError, match="mine"):
        model(backend.randn(2, 2))
    explain = False
    x = backend.randn(2, 2)
    model(x)
    assert torch.equal(model(x), x * 2)
    assert model.cache_info().hits == 1


def test_threads_get_their_own_results(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(1, 2, 4), stale="copy", pool=backend.pool())
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with graphcache.emulate(), torch.no_grad():
            for _ in range(20):
                batch = int(torch.randint(1, 5, (1,), generator=generator))
                x = torch.randn(batch, 8, generator=generator).to(backend.device)
                if not close(mlp(x), eager(mlp, x)):
                    wrong.append(batch)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_captures_are_logged(backend: Backend, mlp: MLP, caplog: pytest.LogCaptureFixture) -> None:
    cuda_graphed(mlp, sizes=(1, 2))
    with caplog.at_level(logging.INFO, "graphcache"):
        mlp(backend.randn(2, 8))
    assert "captured MLP.forward at sizes [2, 1]" in caplog.text


def test_progress_bar_on_request_only(
    backend: Backend, mlp: MLP, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda_graphed(mlp, sizes=(1, 2))(backend.randn(2, 8))
    assert capsys.readouterr().err == ""
    cuda_graphed(mlp, sizes=(1, 2), progress=True)(backend.randn(2, 8))
    assert "graphcache: capturing MLP.forward" in capsys.readouterr().err


def test_first_call_runs_once_and_each_other_size_twice(backend: Backend, mlp: MLP) -> None:
    """One run for the call, one for each other size, and one without a kernel for each capture."""
    cuda_graphed(mlp, sizes=(1, 2, 4))
    x = backend.randn(4, 8)
    mlp(x)
    assert int(mlp.runs) == 1 + 2 + 3
    mlp(x)
    assert int(mlp.runs) == 1 + 2 + 3
    mlp(x[:3])  # the first padded replay of size 4 is compared with eager
    assert int(mlp.runs) == 1 + 2 + 3 + 1
    for batch in (4, 3, 4, 3):
        mlp(x[:batch])
    assert int(mlp.runs) == 1 + 2 + 3 + 1


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
    x = backend.randn(3, 2)
    for _ in range(2):  # the first is compared with eager
        out = model(x, slots)
    assert torch.equal(out, x * 4)
    assert model.forward.cache_info().replays == {4: 1}
    model.forward.warmup(torch.ones(3, 2, device=backend.device), slots)  # nothing left to do
    assert model.forward.cache_info().captures == 2


def test_a_warmup_that_captures_nothing_says_so(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    with torch.enable_grad(), pytest.warns(GraphCacheWarning, match="captured nothing: gradients"):
        mlp.forward.warmup(backend.randn(2, 8))


def test_warm_up_leaves_no_effects(backend: Backend) -> None:
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
        slots = torch.arange(batch, device=backend.device)
        model((slots[:, None] + 1.0).expand(batch, 2), slots)
        assert model.steps.item() == step
    assert model.cache[:4, 0].tolist() == [4, 8, 9, 4]
    assert set(tuned) == {2, 3, 4}
    assert model.forward.cache_info().hits == 2


def test_warning_of_an_uncapturable_forward_numbers_its_steps(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x * x.sum().item())
    with pytest.warns(GraphCacheWarning) as caught:
        graphed(backend.randn(2, 2))
    (warning,) = caught
    first, *steps = str(warning.message).splitlines()
    assert re.search(r"can't be captured, so it runs eagerly: .*`\.item\(\)` at .*\.py:\d+", first)
    assert [step.split(".")[0].strip() for step in steps] == ["1", "2", "3"]
    assert Reason.READS_VALUE.advice in steps[0]
    assert Path(warning.filename) == Path(__file__)
