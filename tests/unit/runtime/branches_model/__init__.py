"""The device that branches are captured on: a GPU, or a model of one where torch has no CUDA."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import cpp_extension

from graphcache import _C
from graphcache.runtime.branches import Streams
from tests.helpers import ROOT

HERE = Path(__file__).parent
ON_MODEL = "BRANCHES_MODEL" in os.environ  # instead of a GPU
MAIN, SIDES = 1, (11, 12, 13)
ROWS = 4

Program = Callable[[Tensor, list[Tensor]], list[Tensor]]


class Device(Protocol):
    """The device of a test.

    Attributes:
        programs: how many random ones are worth their time.
    """

    programs: int

    def ready(self) -> AbstractContextManager[object]:
        """Begins a test, and ends it."""
        ...

    def tensor(self, rows: int = ROWS, width: int = ...) -> Tensor:
        """Returns what a kernel may read."""
        ...

    def empty(self) -> Tensor:
        """Returns what a kernel may write."""
        ...

    def weights(self, count: int) -> list[Tensor]:
        """Returns square matrices."""
        ...

    def kernel(self, read: Tensor, written: Tensor) -> None:
        """Launches what no rule of branches knows."""
        ...

    def another_stream(self) -> AbstractContextManager[object]:
        """Makes another stream the current one, which begins where this one is, and ends there."""
        ...

    def captured(self) -> AbstractContextManager[_C.Branches]:
        """Captures the block."""
        ...

    def prove(self, program: Program, seed: int) -> int:
        """Proves that a program is captured right, and returns its branches."""
        ...


class Cuda:
    """A GPU: what was captured is replayed, and returns what the program does by itself."""

    programs = 200
    _width = 512

    def __init__(self) -> None:
        self._streams = Streams(torch.device("cuda", torch.cuda.current_device()))
        torch.manual_seed(0)
        self.tensor() @ self.weights(1)[0]  # makes the handle of cuBLAS, which no capture may

    def ready(self) -> AbstractContextManager[object]:
        return nullcontext()

    def tensor(self, rows: int = ROWS, width: int = _width) -> Tensor:
        return torch.randn(rows, width, device="cuda")

    def empty(self) -> Tensor:
        return torch.empty(ROWS, self._width, device="cuda")

    def weights(self, count: int) -> list[Tensor]:
        return [self.tensor(self._width) / self._width**0.5 for _ in range(count)]

    def kernel(self, read: Tensor, written: Tensor) -> None:
        torch.sin(read, out=written)

    @contextmanager
    def another_stream(self) -> Iterator[None]:
        here, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(here)
        with torch.cuda.stream(other):
            yield
        here.wait_stream(other)

    @contextmanager
    def _graph(self) -> Iterator[tuple[torch.cuda.CUDAGraph, _C.Branches]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._streams.main), self._streams.branches() as branches:
            yield graph, branches

    @contextmanager
    def captured(self) -> Iterator[_C.Branches]:
        with self._graph() as (graph, branches):
            yield branches
        graph.replay()
        torch.cuda.synchronize()

    def prove(self, program: Program, seed: int) -> int:
        torch.manual_seed(seed)
        x, weights = self.tensor(), self.weights(4)
        before = x.clone()
        wanted = [tensor.clone() for tensor in program(x, weights)]
        assert any(tensor.isfinite().all() for tensor in wanted)
        with self._graph() as (graph, branches):
            found = program(x, weights)
        for _ in range(3):
            x.copy_(before)
            graph.replay()
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        return branches.count


class Model:
    """A model of a GPU, which notes who waits for whom: no two kernels may race.

    Attributes:
        waits: whether a stream that is to wait for an event does.
    """

    programs = int(os.environ.get("BRANCHES_PROGRAMS", "3000"))
    _width = 16

    def __init__(self) -> None:
        self._device = _built(ROOT / "build" / "branches_model")
        self.waits = True

    @contextmanager
    def ready(self) -> Iterator[None]:
        self.reset(0)
        yield
        assert self.races() == []

    def reset(self, seed: int) -> None:
        """Begins again; `seed`: which of its operators take memory for themselves."""
        self._device.reset(seed, self.waits)
        self._device.use_stream(MAIN)

    def tensor(self, rows: int = ROWS, width: int = _width) -> Tensor:
        made: Tensor = self._device.make([rows, width])
        return made

    def empty(self) -> Tensor:
        return self.tensor()

    def weights(self, count: int) -> list[Tensor]:
        return [self.tensor(self._width) for _ in range(count)]

    def kernel(self, read: Tensor, written: Tensor) -> None:
        self._device.kernel(read, written)

    @contextmanager
    def another_stream(self) -> Iterator[None]:
        self._device.use_stream(MAIN + 1)
        yield
        self._device.use_stream(MAIN)

    @contextmanager
    def captured(self) -> Iterator[_C.Branches]:
        first = self.tensor()
        self.kernel(first, first)  # the staging node
        main, *sides = (
            torch.Stream(stream_id=number, device_index=0, device_type=1) for number in (MAIN, *SIDES)
        )
        with _C.Branches(MAIN, main, sides) as branches:
            yield branches
        assert self._device.use_stream(MAIN) == MAIN

    def prove(self, program: Program, seed: int) -> int:
        self.reset(seed)
        with self.captured() as branches:
            program(self.tensor(), self.weights(4))
        assert self.races() == [], seed
        return branches.count

    def races(self) -> list[tuple[int, int]]:
        """Returns kernels without an order, of which one writes what the other uses."""
        found: list[tuple[int, int]] = self._device.examine()[0]
        return found

    def unordered(self) -> int:
        """Returns how many pairs of kernels have no order."""
        return int(self._device.examine()[1])


@cache
def here() -> Device:
    """Returns what there is."""
    return Model() if ON_MODEL else Cuda()


def _built(folder: Path) -> Any:
    # A folder that stays: only what has changed is compiled again.
    folder.mkdir(parents=True, exist_ok=True)
    # Its driver is found where torch's would be, by the name of the library.
    name = "libcuda.so.1"
    compiler = [*os.environ.get("CXX", "c++").split(), "-std=c++17", "-O1", "-shared", "-fPIC"]
    target = ["-o", str(folder / name), f"-Wl,-soname,{name}"]
    subprocess.run([*compiler, str(HERE / "driver.cpp"), *target], check=True)
    return cpp_extension.load(
        "branches_model",
        [str(HERE / "device.cpp")],
        build_directory=str(folder),
        extra_cflags=["-O1", "-g0"],
        extra_ldflags=[f"-L{folder}", f"-l:{name}", f"-Wl,-rpath,{folder}"],
    )
