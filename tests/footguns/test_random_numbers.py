"""Traps: random numbers are drawn in a graph."""

from __future__ import annotations

import datetime
import os
import random
import secrets
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, eagerly, equal, info, on, replays, same_as_eager

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


HELD = numpy.random.RandomState(3)


def seeded(model: Any, *args: Any, seed: int = 5, times: int = 6) -> list[Tensor]:
    torch.manual_seed(seed)
    return [model(*args).clone() for _ in range(times)]


@on("cuda", "cuda-portable")
def test_state_of_the_generator_is_replaced(backend: Backend) -> None:
    """The graph draws from the state of its capture, which nobody else uses any more."""
    model = cuda_graphed(lambda x: x + torch.rand_like(x), sizes=(4,))
    x = torch.zeros(4, 8, device=backend.device)
    model(x), model(x)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    first, second = generator.graphsafe_get_state(), generator.clone_state()
    second.manual_seed(7)
    for state in (second, first, second):
        generator.graphsafe_set_state(state)
        before = generator.get_offset()
        got = [model(x).clone() for _ in range(2)]
        after = generator.get_offset()
        generator.set_offset(before)
        equal(got, [eagerly(model, x) for _ in range(2)])
        assert generator.get_offset() == after
    generator.graphsafe_set_state(first)
    assert info(model).hits == 7


def test_dropout_in_training_mode(backend: Backend) -> None:
    """The mask of the capture, again and again; or other numbers than eager's."""
    model = cuda_graphed(nn.Dropout(0.5), sizes=(4,))
    x = torch.ones(3, 64, device=backend.device)
    got = seeded(model, x)
    equal(got, seeded(partial(eagerly, model), x))
    assert len({tuple(mask.flatten().tolist()) for mask in got}) == 6
    assert info(model).hits >= 4
    model.eval()
    same_as_eager(model, x)


def test_dropout_is_switched_by_its_probability(backend: Backend) -> None:
    """The probability of the capture is baked in; `model.p = 0.1` is a schedule."""
    model = cuda_graphed(nn.Dropout(0.5), sizes=(4,))
    x = torch.ones(4, 64, device=backend.device)
    for p in (0.5, 0.1, 0.0, 0.5):
        model.p = p
        equal(seeded(model, x), seeded(partial(eagerly, model), x))


def test_dropout_between_graphed_and_eager_calls(backend: Backend) -> None:
    """The generator does not advance in a replay as it does in eager."""
    model = cuda_graphed(nn.Dropout(0.5), sizes=(2,))
    x = torch.ones(2, 16, device=backend.device)

    def run(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(7)
        drawn = []
        for _ in range(5):
            drawn += [call(x).clone(), torch.rand(4, device=backend.device), call(x[:1]).clone()]
        return drawn

    equal(run(model), run(partial(eagerly, model)))
    assert info(model).hits >= 6


def test_sampling_with_a_seed(backend: Backend) -> None:
    """The same seed gives other tokens than in eager."""

    def sample(logits: Tensor) -> Tensor:
        noise = torch.empty_like(logits).exponential_()
        return (logits.softmax(-1) / noise).argmax(-1)

    model, logits = cuda_graphed(sample, sizes=(4,)), backend.randn(4, 50)
    want = seeded(sample, logits)
    for _ in range(2):
        equal(seeded(model, logits), want)
    assert info(model).hits >= 8


@on("cuda", "cuda-portable")
def test_graph_runs_before_its_capture_began_on_the_device(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offset of the capture is written after the replay reads it, on another stream."""
    begin = torch.cuda.CUDAGraph.capture_begin

    def late(*args: Any, **kwargs: Any) -> None:
        torch.cuda._sleep(10**8)
        begin(*args, **kwargs)

    def sample(x: Tensor) -> Tensor:
        torch.cuda._sleep(3 * 10**8)
        return x + torch.rand_like(x)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
    model, x = cuda_graphed(sample, sizes=(4,)), backend.randn(4, 8)
    equal(seeded(model, x, times=3), seeded(sample, x, times=3))
    assert info(model).hits == 2


@on("cuda", "cuda-portable")
def test_graphs_that_draw_run_on_two_streams(backend: Backend) -> None:
    """One graph reads the offset of another: torch keeps the offset of all graphs in one place."""

    def sample(x: Tensor) -> Tensor:
        torch.cuda._sleep(10**8)
        return x + torch.rand_like(x)

    def run(calls: list[Any]) -> list[Tensor]:
        torch.manual_seed(7)
        drawn = []
        for _ in range(4):
            for call, stream in zip(calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    drawn.append(call(x).clone())
        torch.cuda.synchronize()
        return drawn

    x, streams = backend.randn(4, 8), [torch.cuda.current_stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    models = [cuda_graphed(sample, sizes=(4,), pool=backend.pool()) for _ in range(2)]
    equal(run(models), run([sample, sample]))
    assert all(info(model).hits == 3 for model in models)


def test_sampling_by_multinomial(backend: Backend) -> None:
    """`multinomial` looks at its input on the host, on some devices, which ends a capture."""
    forward = lambda logits: torch.multinomial(logits.softmax(-1), 1)  # noqa: E731
    model, logits = cuda_graphed(forward, sizes=(4,)), backend.randn(3, 50)
    equal(seeded(model, logits), seeded(forward, logits))


def test_a_generator_is_an_argument(backend: Backend) -> None:
    """A graph holds the state of the generator that it was captured with."""

    def forward(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x + torch.rand(x.shape, generator=generator, device=x.device)

    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    one, two = (torch.Generator(backend.device).manual_seed(3) for _ in range(2))
    for _ in range(5):
        equal(model(x, one), forward(x, two))
    equal(seeded(model, x), seeded(forward, x))
    equal(model(x, generator=one), forward(x, two))


def test_a_generator_is_an_attribute(backend: Backend) -> None:
    """A graph holds the state of the generator that it was captured with, which may be replaced."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator(backend.device).manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(x.shape, generator=self.generator, device=x.device)

    model, twin, x = cuda_graphed(Noisy(), sizes=(2,)), Noisy(), backend.randn(2, 8)
    for step in range(9):
        equal(model(x), twin(x))
        if step % 3 == 2:
            for each in (model, twin):
                each.generator = torch.Generator(backend.device).manual_seed(step)


def test_forward_seeds_the_generator(backend: Backend) -> None:
    """`torch.manual_seed` in the forward is a call of the host, made at capture only."""

    def forward(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return x + torch.rand_like(x)

    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    for seed in range(5):
        torch.manual_seed(seed)
        equal(model(x), forward(x))
        got = torch.rand(3, device=backend.device)
        torch.manual_seed(seed)
        forward(x)
        equal(got, torch.rand(3, device=backend.device))


def test_generator_state_is_saved_and_put_back(backend: Backend) -> None:
    """`torch.random.fork_rng` in the forward saves and restores at capture only."""
    devices = [backend.device] if backend.device.type == "cuda" else []

    def forward(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=devices):
            return x + torch.rand_like(x)

    model, x = cuda_graphed(forward, sizes=(2, 4)), backend.randn(3, 8)
    for seed in range(6):
        torch.manual_seed(seed)
        got = model(x).clone()
        torch.manual_seed(seed)
        equal(got, forward(x))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: numpy.random.default_rng().random(),
        lambda: numpy.random.RandomState().rand(),
        lambda: numpy.random.Generator(numpy.random.PCG64()).random(),
        HELD.rand,
        lambda: random.SystemRandom().random(),
        lambda: random.Random().random(),
        lambda: secrets.randbelow(1000) / 1000,
        lambda: os.urandom(1)[0] / 256,
        lambda: uuid.uuid4().int % 1000 / 1000,
    ],
)
def test_host_draws_from_a_generator_of_its_own(backend: Backend, draw: Any) -> None:
    """The number of the capture is baked in; no generator that is known moves on."""
    model = cuda_graphed(lambda x: x + draw(), sizes=(4,))
    x = torch.zeros(4, 2, device=backend.device)
    assert len({model(x)[0, 0].item() for _ in range(8)}) > 1
    assert info(model).hits == 0


@pytest.mark.parametrize(
    "read", [time.time, time.perf_counter, lambda: datetime.datetime.now().timestamp()]
)
def test_forward_reads_the_clock(backend: Backend, read: Any) -> None:
    """The time of the capture is baked in."""
    model = cuda_graphed(lambda x: x * (read() > 0), sizes=(2,))
    x = backend.randn(2, 3)
    for _ in range(4):
        equal(model(x), x)
    assert info(model).hits == 0
    assert "it reads the clock" in str(info(model).eager)


def test_forward_draws_the_same_numbers_at_each_call(backend: Backend) -> None:
    """A generator with a seed that is made inside gives what the graph holds."""
    model = cuda_graphed(lambda x: x * numpy.random.default_rng(3).random(), sizes=(2,))
    replays(model, backend.randn(2, 3))
