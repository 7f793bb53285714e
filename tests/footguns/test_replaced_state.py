"""Traps: tensors and objects that a forward reads are replaced after the capture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, equal, info, replays, same_as_eager, survives
from tests.models import Net

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


class KV:
    """A cache as libraries have it: no module, and rebuilt for each conversation."""

    def __init__(self, device: torch.device) -> None:
        self.k = torch.zeros(4, 8, device=device)
        self.v = [torch.zeros(4, 8, device=device)]


class Attends(nn.Module):
    def __init__(self, cache: KV) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.cache.k[at] = x
        self.cache.v[0][at] = x * 2
        return (x @ self.cache.k.T).softmax(-1) @ self.cache.v[0]


def test_kv_cache_object_is_rebuilt(backend: Backend) -> None:
    """The graph fills the cache of the last conversation."""
    twin, model = Attends(KV(backend.device)), cuda_graphed(Attends(KV(backend.device)), sizes=(2,))
    at = torch.tensor([1, 3], device=backend.device)
    for _ in range(3):
        for _ in range(4):
            x = backend.randn(2, 8)
            equal(model(x, at), twin(x, at))
            equal(model.cache.k, twin.cache.k)
            equal(model.cache.v[0], twin.cache.v[0])
        twin.cache, model.cache = KV(backend.device), KV(backend.device)
    assert info(model).hits >= 3


def test_a_tensor_of_the_kv_cache_is_rebuilt(backend: Backend) -> None:
    """The graph fills the tensor that was in the list before."""
    twin, model = Attends(KV(backend.device)), cuda_graphed(Attends(KV(backend.device)), sizes=(2,))
    at = torch.tensor([1, 3], device=backend.device)
    for step in range(9):
        x = backend.randn(2, 8)
        equal(model(x, at), twin(x, at))
        equal(model.cache.v[0], twin.cache.v[0])
        if step % 3 == 2:
            twin.cache.v[0], model.cache.v[0] = (c.v[0] * 0.5 for c in (twin.cache, model.cache))
    assert info(model).hits >= 3


def test_cache_is_grown_by_torch_cat(backend: Backend, x: Tensor) -> None:
    """The graph attends to the first tokens only: shape and address have changed."""

    class Grows(nn.Module):
        k: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.k.T).softmax(-1) @ self.k

    model = cuda_graphed(Grows(), sizes=(2,))
    model.k = backend.randn(3, 8)
    for _ in range(3):
        survives(model, lambda: setattr(model, "k", torch.cat([model.k, backend.randn(1, 8)])), x)


def test_a_tensor_in_a_dict_is_replaced(net: Net, x: Tensor) -> None:
    """The graph reads the tensor that was in the dict at capture."""
    old = net.tables["k"]
    survives(net, lambda: net.tables.update(k=old * 2), x)
    survives(net, lambda: net.__setattr__("tables", {"k": old * 3}), x)


def test_a_tensor_in_an_opaque_object_is_replaced(net: Net, x: Tensor) -> None:
    """The graph reads the tensor that was in the object at capture."""
    old = net.cache.k
    survives(net, lambda: setattr(net.cache, "k", old * 2), x)
    survives(net, lambda: setattr(net, "cache", SimpleNamespace(k=old * 3)), x)


def test_a_tensor_in_an_object_with_slots_is_replaced(backend: Backend, x: Tensor) -> None:
    """The graph reads the old tensor; the object has no `__dict__` to look into."""

    class Slotted:
        __slots__ = ("k",)

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = Slotted()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.cache.k

    model = cuda_graphed(Holds(), sizes=(2,))
    model.cache.k = old = backend.randn(8)
    same_as_eager(model, x)
    model.cache.k = old * 2
    same_as_eager(model, x)


def test_a_number_in_an_object_with_slots_is_changed(backend: Backend, x: Tensor) -> None:
    """The number of the capture is baked in, and the object has no `__dict__` to look into."""

    class Slotted:
        __slots__ = ("scale",)

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Slotted()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.config.scale

    model = cuda_graphed(Holds(), sizes=(2,))
    for scale in (2.0, 3.0):
        model.config.scale = scale
        same_as_eager(model, x)


def test_a_tensor_in_a_closure_is_replaced(backend: Backend, x: Tensor) -> None:
    """The cell holds another tensor now; the graph reads the old one."""
    table = backend.randn(8)
    model = cuda_graphed(lambda x: x + table, sizes=(2,))
    replays(model, x)
    old, table = table, table * 2
    same_as_eager(model, x)
    assert old is not table


def test_a_tensor_in_the_closure_of_a_helper_is_replaced(backend: Backend, x: Tensor) -> None:
    """The graph reads the old tensor; a function that the forward calls has the closure."""
    table = backend.randn(8)

    def look(x: Tensor) -> Tensor:
        return x + table

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look = look

        def forward(self, x: Tensor) -> Tensor:
            return self.look(x) * 2

    model = cuda_graphed(Calls(), sizes=(2,))
    same_as_eager(model, x)
    old, table = table, table * 2
    same_as_eager(model, x)
    assert old is not table


TABLE: Any = None

NUMBER: Any = 2

SETTINGS: dict[str, Any] = {}


@cuda_graphed(sizes=(2,))
def reads_globals(x: Tensor) -> Tensor:
    return helper_of_globals(x) * NUMBER + SETTINGS["shift"]


def helper_of_globals(x: Tensor) -> Tensor:
    return x + TABLE


@pytest.fixture
def settings(backend: Backend) -> Iterator[None]:
    global TABLE, NUMBER
    TABLE, NUMBER, SETTINGS["shift"] = backend.randn(8), 2, 1.0
    yield
    reads_globals.cache_clear()


@pytest.mark.usefixtures("settings")
def test_a_global_tensor_is_replaced(x: Tensor) -> None:
    """The graph reads the old tensor; a helper of the forward reads the global."""
    old = TABLE
    survives(reads_globals, lambda: globals().update(TABLE=old * 2), x)


@pytest.mark.usefixtures("settings")
def test_a_global_number_is_changed(x: Tensor) -> None:
    """The number of the capture is baked into the kernel's arguments."""
    survives(reads_globals, lambda: globals().update(NUMBER=3), x)


@pytest.mark.usefixtures("settings")
def test_a_number_in_a_global_dict_is_changed(x: Tensor) -> None:
    """The number of the capture is baked in; the dict stays the same object."""
    survives(reads_globals, lambda: SETTINGS.update(shift=5.0), x)


@pytest.mark.usefixtures("settings")
def test_a_global_helper_is_replaced(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old helper's kernels are all that ever runs."""
    change = partial(monkeypatch.setitem, globals(), "helper_of_globals", lambda x: x * TABLE)
    survives(reads_globals, change, x)


@pytest.fixture(params=["helper_of_footguns", "triton_ops", "cuda_kernels"])
def helper(backend: Backend, tmp_path: Path, request: pytest.FixtureRequest) -> ModuleType:
    """A module of the user's in a file of its own, however much its name looks like a library's."""
    file = tmp_path / "helper.py"
    file.write_text("TABLE, SCALE = None, 2.0\ndef look(x):\n    return (x + TABLE) * SCALE\n")
    spec = importlib.util.spec_from_file_location(request.param, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TABLE = backend.randn(8)
    return module


def test_a_global_tensor_of_another_module_is_replaced(x: Tensor, helper: ModuleType) -> None:
    """The graph reads the old tensor; a look at the forward's own globals does not find it."""
    look = helper.look
    model = cuda_graphed(lambda x: look(x) + 1, sizes=(2,))
    old = helper.TABLE
    survives(model, lambda: setattr(helper, "TABLE", old * 2), x)


def test_a_global_number_of_another_module_is_changed(x: Tensor, helper: ModuleType) -> None:
    """The number of the capture is baked in; a look at the forward's own globals does not find it."""
    model = cuda_graphed(lambda x: helper.look(x) + 1, sizes=(2,))
    survives(model, lambda: setattr(helper, "SCALE", 5.0), x)


def test_a_global_of_another_module_is_read_by_its_name(x: Tensor, helper: ModuleType) -> None:
    """The value of the capture is baked in; the forward reads `config.SCALE`."""
    model = cuda_graphed(lambda x: x * helper.SCALE + helper.TABLE, sizes=(2,))
    same_as_eager(model, x)
    helper.SCALE = 5.0
    same_as_eager(model, x)
    helper.TABLE = helper.TABLE * 2
    same_as_eager(model, x)
    assert info(model).calls == info(model).hits + info(model).misses


def test_a_tensor_in_a_class_attribute_is_replaced(backend: Backend, x: Tensor) -> None:
    """The graph reads the old tensor; the instance's attributes do not lead to it."""

    class Own(Net):
        bias = backend.randn(8)

    model, old = cuda_graphed(Own(backend.device), sizes=(2,)), Own.bias
    survives(model, lambda: setattr(Own, "bias", old * 2), x)


def test_a_number_in_a_class_attribute_is_changed(net: Net, x: Tensor, monkeypatch: Any) -> None:
    """The number of the capture is baked in; the instance has no such attribute."""
    survives(net, lambda: monkeypatch.setattr(Net, "bias", 4.0), x)


def test_number_in_a_class_attribute_of_an_object_is_changed(x: Tensor) -> None:
    """The number of the capture is baked in: `self.config.scale` was never set on the instance."""

    class Config:
        scale = 2.0

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.config.scale

    model = cuda_graphed(Scaled(), sizes=(2,))
    survives(model, lambda: setattr(Config, "scale", 3.0), x)
    survives(model, lambda: setattr(model.config, "scale", 4.0), x)
