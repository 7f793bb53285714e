"""One suite for both runtimes: every test that asks for `backend` runs emulated, and on CUDA too."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import graphcache
from graphcache import config
from tests.helpers import BACKENDS, Backend
from tests.models import MLP

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Returns the cores; at most eight where there is a GPU, whose memory all workers share."""
    return min(CORES, 8) if torch.cuda.is_available() else CORES


def pytest_configure() -> None:
    """Shares the cores out among the workers: threads of torch would wait for each other."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        torch.set_num_threads(max(1, CORES // workers))


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
