"""Comparisons with eager: what they find, what they let pass, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import _C, CheckError, GraphCacheWarning, config, cuda_graphed
from graphcache.capture import mixing, verify
from graphcache.tracing import op_recorder
from tests.helpers import EMULATED, Backend, eagerly, equal, info, same_as_eager

# Warnings about rows are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("on", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.on > 0, x - x.mean(0), x)


def padded(model: Any, backend: Backend, batches: tuple[int, ...], *shape: int) -> int:
    """Calls with each batch twice; returns how many padded calls were replayed."""
    before = sum(info(model).padded.values())
    for batch in batches:
        for _ in range(2):
            x = backend.randn(batch, *shape)
            equal(model(x), eagerly(model, x))
    return sum(info(model).padded.values()) - before


@pytest.mark.parametrize(
    "forward",
    [
        nn.Linear(8, 8),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1)),
        nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Softmax(-1)).eval(),
        lambda x: x.masked_fill(torch.arange(8, device=x.device) > 5, float("-inf")),
        lambda x: x.masked_fill(x > 1, torch.finfo(x.dtype).min),
        lambda x: (x * 2, x.argmax(1), x.new_zeros(3)),
        lambda x: (x.topk(3).values, x.sort(1).indices),
        lambda x: (x * 2, torch.zeros(len(x), dtype=torch.bool, device=x.device)),
    ],
    ids=["linear", "norm", "batch norm", "infinite", "masked", "argmax", "topk", "flags"],
)
def test_independent_rows_are_padded(backend: Backend, forward: Any) -> None:
    if isinstance(forward, nn.Module):
        forward.to(backend.device)
    model = cuda_graphed(forward, sizes=(8,))
    assert padded(model, backend, (8, 5, 3), 8) == 3 + 5
    assert not info(model).notes


def test_each_batch_of_a_size_is_compared_once(backend: Backend) -> None:
    model = cuda_graphed(nn.Linear(4, 4).to(backend.device), sizes=(64,))
    for _ in range(3):
        for batch in range(64, 32, -1):
            model(backend.randn(batch, 4))
    assert info(model).eager["compared with a padded replay"] == 31


def test_a_later_batch_costs_few_replays(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []
    try_out = verify.Bucket.try_out

    def counted(self: Any, call: Any, number: int) -> Any:
        replays.append(call.batch)
        return try_out(self, call, number)

    monkeypatch.setattr(verify.Bucket, "try_out", counted)
    model = cuda_graphed(nn.Linear(4, 4).to(backend.device), sizes=(8,))
    model(backend.randn(8, 4))
    replays.clear()
    model(backend.randn(5, 4))
    first = len(replays)
    replays.clear()
    model(backend.randn(3, 4))
    assert len(replays) <= 3 < first


def test_a_write_to_what_a_graph_reads_ends_what_was_proved(backend: Backend) -> None:
    model = cuda_graphed(Mixes().to(backend.device), sizes=(8,))
    assert padded(model, backend, (8, 5), 4) == 3
    model.on.fill_(1)
    with pytest.warns(GraphCacheWarning, match="its rows depend on each other"):
        assert padded(model, backend, (5, 3), 4) == 0


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.mean": lambda x: x - x.mean(0),
    "aten.amax": lambda x: (x / x.abs().amax()).round() * 4,  # as dynamic quantisation scales
    "aten.flip": lambda x: x * (x.flip(0) > 0).cumsum(0).flip(0),
    "aten.mm": lambda x: (x @ x.T).softmax(1) @ (x * 2),
}


@pytest.mark.parametrize("name", MIXING)
def test_note_names_the_operator_that_mixes_rows(backend: Backend, name: str) -> None:
    model = cuda_graphed(MIXING[name], sizes=(8,))
    with pytest.warns(GraphCacheWarning, match=rf"first in {name}, at .*test_verify\.py"):
        padded(model, backend, (8, 5), 2)
    (note,) = info(model).notes
    assert f"its rows depend on each other, first in {name}" in note


def test_search_for_the_operator_fails_and_the_call_returns(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(mixing, "trace_forward", fails)
    model = cuda_graphed(MIXING["aten.mean"], sizes=(8,))
    with pytest.warns(GraphCacheWarning, match="its rows depend on each other"):
        padded(model, backend, (8, 5), 2)
    assert "first in" not in info(model).notes[0]


def test_state_that_is_written_before_each_call_is_padded_soon(backend: Backend) -> None:
    model = cuda_graphed(Mixes().to(backend.device), sizes=(8,))
    model(backend.randn(8, 4))
    for _ in range(verify.MAX_CHANGES + 2):
        model.on.fill_(-1.0)
        same_as_eager(model, backend.randn(5, 4), times=1)
    assert info(model).replays[8] == 1


def test_parameters_of_proved_rows_may_be_trained(backend: Backend) -> None:
    model = cuda_graphed(nn.Linear(4, 4).to(backend.device), sizes=(8,))
    assert padded(model, backend, (8, 5), 4) == 3
    with torch.no_grad():
        model.weight.mul_(2)
    model(backend.randn(5, 4))
    assert info(model).padded[8] == 6


@EMULATED
def test_a_graph_that_never_repeats_is_judged_within_rounding(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with atomic additions, whose order changes."""
    rounds = iter(range(10_000))

    def first_rows(result: Any, outputs: Any, batch: int) -> list[Tensor]:
        return [tensor * (1 + next(rounds) * 1e-7) for tensor in given(result, outputs, batch)]

    given = verify.first_rows
    monkeypatch.setattr(verify, "first_rows", first_rows)
    model = cuda_graphed(nn.Linear(4, 4), sizes=(8,))
    assert padded(model, backend, (8, 5), 4) == 3
    assert info(model).notes == (verify.NOT_REPEATED,)
    mixing = cuda_graphed(lambda x: x - x.mean(0), sizes=(8,))
    with pytest.warns(GraphCacheWarning, match="its rows depend on each other"):
        assert padded(mixing, backend, (8, 5), 4) == 0


@EMULATED
def test_nan_is_kept_from_indices_made_of_floating_point(backend: Backend) -> None:
    """On a GPU, an index that is out of range stops the device."""
    table = torch.randn(10, 4)
    model = cuda_graphed(lambda x: table[(x[:, 0].sigmoid() * 9).long()] + x, sizes=(8,))
    assert padded(model, backend, (8, 5), 4) == 3


def test_a_comparison_writes_state_once(backend: Backend) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.n.add_(1)

    model = cuda_graphed(Counts().to(backend.device), sizes=(8,), pad=0)
    for number, batch in enumerate((8, 5, 5, 3, 3, 5), 1):
        x = backend.randn(batch, 4)
        equal(model(x), x + number)
        assert model.n.item() == number
    assert info(model).padded[8] == 3 + 5 + 3
    assert not info(model).notes


def test_large_state_is_compared_by_structure(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_recorder, "MAX_UNDO", 10)
    cache = torch.zeros(9, 4, device=backend.device)

    def forward(x: Tensor, slots: Tensor) -> Any:
        cache[slots] = x
        return cache[slots] * 2, len(x) > 4

    model = cuda_graphed(forward, sizes=(8,), pad={"slots": 8})
    for batch in (8, 6, 6, 3, 3):
        x, slots = backend.randn(batch, 4), torch.arange(batch, device=backend.device)
        equal(model(x, slots), (x * 2, batch > 4))
        if batch == 6:
            assert verify.STRUCTURE_ONLY in info(model).notes
    assert info(model).padded[8] == 2


def test_padding_alone_is_compared_where_pad_is_given(backend: Backend) -> None:
    """Positions of one text depend on each other; those that the mask hides do not matter."""

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        scores = (x @ x.t()).masked_fill(mask[None] == 0, float("-inf"))
        return scores.softmax(-1) @ x

    model = cuda_graphed(attend, sizes=(8,), pad={"x": 0, "mask": 0})
    for batch in (8, 5, 5, 3, 3):
        x = backend.randn(batch, 4)
        same_as_eager(model, x, torch.ones(batch, device=backend.device), times=1)
    assert info(model).padded[8] == 3 + 5


def differ(want: Any, got: Any) -> bool:
    return not verify.same(torch.as_tensor(want), torch.as_tensor(got))


def test_differences_are_measured_by_row_and_column() -> None:
    want = torch.randn(16, 32)
    assert not differ(want, want * (1 + 1e-6))
    for place in (0, slice(None)), (slice(None), 0):
        large, off = want.clone(), want.clone()
        large[place] = off[place] = torch.finfo(torch.float32).min
        off[-1, -1] += 0.1
        assert differ(large, off)
    scattered = torch.where(torch.rand_like(want) > 0.5, want, -1e9)
    assert differ(scattered, torch.where(scattered > -1e8, want + 0.1, scattered))
    assert differ([1.0, float("nan")], [1.0, 2.0])
    assert differ([1.0, float("inf")], [1.0, float("-inf")])
    assert not differ([1.0, float("nan"), float("inf")], [1.0, float("nan"), float("inf")])
    assert not differ(torch.zeros(0), torch.zeros(0))
    assert differ([1 + 1j, 2j], [1 + 1j, 3j])


def test_versions_count_writes() -> None:
    one, other = torch.zeros(2), torch.zeros(2)
    versions = _C.Versions([one, other])
    before = versions.current()
    one[:1].add_(1)
    assert versions.current() == [before[0] + 1, before[1]]
    versions.drop(0)
    one.add_(1)
    assert versions.current() == [0, before[1]]
    with torch.inference_mode():
        assert _C.Versions([torch.zeros(2)]).current() == [0]


# GRAPHCACHE_CHECK=1


def test_check_compares_each_replay_with_eager(backend: Backend) -> None:
    with config.switched(config.check_var):
        model = cuda_graphed(Mixes().to(backend.device), sizes=(8,))
        assert padded(model, backend, (8, 5), 4) == 3
        model.on.data.fill_(1)  # which no version counts
        with pytest.raises(CheckError, match=r"Mixes.forward, call 5 \(5 rows, padded to 8\)") as error:
            model(backend.randn(5, 4))
    for text in ("tensor 0", "20 of 20 places", "eagerly", "replayed", "the largest difference is"):
        assert text in str(error.value)


def test_check_leaves_state_and_draws_as_one_call_does(backend: Backend) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x) + self.n.add_(1)

    model, twin = Draws().to(backend.device), Draws().to(backend.device)
    results = []
    with config.switched(config.check_var):
        cuda_graphed(model)
        for each in (twin, model):
            torch.manual_seed(0)
            results.append([each(torch.ones(2, 2, device=backend.device)).clone() for _ in range(4)])
    equal(*results)
    assert info(model).hits == 3


def test_check_sees_what_is_written_outside(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch.zeros((), device=backend.device)

    def forward(x: Tensor) -> Tensor:
        counter.add_(1)
        return x * 2

    with config.switched(config.check_var):
        model = cuda_graphed(forward)
        for _ in range(3):
            model(backend.randn(2, 2))
        monkeypatch.setattr(verify.Bucket, "replay", lambda self, call, *_, **__: call.tensors[0] * 2)
        with pytest.raises(CheckError, match="in what it wrote outside itself"):
            model(backend.randn(2, 2))
