"""Results of torch with names, `torch.return_types`, as results and as arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, equal, info

FORWARDS: dict[str, Callable[[Tensor], Any]] = {
    "max": lambda x: x.max(dim=1),
    "topk": lambda x: x.topk(2),
    "sort": lambda x: torch.sort(x, dim=1),
    "svd": lambda x: torch.linalg.svd(x, full_matrices=False),
    "eigh": lambda x: torch.linalg.eigh(x.mT[..., None] * x.mT[..., None, :])[:1],
    "aminmax": lambda x: x.aminmax(dim=1),
    "nested": lambda x: {"median": x.median(dim=1), "others": [x.mode(dim=1), (x.cummax(dim=1),)]},
}

WAIT_FOR_THE_GPU = ("svd", "eigh")  # no graph can hold these there


def types(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor
    items = value.values() if isinstance(value, dict) else value
    return type(value), [types(item) for item in items]


@pytest.mark.parametrize("name", FORWARDS)
def test_named_result_of_torch_is_returned_as_such(backend: Backend, name: str) -> None:
    forward = FORWARDS[name]
    model = cuda_graphed(forward, sizes=(4,))
    waits = backend.device.type == "cuda" and name in WAIT_FOR_THE_GPU
    with pytest.warns(GraphCacheWarning) if waits else nullcontext():
        for _ in range(3):
            x = backend.randn(4, 3)
            got, want = model(x), forward(x)
            assert types(got) == types(want)
            equal(got, want)
    assert info(model).hits == (0 if waits else 2), info(model)


def test_named_result_of_torch_is_passed_on(backend: Backend) -> None:
    def forward(found: Any, largest: Any) -> Any:
        return found.values * 2, found.indices + largest[1][:, 0], type(found).__name__

    model = cuda_graphed(forward, sizes=(4,))
    for _ in range(3):
        x = backend.randn(4, 3)
        found = x.max(dim=1), x.topk(2)
        equal(model(*found)[:2], forward(*found)[:2])
    assert info(model).hits == 2, info(model)
    other = x.min(dim=1)
    assert model(other, x.topk(2))[2] == "min"
