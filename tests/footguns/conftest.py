"""The graphed module and the input that most traps are tried on."""

from __future__ import annotations

import pytest
from torch import Tensor

from graphcache import cuda_graphed
from tests.helpers import Backend
from tests.models import Net


@pytest.fixture
def net(backend: Backend) -> Net:
    return cuda_graphed(Net(backend.device).eval(), sizes=(2, 4))


@pytest.fixture
def x(backend: Backend) -> Tensor:
    return backend.randn(2, 8)
