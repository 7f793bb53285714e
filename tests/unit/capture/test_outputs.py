"""How long an output is valid, and what it shares memory with."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed, expire, is_expired
from tests.helpers import Backend, close, eager, info
from tests.models import MLP


def test_outputs_that_are_inputs_or_parameters(backend: Backend) -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return x, x[:, :2], self.weight, self.weight[:2], y + self.weight, x.t()

    model = cuda_graphed(Passes().to(backend.device), sizes=(4,))
    for _ in range(4):
        x, y = backend.randn(3, 3), backend.randn(3, 3)
        out = model(x, y)
        assert out[0] is x
        assert out[2] is model.weight
        for mine, theirs in zip(out, eager(model, x, y), strict=True):
            assert torch.equal(mine, theirs)
    assert info(model).hits == 2


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    model(x)
    model(x)
    return model


def test_a_stale_output_raises_and_names_both_calls(backend: Backend, mlp: MLP) -> None:
    model = settled(cuda_graphed(mlp, sizes=(2, 4), stale="error"), backend.randn(4, 8))
    first = model(backend.randn(4, 8))
    view = first[1:]
    model(backend.randn(2, 8))
    for stale in (first, view):
        with pytest.raises(
            RuntimeError,
            match=r"output of call 3 of MLP\.forward \(batch 4, size 4\).*"
            r"overwritten by call 4 of MLP\.forward \(batch 2, size 2\).*\.clone\(\).*stale='error'",
        ):
            stale + 1
    assert is_expired(first)
    assert first.shape == (4, 8)
    assert model.forward.cache_info().expired == 1


def test_held_outputs_move_with_their_views(backend: Backend, mlp: MLP) -> None:
    model = settled(cuda_graphed(mlp, sizes=(4,)), backend.randn(4, 8))
    kept = []
    for _ in range(4):
        x = backend.randn(4, 8)
        out = model(x)
        kept.append((out, out[1:, ::2], eager(model, x)))
    for out, view, expected in kept:
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.equal(view, out[1:, ::2])
    assert model.forward.cache_info().copied == 3
    assert model.forward.cache_info().expired == 0


def test_a_view_of_an_argument_survives_the_staging_of_the_next(backend: Backend) -> None:
    """The view would lie in the static input, which is filled before anything is moved away."""
    model = cuda_graphed(lambda x: x.t(), sizes=(2,))
    kept = []
    for _ in range(5):
        x = backend.randn(2, 2)
        kept.append((model(x), x.t().clone()))
    for out, expected in kept:
        assert torch.equal(out, expected)
    assert model.cache_info().hits == 4


def test_an_output_that_nobody_holds_costs_nothing(backend: Backend, mlp: MLP) -> None:
    model = settled(cuda_graphed(mlp, sizes=(4,)), backend.randn(4, 8))
    addresses = {model(backend.randn(4, 8)).data_ptr() for _ in range(5)}
    assert len(addresses) == 1
    assert model.forward.cache_info().copied == 0


def test_holding_only_a_view_counts(backend: Backend, mlp: MLP) -> None:
    model = settled(cuda_graphed(mlp, sizes=(4,), stale="error"), backend.randn(4, 8))
    row = model(backend.randn(4, 8))[0]
    model(backend.randn(4, 8))
    assert is_expired(row)


def test_feeding_an_output_back(backend: Backend) -> None:
    """`h = cell(x, h)` works: each step reads the old state, which is still held, before it moves."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 6)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.cell(x, h)

    model = cuda_graphed(Cell().to(backend.device), sizes=(2, 4))
    xs = [backend.randn(3, 4) for _ in range(8)]
    h = expected = torch.zeros(3, 6, device=backend.device)
    for x in xs:
        h = model(x, h)
        expected = eager(model, x, expected)
        assert torch.allclose(h, expected, atol=1e-5)
    told = model.forward.cache_info()
    assert told.replays == {3: 6}
    assert told.copied <= 6


def test_feeding_an_output_back_at_another_size_and_after_a_view(backend: Backend) -> None:
    model = cuda_graphed(lambda h: h * 0.5 + 1, sizes=(1, 2, 4, 8))
    h = expected = backend.randn(8, 3)
    for batch in (8, 8, 7, 7, 7, 4, 3, 3, 2, 1):
        h, expected = model(h[:batch]), expected[:batch] * 0.5 + 1
        assert torch.allclose(h, expected)


def test_feeding_a_stale_output_back_raises(backend: Backend, mlp: MLP) -> None:
    model = settled(cuda_graphed(mlp, sizes=(4,), stale="error"), backend.randn(4, 8))
    old = model(backend.randn(4, 8))
    new = model(backend.randn(4, 8))
    with pytest.raises(RuntimeError, match=r"output of call 3 of MLP\.forward"):
        model(old)
    with pytest.raises(RuntimeError, match=r"output of call 3 of MLP\.forward"):
        model(old)
    assert torch.isfinite(new).all()  # a call that failed overwrote nothing


def test_other_modules_of_the_pool_overwrite_too(backend: Backend) -> None:
    """Two that were captured into one lane, since no output was held between their captures."""
    pool = backend.pool()
    options: Any = {"sizes": (2,), "pool": pool, "stale": "error"}
    a, b = (cuda_graphed(MLP().to(backend.device), **options) for _ in range(2))
    x = backend.randn(2, 8)
    settled(a, x)
    settled(b, x)
    assert len(pool.lanes) == 1
    out = a(x)
    b(x)
    with pytest.raises(RuntimeError, match=r"overwritten by call 3 of MLP\.forward"):
        out + 1


def test_siblings_get_lanes_of_their_own(backend: Backend) -> None:
    pool = backend.pool()
    a, b = (cuda_graphed(MLP().to(backend.device), sizes=(2,), pool=pool) for _ in range(2))
    for _ in range(4):
        x = backend.randn(2, 8)
        x1 = a(x)
        x2 = b(x1)
        expected1 = eager(a, x)
        assert torch.allclose(x1 + x2, expected1 + eager(b, expected1), atol=1e-5)
    assert len(pool.lanes) == 2


def test_results_that_lie_outside_keep_no_lane_busy(backend: Backend) -> None:
    """A parameter or an argument that a forward returns lives on, and says nothing of the lane."""

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.weight, x, x + self.weight

    pool = backend.pool()
    models = [cuda_graphed(Returns().to(backend.device), sizes=(2,), pool=pool) for _ in range(3)]
    x = backend.randn(2, 3)
    for model in models:
        model(x)
    assert len(pool.lanes) == 1


def test_outputs_that_share_memory_expire_together(backend: Backend) -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y[:, :1]

    model = cuda_graphed(forward, sizes=(2,), stale="error")
    x = backend.randn(2, 3)
    for _ in range(2):
        model(x)
    whole, part = model(x)
    assert part.data_ptr() == whole.data_ptr()
    del whole
    model(x)
    assert is_expired(part)


def test_a_stale_output_stays_stale_after_its_module_died(backend: Backend, mlp: MLP) -> None:
    model = cuda_graphed(MLP().to(backend.device), sizes=(4,), stale="error")
    settled(model, backend.randn(4, 8))
    old = model(backend.randn(4, 8))
    model(backend.randn(4, 8))
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="output of call 3"):
        old.sum()


def test_weak_outputs_of_views_with_another_dtype(backend: Backend) -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return y, y.view(torch.int32)

    model = cuda_graphed(forward, sizes=(2,))
    x = backend.randn(2, 3)
    for _ in range(3):
        y, bits = model(x)
        assert bits.dtype == torch.int32
        assert torch.equal(y.view(torch.int32), bits)


def test_an_output_that_the_user_expires_is_gone_alone(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    mlp(x)
    out = mlp(x)
    expire(out)
    with pytest.raises(RuntimeError, match=r"graphcache\.expire"):
        out.sum()
    del out
    assert close(mlp(x), eager(mlp, x))


def test_comparison_holds_no_output(backend: Backend, mlp: MLP) -> None:
    for stale in ("error", "copy"):
        model = cuda_graphed(MLP().to(backend.device), sizes=(8,), stale=stale)
        for _ in range(6):
            model(backend.randn(3, 8))
        info = model.forward.cache_info()
        assert info.hits > 0
        assert (info.expired, info.copied) == (0, 0)


@pytest.mark.parametrize("stale", ["error", "copy"])
def test_stale_option_of_the_maker_applies_to_an_output(backend: Backend, stale: str) -> None:
    pool = backend.pool()
    other = "copy" if stale == "error" else "error"
    maker = cuda_graphed(MLP().to(backend.device), sizes=(2,), stale=stale, pool=pool)
    overwriter = cuda_graphed(MLP().to(backend.device), sizes=(2,), stale=other, pool=pool)
    x = backend.randn(2, 8)
    maker(x)
    overwriter(x)
    held = maker(x)
    overwriter(x)
    assert is_expired(held) == (stale == "error")
    info = overwriter.forward.cache_info()
    assert (info.expired, info.copied) == ((1, 0) if stale == "error" else (0, 1))
