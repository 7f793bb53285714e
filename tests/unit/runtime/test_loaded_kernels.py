"""Kernels that Triton has loaded are found."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from graphcache.runtime.loaded_kernels import loaded
from tests.helpers import ON_A_GPU, Backend, triton_knows

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (SimpleNamespace(_active=None), 0),
        (SimpleNamespace(_active="a device"), 1),
        (SimpleNamespace(), 1),
    ],
)
def test_kernels_of_triton_are_looked_for_once_it_runs(
    monkeypatch: pytest.MonkeyPatch, driver: object, found: int
) -> None:
    kind = type("CompiledKernel", (), {})
    monkeypatch.setitem(sys.modules, "triton.compiler.compiler", SimpleNamespace(CompiledKernel=kind))  # type: ignore[misc]
    triton_knows(monkeypatch, driver)
    kernel = kind()
    assert [value for value in loaded() if value is kernel] == [kernel] * found


@ON_A_GPU
def test_a_kernel_of_triton_is_found(backend: Backend, kernels: ModuleType) -> None:
    kernels.add_one[(1,)](torch.zeros(16, device=backend.device), 16)
    assert "CompiledKernel" in [type(value).__name__ for value in loaded()]
