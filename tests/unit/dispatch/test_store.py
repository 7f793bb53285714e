"""Signatures come and go: the limit, the least recently used, and those that never come again."""

import pytest
import torch

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, change_parameter, eager
from tests.models import MLP


def test_attribute_that_changes_on_every_call_stops_captures(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    with pytest.warns(
        GraphCacheWarning, match=r"(?s)up.weight was replaced .* after 9 captures in a row.*copy_"
    ):
        for _ in range(15):
            change_parameter(mlp)
            assert torch.allclose(mlp(x), eager(mlp, x), atol=1e-5)
    told = mlp.forward.cache_info()
    assert told.captures == 9
    assert told.eager["what it captured is replaced again and again"] == 6


def test_too_many_signatures_run_eagerly(backend: Backend) -> None:
    """To drop one after another, none of which was worth its capture, would be all that happens."""
    model = cuda_graphed(lambda x: x * 2, sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="more than 32 ways"):
        for width in range(1, 50):
            for _ in range(2):
                x = backend.randn(2, width)
                assert torch.equal(model(x), x * 2)
    told = model.cache_info()
    assert (told.signatures, told.captures, told.dropped) == (32, 40, 8)


def test_a_call_that_never_comes_again_is_not_captured(backend: Backend) -> None:
    """But the very first is; a number that is another one at each call is told of."""
    model = cuda_graphed(lambda x, n: x * n, sizes=(2,))
    x = backend.randn(2, 3)
    with pytest.warns(GraphCacheWarning, match="(?s)more than 32 ways.*numbers as tensors"):
        for n in range(40):
            assert torch.equal(model(x, n), x * n)
    told = model.cache_info()
    assert (told.captures, told.eager["the first call of another signature"]) == (1, 39)
    assert torch.equal(model(x, 39), x * 39)
    assert model.cache_info().captures == 2


def test_warmup_asks_for_a_capture_of_any_signature(backend: Backend) -> None:
    model = cuda_graphed(lambda x, n: x * n, sizes=(2,))
    x = backend.randn(2, 3)
    for n in range(4):
        model.warmup(x, n)
        assert torch.equal(model(x, n), x * n)
    assert (model.cache_info().captures, model.cache_info().hits) == (4, 4)


def test_least_recently_used_signature_is_dropped_first(backend: Backend) -> None:
    model = cuda_graphed(lambda x: x * 2, sizes=(2,))

    def calls(width: int, times: int) -> None:
        for _ in range(times):
            x = backend.randn(2, width)
            assert torch.equal(model(x), x * 2)

    for width in range(1, 33):
        calls(width, 20)
    calls(1, 1)  # natively: Python does not see it
    for width in range(33, 63):
        calls(width, 20)
    told = model.cache_info()
    assert (told.signatures, told.captures, told.dropped) == (32, 62, 30)
    calls(1, 3)
    assert model.cache_info().captures == 62
    assert "30 dropped" in str(told)
