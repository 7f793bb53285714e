"""Each test begins with nothing compiled."""

import pytest
import torch

from tests.unit.integrations.compiler import compiled_graphs, runs


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()
    compiled_graphs.clear()
    runs.clear()
