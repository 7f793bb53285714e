"""Higher-order operators of torch, whose kernels are Python: `cond`, `scan`, flex_attention."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import associative_scan, cond, map, scan, while_loop
from torch.nn.attention.flex_attention import flex_attention

from graphcache import cuda_graphed
from graphcache.report.reasons import Reason
from tests.helpers import Backend, equal, info


def attention(x: Tensor) -> Tensor:
    q = x[:, None, :, None].expand(-1, 2, -1, 4).contiguous()
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))


def added(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return carry + row, carry * row


FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "flex_attention": attention,
    "scan": lambda x: scan(added, torch.zeros_like(x[:, 0]), x, dim=1)[1],
    "associative_scan": lambda x: associative_scan(torch.add, x, dim=1, combine_mode="generic"),
    "map": lambda x: map(lambda row, scale: row * scale, x, x.sum() * 2),
    "cond on a number": lambda x: cond(x.shape[1] > 2, torch.sin, torch.cos, (x,)),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("name", FORWARDS)
def test_higher_order_operator_is_replayed(backend: Backend, name: str) -> None:
    forward = FORWARDS[name]
    model = cuda_graphed(forward, sizes=(4,))
    for _ in range(3):
        x = backend.randn(4, 3)
        equal(model(x), forward(x))
    assert info(model).hits == 2, info(model)


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "cond": lambda x: cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "while_loop": lambda x: while_loop(lambda y: y.abs().sum() < 100, lambda y: (y * 2,), (x.clone(),))[
        0
    ],
}


@pytest.mark.parametrize("name", READERS)
def test_higher_order_operator_that_reads_runs_eagerly(backend: Backend, name: str) -> None:
    forward = READERS[name]
    model = cuda_graphed(forward)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for sign in (1, -1, 1, -1):
            x = sign * backend.randn(4, 3).abs()
            equal(model(x), forward(x))
    assert [why.reason for why in info(model).eager] == [Reason.FIRST_CALL, Reason.READS_VALUE]
    assert len([each for each in told if "reads a value on the host" in str(each.message)]) == 1


FIRST_USE = """
import torch
import graphcache

def forward(x):
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))

x = torch.ones(2)
with graphcache.emulate(), torch.no_grad():
    graphcache.cuda_graphed(forward)(x)
print(forward(x).tolist(), forward(-x).tolist())
"""


def test_dynamo_first_imported_inside_a_forward_compiles_later() -> None:
    program = [sys.executable, "-W", "ignore", "-c", FIRST_USE]
    ran = subprocess.run(program, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[0] == "[2.0, 2.0] [-2.0, -2.0]"
