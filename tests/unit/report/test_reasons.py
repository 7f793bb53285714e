"""Reasons for eager calls that no other test meets; docs/troubleshooting.md links to them."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheError, GraphCacheWarning, cuda_graphed
from graphcache.report.reasons import Reason
from tests.helpers import Backend, Counter

# Warnings about eager calls are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def eager_reasons(forward: Any) -> str:
    return ", ".join(map(str, forward.cache_info().eager))


def kinds(forward: Any) -> set[Reason]:
    return {text.reason for text in forward.cache_info().eager}


def test_each_reason_is_given_by_the_library() -> None:
    library = Path(graphcache.__file__).parent
    source = "".join(path.read_text() for path in library.rglob("*.py"))
    given = set(re.findall(r"\bReason\.([A-Z_]+)\b", source))
    assert given == set(Reason.__members__)


def test_bound_argument_that_is_an_output_runs_eagerly(backend: Backend) -> None:
    make = cuda_graphed(lambda x: x * 2)
    add = cuda_graphed(lambda x, table: x + table, bind=("table",))
    x = backend.randn(2, 8)
    make(x)
    table = make(x)
    assert torch.equal(add(x, table), x + table)
    assert "output of a graph" in eager_reasons(add)


def test_device_without_graphs_runs_eagerly() -> None:
    forward = cuda_graphed(lambda x: x * 2)
    assert forward(torch.empty(2, device="meta")).device.type == "meta"
    assert "meta" in eager_reasons(forward)


class Store:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.nowhere = torch.empty(2, device="meta")


def test_object_with_a_tensor_without_address_runs_eagerly(backend: Backend) -> None:
    forward = cuda_graphed(lambda x, store: x + store.tensor)
    x = backend.randn(2, 8)
    store = Store(backend.randn(8))
    for _ in range(3):
        assert torch.equal(forward(x, store), x + store.tensor)
    assert forward.cache_info().hits == 0
    assert "store holds tensors" in eager_reasons(forward)
    assert Reason.OBJECT_UNGUARDED in kinds(forward)


def test_result_with_a_number_of_each_call_runs_eagerly(backend: Backend) -> None:
    calls = Counter()
    forward = cuda_graphed(lambda x: (x * 2, calls.add()), sizes=(2,))
    x = backend.randn(2, 8)
    with pytest.warns(GraphCacheWarning, match="holds a Python value that changes from call to call"):
        _, first = forward(x)
    _, second = forward(x)
    assert second > first
    assert forward.cache_info().hits == 0


def test_forward_of_a_deleted_module_raises() -> None:
    module = cuda_graphed(nn.Linear(2, 2))
    forward = module.forward
    del module
    with pytest.raises(GraphCacheError, match="module of this forward is gone"):
        forward.cache_info()


def with_a_lock() -> Any:
    return SimpleNamespace(lock=threading.Lock())


@pytest.mark.parametrize(
    ("reason", "forward", "options", "argument"),
    [
        (Reason.ARGUMENT_TYPE, lambda x, y: x * 2, {}, with_a_lock()),
        (Reason.NO_BATCH_DIM, lambda x, y: x * 2, {"batch_dim": {"x": None}}, 1),
        (Reason.ARGUMENT_TENSOR, lambda x, y: x * 2, {}, torch.eye(2).to_sparse()),
    ],
    ids=lambda value: value.name if isinstance(value, Reason) else "",
)
def test_each_reason_of_a_call_warns_once(
    backend: Backend, reason: Reason, forward: Any, options: dict[str, Any], argument: Any
) -> None:
    graphed = cuda_graphed(forward, **options)
    x = backend.randn(2, 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(graphed(x, argument), x * 2)
    assert kinds(graphed) == {reason}
    assert [each.filename for each in told] == [__file__]
    assert str(told[0].message).endswith(f"1. {reason.advice}")
