"""Lists, numbers and host tensors that a forward makes tensors of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import CaptureError, GraphCacheWarning, cuda_graphed
from graphcache.runtime.host_transfers import Constants
from tests.helpers import Backend, equal, hidden, info


@pytest.mark.parametrize("number", [0.5, 3, True, 2 + 1j, float("-inf")], ids=str)
def test_a_tensor_is_made_of_a_number(backend: Backend, number: Any) -> None:
    """As transformers does for its masks: it is filled on the device instead of copied from the host."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.tensor(number, device=x.device)
        return torch.where(x > 0, x, torch.tensor(0.0, dtype=x.dtype, device=x.device)), made.clone()

    model = cuda_graphed(forward, sizes=(2, 4))
    for batch in (4, 2, 3, 3, 4):
        x = backend.randn(batch, 3)
        got, want = model(x), forward(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert got[1].dtype == want[1].dtype
    assert model.cache_info().hits >= 3


def test_a_number_that_is_made_a_tensor_changes(backend: Backend) -> None:
    class Shifts(nn.Module):
        shift = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor(self.shift, device=x.device)

    model = cuda_graphed(Shifts(), sizes=(2,))
    x = backend.randn(2, 3)
    for shift in (1.0, 1.0, 2.0, 2.0):
        model.shift = shift
        assert torch.equal(model(x), x + shift)
    assert model.forward.cache_info().hits == 2


WEIGHTS = [[0.5, 1.0, -2.0, float("nan")], [1, True, -0.0, 3]]

OF_LISTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda x: x * torch.tensor([0.5, 1.0, -0.0, 2.0], device=x.device),
    "as_tensor": lambda x: x * torch.as_tensor((1, 2, 3, 4), device=x.device, dtype=torch.float64),
    "new_tensor": lambda x: x * x.new_tensor([1, 2, 3, 4]),
    "in each other": lambda x: x[:, None] * torch.tensor(WEIGHTS, device=x.device),
    "of a shape": lambda x: x / torch.tensor(x.shape[1:], device=x.device),
    "of a range": lambda x: x + torch.tensor(range(4), device=x.device),
    "made on the host": lambda x: x + torch.arange(4.0).to(x.device, torch.float64),
    "made on the host like it": lambda x: x + torch.tensor([1, 2, 3, 4]).type_as(x),
    "nothing": lambda x: torch.cat([x, torch.tensor([], device=x.device).expand(len(x), 0)], 1),
    "written to": lambda x: x + torch.tensor([1.0, 2, 3, 4], device=x.device).mul_(2),
    "index": lambda x: x[:, [2, -1, 0]],
    "index alone": lambda x: x.t()[[2, 0]].t(),
    "indices": lambda x: x.t()[[2, 0], ..., None].squeeze(-1).t(),
    "write": lambda x: _written(x, (slice(None), [1, 3])),
    "write by a tensor": lambda x: _written(x, (slice(None), torch.arange(2, device=x.device))),
    "write whole numbers": lambda x: x * _written((x * 0).long(), (slice(None), [1, 3])),
    "write by a mask": lambda x: _filled(x, x > 0),
    "as many as rows": lambda x: x + torch.tensor([[float(i)] for i in range(len(x))], device=x.device),
}


def _filled(x: Tensor, index: Any) -> Tensor:
    y = x.clone()
    y[index] = 7.0
    return y


def _written(x: Tensor, index: Any) -> Tensor:
    y = _filled(x, index)
    y[index] += x[index]
    return y


@pytest.mark.parametrize("name", OF_LISTS)
def test_a_list_is_made_a_tensor(backend: Backend, name: str) -> None:
    """A copy from the host, which no graph can hold: it is copied once, and from there on the device."""
    model = cuda_graphed(OF_LISTS[name], sizes=(2, 4))
    others: list[Tensor] = []
    for batch in (4, 2, 3, 4, 2, 3, 2):
        others += [torch.full((size,), 9, device=backend.device) for size in (1, 4, 8, 16) * 8]
        x = backend.randn(batch, 4)
        torch.testing.assert_close(model(x), OF_LISTS[name](x), rtol=0, atol=0, equal_nan=True)
    assert info(model).hits >= 3, info(model)


@pytest.mark.parametrize("data", [[1.0, 2.0, 3.0], 2.0])
def test_a_list_is_made_a_tensor_on_the_default_device(backend: Backend, data: Any) -> None:
    model = cuda_graphed(lambda x: x * torch.tensor(data), sizes=(2, 4))
    with torch.device(backend.device):
        for batch in (4, 2, 3, 4, 3):
            x = backend.randn(batch, 3)
            equal(model(x), x * torch.tensor(data))
    assert info(model).hits >= 3


def test_a_list_that_is_made_a_tensor_is_returned(backend: Backend) -> None:
    """Each call has a tensor of its own."""
    model = cuda_graphed(lambda x: (x + 1, torch.tensor([1.0, 2.0], device=x.device)), sizes=(2,))
    x = backend.randn(2, 3)
    for _ in range(4):
        got = model(x)[1]
        assert got.tolist() == [1.0, 2.0]
        got.zero_()
    assert info(model).hits == 3


def test_a_list_that_is_made_a_tensor_changes(backend: Backend) -> None:
    class Weighs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = [1.0, 2.0, 3.0]
            self.order = [0, 1, 2]

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.order] * torch.tensor(self.weights, device=x.device)

    model = cuda_graphed(Weighs(), sizes=(2,))
    x = backend.randn(2, 3)

    def agrees() -> None:
        for _ in range(3):
            equal(model(x), x[:, model.order] * torch.tensor(model.weights, device=x.device))

    agrees()
    model.weights[1] = 5.0
    agrees()
    model.order = [2, 0, 1]
    agrees()
    model.order.reverse()
    agrees()
    assert info(model).hits >= 8


def test_a_list_that_is_made_a_tensor_is_another_at_each_call(backend: Backend) -> None:
    """The list is out of sight of all guards; the capture meets other values than the first call."""
    numbers = hidden()

    def forward(x: Tensor) -> Tensor:
        items = next(numbers)
        items.append(float(len(items)))
        return x + torch.tensor(items[-1:], device=x.device)

    model = cuda_graphed(forward, sizes=(2,))
    x = backend.randn(2, 3)
    with pytest.warns(GraphCacheWarning, match="other values from the host than at first, at .*py:"):
        equal(model(x), x)
    ran = len(next(numbers))
    for more in range(3):
        equal(model(x), x + float(ran + more))
    assert info(model).hits == 0


def test_a_tensor_on_the_host_is_copied(backend: Backend) -> None:
    """Its values may change where nothing is watched, so it is no constant."""

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.offset.to(x.device)

    model, x = Offsets(), backend.randn(2, 3)
    cuda_graphed(model, sizes=(2,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphCacheWarning)
        for step in range(4):
            model.offset.fill_(step)
            equal(model(x), x + step)


def test_copies_from_the_host_are_told_apart_by_bytes() -> None:
    """On a device other than that of emulation, which holds no values here."""
    there, read = torch.device("meta"), []
    first = Constants(there, on_read=read.append)

    def made() -> list[Tensor]:
        numbers = torch.arange(3)
        other = torch.empty(1, dtype=torch.int32, device=there)
        return [numbers.to(there), numbers.to(torch.float64).to("meta"), numbers.type_as(other)]

    with first:
        tensors = [*made(), torch.tensor([0, 1, 2], device=there), torch.tensor([-0.0], device=there)]
    assert [t.dtype for t in tensors[:3]] == [torch.int64, torch.float64, torch.int32]
    assert {t.device for t in tensors} == {there}
    assert len(read) == 3
    assert len(first.made) == 4  # the list has the bytes of the first
    with Constants(there, first.made):
        assert (
            made()[0] is not first.made[torch.int64, torch.Size([3]), torch.arange(3).numpy().tobytes()]
        )
        with pytest.raises(CaptureError, match="other values from the host"):
            torch.tensor([0.0], device=there)
    with Constants(there) as other:
        assert torch.zeros(2, 3).t().to(there).stride() == (1, 3)
    assert not other.made  # its bytes alone don't tell what it is
