"""Ordinary Python in a forward: attributes by name, inner functions, dataclasses, storages."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy
import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, equal, info, replays


class Step(nn.Module):
    """Its step is counted from outside, and it reads nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.scale, self.config = 0, 2.0, None


class Asks(Step):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if hasattr(x, "shape") else x


class Gets(Step):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, "scale", 1.0) * getattr(self.config, "scale", self.scale)


@pytest.mark.parametrize("kind", [Asks, Gets])
def test_attributes_are_asked_for_by_names_that_are_written_out(
    backend: Backend, kind: Callable[[], Any]
) -> None:
    """Only the names that stand there count; by a computed name all would."""
    model = cuda_graphed(kind(), sizes=(2,))
    x = backend.randn(2, 4)
    for step in range(6):
        want = kind()(x)
        equal(model(x), want)
        model.step = step
    assert info(model).hits == 5
    model.scale = 3.0  # which counts
    equal(model(x), x * 3 * (3.0 if kind is Gets else 1.0))


def _ask(get: Callable[[Any, str], Any], model: Any, _: str, name: str) -> Any:
    return get(model, name)


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "of a variable": lambda m, n="scale": getattr(m, n),
    "with a text as the default": lambda m, n="scale": getattr(m, n, "none"),
    "of a list": lambda m: next(getattr(m, n) for n in ("scale",)),
    "by map": lambda m: next(map(getattr, (m,), ("scale",))),
    "by star": lambda m: getattr(*(m, "scale")),
    "passed on to another": lambda m, n="scale": _ask(getattr, m, "step", n),
    "of an expression": lambda m: getattr(m, "sca" + "le"[:2]),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_attributes_are_asked_for_by_computed_names(backend: Backend, how: str) -> None:
    """The name need not stand in the code that asks."""
    get = COMPUTED[how]

    class Reads(Step):
        def forward(self, x: Tensor) -> Tensor:
            return x * get(self)

    model = cuda_graphed(Reads(), sizes=(2,))
    x = backend.randn(2, 4)
    for scale in (2.0, 3.0):
        model.scale = scale
        for _ in range(3):
            equal(model(x), x * scale)


def test_an_inner_function_fills_a_list_of_the_call(backend: Backend) -> None:
    """The list is made anew by each call, and no caller sees it."""

    def forward(x: Tensor) -> Tensor:
        outs, memo = [], {}

        def collect(y: Tensor) -> Tensor:
            outs.append(y)
            memo[len(outs)] = y
            return y + 1

        for _ in range(3):
            x = collect(x)
        return torch.stack(outs, 1) + memo[1][:, None]

    replays(cuda_graphed(forward, sizes=(2, 4)), backend.randn(4, 3))


Kind = TypeVar("Kind")


@dataclass
class Batch(Generic[Kind]):
    x: Tensor

    @cached_property
    def width(self) -> int:
        return self.x.shape[-1]


def test_a_dataclass_caches_a_property(backend: Backend) -> None:
    """A property that is computed from the fields is no part of the argument."""
    model = cuda_graphed(lambda batch: batch.x * batch.width, sizes=(2,))
    x = backend.randn(2, 4)
    for batch in (Batch(x), Batch[int](x), Batch(x)):
        for _ in range(3):
            equal(model(batch), x * 4)
    assert info(model).hits >= 6


class Key(NamedTuple):
    number: int


@dataclass(frozen=True)
class Name:
    text: str


@pytest.mark.parametrize("make", [lambda: Key(1), lambda: Name("a"), lambda: numpy.int64(3)])
def test_keys_of_a_dict_are_made_anew_for_each_call(backend: Backend, make: Callable[[], Any]) -> None:
    """They are the same by what they hold."""
    model = cuda_graphed(lambda x, given: x * given[make()], sizes=(2,))
    x = backend.randn(2, 4)
    for _ in range(4):
        equal(model(x, {make(): 2.0}), x * 2)
    equal(model(x, {make(): 5.0}), x * 5)
    assert info(model).hits == 3


def test_weights_that_a_library_has_marked_are_arguments(backend: Backend) -> None:
    """transformers notes on each parameter that it was loaded."""
    weight = nn.Parameter(backend.randn(3, 4))
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    replays(cuda_graphed(nn.functional.linear, sizes=(2,)), backend.randn(2, 4), weight)


def test_a_tensor_without_memory_is_made(backend: Backend) -> None:
    """Zeros that torch makes for derivatives; emulation read memory that is not there."""
    x = backend.randn(2, 4)
    model = cuda_graphed(lambda x: x + torch._efficientzerotensor((4,), device=x.device), sizes=(2,))
    for _ in range(3):
        equal(model(x), x)


def test_a_tensor_takes_over_the_storage_of_a_weight(backend: Backend) -> None:
    """The storage came from outside, and no operation reads the weight itself."""

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * x.new_empty(0).set_(self.weight.untyped_storage())

    model = cuda_graphed(Takes().to(backend.device), sizes=(2,))
    x = backend.randn(2, 4)
    for _ in range(2):
        for _ in range(3):
            equal(model(x), x * model.weight)
        model.weight.data = backend.randn(4)
    assert info(model).hits == 4


def test_a_tensor_takes_over_a_storage_that_is_new(backend: Backend) -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return copy.deepcopy(x) * copy.deepcopy(self.scale)

    replays(cuda_graphed(Copies().to(backend.device), sizes=(2,)), backend.randn(2, 4))


@pytest.mark.filterwarnings("ignore:RNN module weights are not part")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("in_one_piece", [True, False])
def test_a_recurrent_layer(backend: Backend, kind: type[nn.RNNBase], in_one_piece: bool) -> None:
    """cuDNN takes the storage of all weights, before it looks at any."""
    layer = kind(4, 6, num_layers=2, bidirectional=True).to(backend.device).eval()
    if not in_one_piece:
        layer = copy.deepcopy(layer)
    for inference in (nullcontext(), torch.inference_mode()):
        with inference:
            plain, graphed = copy.deepcopy(layer), cuda_graphed(copy.deepcopy(layer), batch_dim=1)
            if in_one_piece:
                plain.flatten_parameters()
                graphed.flatten_parameters()
            for batch in (3, 2, 3, 2, 1):
                x = backend.randn(5, batch, 4)
                equal(graphed(x)[0], plain(x)[0])
        assert info(graphed).hits >= 2, info(graphed)


def test_a_module_holds_many_objects(backend: Backend) -> None:
    """The first call looks through them; with the collector on, that would take most of its time."""

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.samples = [{"id": number, "tags": [number]} for number in range(3000)]

        def forward(self, x: Tensor) -> Tensor:
            return x * len(self.samples)

    model, runs = cuda_graphed(Holds(), sizes=(2,)), []
    x = backend.randn(2, 4)
    cuda_graphed(Holds(), sizes=(2,))(x)  # the first of a process imports much
    gc.callbacks.append(lambda phase, _: runs.append(phase))
    try:
        gc.collect(0)
        before = len(runs)
        equal(model(x), x * 3000)
        assert len(runs) <= before + 2  # a run at its very end, or its beginning
    finally:
        del gc.callbacks[-1]
    assert gc.isenabled()
    replays(model, x)
