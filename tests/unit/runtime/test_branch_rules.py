"""The rules of branches: which products get one, and that they are in nobody's way.

On a GPU, or on a model of one: `test_branches_model.py` runs this there, in a process of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.runtime.branches_model import ON_MODEL, Device, here

pytestmark = [
    pytest.mark.skipif(
        not (ON_MODEL or torch.cuda.is_available()), reason="no CUDA device: see test_branches_model.py"
    ),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


STEPS = 60


@pytest.fixture
def device() -> Iterator[Device]:
    with here().ready(), torch.no_grad():
        yield here()


def test_products_of_one_argument_run_side_by_side(device: Device) -> None:
    x, (a, b, c) = device.tensor(), device.weights(3)
    with device.captured() as branches:
        x @ a, x @ b, x @ c
    assert branches.count == 2


def test_an_activation_comes_between(device: Device) -> None:
    x, (a, b) = device.tensor(), device.weights(2)
    with device.captured() as branches:
        F.silu(x @ a) * (x @ b)
    assert branches.count == 1


def test_a_kernel_that_nobody_sees_ends_a_run(device: Device) -> None:
    x, (a, b) = device.tensor(), device.weights(2)
    with device.captured() as branches:
        first = x @ a
        device.kernel(first, first)
        x @ b
    assert branches.count == 0


def test_another_stream_is_left_alone(device: Device) -> None:
    x, (a, b) = device.tensor(), device.weights(2)
    with device.captured() as branches:
        first = torch.relu(x)
        with device.another_stream():
            (a @ a, a @ b)
        first @ a
    assert branches.count == 0


@pytest.mark.parametrize(("rows", "count"), [(256, 1), (257, 0)])
def test_a_product_of_many_rows_is_left_alone(device: Device, rows: int, count: int) -> None:
    x, (a, b) = device.tensor(rows), device.weights(2)
    with device.captured() as branches:
        x @ a, x @ b
    assert (branches.count, branches.large) == (count, 2 * (1 - count))


def test_large_operator_between_products_ends_branches(device: Device) -> None:
    x, large, (a, b) = device.tensor(), device.tensor(5 << 10, 1 << 10), device.weights(2)
    with device.captured() as branches:
        x @ a, torch.relu(large), x @ b
    assert (branches.count, branches.large) == (0, 1)


def test_product_of_no_matrix_raises_as_in_eager(device: Device) -> None:
    x, (a, b) = device.tensor(), device.weights(2)
    with device.captured() as branches:
        for wrong in ((x[0, 0], a), (x, a[0, 0]), (x, a[:3])):
            with pytest.raises((RuntimeError, IndexError)):
                torch.mm(*wrong)
        x @ a, x @ b
    assert branches.count == 1


def test_a_backward_is_left_alone(device: Device) -> None:
    x, (a, b) = device.tensor().requires_grad_(), device.weights(2)
    with device.captured() as branches, torch.enable_grad():
        x @ a, x @ b
    assert branches.count == 0


def test_a_tangent_is_left_alone(device: Device) -> None:
    x, along, weights = device.tensor(), device.tensor(), device.weights(4)
    with device.captured() as branches, torch.enable_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, along)
        a, b = map(forward_ad.make_dual, weights[:2], weights[2:])
        torch.mm(dual, a), torch.mm(dual, b)
    assert branches.count == 0


class Sums(TorchDispatchMode):
    """Adds up what products return."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.total, self._device = device.tensor(), device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._device.kernel(result, self.total)
        return result


def test_a_dispatch_mode_is_left_alone(device: Device) -> None:
    x, (a, b) = device.tensor(), device.weights(2)
    with device.captured() as branches, Sums(device):
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
def test_casts_are_seen(device: Device, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, (a, b) = device.tensor(), device.weights(2)
    with device.captured() as branches, autocast():
        product(x, a), product(x, b)
    assert branches.count == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_cast_that_is_kept_is_waited_for(device: Device, seed: int) -> None:
    def program(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        weight = weights[0].detach().requires_grad_()
        with autocast():
            return [torch.mm(x, weight), torch.mm(weights[1][:4], weight)]

    assert device.prove(program, seed) == 0


def random_program(device: Device, seed: int) -> int:
    """Captures one; returns its branches."""

    def program(x: Tensor, found: list[Tensor]) -> list[Tensor]:
        chance, live = random.Random(seed), [x]

        def product_with_out(a: Tensor, weight: Tensor) -> Tensor:
            out = chance.choice(live) if chance.random() < 0.4 else device.empty()
            out = device.empty() if out.data_ptr() == a.data_ptr() else out
            return torch.mm(a, weight, out=out)

        def kernel(a: Tensor, weight: Tensor) -> Tensor:
            out = device.empty()
            device.kernel(a, out)
            return out

        def wrong(a: Tensor, weight: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="shapes"):
                torch.mm(a, weight[:3])
            return a

        steps: list[tuple[float, Callable[[Tensor, Tensor], Tensor]]] = [
            (30, torch.mm),
            (8, lambda a, weight: torch.addmm(chance.choice(live), a, weight)),
            (14, product_with_out),
            (4, lambda a, weight: torch.addmm(a, a, weight, out=device.empty())),
            (10, lambda a, weight: torch.relu(a)),
            (4, lambda a, weight: a * chance.choice(live)),
            (3, lambda a, weight: a + 1.5),
            (3, lambda a, weight: torch.cumsum(a, 0)),
            (3, lambda a, weight: a.add_(chance.choice(live))),
            (5, kernel),
            (3, wrong),
        ]
        weights, kinds = zip(*steps, strict=True)
        for _ in range(STEPS):
            (kind,) = chance.choices(kinds, weights)
            live.append(kind(chance.choice(live), chance.choice(found)))
            while len(live) > 1 and chance.random() < 0.4:
                live.pop(chance.randrange(len(live)))
        return live

    return device.prove(program, seed)


def test_random_programs_are_captured_right(device: Device) -> None:
    branches = sum(random_program(device, seed) for seed in range(device.programs))
    assert branches > device.programs
