"""Traps: hooks of modules, and of the modules inside them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, wraps
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import (
    Backend,
    eagerly,
    equal,
    graphed_twin,
    in_step,
    info,
    replays,
    same_as_eager,
    survives,
)
from tests.models import Net

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def hooked(model: nn.Module, x: Tensor, seen: list[Any], handle: Any, times: int = 3) -> None:
    """The hook runs at every call, doubling, until it is removed."""
    for _ in range(times):
        before = len(seen)
        model(x)
        assert len(seen) == before + 1
    handle.remove()
    model(x)
    assert len(seen) == times


def test_a_hook_of_its_own(net: Net, x: Tensor) -> None:
    """The hook, added after the capture, is not called; it changes the result."""
    replays(net, x)
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(1)
        return out * 2

    handle = net.register_forward_hook(hook)
    equal(net(x), eagerly(net, x) * 2)
    seen.clear()
    hooked(net, x, seen, handle)
    replays(net, x)


def test_a_pre_hook_of_its_own(net: Net, x: Tensor) -> None:
    """The hook is not called; it changes the arguments."""
    replays(net, x)
    with net.register_forward_pre_hook(lambda module, args: (args[0] + 1,)):
        for _ in range(3):
            equal(net(x), eagerly(net, x + 1))
    replays(net, x)


def test_a_hook_of_a_submodule(net: Net, x: Tensor) -> None:
    """The hook is not called; it changes the result of the submodule."""
    replays(net, x)
    want = eagerly(net, x)
    with net.up.register_forward_hook(lambda module, args, out: out * 3):
        same_as_eager(net, x)
        assert not torch.equal(net(x), want)
    replays(net, x)


def test_a_hook_of_a_submodule_that_was_there_before(net: Net, x: Tensor) -> None:
    """The hook's operations are captured, and its Python is never called again."""
    seen: list[Any] = []
    handle = net.up.register_forward_hook(lambda *_: seen.append(1))
    hooked(net, x, seen, handle)
    replays(net, x)


def test_a_hook_of_every_module(net: Net, x: Tensor) -> None:
    """A global hook, such as a profiler's, is not called."""
    replays(net, x)
    seen: list[Any] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        net(x)
        assert net.up in seen
        assert net in seen
    replays(net, x)


def test_a_hook_with_kwargs_on_a_submodule_of_a_closure(backend: Backend, x: Tensor) -> None:
    """The hook is not called; its module is no child of the decorated one."""
    inner = nn.Linear(8, 8).to(backend.device)
    model = cuda_graphed(lambda x: inner(x) * 2, sizes=(2,))
    replays(model, x)
    with inner.register_forward_hook(lambda module, args, kwargs, out: out + 1, with_kwargs=True):
        same_as_eager(model, x)
    replays(model, x)


class Scaling:
    """Hooks with state of their own, which they read."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.table = {"shift": torch.ones(8)}

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.factor

    def method(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.factor

    def before(self, module: nn.Module, args: Any) -> Any:
        return (args[0] * self.factor,)

    def before_with_kwargs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0] * self.factor,), kwargs

    def with_kwargs(self, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        return out * self.factor + len(kwargs)


FACTOR = 2.0


def by_global(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * FACTOR


def by_default(module: nn.Module, args: Any, out: Tensor, held: Any = Scaling(2.0)) -> Tensor:  # noqa: B008
    return out * held.factor


def scaled_by(scaling: Scaling, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * scaling.factor


def by_closure(scaling: Scaling) -> Any:
    return lambda module, args, out: out * scaling.factor


def wrapped(scaling: Scaling) -> Any:
    @wraps(by_global)
    def hook(*args: Any) -> Any:
        return by_global(*args) * scaling.factor

    return hook


KINDS: dict[str, Callable[[nn.Module, Scaling], Any]] = {
    "object": lambda m, s: m.register_forward_hook(s),
    "method": lambda m, s: m.register_forward_hook(s.method),
    "closure": lambda m, s: m.register_forward_hook(by_closure(s)),
    "partial": lambda m, s: m.register_forward_hook(partial(scaled_by, s)),
    "wrapper": lambda m, s: m.register_forward_hook(wrapped(s)),
    "always": lambda m, s: m.register_forward_hook(s.method, always_call=True),
    "first": lambda m, s: m.register_forward_hook(s.method, prepend=True),
    "kwargs": lambda m, s: m.register_forward_hook(s.with_kwargs, with_kwargs=True),
    "before": lambda m, s: m.register_forward_pre_hook(s.before),
    "before, kwargs": lambda m, s: m.register_forward_pre_hook(s.before_with_kwargs, with_kwargs=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_inside_computes(net: Net, x: Tensor, kind: str) -> None:
    """The hook's operations are captured, and what they read is never read again."""
    scaling = Scaling(2.0)
    handle = KINDS[kind](net.up, scaling)
    survives(net, lambda: setattr(scaling, "factor", 3.0), x)
    replays(net, x)
    survives(net, handle.remove, x)
    replays(net, x)


def test_a_hook_inside_reads_a_global(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of the capture stays."""
    net.up.register_forward_hook(by_global)
    survives(net, lambda: monkeypatch.setitem(by_global.__globals__, "FACTOR", 3.0), x)
    replays(net, x)


def test_a_hook_inside_reads_its_default(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of the capture stays."""
    net.up.register_forward_hook(by_default)
    scaling = (by_default.__defaults__ or ())[0]
    survives(net, lambda: monkeypatch.setattr(scaling, "factor", 3.0), x)
    replays(net, x)


COLLECTOR: ContextVar[Any] = ContextVar("collector", default=None)


def collecting(module: nn.Module, args: Any, out: Tensor) -> Any:
    found = COLLECTOR.get()
    if found is not None:
        found.append(out)
        return out * 2


def test_a_hook_inside_sleeps_until_somebody_collects(net: Net, x: Tensor) -> None:
    """The hook sleeps for good, as those of libraries do that collect hidden states on request."""
    net.up.register_forward_hook(collecting)
    replays(net, x)
    for _ in range(8):
        found: list[Tensor] = []
        token = COLLECTOR.set(found)
        got = net(x)
        assert len(found) == 1
        equal(got, eagerly(net, x))
        COLLECTOR.reset(token)
        same_as_eager(net, x)
        assert not torch.equal(got, net(x))
    same_as_eager(net, x, times=16)
    replays(net, x)


class Collecting(nn.Module):
    """Collects for itself, by the hooks of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.up.register_forward_hook(collecting)

    def forward(self, x: Tensor, collects: bool = False) -> Any:
        token = COLLECTOR.set([] if collects else None)
        try:
            out = self.up(x)
            found = COLLECTOR.get()
            return (out, *found) if collects else out
        finally:
            COLLECTOR.reset(token)


def test_a_forward_collects_by_hooks_inside(backend: Backend, x: Tensor) -> None:
    """The collector lives only inside the call, so that a replay may leave it out."""
    model = cuda_graphed(Collecting().to(backend.device).eval(), sizes=(2,))
    replays(model, x)
    replays(model, x, collects=True)
    replays(model, x)
    assert info(model).captures == 2


def test_a_hook_inside_is_replaced(net: Net, x: Tensor) -> None:
    """The old hook's operations are replayed."""
    handle = net.up.register_forward_hook(Scaling(2.0))
    survives(net, lambda: net.up._forward_hooks.update({handle.id: Scaling(3.0)}), x)
    replays(net, x)


def test_hooks_inside_change_their_order(net: Net, x: Tensor) -> None:
    """The old order is replayed."""
    first = net.up.register_forward_hook(lambda module, args, out: out + 1)
    net.up.register_forward_hook(lambda module, args, out: out * 2)
    survives(net, lambda: net.up._forward_hooks.move_to_end(first.id), x)  # type: ignore[attr-defined]
    replays(net, x)


def test_a_hook_inside_gets_keywords(net: Net, x: Tensor) -> None:
    """The hook is called as it was at the capture."""

    def hook(module: nn.Module, args: Any, *others: Any) -> Tensor:
        return others[-1] * len(others)

    handle = net.up.register_forward_hook(hook)
    survives(net, lambda: net.up._forward_hooks_with_kwargs.update({handle.id: True}), x)
    replays(net, x)


def test_a_hook_inside_raises(net: Net, x: Tensor) -> None:
    """A replay raises nothing."""
    replays(net, x)

    def hook(module: nn.Module, args: Any) -> None:
        raise LookupError

    with net.up.register_forward_pre_hook(hook):
        for _ in range(3):
            with pytest.raises(LookupError):
                net(x)
    replays(net, x)


LOOKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda found: lambda module, args, out: found.update(last=out),
    "list": lambda found: lambda module, args, out: found.setdefault("all", []).append(out),
    "default": lambda found: lambda module, args, out, found=found: found.update(last=out),
    "number": lambda found: partial(count, found),
}


def count(found: dict[str, Any], *_: Any) -> None:
    found["number"] = found.get("number", 0) + 1


@pytest.mark.parametrize("kind", LOOKS)
def test_a_hook_inside_only_looks(net: Net, x: Tensor, kind: str) -> None:
    """The hook is never called again."""
    found: dict[str, Any] = {}
    replays(net, x)
    handle = net.up.register_forward_hook(LOOKS[kind](found))
    for _ in range(6):
        x = x + 1
        equal(net(x), eagerly(net, x))
        if kind == "number":
            assert found.pop("number") == 2  # of eager, too
        else:
            made = found.pop("last") if "last" in found else found["all"].pop(-2)
            equal(made, net.up(x))
            del made
    handle.remove()
    replays(net, x)
    stored_by_replays = kind in ("dict", "default")
    assert info(net).captures == 4 + stored_by_replays


def test_a_hook_inside_writes_to_the_module(net: Net, x: Tensor) -> None:
    """The attribute holds memory that later replays overwrite."""
    net.up.register_forward_hook(lambda module, args, out: setattr(module, "out", out))
    for _ in range(6):
        x = x + 1
        net(x)
        got = net.up.out
        eagerly(net, x)
        equal(got, net.up.out)


def test_a_hook_inside_prints(net: Net, x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines are missing."""
    for hook in (lambda module, *_: print(type(module)), print):
        with net.up.register_forward_hook(hook):
            for _ in range(6):
                net(x)
                assert capsys.readouterr().out.count("Linear") == 1
    replays(net, x)


def test_a_hook_inside_writes_to_a_buffer(backend: Backend) -> None:
    """Nothing: the write is captured like any of the forward's."""
    twin = Net(backend.device).eval()
    twin.register_buffer("total", torch.zeros(8, device=backend.device))

    def hook(module: nn.Module, args: Any, out: Tensor, parent: Any = None) -> None:
        parent.total.add_(out.sum(0))

    model = graphed_twin(twin, sizes=(2,))
    for each in (twin, model):
        each.up.register_forward_hook(partial(hook, parent=each))
    for _ in range(5):
        in_step(model, twin, backend.randn(2, 8))
    assert info(model).hits == 4


def test_a_hook_inside_is_named(net: Net, x: Tensor) -> None:
    """Nothing: the library says which hook it is, and on which submodule."""
    found: list[Tensor] = []

    def save(module: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out)

    net.up.register_forward_hook(save)
    with pytest.warns(GraphCacheWarning, match=r"`save` on 'up' changes found, which no graph replays"):
        for _ in range(6):
            net(x)
    assert info(net).hits == 0


def test_a_library_puts_another_forward_on_a_submodule(net: Net, x: Tensor) -> None:
    """The forward of the capture is replayed, as that of accelerate's hooks."""
    replays(net, x)
    plain, scaling = net.up.forward, Scaling(2.0)

    def forward(module: nn.Module, *args: Any) -> Tensor:
        return plain(*args) * scaling.factor

    survives(net, lambda: setattr(net.up, "forward", MethodType(forward, net.up)), x)
    replays(net, x)
    survives(net, lambda: setattr(scaling, "factor", 3.0), x)
    replays(net, x)
    survives(net, lambda: delattr(net.up, "forward"), x)


def test_hooks_of_the_root_run_inside_another_method(backend: Backend, x: Tensor) -> None:
    """The hook's operations are captured, and what they read is never read again."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

        def encode(self, x: Tensor) -> Tensor:
            return self(x).tanh()

    model, scaling = Model().to(backend.device), Scaling(2.0)
    plain = model.encode
    handle = model.register_forward_hook(scaling)
    encode = cuda_graphed(model.encode, sizes=(2,))
    replays(encode, x)
    for change in (lambda: setattr(scaling, "factor", 3.0), handle.remove):
        change()
        for _ in range(3):
            equal(encode(x), plain(x))


def test_modules_with_hooks_are_passed(backend: Backend, x: Tensor) -> None:
    """The hook's operations are captured, and what they read is never read again."""
    inner, scaling = nn.Linear(8, 8).to(backend.device), Scaling(2.0)
    handle = inner.register_forward_hook(scaling)
    apply = cuda_graphed(lambda module, x: module(x).tanh(), sizes=(2,))
    same_as_eager(apply, inner, x)
    scaling.factor = 3.0
    same_as_eager(apply, inner, x)
    handle.remove()
    same_as_eager(apply, inner, x)
