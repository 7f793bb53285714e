"""Modes that a graph depends on have graphs of their own."""

import torch
from torch import nn

from graphcache import cuda_graphed
from tests.helpers import Backend, eager, replay_equals_eager


def test_modes_have_graphs_of_their_own(backend: Backend) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).to(backend.device)
    cuda_graphed(model, sizes=(2,))
    x = backend.randn(2, 4)
    for _ in range(2):
        model.eval()
        replay_equals_eager(model, x)
        model.train()
        assert (model(x) == 0).any()
        with torch.autocast(backend.device.type, dtype=torch.bfloat16):
            assert model.eval()(x).dtype == torch.bfloat16
        with torch.inference_mode():
            assert model(x).is_inference()
        assert not model(x).is_inference()
    assert model.forward.cache_info().signatures == 4
    assert model.forward.cache_info().hits >= 4


def test_autocast_weights_of_an_earlier_call_are_not_captured(backend: Backend) -> None:
    """Its cache of cast weights dies with the region; a graph that read it would read freed memory."""
    model = nn.Linear(64, 64).to(backend.device)
    x = backend.randn(2, 64)
    model.requires_grad_(True)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16), torch.enable_grad():
        model(x)  # fills the cache
        with torch.no_grad():
            cuda_graphed(model, sizes=(2,))
            model(x)
            assert model.forward.cache_info().captures == 1
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        model.weight.mul_(2)
        assert torch.allclose(model(x), eager(model, x))
        assert model.forward.cache_info().hits == 1
