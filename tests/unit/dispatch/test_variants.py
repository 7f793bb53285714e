"""One signature keeps graphs for several sets of values: a switch back costs a look-up."""

from __future__ import annotations

import cProfile
import gc
import sys
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from graphcache import GraphCacheWarning, config, cuda_graphed
from graphcache.dispatch.cache import GraphCache
from tests.helpers import Backend, eager


class Switched(nn.Module):
    """Reads a value from each kind of place."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.inner = nn.Dropout(0.0)
        self.flag, self.mode, self.sizes = False, 0, (1, "x")
        self.active = self.also = ["a"]
        self.act: Callable[[Tensor], Tensor] = torch.relu
        self.table = {"k": 1.0}
        self.pair: Any = (torch.ones(8, device=device), 2.0)
        self.to(device)

    def helper(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.helper(self.layer(x)) + self.mode + self.table["k"]
        if self.flag:
            y = y * 2
        if self.inner.training:
            y = y - 3
        if "b" in self.active:
            y = y * 5
        if self.active is self.also:
            y = y + 11
        return self.act(y) * self.sizes[0] * self.pair[0]


def doubled(self: Switched, y: Tensor) -> Tensor:
    return y * 2


def swapped(name: str) -> Callable[[Switched, int], None]:
    """Returns a switch between two objects that both live on."""
    kept: dict[int, list[Any]] = {}

    def switch(model: Switched, step: int) -> None:
        value = getattr(model.layer, name)
        other = nn.Parameter(value * 2) if name == "weight" else None
        setattr(model.layer, name, kept.setdefault(id(model), [value, other])[step])

    return switch


def replaced_data() -> Callable[[Switched, int], None]:
    kept: dict[int, list[Tensor]] = {}

    def switch(model: Switched, step: int) -> None:
        data = model.layer.weight.data
        model.layer.weight.data = kept.setdefault(id(model), [data, data * 2])[step]

    return switch


def patched(model: Switched, step: int) -> None:
    if step:
        model.helper = METHODS.setdefault(id(model), MethodType(doubled, model))  # type: ignore[method-assign]
    else:
        vars(model).pop("helper", None)


METHODS: dict[int, Any] = {}
SWITCHES: dict[str, Callable[[Switched, int], None]] = {
    "flag": lambda model, step: setattr(model, "flag", bool(step)),
    "number": lambda model, step: setattr(model, "mode", step),
    "float": lambda model, step: setattr(model, "mode", float(step) / 2),
    "tuple": lambda model, step: setattr(model, "sizes", (step + 1, "x")),
    "mode of a submodule": lambda model, step: model.inner.train(bool(step)),
    "function": lambda model, step: setattr(model, "act", (torch.relu, torch.tanh)[step]),
    "method": patched,
    "item of a dict": lambda model, step: model.table.update(k=float(step)),
    "item of a list": lambda model, step: model.active.__setitem__(0, "ab"[step]),
    "list": lambda model, step: setattr(model, "active", ["ab"[step]]),
    "parameter": swapped("weight"),
    "no bias": swapped("bias"),
    "data": replaced_data(),
    "child": lambda model, step: setattr(model, "inner", (nn.Dropout(), nn.Identity().eval())[step]),
}


@pytest.mark.parametrize("what", [name for name in SWITCHES if name != "child"])
def test_value_that_goes_back_and_forth_keeps_graphs(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model, switch = cuda_graphed(Switched(backend.device), sizes=(2, 4)), SWITCHES[what]
    x = backend.randn(2, 8)

    def both() -> None:
        for step in (0, 1):
            switch(model, step)
            for _ in range(2):
                assert torch.equal(model(x), eager(model, x))

    both()
    both()
    told = model.forward.cache_info()
    assert told.captures in (4, 6)  # a list that was shared, and is no more, is one value more
    assert (told.signatures, told.dropped) == (1, 0)
    monkeypatch.setattr(GraphCache, "__call__", None)  # a switch reaches no Python
    both()
    assert model.forward.cache_info().captures == told.captures


@pytest.mark.parametrize("values", [2, 5, 8])
def test_values_that_alternate_are_captured_once_each(backend: Backend, values: int) -> None:
    model = cuda_graphed(Switched(backend.device), sizes=(2,))
    x = backend.randn(2, 8)
    for step in range(40):
        model.mode = step * 3 % values
        assert torch.equal(model(x), eager(model, x))
    told = model.forward.cache_info()
    assert (told.captures, told.hits, told.signatures) == (values, 40 - values, 1)


def test_each_value_has_its_own_padding(backend: Backend) -> None:
    """Rows that are mixed for one value of a flag are padded for the other."""

    class Mixed(nn.Module):
        mixes = False

        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.mixes else x * 2

    model = cuda_graphed(Mixed(), sizes=(2, 4))
    with pytest.warns(GraphCacheWarning, match="depend on each other|exactly the batch sizes"):
        for step in range(12):
            model.mixes = step % 2 == 1
            for batch in (2, 3):
                x = backend.randn(batch, 8)
                assert torch.allclose(model(x), eager(model, x), atol=1e-6)
    told = model.forward.cache_info()
    assert told.padded[4] > 0  # for one value
    assert told.replays[3] > 0  # for the other
    assert len([note for note in told.notes if note.startswith("exact sizes only")]) == 1


def test_value_that_is_new_at_each_call_ends_captures(backend: Backend) -> None:
    """A value that was known before keeps its graphs, those that never come again do not."""
    model = cuda_graphed(Switched(backend.device), sizes=(2,))
    x = backend.randn(2, 8)
    with pytest.warns(GraphCacheWarning, match="mode was replaced or changed after 9 captures in a row"):
        for step in range(30):
            for model.mode in (-1, step):
                assert torch.equal(model(x), eager(model, x))
    told = model.forward.cache_info()
    assert (told.captures, told.hits, told.dropped) == (9, 29, 0)
    assert len(model.forward._cache().store.entries) == 1


def test_going_back_is_no_recapture(backend: Backend) -> None:
    model = cuda_graphed(Switched(backend.device), sizes=(2,))
    x = backend.randn(2, 8)
    for step in range(60):
        model.flag = step % 2 == 1
        model(x)
    model.mode = 7
    model(x)
    assert model.forward.cache_info().captures == 3


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cProfile sets no profile function there")
def test_calls_that_may_not_be_captured_are_no_recaptures(backend: Backend) -> None:
    model = cuda_graphed(Switched(backend.device), sizes=(2,))
    x = backend.randn(2, 8)
    model(x)
    model.flag = True
    profile = cProfile.Profile()
    with profile:
        for _ in range(12):
            model(x)
    for _ in range(2):
        assert torch.equal(model(x), eager(model, x))
    told = model.forward.cache_info()
    assert (told.captures, told.hits) == (2, 1)


def test_least_recently_used_value_is_dropped_first(backend: Backend) -> None:
    model = cuda_graphed(Switched(backend.device), sizes=(2,))
    x = backend.randn(2, 8)
    for mode in range(34):
        model.mode = mode
        for _ in range(17):
            model(x)
        model.mode = 0
        model(x)
    told = model.forward.cache_info()
    assert (told.captures, told.dropped, told.signatures) == (34, 2, 1)
    for model.mode in (0, 3, 33):
        model(x)
    assert model.forward.cache_info().captures == 34


def test_adapters_that_alternate_are_captured_once_each(backend: Backend) -> None:
    """PEFT puts a new list of names into each layer that it switches."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
    adapted = peft.get_peft_model(Switched(backend.device), config, adapter_name="one")
    adapted.add_adapter("two", config)
    model = cuda_graphed(adapted.get_base_model().eval(), sizes=(2,))
    adapted.to(backend.device)
    x = backend.randn(2, 8)
    results = []
    for _ in range(3):
        for name in ("one", "two"):
            adapted.set_adapter(name)
            results.append(model(x).clone())
            assert torch.equal(results[-1], eager(model, x))
        with adapted.disable_adapter():
            assert torch.equal(model(x), eager(model, x))
    assert not torch.equal(results[0], results[1])
    assert model.forward.cache_info().captures == 3


# What never comes back


@pytest.mark.parametrize(
    "what", ["parameter", "data", "cast", "child", "tuple", "list", "closure", "slots"]
)
def test_graph_over_a_freed_tensor_is_dropped(backend: Backend, what: str) -> None:
    """Graphs of another signature, too; nothing keeps the memory of what was replaced."""
    extra = [backend.randn(8)]

    class Slots:
        __slots__ = ("value",)

        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Reading(Switched):
        slots = Slots(extra[0])

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.slots.value

    def closed(tensor: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: y + tensor

    model = Reading(backend.device)
    model.slots = Slots(backend.randn(8))
    model.pair = [backend.randn(8)] if what == "list" else (backend.randn(8),)
    model.act = closed(backend.randn(8))
    cuda_graphed(model, sizes=(2,))
    x, other = backend.randn(2, 8), backend.randn(2, 3, 8)
    for _ in range(3):
        model(x), model(other)
    replaced = {
        "tuple": model.pair[0],
        "list": model.pair[0],
        "closure": model.act.__closure__[0].cell_contents,  # type: ignore[attr-defined]
        "slots": model.slots.value,
    }.get(what, model.layer.weight)
    storage = StorageWeakRef(replaced.untyped_storage())
    graphs = [
        weakref.ref(bucket.graph)
        for each in model.forward._cache().store.entries
        for bucket in each.buckets.values()
    ]
    del replaced
    change: dict[str, Callable[[], Any]] = {
        "parameter": lambda: setattr(model.layer, "weight", nn.Parameter(backend.randn(8, 8))),
        "data": lambda: setattr(model.layer.weight, "data", backend.randn(8, 8)),
        "cast": lambda: model.double().float(),
        "child": lambda: setattr(model, "layer", nn.Linear(8, 8).to(backend.device)),
        "tuple": lambda: setattr(model, "pair", (backend.randn(8),)),
        "list": lambda: setattr(model, "pair", [backend.randn(8)]),
        "closure": lambda: setattr(model, "act", closed(backend.randn(8))),
        "slots": lambda: setattr(model, "slots", Slots(backend.randn(8))),
    }
    change[what]()
    model(x)
    gc.collect()
    assert storage.expired()
    assert len(model.forward._cache().store.entries) == 1
    assert [graph() for graph in graphs] == [None, None]
    assert torch.equal(model(x), eager(model, x))


def test_graph_that_returns_a_replaced_tensor_is_dropped(backend: Backend) -> None:
    """The graph keeps the tensor alive itself, so nobody can tell whether that is gone."""

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = backend.randn(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, self.state

    model = cuda_graphed(Returning(), sizes=(2,))
    x = backend.randn(2, 8)
    model(x), model(x)
    storage = StorageWeakRef(model.state.untyped_storage())
    model.state = backend.randn(3)
    model(x), model(x)
    gc.collect()
    assert storage.expired()
    assert model(x)[1] is model.state


def test_graphs_of_a_module_that_moved_are_dropped(backend: Backend) -> None:
    model = cuda_graphed(nn.Sequential(nn.Linear(8, 8)).to(backend.device), sizes=(2,))
    model(backend.randn(2, 8))
    model.double().float().cpu()
    with config.switched(config.emulated_var, False):
        model(torch.randn(2, 8))
    assert not list(model.forward._cache().store.entries)


# What can't be captured


def test_value_without_graphs_leaves_those_of_another(backend: Backend) -> None:
    class Reading(nn.Module):
        reads = False

        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item() if self.reads else x * 2

    model = cuda_graphed(Reading(), sizes=(2, 4))
    x = backend.randn(2, 8)
    with pytest.warns(GraphCacheWarning, match=r"\.item"):
        for step in range(12):
            model.reads = step % 2 == 1
            assert torch.equal(model(x), eager(model, x))
    told = model.forward.cache_info()
    assert (told.captures, told.hits) == (2, 5)
    x = backend.randn(5, 8)  # of no size, so that Python serves it
    assert torch.equal(model(x), eager(model, x))
    first = "the first call of a signature"
    assert model.forward.cache_info().eager[first] == told.eager[first] == 2
    model.reads = False
    for _ in range(3):
        x = backend.randn(3, 8)  # compared by Python before it is padded
        assert torch.equal(model(x), eager(model, x))
    assert model.forward.cache_info().hits == 5 + 2


# Lists


@pytest.mark.parametrize("shares", [False, True])
def test_list_is_known_by_its_items_and_its_places(backend: Backend, shares: bool) -> None:
    """A new list with the same items does, unless `is` can tell."""
    model = cuda_graphed(Switched(backend.device), sizes=(2,))
    x = backend.randn(2, 8)

    def put(*names: str) -> None:
        model.active = list(names)
        model.also = model.active if shares else list(names)

    for step in range(8):
        put("a") if step % 2 else put("a", "b")
        assert torch.equal(model(x), eager(model, x))
    assert model.forward.cache_info().captures == 2
    model.also = list(model.active) if shares else model.active
    assert torch.equal(model(x), eager(model, x))
    model.active.append("b")  # noticed in the list of now
    assert torch.equal(model(x), eager(model, x))


LIST = ["a"]


def test_list_that_is_global_too_stays_the_same(backend: Backend) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = LIST

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.names is LIST else x * 3

    for first in (LIST, ["a"]):
        model = cuda_graphed(Asking(), sizes=(2,))
        model.names = first
        x = backend.randn(2, 8)
        for _ in range(2):
            for model.names in (LIST, ["a"]):
                assert torch.equal(model(x), eager(model, x))
