"""Modules and argument types that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.helpers import Counter


class MLP(nn.Module):
    """Counts how often its forward really runs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.runs = Counter()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.runs.add()
        return self.down(torch.relu(self.up(x)))


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


class Steps(nn.Module):
    """Writes to a buffer, by an operation that is given."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(width))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.state, x)
        return x + self.state


@dataclass
class Scaled:
    x: Tensor
    scale = 1.0  # without an annotation: no field


class Counting(MLP):
    """Writes to a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x) + self.steps


class Cached(nn.Module):
    """A KV cache as in a decode step: one row of state for each slot, and a counter of steps."""

    def __init__(self, slots: int = 8) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(slots + 1, 2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        self.steps.add_(1)
        self.cache[slots] = self.cache[slots] + x
        return self.cache[slots] * 2


Forward = Callable[[Any, Tensor], Tensor]


class Slotted(nn.Module):
    __slots__ = ("place",)


def model_of(forward: Forward, held: Any) -> nn.Module:
    class Model(Slotted):
        pass

    Model.forward = forward
    model = Model()
    model.held = held
    model.place = 2.0
    return model
