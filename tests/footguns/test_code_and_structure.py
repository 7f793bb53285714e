"""Traps: code, classes and the structure of a module change after the capture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import graphcache
from graphcache import cuda_graphed
from tests.helpers import Backend, equal, in_step, replays, same_as_eager, survives
from tests.models import Net

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def test_submodule_forward_is_patched_on_its_class(
    backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old forward's kernels are all that ever runs. Accelerators patch whole models this way."""

    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = cuda_graphed(nn.Sequential(Inner(8, 8)).to(backend.device), sizes=(2,))
    survives(model, lambda: monkeypatch.setattr(Inner, "forward", lambda self, x: x * 2), x)


def test_submodule_forward_is_patched_on_the_instance(net: Net, x: Tensor) -> None:
    """The old forward's kernels are all that ever runs."""
    survives(net, lambda: setattr(net.up, "forward", lambda x: x * 2), x)
    survives(net, lambda: delattr(net.up, "forward"), x)


def test_a_method_that_the_forward_calls_is_patched(
    backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old method's kernels are all that ever runs."""

    class Methodical(nn.Module):
        def step(self, x: Tensor) -> Tensor:
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.step(x)

    model = cuda_graphed(Methodical(), sizes=(2,))
    survives(model, lambda: monkeypatch.setattr(Methodical, "step", lambda self, x: x * 3), x)
    survives(model, lambda: setattr(model, "step", lambda x: x * 4), x)


def test_module_gets_another_class(backend: Backend, x: Tensor) -> None:
    """The old class's kernels are all that ever runs. Quantisers assign `__class__`."""

    model = Net(backend.device)
    model.up.__class__ = type("Linear", (nn.Linear,), {})
    cuda_graphed(model, sizes=(2,))
    other = type("Other", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) * 2})
    survives(model, lambda: setattr(model.up, "__class__", other), x)


def test_class_decorated_module_gets_another_class(backend: Backend, x: Tensor) -> None:
    """The graph of the decorated class serves a module that has left that class."""

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
    """The graph runs the old layers; torch knows of no children in a plain list."""

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
    """The graph has no dropout; the root's own mode has not changed."""
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
    """The `negative_slope`, `p` or `eps` of the capture is baked in."""
    model = nn.Sequential(nn.LeakyReLU(0.1), nn.LayerNorm(8)).to(backend.device)
    cuda_graphed(model, sizes=(2,))
    survives(model, lambda: setattr(model[0], "negative_slope", 0.5), x)
    survives(model, lambda: setattr(model[1], "eps", 10.0), x)
    survives(model, lambda: setattr(model[1], "normalized_shape", (2, 8)), x)


def test_a_parametrization_is_registered(net: Net, x: Tensor) -> None:
    """The graph reads the weight, which has become a property of another class."""

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
    """The graph reads the old weight; direction and magnitude are parameters of their own now."""
    replays(net, x)
    parametrizations.weight_norm(net.up)
    same_as_eager(net, x)
    survives(net, lambda: net.up.parametrizations.weight.original0.mul_(2), x)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_old_weight_norm_is_registered(net: Net, x: Tensor) -> None:
    """The graph reads the old weight; a hook computes the weight before each call."""
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
    """Padded rows and comparisons advance a power iteration that every call advances once."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))).to(backend.device)
    twin = copy.deepcopy(model)
    cuda_graphed(model, sizes=(2,))
    for mode in (True, False, True):
        model.train(mode)
        twin.train(mode)
        for _ in range(4):
            in_step(model, twin, backend.randn(2, 8))


def test_pruning_is_applied(net: Net, x: Tensor) -> None:
    """The graph reads the unpruned weight; a hook computes another one before each call."""
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
    """The graph runs the old child, which was swapped for a class with packed weights."""

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
