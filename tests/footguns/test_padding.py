"""Traps: padded rows change the result of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, eagerly, info, outcome, same_as_eager

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


class Centres(nn.Module):
    """Its rows depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_mean_over_the_batch_is_subtracted(backend: Backend) -> None:
    """Padded rows count in the mean."""
    model = cuda_graphed(Centres(), sizes=(2, 4))
    for batch in (4, 3, 3, 2, 1, 1, 3):
        same_as_eager(model, backend.randn(batch, 8), times=2)
    assert info(model).hits >= 3


def test_warm_up_calls_are_all_zeros(backend: Backend) -> None:
    """Padded rows count in the mean; rows of zeros hide it from a comparison."""
    model = cuda_graphed(Centres(), sizes=(2, 4))
    for _ in range(5):
        model(torch.zeros(3, 8, device=backend.device))
    for _ in range(5):
        same_as_eager(model, backend.randn(3, 8), times=1)


@pytest.mark.parametrize("value", [1.0, -3.0])
def test_warm_up_calls_are_all_the_same(backend: Backend, value: float) -> None:
    """Padded rows count in the largest row; equal rows hide it from a comparison."""
    for pad in (None, "edge"):
        model = cuda_graphed(lambda x: x - x.max(0).values - x.min(0).values, sizes=(4,), pad=pad)
        for _ in range(5):
            model(torch.full((3, 8), value, device=backend.device))
        for _ in range(4):
            same_as_eager(model, backend.randn(3, 8), times=1)


def test_warm_up_calls_are_all_positive(backend: Backend) -> None:
    """Padded rows of zeros count in a maximum, where all else is negative."""
    model = cuda_graphed(lambda x: x + x.max(0).values, sizes=(4,))
    for _ in range(5):
        same_as_eager(model, backend.randn(3, 8).abs() + 1, times=1)
    for _ in range(5):
        same_as_eager(model, -backend.randn(3, 8).abs() - 1, times=1)


@pytest.mark.parametrize("pad", [None, 1.0])
def test_large_values_hide_a_softmax_over_rows(backend: Backend, pad: Any) -> None:
    """Padded rows count in a softmax; one row with all the weight hides it from a comparison."""
    model = cuda_graphed(lambda x: x.softmax(0), sizes=(4,), pad=pad)
    for values in ((-2000.0, 2000.0, 1000.0),) * 5 + ((-2000.0, -1000.0, -1500.0),) * 3:
        x = torch.tensor(values, device=backend.device)[:, None].expand(3, 8).contiguous()
        same_as_eager(model, x, times=1)


def test_a_warm_up_by_warmup_with_zeros(backend: Backend) -> None:
    """Padded rows count in the mean; frameworks warm up with zeros before they serve."""
    model = cuda_graphed(Centres(), sizes=(2, 4))
    model.forward.warmup(torch.zeros(3, 8, device=backend.device))
    for _ in range(3):
        model(torch.zeros(3, 8, device=backend.device))
    for _ in range(3):
        same_as_eager(model, backend.randn(3, 8), times=1)


def test_rows_depend_on_each_other_by_a_mask_of_them(backend: Backend) -> None:
    """Padded rows are attended to; the mask was off while graphs were compared with eager."""
    model = cuda_graphed(lambda x, on: x - (on * x).mean(0), sizes=(4,))
    off = torch.zeros(3, 1, device=backend.device)
    for _ in range(4):
        same_as_eager(model, backend.randn(3, 8), off, times=1)
    for _ in range(4):
        same_as_eager(model, backend.randn(3, 8), off + 1, times=1)


def test_an_unbatched_argument_of_length_one_at_batch_one(backend: Backend) -> None:
    """The argument has the length of the batch, so it is padded; a first zero hides that."""
    model = cuda_graphed(lambda x, shift: x + shift.mean(), sizes=(2, 4))
    for value in (0.0, 0.0, 0.0, 5.0, 7.0):
        shift = torch.full((1,), value, device=backend.device)
        same_as_eager(model, backend.randn(1, 8), shift, times=2)


@pytest.mark.parametrize("first", [0.0, 3.0])
def test_an_unbatched_argument_as_long_as_the_batch_by_chance(backend: Backend, first: float) -> None:
    """A table of three entries is padded with a batch of three."""
    model = cuda_graphed(lambda x, table: x + table.mean() + table[-1], sizes=(4, 8))
    for batch in (3, 3, 3, 4, 5, 3):
        table = torch.full((3,), first, device=backend.device)
        same_as_eager(model, backend.randn(batch, 8), table, times=2)
    for batch in (3, 4, 5, 3):
        same_as_eager(model, backend.randn(batch, 8), backend.randn(3), times=2)


def test_a_square_argument(backend: Backend) -> None:
    """A mask of batch by batch is padded in one of two dimensions."""
    model = cuda_graphed(lambda x, mask: mask.softmax(-1) @ x, sizes=(2, 4))
    for batch in (4, 3, 3, 2, 3, 1, 1):
        same_as_eager(model, backend.randn(batch, 8), backend.randn(batch, batch), times=2)


def test_batch_size_is_used_as_a_number(backend: Backend) -> None:
    """`x / len(x)` is baked in at the padded size."""
    model = cuda_graphed(lambda x: x / len(x), sizes=(2, 4))
    for batch in (4, 3, 3, 1, 1, 2):
        same_as_eager(model, backend.randn(batch, 8), times=2)


def test_batch_size_is_used_as_a_number_hidden_by_zeros(backend: Backend) -> None:
    """`x / len(x)` is baked in at the padded size; zeros hide it from a comparison."""
    model = cuda_graphed(lambda x: x / len(x), sizes=(4,))
    for _ in range(4):
        model(torch.zeros(3, 8, device=backend.device))
    same_as_eager(model, backend.randn(3, 8))


def test_a_branch_on_the_batch_size(backend: Backend) -> None:
    """The branch of the padded size serves the small one."""
    model = cuda_graphed(lambda x: x * 2 if len(x) > 3 else x * 3, sizes=(2, 4))
    for batch in (4, 3, 3, 2, 1, 3):
        same_as_eager(model, backend.randn(batch, 8), times=2)


def test_a_padded_row_makes_infinities(backend: Backend) -> None:
    """A padded row computes 0/0, which should harm nobody."""
    model = cuda_graphed(lambda x: x / x.norm(dim=1, keepdim=True), sizes=(4,))
    for batch in (3, 3, 2, 4):
        same_as_eager(model, backend.randn(batch, 8), times=2)
    assert info(model).padded_rows


def test_a_larger_batch_leaves_its_tail(backend: Backend) -> None:
    """Rows of the last, larger batch stay in the static input: indices that are out of range by now."""
    model = cuda_graphed(lambda x, at: x[at], sizes=(4,))
    for batch in (4, 3, 2, 1, 2, 3, 4, 1):
        at = torch.arange(batch, device=backend.device).flip(0)
        same_as_eager(model, backend.randn(batch, 8), at, times=2)
    assert info(model).hits


# Values that hide rows that depend on each other

MIXED = (8, 5, 5, 3, 5, 3)


class Gated(nn.Module):
    """Its rows depend on each other as soon as its gate opens."""

    def __init__(self, on: bool | float = 0.0) -> None:
        super().__init__()
        gate = torch.tensor(on)
        self.gate = nn.Parameter(gate, requires_grad=gate.is_floating_point())
        self.table = nn.Embedding(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.is_floating_point() else self.table(x)
        centred = rows - rows.mean(0)
        return rows + self.gate * centred if rows is x else torch.where(self.gate > 0, centred, rows)


def step(model: nn.Module) -> None:
    model.gate.grad = -torch.ones_like(model.gate)
    torch.optim.SGD([model.gate], lr=1.0).step()
    model.gate.grad = None


OPEN = {
    "data": lambda model: model.gate.data.fill_(1),
    "step": step,
    "state": lambda model: model.load_state_dict(
        {**model.state_dict(), "gate": torch.ones_like(model.gate)}
    ),
}


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, float("-inf"), float("inf"), -1e4])
def test_masked_values_hide_rows_that_mix(backend: Backend, fill: float) -> None:
    """Padded rows count in the mean; the values of a mask are so large that nothing else counts."""
    mask = torch.arange(8, device=backend.device) % 3 == 1
    model = cuda_graphed(lambda x: (x - 0.05 * x.mean(0)).masked_fill(mask, fill), sizes=(8,))
    for batch in MIXED:
        same_as_eager(model, backend.randn(batch, 8), times=1)
    assert not info(model).padded_rows


@pytest.mark.parametrize("dim", [0, 1])
def test_a_large_row_or_column_hides_rows_that_mix(backend: Backend, dim: int) -> None:
    """Padded rows count in the mean; by the largest value that is nothing."""
    model = cuda_graphed(lambda x: torch.cat([x * 1e5, x - 0.05 * x.mean(0)], dim)[: len(x)], sizes=(8,))
    for batch in MIXED:
        same_as_eager(model, backend.randn(batch, 8), times=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_hides_rows_that_mix(backend: Backend, dtype: torch.dtype) -> None:
    """Padded rows count in the mean; that is less than the kernels of two sizes may differ by."""
    model = cuda_graphed(lambda x: x - 0.05 * x.mean(0), sizes=(8,))
    for batch in MIXED:
        x = (backend.randn(batch, 64) + 1).to(dtype)
        assert torch.equal(model(x), eagerly(model, x))


@pytest.mark.parametrize("how", OPEN)
def test_a_gate_that_is_zero_opens_later(backend: Backend, how: str) -> None:
    """Padded rows count in the mean, as soon as training opens a gate."""
    model = cuda_graphed(Gated().to(backend.device), sizes=(8,))
    for change in (lambda _: None, OPEN[how]):
        change(model)
        for batch in MIXED:
            same_as_eager(model, backend.randn(batch, 8), times=1)


@pytest.mark.parametrize("how", ["step", "state"])
def test_a_gate_over_tokens_opens_later(backend: Backend, how: str) -> None:
    """Padded rows count in the mean, as soon as training opens a gate; tokens can't be NaN."""
    model = cuda_graphed(Gated().to(backend.device), sizes=(8,))
    for change in (lambda _: None, OPEN[how]):
        change(model)
        for batch in MIXED:
            x = torch.randint(9, (batch,), device=backend.device)
            same_as_eager(model, x, times=1)


def test_a_flag_is_set_in_place_later(backend: Backend) -> None:
    """Padded rows count in the mean, as soon as a buffer of booleans says so."""
    on = torch.tensor(False, device=backend.device)
    model = cuda_graphed(lambda x: torch.where(on, x - x.mean(0), x), sizes=(8,))
    for value in (False, True):
        on.fill_(value)
        for batch in MIXED:
            same_as_eager(model, backend.randn(batch, 8), times=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_first_rows_are_not_finite(backend: Backend, value: float) -> None:
    """Padded rows count in the largest; where a row is NaN, so are all results."""
    model = cuda_graphed(lambda x: torch.cat([x.amax(0) + 0 * x[:, :7], x[:, 7:]], 1), sizes=(8,))
    for batch in MIXED:
        x = backend.randn(batch, 8)
        x[0, :7] = value
        same_as_eager(model, x, times=1)
    for batch in MIXED:
        same_as_eager(model, backend.randn(batch, 8), times=1)


def test_first_results_are_all_zero(backend: Backend) -> None:
    """`x / len(x)` is baked in at the padded size; a factor of zero hides it."""
    gain = torch.zeros((), device=backend.device)
    model = cuda_graphed(lambda x: gain * x / len(x), sizes=(8,))
    for value in (0.0, 1.0):
        gain.data.fill_(value)
        for batch in MIXED:
            same_as_eager(model, backend.randn(batch, 8), times=1)


def test_a_limit_that_no_row_has_reached(backend: Backend) -> None:
    """Padded rows count in a maximum that switches something, at values that come later."""
    model = cuda_graphed(lambda x: (x * 2, x.amax() > 50), sizes=(8,))
    for batch in MIXED:
        same_as_eager(model, backend.randn(batch, 8), times=1)
    assert not info(model).padded_rows


# What only some batches of a size do


def raises_if_odd(x: Tensor) -> Tensor:
    if len(x) % 2:
        raise ValueError("the batch is odd")
    return x * 2


BY_BATCH: dict[str, Callable[[Tensor], Any]] = {
    "squeeze": lambda x: x[:, :1].squeeze(),
    "first of one": lambda x: x[0] if len(x) == 1 else x * 1,
    "list of one": lambda x: [x * 1] if len(x) == 1 else x * 1,
    "none for one": lambda x: (x * 1, None if len(x) == 1 else x + 1),
    "branch at three": lambda x: x * 3 if len(x) == 3 else x * 2,
    "branch above five": lambda x: x * 3 if len(x) > 5 else x * 2,
    "flag": lambda x: (x * 2, len(x) > 5),
    "number": lambda x: (x * 2, 1 / len(x)),
    "tensor on the host": lambda x: (x * 2, torch.tensor(len(x) > 5)),
    "the argument itself": lambda x: x + 1 if len(x) == 3 else x,
    "keys": lambda x: {"all": x * 2} if len(x) > 4 else {"all": x * 2, "few": x + 1},
    "pairs": lambda x: x.view(-1, 2, x.shape[1]).flip(1).reshape(-1, x.shape[1]),
    "raises if odd": raises_if_odd,
    "at least six": lambda x: x.new_zeros(max(len(x), 6), 2) + x[0, 0],
    "one more at seven": lambda x: torch.cat([x, x[:1]]) if len(x) == 7 else x * 1,
}


@pytest.mark.parametrize("sizes", [None, (4, 8)], ids=str)
@pytest.mark.parametrize("kind", BY_BATCH)
def test_some_batches_of_a_size_differ(
    backend: Backend, kind: str, sizes: tuple[int, ...] | None
) -> None:
    """A graph holds what its size does; another batch would return, or raise, something else."""
    model = cuda_graphed(BY_BATCH[kind], sizes=sizes)
    for batch in (8, 6, 6, 7, 6, 5, 5, 3, 3, 1, 1, 2, 6, 7, 3, 1):
        x = backend.randn(batch, 8)
        want, got = outcome(eagerly, model, x), outcome(model, x)
        assert type(got) is type(want)
        if not isinstance(want, Exception):
            torch.testing.assert_close(got, want)


def test_some_batches_return_the_argument_itself(backend: Backend) -> None:
    """The values are the same, and yet a result that is written to is the argument, or is not."""
    model = cuda_graphed(lambda x: (x * 2, x if len(x) == 3 else x * 1), sizes=(4,))
    for batch in (4, 4, 3, 3, 3):
        x = backend.randn(batch, 8)
        assert (model(x)[1] is x) == (batch == 3)


@pytest.mark.parametrize("kind", BY_BATCH)
def test_some_batches_of_a_size_differ_with_a_cache(backend: Backend, kind: str) -> None:
    """A graph holds what its size does; `pad` speaks of rows only, not of numbers of rows."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(9, 8))

        def forward(self, x: Tensor, slots: Tensor) -> Any:
            self.cache[slots] = x
            return BY_BATCH[kind](self.cache[slots])

    model, twin = Cached().to(backend.device), Cached().to(backend.device)
    cuda_graphed(model, sizes=(4, 8), pad={"slots": 8})
    for batch in (8, 6, 6, 7, 6, 5, 5, 3, 3, 1, 1, 2, 6, 7, 3, 1):
        x, slots = backend.randn(batch, 8), torch.randperm(8, device=backend.device)[:batch]
        want, got = outcome(twin, x, slots), outcome(model, x, slots)
        assert type(got) is type(want)
        if not isinstance(want, Exception):
            torch.testing.assert_close(got, want)
        assert torch.equal(model.cache[:8], twin.cache[:8])
