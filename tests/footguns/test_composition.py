"""Traps: several graphs work on each other's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
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
    on,
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
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
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


def test_both_halves_of_guidance(backend: Backend) -> None:
    """Both predictions lie in one memory, so their difference is zero."""
    model = cuda_graphed(Net(backend.device).eval(), sizes=(2, 4))
    for batch in (4, 3, 2, 3, 4):
        x, other = backend.randn(batch, 8), backend.randn(batch, 8)
        got, without = model(x), model(other)
        equal(without + 7.5 * (got - without), 7.5 * eagerly(model, x) - 6.5 * eagerly(model, other))
    assert info(model).hits >= 8
    assert info(model).expired == 0


def test_a_runge_kutta_step(backend: Backend) -> None:
    """Four slopes are needed at the end of the step, and all lie in one memory."""
    slope = cuda_graphed(Net(backend.device).eval(), sizes=(2,))

    def step(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        k1 = f(x)
        k2 = f(x + k1 / 8)
        k3 = f(x + k2 / 8)
        k4 = f(x + k3 / 4)
        return x + (k1 + 2 * k2 + 2 * k3 + k4) / 24

    x = want = backend.randn(2, 8)
    for _ in range(4):
        x, want = step(slope, x), step(partial(eagerly, slope), want)
        equal(x, want)
    assert info(slope).hits == 15


@pytest.mark.parametrize("collect", [list, tuple, dict, iter], ids=lambda kind: kind.__name__)
def test_outputs_of_a_loop_are_collected(backend: Backend, collect: Any) -> None:
    """All outputs are views of one memory, which holds the last batch."""
    model = cuda_graphed(Net(backend.device).eval(), sizes=(4,))
    batches = [backend.randn(batch, 8) for batch in (4, 4, 4, 3, 4, 2)]
    outputs = (model(x) for x in batches)
    got = collect(enumerate(outputs) if collect is dict else outputs)
    rows = list(got.values()) if collect is dict else list(got)
    equal(torch.cat(rows), torch.cat([eagerly(model, x) for x in batches]))
    assert info(model).hits == 3


def test_a_part_of_an_output_is_kept(backend: Backend) -> None:
    """Only a view of the output is held, or only its storage."""
    model = cuda_graphed(Net(backend.device).eval(), sizes=(2,))
    replays(model, x := backend.randn(2, 8))
    last, storage = model(x)[:, -1], model(x + 1).untyped_storage()
    rows = model(x + 2).unbind()
    model(x + 3)
    equal(last, eagerly(model, x)[:, -1])
    equal(torch.empty(0, device=x.device).set_(storage)[:8], eagerly(model, x + 1)[0])
    equal(rows[1], eagerly(model, x + 2)[1])


def test_a_held_output_is_changed_in_place(backend: Backend) -> None:
    """The change goes with the memory that the next replay overwrites."""
    model = cuda_graphed(Net(backend.device).eval(), sizes=(2,))
    replays(model, x := backend.randn(2, 8))
    out = model(x).mul_(2)
    second = model(x + 1)
    out.add_(1)
    second.zero_()
    model(x)
    equal(out, eagerly(model, x) * 2 + 1)
    assert not second.any()


def test_an_argument_is_an_output_that_is_kept(backend: Backend) -> None:
    """The replay reads the argument where it writes its result; a view of the argument is returned."""
    model = cuda_graphed(lambda x: (x[:, 1:], x.flip(1) + 1), sizes=(2,))
    states = [backend.randn(2, 6)]
    views = []
    for _ in range(6):
        view, state = model(states[-1])
        views.append(view)
        states.append(state)
    want = states[0]
    for view, state in zip(views, states[1:], strict=True):
        equal(view, want[:, 1:])
        want = want.flip(1) + 1
        equal(state, want)
    assert info(model).hits >= 5


def test_autograd_keeps_an_output(backend: Backend) -> None:
    """The gradient is computed from the saved output, which later replays overwrite."""
    model = cuda_graphed(Net(backend.device).eval(), sizes=(2,))
    replays(model, x := backend.randn(2, 8))
    weight = torch.ones(8, device=backend.device, requires_grad=True)
    losses = []
    for step in range(3):
        out = model(x + step)
        with torch.enable_grad():
            losses.append((out * weight).sum())
    del out
    torch.autograd.backward(losses)
    equal(weight.grad, sum(eagerly(model, x + step).sum(0) for step in range(3)))


def test_a_forward_calls_itself(backend: Backend) -> None:
    """The right half overwrites the result of the left half."""

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] == 1:
                return x * 2
            half = x.shape[1] // 2
            return self(x[:, :half]).sum(1, keepdim=True) - self(x[:, half:]).mean(1, keepdim=True)

    model, twin = cuda_graphed(Halves(), sizes=(2,)), Halves()
    for width in (4, 4, 2, 2, 1, 1, 8, 8, 4, 2):
        x = backend.randn(2, width)
        equal(model(x), twin(x))


def test_modules_of_one_memory_keep_outputs(backend: Backend) -> None:
    """The graphs were captured while nobody held an output, so all write to one memory."""
    pool = backend.pool()
    a, b, c = (cuda_graphed(Net(backend.device), sizes=(2,), pool=pool) for _ in "abc")
    for model in (a, b, c):
        replays(model, backend.randn(2, 8))
    assert len(pool.lanes) == 1
    for _ in range(3):
        x = backend.randn(2, 8)
        got = [a(x), b(x), c(x), a(x + 1)]
        equal(got, [*(eagerly(model, x) for model in (a, b, c)), eagerly(a, x + 1)])


@on("cuda", "cuda-portable")
def test_outputs_are_kept_on_streams_of_their_own(backend: Backend) -> None:
    """The copy is made on the stream of the second call, for which users of the first need not wait."""
    model = cuda_graphed(Net(backend.device).eval(), sizes=(2,))
    replays(model, x := backend.randn(2, 8))
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    for step in range(20):
        for stream in (one, two):
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(one):
            first = model(x + step)
        with torch.cuda.stream(two):
            torch.cuda._sleep(2_000_000)  # whatever is launched here comes late
            second = model(x - step)
        with torch.cuda.stream(one):
            got = first + 1
        one.synchronize()
        equal(got, eagerly(model, x + step) + 1)
        two.synchronize()
        equal(second, eagerly(model, x - step))


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
    for batch in (4, 3, 4, 2, 3, 2):
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
    shared = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
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
