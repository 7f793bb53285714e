"""Traps: Python values that a forward reads change after the capture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, replays, same_as_eager, survives
from tests.models import Net

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


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
    """The number of the capture is baked in; the array changes in place, so no object is replaced."""
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
    """The value of the capture is baked in; the forward never names the attribute behind it."""

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
    """The value of the capture is baked in; no code spells the attribute's name."""

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
    """The values of the capture are baked in; the default is the same list with other values."""
    scales = [2.0]

    def forward(x: Tensor, scales: list[float] = scales) -> Tensor:
        return x * scales[0]

    model = cuda_graphed(forward, sizes=(2,))
    replays(model, x)
    scales[0] = 3.0
    same_as_eager(model, x)


def test_a_list_argument_is_changed_in_place(backend: Backend, x: Tensor) -> None:
    """The numbers of the capture are baked in; the argument is the same list."""
    model = cuda_graphed(lambda x, scales: x * scales[0], sizes=(2,))
    scales = [2.0]
    replays(model, x, scales)
    scales[0] = 3.0
    same_as_eager(model, x, scales)
