"""Reads that no code of the user's names: closures, computed names, functions of torch."""

import argparse
import copy
import dataclasses
import enum
import functools
import gc
import importlib.util
import inspect
import operator
import pickle
import string
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, replays, survives

pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")

Read = Callable[[Any], float]


@dataclasses.dataclass
class Data:
    scale: float = 2.0


pytree.register_dataclass(Data)


class Config:
    def __init__(self) -> None:
        self.scale = 2.0


class Part(nn.Module):
    """Multiplies by what `read` finds in `config`."""

    by_getter = property(operator.attrgetter("config.scale"))

    def __init__(self, read: Read, config: Any) -> None:
        super().__init__()
        self.read, self.config, self.key, self.format = (read,), config, "scale", "{0.scale}"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.read[0](self)


alias, names, held_by, ask = getattr, vars, dir, operator.attrgetter
getter = operator.attrgetter("scale")


def printed(value: Any) -> float:
    return float(repr(value).split("=")[1][:-1])


@pytest.mark.parametrize(
    "read",
    [
        lambda part: alias(part.config, part.key),
        lambda part, read=getattr: read(part.config, part.key),
        lambda part: next(iter(map(alias, [part.config], [part.key]))),
        lambda part: functools.reduce(getattr, [part.key], part.config),
        lambda part: names(part.config)[part.key],
        lambda part: part.config.__dict__[part.key],
        lambda part: getter(part.config),
        lambda part: ask(part.key)(part.config),
        lambda part: part.by_getter,
        lambda part: inspect.getattr_static(part.config, part.key),
        lambda part: dict(inspect.getmembers(part.config))[part.key],
        lambda part: part.format.format(part.config),
        lambda part: string.Formatter().format(part.format, part.config),
        lambda part: next(iter(copy.copy(part.config).__dict__.values())),
        lambda part: len(pickle.dumps(part.config)) + (b"\x1c" in pickle.dumps(part.config)),
    ],
)
def test_attribute_is_read_by_a_computed_name(backend: Backend, read: Read) -> None:
    model = cuda_graphed(Part(lambda part: float(read(part)), Config()), sizes=(2,))
    survives(model, lambda: setattr(model.config, "scale", 7.0), backend.randn(2, 3))


def test_global_is_read_by_a_computed_name(backend: Backend) -> None:
    module = types.ModuleType("settings")
    module.scale = 2.0
    model = cuda_graphed(Part(lambda part: getattr(module, part.key), None), sizes=(2,))
    survives(model, lambda: setattr(module, "scale", 7.0), backend.randn(2, 3))


@pytest.mark.parametrize("kind", [types.SimpleNamespace, argparse.Namespace])
def test_namespace_is_read_by_its_text(backend: Backend, kind: Any) -> None:
    model = cuda_graphed(Part(lambda part: printed(part.config), kind(scale=2.0)), sizes=(2,))
    survives(model, lambda: setattr(model.config, "scale", 7.0), backend.randn(2, 3))


@pytest.mark.parametrize(
    "read",
    [
        lambda part: sum(pytree.tree_leaves(part.config)),
        lambda part: dataclasses.astuple(part.config)[0],
        lambda part: next(iter(vars(dataclasses.replace(part.config)).values())),
        lambda part: printed(part.config),
        lambda part: 2.0 if part.config == Data() else 3.0,
    ],
)
def test_dataclass_is_read_as_a_whole(backend: Backend, read: Read) -> None:
    model = cuda_graphed(Part(read, Data()), sizes=(2,))
    survives(model, lambda: setattr(model.config, "scale", 7.0), backend.randn(2, 3))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: nn.ParameterList([2.0, 3.0]), lambda held: held.__setitem__(0, 7.0)),
        (lambda: nn.ParameterList([2.0, 3.0]), lambda held: held.append(7.0)),
        (lambda: nn.ParameterDict({"a": 2.0}), lambda held: held.__setitem__("a", 7.0)),
        (lambda: nn.ParameterDict({"a": 2.0}), lambda held: held.__setitem__("b", 7.0)),
    ],
)
def test_number_in_a_parameter_container_is_changed(backend: Backend, make: Any, change: Any) -> None:
    def read(part: Any) -> float:
        held = part.config
        return sum(held.values() if isinstance(held, nn.ParameterDict) else held)

    model = cuda_graphed(Part(read, make()), sizes=(2,))
    survives(model, lambda: change(model.config), backend.randn(2, 3))


@pytest.mark.parametrize("base", [enum.IntEnum, enum.Enum, enum.IntFlag])
def test_attribute_of_an_enum_member_is_changed(backend: Backend, base: Any) -> None:
    kind = base("Kind", ["FIRST"])
    kind.FIRST.gain = 2.0
    of_class = cuda_graphed(Part(lambda part: kind.FIRST.gain, None), sizes=(2,))
    of_member = cuda_graphed(Part(lambda part: part.config.gain, kind.FIRST), sizes=(2,))
    for model in (of_class, of_member):
        survives(model, lambda: setattr(kind.FIRST, "gain", kind.FIRST.gain + 1), backend.randn(2, 3))


@pytest.mark.parametrize("base", [float, str, int])
def test_attribute_of_a_number_is_changed(backend: Backend, base: type) -> None:
    value = type("Value", (base,), {})(1)
    value.gain = 2.0
    model = cuda_graphed(Part(lambda part: part.config.gain, value), sizes=(2,))
    survives(model, lambda: setattr(value, "gain", 7.0), backend.randn(2, 3))


@pytest.mark.parametrize("name", ["linear", "relu", "scaled_dot_product_attention", "dropout"])
def test_function_of_torch_is_replaced(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to(backend.device).eval()
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    layer.activation = nn.ReLU()
    model = cuda_graphed(layer, sizes=(2,))
    old = getattr(nn.functional, name)
    replaced = functools.partial(monkeypatch.setattr, nn.functional, name)
    survives(model, lambda: replaced(lambda *a, **k: old(*a, **k) * 2), backend.randn(2, 3, 8))


def test_call_of_modules_is_replaced(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cuda_graphed(nn.Sequential(nn.ReLU()), sizes=(2,)), backend.randn(2, 3)
    replays(model, x)
    old = nn.Module._call_impl
    monkeypatch.setattr(nn.Module, "_call_impl", lambda self, *a, **k: old(self, *a, **k) + 1)
    for _ in range(3):
        assert torch.equal(model(x), x.relu() + 2)


def test_closure_over_a_function_is_rebound(backend: Backend) -> None:
    fwd, set_act = build(torch.relu)
    model = cuda_graphed(lambda x: fwd(x) * 2, sizes=(2,))
    x = backend.randn(2, 3)
    replays(model, x)
    set_act(torch.tanh)
    assert torch.equal(model(x), x.tanh() * 2)


def build(act: Any) -> tuple[Any, Any]:
    def set_act(new: Any) -> None:
        nonlocal act
        act = new

    def apply(x: Tensor) -> Tensor:
        return act(x)

    return apply, set_act


@pytest.mark.parametrize("changed", [0, 1])
def test_closures_of_equal_code_are_told_apart(backend: Backend, changed: int) -> None:
    gc.freeze()  # as servers do: the collector knows no function any more
    try:
        parts = [build(torch.relu), build(torch.relu)]
        gc.freeze()
        model, x = (
            cuda_graphed(lambda x: parts[0][0](x) + parts[1][0](x), sizes=(2,)),
            backend.randn(2, 3),
        )
        replays(model, x)
        parts[changed][1](torch.tanh)
        torch.testing.assert_close(model(x), x.relu() + x.tanh())
    finally:
        gc.unfreeze()


def test_equal_code_of_two_files_is_told_apart(backend: Backend, tmp_path: Path) -> None:
    found = []
    for name, scale in (("first_ops", 2.0), ("second_ops", 3.0)):
        (tmp_path / f"{name}.py").write_text(f"SCALE = {scale}\n\ndef act(x):\n    return x * SCALE\n")
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    model, x = cuda_graphed(lambda x: found[1].act(found[0].act(x)), sizes=(2,)), backend.randn(2, 3)
    replays(model, x)
    found[1].SCALE = 7.0
    torch.testing.assert_close(model(x), x * 14)


def test_closures_nested_in_themselves_are_no_change(backend: Backend) -> None:
    def over(n: int) -> Any:
        return lambda a, b: a - b < n

    def and_masks(*functions: Any) -> Any:
        def and_mask(a: Tensor, b: Tensor) -> Tensor:
            result = a.new_ones((), dtype=torch.bool)
            for function in functions:
                result = result & function(a, b)
            return result

        return and_mask

    def forward(x: Tensor) -> Tensor:
        mask = and_masks(and_masks(over(3), over(2)), over(1))
        at = torch.arange(3, device=x.device)
        return x * mask(at[:, None], at).sum(-1)

    replays(cuda_graphed(forward, sizes=(2,)), backend.randn(2, 3))


def test_variable_of_a_local_function_is_no_change(backend: Backend) -> None:
    def forward(x: Tensor) -> Tensor:
        count = 0

        def again(x: Tensor, depth: int) -> Tensor:
            nonlocal count
            count += 1
            return again(x * 2, depth - 1) if depth else x

        return again(x, 3) + count

    replays(cuda_graphed(forward, sizes=(2,)), backend.randn(2, 3))


def test_counter_in_a_closure_runs_eagerly(backend: Backend) -> None:
    def counter() -> Any:
        count = 0

        def step(x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return x * count

        return step

    step = counter()
    model, x = cuda_graphed(lambda x: step(x) + 1, sizes=(2,)), backend.randn(2, 3)
    for number in range(1, 6):
        assert torch.equal(model(x), x * number + 1)


@functools.singledispatch
def dispatched(key: Any) -> float:
    return 2.0


def test_function_is_registered_for_a_type(backend: Backend) -> None:
    model, x = cuda_graphed(lambda x: x * dispatched(1), sizes=(2,)), backend.randn(2, 3)
    replays(model, x)
    dispatched.register(int, lambda key: 5.0)
    assert torch.equal(model(x), x * 5)


def test_file_with_the_name_of_a_package_is_the_users(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "warp"):
        (tmp_path / f"{name}.py").write_text("SCALE = 2.0\n\ndef act(x):\n    return x * SCALE\n")
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        model, x = cuda_graphed(module.act, sizes=(2,)), backend.randn(2, 3)
        replays(model, x)
        module.SCALE = 7.0
        assert torch.equal(model(x), x * 7)
