"""Sizes that can't be captured, or take too much memory, are left out."""

import logging

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import cuda_graphed
from tests.helpers import Backend, hidden


def test_sizes_that_can_not_be_captured_leave_the_exact_ones(backend: Backend) -> None:
    """A forward that only takes even batches: the ladder fails, the batch of the call does not."""

    def forward(x: Tensor) -> Tensor:
        return x.view(2, -1, 4).mul(2).view(-1, 4)

    model = cuda_graphed(forward, sizes=(1, 2, 4))
    for batch in (4, 4, 2, 2, 6, 6):
        x = backend.randn(batch, 4)
        assert torch.equal(model(x), x * 2)
    assert model.cache_info().sizes in ((2, 4, 6), (1, 2, 4))


def test_sizes_that_do_not_fit_into_memory_are_left_out(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    there = hidden()
    runs = next(there)

    def forward(x: Tensor) -> Tensor:
        next(there).append(1)
        if x.shape[0] > 2 and len(next(there)) > 1:
            raise torch.OutOfMemoryError("pretended")
        return x * 2

    model = cuda_graphed(forward, sizes=(1, 2, 4, 8))
    with caplog.at_level(logging.WARNING, "graphcache"):
        model(backend.randn(3, 2))
    assert "size 8 does not fit into memory" in caplog.text
    assert model.cache_info().sizes == (1, 2)
    runs.clear()
    x = backend.randn(2, 2)
    assert torch.equal(model(x), x * 2)
    assert torch.equal(model(x[:1]), x[:1] * 2)
    model(backend.randn(3, 2))
    assert model.cache_info().replays == {1: 1, 2: 1}
    assert model.cache_info().eager["a batch above the largest size"] == 1


def test_bytes_that_weak_references_save(backend: Backend) -> None:
    model = cuda_graphed(nn.Identity(), sizes=(1,))  # makes nothing
    model(backend.randn(1, 8))
    assert model.forward.cache_info().saved_bytes == 0

    def doubled(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y[:, :2]

    row = 1024 * 4
    for weak in (True, False):
        graphed = cuda_graphed(doubled, sizes=(1, 2, 8), pool=backend.pool(weak=weak))
        graphed(backend.randn(8, 1024))
        assert graphed.cache_info().saved_bytes == (row * (1 + 2) if weak else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU")
def test_ladder_leaves_memory_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device were nearly full: the size that takes what is left is not kept."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    reserved = torch.cuda.memory_reserved  # by this process: others may use the device, too
    end = reserved() + (192 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (end - reserved(), total))
    pool = graphcache.GraphPool("cuda")
    with torch.no_grad():
        model = cuda_graphed(lambda x: x * 2, sizes=(1, 2, 4, 128), pool=pool)
        x = torch.ones(3, 1 << 18, device="cuda")
        for _ in range(4):
            assert torch.equal(model(x), x * 2)
    assert model.cache_info().sizes == (1, 2, 4)
    assert pool.memory().reserved < 64 << 20
