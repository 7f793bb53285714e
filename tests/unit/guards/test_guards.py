"""Changed parameters, attributes, closures and hooks lead to a new capture or to eager."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheWarning, cuda_graphed
from graphcache.runtime.source_lines import is_library
from tests.helpers import Backend, change_parameter, eager, hidden, replay_equals_eager
from tests.models import MLP


def change_data(model: MLP) -> None:
    model.up.weight.data = model.up.weight.data * 2


def assign_state(model: MLP) -> None:
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def change_child(model: MLP) -> None:
    model.down = nn.Linear(16, 8).to(model.down.weight.device)


def change_dtype(model: MLP) -> None:
    model.double()
    model.float()


def add_bias(model: MLP) -> None:
    model.down.bias = None


def change_in_place(model: MLP) -> None:
    model.up.weight.mul_(2)


def load_in_place(model: MLP) -> None:
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize(
    ("change", "recaptured"),
    [
        (change_parameter, True),
        (change_data, True),
        (assign_state, True),
        (change_child, True),
        (change_dtype, True),
        (add_bias, True),
        (change_in_place, False),
        (load_in_place, False),
    ],
)
def test_parameters(backend: Backend, mlp: MLP, change, recaptured: bool) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    replay_equals_eager(mlp, x)
    kept = [*mlp.parameters(), *mlp.children()]  # the old ones live on, as in an optimiser
    change(mlp)
    replay_equals_eager(mlp, x)
    assert mlp.forward.cache_info().captures == 1 + recaptured
    assert kept


class Attributes(nn.Module):
    """Reaches tensors by every way that a module has, but for parameters."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.plain = torch.ones(3, device=device)
        self.nested = {"k": [torch.ones(3, device=device)]}
        self.holder = Holder(torch.ones(3, device=device))
        self.scale = 2.0
        self.inner = nn.Identity()
        self.inner.flag = True

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.plain + self.nested["k"][0] + self.holder.tensor
        return total * self.scale if self.inner.flag else total


class Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "plain", m.plain * 2),
        lambda m: m.nested["k"].__setitem__(0, m.plain * 3),
        lambda m: m.nested.update(k=[m.plain * 4]),
        lambda m: setattr(m, "nested", {"k": [m.plain * 5]}),
        lambda m: setattr(m.holder, "tensor", m.plain * 6),
        lambda m: setattr(m, "holder", Holder(m.plain * 7)),
        lambda m: setattr(m, "scale", 8.0),
        lambda m: setattr(m.inner, "flag", False),
        lambda m: m.inner.train(not m.inner.training),
    ],
    ids=["tensor", "item", "list", "dict", "in object", "object", "number", "flag", "mode"],
)
def test_attributes(backend: Backend, change) -> None:
    model = cuda_graphed(Attributes(backend.device), sizes=(2,))
    x = backend.randn(2, 3)
    replay_equals_eager(model, x)
    old = [model.plain, model.nested, model.holder]  # live on elsewhere
    change(model)
    replay_equals_eager(model, x)
    assert model.forward.cache_info().captures == 2
    assert old


TABLE: Tensor

MODEL: nn.Module


def uses_globals(x: Tensor) -> Tensor:
    return MODEL(x) + TABLE


def test_closures_and_globals(backend: Backend) -> None:
    global TABLE, MODEL
    TABLE, MODEL = backend.randn(4), nn.Linear(4, 4).to(backend.device)
    captured = backend.randn(4)

    def uses_closure(x: Tensor) -> Tensor:
        return x + captured

    x = backend.randn(2, 4)
    by_closure = cuda_graphed(uses_closure, sizes=(2,))
    by_global = cuda_graphed(uses_globals, sizes=(2,))
    for _ in range(3):
        assert torch.equal(by_closure(x), x + captured)
        assert torch.allclose(by_global(x), MODEL(x) + TABLE, atol=1e-6)
    kept = captured, TABLE, MODEL
    captured, TABLE, MODEL = captured * 2, TABLE * 2, nn.Linear(4, 4).to(backend.device)
    for _ in range(3):
        assert torch.equal(by_closure(x), x + captured)
        assert torch.allclose(by_global(x), MODEL(x) + TABLE, atol=1e-6)
    MODEL.weight.data = MODEL.weight.data * 2
    assert torch.allclose(by_global(x), MODEL(x) + TABLE, atol=1e-6)
    assert by_closure.cache_info().captures == 2
    assert kept


class Hidden:
    """A tensor where no search looks."""

    def __init__(self, tensor: Tensor) -> None:
        self._there = hidden(tensor)

    def get(self) -> Tensor:
        return next(self._there)[0]


def test_forward_that_cannot_be_guarded_runs_eagerly(backend: Backend) -> None:
    class Opaque(nn.Module):
        def __init__(self, hidden: Hidden) -> None:
            super().__init__()
            self.hidden = hidden

        def forward(self, x: Tensor) -> Tensor:
            return x + self.hidden.get()

    model = cuda_graphed(Opaque(Hidden(backend.randn(3))), sizes=(2,))
    x = backend.randn(2, 3)
    with pytest.warns(GraphCacheWarning, match=r"float32\[3\]\) in a way that can't be watched"):
        model(x)
    model.hidden = Hidden(backend.randn(3))
    assert torch.equal(model(x), eager(model, x))
    assert model.forward.cache_info().hits == 0


def test_a_graph_output_kept_in_an_attribute_is_not_captured(backend: Backend) -> None:
    class Remembers(nn.Module):
        h: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return x + self.h

    make = cuda_graphed(lambda x: x * 2, sizes=(2,))
    model = cuda_graphed(Remembers(), sizes=(2,))
    x = backend.randn(2, 3)
    make(x)
    model.h = make(x)
    with pytest.warns(GraphCacheWarning, match=r"output of a graph that was kept.*\.clone\(\)"):
        assert torch.equal(model(x), x + x * 2)


def test_a_child_that_knows_its_parent_does_not_keep_it_alive(backend: Backend) -> None:
    class Child(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child()
            object.__setattr__(self.child, "parent", self)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x)

    model = cuda_graphed(Parent(), sizes=(2,))
    model(backend.randn(2, 2))
    cache, parent = weakref.ref(model.forward._cache()), weakref.ref(model)
    del model
    gc.collect()
    assert parent() is None
    assert cache() is None


def test_grad_mode_is_respected_when_parameters_change(backend: Backend, mlp: MLP) -> None:
    mlp.requires_grad_(False)
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    with torch.enable_grad():
        for _ in range(3):
            assert not mlp(x).requires_grad
        assert mlp.forward.cache_info().hits == 2
        mlp.requires_grad_(True)
        assert mlp(x).requires_grad
        mlp(x).sum().backward()
        assert mlp.up.weight.grad is not None
    assert graphcache.default_pool(backend.device)


def test_a_change_that_is_none_keeps_the_graphs(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    replay_equals_eager(mlp, x)
    mlp.eval()
    mlp.up.weight.requires_grad_(mlp.up.weight.requires_grad)
    mlp.up.extra = 1
    del mlp.up.extra
    mlp.up.weight = mlp.up.weight
    replay_equals_eager(mlp, x)
    assert mlp.forward.cache_info().captures == 1
    mlp.up.train()  # seen still, after a change that was none
    replay_equals_eager(mlp, x)
    assert mlp.forward.cache_info().captures == 2


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_global_hook_is_noticed(backend: Backend, mlp: MLP, kind: str) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    replay_equals_eager(mlp, x)
    called: list[nn.Module] = []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    with register(lambda module, *_: called.append(module)):
        mlp(x)
        assert mlp.up in called
    replay_equals_eager(mlp, x)
    assert mlp.forward.cache_info().captures == 1  # back to what it was


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_a_hook_of_a_submodule_is_noticed(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    replay_equals_eager(mlp, x)
    called: list[nn.Module] = []
    for register in (mlp.up.register_forward_hook, mlp.down.register_forward_pre_hook):
        with register(lambda module, *_: called.append(module)):
            mlp(x)
        replay_equals_eager(mlp, x)
    assert called == [mlp.up, mlp.down]
    with mlp.register_forward_hook(lambda module, *_: called.append(module)):  # its own may stay
        replays = mlp.forward.cache_info().hits
        mlp(x)
        assert mlp.forward.cache_info().hits == replays + 1


def test_guards_are_collected_with_what_leads_back_to_them(backend: Backend) -> None:
    """By way of a list, which a guard holds: only Python's collector can find that."""

    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.parent = [parent]
            self.tensors = [torch.ones(2, device=backend.device)]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.tensors[0]

    parent = nn.Sequential()
    parent.append(cuda_graphed(Child(parent), sizes=(2,)))
    x = backend.randn(2, 2)
    replay_equals_eager(parent[0], x)
    assert parent[0].forward.cache_info().hits > 0
    cache, gone = weakref.ref(parent[0].forward._cache()), weakref.ref(parent)
    del parent
    gc.collect()
    assert gone() is None
    assert cache() is None


def test_names_that_a_class_has_of_itself_are_not_guarded(backend: Backend) -> None:
    """Annotations lead to the docs of `typing`, which are made when somebody asks for them."""

    class Reads(nn.Module):
        kinds: list[int]

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, "co" + "nv")(x)  # it might read anything

    model = cuda_graphed(Reads().to(backend.device))
    for _ in range(3):
        model(backend.randn(2, 2, 4))
    assert model.forward.cache_info().hits == 2


def test_files_beside_torch_are_no_library() -> None:
    """Else nothing that torchvision's code reads would be watched, and messages named other lines."""
    folder = Path(torch.__file__).parent
    assert is_library(str(folder / "nn" / "functional.py"))
    assert is_library(graphcache.__file__)
    assert not is_library(str(folder.parent / "torchvision" / "models" / "resnet.py"))
    assert not is_library(str(Path(graphcache.__file__).parent.parent / "graphcache_models" / "net.py"))
