"""Modules and tensors on several GPUs."""

import copy
import warnings

import pytest
import torch
from torch import nn

from graphcache import GraphCacheWarning, cuda_graphed, default_pool
from tests.helpers import close
from tests.models import MLP

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@torch.no_grad()
def test_a_module_on_another_device_than_the_current_one() -> None:
    there = torch.device("cuda", 1)
    plain = MLP().to(there)
    model = cuda_graphed(copy.deepcopy(plain), sizes=(2, 4))
    assert torch.cuda.current_device() == 0
    for batch in (4, 2, 3, 3, 1, 4):
        x = torch.randn(batch, 8, device=there)
        got = model(x)
        assert got.device == there
        assert close(got, plain(x))
    assert torch.cuda.current_device() == 0
    info = model.forward.cache_info()
    assert info.hits >= 3
    assert info.launch == "node"
    assert default_pool(there).memory().reserved > 0


@torch.no_grad()
def test_copies_on_two_devices_take_turns() -> None:
    devices = [torch.device("cuda", index) for index in range(2)]
    plain = [MLP().to(device) for device in devices]
    models = [cuda_graphed(copy.deepcopy(module), sizes=(4,)) for module in plain]
    for batch in (4, 3, 2, 4, 3, 2):
        for device, module, model in zip(devices, plain, models, strict=True):
            x = torch.randn(batch, 8, device=device)
            assert close(model(x), module(x))
    assert all(model.forward.cache_info().hits >= 3 for model in models)
    assert default_pool(devices[0]) is not default_pool(devices[1])


@torch.no_grad()
def test_a_module_moves_to_another_device() -> None:
    model = cuda_graphed(MLP().to("cuda:0"), sizes=(2,))
    twin = copy.deepcopy(model)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        model.to(device)
        twin.to(device)
        for _ in range(3):
            x = torch.randn(2, 8, device=device)
            want = twin.forward.__wrapped__(twin, x)
            assert close(model(x), want)
    assert model.forward.cache_info().hits >= 4


@torch.no_grad()
def test_tensors_on_two_devices_run_eagerly() -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y.to(x.device)

    model = cuda_graphed(forward, sizes=(2,))
    for _ in range(3):
        x, y = torch.randn(2, 8, device="cuda:0"), torch.randn(2, 8, device="cuda:1")
        assert close(model(x, y), x + y.to("cuda:0"))
    assert model.cache_info().eager == {"tensors on several devices": 3}


class Parts(nn.Module):
    """As where a model is too large for one device."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8).to("cuda:0"), nn.Linear(8, 8).to("cuda:1")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).to("cuda:1")).to("cuda:0")


@torch.no_grad()
def test_a_module_has_parts_on_two_devices() -> None:
    model = cuda_graphed(Parts(), sizes=(2,))
    x = torch.randn(2, 8, device="cuda:0")
    with pytest.warns(GraphCacheWarning, match="copies between cuda:0 and cuda:1"):
        got = model(x)
    for _ in range(3):
        assert close(got, Parts.forward(model, x))
        got = model(x)
    assert model.forward.cache_info().hits == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["its own", "the current one"])
def test_lists_are_made_tensors_on_the_device_that_is_named(name: str) -> None:
    there = torch.device("cuda", 1)
    device = there if name == "its own" else "cuda"
    model = cuda_graphed(lambda x: (x * 2, torch.tensor([1.0, 2.0], device=device)), sizes=(2,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphCacheWarning)
        for _ in range(3):
            x = torch.randn(2, 8, device=there)
            doubled, listed = model(x)
            assert torch.equal(doubled, x * 2)
            assert listed.device == (there if name == "its own" else torch.device("cuda", 0))
            assert listed.tolist() == [1.0, 2.0]
    assert model.cache_info().hits == (2 if name == "its own" else 0)
