"""Arguments as a user passes them: the same tensor twice, views, numbers, profilers and threads."""

from __future__ import annotations

import cProfile
import gc
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, equal, info, replays, same_as_eager
from tests.models import MLP

pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


# The same tensor twice


def twice(x: Tensor, y: Tensor) -> Tensor:
    return x * 2 if x is y else x * 3


def test_forward_compares_arguments_by_identity(backend: Backend) -> None:
    """`if key is value` (attention does so): the answer of the capture is baked in."""
    model = cuda_graphed(twice, sizes=(2, 4))
    x, y = backend.randn(2, 8), backend.randn(2, 8)
    for _ in range(4):
        for pair in ((x, y), (x, x), (y, x), (y, y), (x, x.view(2, 8))):
            equal(model(*pair), twice(*pair))
    assert info(model).hits > 10
    assert info(model).signatures == 2


@pytest.mark.parametrize("bind", [(), ("y",)], ids=str)
def test_one_of_two_names_of_a_tensor_is_bound(backend: Backend, bind: tuple[str, ...]) -> None:
    """Copied under one name and bound by the other, the two would be different tensors."""
    model = cuda_graphed(lambda t, x, y: t + twice(x, y), sizes=(2,), bind=bind)
    t, x, y = (backend.randn(2, 8) for _ in range(3))
    for _ in range(3):
        for pair in ((x, x), (x, y)):
            equal(model(t, *pair), t + twice(*pair))
    assert info(model).hits


def test_many_arguments_some_of_which_are_the_same(backend: Backend) -> None:
    """Among many, too: native code compares all with all."""

    def by_identity(*tensors: Tensor) -> Tensor:
        total = torch.zeros_like(tensors[0])
        for place, each in enumerate(tensors):
            first = next(i for i, other in enumerate(tensors) if other is each)
            total = total + each * (1 + first) * (1 + place)
        return total

    model = cuda_graphed(by_identity, sizes=(2,))
    a, b, c = (backend.randn(2, 4) for _ in range(3))
    for given in ((a, b, c) * 7, (a, a, c) * 7, (a, b, b) * 7, (c, c, b) * 7, (a, b, c) * 7):
        for _ in range(3):
            equal(model(*given), by_identity(*given))
    assert info(model).hits >= 6


def test_self_attention_of_torch(backend: Backend) -> None:
    """nn.MultiheadAttention takes another path where query, key and value are one tensor."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).to(backend.device).eval()
    twin = nn.MultiheadAttention(8, 2, batch_first=True).to(backend.device).eval()
    twin.load_state_dict(attention.state_dict())
    cuda_graphed(attention, sizes=(4,))
    q, k = backend.randn(4, 5, 8), backend.randn(4, 5, 8)
    for _ in range(3):
        for given in ((q, q, q), (q, k, k), (q, k, k.clone())):
            out, want = attention(*given)[0], twin(*given)[0]
            equal(out, want)
            assert out.stride() == want.stride()
    assert info(attention).hits >= 3


# Padded rows have to hold valid values


def test_words_of_several_vocabularies(backend: Backend) -> None:
    """Word 99 is there in the first vocabulary only: not every pair of valid numbers is a valid row."""

    class Vocabularies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(110, 4)
            self.register_buffer("first", torch.tensor([0, 100]))

        def forward(self, kind: Tensor, word: Tensor) -> Tensor:
            return self.embedding(self.first[kind] + word)

    model = cuda_graphed(Vocabularies().to(backend.device), sizes=(4,))
    kind = torch.tensor([0, 0, 1, 1], device=backend.device)
    word = torch.tensor([99, 50, 9, 0], device=backend.device)
    same_as_eager(model, kind, word)
    replays(model, kind[:3], word[:3])


def test_numbers_that_begin_with_one(backend: Backend) -> None:
    """A row of zeros would be read at -1, which on a GPU ends the process' use of it."""

    class OneBased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(ids - 1)

    model = cuda_graphed(OneBased().to(backend.device), sizes=(4,))
    ids = torch.tensor([1, 5, 10, 3], device=backend.device)
    same_as_eager(model, ids)
    replays(model, ids[:3])
    assert info(model).padded_rows > 0


def test_rows_of_an_earlier_call_fit_what_was_beside_them(backend: Backend) -> None:
    """An unbatched argument says where rows begin: those of a call with another one lie outside."""
    table = backend.randn(10, 4)
    model = cuda_graphed(lambda ids, first: table[ids - first], sizes=(4,))
    ids = torch.tensor([0, 9, 5, 3], device=backend.device)
    for first, counts in ((0, (4,)), (100, (4, 3, 3, 2))):
        start = torch.tensor(first, device=backend.device)
        for count in counts:
            got = model(ids[:count] + first, start)
            equal(got, table[ids[:count]])
    assert info(model).padded_rows > 0


# Properties of a tensor other than its values


@pytest.mark.parametrize("bind", [(), ("z",)], ids=str)
@pytest.mark.parametrize(
    "views",
    [(Tensor.conj, lambda z: z), (lambda z: z.imag, lambda z: z.conj().imag)],
    ids=["conjugate", "negative"],
)
def test_a_conjugate_view_of_a_bound_argument(
    backend: Backend, bind: tuple[str, ...], views: tuple[Callable[[Tensor], Tensor], ...]
) -> None:
    """The view has the same address and strides: only a bit of the tensor differs."""
    z = backend.randn(2**20, dtype=torch.complex64)  # large enough to be bound anyway
    x = backend.randn(2, 4)
    model = cuda_graphed(lambda x, z: x * z[:4], sizes=(2,), bind=bind)
    for order in (views, views[::-1]):
        for view in order * 2:
            same_as_eager(model, x, view(z))
    assert info(model).captures


# Profilers and tracers that are on already


@pytest.mark.parametrize("profiler", ["cProfile", "torch"])
def test_a_profiler_is_on_at_the_first_call(backend: Backend, mlp: MLP, profiler: str) -> None:
    """The first call is watched by a profile function; that of a profiler in C can't be put back."""
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    profile: Any = (
        cProfile.Profile() if profiler == "cProfile" else torch.profiler.profile(with_stack=True)
    )
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        stack.enter_context(profile)
        before = sys.getprofile()
        same_as_eager(mlp, x)
        mlp.forward.warmup(backend.randn(2, 8, dtype=torch.float64)[:, :8].float())
        assert sys.getprofile() is before
        assert gc.isenabled()
    replays(mlp, x)


# Warnings that are errors


def test_advice_is_an_error(backend: Backend) -> None:
    """`python -W error`: the warning is raised, and all is as if it had been shown."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            self.seen[: x.shape[0]] += x
            return x * 2

    model = cuda_graphed(Keeps().to(backend.device), sizes=(4,))
    x = backend.randn(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GraphCacheWarning, match="pad="):
            model(x)
        for _ in range(3):
            equal(model(x), x * 2)
    equal(model.seen[:4], x * 4)
    assert info(model).hits == 3


# Work that the trace does not see


def test_threads_inside_the_forward(backend: Backend) -> None:
    """A tensor of another thread is no part of the trace, and would be frozen."""
    with ThreadPoolExecutor(2) as workers:

        def double(x: Tensor) -> Tensor:
            with torch.no_grad():
                return x * 2

        model = cuda_graphed(lambda x: sum(workers.map(double, [x, x + 1])), sizes=(2,))
        for factor in range(4):
            x = backend.randn(2, 4) * factor
            equal(model(x), x * 4 + 2)


def test_gradients_accumulate_inside_the_forward(backend: Backend) -> None:
    """torch itself holds what `.backward()` makes; a graph would add to that memory for ever."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                place = x.detach().clone().requires_grad_()
                self.linear(place).sum().backward()
            return place.grad  # type: ignore[return-value]

    model = cuda_graphed(Energy().to(backend.device), sizes=(2,))
    for _ in range(5):
        model.zero_grad()
        x = backend.randn(2, 4)
        equal(model(x), model.linear.weight.expand(2, 4))
        equal(model.linear.weight.grad, x.sum(0, keepdim=True))


def test_class_forward_is_patched_after_an_instance_is_decorated(backend: Backend) -> None:
    """The wrapper of the instance knows the function that there was."""

    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = cuda_graphed(Scale(), sizes=(2, 4))
    x = backend.randn(2, 4)
    replays(model, x)
    Scale.forward = lambda self, x, factor=3: x * factor  # type: ignore[method-assign, misc, assignment]
    equal(model(x), x * 3)
    replays(model, x)
    replays(model, x, factor=5)
    model.forward.warmup(backend.randn(4, 4))
    model.forward.cache_clear()
    equal(model(x), x * 3)


def test_first_call_moves_a_switch_of_torch(backend: Backend) -> None:
    """The first attention of a process sets the order of its kernels; later calls see that."""

    def forward(x: Tensor) -> Tensor:
        torch.set_float32_matmul_precision("high")
        return x * 2

    before = torch.get_float32_matmul_precision()
    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 4)
    try:
        for _ in range(3):
            equal(model(x), x * 2)
    finally:
        torch.set_float32_matmul_precision(before)
    assert info(model).hits == 2
