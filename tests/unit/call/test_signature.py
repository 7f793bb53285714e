"""Keywords, defaults, constants and nested containers in a call's signature."""

import dataclasses
import enum
import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import OptionError, cuda_graphed
from tests.helpers import Backend, assert_close_to_eager, eager, info
from tests.models import MLP


class Pair(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        x = x * scale
        return x if mask is None else x * mask


def test_kwargs_defaults_and_constants(backend: Backend) -> None:
    model = cuda_graphed(Pair(), sizes=(4,))
    x, mask = backend.randn(3, 2), backend.randn(3, 2)
    for _ in range(3):
        assert_close_to_eager(model, x)
        assert_close_to_eager(model, x=x)
        assert_close_to_eager(model, x, scale=1.0)
        assert_close_to_eager(model, x, scale=2.0)
        assert_close_to_eager(model, mask=mask, x=x)
        assert_close_to_eager(model, x, mask=mask, scale=1.0)
    assert info(model).signatures == 3  # scale 1, scale 2, with a mask
    assert info(model).misses == 2 * 3 + 2  # the first calls of the second and the third kind


def test_equal_constants_of_different_types_differ(backend: Backend) -> None:
    @cuda_graphed(sizes=(2,))
    def forward(x: Tensor, power: Any) -> Tensor:
        return x + (1 if power is True else 2 if isinstance(power, int) else 3)

    x = torch.zeros(2, 1, device=backend.device)
    for _ in range(3):
        assert [forward(x, p)[0].item() for p in (True, 1, 1.0)] == [1, 2, 3]
    zeros = cuda_graphed(lambda x, z: x / z, sizes=(2,))
    for _ in range(3):
        assert [zeros(x + 1, z)[0].item() for z in (0.0, -0.0)] == [float("inf"), -float("inf")]
        assert zeros(x + 1, float("nan")).isnan().all()
    assert zeros.cache_info().captures == 3  # not one for each nan


class Loose(enum.Enum):
    A, B = 1, 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loose)

    def __hash__(self) -> int:
        return 0


SAME: dict[str, list[Callable[[], Any]]] = {
    "range": [lambda: range(0, 3, 2), lambda: range(0, 4, 2)],
    "slice": [lambda: slice(0, 2), lambda: slice(0, 2.0), lambda: slice(False, 2)],
    "complex": [lambda: complex(-1, 0.0), lambda: complex(-1, -0.0)],
    "tuple": [lambda: (1, (0.0,)), lambda: (1, (-0.0,)), lambda: (True, (0.0,))],
    "enum": [lambda: Loose.A, lambda: Loose.B],
    "key": [lambda: {1: 0}, lambda: {1.0: 0}, lambda: {True: 0}],
    "key in a tuple": [lambda: {(1, 2): 0}, lambda: {(1.0, 2): 0}],
    "key in a set": [lambda: {frozenset([1]): 0}, lambda: {frozenset([1.0]): 0}],
}


@pytest.mark.parametrize("name", SAME)
def test_equal_constants_that_are_not_the_same_differ(backend: Backend, name: str) -> None:
    """The key compared them by ==, and the second was served by the graph of the first."""
    model = cuda_graphed(lambda x, value: x * sum(repr(value).encode()), sizes=(2,))
    x, makers = torch.ones(2, 1, device=backend.device), SAME[name]
    for _ in range(4):
        results = [model(x, make())[0].item() for make in makers]
        assert results == [sum(repr(make()).encode()) for make in makers]
    told = model.cache_info()
    assert told.captures == len(makers)
    assert told.hits == 4 * len(makers) - 2 * len(makers) + 1


def test_functions_without_a_signature(backend: Backend) -> None:
    """Builtins of torch tell none, which ended in an error of `inspect`."""
    x = backend.randn(2, 4)
    relu = cuda_graphed(torch.relu, sizes=(2, 4))
    double = cuda_graphed(functools.partial(torch.mul, other=2), sizes=(2, 4))
    for _ in range(3):
        assert torch.equal(relu(x), torch.relu(x))
        assert torch.equal(double(x), x * 2)
        assert torch.equal(double(x, other=3), x * 3)
        assert torch.equal(double(input=x), x * 2)
    assert relu.cache_info().hits == 2
    assert double.cache_info().hits > 2


def passes_on(function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def total(x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
    return (x + y.sum()) * scale


@pytest.mark.parametrize("by_name", [False, True])
def test_options_name_what_a_wrapper_shows(backend: Backend, by_name: bool) -> None:
    graphed = cuda_graphed(passes_on(total), sizes=(4,), batch_dim={"y": None}, bind=("y",))
    x, y = backend.randn(3, 2), backend.randn(3, 2)
    for _ in range(3):
        got = graphed(x=x, y=y) if by_name else graphed(x, y)
        torch.testing.assert_close(got, total(x, y))
    (entry,) = graphed._cache().store.entries
    assert list(entry.buckets) == [4]  # y, which has 3 rows for ever, carries no batch
    assert entry.buckets[4].native.padded_rows > 0
    with pytest.raises(OptionError, match="bind names 'z', and total takes x, y, scale"):
        cuda_graphed(passes_on(total), bind=("z",))


DECORATORS = {
    "none": lambda function: function,
    "no_grad": torch.no_grad(),
    "both": lambda function: torch.inference_mode()(torch.autocast("cpu", enabled=False)(function)),
}


@pytest.mark.parametrize("name", DECORATORS)
def test_decorators_of_torch_pass_arguments_on(backend: Backend, name: str) -> None:
    graphed = cuda_graphed(DECORATORS[name](total), sizes=(4,))
    x, y = backend.randn(4, 2), backend.randn(4, 2)
    for _ in range(2):
        for got in (
            graphed(x, y).clone(),
            graphed(x, y=y).clone(),
            graphed(y=y, x=x, scale=2.0).clone(),
        ):
            torch.testing.assert_close(got, total(x, y))
    assert info(graphed).signatures == 1


def test_wrong_arguments_raise_what_eager_raises(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    mlp(backend.randn(2, 8))
    for args, kwargs in [((), {}), ((1, 2), {}), ((backend.randn(2, 8),), {"y": 1})]:
        with pytest.raises(TypeError):
            mlp(*args, **kwargs)
    assert_close_to_eager(mlp, backend.randn(2, 8))


Named = namedtuple("Named", "first second")


@dataclasses.dataclass(frozen=True)
class Frozen:
    h: Tensor
    step: int = 3


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """As in transformers: a dataclass that is a dictionary of its fields that are not None."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                OrderedDict.__setitem__(self, field.name, getattr(self, field.name))


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], *rest: Any, **more: Any) -> Any:
        total = batch["a"][0] + batch["a"][1].second + batch["state"].h
        for extra in (*rest, *more.values()):
            total = total + extra
        return {
            "total": total,
            "named": Named(total * 2, [total + 1, "text"]),
            "frozen": Frozen(total - 1),
            "output": ModelOutput(logits=total, states=(total, total * 3)),
            "none": None,
        }


def test_nested_arguments_and_results(backend: Backend) -> None:
    model = cuda_graphed(Nested(), sizes=(4,))

    def call(module: Any, x: Tensor) -> Any:
        batch = {"a": [x, Named(x, x * 2)], "state": Frozen(x)}
        return module(batch, x, extra=x + 1)

    for _ in range(3):
        x = backend.randn(3, 2)
        out = call(model, x)
        expected = call(lambda *args, **kwargs: eager(model, *args, **kwargs), x)
        assert list(out) == list(expected)
        assert torch.equal(out["total"], expected["total"])
        assert type(out["named"]) is Named
        assert out["named"].second[1] == "text"
        assert torch.equal(out["named"].second[0], expected["named"].second[0])
        assert type(out["frozen"]) is Frozen
        assert out["frozen"].step == 3
        assert type(out["output"]) is ModelOutput
        assert list(out["output"].keys()) == ["logits", "states"]
        assert out["output"].hidden is None
        assert torch.equal(out["output"]["logits"], out["output"].logits)
        assert torch.equal(out["output"].states[1], expected["output"].states[1])
    assert info(model).replays == {3: 1}  # all of the arguments may be as long by chance
