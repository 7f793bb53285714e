"""Contract 4: what a graph holds by address or by value is compared on every call."""

import ctypes
import gc
import sys
import weakref
from collections import UserDict, defaultdict, deque
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import _C, GraphCacheWarning, cuda_graphed
from graphcache.runtime.source_lines import is_library
from tests.conftest import MLP, Backend, eager, hidden


def replay_equals_eager(model: nn.Module, x: Tensor) -> None:
    for _ in range(3):
        assert torch.allclose(model(x), eager(model, x), atol=1e-5)


def change_parameter(model: MLP) -> None:
    model.up.weight = nn.Parameter(model.up.weight * 2)


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


def test_what_cannot_be_watched_runs_eagerly(backend: Backend) -> None:
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


def test_modes_have_graphs_of_their_own(backend: Backend) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).to(backend.device)
    cuda_graphed(model, sizes=(2,))
    x = backend.randn(2, 4)
    for _ in range(2):
        model.eval()
        replay_equals_eager(model, x)
        model.train()
        assert (model(x) == 0).any()
        with torch.autocast(backend.device.type, dtype=torch.bfloat16):
            assert model.eval()(x).dtype == torch.bfloat16
        with torch.inference_mode():
            assert model(x).is_inference()
        assert not model(x).is_inference()
    assert model.forward.cache_info().signatures == 4
    assert model.forward.cache_info().hits >= 4


def test_autocast_weights_of_an_earlier_call_are_not_captured(backend: Backend) -> None:
    """Its cache of cast weights dies with the region; a graph that read it would read freed memory."""
    model = nn.Linear(64, 64).to(backend.device)
    x = backend.randn(2, 64)
    model.requires_grad_(True)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16), torch.enable_grad():
        model(x)  # fills the cache
        with torch.no_grad():
            cuda_graphed(model, sizes=(2,))
            model(x)
            assert model.forward.cache_info().captures == 1
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        model.weight.mul_(2)
        assert torch.allclose(model(x), eager(model, x))
        assert model.forward.cache_info().hits == 1


def test_what_changes_on_every_call_stops_being_captured(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    with pytest.warns(
        GraphCacheWarning, match=r"up.weight was replaced .* after 9 captures in a row.*copy_"
    ):
        for _ in range(15):
            change_parameter(mlp)
            assert torch.allclose(mlp(x), eager(mlp, x), atol=1e-5)
    told = mlp.forward.cache_info()
    assert told.captures == 9
    assert told.eager["what it captured is replaced again and again"] == 6


def test_too_many_signatures_run_eagerly(backend: Backend) -> None:
    """To drop one after another, none of which was worth its capture, would be all that happens."""
    model = cuda_graphed(lambda x: x * 2, sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="more than 32 ways"):
        for width in range(1, 50):
            for _ in range(2):
                x = backend.randn(2, width)
                assert torch.equal(model(x), x * 2)
    told = model.cache_info()
    assert (told.signatures, told.captures, told.dropped) == (32, 40, 8)


def test_a_call_that_never_comes_again_is_not_captured(backend: Backend) -> None:
    """But the very first is; a number that is another one at each call is told of."""
    model = cuda_graphed(lambda x, n: x * n, sizes=(2,))
    x = backend.randn(2, 3)
    with pytest.warns(GraphCacheWarning, match="more than 32 ways.*numbers as tensors"):
        for n in range(40):
            assert torch.equal(model(x, n), x * n)
    told = model.cache_info()
    assert (told.captures, told.eager["the first call of another signature"]) == (1, 39)
    assert torch.equal(model(x, 39), x * 39)
    assert model.cache_info().captures == 2


def test_warmup_asks_for_a_capture_of_any_signature(backend: Backend) -> None:
    model = cuda_graphed(lambda x, n: x * n, sizes=(2,))
    x = backend.randn(2, 3)
    for n in range(4):
        model.warmup(x, n)
        assert torch.equal(model(x, n), x * n)
    assert (model.cache_info().captures, model.cache_info().hits) == (4, 4)


def test_the_signature_that_was_not_called_for_longest_goes_first(backend: Backend) -> None:
    model = cuda_graphed(lambda x: x * 2, sizes=(2,))

    def calls(width: int, times: int) -> None:
        for _ in range(times):
            x = backend.randn(2, width)
            assert torch.equal(model(x), x * 2)

    for width in range(1, 33):
        calls(width, 20)
    calls(1, 1)  # natively: Python does not see it
    for width in range(33, 63):
        calls(width, 20)
    told = model.cache_info()
    assert (told.signatures, told.captures, told.dropped) == (32, 62, 30)
    calls(1, 3)
    assert model.cache_info().captures == 62
    assert "30 dropped" in str(told)


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
    assert mlp.forward.cache_info().captures == 2


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


def test_only_the_root_may_have_hooks() -> None:
    module = nn.Identity()
    module.register_forward_hook(lambda *_: None)
    assert not guard(module).check(False)
    assert guard(module, root=module).check(False)


def guard(module: nn.Module, **what: object) -> _C.Guard:
    return _C.Guard(**{"modules": [module], **what})


class Anything:
    pass


def test_another_object_at_the_same_address_is_noticed() -> None:
    module = nn.Identity()
    module.held = there = Anything()
    held = guard(module)
    module.held = None
    module.held = there
    assert held.check(False)
    module.held = None
    # As if it had died; what comes back is then another one, to which the allocator gave its memory.
    (reference,) = weakref.getweakrefs(there)
    ctypes.pythonapi._PyWeakref_ClearRef(ctypes.py_object(reference))
    module.held = there
    assert not held.check(False)


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda: float("1.5"), True),
        (lambda: (float("1.5"), "text"), True),
        (lambda: torch.device("cpu", 0), True),
        (lambda: torch.ones(1), True),
        (nn.Identity, False),
        (lambda: [nn.Identity()], False),
        (lambda: (nn.Identity(),), False),
    ],
    ids=["number", "tuple", "device", "tensor", "module", "list", "tuple of a module"],
)
def test_only_what_leads_to_no_module_is_kept_alive(make, held: bool) -> None:
    module = nn.Identity()
    vars(module)["value"] = value = make()
    before = sys.getrefcount(value)
    watching = guard(module)
    assert watching.check(False)
    assert sys.getrefcount(value) - before == held


def test_a_renamed_attribute_is_noticed() -> None:
    module = nn.Identity()
    module.first = 1
    watching = guard(module)
    del module.first
    module.second = 1
    assert not watching.check(False)


def test_dict_of_a_module_replaced() -> None:
    module = nn.Identity()
    held = guard(module)
    assert held.check(False)
    old = module.__dict__
    module.__dict__ = {**old, "training": not module.training}
    assert not held.check(False)
    module.__dict__ = old
    assert held.check(False)


@pytest.mark.parametrize("name", ["_parameters", "_buffers", "_modules", "_forward_hooks"])
@pytest.mark.parametrize("keep", [True, False], ids=["old one kept", "old one freed"])
def test_table_of_a_module_replaced(name: str, keep: bool) -> None:
    module = nn.Linear(2, 2)
    held = guard(module)
    assert held.check(False)
    old = [getattr(module, name)] if keep else []
    setattr(module, name, type(getattr(module, name))(getattr(module, name)))
    assert not held.check(False)
    assert not held.check(False)
    assert len(old) == keep


def test_a_module_that_keeps_its_tables_elsewhere_is_refused() -> None:
    module = nn.Linear(2, 2)
    vars(module)["_parameters"] = UserDict(module._parameters)
    with pytest.raises(TypeError, match="_parameters is no dict"):
        guard(module)


def test_a_module_that_died_is_noticed() -> None:
    module = nn.Linear(2, 2)
    attributes = vars(module)
    held, other = guard(module), guard(nn.Identity())
    assert held.check(False)
    assert not other.check(False)
    del module
    gc.collect()
    assert not held.check(False)
    attributes.clear()
    assert not held.check(False)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (lambda t: t.add_(1), True),
        (lambda t: setattr(t, "data", t.data), True),
        (lambda t: setattr(t, "data", t.data.clone()), False),
        (lambda t: setattr(t, "data", t.data.as_strided((4, 4), (4, 1), 4)), False),
        (lambda t: setattr(t, "data", t.data.t()), False),
        (lambda t: setattr(t, "data", t.data[:2]), False),
        (lambda t: t.set_(torch.zeros(4, 4)), False),
        (lambda t: t.untyped_storage().resize_(0), False),
        (lambda t: torch.utils.swap_tensors(t, torch.zeros(4, 4)), False),
        (graphcache.expire, False),
    ],
    ids=["write", "same", "data", "offset", "layout", "shape", "set", "resize", "swap", "expired"],
)
def test_storage(change, holds: bool) -> None:
    tensor = torch.ones(8, 4)[:4]
    held = guard(nn.Identity(), modules=[], tensors=[torch.ones(2), tensor])
    assert held.check(True)
    change(tensor)
    assert held.check(False) == holds


def test_gradients() -> None:
    held = guard(nn.Identity(), modules=[], tensors=[tensor := torch.ones(4)])
    tensor.requires_grad_()
    assert held.check(False)
    assert not held.check(True)


def cell(value: object):
    return (lambda: value).__closure__[0]


class Doubled(dict):
    def __getitem__(self, key):
        return super().__getitem__(key)[0]


@pytest.mark.parametrize(
    ("container", "key", "change"),
    [
        ({"k": 1}, "k", lambda d: d.clear()),
        ({(1, 2.5): 1}, (1, 2.5), lambda d: d.update({(1, 2.5): 2})),
        (defaultdict(lambda: 2, k=1), "k", lambda d: d.pop("k")),
        (Doubled(k=[1]), "k", lambda d: d.update(k=[2])),
        (Doubled(k=[1]), "k", lambda d: d.clear()),
        ([0, 1], 1, lambda d: d.pop()),
        ([0, 1], 1, lambda d: d.reverse()),
        (deque([0, 1]), 1, lambda d: d.pop()),
        (cell(1), None, lambda c: setattr(c, "cell_contents", 2)),
        (cell(1), None, lambda c: delattr(c, "cell_contents")),
    ],
    ids=["dict", "tuple key", "default", "override", "gone", "short", "list", "other", "cell", "empty"],
)
def test_places(container, key, change) -> None:
    held = guard(nn.Identity(), modules=[], sources=[(container, key, 1), ((0, 1), 1, 1)])
    assert held.check(False)
    change(container)
    assert not held.check(False)
    assert not isinstance(container, defaultdict) or not container


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


def test_what_a_class_says_of_itself_is_no_value_of_the_forward(backend: Backend) -> None:
    """Annotations lead to the docs of `typing`, which are made when somebody asks for them."""

    class PythonRecorder(nn.Module):
        kinds: list[int]

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, "co" + "nv")(x)  # it might read anything

    model = cuda_graphed(PythonRecorder().to(backend.device))
    for _ in range(3):
        model(backend.randn(2, 2, 4))
    assert model.forward.cache_info().hits == 2


def test_what_lies_beside_torch_is_not_of_torch() -> None:
    """Else nothing that torchvision's code reads would be watched, and messages named other lines."""
    folder = Path(torch.__file__).parent
    assert is_library(str(folder / "nn" / "functional.py"))
    assert is_library(graphcache.__file__)
    assert not is_library(str(folder.parent / "torchvision" / "models" / "resnet.py"))
    assert not is_library(str(Path(graphcache.__file__).parent.parent / "graphcache_models" / "net.py"))
