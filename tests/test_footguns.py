"""Every trap of CUDA graphs that we know of, walked into: eager's result, or an error of ours.

One test for each, named after what the user did; its docstring says what a plain CUDA graph does then.
How a trap is avoided (captured anew, run eagerly, refused) is left open unless the test asks for it.
"""

from __future__ import annotations

import contextvars
import copy
import ctypes
import gc
import importlib.util
import io
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import graphcache
from graphcache import GraphCacheWarning, cuda_graphed
from graphcache.pool import Lane
from graphcache.report.cache_info import CacheInfo
from graphcache.runtime.loaded_kernels import loaded
from tests.conftest import Backend, Counter, hidden
from tests.test_launch import on
from tests.test_state import Capturing

# Whether we tell of a trap is asked only by tests that say so.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")

EMULATED = pytest.mark.parametrize("backend", ["emulated", "emulated-portable"], indirect=True)


def info(model: Any) -> CacheInfo:
    return (model.forward if isinstance(model, nn.Module) else model).cache_info()


def eagerly(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What the class, or the function, says now; for a module, whatever was put on the instance."""
    with graphcache.disabled():
        if isinstance(model, nn.Module):
            return type(model).forward(model, *args, **kwargs)
        return model(*args, **kwargs)


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return error


def is_ours(error: Any) -> bool:
    return isinstance(error, RuntimeError) and "graphcache" in str(error)


def equal(got: Any, want: Any) -> None:
    """Equal within what another batch size's kernel may round differently, dtypes included."""
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, equal_nan=True)


def same_as_eager(model: Any, *args: Any, times: int = 3, **kwargs: Any) -> None:
    """Each call returns what eager returns, raises what eager raises, or raises an error of ours."""
    for _ in range(times):
        want = outcome(eagerly, model, *args, **kwargs)
        got = outcome(model, *args, **kwargs)
        if isinstance(got, Exception) or isinstance(want, Exception):
            assert is_ours(got) or type(got) is type(want), (got, want)
        else:
            equal(got, want)


def replays(model: Any, *args: Any, **kwargs: Any) -> None:
    """The same, and graphs serve the last of the calls."""
    same_as_eager(model, *args, **kwargs)
    before = info(model).hits
    same_as_eager(model, *args, times=1, **kwargs)
    assert info(model).hits == before + 1, info(model)


def survives(model: Any, change: Callable[[], Any], *args: Any) -> None:
    """Graphs serve before the change; after it every call is what eager returns, and differs."""
    replays(model, *args)
    before = eagerly(model, *args)
    change()
    after = outcome(eagerly, model, *args)
    assert not (isinstance(after, Tensor) and torch.equal(before, after)), "the trap is none"
    same_as_eager(model, *args)


def in_step(model: Any, twin: Any, *args: Any) -> None:
    """Two that hold state of their own return the same, and leave it the same."""
    equal(model(*args), twin(*args))
    for name, state in twin.state_dict().items():
        equal(model.state_dict()[name], state)


def graphed_twin(twin: Any, **options: Any) -> Any:
    return cuda_graphed(copy.deepcopy(twin), **options)


class Net(nn.Module):
    """Reads a tensor or a number from every place that a module has."""

    bias: ClassVar[Any] = 0.0

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.to(device)
        self.scale = 2.0
        self.config = SimpleNamespace(scale=3.0, inner=SimpleNamespace(shift=1))
        self.flags = [True, False]
        self.tables = {"k": torch.ones(8, device=device)}
        self.cache = SimpleNamespace(k=torch.ones(8, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x))) * self.scale
        y = y * self.config.scale + self.config.inner.shift
        y = y + self.tables["k"] if self.flags[0] else y
        return (y * 2 if self.flags[1] else y) + self.cache.k + self.bias


@pytest.fixture
def net(backend: Backend) -> Net:
    return cuda_graphed(Net(backend.device).eval(), sizes=(2, 4))


@pytest.fixture
def x(backend: Backend) -> Tensor:
    return backend.randn(2, 8)


# Replaced parameters


def test_p_data_is_assigned(net: Net, x: Tensor) -> None:
    """The graph reads the old storage for ever."""

    def change() -> None:
        for p in net.parameters():
            p.data = p.data * 2

    survives(net, change, x)


def test_a_new_parameter_is_put_in(net: Net, x: Tensor) -> None:
    """The graph reads the parameter that was there before."""
    survives(net, lambda: setattr(net.up, "weight", nn.Parameter(net.up.weight * 2)), x)


def test_load_state_dict_with_assign(net: Net, x: Tensor) -> None:
    """Parameters are replaced, not filled; the graph reads the old ones."""
    state = {name: tensor * 2 for name, tensor in net.state_dict().items()}
    survives(net, lambda: net.load_state_dict(state, assign=True), x)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_the_module_is_cast(net: Net, x: Tensor, cast: Callable[[nn.Module], nn.Module]) -> None:
    """Weights move; eager refuses the old input dtype, and the graph computes with freed memory."""
    replays(net, x)
    cast(net)
    same_as_eager(net, x)  # raises in eager
    replays(net, x.to(net.up.weight.dtype))
    net.float()
    same_as_eager(net, x)


def test_the_module_is_cast_to_and_fro(net: Net, x: Tensor) -> None:
    """Same dtypes as at capture, another address."""

    def change() -> None:
        net.up.weight.mul_(1.001)
        net.to(torch.bfloat16).to(torch.float32)

    survives(net, change, x)


def test_lora_is_merged_in_place(net: Net, x: Tensor) -> None:
    """Fine with a plain graph too, and must stay captured."""
    delta = torch.ones_like(net.up.weight)
    survives(net, lambda: net.up.weight.add_(delta), x)
    survives(net, lambda: net.up.weight.sub_(delta), x)
    assert info(net).captures == 2


def test_lora_is_merged_by_replacing_the_weight(net: Net, x: Tensor) -> None:
    """The graph reads the weights without the adapter; merging out brings the old address back."""
    old = net.up.weight.data
    for _ in range(3):
        survives(net, lambda: setattr(net.up.weight, "data", old + 1), x)
        survives(net, lambda: setattr(net.up.weight, "data", old), x)


def test_the_old_parameter_lives_on_in_an_optimizer(net: Net, x: Tensor) -> None:
    """Its memory is intact, so nothing crashes: the graph serves the old weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    survives(net, lambda: setattr(net.up, "weight", nn.Parameter(net.up.weight * 2)), x)
    assert optimizer.param_groups


def test_the_parameters_are_swapped_with_an_average(net: Net, x: Tensor) -> None:
    """Both sets live on, and swap back: the graph serves one of them at all times."""
    average = [nn.Parameter(p * 0.9) for p in net.up.parameters()]

    def swap() -> None:
        average[0], net.up.weight = net.up.weight, average[0]
        average[1], net.up.bias = net.up.bias, average[1]

    for _ in range(3):
        survives(net, swap, x)


def test_the_data_of_parameters_is_swapped_with_an_average(net: Net, x: Tensor) -> None:
    """The same objects with each other's memory."""
    average = copy.deepcopy(net.up).to(x.device)
    average.weight.mul_(0.5)

    def swap() -> None:
        net.up.weight.data, average.weight.data = average.weight.data, net.up.weight.data

    for _ in range(3):
        survives(net, swap, x)


def test_the_old_parameters_live_on_in_a_list(net: Net, x: Tensor) -> None:
    """As a snapshot to go back to."""
    old = list(net.up.parameters())
    survives(net, lambda: setattr(net, "up", nn.Linear(8, 8).to(x.device)), x)
    net.up.weight, net.up.bias = old
    same_as_eager(net, x)


def test_a_view_of_a_weight_is_kept_by_the_module(backend: Backend, x: Tensor) -> None:
    """Eager goes on reading the view of the old weight, and the new weight."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.row = [self.up.weight.data[0]]

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.row[0]

    model = cuda_graphed(Viewing().to(backend.device), sizes=(2,))
    model.row = [model.up.weight.data[0]]
    survives(model, lambda: setattr(model.up.weight, "data", model.up.weight * 2), x)
    survives(model, lambda: model.row[0].fill_(5), x)
    survives(model, lambda: model.row.__setitem__(0, model.up.weight.data[1]), x)


def test_a_view_of_a_weight_is_written_by_the_caller(net: Net, x: Tensor) -> None:
    """Fine with a plain graph; nothing may be copied on the way."""
    view = net.up.weight.data[:3]
    survives(net, lambda: view.mul_(3), x)
    assert info(net).captures == 2


def test_the_old_weight_is_freed_and_its_memory_used_again(
    backend: Backend, net: Net, x: Tensor
) -> None:
    """The graph reads whatever lies there now."""
    replays(net, x)
    for _ in range(4):
        net.up.weight = nn.Parameter(net.up.weight.detach() * 1.5)
        litter = [torch.full((8, 8), 9.0, device=backend.device) for _ in range(8)]
        same_as_eager(net, x)
    assert litter


def test_a_parameter_is_deleted_and_set_again(net: Net, x: Tensor) -> None:
    """As weight_norm and pruning do: the name now leads to a plain tensor."""

    def change() -> None:
        weight = net.up.weight
        del net.up.weight
        net.up.weight = weight.data * 2

    survives(net, change, x)
    survives(net, lambda: setattr(net.up, "weight", net.up.weight * 2), x)


def test_a_parameter_is_replaced_on_every_call(net: Net, x: Tensor) -> None:
    """A capture for each call costs more than eager: it stops, and tells what keeps changing."""
    with pytest.warns(GraphCacheWarning) as told:
        for _ in range(40):
            net.up.weight = nn.Parameter(net.up.weight * 1.01)
            same_as_eager(net, x, times=1)
    assert len(told) == 1
    assert "up.weight" in str(told[0].message)
    assert info(net).captures <= 2 * 20
    captures = info(net).captures
    net.up.weight = nn.Parameter(net.up.weight * 1.01)
    same_as_eager(net, x)
    assert info(net).captures <= captures + 2


def test_a_number_changes_on_every_call(net: Net, x: Tensor) -> None:
    """The number of the capture is baked in; a capture for each is no answer either."""
    with pytest.warns(GraphCacheWarning) as told:
        for step in range(40):
            net.scale = float(step)
            same_as_eager(net, x, times=1)
    assert len(told) == 1
    assert "scale" in str(told[0].message)
    captures = info(net).captures
    net.scale = 0.5
    same_as_eager(net, x)
    assert info(net).captures <= captures + 2


def test_a_weight_is_swapped_now_and_then_in_a_long_run(net: Net, x: Tensor) -> None:
    """Nightly weights in a server: no number of swaps may end the use of graphs."""
    for _ in range(24):
        net.up.weight = nn.Parameter(net.up.weight * 1.01)
        for _ in range(60):
            net(x)
        replays(net, x)


# Replaced state


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


def test_the_kv_cache_object_is_rebuilt(backend: Backend) -> None:
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
    """The same object with another tensor in a list."""
    twin, model = Attends(KV(backend.device)), cuda_graphed(Attends(KV(backend.device)), sizes=(2,))
    at = torch.tensor([1, 3], device=backend.device)
    for step in range(9):
        x = backend.randn(2, 8)
        equal(model(x, at), twin(x, at))
        equal(model.cache.v[0], twin.cache.v[0])
        if step % 3 == 2:
            twin.cache.v[0], model.cache.v[0] = (c.v[0] * 0.5 for c in (twin.cache, model.cache))
    assert info(model).hits >= 3


def test_the_caller_grows_the_cache_by_torch_cat(backend: Backend, x: Tensor) -> None:
    """Shape and address change; the graph attends to the first tokens only."""

    class Grows(nn.Module):
        k: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.k.T).softmax(-1) @ self.k

    model = cuda_graphed(Grows(), sizes=(2,))
    model.k = backend.randn(3, 8)
    for _ in range(3):
        survives(model, lambda: setattr(model, "k", torch.cat([model.k, backend.randn(1, 8)])), x)


def test_a_tensor_in_a_dict_is_replaced(net: Net, x: Tensor) -> None:
    """Addresses are looked up once, at capture."""
    old = net.tables["k"]
    survives(net, lambda: net.tables.update(k=old * 2), x)
    survives(net, lambda: net.__setattr__("tables", {"k": old * 3}), x)


def test_a_tensor_in_an_opaque_object_is_replaced(net: Net, x: Tensor) -> None:
    """Addresses are looked up once, at capture."""
    old = net.cache.k
    survives(net, lambda: setattr(net.cache, "k", old * 2), x)
    survives(net, lambda: setattr(net, "cache", SimpleNamespace(k=old * 3)), x)


def test_a_tensor_in_an_object_with_slots_is_replaced(backend: Backend, x: Tensor) -> None:
    """No `__dict__` to look into."""

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
    """Likewise, and nothing but the value tells."""

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
    """The forward itself has no closure; what it calls has."""
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
    """Read by a helper of the forward."""
    old = TABLE
    survives(reads_globals, lambda: globals().update(TABLE=old * 2), x)


@pytest.mark.usefixtures("settings")
def test_a_global_number_is_changed(x: Tensor) -> None:
    """Baked into the kernel's arguments at capture."""
    survives(reads_globals, lambda: globals().update(NUMBER=3), x)


@pytest.mark.usefixtures("settings")
def test_a_number_in_a_global_dict_is_changed(x: Tensor) -> None:
    """Likewise, one step further away."""
    survives(reads_globals, lambda: SETTINGS.update(shift=5.0), x)


@pytest.mark.usefixtures("settings")
def test_a_global_helper_is_replaced(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that ran at capture is all that ever runs."""
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
    """Read by a helper there, which no look at the forward's own globals finds."""
    look = helper.look
    model = cuda_graphed(lambda x: look(x) + 1, sizes=(2,))
    old = helper.TABLE
    survives(model, lambda: setattr(helper, "TABLE", old * 2), x)


def test_a_global_number_of_another_module_is_changed(x: Tensor, helper: ModuleType) -> None:
    """Likewise."""
    model = cuda_graphed(lambda x: helper.look(x) + 1, sizes=(2,))
    survives(model, lambda: setattr(helper, "SCALE", 5.0), x)


def test_a_global_of_another_module_is_read_by_its_name(x: Tensor, helper: ModuleType) -> None:
    """`config.SCALE` in the forward itself."""
    model = cuda_graphed(lambda x: x * helper.SCALE + helper.TABLE, sizes=(2,))
    same_as_eager(model, x)
    helper.SCALE = 5.0
    same_as_eager(model, x)
    helper.TABLE = helper.TABLE * 2
    same_as_eager(model, x)
    assert info(model).calls == info(model).hits + info(model).misses


def test_a_tensor_in_a_class_attribute_is_replaced(backend: Backend, x: Tensor) -> None:
    """It is no attribute of the instance."""

    class Own(Net):
        bias = backend.randn(8)

    model, old = cuda_graphed(Own(backend.device), sizes=(2,)), Own.bias
    survives(model, lambda: setattr(Own, "bias", old * 2), x)


def test_a_number_in_a_class_attribute_is_changed(net: Net, x: Tensor, monkeypatch: Any) -> None:
    """It is no attribute of the instance, and no tensor."""
    survives(net, lambda: monkeypatch.setattr(Net, "bias", 4.0), x)


def test_a_number_in_a_class_attribute_of_a_plain_object_is_changed(x: Tensor) -> None:
    """`self.config.scale` that was never set on the instance."""

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


# Changed Python values


def test_a_float_attribute_is_changed(net: Net, x: Tensor) -> None:
    """The value of the capture is baked in."""
    survives(net, lambda: setattr(net, "scale", 7.0), x)


def test_an_attribute_of_a_nested_config_is_changed(net: Net, x: Tensor) -> None:
    """The value of the capture is baked in."""
    survives(net, lambda: setattr(net.config, "scale", 7.0), x)
    survives(net, lambda: setattr(net.config.inner, "shift", 7), x)
    survives(net, lambda: setattr(net.config, "inner", SimpleNamespace(shift=9)), x)


def test_a_list_of_flags_is_changed_in_place(net: Net, x: Tensor) -> None:
    """The branch of the capture is baked in."""
    survives(net, lambda: net.flags.__setitem__(1, True), x)
    survives(net, lambda: net.flags.reverse() or net.flags.__setitem__(0, False), x)


def test_layers_are_skipped_by_a_set_of_numbers(backend: Backend, x: Tensor) -> None:
    """The branches of the capture are baked in."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.skipped = {1}

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = x if index in self.skipped else layer(x)
            return x

    model = cuda_graphed(Skips().to(backend.device), sizes=(2,))
    survives(model, lambda: model.skipped.add(2), x)
    survives(model, model.skipped.clear, x)


def test_a_number_in_a_numpy_array_is_changed(backend: Backend, x: Tensor) -> None:
    """Host memory that Python reads, and changed in place: no object is replaced."""
    numpy = pytest.importorskip("numpy")

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = numpy.ones(2)

        def forward(self, x: Tensor) -> Tensor:
            return x * float(self.scales[0])

    model = cuda_graphed(Scales(), sizes=(2,))
    same_as_eager(model, x)
    model.scales[0] = 3.0
    same_as_eager(model, x)


def test_a_property_computes_from_another_attribute(backend: Backend, x: Tensor) -> None:
    """The forward never names what it depends on."""

    class Tempered(nn.Module):
        heat = 1.0

        @property
        def scale(self) -> float:
            return self.heat * 2

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = cuda_graphed(Tempered(), sizes=(2,))
    survives(model, lambda: setattr(model, "heat", 4.0), x)


def test_attributes_are_read_by_getattr(net: Net, backend: Backend, x: Tensor) -> None:
    """By a name that stands in no code."""

    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale_0 = 2.0
            self.which = 0

        def forward(self, x: Tensor) -> Tensor:
            return x * getattr(self, f"scale_{self.which}")

    model = cuda_graphed(Dynamic(), sizes=(2,))
    survives(model, lambda: setattr(model, "scale_0", 3.0), x)


def test_a_mutable_default_argument_is_changed(backend: Backend, x: Tensor) -> None:
    """A list as a default: the same object with other values."""
    scales = [2.0]

    def forward(x: Tensor, scales: list[float] = scales) -> Tensor:
        return x * scales[0]

    model = cuda_graphed(forward, sizes=(2,))
    replays(model, x)
    scales[0] = 3.0
    same_as_eager(model, x)


def test_a_list_argument_is_changed_in_place(backend: Backend, x: Tensor) -> None:
    """The same list object with other numbers in it."""
    model = cuda_graphed(lambda x, scales: x * scales[0], sizes=(2,))
    scales = [2.0]
    replays(model, x, scales)
    scales[0] = 3.0
    same_as_eager(model, x, scales)


# Changed code and structure


def test_the_forward_of_a_submodule_is_patched_on_its_class(
    backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerators do to a whole model at once."""

    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = cuda_graphed(nn.Sequential(Inner(8, 8)).to(backend.device), sizes=(2,))
    survives(model, lambda: monkeypatch.setattr(Inner, "forward", lambda self, x: x * 2), x)


def test_the_forward_of_a_submodule_is_patched_on_the_instance(net: Net, x: Tensor) -> None:
    """Code that ran at capture is all that ever runs."""
    survives(net, lambda: setattr(net.up, "forward", lambda x: x * 2), x)
    survives(net, lambda: delattr(net.up, "forward"), x)


def test_a_method_that_the_forward_calls_is_patched(
    backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likewise, on a class that is not the forward's own business."""

    class Methodical(nn.Module):
        def step(self, x: Tensor) -> Tensor:
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.step(x)

    model = cuda_graphed(Methodical(), sizes=(2,))
    survives(model, lambda: monkeypatch.setattr(Methodical, "step", lambda self, x: x * 3), x)
    survives(model, lambda: setattr(model, "step", lambda x: x * 4), x)


def test_the_class_of_the_module_is_changed(backend: Backend, x: Tensor) -> None:
    """Quantisers assign `__class__`."""

    model = Net(backend.device)
    model.up.__class__ = type("Linear", (nn.Linear,), {})
    cuda_graphed(model, sizes=(2,))
    other = type("Other", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) * 2})
    survives(model, lambda: setattr(model.up, "__class__", other), x)


def test_the_class_of_a_class_decorated_module_is_changed(backend: Backend, x: Tensor) -> None:
    """The decorated class is left altogether."""

    @cuda_graphed(sizes=(2,))
    class Graphed(Net):
        pass

    class Doubles(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = Graphed(backend.device)
    replays(model, x)
    model.__class__ = Doubles
    same_as_eager(model, x)


def test_a_submodule_is_replaced(net: Net, x: Tensor) -> None:
    """The graph runs the old one."""
    survives(net, lambda: setattr(net, "down", nn.Linear(8, 8).to(x.device)), x)
    survives(net, lambda: setattr(net, "down", nn.Identity()), x)


def test_a_layer_is_appended_and_removed(backend: Backend, x: Tensor) -> None:
    """The depth of the capture is baked in."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).to(backend.device)
    cuda_graphed(model, sizes=(2,))
    survives(model, lambda: model.append(nn.Linear(8, 8).to(backend.device)), x)
    survives(model, lambda: model.pop(1), x)
    survives(model, lambda: model.insert(0, nn.Tanh()), x)


def test_layers_in_a_plain_list_are_replaced(backend: Backend, x: Tensor) -> None:
    """No children as far as torch knows."""

    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(8, 8).to(backend.device) for _ in range(2)]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = cuda_graphed(Hides(), sizes=(2,))
    survives(model, lambda: setattr(model.layers[0], "weight", nn.Parameter(model.layers[1].weight)), x)
    survives(model, model.layers.reverse, x)
    survives(model, model.layers.pop, x)


def test_one_submodule_is_put_into_training_mode(backend: Backend) -> None:
    """The root's own mode stays, and with it what a key of modes sees."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).to(backend.device).eval()
    twin = copy.deepcopy(model)
    cuda_graphed(model, sizes=(4,))
    x = backend.randn(4, 8) + 3
    replays(model, x)
    for mode in (True, False, True):
        model[1].train(mode)
        twin[1].train(mode)
        for _ in range(3):
            in_step(model, twin, x)


def test_a_functional_flag_of_a_submodule_is_changed(backend: Backend, x: Tensor) -> None:
    """`negative_slope`, `p`, `eps`: numbers that torch's own modules read."""
    model = nn.Sequential(nn.LeakyReLU(0.1), nn.LayerNorm(8)).to(backend.device)
    cuda_graphed(model, sizes=(2,))
    survives(model, lambda: setattr(model[0], "negative_slope", 0.5), x)
    survives(model, lambda: setattr(model[1], "eps", 10.0), x)
    survives(model, lambda: setattr(model[1], "normalized_shape", (2, 8)), x)


# Composition


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
    """Each overwrites what the other returned, which nobody needs any more."""
    pool = backend.pool()
    models = [cuda_graphed(Net(backend.device), sizes=(2, 4), pool=pool) for _ in range(2)]
    for batch in (2, 4, 3, 1, 2, 3):
        for model in models:
            same_as_eager(model, backend.randn(batch, 8), times=1)
    assert all(info(model).hits >= 3 for model in models)


def test_draft_and_target_hold_each_others_outputs(backend: Backend) -> None:
    """Speculative decoding: the draft's last logits are compared with the target's."""
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
    """Its weights are replaced through one of them."""
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
    """Called from two places of one step, and one of the outputs is kept."""
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


# State


class Steps(nn.Module):
    """Writes to a buffer, by an operation that is given."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(width))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.state, x)
        return x + self.state


def steps(backend: Backend, write: Callable[[Tensor, Tensor], Any], **options: Any) -> Any:
    model, twin = (Steps(write).to(backend.device) for _ in range(2))
    return cuda_graphed(model, sizes=(2, 4), **options), twin


def add_sum(state: Tensor, x: Tensor) -> None:
    state.add_(x.sum(0))


@torch.library.custom_op("footguns::declared", mutates_args={"state"})
def declared(state: Tensor, x: Tensor) -> None:
    state.add_(x.sum(0))


@torch.library.custom_op("footguns::undeclared", mutates_args=())
def undeclared(state: Tensor, x: Tensor) -> Tensor:
    state.add_(x.sum(0))
    return x + 1


@torch.library.custom_op("footguns::failing", mutates_args=())
def failing(x: Tensor) -> Tensor:
    if FAILS[0]:
        raise ValueError("the kernel refuses")
    return x * 2


FAILS = [True]


@pytest.mark.parametrize("write", [add_sum, declared])
@pytest.mark.parametrize("inference", [False, True])
def test_the_forward_writes_to_a_buffer(backend: Backend, write: Any, inference: bool) -> None:
    """Warm-ups advance it, captures don't, and padded rows write to it too."""
    model, twin = steps(backend, write)
    with torch.inference_mode(inference):
        for batch in (4, 4, 3, 3, 2, 4, 3, 3):
            in_step(model, twin, backend.randn(batch, 8))
    assert info(model).hits >= 4


def test_a_custom_op_writes_and_does_not_declare_it(backend: Backend) -> None:
    """No schema tells, so it is padded, compared, and written to more often than eager would."""
    model, twin = steps(backend, undeclared)
    for batch in (4, 4, 3, 3, 2, 4, 3, 3):
        in_step(model, twin, backend.randn(batch, 8))


def test_a_custom_op_writes_to_an_argument_and_does_not_declare_it(backend: Backend) -> None:
    """It writes to the graph's own copy of the argument; the caller's stays as it was."""

    def forward(x: Tensor, state: Tensor) -> Tensor:
        return undeclared(state, x) + state

    model = cuda_graphed(forward, sizes=(2, 4))
    mine, theirs = torch.zeros(8, device=backend.device), torch.zeros(8, device=backend.device)
    for batch in (4, 4, 3, 3, 2, 4, 3):
        x = backend.randn(batch, 8)
        equal(model(x, mine), forward(x, theirs))
        equal(mine, theirs)


def bump_by_address(state: Tensor, x: Tensor) -> None:
    """As an extension does that never told torch of its operator."""
    first = ctypes.c_float.from_address(state.data_ptr())
    first.value += float(x.shape[0])


def bump_by_numpy(state: Tensor, x: Tensor) -> None:
    state.numpy()[0] += float(x.shape[0])


ON_A_GPU = on("cuda", "cuda-portable")  # Triton has kernels for nothing else here


@pytest.fixture
def kernels() -> ModuleType:
    return importlib.import_module("tests.triton_kernels")


class WritesByTriton(nn.Module):
    """Advances a buffer and an argument, past torch's operators; raises in so many captures."""

    def __init__(self, kernels: ModuleType, *, failing: int = 0) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(16))
        self.kernels, self.failing, self.captures = kernels, failing, Counter()

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        self.kernels.add_one[(1,)](self.state, 16)
        self.kernels.add_one[(1,)](counts, 16)
        if torch._C._cuda_isCurrentStreamCapturing() and self.captures.add() <= self.failing:
            raise RuntimeError("not initialised")
        return x + self.state[:8] + counts[8:]


@ON_A_GPU
@pytest.mark.parametrize("failing", [0, 1])
def test_a_triton_kernel_writes_to_a_buffer_and_to_an_argument(
    backend: Backend, x: Tensor, kernels: ModuleType, failing: int
) -> None:
    """What it wrote to a staged copy never reaches the caller; and no operator tells that it writes.

    Nor to a warm-up, which follows a capture that fails, and has to undo it.
    """
    model = cuda_graphed(WritesByTriton(kernels, failing=failing).to(backend.device), sizes=(2,))
    counts = torch.zeros(16, device=backend.device)
    for step in range(1, 7):
        equal(model(x, counts), x + 2 * step)
        assert model.state.eq(step).all()
        assert counts.eq(step).all()
    assert int(model.captures) > failing
    assert info(model).hits >= 3


@ON_A_GPU
def test_a_triton_kernel_reads_a_global_tensor(backend: Backend, x: Tensor, kernels: ModuleType) -> None:
    """No operator sees that it is read, and it is replaced later."""
    scratch = [torch.zeros(16, device=backend.device)]

    def forward(x: Tensor) -> Tensor:
        kernels.add_one[(1,)](scratch[0], 16)
        return x * 2

    model = cuda_graphed(forward, sizes=(2, 4))
    model.warmup(x)
    assert scratch[0].eq(0).all()
    for _ in range(3):
        equal(model(x), x * 2)
    equal(model(x[:1]), x[:1] * 2)
    before, scratch[0] = scratch[0], torch.zeros(16, device=backend.device)
    for step in range(1, 4):
        model(x)
        assert scratch[0].eq(step).all()
    assert before.eq(4).all()


def triton_knows(monkeypatch: pytest.MonkeyPatch, driver: object) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", SimpleNamespace(driver=driver))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("triton.compiler.compiler", "CompiledKernel"),
        ("torch._inductor.runtime.static_triton_launcher", "StaticallyLaunchedTritonKernel"),
    ],
)
@pytest.mark.parametrize("derived", [False, True])
def test_nobody_else_holds_a_kernel_any_more(
    backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch, file: str, name: str, derived: bool
) -> None:
    """What loaded it unloads it, and the graph launched what was no longer on the device."""
    base = type(name, (), {})
    kind = type("ForOneDevice", (base,), {}) if derived else base
    monkeypatch.setitem(sys.modules, file, SimpleNamespace(**{name: base}))  # type: ignore[misc]
    triton_knows(monkeypatch, SimpleNamespace(_active="a device"))
    kernel = kind()
    known = weakref.ref(kernel)
    model = cuda_graphed(lambda x: x * 2, sizes=(2,))
    model(x)
    del kernel
    gc.collect()
    assert known() is not None
    model.cache_clear()
    gc.collect()
    assert known() is None


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (SimpleNamespace(_active=None), 0),
        (SimpleNamespace(_active="a device"), 1),
        (SimpleNamespace(), 1),
    ],
)
def test_kernels_of_triton_are_looked_for_once_it_runs(
    monkeypatch: pytest.MonkeyPatch, driver: object, found: int
) -> None:
    kind = type("CompiledKernel", (), {})
    monkeypatch.setitem(sys.modules, "triton.compiler.compiler", SimpleNamespace(CompiledKernel=kind))  # type: ignore[misc]
    triton_knows(monkeypatch, driver)
    kernel = kind()
    assert [value for value in loaded() if value is kernel] == [kernel] * found


@ON_A_GPU
def test_a_kernel_of_triton_is_found(backend: Backend, kernels: ModuleType) -> None:
    kernels.add_one[(1,)](torch.zeros(16, device=backend.device), 16)
    assert "CompiledKernel" in [type(value).__name__ for value in loaded()]


@ON_A_GPU
def test_a_triton_kernel_tunes_itself(backend: Backend, kernels: ModuleType) -> None:
    """It launches, waits and measures at each size that it has not seen, which ends a capture."""

    def forward(x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        kernels.double[lambda chosen: (-(-x.numel() // chosen["block"]),)](x, y, x.numel())
        return y + 1

    model = cuda_graphed(forward, sizes=(2, 4, 8))
    for batch in (4, 8, 3, 2, 8, 4, 3):
        x = backend.randn(batch, 8)
        equal(model(x), x * 2 + 1)
    assert info(model).sizes == (2, 4, 8)
    assert info(model).hits >= 4


@EMULATED
@pytest.mark.parametrize("write", [bump_by_address, bump_by_numpy])
def test_the_host_writes_by_data_ptr(backend: Backend, write: Any) -> None:
    """What passes torch's operators is in no record: it happens once, at capture."""
    pytest.importorskip("numpy")
    model, twin = steps(backend, write)
    for batch in (4, 4, 3, 3, 2, 4, 3):
        in_step(model, twin, backend.randn(batch, 8))


@EMULATED
def test_the_host_writes_by_data_ptr_on_later_calls_only(backend: Backend) -> None:
    """The first call, which is watched, had nothing to write."""
    step = [0]

    def write(state: Tensor, x: Tensor) -> None:
        step[0] += 1
        if step[0] > 2:
            ctypes.c_float.from_address(state.data_ptr()).value += 1.0

    model = cuda_graphed(Steps(write), sizes=(2,))
    for call in range(1, 7):
        x = backend.randn(2, 8)
        model(x)
        assert model.state[0].item() == max(0, call - 2)


class Cached(nn.Module):
    """One row of a KV cache for each slot; the last one is a sink."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(9, 8))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        self.k[slots] = self.k[slots] * 0.5 + x
        return (x @ self.k[:-1].T).softmax(-1) @ self.k[:-1]


def test_a_kv_cache_without_pad(backend: Backend) -> None:
    """Padded rows of zeros write to slot 0."""
    twin = Cached().to(backend.device)
    model = graphed_twin(twin, sizes=(2, 4))
    for batch in (4, 3, 2, 3, 1, 4, 3, 1):
        slots = torch.randperm(8, device=backend.device)[:batch]
        in_step(model, twin, backend.randn(batch, 8), slots)
    assert info(model).hits >= 4
    assert info(model).padded_rows == 0


def test_a_kv_cache_with_a_sentinel(backend: Backend) -> None:
    """The tail of the static slots holds those of an earlier, larger batch."""
    twin = Cached().to(backend.device)
    model = graphed_twin(twin, sizes=(2, 4), pad={"slots": -1})
    for batch in (4, 3, 2, 3, 1, 4, 3, 1):
        slots = torch.randperm(8, device=backend.device)[:batch]
        x = backend.randn(batch, 8)
        equal(model(x, slots), twin(x, slots))
        equal(model.k[:-1], twin.k[:-1])
    assert info(model).padded_rows >= 4


def test_a_sentinel_that_is_a_slot(backend: Backend) -> None:
    """The user promised that padded rows do no harm, with a value for another argument than counts."""
    twin = Cached().to(backend.device)
    model = graphed_twin(twin, sizes=(2, 4), pad={"slots": -1, "x": 7.0})
    for batch in (3, 3, 2, 1, 4, 3):
        slots = torch.randperm(8, device=backend.device)[:batch]
        x = backend.randn(batch, 8)
        equal(model(x, slots), twin(x, slots))
        equal(model.k[:-1], twin.k[:-1])


def test_a_python_counter_advances(backend: Backend, x: Tensor) -> None:
    """`self.step += 1` runs at capture only, and its value is baked in."""

    class Counts(nn.Module):
        step = 0

        def forward(self, x: Tensor) -> Tensor:
            self.step += 1
            return x * self.step

    model, twin = cuda_graphed(Counts(), sizes=(2,)), Counts()
    for _ in range(8):
        equal(model(x), twin(x))
        assert model.step == twin.step


def test_a_python_counter_advances_after_a_while(backend: Backend, x: Tensor) -> None:
    """The first calls, which are watched, leave it alone."""

    class Counts(nn.Module):
        step = 0
        start = False

        def forward(self, x: Tensor) -> Tensor:
            if self.start:
                self.step += 1
            return x * (1 + self.step)

    model, twin = cuda_graphed(Counts(), sizes=(2,)), Counts()
    for call in range(10):
        model.start = twin.start = call >= 4
        equal(model(x), twin(x))
        assert model.step == twin.step


def test_a_python_counter_of_an_object_advances(backend: Backend, x: Tensor) -> None:
    """As `past_key_values.seen_tokens += 1`."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = SimpleNamespace(seen=0)

        def forward(self, x: Tensor) -> Tensor:
            self.cache.seen += x.shape[0]
            return x * self.cache.seen

    model, twin = cuda_graphed(Counts(), sizes=(2, 4)), Counts()
    for _ in range(8):
        equal(model(x), twin(x))
        assert model.cache.seen == twin.cache.seen


COUNT = 0
SEEN: list[Any] = []


def test_a_global_counter_advances(backend: Backend, x: Tensor) -> None:
    """`global COUNT; COUNT += 1` runs at capture only."""
    global COUNT
    COUNT = 0

    def forward(x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return x * COUNT

    model = cuda_graphed(forward, sizes=(2,))
    for call in range(1, 8):
        equal(model(x), x * call)
        assert call == COUNT


def test_a_counter_in_a_closure_advances(backend: Backend, x: Tensor) -> None:
    """`nonlocal` likewise."""
    count = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * count

    model = cuda_graphed(forward, sizes=(2,))
    for call in range(1, 8):
        equal(model(x), x * call)
        assert call == count


def test_a_counter_in_an_argument_advances(backend: Backend, x: Tensor) -> None:
    """A dict that is handed in and written to, as a `state` that users pass along."""

    def forward(x: Tensor, state: dict[str, int]) -> Tensor:
        state["step"] += 1
        return x * state["step"]

    model, state = cuda_graphed(forward, sizes=(2,)), {"step": 0}
    for call in range(1, 8):
        equal(model(x, state), x * call)
        assert state["step"] == call


def test_an_argument_dict_is_given_new_tensors(backend: Backend, x: Tensor) -> None:
    """`cache["k"] = torch.cat(...)` inside the forward: the caller's dict is rebuilt by no replay."""

    def forward(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        cache["k"] = cache["k"] + x.sum(0)
        return x + cache["k"]

    model = cuda_graphed(forward, sizes=(2,))
    mine, theirs = ({"k": torch.zeros(8, device=backend.device)} for _ in range(2))
    for _ in range(6):
        equal(model(x, mine), forward(x, theirs))
        equal(mine["k"], theirs["k"])


def test_a_list_is_appended_to(backend: Backend, x: Tensor) -> None:
    """Only at capture, and what is appended then is a tensor of the graph."""

    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x * 2)
            return x + len(self.seen)

    model, twin = cuda_graphed(Collects(), sizes=(2,)), Collects()
    for _ in range(6):
        equal(model(x), twin(x))
        equal(model.seen, twin.seen)


def test_a_global_list_is_appended_to(backend: Backend) -> None:
    """Likewise, out of sight of the module."""
    SEEN.clear()

    def forward(x: Tensor) -> Tensor:
        SEEN.append(x * 2)
        return x + 1

    model = cuda_graphed(forward, sizes=(2,))
    xs = [backend.randn(2, 8) for _ in range(6)]
    for x in xs:
        equal(model(x), x + 1)
    equal(SEEN, [x * 2 for x in xs])


@pytest.mark.parametrize("where", ["module", "object", "dict", "list", "global"])
def test_an_intermediate_is_stored(backend: Backend, where: str) -> None:
    """It lies in memory that later graphs use, and is that of the last capture at all times."""
    SEEN[:] = [None]
    keep = SimpleNamespace(hidden=None)

    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden: Any = None
            self.keep: Any = keep
            self.held: dict[str, Any] = {"hidden": None}
            self.listed: list[Any] = [None]

        def forward(self, x: Tensor) -> Tensor:
            hidden = x.tanh()
            if where == "module":
                self.hidden = hidden
            elif where == "object":
                self.keep.hidden = hidden
            elif where == "dict":
                self.held["hidden"] = hidden
            elif where == "list":
                self.listed[0] = hidden
            else:
                SEEN[0] = hidden
            return hidden * 2

    model = cuda_graphed(Stores(), sizes=(2, 4))
    places: dict[str, Callable[[], Any]] = {
        "module": lambda: model.hidden,
        "object": lambda: keep.hidden,
        "dict": lambda: model.held["hidden"],
        "list": lambda: model.listed[0],
        "global": lambda: SEEN[0],
    }
    for batch in (2, 2, 4, 3, 3, 2, 2):
        x = backend.randn(batch, 8)
        equal(model(x), x.tanh() * 2)
        equal(places[where](), x.tanh())


def test_an_intermediate_is_stored_where_nothing_looks(backend: Backend) -> None:
    """In a default argument's list, found by no search of attributes and globals."""

    def forward(x: Tensor, *, kept: Any = SimpleNamespace(hidden=[])) -> Tensor:  # noqa: B008
        kept.hidden.append(x.tanh())
        return x * 2

    model, kept = cuda_graphed(forward, sizes=(2,)), forward.__kwdefaults__["kept"]
    for call in range(1, 6):
        x = backend.randn(2, 8)
        equal(model(x), x * 2)
        assert len(kept.hidden) == call
        equal(kept.hidden[-1], x.tanh())


def test_activations_are_captured_by_a_closure_list(backend: Backend) -> None:
    """The interpretability idiom, without hooks."""
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.tanh())
        return x * 2

    model = cuda_graphed(forward, sizes=(2,))
    for call in range(1, 6):
        x = backend.randn(2, 8)
        equal(model(x), x * 2)
        assert len(seen) == call
        equal(seen[-1], x.tanh())


def numpy_seed(seed: int) -> None:
    pytest.importorskip("numpy").random.seed(seed)


def numpy_draw() -> float:
    return float(sys.modules["numpy"].random.rand())


DRAWS: dict[str, tuple[Callable[[int], Any], Callable[[], float]]] = {
    "random": (random.seed, random.random),
    "numpy": (numpy_seed, numpy_draw),
    "torch on the host": (torch.manual_seed, lambda: float(torch.rand((), device="cpu"))),
}


@pytest.mark.parametrize("which", DRAWS)
def test_the_host_draws_a_number(backend: Backend, which: str) -> None:
    """Layer drop and the like: the draw of the capture is made for good."""
    seed, draw = DRAWS[which]

    def forward(x: Tensor) -> Tensor:
        return x * (2.0 if draw() < 0.5 else draw())

    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    seed(3)
    want = [forward(x) for _ in range(8)]
    seed(3)
    for result in want:
        equal(model(x), result)


GENERATOR = torch.Generator("cpu")
RANDOM = random.Random(1)


def test_a_generator_on_the_host_decides(backend: Backend) -> None:
    """A `torch.Generator` for the CPU, and a `random.Random`, of the user's own."""

    def forward(x: Tensor) -> Tensor:
        drawn = torch.randint(0, 1000, (), generator=GENERATOR, device="cpu")
        return x * int(drawn)

    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    GENERATOR.manual_seed(3)
    want = [forward(x) for _ in range(6)]
    GENERATOR.manual_seed(3)
    for result in want:
        equal(model(x), result)


def test_a_random_random_decides(backend: Backend) -> None:
    """Its state is no global one."""
    model = cuda_graphed(lambda x: x * RANDOM.random(), sizes=(2,))
    x = backend.randn(2, 8)
    RANDOM.seed(3)
    want = [x * RANDOM.random() for _ in range(6)]
    RANDOM.seed(3)
    for result in want:
        equal(model(x), result)


def test_a_numpy_generator_decides(backend: Backend, x: Tensor) -> None:
    """`numpy.random.default_rng()` in an attribute."""
    numpy = pytest.importorskip("numpy")

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rng = numpy.random.default_rng(3)

        def forward(self, x: Tensor) -> Tensor:
            return x * float(self.rng.random())

    model, twin = cuda_graphed(Draws(), sizes=(2,)), Draws()
    for _ in range(6):
        equal(model(x), twin(x))


def test_the_clock_decides(backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.time()` is that of the capture for ever."""
    now = [1.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    model = cuda_graphed(lambda x: x * time.time(), sizes=(2,))
    same_as_eager(model, x)
    now[0] = 2.0
    same_as_eager(model, x)


# Aliasing


def writes_second(x: Tensor, state: Tensor) -> Tensor:
    state.add_(1)
    return x + state


def check_aliased(model: Any, forward: Any, *pairs: tuple[Tensor, Tensor]) -> None:
    """Calls both on clones that share memory as the arguments do."""
    for x, state in pairs:
        got, want = [], []
        for call, kept in ((model, got), (forward, want)):
            x_, state_ = copy.deepcopy((x, state))  # keeps what shares a storage
            result = outcome(call, x_, state_)
            kept.extend([result] if isinstance(result, Exception) else [result.clone(), x_, state_])
        if not is_ours(got[0]):
            equal(got, want)


def pair(backend: Backend, *, aliased: bool) -> tuple[Tensor, Tensor]:
    state = backend.randn(4, 8)
    return (state if aliased else backend.randn(4, 8)), state


def test_an_argument_is_written_and_read_as_another_one(backend: Backend) -> None:
    """The copy of x was made before the write."""
    model = cuda_graphed(writes_second, sizes=(4,))
    check_aliased(model, writes_second, *(pair(backend, aliased=True) for _ in range(4)))


def test_a_written_argument_is_read_as_another_one_later(backend: Backend) -> None:
    """Separate tensors at capture; the same one in a later call, at the address that was captured."""
    model = cuda_graphed(writes_second, sizes=(4,))
    x, state = pair(backend, aliased=False)
    for _ in range(3):
        want = state.clone()
        equal(model(x, state), writes_second(x, want))
        equal(state, want)
    assert info(model).hits
    for _ in range(3):
        want = state.clone()
        got = outcome(model, state, state)
        if not is_ours(got):
            equal(got, writes_second(want, want))
            equal(state, want)
    want = state.clone()
    equal(model(x, state), writes_second(x, want))


def test_a_view_of_a_written_argument_is_read_later(backend: Backend) -> None:
    """The same with a slice of it."""
    forward = lambda x, state: state.add_(1).sum() + x  # noqa: E731
    model = cuda_graphed(forward, sizes=(2,))
    x, state = backend.randn(2, 8), backend.randn(6, 8)
    for _ in range(3):
        want = state.clone()
        equal(model(x, state), forward(x, want))
    assert info(model).hits
    for rows in (slice(2, 4), slice(0, 2)):
        want = state.clone()
        got = outcome(model, state[rows], state)
        if not is_ours(got):
            equal(got, forward(want[rows], want))
            equal(state, want)


def test_an_argument_is_a_view_of_the_cache_that_the_forward_writes(backend: Backend) -> None:
    """The copy of x was made before the write."""
    model, twin = (Steps(lambda state, x: state.add_(1)).to(backend.device) for _ in range(2))
    cuda_graphed(model, sizes=(2,))
    for _ in range(4):
        want, got = twin(twin.state.expand(2, 8)), outcome(lambda: model(model.state.expand(2, 8)))
        equal(got, want)
        equal(model.state, twin.state)


class WritesCache(nn.Module):
    """Writes all of a cache, then reads its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.add_(1)
        return x * 2


def test_an_argument_is_a_view_of_a_written_cache_later(backend: Backend) -> None:
    """An ordinary tensor at capture, a row of the cache in a later call."""
    model, twin = (WritesCache().to(backend.device) for _ in range(2))
    cuda_graphed(model, sizes=(2,))
    for _ in range(3):
        in_step(model, twin, backend.randn(2, 8))
    assert info(model).hits
    for _ in range(3):
        want = twin(twin.cache[1:3]).clone()
        got = outcome(lambda: model(model.cache[1:3]))
        if not is_ours(got):
            equal(got, want)
            equal(model.cache, twin.cache)
    in_step(model, twin, backend.randn(2, 8))


def test_an_argument_is_a_parameter_of_the_module(net: Net, x: Tensor) -> None:
    """As `model(model.embedding.weight)`: read only, and nothing is to be lost."""
    replays(net, x)
    same_as_eager(net, net.up.weight.data[:2])
    same_as_eager(net, net.up.weight[:4])


def test_an_output_is_a_view_of_an_argument(backend: Backend) -> None:
    """It would be a view of the static input, which the next call overwrites."""
    model = cuda_graphed(lambda x: (x[:, 1:], x.t()), sizes=(2,))
    kept = []
    for _ in range(4):
        x = backend.randn(2, 8)
        part, turned = model(x)
        equal((part, turned), (x[:, 1:], x.t()))
        part.zero_()
        kept.append(outcome(turned.clone))
        equal(model(x)[1].shape, x.t().shape)
    assert info(model).hits


def test_an_output_is_a_view_of_an_argument_from_another_mode(backend: Backend) -> None:
    """A view is an inference tensor if its base is one, whatever the mode: autograd refuses those."""
    model = cuda_graphed(lambda x: (x[:, 1:], x + 1), sizes=(2, 4))
    for batch in (4, 4, 3, 2, 3):
        plain = backend.randn(batch, 8)
        with torch.inference_mode():
            part, made = model(plain)
            inner = plain + 0
        assert (part.is_inference(), made.is_inference()) == (False, True)
        part, made = model(inner)
        assert (part.is_inference(), made.is_inference()) == (True, False)
    assert info(model).hits >= 5


def test_the_argument_itself_is_returned(backend: Backend) -> None:
    """In place activation: the caller's own object, changed."""
    model = cuda_graphed(lambda x: x.relu_(), sizes=(2,))
    for _ in range(4):
        x = backend.randn(2, 8)
        want = x.relu()
        assert model(x) is x
        equal(x, want)


def test_an_argument_is_written_through_a_view(backend: Backend) -> None:
    """`x[:, 0] = 0` in the forward reaches the caller's tensor in eager."""

    def forward(x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x * 2

    model = cuda_graphed(forward, sizes=(2, 4))
    for batch in (2, 2, 4, 3, 3, 2):
        mine = backend.randn(batch, 8)
        theirs = mine.clone()
        equal(model(mine), forward(theirs))
        equal(mine, theirs)


def test_an_argument_is_written_under_a_condition(backend: Backend) -> None:
    """Not in the call that is watched, but in one of the same shape, by a flag of the module."""

    class Sometimes(nn.Module):
        write = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if self.write else x * 2

    model = cuda_graphed(Sometimes(), sizes=(2,))
    for call in range(8):
        model.write = call % 4 >= 2
        mine = backend.randn(2, 8)
        theirs = mine.clone()
        equal(model(mine), eagerly(model, theirs))
        equal(mine, theirs)


def test_one_tensor_is_passed_for_two_arguments(backend: Backend) -> None:
    """Each has a static input of its own, of which one may stay empty."""
    model = cuda_graphed(lambda x, y: x * 2 + y, sizes=(2, 4))
    for batch in (2, 3, 4, 3):
        x, y = backend.randn(batch, 8), backend.randn(batch, 8)
        for pair_ in ((x, x), (x, y), (y, y), (y, x)):
            same_as_eager(model, *pair_, times=2)
    assert info(model).hits >= 12


def test_an_expanded_argument(backend: Backend) -> None:
    """Strides of zero: rows share memory, and writing one writes all."""
    model = cuda_graphed(lambda x: x * 2, sizes=(2, 4))
    for batch in (4, 3, 3, 2):
        same_as_eager(model, backend.randn(1, 8).expand(batch, 8))
    assert info(model).hits


# Comparing a padded replay with eager


class Centres(nn.Module):
    """Its rows depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_the_mean_over_the_batch_is_subtracted(backend: Backend) -> None:
    """Padded rows count in the mean."""
    model = cuda_graphed(Centres(), sizes=(2, 4))
    for batch in (4, 3, 3, 2, 1, 1, 3):
        same_as_eager(model, backend.randn(batch, 8), times=2)
    assert info(model).hits >= 3


def test_warm_up_calls_are_all_zeros(backend: Backend) -> None:
    """Zeros are their own mean: what is learned from them about rows is nothing."""
    model = cuda_graphed(Centres(), sizes=(2, 4))
    for _ in range(5):
        model(torch.zeros(3, 8, device=backend.device))
    for _ in range(5):
        same_as_eager(model, backend.randn(3, 8), times=1)


@pytest.mark.parametrize("value", [1.0, -3.0])
def test_warm_up_calls_are_all_the_same(backend: Backend, value: float) -> None:
    """The largest row is subtracted: with padding by "edge" or zeros, equal rows hide it."""
    for pad in (None, "edge"):
        model = cuda_graphed(lambda x: x - x.max(0).values - x.min(0).values, sizes=(4,), pad=pad)
        for _ in range(5):
            model(torch.full((3, 8), value, device=backend.device))
        for _ in range(4):
            same_as_eager(model, backend.randn(3, 8), times=1)


def test_warm_up_calls_are_all_positive(backend: Backend) -> None:
    """A maximum over the batch sees the zeros of padded rows only where all else is negative."""
    model = cuda_graphed(lambda x: x + x.max(0).values, sizes=(4,))
    for _ in range(5):
        same_as_eager(model, backend.randn(3, 8).abs() + 1, times=1)
    for _ in range(5):
        same_as_eager(model, -backend.randn(3, 8).abs() - 1, times=1)


def test_large_values_hide_a_softmax_over_rows(backend: Backend) -> None:
    """Padded rows don't show where another row has nearly all of the weight."""
    model = cuda_graphed(lambda x: x.softmax(0), sizes=(4,))
    for values in ((-2000.0, 2000.0, 1000.0),) * 5 + ((-2000.0, -1000.0, -1500.0),) * 3:
        x = torch.tensor(values, device=backend.device)[:, None].expand(3, 8).contiguous()
        same_as_eager(model, x, times=1)


def test_a_warm_up_by_warmup_with_zeros(backend: Backend) -> None:
    """As frameworks do with dummy inputs before they serve."""
    model = cuda_graphed(Centres(), sizes=(2, 4))
    model.forward.warmup(torch.zeros(3, 8, device=backend.device))
    for _ in range(3):
        model(torch.zeros(3, 8, device=backend.device))
    for _ in range(3):
        same_as_eager(model, backend.randn(3, 8), times=1)


def test_rows_depend_on_each_other_by_a_mask_of_them(backend: Backend) -> None:
    """Attention between rows, switched on by an input that was off while the graphs were compared."""
    model = cuda_graphed(lambda x, on: x - (on * x).mean(0), sizes=(4,))
    off = torch.zeros(3, 1, device=backend.device)
    for _ in range(4):
        same_as_eager(model, backend.randn(3, 8), off, times=1)
    for _ in range(4):
        same_as_eager(model, backend.randn(3, 8), off + 1, times=1)


def test_an_unbatched_argument_of_length_one_at_batch_one(backend: Backend) -> None:
    """It has the length of the batch, so it is padded; a first value of zero hides that."""
    model = cuda_graphed(lambda x, shift: x + shift.mean(), sizes=(2, 4))
    for value in (0.0, 0.0, 0.0, 5.0, 7.0):
        shift = torch.full((1,), value, device=backend.device)
        same_as_eager(model, backend.randn(1, 8), shift, times=2)


@pytest.mark.parametrize("first", [0.0, 3.0])
def test_an_unbatched_argument_as_long_as_the_batch_by_chance(backend: Backend, first: float) -> None:
    """A table of three entries meets a batch of three."""
    model = cuda_graphed(lambda x, table: x + table.mean() + table[-1], sizes=(4, 8))
    for batch in (3, 3, 3, 4, 5, 3):
        table = torch.full((3,), first, device=backend.device)
        same_as_eager(model, backend.randn(batch, 8), table, times=2)
    for batch in (3, 4, 5, 3):
        same_as_eager(model, backend.randn(batch, 8), backend.randn(3), times=2)


def test_a_square_argument(backend: Backend) -> None:
    """A mask of batch by batch, of which one dimension is padded."""
    model = cuda_graphed(lambda x, mask: mask.softmax(-1) @ x, sizes=(2, 4))
    for batch in (4, 3, 3, 2, 3, 1, 1):
        same_as_eager(model, backend.randn(batch, 8), backend.randn(batch, batch), times=2)


def test_the_batch_size_is_used_as_a_number(backend: Backend) -> None:
    """`x / len(x)` is baked in at the padded size."""
    model = cuda_graphed(lambda x: x / len(x), sizes=(2, 4))
    for batch in (4, 3, 3, 1, 1, 2):
        same_as_eager(model, backend.randn(batch, 8), times=2)


def test_the_batch_size_is_used_as_a_number_and_zeros_hide_it(backend: Backend) -> None:
    """Likewise, with nothing to see at first."""
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
    """0/0 in a row that nobody sees is to harm nobody."""
    model = cuda_graphed(lambda x: x / x.norm(dim=1, keepdim=True), sizes=(4,))
    for batch in (3, 3, 2, 4):
        same_as_eager(model, backend.randn(batch, 8), times=2)
    assert info(model).padded_rows


def test_a_larger_batch_leaves_its_tail(backend: Backend) -> None:
    """Rows of the last, larger batch stay in the static input: indices that are out of range now."""
    model = cuda_graphed(lambda x, at: x[at], sizes=(4,))
    for batch in (4, 3, 2, 1, 2, 3, 4, 1):
        at = torch.arange(batch, device=backend.device).flip(0)
        same_as_eager(model, backend.randn(batch, 8), at, times=2)
    assert info(model).hits


# Failure


def warned_once(
    model: Any, *calls: tuple[Any, ...], match: str, want: Callable[..., Any] | None = None
) -> None:
    """One warning for all the calls, which names this file and a line; every result is eager's."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for args in calls:
            equal(model(*args), (want or partial(eagerly, model))(*args))
    texts = [str(w.message) for w in told if issubclass(w.category, GraphCacheWarning)]
    assert len(texts) == 1, texts
    assert f"{__file__}:" in texts[0]
    assert match in texts[0]
    assert info(model).hits == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_an_intermediate_is_kept_where_nothing_watches(backend: Backend, frozen: bool) -> None:
    """A replay appends nothing, and what the capture appended is memory of the graph."""
    there = hidden()
    kept = next(there)

    def forward(x: Tensor) -> Tensor:
        next(there).append(x * 2)
        return next(there)[-1] + 1

    model = cuda_graphed(forward, sizes=(2, 4))
    by = "container" if frozen else "list"
    with (
        frozen_objects() if frozen else nullcontext(),
        pytest.warns(GraphCacheWarning, match=rf"made \(float32\[2, 8\]\) and that a {by}.* keeps"),
    ):
        for number, batch in enumerate((2, 2, 2, 2), 1):
            x = backend.randn(batch, 8)
            equal(model(x), x * 2 + 1)
            assert len(kept) == number
            equal(kept[-1], x * 2)
    assert info(model).hits == 0


def test_the_capture_itself_changes_a_flag(backend: Backend, x: Tensor) -> None:
    """It runs the forward's Python once more; the graph has what that made of the flag."""
    runs = Counter()

    class Warms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            if runs.add() == 2:
                self.scale = 3.0
            return x * self.scale

    model = cuda_graphed(Warms(), sizes=(2,))
    equal(model(x), x)
    for _ in range(3):
        model.scale = 1.0
        equal(model(x), x)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """As servers do after their start: what there is by then is told of no more."""
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if before == 0:
            gc.unfreeze()


def test_objects_were_frozen(backend: Backend, x: Tensor) -> None:
    """Intermediates of a forward that keeps nothing are gone then too."""
    model = cuda_graphed(Net(backend.device), sizes=(2, 4))
    with frozen_objects():
        replays(model, x)


def test_item(backend: Backend) -> None:
    """It stops the capture, or freezes the value."""
    model = cuda_graphed(lambda x: x * x.max().item(), sizes=(2, 4))
    warned_once(model, *((backend.randn(b, 8),) for b in (2, 2, 3, 4, 3)), match="host")


def test_item_of_a_replaced_value(backend: Backend) -> None:
    """Under a condition that the first call does not meet."""

    class Sometimes(nn.Module):
        check = False

        def forward(self, x: Tensor) -> Tensor:
            return x * x.max().item() if self.check else x * 2

    model = cuda_graphed(Sometimes(), sizes=(2,))
    for check in (False, True, False, True):
        model.check = check
        for _ in range(3):
            same_as_eager(model, backend.randn(2, 8), times=1)


def test_cpu(backend: Backend) -> None:
    """A copy to the host waits for the device."""
    model = cuda_graphed(lambda x: x + x.cpu().to(x.device), sizes=(2, 4))
    warned_once(model, *((backend.randn(b, 8),) for b in (2, 2, 3)), match="cop")


@pytest.mark.parametrize("mask", [lambda x: x[x > 0].sum() + x, lambda x: x.nonzero().sum() + x])
def test_nonzero_and_masks(backend: Backend, mask: Callable[[Tensor], Tensor]) -> None:
    """Shapes that depend on values."""
    model = cuda_graphed(mask, sizes=(2, 4))
    warned_once(model, *((backend.randn(b, 8),) for b in (2, 2, 3)), match="depends on values")


def test_an_exception_while_capturing_only(backend: Backend) -> None:
    """The caller has a result already; the graph, the stream and the generator are left half done."""

    def picky(x: Tensor) -> Tensor:
        if Capturing():
            raise KeyError("not now")
        return x * 2

    model = cuda_graphed(picky, sizes=(2,), pool=(pool := backend.pool()))
    for _ in range(5):
        x = backend.randn(2, 8)
        equal(model(x), x * 2)
    in_good_order(backend, pool)


def test_a_failed_capture_is_not_tried_on_every_call(backend: Backend, monkeypatch: Any) -> None:
    """An attempt costs many times an eager call."""
    attempts: list[int] = []
    capture = Lane.capture

    def counted(self: Lane, *args: Any) -> Any:
        attempts.append(1)
        return capture(self, *args)

    monkeypatch.setattr(Lane, "capture", counted)
    model = cuda_graphed(lambda x: x * (x.sum().item() if Capturing() else x.sum()), sizes=(2, 4))
    for batch in (2, 3, 4) * 10:
        same_as_eager(model, backend.randn(batch, 8), times=1)
    assert 1 <= len(attempts) <= 4
    assert info(model).captures == 0


def test_an_exception_at_the_first_call(backend: Backend, x: Tensor) -> None:
    """It is the caller's, and no reason never to capture."""
    model = cuda_graphed(lambda x: x @ backend.randn(8, 2) if explain else x * 2, sizes=(2,))
    explain = True
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :5])
    explain = False
    replays(model, x)


def test_a_custom_op_fails(backend: Backend, x: Tensor) -> None:
    """An exception of the kernel's own, at first and later."""
    model = cuda_graphed(lambda x: failing(x) + 1, sizes=(2,), pool=(pool := backend.pool()))
    FAILS[0] = True
    for _ in range(2):
        with pytest.raises(ValueError, match="the kernel refuses"):
            model(x)
    FAILS[0] = False
    same_as_eager(model, x)
    in_good_order(backend, pool)


def test_out_of_memory_half_way_down_the_ladder(backend: Backend, monkeypatch: Any) -> None:
    """The sizes that fit stay; the lane of the one that did not is closed."""
    capture, attempts = Lane.capture, []

    def scarce(self: Lane, *args: Any) -> Any:
        attempts.append(1)
        if len(attempts) == 2:
            raise torch.OutOfMemoryError("pretended")
        return capture(self, *args)

    monkeypatch.setattr(Lane, "capture", scarce)
    model = cuda_graphed(Net(backend.device), sizes=(1, 2, 4, 8), pool=(pool := backend.pool()))
    for batch in (8, 4, 3, 2, 1, 7, 8, 3):
        same_as_eager(model, backend.randn(batch, 8), times=2)
    assert len(attempts) == 4
    assert info(model).sizes == (1, 2, 8)
    assert info(model).hits >= 8
    in_good_order(backend, pool)


def test_out_of_memory_at_every_size(backend: Backend, monkeypatch: Any) -> None:
    """Nothing fits: eager for ever, told once, and tried once."""
    attempts: list[int] = []

    def none_left(self: Lane, *args: Any) -> Any:
        attempts.append(1)
        raise torch.OutOfMemoryError("pretended")

    model = cuda_graphed(Net(backend.device), sizes=(2, 4), pool=(pool := backend.pool()))
    with monkeypatch.context() as patch:
        patch.setattr(Lane, "capture", none_left)
        for batch in (2, 2, 3, 4, 2):
            same_as_eager(model, backend.randn(batch, 8), times=2)
    assert len(attempts) <= 4
    in_good_order(backend, pool)


def in_good_order(backend: Backend, pool: graphcache.GraphPool) -> None:
    """Another module captures and replays, the generator works, and the stream is the caller's."""
    x = backend.randn(2, 8)
    replays(cuda_graphed(Net(backend.device), sizes=(2, 4), pool=pool), x)
    drop = cuda_graphed(nn.Dropout(0.5), sizes=(2,), pool=pool)
    for _ in range(3):
        torch.manual_seed(5)
        got, after = drop(x).clone(), torch.rand(3, device=backend.device)
        torch.manual_seed(5)
        equal(got, eagerly(drop, x))
        equal(after, torch.rand(3, device=backend.device))
    assert info(drop).hits == 2
    assert gc.isenabled()
    if backend.device.type == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_the_process_after_every_kind_of_failure(backend: Backend, x: Tensor) -> None:
    """One failure leaves the generator, the allocator or the stream in the middle of a capture."""
    pool = backend.pool()
    drop = cuda_graphed(nn.Dropout(0.5), sizes=(2,), pool=pool)
    drop(x)
    for bad in (
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0].sum() + x,
        lambda x: x + x.cpu().to(x.device),
        lambda x: torch.nn.functional.dropout(x) * x.sum().item(),
    ):

        def hidden(x: Tensor, bad: Any = bad) -> Tensor:
            return bad(x) if Capturing() else x * 2

        equal(cuda_graphed(hidden, sizes=(2, 4), pool=pool)(x), x * 2)
        cuda_graphed(bad, sizes=(2, 4), pool=pool)(x)
    in_good_order(backend, pool)
    torch.manual_seed(3)
    got = drop(x).clone()
    torch.manual_seed(3)
    equal(got, eagerly(drop, x))


def test_an_error_in_a_replayed_call_leaves_the_next_one_alone(backend: Backend, net: Net) -> None:
    """A wrong argument after the graphs are there."""
    replays(net, x := backend.randn(2, 8))
    for bad in (backend.randn(2, 7), "text", None):
        assert isinstance(outcome(net, bad), Exception)
        same_as_eager(net, x, times=1)
    assert isinstance(outcome(net), TypeError)
    assert isinstance(outcome(net, x, x), TypeError)
    replays(net, x)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_kernel_runs_where_no_capture_sees_it(backend: Backend, missing: int) -> None:
    """On the legacy stream, as extensions do: it runs while a graph is captured, and in no replay."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = x * 2, x + 1
        if not Capturing():
            outputs[missing].mul_(3)
        return outputs

    model = cuda_graphed(forward, sizes=(2, 4))
    x = backend.randn(2, 8)
    with pytest.warns(GraphCacheWarning, match="its graph returns something else"):
        equal(model(x)[missing], forward(x)[missing])
    for batch in (2, 3, 4):
        x = backend.randn(batch, 8)
        equal(model(x)[missing], forward(x)[missing])
    assert info(model).hits == 0


def test_no_memory_is_left_to_compare_a_replay(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph needs none, and serves."""

    def fails(*_: object) -> bool:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("graphcache.capture.verify.same", fails)
    replays(cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,)), backend.randn(2, 8))


def test_the_forward_names_the_default_stream(backend: Backend) -> None:
    """Which is the caller's in eager, and not that of the capture."""
    cuda = backend.name == "cuda"

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        with torch.cuda.stream(torch.cuda.default_stream()) if cuda else nullcontext():
            y.mul_(3)
        return y

    model = cuda_graphed(forward, sizes=(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphCacheWarning)
        for _ in range(3):
            x = backend.randn(2, 8)
            equal(model(x), x * 6)
    assert info(model).hits == (0 if cuda else 2)


def test_interrupted_while_capturing(backend: Backend) -> None:
    """Ctrl-C is no failure of the capture, and must not leave a lock or a capture behind."""
    presses = hidden(True)

    def interrupted(x: Tensor) -> Tensor:
        if Capturing() and next(presses):
            next(presses).clear()
            raise KeyboardInterrupt
        return x * 2

    model = cuda_graphed(interrupted, sizes=(2, 4), pool=(pool := backend.pool()))
    x = backend.randn(2, 8)
    with pytest.raises(KeyboardInterrupt):
        deque(map(model, [x] * 3))
    same_as_eager(model, x)
    in_good_order(backend, pool)


# Order


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Runs each in a thread of its own, with the switches of this one; returns their outcomes."""
    done: list[Any] = [None] * len(functions)

    def work(index: int) -> None:
        with torch.no_grad():
            done[index] = outcome(functions[index])

    contexts = [contextvars.copy_context() for _ in functions]
    threads = [
        threading.Thread(target=context.run, args=(work, index), daemon=True)
        for index, context in enumerate(contexts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hangs"
    return done


def call_in_rounds(
    which: int, model: Any, gate: threading.Barrier, device: torch.device, *, copied: bool
) -> None:
    """All call at once; each looks at what it got while nobody calls, as reading alone is no trap."""
    for step in range(30):
        x = torch.full((1 + (step + which) % 4, 8), float(which * 100 + step), device=device)
        gate.wait(30)
        out = model(x)
        gate.wait(30)
        got = outcome(out.clone)
        if copied or not is_ours(got):
            equal(got, eagerly(model, x))


@pytest.mark.parametrize("stale", ["error", "copy"])
def test_threads_call_one_module(backend: Backend, stale: Any) -> None:
    """One fills the static input while the other's replay reads it; the first calls meet, too."""
    model = cuda_graphed(Net(backend.device), sizes=(1, 2, 4), stale=stale, pool=backend.pool())
    gate, copied = threading.Barrier(4), stale == "copy"
    work = [
        partial(call_in_rounds, which, model, gate, backend.device, copied=copied) for which in range(4)
    ]
    assert in_threads(*work) == [None] * 4
    told = info(model)  # while another thread holds an output, a call runs eagerly
    assert told.hits > 4
    assert told.hits + told.misses == told.calls


@pytest.mark.parametrize("stale", ["error", "copy"])
def test_threads_call_modules_of_one_pool(backend: Backend, stale: Any) -> None:
    """Graphs of one memory may not run at the same time, whichever modules they belong to."""
    pool, gate, copied = backend.pool(), threading.Barrier(3), stale == "copy"
    models = [cuda_graphed(Net(backend.device), sizes=(2, 4), stale=stale, pool=pool) for _ in range(3)]
    work = [
        partial(call_in_rounds, which, model, gate, backend.device, copied=copied)
        for which, model in enumerate(models)
    ]
    assert in_threads(*work) == [None] * 3
    assert all(info(model).hits >= 20 for model in models)


def test_another_thread_works_eagerly_while_this_one_captures(backend: Backend) -> None:
    """Its operations must not end in the graph, and its allocations not in the pool."""
    stop = threading.Event()
    wrong: list[int] = []

    def background() -> None:
        while not stop.is_set():
            a = torch.full((16, 16), 3.0, device=backend.device)
            if (a @ a)[0, 0].item() != 144:
                wrong.append(1)

    def capture() -> None:
        try:
            for _ in range(6):
                same_as_eager(cuda_graphed(Net(backend.device), sizes=(1, 2, 4)), backend.randn(3, 8))
        finally:
            stop.set()

    assert in_threads(background, capture) == [None] * 2
    assert not wrong


def test_another_thread_holds_an_output(backend: Backend) -> None:
    """This thread's call overwrites it under the other's hands."""
    model = cuda_graphed(lambda x: x * 2, sizes=(2,), pool=backend.pool())
    x = backend.randn(2, 8)
    replays(model, x)
    held, overwritten = threading.Event(), threading.Event()

    def holds() -> Any:
        out = model(x)
        held.set()
        assert overwritten.wait(30)
        return outcome(out.clone)

    def overwrites() -> None:
        assert held.wait(30)
        equal(model(x + 1), (x + 1) * 2)
        overwritten.set()

    got, done = in_threads(holds, overwrites)
    assert done is None
    assert is_ours(got) or torch.equal(got, x * 2), got


def test_a_thread_without_the_switches_of_this_one(backend: Backend, net: Net, x: Tensor) -> None:
    """Grad mode is a thread's own: there, gradients are needed."""
    replays(net, x)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(net(x)))
    thread.start()
    thread.join()
    assert results[0].requires_grad
    equal(results[0].detach(), eagerly(net, x))


@on("cuda", "cuda-portable")
def test_the_stream_changes_between_two_calls(backend: Backend, net: Net) -> None:
    """Two replays of one memory run at once."""
    side = torch.cuda.Stream()
    x = backend.randn(2, 8)
    replays(net, x)
    for step in range(20):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if step % 2 else torch.cuda.default_stream()):
            torch.cuda._sleep(1_000_000)
            given = torch.full((2, 8), float(step), device=backend.device)
            got = net(given).clone()
        torch.cuda.synchronize()
        equal(got, eagerly(net, given))
    assert info(net).hits >= 20


@on("cuda", "cuda-portable")
def test_the_input_is_made_on_a_side_stream(backend: Backend, net: Net) -> None:
    """Staged on the stream of the call, which waits for the caller's event."""
    side = torch.cuda.Stream()
    replays(net, backend.randn(2, 8))
    for step in range(10):
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)
            x = torch.full((2, 8), float(step), device=backend.device)
        torch.cuda.current_stream().wait_stream(side)
        equal(net(x), eagerly(net, x))


@on("cuda", "cuda-portable")
def test_a_side_stream_still_reads_the_last_output(backend: Backend, net: Net) -> None:
    """The caller waits properly before the next call, and gives the output up."""
    side = torch.cuda.Stream()
    x = backend.randn(2, 8)
    replays(net, x)
    for step in range(10):
        given = torch.full((2, 8), float(step), device=backend.device)
        out = net(given)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)
            got = out.clone()
        torch.cuda.current_stream().wait_stream(side)
        del out
        net(x)
        torch.cuda.synchronize()
        equal(got, eagerly(net, given))


@on("cuda", "cuda-portable")
def test_the_forward_uses_side_streams(backend: Backend) -> None:
    """Forked and joined by events, as a capture allows."""
    side = torch.cuda.Stream()

    def forward(x: Tensor) -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 2
        z = x + 1
        torch.cuda.current_stream().wait_stream(side)
        return y + z

    model = cuda_graphed(forward, sizes=(2, 4))
    for batch in (4, 3, 2, 3):
        same_as_eager(model, backend.randn(batch, 8))


def child_returns(work: Callable[[], bool], seconds: float = 30) -> int:
    """Forks, runs `work` in the child, and returns its exit code: 0 where it returned True."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and forks, from 3.12 on
        pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    for _ in range(int(seconds * 50)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def agrees(model: Any, x: Tensor) -> bool:
    got = outcome(model, x)
    return is_ours(got) or torch.allclose(got, eagerly(model, x), atol=1e-5)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@EMULATED
@needs_fork
def test_the_process_forks(backend: Backend, net: Net, x: Tensor) -> None:
    """Data loaders do; the child has the graphs, and memory of its own."""
    replays(net, x)
    assert child_returns(lambda: all(agrees(net, backend.randn(b, 8)) for b in (2, 4, 3, 2))) == 0
    replays(net, x)


@EMULATED
@needs_fork
def test_the_child_of_a_fork_captures(backend: Backend, net: Net, x: Tensor) -> None:
    """Nothing is captured yet, or something else."""
    other = cuda_graphed(Net(backend.device), sizes=(2,))
    replays(other, x)
    assert child_returns(lambda: all(agrees(net, backend.randn(b, 8)) for b in (2, 4, 3, 2))) == 0
    replays(net, x)


@EMULATED
@needs_fork
def test_the_process_forks_while_another_thread_holds_the_pool(backend: Backend, x: Tensor) -> None:
    """The lock is copied as held, and nobody is there to let it go: so a fork waits for it."""
    pool = backend.pool()
    model = cuda_graphed(Net(backend.device), sizes=(2,), pool=pool)
    replays(model, x)
    held = threading.Event()

    def holds() -> None:
        with pool.lock:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=holds, daemon=True)
    thread.start()
    assert held.wait(10)
    assert child_returns(lambda: agrees(model, x), 15) == 0
    thread.join()
    replays(model, x)


def run_script(backend: Backend, code: str) -> subprocess.CompletedProcess[str]:
    cuda = backend.device.type == "cuda"
    portable = backend.launch == "torch"
    switches = {"GRAPHCACHE_EMULATE": "01"[not cuda], "GRAPHCACHE_PORTABLE": "01"[portable]}
    start = f"import torch, graphcache\nfrom torch import nn\ndevice = {str(backend.device)!r}\n"
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=Path(__file__).parent.parent,
        env=os.environ | switches,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


SCRIPT = """
torch.set_grad_enabled(False)
model = graphcache.cuda_graphed(nn.Linear(8, 8).to(device), sizes=(2, 4))
x = torch.randn(2, 8, device=device)
out = [model(x) for _ in range(3 if FIRST else 6)][-1]
assert model.forward.cache_info().hits >= 2, model.forward.cache_info().eager
print("fine")
"""


@pytest.mark.programs
def test_the_first_call_of_a_process(backend: Backend) -> None:
    """Libraries are imported, and initialise themselves, in the middle of it."""
    done = run_script(backend, "FIRST = True" + SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@pytest.mark.programs
def test_the_process_exits_with_live_graphs(backend: Backend) -> None:
    """Graphs are destroyed after the driver is gone: a crash, or a hang, at exit."""
    done = run_script(backend, "FIRST = False" + SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_module_is_deleted_while_its_output_is_held(backend: Backend) -> None:
    """The graph's memory goes with it, and the next module gets it."""
    pool, x = backend.pool(), backend.randn(2, 8)
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), pool=pool)
    replays(model, x)
    want, out = eagerly(model, x), model(x)
    del model
    gc.collect()
    equal(out, want)
    for _ in range(3):
        other = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), pool=pool)
        replays(other, backend.randn(2, 8))
        del other
        gc.collect()
        got = outcome(out.clone)
        assert is_ours(got) or torch.equal(got, want)


@pytest.mark.parametrize("what", ["clear", "trim", "drop"])
def test_a_pool_is_cleared_while_outputs_are_held(backend: Backend, what: str) -> None:
    """Held outputs read memory that was given back, or that belongs to others by now."""
    pool, x = backend.pool(), backend.randn(2, 8)
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,), pool=pool)
    replays(model, x)
    want, out = eagerly(model, x), model(x)
    if what == "clear":
        model.forward.cache_clear()
    elif what == "trim":
        pool.trim()
    else:
        del model, pool
    gc.collect()
    litter = [torch.full((2, 8), 9.0, device=backend.device) for _ in range(64)]
    got = outcome(out.clone)
    assert is_ours(got) or torch.equal(got, want)
    if what != "drop":
        replays(model, x)
        got = outcome(out.clone)
        assert is_ours(got) or torch.equal(got, want)
    assert litter


def test_the_input_is_deleted_at_once(backend: Backend, net: Net) -> None:
    """A graph that remembered its address would read another tensor."""
    for step in range(6):
        got = net(torch.full((2, 8), float(step), device=backend.device))
        equal(got, eagerly(net, torch.full((2, 8), float(step), device=backend.device)))


def test_a_bound_argument_is_freed_and_its_address_comes_again(backend: Backend) -> None:
    """Another tensor, with another size of its storage, at the address that was captured."""
    model = cuda_graphed(lambda x, table: x + table.sum(0), sizes=(2,), bind="table")
    x, memory = backend.randn(2, 8), backend.randn(8, 8)
    for rows in (4, 8, 4, 6):
        memory.normal_()
        # A storage of its own over that memory, as if the allocator had given the address again.
        same_as_eager(model, x, torch.from_dlpack(memory[:rows])[:4])
    assert info(model).hits


# Random numbers


def seeded(model: Any, *args: Any, seed: int = 5, times: int = 6) -> list[Tensor]:
    torch.manual_seed(seed)
    return [model(*args).clone() for _ in range(times)]


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
    """`model.p = 0.1` during a schedule."""
    model = cuda_graphed(nn.Dropout(0.5), sizes=(4,))
    x = torch.ones(4, 64, device=backend.device)
    for p in (0.5, 0.1, 0.0, 0.5):
        model.p = p
        equal(seeded(model, x), seeded(partial(eagerly, model), x))


def test_dropout_between_graphed_and_eager_calls(backend: Backend) -> None:
    """The generator must advance in a replay as it does in eager."""
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
    """Tokens must be those of eager, and the same for the same seed."""

    def sample(logits: Tensor) -> Tensor:
        noise = torch.empty_like(logits).exponential_()
        return (logits.softmax(-1) / noise).argmax(-1)

    model, logits = cuda_graphed(sample, sizes=(4,)), backend.randn(4, 50)
    want = seeded(sample, logits)
    for _ in range(2):
        equal(seeded(model, logits), want)
    assert info(model).hits >= 8


@on("cuda", "cuda-portable")
def test_a_capture_has_not_begun_on_the_device_when_its_graph_runs(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stream of a capture torch notes that nothing was drawn, and no replay waits for that."""
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
    """torch tells all graphs in one place what was drawn before: one reads what another was told."""

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
    """It looks at its input on the host, on some devices."""
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
    """Likewise, and it may be replaced or seeded at any time."""

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


def test_the_forward_seeds_the_generator(backend: Backend) -> None:
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


def test_the_state_of_the_generator_is_saved_and_put_back(backend: Backend) -> None:
    """`torch.random.fork_rng` in the forward: noise that leaves the generator as it was."""
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


# Interplay


def test_deepcopy(net: Net, x: Tensor) -> None:
    """Graphs can't be copied, and those of the original read its weights."""
    replays(net, x)
    twin = copy.deepcopy(net)
    twin.up.weight.mul_(3)
    twin.scale = 5.0
    replays(twin, x)
    replays(net, x)
    assert not torch.equal(twin(x), eagerly(net, x))


@pytest.mark.parametrize("decorate", ["instance", "class"])
@pytest.mark.parametrize("captured", [False, True])
def test_copy_copy(backend: Backend, x: Tensor, decorate: str, captured: bool) -> None:
    """The copy's forward is the original's, bound to the original."""
    kind = type("Graphed", (Net,), {}) if decorate == "instance" else Net
    kind = kind if decorate == "instance" else cuda_graphed(type("Graphed", (Net,), {}), sizes=(2,))
    net = kind(backend.device)
    net = cuda_graphed(net, sizes=(2,)) if decorate == "instance" else net
    if captured:
        replays(net, x)
    other = copy.copy(net)
    other.scale = 11.0
    for module in (other, net):
        want = type(module).forward.__wrapped__ if decorate == "class" else type(module).forward
        for _ in range(3):
            equal(outcome(module, x), want(module, x))


@pytest.mark.parametrize("captured", [False, True])
def test_copy_copy_with_other_parameters(backend: Backend, x: Tensor, captured: bool) -> None:
    """As functional training loops do: shallow, with tables of its own."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    if captured:
        replays(model, x)
    other = copy.copy(model)
    other._parameters = dict(model._parameters)
    other.weight = nn.Parameter(model.weight * 2)
    for _ in range(3):
        equal(other(x), nn.functional.linear(x, other.weight, other.bias))
        got = outcome(partial(other.forward, x))  # by itself it can't be told from the original's
        if not is_ours(got):
            equal(got, nn.functional.linear(x, other.weight, other.bias))
        equal(model(x), nn.functional.linear(x, model.weight, model.bias))


def test_the_dict_of_a_module_is_copied_into_another(backend: Backend, x: Tensor) -> None:
    """`other.__dict__.update(model.__dict__)` takes the graphed forward along."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    replays(model, x)
    other = nn.Linear(8, 8).to(backend.device)
    tables = other._parameters
    other.__dict__.update(model.__dict__)
    other._parameters = tables
    for _ in range(3):
        equal(other(x), nn.functional.linear(x, other.weight, other.bias))
        equal(model(x), nn.functional.linear(x, model.weight, model.bias))


def test_pickle(net: Net, x: Tensor) -> None:
    """A graph can't be pickled."""
    replays(net, x)
    twin = pickle.loads(pickle.dumps(net))
    twin.up.weight.mul_(3)
    replays(twin, x)
    replays(net, x)


def test_torch_save_and_load(net: Net, x: Tensor) -> None:
    """Likewise."""
    replays(net, x)
    torch.save(net, file := io.BytesIO())
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    twin.down.weight.mul_(3)
    replays(twin, x)
    replays(net, x)


def test_state_dict_in_and_out(net: Net, x: Tensor) -> None:
    """Nothing of the graphs may be in it, and filling in place must reach them."""
    replays(net, x)
    state = {name: tensor * 2 for name, tensor in net.state_dict().items()}
    assert state.keys() == Net(x.device).state_dict().keys()
    survives(net, lambda: net.load_state_dict(state), x)
    assert info(net).captures == 2


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    @cuda_graphed(sizes=(2, 4))
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor + self.inner(x)

    factor = 2.0


def test_a_subclass_calls_super(backend: Backend) -> None:
    """The graph is that of the base, and what the subclass adds is eager."""
    model, plain = Derived().to(backend.device), nn.Linear(8, 8).to(backend.device)
    plain.load_state_dict(model.inner.state_dict())
    for batch in (2, 4, 3, 3, 2):
        x = backend.randn(batch, 8)
        equal(model(x), plain(x) * 3)
    model.factor = 5.0
    equal(model(x), plain(x) * 6)
    assert Base.forward.__get__(model).cache_info().hits >= 3


def test_a_graphed_subclass_calls_a_graphed_super(backend: Backend) -> None:
    """One capture inside the other, of one and the same module."""
    kind = cuda_graphed(type("Twice", (Derived,), {"forward": Derived.forward}), sizes=(2, 4))
    model = kind().to(backend.device)
    plain = nn.Linear(8, 8).to(backend.device)
    plain.load_state_dict(model.inner.state_dict())
    for batch in (2, 4, 3, 3, 2):
        x = backend.randn(batch, 8)
        equal(model(x), plain(x) * 3)
        equal(Base.forward(model, x), plain(x))
    assert info(model).hits >= 2


def hooked(model: nn.Module, x: Tensor, seen: list[Any], handle: Any, times: int = 3) -> None:
    """The hook runs at every call, doubling, until it is removed."""
    for _ in range(times):
        before = len(seen)
        model(x)
        assert len(seen) == before + 1
    handle.remove()
    model(x)
    assert len(seen) == times


def test_a_hook_of_its_own(net: Net, x: Tensor) -> None:
    """Added after capture, and changing the result."""
    replays(net, x)
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(1)
        return out * 2

    handle = net.register_forward_hook(hook)
    equal(net(x), eagerly(net, x) * 2)
    seen.clear()
    hooked(net, x, seen, handle)
    replays(net, x)


def test_a_pre_hook_of_its_own(net: Net, x: Tensor) -> None:
    """Changes the arguments before they are staged."""
    replays(net, x)
    with net.register_forward_pre_hook(lambda module, args: (args[0] + 1,)):
        for _ in range(3):
            equal(net(x), eagerly(net, x + 1))
    replays(net, x)


def test_a_hook_of_a_submodule(net: Net, x: Tensor) -> None:
    """A graph calls no hook; this one changes what follows."""
    replays(net, x)
    want = eagerly(net, x)
    with net.up.register_forward_hook(lambda module, args, out: out * 3):
        same_as_eager(net, x)
        assert not torch.equal(net(x), want)
    replays(net, x)


def test_a_hook_of_a_submodule_that_was_there_before(net: Net, x: Tensor) -> None:
    """Captured with its operations, and never called again."""
    seen: list[Any] = []
    handle = net.up.register_forward_hook(lambda *_: seen.append(1))
    hooked(net, x, seen, handle)
    replays(net, x)


def test_a_hook_of_every_module(net: Net, x: Tensor) -> None:
    """A profiler or a logger: registered globally, after capture."""
    replays(net, x)
    seen: list[Any] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        net(x)
        assert net.up in seen
        assert net in seen
    replays(net, x)


def test_a_hook_with_kwargs_on_a_submodule_of_a_closure(backend: Backend, x: Tensor) -> None:
    """The module with the hook is no child of anything that is decorated."""
    inner = nn.Linear(8, 8).to(backend.device)
    model = cuda_graphed(lambda x: inner(x) * 2, sizes=(2,))
    replays(model, x)
    with inner.register_forward_hook(lambda module, args, kwargs, out: out + 1, with_kwargs=True):
        same_as_eager(model, x)
    replays(model, x)


def test_weights_are_tied(backend: Backend) -> None:
    """And untied, and tied again."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 8)
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = cuda_graphed(Tied().to(backend.device), sizes=(2,))
    tokens = torch.tensor([1, 5], device=backend.device)
    survives(model, lambda: model.embed.weight.mul_(2), tokens)
    survives(model, lambda: setattr(model.head, "weight", nn.Parameter(model.head.weight * 2)), tokens)
    survives(model, lambda: setattr(model.head, "weight", model.embed.weight), tokens)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_compile_outside(net: Net, x: Tensor) -> None:
    """Dynamo can't trace a replay."""
    torch.compiler.reset()
    replays(net, x)
    compiled = torch.compile(net, backend="eager")
    for _ in range(3):
        equal(compiled(x), eagerly(net, x))
    net.up.weight.mul_(2)
    equal(compiled(x), eagerly(net, x))
    replays(net, x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_compile_inside(backend: Backend, x: Tensor) -> None:
    """A part of the forward is compiled, and compiled anew under a capture when it changes."""
    torch.compiler.reset()

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.part = torch.compile(self.inner, backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) * 2

    model = cuda_graphed(Parts().to(backend.device), sizes=(2, 4))
    for batch in (2, 4, 3, 2, 3):
        same_as_eager(model, backend.randn(batch, 8), times=1)
    assert info(model).hits
    survives(model, lambda: setattr(model.inner, "weight", nn.Parameter(model.inner.weight * 2)), x)


def test_torch_export(net: Net, x: Tensor) -> None:
    """A replay in the trace would be an opaque call, or nothing at all."""
    replays(net, x)
    exported = torch.export.export(net, (x,)).module()
    equal(exported(x * 2), eagerly(net, x * 2))
    replays(net, x)


def test_vmap(net: Net, backend: Backend) -> None:
    """Batched tensors have no address of their own."""
    xs = backend.randn(5, 2, 8)
    replays(net, xs[0])
    equal(torch.func.vmap(net)(xs), torch.stack([eagerly(net, x) for x in xs]))
    equal(torch.func.vmap(net, in_dims=1)(xs), torch.stack([eagerly(net, x) for x in xs.unbind(1)]))
    replays(net, xs[0])


def test_functional_call(net: Net, x: Tensor) -> None:
    """Parameters are swapped for the length of a call, and swapped back."""
    replays(net, x)
    other = Net(x.device)
    state = dict(other.named_parameters())
    for _ in range(3):
        equal(torch.func.functional_call(net, state, (x,)), other(x))
        equal(net(x), eagerly(net, x))
    replays(net, x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_jvp_and_grad_of_the_forward(net: Net, x: Tensor) -> None:
    """A replay has no derivative: it would be zero."""
    replays(net, x)
    _, mine = torch.func.jvp(net, (x,), (torch.ones_like(x),))
    _, theirs = torch.func.jvp(partial(eagerly, net), (x,), (torch.ones_like(x),))
    equal(mine, theirs)
    with torch.enable_grad():
        gradient = torch.func.grad(lambda x: net(x).sum())(x)
        equal(gradient, torch.func.grad(lambda x: eagerly(net, x).sum())(x))
    assert gradient.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_derivatives(net: Net, x: Tensor) -> None:
    """Dual tensors, which need no grad mode: the tangent is lost."""
    net.requires_grad_(False)
    replays(net, x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        mine = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
        theirs = torch.autograd.forward_ad.unpack_dual(eagerly(net, dual)).tangent
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            equal(mine, theirs)


@pytest.mark.parametrize("decorate", [cuda_graphed, cuda_graphed(sizes=(2,))])
@pytest.mark.parametrize("captured", [False, True])
def test_data_parallel_replicas(backend: Backend, x: Tensor, decorate: Any, captured: bool) -> None:
    """Copies of the module's `__dict__`, with other parameters, made anew for each call."""
    model = decorate(nn.Linear(8, 8).to(backend.device))
    if captured:
        replays(model, x)
    for step in range(3):
        replica = model._replicate_for_data_parallel()
        for name, parameter in model._parameters.items():  # as torch.nn.parallel.replicate does
            setattr(replica, name, parameter * (step + 2))
        want = nn.functional.linear(x, replica.weight, replica.bias)
        equal(replica(x), want)
        got = outcome(partial(replica.forward, x))  # by itself it can't be told from the original's
        if not is_ours(got):
            equal(got, want)
        del replica, got
        same_as_eager(model, x, times=1)


def test_replicas_of_a_decorated_class(backend: Backend, x: Tensor) -> None:
    """Likewise, through the class."""
    model = Base().to(backend.device)
    for _ in range(3):
        model(x)
    for step in range(3):
        replica = model._replicate_for_data_parallel()
        replica.inner = nn.Linear(8, 8).to(backend.device)
        equal(replica(x), replica.inner(x))
        equal(model(x), model.inner(x))
        assert step < 3


def test_a_parent_with_a_decorated_child_is_replicated(backend: Backend, x: Tensor) -> None:
    """The child is replicated too, with its forward bound to the original."""
    child = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    replays(child, x)
    parent = nn.Sequential(child, nn.ReLU())
    replica, inner = parent._replicate_for_data_parallel(), child._replicate_for_data_parallel()
    inner.weight, inner.bias = child.weight * 2, child.bias * 2
    replica._modules["0"] = inner
    equal(replica(x), nn.functional.linear(x, inner.weight, inner.bias).relu())
    equal(parent(x), eagerly(child, x).relu())


def test_autocast_on_and_off(net: Net, x: Tensor) -> None:
    """Casts are baked in, and the cast weights of a region die with it."""
    for _ in range(3):
        replays(net, x)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(x.device.type, dtype=dtype):
                same_as_eager(net, x)
    for factor in (2, 3):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            replays(net, x)
            with torch.autocast(x.device.type, enabled=False):
                same_as_eager(net, x)
        net.up.weight.mul_(factor)
        net.down.weight.data = net.down.weight * factor


def test_train_and_eval(backend: Backend) -> None:
    """Batch norm: other operations, and state that only one of the two writes."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).to(backend.device)
    twin = copy.deepcopy(model)
    cuda_graphed(model, sizes=(4,))
    for mode in (True, False, True, False):
        model.train(mode)
        twin.train(mode)
        for _ in range(3):
            in_step(model, twin, backend.randn(4, 8) * 3 + 1)
    assert info(model).hits >= 8


def test_grad_on_and_off(net: Net, x: Tensor) -> None:
    """A replay is a constant for autograd: training would stand still."""
    for _ in range(3):
        replays(net, x)
        with torch.enable_grad():
            net.zero_grad()
            net(x).sum().backward()
            assert net.up.weight.grad is not None
            assert net.up.weight.grad.abs().sum() > 0
            wants = x.clone().requires_grad_()
            with torch.no_grad():
                same_as_eager(net, x)
            net(wants).sum().backward()
            assert wants.grad is not None


def test_a_training_step_between_calls(net: Net, x: Tensor) -> None:
    """Optimisers write in place, or replace (`foreach`, `set_`), as they see fit."""
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind(net.parameters(), lr=0.1)
        for _ in range(3):
            replays(net, x)
            with torch.enable_grad():
                eagerly(net, x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        replays(net, x)
    assert info(net).captures == 2


def test_set_puts_another_memory_under_a_parameter(net: Net, x: Tensor) -> None:
    """`weight.set_(...)` and `swap_tensors`: the same object, elsewhere."""
    survives(net, lambda: net.up.weight.set_(net.up.weight.detach() * 2), x)
    fresh = nn.Parameter(net.up.weight.detach() * 2)
    survives(net, lambda: torch.utils.swap_tensors(net.up.weight, fresh), x)


def test_a_storage_is_resized(backend: Backend, x: Tensor) -> None:
    """As FSDP does: freed after use, and filled again at another address."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    replays(model, x)
    storage, keep = model.weight.untyped_storage(), model.weight.data.clone()
    size = storage.nbytes()
    for step in range(3):
        storage.resize_(0)
        litter = [torch.full((8, 8), 9.0, device=backend.device) for _ in range(4)]
        storage.resize_(size)
        model.weight.data.copy_(keep * (step + 2))
        same_as_eager(model, x)
        assert litter


class Loud(Tensor):
    """A subclass with operations of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        LOUD.append(func)
        return out


LOUD: list[Any] = []


def test_a_tensor_subclass_is_an_argument(net: Net, backend: Backend) -> None:
    """Its `__torch_function__` is Python, of which a replay runs none."""
    x = backend.randn(2, 8)
    replays(net, x)
    for _ in range(3):
        LOUD.clear()
        got = net(x.as_subclass(Loud))
        assert LOUD
        assert type(got) is Loud
        equal(got.as_subclass(Tensor), eagerly(net, x))
    assert any("Loud" in reason for reason in info(net).eager)


def test_a_tensor_subclass_is_a_parameter(backend: Backend, x: Tensor) -> None:
    """Quantised weights: the subclass says what a multiplication is."""
    model = nn.Linear(8, 8).to(backend.device)
    del model.weight
    model.weight = backend.randn(8, 8).as_subclass(Loud)
    cuda_graphed(model, sizes=(2,))
    for _ in range(4):
        LOUD.clear()
        got = model(x)
        assert LOUD
        assert type(got) is Loud
        equal(got.as_subclass(Tensor), eagerly(model, x).as_subclass(Tensor))
    assert info(model).hits == 0
    assert info(model).misses == 4


def test_a_parameter_becomes_a_tensor_subclass(backend: Backend, x: Tensor) -> None:
    """Quantised after capture, at the same address."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    replays(model, x)
    old = model.weight.data
    del model.weight
    model.weight = old.as_subclass(Loud)
    LOUD.clear()
    assert type(model(x)) is Loud
    assert LOUD


def test_a_sparse_argument(backend: Backend) -> None:
    """No strides, no address."""
    model = cuda_graphed(lambda x, m: torch.sparse.mm(m, x), sizes=(2, 4))
    for batch in (4, 3, 3):
        x, m = backend.randn(batch, 8), torch.eye(batch, device=backend.device).to_sparse()
        equal(model(x, m), m.to_dense() @ x)
    assert info(model).misses == 3


def test_the_default_dtype_is_changed(backend: Backend, x: Tensor) -> None:
    """`torch.zeros` in the forward is of another dtype then."""
    model = cuda_graphed(lambda x: x.sum(1) + torch.ones(2, device=x.device).sum() * 0, sizes=(2,))
    make = cuda_graphed(lambda x: torch.ones(len(x), 2, device=x.device), sizes=(2,))
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            same_as_eager(model, x)
            same_as_eager(make, x)
        finally:
            torch.set_default_dtype(before)


def test_the_default_device_is_changed(backend: Backend, x: Tensor) -> None:
    """`torch.zeros` in the forward lies elsewhere then."""
    make = cuda_graphed(lambda x: torch.ones(3) * 2, sizes=(2,))
    for device in (None, "meta", None, str(backend.device)):
        torch.set_default_device(device)
        try:
            same_as_eager(make, x)
        finally:
            torch.set_default_device(None)


@contextmanager
def switched(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def test_deterministic_algorithms_are_asked_for(backend: Backend) -> None:
    """Eager refuses what has no deterministic kernel; a graph goes on."""
    index = torch.tensor([0, 1], device=backend.device)

    def forward(x: Tensor) -> Tensor:
        return torch.zeros_like(x).put_(index, x[0, :2])

    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    replays(model, x)
    is_on = torch.are_deterministic_algorithms_enabled
    with switched(is_on, torch.use_deterministic_algorithms, True):
        assert isinstance(outcome(forward, x), RuntimeError)
        same_as_eager(model, x)
    replays(model, x)


EINSUM: dict[str, Any] = torch.backends.opt_einsum._get_strategy.__globals__
FLAGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True,
    ),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value), True,
    ),
    "cudnn.enabled": (
        lambda: torch.backends.cudnn.enabled,
        lambda value: setattr(torch.backends.cudnn, "enabled", value), False,
    ),
    "mkldnn.enabled": (
        lambda: torch.backends.mkldnn.enabled,
        lambda value: setattr(torch.backends.mkldnn, "enabled", value), False,
    ),
    "flash attention": (
        torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False,
    ),
    "math attention": (
        torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, False,
    ),
    "reduced precision": (
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        lambda value: setattr(
            torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", value
        ), False,
    ),
    "fp16 accumulation": (
        lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
        lambda value: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", value), True,
    ),
    "matmul precision of CUDA": (  # which makes torch raise where it is asked for that of all devices
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda value: setattr(torch.backends.cuda.matmul, "fp32_precision", value), "tf32",
    ),
    "cudnn.allow_tf32": (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda value: setattr(torch.backends.cudnn, "allow_tf32", value), False,
    ),
    "order of attention kernels": (
        torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order, [2, 1, 0, 3, 4],
    ),
    "fast path of attention": (
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False,
    ),
    "order of einsum": (  # where it is: torch lets it be set only where opt_einsum is installed
        torch.backends.opt_einsum._get_strategy, lambda value: EINSUM.update(strategy=value), "optimal",
    ),
    "filled memory": (
        torch._C._get_deterministic_fill_uninitialized_memory,
        torch._C._set_deterministic_fill_uninitialized_memory, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_torch_is_changed(backend: Backend, name: str) -> None:
    """Kernels are chosen by it, at capture; here the forward itself asks."""
    get, put, value = FLAGS[name]
    first = get()
    model = cuda_graphed(lambda x: x * (2 if get() == first else 3), sizes=(2,))
    x = backend.randn(2, 8)
    replays(model, x)
    with switched(get, put, value):
        assert get() != first
        same_as_eager(model, x)
    same_as_eager(model, x)


def test_a_parametrization_is_registered(net: Net, x: Tensor) -> None:
    """The module gets another class, and its weight becomes a property."""

    class Doubled(nn.Module):
        factor = 2.0

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    doubled = Doubled()
    survives(net, lambda: parametrize.register_parametrization(net.up, "weight", doubled), x)
    survives(net, lambda: setattr(doubled, "factor", 3.0), x)
    survives(net, lambda: net.up.parametrizations.weight.original.mul_(2), x)
    replays(net, x)
    parametrize.remove_parametrizations(net.up, "weight")
    same_as_eager(net, x)


def test_weight_norm_is_registered(net: Net, x: Tensor) -> None:
    """Likewise; its magnitude is a parameter of its own."""
    replays(net, x)
    parametrizations.weight_norm(net.up)
    same_as_eager(net, x)
    survives(net, lambda: net.up.parametrizations.weight.original0.mul_(2), x)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_the_old_weight_norm_is_registered(net: Net, x: Tensor) -> None:
    """By a hook that computes the weight before each call."""
    replays(net, x)
    nn.utils.weight_norm(net.up)
    with graphcache.disabled():
        want = net(x)
        net.up.weight_g.mul_(2)
        other = net(x)
    net.up.weight_g.div_(2)
    for _ in range(3):
        equal(net(x), want)
    net.up.weight_g.mul_(2)
    for _ in range(3):
        equal(net(x), other)


def test_spectral_norm_in_training_writes_its_vectors(backend: Backend) -> None:
    """A power iteration in every call: state that advances."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))).to(backend.device)
    twin = copy.deepcopy(model)
    cuda_graphed(model, sizes=(2,))
    for mode in (True, False, True):
        model.train(mode)
        twin.train(mode)
        for _ in range(4):
            in_step(model, twin, backend.randn(2, 8))


def test_pruning_is_applied(net: Net, x: Tensor) -> None:
    """A mask and a hook: the weight becomes a plain attribute, computed before each call."""
    from torch.nn.utils import prune

    replays(net, x)
    prune.l1_unstructured(net.up, "weight", amount=0.5)
    with graphcache.disabled():
        want = net(x)
    for _ in range(3):
        equal(net(x), want)
    prune.remove(net.up, "weight")
    for _ in range(3):
        equal(net(x), want)


def test_a_module_is_quantised_dynamically(net: Net, x: Tensor) -> None:
    """A child is swapped for another class with packed weights."""

    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.packed = ((linear.weight * 10).round().to(torch.int8), linear.bias)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.packed[0].to(x.dtype) / 10).T + self.packed[1]

    survives(net, lambda: setattr(net, "up", Packed(net.up)), x)
    packed = net.up.packed
    survives(net, lambda: setattr(net.up, "packed", (packed[0] * 2, packed[1])), x)
    replays(net, x)


@dataclass
class Scaled:
    x: Tensor
    scale = 1.0  # without an annotation: no field


class ScaledPair(NamedTuple("ScaledPair", [("x", Tensor), ("y", Tensor)])):
    scale = 1.0


CARRIERS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Scaled,
    "named tuple": lambda x: ScaledPair(x, x),
    "ordered dict": lambda x: OrderedDict(x=x),
    "tensor": lambda x: x.clone(),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_an_argument_has_an_attribute_that_is_no_field(backend: Backend, name: str) -> None:
    """Graphs saw none of it: later calls got what the first had there, or what new objects have."""
    x, make = backend.randn(2, 8), CARRIERS[name]

    def tagged(scale: float) -> Any:
        made = make(x)
        made.scale = scale
        return made

    first_plain, first_tagged = (
        cuda_graphed(lambda x, other: x * getattr(other, "scale", 1.0), sizes=(2,)) for _ in range(2)
    )
    replays(first_plain, x, make(x))
    for model in (first_plain, first_tagged):
        for scale in (2.0, 3.0):
            same_as_eager(model, x, tagged(scale))
        replays(model, x, make(x))
        (why,) = (why for why in info(model).eager if "attributes" in why)
        assert "(scale)" in why


def test_attributes_of_a_tensor_that_torch_compile_set(backend: Backend) -> None:
    """They say nothing to the forward, and replays stay."""
    x = backend.randn(2, 8)
    model = cuda_graphed(lambda x: x * 2, sizes=(2,))
    torch._dynamo.mark_dynamic(x, 0)
    replays(model, x)


class Tag(str):
    scale = 1.0


@dataclass
class Slotted:
    __slots__ = ("scale", "x")
    x: Tensor


@pytest.mark.parametrize("make", [lambda x: Tag("same"), Slotted], ids=["string", "slots"])
def test_an_argument_is_of_a_type_with_attributes(
    backend: Backend, make: Callable[[Tensor], Any]
) -> None:
    """Two that are equal are not the same; a graph baked in those of the first."""
    model = cuda_graphed(lambda x, other: x * getattr(other, "scale", 1.0), sizes=(2,))
    x = backend.randn(2, 8)
    for scale in (2.0, 3.0):
        made = make(x)
        made.scale = scale
        same_as_eager(model, x, made)
    assert info(model).hits == 0


def tag(made: Any) -> Any:
    made.scale = 7.0
    return made


RESULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dataclass": (lambda x: tag(Scaled(x * 2)), r"the result has attributes that .* \(scale\)"),
    "named tuple": (lambda x: tag(ScaledPair(x * 2, x)), "attributes that are no fields"),
    "tensor": (lambda x: tag(x * 2), r"it returns a tensor with attributes \(scale\)"),
    "view of an argument": (lambda x: tag(x[:]), "it returns a tensor with attributes"),
    "requires grad": (lambda x: (x * 2).requires_grad_(), "it returns a tensor that requires grad"),
    "parameter": (
        lambda x: nn.Parameter(x * 2, requires_grad=False), "it returns a tensor made an nn.Parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_more_than_its_data(backend: Backend, name: str) -> None:
    """Replays returned tensors and dataclasses without what the forward had set on them."""
    forward, why = RESULTS[name]
    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    want = forward(x)
    with pytest.warns(GraphCacheWarning, match=why):
        model(x)
    for _ in range(2):
        got = model(x)
        assert type(got) is type(want)
        assert getattr(got, "scale", None) == getattr(want, "scale", None)
        assert getattr(got, "requires_grad", None) == getattr(want, "requires_grad", None)


def test_a_parameter_with_attributes_is_returned(backend: Backend) -> None:
    """What is handed on as it is keeps all of it, in replays too."""
    net = nn.Linear(8, 8).to(backend.device)
    net.weight.scale = 7.0
    model, x = cuda_graphed(lambda x: (net.weight, x * 2), sizes=(2,)), backend.randn(2, 8)
    replays(model, x)
    assert model(x)[0] is net.weight


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_tensor(backend: Backend) -> None:
    """Emulation copied its bytes over those of others, and crashed; elsewhere it failed inside torch."""
    x = torch.ones(2, 8)
    quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).to(backend.device)
    x = x.to(backend.device)
    made = cuda_graphed(
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize(), sizes=(2,)
    )
    with pytest.warns(GraphCacheWarning, match="a quantised tensor is made at .*test_footguns.py"):
        same_as_eager(made, x)
    held = cuda_graphed(lambda x: x + quantised.dequantize(), sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="a quantised tensor is read at .*test_footguns.py"):
        same_as_eager(held, x)
    passed = cuda_graphed(lambda x, q: x + q.dequantize(), sizes=(2,))
    same_as_eager(passed, x, quantised)
    assert info(passed).eager["q is quantised; pass it dequantised"] == 3


@dataclass
class SimpleBatch:
    x: Tensor
    count: int = 1


def changes(**items: Any) -> Callable[[Tensor, Any], Tensor]:
    def forward(x: Tensor, other: Any) -> Tensor:
        for name, item in items.items():
            setattr(other, name, item)
        return x * 2

    return forward


def puts(x: Tensor, other: Any) -> Tensor:
    other["count"] = 2
    return x * 2


def replaces(x: Tensor, other: Any) -> Tensor:
    other["x"] = x
    return x * 2


def transposes(x: Tensor, other: Tensor) -> Tensor:
    other.t_()
    return x * 2


CHANGED: dict[str, tuple[Callable[[Tensor, Any], Tensor], Callable[[Tensor], Any], str]] = {
    "dictionary": (puts, lambda x: {"count": 1}, "other"),
    "tensor in a dictionary": (replaces, lambda x: {"x": x.clone()}, r"other\['x'\]"),
    "list": (lambda x, other: other.append(2) or x * 2, lambda x: [1], "other"),
    "field": (changes(count=2), SimpleBatch, "other"),
    "attribute": (changes(scale=2.0), Scaled, r"other has attributes .*\(scale\)"),
    "tensor": (changes(scale=2.0), lambda x: x.clone(), r"other is a tensor with attributes \(scale\)"),
    "shape": (transposes, lambda x: x[:, :3].clone(), "the shape of a tensor"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_container_argument_is_changed(backend: Backend, name: str) -> None:
    """The first call changed the caller's; replays did not, though their results were right."""
    forward, make, what = CHANGED[name]
    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    with pytest.warns(
        GraphCacheWarning, match=f"it changes an argument, which no graph replays: {what}"
    ):
        model(x, make(x))
    for _ in range(2):
        mine, theirs = make(x), make(x)
        equal(model(x, mine), forward(x, theirs))
        if isinstance(mine, Tensor):
            assert mine.shape == theirs.shape
            assert mine.__dict__ == theirs.__dict__
        else:
            assert repr(mine) == repr(theirs)
            assert getattr(mine, "scale", None) == getattr(theirs, "scale", None)


@pytest.fixture
def group() -> Iterator[torch.distributed.ProcessGroup]:
    """Of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def test_the_forward_waits_for_other_processes(
    backend: Backend, x: Tensor, group: torch.distributed.ProcessGroup
) -> None:
    """One rank captured, or compared, where another did not, and both waited."""

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        torch.distributed.all_reduce(y, group=group)
        return y

    model = cuda_graphed(forward, sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="waits for other processes: .*allreduce_"):
        equal(model(x), x * 2)
    equal(model(x), x * 2)
    assert info(model).hits == 0


def test_the_plan_of_an_fft_is_dropped(backend: Backend) -> None:
    """A replay read memory that the plan had owned, or crashed: its kernels were gone, too."""

    def forward(x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * 2, n=100)

    model, x = cuda_graphed(forward, sizes=(2, 4)), backend.randn(4, 100)
    wanted = forward(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), wanted)
    if backend.name == "cuda":
        torch.backends.cuda.cufft_plan_cache.clear()
    torch.testing.assert_close(model(x), wanted)
    assert info(model).hits == 0
