"""Traps: what a forward reads is known by weak references, and dies."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, eagerly, equal, info, outcome


class Config:
    def __init__(self) -> None:
        self.scale: Any = 2.0

    def __call__(self) -> Any:
        return self.scale

    def method(self) -> Any:
        return self.scale


class Slots:
    __slots__ = ("__weakref__", "scale")

    def __init__(self) -> None:
        self.scale = 2.0


class ConfigModule(nn.Module):
    scale = 2.0


class Items(set):  # type: ignore[type-arg]
    scale = 2.0


def of(reference: Any) -> Any:
    found = reference()
    return -1.0 if found is None else found.scale


def called(reference: Any) -> Any:
    found = reference()
    return -1.0 if found is None else found()


def total(items: Any) -> Any:
    return sum(item.scale for item in items)


# The object, what is made of it, and what the forward reads of that.
HOLDERS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "proxy": (Config, weakref.proxy, lambda held: held.scale),
    "proxy of slots": (Slots, weakref.proxy, lambda held: held.scale),
    "proxy of a module": (ConfigModule, weakref.proxy, lambda held: held.scale),
    "proxy that is called": (Config, weakref.proxy, lambda held: held()),
    "ref": (Config, weakref.ref, of),
    "ref of slots": (Slots, weakref.ref, of),
    "ref of a set": (Items, weakref.ref, lambda held: 3.0 if held() is None else 5.0),
    "ref with a callback": (Config, lambda made: weakref.ref(made, lambda _: None), of),
    "method": (Config, lambda made: weakref.WeakMethod(made.method), called),
    "set": (Config, lambda made: weakref.WeakSet([made]), total),
    "size of a set": (Config, lambda made: weakref.WeakSet([made]), len),
    "values": (Config, lambda made: weakref.WeakValueDictionary(key=made), lambda held: len(held) + 1),
    "keys": (
        Config,
        lambda made: weakref.WeakKeyDictionary({made: 4.0}),
        lambda held: sum(held.values()),
    ),
    "finalize": (Config, lambda made: weakref.finalize(made, int), lambda held: held.alive + 1),
}


class Scaled(nn.Module):
    def __init__(self, held: Any, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.__dict__.update(held=held, read=read)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.read(self.held)


@pytest.mark.parametrize("name", HOLDERS)
def test_object_behind_a_weak_reference_dies(backend: Backend, name: str) -> None:
    """Replays with the values of an object that is gone; eager raises or reads something else."""
    kind, hold, read = HOLDERS[name]
    made = kind()
    model = cuda_graphed(Scaled(hold(made), read), sizes=(2,))

    def check() -> None:
        x = backend.randn(2, 3)
        want, got = outcome(eagerly, model, x), outcome(model, x)
        if isinstance(want, Exception):
            assert type(got) is type(want), got
        else:
            equal(got, want)

    for _ in range(3):
        check()
    assert info(model).hits == 2
    if not isinstance(made, Items):
        made.scale = 7.0
        check(), check()
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None
    crowd = [Config() for _ in range(500)]  # perhaps at the same address
    for _ in range(3):
        check()
    assert len(crowd) == 500


def test_tensor_behind_a_weak_reference_is_not_kept(backend: Backend) -> None:
    """Replays the branch that was taken while the tensor lived."""
    made = torch.ones(3, device=backend.device)
    model = cuda_graphed(
        Scaled(weakref.ref(made), lambda held: 5.0 if held() is None else 3.0), sizes=(2,)
    )
    x = backend.randn(2, 3)
    for _ in range(3):
        assert torch.equal(model(x), x * 3)
    assert info(model).hits == 2
    del made
    assert torch.equal(model(x), x * 5)
