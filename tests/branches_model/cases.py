"""Branches on a model of a CUDA device: which products get one, and that no two kernels race.

`tests/test_branches_model.py` runs this in a process of its own, as the model takes the place of CUDA.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache import _C

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
HERE = Path(__file__).parent
MAIN, SIDES = 1, (11, 12, 13)
PROGRAMS, STEPS = int(os.environ.get("BRANCHES_MODEL_PROGRAMS", "3000")), 60
WIDTH = 16


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model: its driver is found where torch's would be, by the name of the library."""
    folder = tmp_path_factory.mktemp("model")
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


class Model:
    """One capture on the model."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.kernel = device.kernel
        self.reset(0)

    def reset(self, seed: int, *, waits: bool = True) -> None:
        self._device.reset(seed, waits)
        self._device.use_stream(MAIN)

    def tensor(self, rows: int = 4, width: int = WIDTH) -> Tensor:
        made: Tensor = self._device.make([rows, width])
        return made

    def weights(self, count: int) -> list[Tensor]:
        return [self.tensor(WIDTH) for _ in range(count)]

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

    def races(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = self._device.examine()[0]
        return found

    def unordered(self) -> int:
        return int(self._device.examine()[1])


@pytest.fixture
def model(device: Any) -> Iterator[Model]:
    found = Model(device)
    with torch.no_grad():
        yield found
    assert found.races() == []


def test_products_of_one_argument_run_side_by_side(model: Model) -> None:
    x, (a, b, c) = model.tensor(), model.weights(3)
    with model.captured() as branches:
        x @ a, x @ b, x @ c
    assert branches.count == 2
    assert model.unordered() >= 3


def test_an_activation_comes_between(model: Model) -> None:
    x, (a, b) = model.tensor(), model.weights(2)
    with model.captured() as branches:
        F.silu(x @ a) * (x @ b)
    assert branches.count == 1


def test_a_kernel_that_nobody_sees_ends_a_run(model: Model) -> None:
    x, (a, b) = model.tensor(), model.weights(2)
    with model.captured() as branches:
        first = x @ a
        model.kernel(first, first)
        x @ b
    assert branches.count == 0


def test_another_stream_is_left_alone(model: Model) -> None:
    x, (a, b) = model.tensor(), model.weights(2)
    with model.captured() as branches:
        first = torch.relu(x)
        with model.another_stream():
            (a @ a, a @ b)
        first @ a
    assert branches.count == 0


@pytest.mark.parametrize(("rows", "count"), [(256, 1), (257, 0)])
def test_a_product_of_many_rows_is_left_alone(model: Model, rows: int, count: int) -> None:
    x, (a, b) = model.tensor(rows), model.weights(2)
    with model.captured() as branches:
        x @ a, x @ b
    assert branches.count == count


def test_what_comes_between_is_not_large(model: Model) -> None:
    x, large, (a, b) = model.tensor(), model.tensor(5 << 10, 1 << 10), model.weights(2)
    with model.captured() as branches:
        x @ a, torch.relu(large), x @ b
    assert branches.count == 0


def test_what_is_no_matrix_raises_as_ever(model: Model) -> None:
    x, (a, b) = model.tensor(), model.weights(2)
    with model.captured() as branches:
        for wrong in ((x[0, 0], a), (x, a[0, 0]), (x, a[:3])):
            with pytest.raises((RuntimeError, IndexError)):
                torch.mm(*wrong)
        x @ a, x @ b
    assert branches.count == 1


def test_a_backward_is_left_alone(model: Model) -> None:
    x, (a, b) = model.tensor().requires_grad_(), model.weights(2)
    with model.captured() as branches, torch.enable_grad():
        x @ a, x @ b
    assert branches.count == 0


def test_a_tangent_is_left_alone(model: Model) -> None:
    x, along, weights = model.tensor(), model.tensor(), model.weights(4)
    with model.captured() as branches, torch.enable_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, along)
        a, b = map(forward_ad.make_dual, weights[:2], weights[2:])
        torch.mm(dual, a), torch.mm(dual, b)
    assert branches.count == 0


class Sums(TorchDispatchMode):
    """Adds up what products return."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.total, self._model = model.tensor(), model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._model.kernel(result, self.total)
        return result


def test_a_dispatch_mode_is_left_alone(model: Model) -> None:
    x, (a, b) = model.tensor(), model.weights(2)
    with model.captured() as branches, Sums(model):
        torch.mm(x, a), torch.mm(x, b)
    assert branches.count == 0


@contextmanager
def autocast() -> Iterator[None]:
    # torch.autocast asks for a real device.
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("product", [torch.mm, torch.matmul])
def test_casts_are_seen(model: Model, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, (a, b) = model.tensor(), model.weights(2)
    with model.captured() as branches, autocast():
        product(x, a), product(x, b)
    assert branches.count == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_cast_that_is_kept_is_waited_for(model: Model, seed: int) -> None:
    model.reset(seed)
    x, y, weight = model.tensor(), model.tensor(), model.weights(1)[0].requires_grad_()
    with model.captured(), autocast():
        torch.mm(x, weight), torch.mm(y, weight)


def run(model: Model, chance: random.Random) -> int:
    """Runs a random program; returns its branches."""
    found, live = model.weights(4), [model.tensor()]

    def product_with_out(a: Tensor, weight: Tensor) -> Tensor:
        out = chance.choice(live) if chance.random() < 0.4 else model.tensor()
        out = model.tensor() if out.data_ptr() == a.data_ptr() else out
        return torch.mm(a, weight, out=out)

    def kernel(a: Tensor, weight: Tensor) -> Tensor:
        out = model.tensor()
        model.kernel(a, out)
        return out

    def wrong(a: Tensor, weight: Tensor) -> Tensor:
        with pytest.raises(RuntimeError, match="not the shapes"):
            torch.mm(a, weight[:3])
        return a

    steps: list[tuple[float, Callable[[Tensor, Tensor], Tensor]]] = [
        (30, torch.mm),
        (8, lambda a, weight: torch.addmm(chance.choice(live), a, weight)),
        (14, product_with_out),
        (4, lambda a, weight: torch.addmm(a, a, weight, out=model.tensor())),
        (10, lambda a, weight: torch.relu(a)),
        (4, lambda a, weight: a * chance.choice(live)),
        (3, lambda a, weight: a + 1.5),
        (3, lambda a, weight: torch.cumsum(a, 0)),
        (3, lambda a, weight: a.add_(chance.choice(live))),
        (5, kernel),
        (3, wrong),
    ]
    weights, kinds = zip(*steps, strict=True)
    with model.captured() as branches:
        for _ in range(STEPS):
            (kind,) = chance.choices(kinds, weights)
            live.append(kind(chance.choice(live), chance.choice(found)))
            while len(live) > 1 and chance.random() < 0.4:
                live.pop(chance.randrange(len(live)))
    return branches.count


def test_no_two_kernels_of_random_programs_race(model: Model) -> None:
    branches = 0
    for seed in range(PROGRAMS):
        model.reset(seed)
        branches += run(model, random.Random(seed))
        assert model.races() == [], seed
    assert branches > PROGRAMS


def test_races_are_found(model: Model) -> None:
    racing = 0
    for seed in range(100):
        model.reset(seed, waits=False)
        run(model, random.Random(seed))
        racing += bool(model.races())
    assert racing > 90
    model.reset(0)
