"""A graphed module stays what it was: type, state, copies, hooks, compilers."""

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheWarning, OptionError, cuda_graphed
from tests.helpers import Backend, close, eager
from tests.models import MLP


@cuda_graphed(sizes=(1, 2, 4))
class OnClass(MLP):
    """Decorated as a class: its forward is inherited."""


class OnForward(MLP):
    """Decorated in the body of the class."""

    @cuda_graphed(batch_dim=0, sizes=(1, 2, 4))
    def forward(self, x: Tensor) -> Tensor:
        """Doubles."""
        return super().forward(x)


def on_instance() -> MLP:
    return cuda_graphed(MLP(), sizes=(1, 2, 4))


FORMS = [OnClass, OnForward, on_instance]


def use(model: nn.Module, backend: Backend) -> None:
    for batch in (4, 3, 2):
        x = backend.randn(batch, 8)
        assert torch.allclose(model(x), eager(model, x), atol=1e-5)


@pytest.fixture(params=FORMS, ids=["class", "forward", "instance"])
def model(request: pytest.FixtureRequest, backend: Backend) -> nn.Module:
    made = request.param().to(backend.device).eval()
    use(made, backend)
    return made


def test_type_and_state(model: nn.Module) -> None:
    assert type(model) in (OnClass, OnForward, MLP)
    assert isinstance(model, MLP)
    names = ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == ["", "up", "down"]


def test_decorating_gives_the_same_object_back() -> None:
    assert OnClass.__name__ == "OnClass"
    assert OnClass.__doc__ == "Decorated as a class: its forward is inherited."
    model = MLP()
    assert cuda_graphed(model) is model
    assert cuda_graphed(sizes=(1,))(model) is model


def test_signature_name_and_docstring(model: nn.Module) -> None:
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert model.forward.__name__ == "forward"
    assert OnForward.forward.__doc__ == "Doubles."
    assert list(inspect.signature(OnForward.forward).parameters) == ["self", "x"]
    assert model.forward.__self__ is model
    assert callable(model.forward.__wrapped__)


def test_deepcopy(model: nn.Module, backend: Backend) -> None:
    copied = copy.deepcopy(model)
    assert copied.forward.cache_info().calls == 0
    assert copied.forward.__self__ is copied
    with torch.no_grad():
        copied.up.weight.zero_()
    use(copied, backend)
    use(model, backend)
    assert copied.forward.cache_info().sizes == (1, 2, 4)


def test_a_copy_inside_a_container_is_bound_to_the_copy(backend: Backend) -> None:
    model = nn.Sequential(on_instance(), nn.ReLU()).to(backend.device)
    copied = copy.deepcopy(model)
    assert copied[0].forward.__self__ is copied[0]
    assert copied[0] is not model[0]


def test_pickle(model: nn.Module, backend: Backend) -> None:
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.forward.cache_info().calls == 0
    x = backend.randn(3, 8)
    assert torch.equal(eager(loaded, x), eager(model, x))
    use(loaded, backend)


def test_torch_save(model: nn.Module, backend: Backend) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    use(torch.load(file, weights_only=False), backend)


def test_state_dict_in_and_out(model: nn.Module, backend: Backend) -> None:
    other = MLP().to(backend.device)
    model.load_state_dict(other.state_dict())
    x = backend.randn(4, 8)
    assert torch.allclose(model(x), other(x), atol=1e-5)
    other.load_state_dict(model.state_dict())


class Derived(OnForward):
    """Overrides a decorated forward, is not decorated itself, and calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class DerivedDecorated(OnForward):
    @cuda_graphed(sizes=(4,))
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", [Derived, DerivedDecorated])
def test_super(backend: Backend, kind: type[MLP]) -> None:
    model = kind().to(backend.device)
    for batch in (4, 3, 3, 2, 2, 4):
        x = backend.randn(batch, 8)
        plain = model.down(torch.relu(model.up(x))) + 1
        assert torch.allclose(model(x), plain, atol=1e-5)
    if kind is DerivedDecorated:  # the inner one is inlined into the graphs of the outer one
        assert model.forward.cache_info().hits > 0
        assert super(kind, model).forward.cache_info().hits == 0
    else:
        assert super(kind, model).forward.cache_info().hits > 0


def test_called_through_the_class(backend: Backend) -> None:
    model = OnForward().to(backend.device)
    x = backend.randn(4, 8)
    for _ in range(3):
        assert torch.allclose(OnForward.forward(model, x), eager(model, x), atol=1e-5)
    assert model.forward.cache_info().hits == 2


def test_instances_have_graphs_of_their_own(backend: Backend) -> None:
    a, b = OnForward().to(backend.device), OnForward().to(backend.device)
    use(a, backend)
    use(b, backend)
    assert a.forward.cache_info().calls == b.forward.cache_info().calls == 3
    with pytest.raises(OptionError, match=r"ask one of them: module\.forward\.cache_info\(\)"):
        OnForward.forward.cache_info()


def test_hooks_of_the_module_itself_run_on_every_call(model: nn.Module, backend: Backend) -> None:
    seen: list[str] = []
    handles = [
        model.register_forward_pre_hook(lambda *_: seen.append("pre")),
        model.register_forward_hook(lambda *_: seen.append("post")),
    ]
    hits = model.forward.cache_info().hits
    model(backend.randn(4, 8))
    model(backend.randn(4, 8))
    assert seen == ["pre", "post"] * 2
    assert model.forward.cache_info().hits == hits + 2
    for handle in handles:
        handle.remove()


HOOK = "hooks inside the forward: `<lambda>` on 'up' changes seen, which no graph replays"


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_hooks_inside_run_on_every_call(model: nn.Module, backend: Backend) -> None:
    """A replay runs no Python, so a forward with a hook inside it that collects runs eagerly."""
    seen: list[Tensor] = []
    handle = model.up.register_forward_hook(lambda _, __, out: seen.append(out))
    hits = model.forward.cache_info().hits
    for _ in range(6):
        model(backend.randn(4, 8))
    assert len(seen) == 6
    assert model.forward.cache_info().hits == hits
    assert HOOK in model.forward.cache_info().eager
    handle.remove()
    model(backend.randn(4, 8))
    model(backend.randn(4, 8))
    assert model.forward.cache_info().hits > hits


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_compile_sees_the_plain_forward(model: nn.Module, backend: Backend) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = backend.randn(3, 8)
    calls = model.forward.cache_info().calls
    with graphcache.disabled():
        expected = compiled(x)
    assert torch.allclose(expected, eager(model, x), atol=1e-5)
    assert model.forward.cache_info().calls == calls


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_module_can_be_graphed(backend: Backend) -> None:
    torch.compiler.reset()
    compiled = torch.compile(MLP().to(backend.device), backend="eager")
    model = cuda_graphed(compiled, sizes=(2,))
    for _ in range(3):
        x = backend.randn(2, 8)
        assert torch.allclose(model(x), eager(model, x), atol=1e-5)
    assert model.forward.cache_info().hits == 2


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_module_stays_compiled_when_it_is_graphed(backend: Backend) -> None:
    """Dynamo gives up for good on code that it meets under a dispatch mode, as the first call is."""
    torch.compiler.reset()
    runs = []

    def counting(graph: torch.fx.GraphModule, _: object) -> object:
        def run(*args: torch.Tensor) -> object:
            runs.append(graph)
            return graph.forward(*args)

        return run

    other = torch.compile(MLP().to(backend.device), backend=counting)
    compiled = torch.compile(MLP().to(backend.device), backend=counting)
    x = backend.randn(2, 8)
    other(x)
    compiled(x)
    model = cuda_graphed(compiled, sizes=(2,))
    for _ in range(3):
        model(x)
    assert model.forward.cache_info().hits == 2
    runs.clear()
    other(x)
    other(backend.randn(3, 8))
    assert len(runs) == 2


def test_torch_export_sees_the_plain_forward(model: nn.Module, backend: Backend) -> None:
    x = backend.randn(3, 8)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), eager(model, x), atol=1e-5)


def test_dict_and_locals_with_a_forward_are_no_shallow_copy(model: nn.Module, backend: Backend) -> None:
    x, functions = backend.randn(2, 8), {"forward": model.forward}
    want = eager(model, x)

    def call() -> Tensor:
        forward = model.forward
        assert "forward" in locals()  # a dict that Python keeps until 3.13
        return forward(x)

    for _ in range(3):
        assert torch.allclose(functions["forward"](x), want, atol=1e-5)
        assert torch.allclose(call(), want, atol=1e-5)


def test_module_dies_although_other_objects_were_frozen(backend: Backend) -> None:
    gc.freeze()  # as some libraries do when they are imported
    try:
        module = cuda_graphed(MLP().to(backend.device).eval())
        module.forward(backend.randn(2, 8))  # whose module it means is searched for
        known = weakref.ref(module)
        del module
        gc.collect()
        assert known() is None
    finally:
        gc.unfreeze()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_jit_trace(model: nn.Module, backend: Backend) -> None:
    x = backend.randn(3, 8)
    traced = torch.jit.trace(model, (x,))
    assert torch.allclose(traced(x), eager(model, x), atol=1e-5)


def test_torch_func(model: nn.Module, backend: Backend) -> None:
    x = backend.randn(5, 3, 8)
    calls = torch.func.vmap(model)(x)
    assert torch.allclose(calls, eager(model, x.flatten(0, 1)).view(5, 3, 8), atol=1e-5)
    swapped = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    out = torch.func.functional_call(model, swapped, (x[0],))
    reference = MLP().to(backend.device)
    reference.load_state_dict(swapped)
    assert torch.allclose(out, reference(x[0]), atol=1e-5)
    use(model, backend)


def test_plain_functions(backend: Backend) -> None:
    x = backend.randn(3, 2)
    for _ in range(3):
        assert torch.equal(double(x), x * 2)
    assert double.cache_info().hits >= 1
    assert double.__name__ == "double"
    assert double.__wrapped__(3) == 6
    assert pickle.loads(pickle.dumps(double)) is double
    assert copy.deepcopy(double) is double
    partial = functools.partial(double, x)
    assert torch.equal(partial(), x * 2)


@cuda_graphed(sizes=(4,))
def double(x: Tensor) -> Tensor:
    return x * 2


def test_a_bound_method(backend: Backend) -> None:
    model = MLP().to(backend.device)
    graphed = cuda_graphed(model.forward, sizes=(4,))
    for factor in (1, 2):
        model.up.weight.mul_(factor)
        model.up.weight.data = model.up.weight.data.clone()
        for _ in range(3):
            x = backend.randn(3, 8)
            assert torch.allclose(graphed(x), model(x), atol=1e-5)
    assert graphed.cache_info().captures == 2
    assert graphed.cache_info().hits == 2


def test_a_forward_that_was_put_on_the_instance(backend: Backend) -> None:
    """As some libraries do to add hooks."""
    model = MLP().to(backend.device)
    model.forward = functools.partial(patched, model)
    cuda_graphed(model, sizes=(4,))
    x = backend.randn(3, 8)
    for _ in range(3):
        plain = model.down(torch.relu(model.up(x))) + 1
        assert torch.allclose(model(x), plain, atol=1e-5)
    assert model.forward.cache_info().hits == 1


def patched(model: MLP, x: Tensor) -> Tensor:
    return MLP.forward(model, x) + 1


def test_decorating_again_changes_the_options(backend: Backend) -> None:
    model = cuda_graphed(cuda_graphed(MLP(), sizes=(1,)), sizes=(2, 4)).to(backend.device)
    use(model, backend)
    assert model.forward.cache_info().sizes == (2, 4)


def test_repr_is_useful(model: nn.Module) -> None:
    assert repr(model.forward).startswith(f"<cuda_graphed {type(model).__name__}.forward: ")
    assert "3 sizes [1, 2, 4]" in str(model.forward)
    assert repr(OnForward.forward) == "<cuda_graphed OnForward.forward>"
    assert "MLP" in repr(MLP())


def collecting() -> tuple[list[torch.fx.GraphModule], Any]:
    """A backend of torch.compile that changes nothing, and the graphs that it was given."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    return graphs, compiler


def operations(graphs: list[torch.fx.GraphModule]) -> list[str]:
    return [str(node.target) for graph in graphs for node in graph.graph.nodes]


def test_a_forward_put_on_top_later_is_called(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    mlp(x)
    plain = mlp(x).clone()
    under = mlp.forward
    mlp.forward = lambda x: under(x) + 1
    assert close(mlp(x), plain + 1)
    mlp.forward = under
    assert close(mlp(x), plain)
    del mlp.forward
    assert close(mlp(x), plain)


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_hooks_that_come_and_go_are_called(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    mlp(x)
    plain = mlp(x).clone()
    for register in (
        mlp.register_forward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        with register(lambda module, args, out: out + 1 if module is mlp else None):
            assert close(mlp(x), plain + 1)
        assert close(mlp(x), plain)
    handle = mlp.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert close(mlp(x), eager(mlp, x * 0))
    handle.remove()
    assert close(mlp(x), plain)
    assert mlp.forward.cache_info().hits >= 4


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_module_compiled_in_place_is_not_overridden(backend: Backend, mlp: MLP) -> None:
    compiled, compiler = collecting()
    x = backend.randn(2, 8)
    plain = eager(cuda_graphed(mlp, sizes=(2,)), x)
    mlp.compile(backend=compiler)
    assert close(mlp(x), plain)
    assert compiled
    with pytest.warns(GraphCacheWarning, match=r"MLP has graphs that are not used.*compiled in place"):
        cuda_graphed(mlp, sizes=(2,))
    compiled.clear()
    torch._dynamo.reset()
    assert close(mlp(x), plain)
    assert compiled


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_parent_that_is_compiled_takes_the_plain_forward_in(backend: Backend, mlp: MLP) -> None:
    graphs, compiler = collecting()
    x = backend.randn(2, 8)
    parent = nn.Sequential(nn.Tanh(), cuda_graphed(mlp, sizes=(2,)), nn.Tanh())
    plain = parent(x).clone()
    torch._dynamo.reset()
    assert close(torch.compile(parent, backend=compiler)(x), plain)
    targets = operations(graphs)
    assert sum("tanh" in target.lower() for target in targets) == 2
    assert sum("linear" in target for target in targets) == 2
    assert mlp.forward.cache_info().hits == 0


def test_a_copy_enters_its_own_forward(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    mlp(x)
    twin = copy.deepcopy(mlp)
    with torch.no_grad():
        twin.up.weight.zero_()
    for _ in range(3):
        assert close(twin(x), eager(twin, x))
        assert close(mlp(x), eager(mlp, x))
    assert twin.forward.cache_info().hits == 2


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_compile_sees_the_plain_forward_of_what_has_graphs(backend: Backend) -> None:
    @cuda_graphed(sizes=(2,))
    class Graphed(MLP):
        pass

    model = Graphed().to(backend.device).eval()
    x = backend.randn(2, 8)
    for _ in range(3):
        plain = model(x).clone()
    graphs, compiler = collecting()
    torch._dynamo.reset()
    hits = model.forward.cache_info().hits
    assert close(torch.compile(model, backend=compiler)(x), plain)
    assert graphs
    assert model.forward.cache_info().hits == hits


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_function_traces_a_forward_that_has_graphs(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    for _ in range(3):
        plain = mlp(x).clone()
    graphs, compiler = collecting()
    torch._dynamo.reset()
    hits = mlp.forward.cache_info().hits
    assert close(torch.compile(lambda x: mlp.forward(x) + 1, backend=compiler)(x), plain + 1)
    targets = operations(graphs)
    assert sum("linear" in target for target in targets) == 2
    assert mlp.forward.cache_info().hits == hits


class Slots:
    """Allows no weak reference, and has no `__dict__`."""

    __slots__ = ("scale", "shift")

    def __init__(self, shift: Tensor) -> None:
        self.scale, self.shift = 2.0, shift

    @cuda_graphed(sizes=(2,))
    def step(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift

    def plain(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@pytest.mark.parametrize("bound", [False, True])
def test_methods_of_an_object_with_slots_are_graphed(backend: Backend, bound: bool) -> None:
    one, other = (Slots(backend.randn(3)) for _ in range(2))
    other.scale = 3.0
    calls = [cuda_graphed(each.plain, sizes=(2,)) if bound else each.step for each in (one, other)]
    for turn in range(5):
        for each, call in zip((one, other), calls, strict=True):
            x = backend.randn(2, 3)
            assert torch.equal(call(x), each.plain(x))
            if turn == 2:
                each.scale = 5.0
    assert [call.cache_info().hits for call in calls] == [3, 3]


class Encoder(nn.Module):
    """Has a method that its users call in place of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x).tanh()

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


NOT_USED = r"Encoder has graphs that are not used: its `encode` calls 'layers\.0' in place of Encoder"


def test_a_forward_that_is_never_reached_warns_once(backend: Backend) -> None:
    model = cuda_graphed(Encoder().to(backend.device))
    x = backend.randn(2, 8)
    for _ in range(7):
        model.encode(x)
    with pytest.warns(GraphCacheWarning, match=NOT_USED) as caught:
        for _ in range(20):
            model.encode(x)
    assert len(caught) == 1
    assert "cuda_graphed(model.layers[0])" in str(caught[0].message)
    assert not any("_compiled_call_impl" in vars(layer) for layer in model.layers)


def test_a_forward_that_is_reached_does_not_warn(backend: Backend) -> None:
    x = backend.randn(2, 8)
    for use in (lambda model: model(x), lambda model: model.forward.warmup(x)):
        model = cuda_graphed(Encoder().to(backend.device))
        for _ in range(7):
            model.encode(x)
        use(model)
        assert not any("_compiled_call_impl" in vars(layer) for layer in model.layers)
        for _ in range(9):
            model.encode(x)


def test_parts_inside_another_graph_do_not_warn(backend: Backend) -> None:
    model = cuda_graphed(nn.Sequential(cuda_graphed(Encoder()), nn.Tanh()).to(backend.device))
    for _ in range(10):
        model(backend.randn(2, 8))
    assert model.forward.cache_info().hits > 0


def test_replicas_of_parts_call_their_own_weights(backend: Backend) -> None:
    model = cuda_graphed(Encoder().to(backend.device))
    layer, x = model.layers[0], backend.randn(2, 8)
    replica: Any = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight * 2, layer.bias
    assert close(replica(x), nn.functional.linear(x, layer.weight * 2, layer.bias))
    assert close(copy.deepcopy(model).encode(x), model.encode(x))
