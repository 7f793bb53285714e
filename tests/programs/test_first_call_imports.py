"""The modules that a fresh process imports for its first graphed call."""

import subprocess
import sys

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

PROGRAM = """
import sys
import torch
from torch import nn
import graphcache

device = sys.argv[1]
x = torch.ones(2, 4, device=device)
model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(device)
with torch.inference_mode():
    model(x)
    before = set(sys.modules)
    graphcache.cuda_graphed(model, sizes=(2, 4))
    with graphcache.emulate():
        model(x), model(x)
assert model.forward.cache_info().hits == 1
print(*sorted(set(sys.modules) - before), sep="\\n")
"""


@pytest.mark.parametrize("device", DEVICES)
def test_first_call_imports_at_most_ten_modules(device: str) -> None:
    program = [sys.executable, "-c", PROGRAM, device]
    imported = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()
    assert "torch._dynamo" not in imported
    assert len(imported) <= 10, imported
