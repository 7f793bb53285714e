"""Compiled modules, in whole and in part, under graphs."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import CaptureError, GraphCacheWarning, cuda_graphed
from graphcache.integrations.transformers import without_graphs
from tests.helpers import Backend, close
from tests.models import MLP, Counting
from tests.unit.integrations.compiler import compiled_graphs, compiler, runs

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


# Compiled code


def test_lists_in_compiled_code(backend: Backend) -> None:
    """They become constants of what is compiled, where no mode of ours may be; captured or not."""

    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, [2, 0]] * torch.tensor([0.5, 2.0], device=x.device)

    model = cuda_graphed(torch.compile(Picks(), backend=compiler), sizes=(2,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphCacheWarning)
        for _ in range(4):
            x = backend.randn(2, 3)
            assert close(model(x), Picks()(x))
    assert compiled_graphs


def test_uncalled_module_is_compiled_before_its_capture(backend: Backend) -> None:
    """Compiling inside a capture would synchronise, and end it."""
    plain = MLP().to(backend.device)
    model = cuda_graphed(torch.compile(plain, backend=compiler), sizes=(2, 4))
    x = backend.randn(4, 8)
    want = plain(x)
    assert close(model(x), want)
    assert compiled_graphs
    assert model.forward.cache_info().sizes == (2, 4)
    before = len(compiled_graphs)
    for batch in (4, 2, 4):
        assert close(model(x[:batch]), want[:batch])
    assert model.forward.cache_info().hits == 3
    assert len(compiled_graphs) == before


def test_graphs_hold_what_was_compiled(backend: Backend) -> None:
    """In emulation, what that was made of: compiled code does not run while it is recorded."""
    warm_up_and_capture = 2 if backend.name == "cuda" else 1
    model = cuda_graphed(torch.compile(MLP().to(backend.device), backend=compiler), sizes=(2,))
    model(backend.randn(2, 8))
    assert len(runs) == warm_up_and_capture
    model(backend.randn(2, 8))
    assert len(runs) == warm_up_and_capture


def test_a_part_is_compiled(backend: Backend) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP()
            self.part = torch.compile(self.inner, backend=compiler)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.part(x))

    model = cuda_graphed(Whole().to(backend.device), sizes=(2,))
    for _ in range(3):
        x = backend.randn(2, 8)
        assert close(model(x), torch.tanh(model.inner(x)))
    assert compiled_graphs
    assert model.forward.cache_info().hits == 2


def test_warm_up_restores_state_and_generator(backend: Backend) -> None:
    class Drops(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    twin = Drops().to(backend.device)
    model = cuda_graphed(torch.compile(copy.deepcopy(twin), backend=compiler), sizes=(2,))
    x = backend.randn(2, 8)
    results = []
    for module in (twin, model):
        torch.manual_seed(3)
        results.append([module(x).clone() for _ in range(4)])
    for mine, theirs in zip(*results, strict=True):
        assert close(theirs, mine)
    assert compiled_graphs
    assert model.forward.cache_info().hits == 3


@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}], ids=str
)
def test_graphs_of_inductor_are_refused_with_advice(backend: Backend, options: dict[str, Any]) -> None:
    model = torch.compile(MLP().to(backend.device), **options)
    cuda_graphed(model, sizes=(2,), fallback=False)
    with pytest.raises(CaptureError, match=r"reduce-overhead.*max-autotune-no-cudagraphs"):
        model(backend.randn(2, 8))
    part = cuda_graphed(nn.Sequential(torch.compile(MLP().to(backend.device), **options)), sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="max-autotune-no-cudagraphs"):
        part(backend.randn(2, 8))


def test_options_without_graphs() -> None:
    assert without_graphs({"mode": "reduce-overhead", "options": None}) == {
        "mode": "default",
        "options": None,
    }
    assert without_graphs({"mode": "max-autotune"}) == {"mode": "max-autotune-no-cudagraphs"}
    given = {"mode": None, "options": {"triton.cudagraphs": True, "max_autotune": True}}
    assert without_graphs(given) == {
        "mode": None,
        "options": {"triton.cudagraphs": False, "max_autotune": True},
    }
    assert given["options"]["triton.cudagraphs"]
    assert without_graphs({"mode": "default"}) == {"mode": "default"}
