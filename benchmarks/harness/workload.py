"""A module under measurement: how to build it, its inputs, and the scenarios of its calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scenario:
    """The batches that a module is called with.

    Attributes:
        name: "exact", "padded" or "changing".
        batches: the batch of each call, in turn.
        size: the size that all of them are padded to; None: each is a size itself.
    """

    name: str
    batches: tuple[int, ...]
    size: int | None = None

    def size_of(self, batch: int) -> int:
        """Returns the rows of the graph that serves `batch`."""
        return batch if self.size is None else self.size


def three(exact: int, padded: int, changing: tuple[int, ...]) -> tuple[Scenario, ...]:
    """Returns the usual scenarios; padded rows go to the size `exact`."""
    return (
        Scenario("exact", (exact,)),
        Scenario("padded", (padded,), exact),
        Scenario("changing", changing),
    )


@dataclass(frozen=True)
class Workload:
    """One module under measurement, and its use.

    Attributes:
        name: of its record.
        about: one line for the docs.
        build: makes the module on a device; True: a small one, to try the harness.
        inputs: makes random inputs of a batch.
        sizes: what `graphcache` captures.
        scenarios: see there.
        tolerance: largest difference from eager, relative to the largest value of the result.
        pad: `graphcache`'s option of that name.
        fills: what the hand-written arms put into padded rows, by index of the argument; 0 otherwise.
        state: the tensors that a call writes to, or depends on besides its arguments.
        duplicate: makes another module with the same weights and state of its own.
        compiled_in: scenarios of `graphcache` over a compiled forward (each size costs a compilation).
        branches: its graphs have some: products that run side by side.
        recompiled: `torch.compile` takes part in the other scenarios too, and compiles anew for them.
        rounds: blocks of timed calls for each arm.
        pipelined: blocks of unsynchronised calls, and calls in each.
    """

    name: str
    about: str
    build: Callable[[torch.device, bool], nn.Module]
    inputs: Callable[[nn.Module, int, torch.device], Inputs]
    sizes: tuple[int, ...]
    scenarios: tuple[Scenario, ...]
    tolerance: float = 1e-4
    pad: Any = None
    fills: dict[int, int] = field(default_factory=dict)
    state: Callable[[nn.Module], list[Tensor]] = lambda module: list(module.buffers())
    duplicate: Callable[[nn.Module], nn.Module] = copy.deepcopy
    compiled_in: tuple[str, ...] = ("exact",)
    branches: bool = False
    recompiled: bool = True
    rounds: int = 40
    pipelined: tuple[int, int] = (10, 256)
