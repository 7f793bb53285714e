"""Traps: graphs keep memory alive that the caller has let go of."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from graphcache import cuda_graphed
from tests.helpers import Backend, close, eagerly, info, replays


class Weighted(nn.Module):
    """Reads parameters, buffers, a list and a closure; writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(3))
        self.count: Tensor
        self.others = [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.lin(x) + self.others[0]


def to_meta(model: Weighted) -> None:
    model.to("meta")
    model.others[0] = model.others[0].to("meta")


def with_other_data(model: Weighted) -> None:
    for tensor in (*model.parameters(), *model.buffers(), *model.others):
        tensor.data = torch.zeros_like(tensor)


def with_other_state(model: Weighted) -> None:
    model.load_state_dict({k: t.clone() for k, t in model.state_dict().items()}, assign=True)
    model.others[:] = [torch.ones(3)]


def without_attributes(model: Weighted) -> None:
    del model.lin, model.count, model.others


WAYS: dict[str, Callable[[Weighted], None]] = {
    "to": to_meta,
    "data": with_other_data,
    "load_state_dict": with_other_state,
    "del": without_attributes,
}


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
@pytest.mark.parametrize("way", WAYS)
def test_weights_are_freed_while_graphs_live(backend: Backend, way: str) -> None:
    """The graph keeps no tensor alive, and reads memory that belongs to somebody else."""
    model = Weighted().to(backend.device)
    model.others[0] = model.others[0].to(backend.device)
    cuda_graphed(model)
    x = backend.randn(2, 3)
    for _ in range(3):
        model(x)
    assert info(model).hits == 2
    tensors = (*model.parameters(), *model.buffers(), *model.others)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
    del tensors
    WAYS[way](model)
    assert all(storage.expired() for storage in storages)


def test_weights_come_back_to_the_same_addresses(backend: Backend) -> None:
    """The allocator gives memory that was freed to the next weights."""
    model = nn.Linear(64, 64, bias=False).to(backend.device)
    cuda_graphed(model, sizes=(2,))
    x = backend.randn(2, 64)
    for way in range(30):
        want = eagerly(model, x)
        for _ in range(17):  # so often that the next capture is worth it
            assert close(model(x), want)
        if way % 3 == 0:
            model.weight = nn.Parameter(backend.randn(64, 64))
        elif way % 3 == 1:
            model.weight.data = backend.randn(64, 64)
        else:
            del model.weight
            gc.collect()
            model.weight = nn.Parameter(backend.randn(64, 64).T)  # another layout, perhaps there
    assert info(model).captures > 0


def test_a_default_of_a_function_is_replaced_and_freed(backend: Backend) -> None:
    """Nothing compares such a tensor, so it is kept."""

    def scaled(x: Tensor, scale: Tensor | None = None) -> Tensor:
        return x if scale is None else x * scale

    scaled.__defaults__ = (torch.ones(3, device=backend.device),)

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled(x)

    model = cuda_graphed(Scaled(), sizes=(2,))
    x = backend.randn(2, 3)
    model(x), model(x)
    assert info(model).hits == 1
    scaled.__defaults__ = (None,)
    crowd: list[Any] = [torch.zeros(3, device=backend.device) for _ in range(100)]
    assert torch.equal(model(x), x)  # as at the capture; see docs/semantics.md
    assert len(crowd) == 100


def test_containers_that_make_a_tensor_at_each_read(backend: Backend) -> None:
    """The tensor of the capture is gone at once, and another one takes its place."""

    class Views(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            return super().__getitem__(key)[:1]

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.views = Views(scale=torch.ones(2, 3, device=backend.device))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.views["scale"]

    model = cuda_graphed(Scaled(), sizes=(2,))
    for value in (1.0, 1.0, 2.0, 3.0):
        dict.__setitem__(model.views, "scale", torch.full((2, 3), value, device=backend.device))
        x = backend.randn(2, 3)
        assert torch.equal(model(x), x * value)


def masked(mask: Tensor) -> Any:
    return lambda x: x * mask


def test_forward_puts_a_tensor_into_a_closure(backend: Backend) -> None:
    """Nothing: the closure goes with the call. Libraries make masks in this way."""
    model = cuda_graphed(lambda x: masked(x > 0)(x), sizes=(2, 4))
    for _ in range(3):
        replays(model, backend.randn(2, 8))
