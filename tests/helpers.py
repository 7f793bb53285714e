"""Functions and classes that tests share; fixtures are in `conftest.py`, modules in `models.py`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphPool, cuda_graphed
from graphcache.report.cache_info import CacheInfo

ROOT = Path(__file__).parent.parent  # of the repository
RUNTIMES = ["emulated", *(["cuda"] if torch.cuda.is_available() else [])]

# "portable": inputs are staged by torch calls, as where the driver offers no better.
BACKENDS = [*RUNTIMES, *(f"{runtime}-portable" for runtime in RUNTIMES)]


@dataclass
class Backend:
    """The runtime and device of a test, and the launch path of its replays."""

    name: str
    device: torch.device
    launch: str

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def pool(self, **options: bool) -> GraphPool:
        return GraphPool(self.device, **options)


class Counter:
    """Counts where nothing is guarded: a counter in plain sight would stop the capture."""

    def __init__(self) -> None:
        self._added = hidden()

    def add(self) -> int:
        next(self._added).append(None)
        return int(self)

    def __int__(self) -> int:
        return len(next(self._added))


def hidden(*items: object) -> Hidden:
    """Returns a list behind `next`, in what counts as a library: no search finds it."""
    return Hidden(list(items))


class Hidden:
    __module__ = "torch._hidden"

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __next__(self) -> list[Any]:
        return self.items

    def __reduce__(self) -> Any:
        return hidden, tuple(self.items)


def close(a: Tensor, b: Tensor) -> bool:
    """Return True if two results are equal within the rounding of another batch size's kernel."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def eager(module: nn.Module, *args: object, **kwargs: object) -> Tensor:
    """Returns the undecorated forward's result, which is counted nowhere."""
    function, _ = module.forward._wrapped_call()
    with graphcache.disabled():
        return function(*args, **kwargs)


EMULATED = pytest.mark.parametrize("backend", ["emulated", "emulated-portable"], indirect=True)


def info(model: Any) -> CacheInfo:
    return (model.forward if isinstance(model, nn.Module) else model).cache_info()


def eagerly(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the class's forward, or the function, eagerly; ignores a forward put on the instance."""
    with graphcache.disabled():
        if isinstance(model, nn.Module):
            return type(model).forward(model, *args, **kwargs)
        return model(*args, **kwargs)


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return error


def is_ours(error: Any) -> bool:
    return isinstance(error, RuntimeError) and "graphcache" in str(error)


def equal(got: Any, want: Any) -> None:
    """Equal within what another batch size's kernel may round differently, dtypes included."""
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, equal_nan=True)


def same_as_eager(model: Any, *args: Any, times: int = 3, **kwargs: Any) -> None:
    """Asserts that each call returns or raises what eager does, or raises an error of graphcache."""
    for _ in range(times):
        want = outcome(eagerly, model, *args, **kwargs)
        got = outcome(model, *args, **kwargs)
        if isinstance(got, Exception) or isinstance(want, Exception):
            assert is_ours(got) or type(got) is type(want), (got, want)
        else:
            equal(got, want)


def replays(model: Any, *args: Any, **kwargs: Any) -> None:
    """Asserts that each call equals eager, and that graphs serve the last one."""
    same_as_eager(model, *args, **kwargs)
    before = info(model).hits
    same_as_eager(model, *args, times=1, **kwargs)
    assert info(model).hits == before + 1, info(model)


def survives(model: Any, change: Callable[[], Any], *args: Any) -> None:
    """Asserts that graphs serve before a change, and that each call equals eager after it."""
    replays(model, *args)
    before = eagerly(model, *args)
    change()
    after = outcome(eagerly, model, *args)
    assert not (isinstance(after, Tensor) and torch.equal(before, after)), "the trap is none"
    same_as_eager(model, *args)


def in_step(model: Any, twin: Any, *args: Any) -> None:
    """Asserts that two modules with state of their own return the same, and leave it the same."""
    equal(model(*args), twin(*args))
    for name, state in twin.state_dict().items():
        equal(model.state_dict()[name], state)


def graphed_twin(twin: Any, **options: Any) -> Any:
    return cuda_graphed(copy.deepcopy(twin), **options)


def assert_close_to_eager(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    assert close(module(*args, **kwargs), eager(module, *args, **kwargs))


def reasons(model: nn.Module) -> dict[str, int]:
    return model.forward.cache_info().eager


def replay_equals_eager(model: nn.Module, x: Tensor) -> None:
    for _ in range(3):
        assert torch.allclose(model(x), eager(model, x), atol=1e-5)


def change_parameter(model: Any) -> None:
    model.up.weight = nn.Parameter(model.up.weight * 2)


def on(*backends: str) -> Callable[[Any], Any]:
    """Restricts a test to these backends."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.parametrize(
        "backend", [pytest.param(name, marks=skip) for name in backends], indirect=True
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Capturing:
    """True while a graph is being captured, on either runtime."""

    def __bool__(self) -> bool:
        # Not by torch.cuda, which says so too where a forward is observed as in a capture.
        if torch.cuda.is_available() and torch._C._cuda_isCurrentStreamCapturing():
            return True
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        return any(type(mode).__name__ == "_Recorder" for mode in modes)


ON_A_GPU = on("cuda", "cuda-portable")  # Triton has kernels for nothing else here


def triton_knows(monkeypatch: pytest.MonkeyPatch, driver: object) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", SimpleNamespace(driver=driver))  # type: ignore[misc]
