"""One suite for both runtimes: every test that asks for `backend` runs emulated, and on CUDA too."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import graphcache
from graphcache import config
from tests.helpers import BACKENDS, Backend
from tests.models import MLP


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


@pytest.fixture
def mlp(backend: Backend) -> MLP:
    return MLP().to(backend.device).eval()


@pytest.fixture
def kernels() -> ModuleType:
    return importlib.import_module("tests.triton_kernels")
