"""Traps: copies, compilers, modes and tensor types of torch."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheError, GraphCacheWarning, cuda_graphed
from tests.helpers import (
    Backend,
    eagerly,
    equal,
    in_step,
    info,
    is_ours,
    outcome,
    replays,
    same_as_eager,
    survives,
)
from tests.models import Net, Scaled

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


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
    """The copy's graph reads the parameters of the original. Functional training loops copy this way."""
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


def test_module_dict_is_copied_into_another(backend: Backend, x: Tensor) -> None:
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
    """A graph can't be pickled, which `torch.save` does."""
    replays(net, x)
    torch.save(net, file := io.BytesIO())
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    twin.down.weight.mul_(3)
    replays(twin, x)
    replays(net, x)


def test_state_dict_in_and_out(net: Net, x: Tensor) -> None:
    """Filling the parameters in place must reach the graphs; the dict may hold nothing of them."""
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
    """The graph of the base class serves a subclass that does more."""
    model, plain = Derived().to(backend.device), nn.Linear(8, 8).to(backend.device)
    plain.load_state_dict(model.inner.state_dict())
    for batch in (2, 4, 3, 3, 2):
        x = backend.randn(batch, 8)
        equal(model(x), plain(x) * 3)
    model.factor = 5.0
    equal(model(x), plain(x) * 6)
    assert Base.forward.__get__(model).cache_info().hits >= 3


def test_a_graphed_subclass_calls_a_graphed_super(backend: Backend) -> None:
    """One capture begins inside the other, of one and the same module."""
    kind = cuda_graphed(type("Twice", (Derived,), {"forward": Derived.forward}), sizes=(2, 4))
    model = kind().to(backend.device)
    plain = nn.Linear(8, 8).to(backend.device)
    plain.load_state_dict(model.inner.state_dict())
    for batch in (2, 4, 3, 3, 2):
        x = backend.randn(batch, 8)
        equal(model(x), plain(x) * 3)
        equal(Base.forward(model, x), plain(x))
    assert info(model).hits >= 2


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
    """The compiled part is compiled anew under a capture when it changes."""
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
    """The graph reads the module's own parameters, not those of the call."""
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
    """The tangent is lost; dual tensors need no grad mode."""
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
    """The replica's graph reads the original's parameters."""
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
    """The replica of a decorated class replays graphs that read the original's parameters."""
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
    """The replicated child's forward is bound to the original."""
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
    """The graph of one mode serves the other; only one of the two writes batch norm's state."""
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
    """The graph reads the old weights where an optimiser replaces them (`foreach`, `set_`)."""
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


class Loud(Tensor):
    """A subclass with operations of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        LOUD.append(func)
        return out


LOUD: list[Any] = []


def test_a_tensor_subclass_is_an_argument(net: Net, backend: Backend) -> None:
    """`__torch_function__` is Python, of which a replay runs none."""
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
    """The subclass defines the multiplication, in Python that a replay does not run."""
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
    """The graph computes with the bytes of a weight that was quantised in place."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    replays(model, x)
    old = model.weight.data
    del model.weight
    model.weight = old.as_subclass(Loud)
    LOUD.clear()
    assert type(model(x)) is Loud
    assert LOUD


def test_a_sparse_argument(backend: Backend) -> None:
    """A sparse tensor has no strides and no address to copy from."""
    model = cuda_graphed(lambda x, m: torch.sparse.mm(m, x), sizes=(2, 4))
    for batch in (4, 3, 3):
        x, m = backend.randn(batch, 8), torch.eye(batch, device=backend.device).to_sparse()
        equal(model(x, m), m.to_dense() @ x)
    assert info(model).misses == 3


def test_default_dtype_is_changed(backend: Backend, x: Tensor) -> None:
    """`torch.zeros` in the forward keeps the dtype of the capture."""
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


def test_default_device_is_changed(backend: Backend, x: Tensor) -> None:
    """`torch.zeros` in the forward stays on the device of the capture."""
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
    """The graph goes on with a kernel that eager refuses as not deterministic."""
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
    """Kernels are chosen at capture by a flag that has changed; the forward asks for it, too."""
    get, put, value = FLAGS[name]
    first = get()
    model = cuda_graphed(lambda x: x * (2 if get() == first else 3), sizes=(2,))
    x = backend.randn(2, 8)
    replays(model, x)
    with switched(get, put, value):
        assert get() != first
        same_as_eager(model, x)
    same_as_eager(model, x)


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
    """The graph bakes in the first call's attributes of a dataclass, a tuple or a tensor."""
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
    """Attributes that `torch.compile` sets do not change the result, so graphs may stay."""
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
    """The graph bakes in the attributes of the first of two arguments that compare equal."""
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
    """The result lacks the attributes that the forward sets on it."""
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
    """The result is a copy of the parameter, without its attributes."""
    net = nn.Linear(8, 8).to(backend.device)
    net.weight.scale = 7.0
    model, x = cuda_graphed(lambda x: (net.weight, x * 2), sizes=(2,)), backend.randn(2, 8)
    replays(model, x)
    assert model(x)[0] is net.weight


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_tensor(backend: Backend) -> None:
    """A quantised argument's bytes are copied without its scale, or the capture fails inside torch."""
    x = torch.ones(2, 8)
    quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).to(backend.device)
    x = x.to(backend.device)
    made = cuda_graphed(
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize(), sizes=(2,)
    )
    with pytest.warns(GraphCacheWarning, match="a quantised one is made at .*test_interplay.py"):
        same_as_eager(made, x)
    held = cuda_graphed(lambda x: x + quantised.dequantize(), sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="a quantised one is read at .*test_interplay.py"):
        same_as_eager(held, x)
    passed = cuda_graphed(lambda x, q: x + q.dequantize(), sizes=(2,))
    same_as_eager(passed, x, quantised)
    reason = "a tensor argument that no graph takes: q is quantised; pass it dequantised"
    assert info(passed).eager[reason] == 3


def test_fft_plan_is_dropped(backend: Backend) -> None:
    """The graph reads memory of a plan that was dropped, and launches kernels that are unloaded."""

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


class Methods(nn.Module):
    """A module that keeps graphed forwards of its own in attributes."""

    def __init__(self, device: torch.device, decorate: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, device=device)
        self.decode = decorate(self._decode)
        self.steps = [decorate(self._encode), decorate(partial(_thrice, self))]

    def _decode(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def _encode(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2

    def forward(self, x: Tensor) -> list[Tensor]:
        return [step(x).clone() for step in (self.decode, *self.steps)]


def _thrice(module: Methods, x: Tensor) -> Tensor:
    return module.linear(x) * 3


def _plain(function: Any) -> Any:
    return function


def saved_and_loaded(module: nn.Module) -> nn.Module:
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_module_with_graphed_methods_is_copied(backend: Backend, x: Tensor, name: str) -> None:
    """The copy's methods replay the graphs of the original, with its weights."""
    results = []
    for decorate in (_plain, cuda_graphed):
        torch.manual_seed(0)
        module = Methods(backend.device, decorate)
        other = [module(x), module(x)] and COPIES[name](module)
        for parameter in other.parameters():
            parameter.data = parameter.data * 3
        results.append([each(x) for each in (other, module) * 3])
    equal(results[1], results[0])
    assert info(other.decode).hits > 0


def test_a_shallow_copy_outlives_its_original(backend: Backend, x: Tensor) -> None:
    """The graphs are those of a module that is gone, and the copy shares its forward."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    replays(model, x)
    other, want = copy.copy(model), model(x).clone()
    del model
    gc.collect()
    equal(other(x), want)
    with pytest.raises(GraphCacheError, match="the module of this forward is gone"):
        other.forward(x)


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_graphed_method_is_copied_alone(backend: Backend, x: Tensor, name: str) -> None:
    """The copy of a method is one of a copy of its module."""
    module = Methods(backend.device, cuda_graphed)
    decode = COPIES[name](module.decode)
    assert copy.copy(module.decode) is module.decode
    want = eagerly(module.decode, x) * 2
    for parameter in decode.__self__.parameters():
        parameter.mul_(2)
    for _ in range(3):
        equal(decode(x), want)
    assert info(decode).hits > 0


class Decorated(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, device=device)
        self.kept = self.decode

    @cuda_graphed
    def decode(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_method_of_a_decorated_class_is_kept_in_a_module(
    backend: Backend, x: Tensor, name: str
) -> None:
    """The copy keeps the method of the original."""
    module = Decorated(backend.device)
    module.kept(x)
    other = COPIES[name](module)
    other.linear.weight.mul_(2)
    for each in (other, module):
        for _ in range(3):
            equal(each.kept(x), each.linear(x))
    assert info(other.kept).hits > 0


def _threefold(x: Tensor) -> Tensor:
    return x * 3


class ByScale(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale


@pytest.mark.parametrize(
    "forward", [partialmethod(ByScale.forward, scale=3.0), staticmethod(_threefold)]
)
def test_forward_is_no_plain_method(backend: Backend, x: Tensor, forward: Any) -> None:
    """A new function at each access of the class, or one that takes no instance."""
    net = cuda_graphed(type("Net", (ByScale,), {"forward": forward})())
    for _ in range(3):
        equal(net(x), x * 3)
    assert info(net).hits > 0
