"""One suite for both runtimes: every test that asks for `backend` runs emulated, and on CUDA too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphPool, config

RUNTIMES = ["emulated", *(["cuda"] if torch.cuda.is_available() else [])]
# "portable": inputs are staged by torch calls, as where the driver offers no better.
BACKENDS = [*RUNTIMES, *(f"{runtime}-portable" for runtime in RUNTIMES)]


@dataclass
class Backend:
    """Where a test runs, and by which launch path its calls are replayed."""

    name: str
    device: torch.device
    launch: str

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def pool(self, **options: bool) -> GraphPool:
        return GraphPool(self.device, **options)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    torch.manual_seed(0)
    name, _, portable = request.param.partition("-")
    with config.switched(config.portable_var, bool(portable)):
        if name == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
            with torch.no_grad():
                yield Backend(name, device, "torch" if portable else "node")
                torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it
            return
        with graphcache.emulate(), torch.no_grad():
            yield Backend(name, torch.device("cpu"), "torch" if portable else "copies")


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


class Counter:
    """Counts in a place that nothing watches: what a forward changes stops its capture."""

    def __init__(self) -> None:
        self._added = hidden()

    def add(self) -> int:
        next(self._added).append(None)
        return int(self)

    def __int__(self) -> int:
        return len(next(self._added))


def hidden(*items: object) -> Hidden:
    """A list, by `next` whenever asked, where nothing looks for it: behind what counts as a library."""
    return Hidden(list(items))


class Hidden:
    __module__ = "torch._hidden"

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __next__(self) -> list[Any]:
        return self.items

    def __reduce__(self) -> Any:
        return hidden, tuple(self.items)


@pytest.fixture
def mlp(backend: Backend) -> MLP:
    return MLP().to(backend.device).eval()


def close(a: Tensor, b: Tensor) -> bool:
    """Equal within what another batch size's kernel may round differently."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def eager(module: nn.Module, *args: object, **kwargs: object) -> Tensor:
    """What the undecorated forward returns; counted nowhere."""
    function, _ = module.forward._wrapped_call()
    with graphcache.disabled():
        return function(*args, **kwargs)
