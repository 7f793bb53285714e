"""Traps: padded rows change the result of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, info, same_as_eager

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


def test_large_values_hide_a_softmax_over_rows(backend: Backend) -> None:
    """Padded rows count in a softmax; one row with all the weight hides it from a comparison."""
    model = cuda_graphed(lambda x: x.softmax(0), sizes=(4,))
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
