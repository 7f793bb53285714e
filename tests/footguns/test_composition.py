"""Traps: several graphs work on each other's outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import (
    Backend,
    eagerly,
    equal,
    info,
    is_ours,
    outcome,
    replays,
    same_as_eager,
    survives,
)
from tests.models import Net

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def test_siblings_and_their_sum(backend: Backend) -> None:
    """The second module's graph writes where the first one's output lies."""
    pool = backend.pool()
    a, b = (cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2, 4), pool=pool) for _ in "ab")
    for batch in (4, 3, 2, 3, 2, 4):
        x = backend.randn(batch, 8)
        first = a(x)
        second = b(first)
        equal(first + second, eagerly(a, x) + eagerly(b, eagerly(a, x)))
    assert info(a).hits >= 3
    assert info(b).hits >= 3


def test_a_residual_connection_round_a_graphed_module(backend: Backend) -> None:
    """x is the output of the graph that is about to run again."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), stale="copy")
    x = want = backend.randn(2, 8)
    for _ in range(5):
        x, want = x + model(x), want + eagerly(model, want)
        equal(x, want)
    assert info(model).hits == 4


@pytest.mark.parametrize("stale", ["error", "copy"])
def test_a_module_is_called_twice_in_one_step(backend: Backend, stale: Any) -> None:
    """The second call overwrites the output of the first."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), stale=stale)
    replays(model, x := backend.randn(2, 8))
    for _ in range(3):
        y = model(x)
        z = model(y)
        once = eagerly(model, x)
        equal(z, eagerly(model, once))
        total = outcome(lambda y=y, z=z: y + z)
        if stale == "copy":
            equal(total, once + eagerly(model, once))
        else:
            assert is_ours(total)


def test_decorated_inside_decorated(backend: Backend) -> None:
    """The inner graph can't be launched inside the capture of the outer one."""
    inner = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2, 4))
    outer = cuda_graphed(nn.Sequential(inner, nn.ReLU()), sizes=(2, 4))
    for batch in (4, 3, 2, 3, 4):
        x = backend.randn(batch, 8)
        same_as_eager(outer, x)
        same_as_eager(inner, x)
    assert info(outer).hits
    assert info(inner).hits
    inner.weight = nn.Parameter(inner.weight * 2)
    same_as_eager(outer, x)
    same_as_eager(inner, x)


def test_twelve_residual_blocks(backend: Backend) -> None:
    """One memory for all makes x stale at every block; one each makes twelve times the memory."""
    pool, alone = backend.pool(), backend.pool()
    blocks = [nn.Linear(256, 256).to(backend.device) for _ in range(12)]
    single = cuda_graphed(copy.deepcopy(blocks[0]), sizes=(8, 64), pool=alone)
    single(backend.randn(64, 256))
    for block in blocks:
        cuda_graphed(block, sizes=(8, 64), pool=pool)
    for batch in (64, 8, 5, 64, 40, 8, 5):
        x = want = backend.randn(batch, 256)
        for block in blocks:
            x = x + block(x)
            want = want + eagerly(block, want)
        equal(x, want)
    assert all(info(block).hits >= 3 for block in blocks)
    assert len(pool.lanes) <= 3
    assert pool.memory().reserved <= 2 * alone.memory().reserved


def test_twelve_residual_blocks_whose_sum_is_a_graph_too(backend: Backend) -> None:
    """Now x itself lies in the pool all the way down."""
    pool = backend.pool()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    blocks = [cuda_graphed(Block().to(backend.device), sizes=(4,), pool=pool) for _ in range(12)]
    for batch in (4, 3, 4, 2, 3):
        x = want = backend.randn(batch, 16)
        for block in blocks:
            x, want = block(x), eagerly(block, want)
        equal(x, want)
    assert all(info(block).hits >= 3 for block in blocks)
    assert len(pool.lanes) <= 3


def test_two_models_take_turns(backend: Backend) -> None:
    """Each overwrites the other's output, which nobody needs any more: memory can be shared."""
    pool = backend.pool()
    models = [cuda_graphed(Net(backend.device), sizes=(2, 4), pool=pool) for _ in range(2)]
    for batch in (2, 4, 3, 1, 2, 3):
        for model in models:
            same_as_eager(model, backend.randn(batch, 8), times=1)
    assert all(info(model).hits >= 3 for model in models)


def test_draft_and_target_hold_each_others_outputs(backend: Backend) -> None:
    """The target's graph overwrites the draft's logits, which are compared next."""
    pool = backend.pool()
    draft, target = (cuda_graphed(Net(backend.device), sizes=(2,), pool=pool) for _ in range(2))
    x = backend.randn(2, 8)
    for _ in range(5):
        one, two = draft(x), target(x)
        got = outcome(lambda one=one, two=two: one - two)
        if not is_ours(got):
            equal(got, eagerly(draft, x) - eagerly(target, x))
    assert info(draft).hits
    assert info(target).hits


def test_one_instance_in_two_parents(backend: Backend) -> None:
    """The graph serves the old weights after they are replaced through one of the parents."""
    shared = nn.Linear(8, 8).to(backend.device)
    one = cuda_graphed(nn.Sequential(shared, nn.ReLU()), sizes=(2,))
    two = cuda_graphed(nn.Sequential(nn.Tanh(), shared), sizes=(2,))
    x = backend.randn(2, 8)
    replays(two, x)
    survives(one, lambda: setattr(one[0], "weight", nn.Parameter(shared.weight * 2)), x)
    same_as_eager(two, x)
    survives(two, lambda: setattr(two[1], "training", False) or two[1].weight.mul_(2), x)
    same_as_eager(one, x)


def test_one_graphed_instance_in_two_parents(backend: Backend) -> None:
    """The second call of a step overwrites the output that the first parent holds."""
    shared = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), stale="copy")
    one, two = nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.Tanh(), shared)
    for _ in range(4):
        x = backend.randn(2, 8)
        a, b = one(x), two(x)
        equal(a, eagerly(shared, x).relu())
        equal(b, eagerly(shared, x.tanh()))
    assert info(shared).hits >= 6


def test_a_recurrent_loop(backend: Backend) -> None:
    """h is read by the graph that overwrites it."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 6)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.cell(x, h)

    cell = cuda_graphed(Cell().to(backend.device), sizes=(2, 4))
    h = want = torch.zeros(3, 6, device=backend.device)
    for _ in range(6):
        x = backend.randn(3, 4)
        h, want = cell(x, h), eagerly(cell, x, want)
        equal(h, want)
    assert info(cell).hits >= 4


def test_a_recurrent_loop_that_returns_a_view(backend: Backend) -> None:
    """h and the output share one storage, shifted: copying forward overwrites what is yet to be read."""
    cell = cuda_graphed(lambda x, h: torch.cat([h[:, 1:], x], 1), sizes=(2,))
    h = want = backend.randn(2, 5)
    for _ in range(6):
        x = backend.randn(2, 1)
        h, want = cell(x, h), torch.cat([want[:, 1:], x], 1)
        equal(h, want)
    assert info(cell).hits >= 4


def test_outputs_are_swapped_and_fed_back(backend: Backend) -> None:
    """a, b = f(b, a): each input is staged from where the other one is going."""
    model = cuda_graphed(lambda a, b: (a + 1, b * 2), sizes=(2,))
    a, b = backend.randn(2, 3), backend.randn(2, 3)
    mine, theirs = (a, b), (a, b)
    for _ in range(6):
        mine, theirs = model(mine[1], mine[0]), (theirs[1] + 1, theirs[0] * 2)
        equal(tuple(mine), theirs)
    assert info(model).hits >= 4
