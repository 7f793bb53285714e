"""Native code copies any input into its static input: dtype, strides, fill and number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcache import _C, cuda_graphed
from tests.helpers import Backend

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def values(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numbers = torch.randint(-5, 100, shape, device=backend.device)
    if dtype is torch.bool:  # rows that are all alike prove nothing
        return numbers.flatten().argsort().view(shape) % 2 == 0
    return numbers.to(dtype)


def static(graphed: Any, size: int) -> list[Tensor]:
    (entry,) = graphed._cache().store.entries
    return entry.buckets[size].static


def padded(x: Tensor, dim: int, size: int, fill: Any) -> Tensor:
    """Returns the expected contents of the static input."""
    missing = size - x.shape[dim]
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    tail = last.expand([missing if d == dim else n for d, n in enumerate(x.shape)])
    if fill != "edge":
        tail = torch.full_like(tail, fill)
    return torch.cat([x, tail], dim)


def same(x: Any) -> Any:
    return x.clone()


def launches(graphed: Any) -> str:
    return graphed.cache_info().launch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fill", [None, 3, "edge"], ids=str)
def test_any_dtype(backend: Backend, dtype: torch.dtype, fill: Any) -> None:
    graphed = cuda_graphed(same, sizes=(6,), pad=fill)
    for batch in (6, 4, 4, 1, 1, 5, 5, 6, 2, 2):
        x, hits = values(backend, (batch, 3), dtype), graphed.cache_info().hits
        assert torch.equal(graphed(x), x)
        if graphed.cache_info().hits > hits:
            assert torch.equal(static(graphed, 6)[0], padded(x, 0, 6, "edge" if fill is None else fill))
    assert graphed.cache_info().hits == 5
    assert launches(graphed) == backend.launch


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("fill", [None, -2, "edge"], ids=str)
def test_any_batch_dim(backend: Backend, dim: int, fill: Any) -> None:
    graphed = cuda_graphed(same, batch_dim=dim, sizes=(5,), pad=fill)
    for batch in (5, 3, 3, 1, 1, 4, 4, 5, 2, 2):
        shape = [3, 4, 2]
        shape[dim] = batch
        x, hits = values(backend, tuple(shape), torch.int32), graphed.cache_info().hits
        assert torch.equal(graphed(x), x)
        if graphed.cache_info().hits > hits:
            assert torch.equal(
                static(graphed, 5)[0], padded(x, dim, 5, "edge" if fill is None else fill)
            )
    assert graphed.cache_info().hits == 5


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "every second column": lambda base: base[:7, ::2],
    "columns from the middle": lambda base: base[:7, 3:9],
    "every third row": lambda base: base[::3, :6],
    "transposed": lambda base: base[:6, :7].t(),
    "one row, expanded": lambda base: base[:1, :6].expand(4, 6),
    "one column, expanded": lambda base: base[:5, :1].expand(5, 6),
    "an odd address": lambda base: base.flatten()[1:25].view(4, 6),
    "rows backwards and forwards": lambda base: base.flip(0)[1:5, :6],
    "overlapping windows": lambda base: base.flatten()[:9].unfold(0, 6, 1),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("how", STRIDED)
def test_any_strides(backend: Backend, how: str, dtype: torch.dtype) -> None:
    graphed = cuda_graphed(lambda x: x * 1, sizes=(8,), pad="edge")
    for _ in range(4):
        x = STRIDED[how](values(backend, (12, 12), dtype))
        assert torch.equal(graphed(x), x)
    assert torch.equal(static(graphed, 8)[0], padded(x, 0, 8, "edge"))
    assert graphed.cache_info().hits == 2
    assert launches(graphed) == backend.launch


def test_many_dimensions_in_any_order(backend: Backend) -> None:
    order = random.Random(0)
    for _ in range(25):
        graphed = cuda_graphed(lambda x: x * 1, sizes=(4,), pad=9)
        axes = order.sample(range(5), 5)
        shape = [order.choice((1, 2, 3)) for _ in range(5)]
        x = values(backend, (*shape, 7), torch.int16).permute(*axes, 5)[..., order.choice((0, 1)) :: 2]
        for _ in range(3):
            part = x[: order.randint(1, x.shape[0])]
            assert torch.equal(graphed(part), part), (shape, axes)


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_too_many_strided_dimensions_run_eagerly(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x * 1, sizes=(2,))
    x = values(backend, (4,) * 8, torch.int32)[::2, ::2, ::2, ::2, ::2, ::2, ::2, ::2]
    for _ in range(3):
        assert torch.equal(graphed(x), x)
    [reason] = graphed.cache_info().eager
    assert "x has strides over more than 6 dimensions; pass it .contiguous()" in reason
    assert graphed.cache_info().eager[reason] == 3


def test_inputs_of_very_different_lengths_at_once(backend: Backend) -> None:
    def forward(tokens: Tensor, image: Tensor, scale: Tensor, none: Tensor, flag: Tensor) -> Any:
        return tokens + 1, image * scale, none.sum(1), flag.logical_not()

    graphed = cuda_graphed(forward, sizes=(8,))
    for batch in (8, 5, 5, 3, 3, 8, 2, 2):
        arguments = (
            torch.randint(0, 9, (batch,), device=backend.device),
            backend.randn(batch, 3, 100, 101),
            backend.randn(1, 1),
            backend.randn(batch, 0),
            torch.rand(batch, 3, device=backend.device) > 0.5,
        )
        for mine, theirs in zip(graphed(*arguments), forward(*arguments), strict=True):
            assert torch.equal(mine, theirs)
    assert graphed.cache_info().hits == 4


@pytest.mark.parametrize("count", [1, 2, 3, 9, 40])
def test_any_number_of_inputs(backend: Backend, count: int) -> None:
    graphed = cuda_graphed(lambda *inputs: sum(inputs), sizes=(2, 4))
    for batch in (4, 3, 3, 2, 1, 1, 4):
        inputs = [values(backend, (batch, 2), torch.int64) for _ in range(count)]
        assert torch.equal(graphed(*inputs), sum(inputs))
    assert graphed.cache_info().hits == 4
    assert launches(graphed) == backend.launch


def test_kernel_parameters_at_the_largest_size_and_beyond(backend: Backend) -> None:
    """A node takes what fits into 32,764 bytes; more inputs are staged by torch calls."""
    for count, native in ((200, True), (210, False)):
        graphed = cuda_graphed(lambda inputs: torch.stack(inputs).sum(0), sizes=(2,))
        for _ in range(3):
            inputs = [values(backend, (2, 2), torch.int64)[:, ::1] for _ in range(count)]
            assert torch.equal(graphed(inputs), torch.stack(inputs).sum(0))
        by_torch = backend.launch == "node" and not native
        assert launches(graphed) == ("torch" if by_torch else backend.launch)


def test_conjugate_and_negative_views(backend: Backend) -> None:
    graphed = cuda_graphed(same, sizes=(4,))
    x = torch.randn(3, 2, dtype=torch.complex64, device=backend.device)
    for view in (x, x, x, x.conj(), x.conj()):
        assert torch.equal(graphed(view), view.resolve_conj())
    y = cuda_graphed(same, sizes=(4,))
    for view in (x.real, x.real, x.imag, x.conj().imag, x.conj().imag):
        assert torch.equal(y(view), view.resolve_neg())


def test_an_output_fed_back_is_read_before_it_is_overwritten(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x.flip(0) + 1, sizes=(4,))
    x = values(backend, (4, 300), torch.int32)
    expected = x
    for _ in range(6):
        x, expected = graphed(x), expected.flip(0) + 1
        assert torch.equal(x, expected)


def test_static_input_passed_as_input_is_unchanged(backend: Backend) -> None:
    graphed = cuda_graphed(lambda x: x * 2, sizes=(4,), pad=7)
    for _ in range(3):
        graphed(values(backend, (3, 5), torch.int32))
    (buffer,) = static(graphed, 4)
    buffer.copy_(values(backend, (4, 5), torch.int32))
    expected = buffer[:3] * 2
    assert torch.equal(graphed(buffer[:3]), expected)
    assert buffer[3].eq(7).all()
    expected = buffer * 2
    assert torch.equal(graphed(buffer), expected)
    assert graphed.cache_info().hits == 3


def test_a_static_input_that_is_given_is_not_read() -> None:
    buffer = torch.arange(6).view(3, 2)
    stage = _C.InputCopier([_C.StaticInput(buffer, 0, 0, bytes(16), False)])
    stage.read([buffer], 3)
    assert stage.copied_bytes() == 0
    stage.read([buffer.clone()], 3)
    assert stage.copied_bytes() == 48
    stage.read([buffer[:2]], 2)
    assert stage.copied_bytes() == 16  # the padding


def test_unchanged_kernel_parameters_are_not_patched() -> None:
    buffer, x = torch.zeros(3, 2), torch.ones(3, 2)
    stage = _C.InputCopier([_C.StaticInput(buffer, 0, 0, bytes(16), False)])
    assert stage.read([x], 3)
    assert not stage.read([x], 3)
    assert stage.read([x[:2]], 2)
    assert stage.read([x.clone()], 2)
    assert stage.read([torch.ones(2, 3).t()], 3)
    strided = torch.ones(2, 3).t()
    assert stage.read([strided], 3)
    assert not stage.read([strided], 3)


def test_a_stage_refuses_what_it_could_not_fill() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        _C.InputCopier([_C.StaticInput(torch.zeros(2), 0, 0, b"1", False)])
    with pytest.raises(ValueError, match="not dense"):
        _C.InputCopier([_C.StaticInput(torch.zeros(4, 4)[::2], 0, 0, bytes(16), False)])


def test_a_call_that_raised_leaves_nothing_of_its_inputs(backend: Backend) -> None:
    """Inputs of a call that raised are read again: the next call is not taken for the same."""
    graphed = cuda_graphed(lambda x, y: x - y, sizes=(2,))
    x, other, y = (values(backend, (2, 3), torch.int32) for _ in range(3))
    other += 1000
    for _ in range(3):
        graphed(x, y)
    gone = y.clone()
    _C.expire(gone, "gone")
    with pytest.raises(RuntimeError, match="gone"):
        graphed(other, gone)
    assert torch.equal(graphed(other, y), other - y)
    assert torch.equal(graphed(x, y), x - y)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no limit on memory here")
def test_no_memory_for_a_copy_overwrites_nothing(backend: Backend) -> None:
    """The call raises before anything changes: its inputs are copied in anew, and outputs are whole."""
    long = 1 << 24  # 64 MiB
    graphed = cuda_graphed(lambda x: (x * 2).expand(1, long).contiguous(), sizes=(1,))
    x, other = (values(backend, (1, 1), torch.int32) for _ in range(2))
    other += 1000
    for _ in range(3):
        held = graphed(x)
    with no_more_memory(backend), pytest.raises(RuntimeError, match="memory"):
        graphed(other)
    assert torch.equal(held, (x * 2).expand(1, long))
    first, second = graphed(other), graphed(x)
    for got, given in ((held, x), (first, other), (second, x)):
        assert torch.equal(got, (given * 2).expand(1, long))
    assert graphed.cache_info().hits == 4


@contextmanager
def no_more_memory(backend: Backend) -> Iterator[None]:
    """Sets a limit to the memory of this process, and takes what is left in large pieces."""
    if backend.device.type == "cuda":
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        limit = partial(torch.cuda.set_per_process_memory_fraction, device=backend.device)
        least, most = (torch.cuda.memory_reserved() + (64 << 20)) / total, 1.0
    else:
        import resource

        def limit(of_two: tuple[int, int]) -> None:
            resource.setrlimit(resource.RLIMIT_AS, of_two)

        most = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        least = used + (64 << 20), most[1]
    taken = []
    limit(least)
    try:
        with suppress(RuntimeError):
            while True:
                taken.append(torch.empty(32 << 20, dtype=torch.uint8, device=backend.device))
        yield
    finally:
        limit(most)


def moving() -> _C.InputCopier:
    return _C.InputCopier([_C.StaticInput(torch.zeros(3, 2), 0, 0, bytes(16), False)])


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("offset", [0, 3])
def test_outputs_of_any_length_move(length: int, offset: int) -> None:
    output = torch.randint(0, 256, (length,), dtype=torch.uint8)
    memory = torch.zeros(offset + length + 20, dtype=torch.uint8)
    copier = moving()
    copier.read([torch.ones(3, 2)], 3)
    copier.move([(output, memory[offset:])])
    copier.copy()
    assert torch.equal(memory[offset : offset + length], output)
    assert memory[:offset].sum() == memory[offset + length :].sum() == 0


def test_moves_are_patched_where_they_change() -> None:
    a, b, c = (torch.ones(4) for _ in range(3))
    copier = moving()
    assert not copier.move([])
    assert copier.move([(a, b)])
    assert not copier.move([(a, b)])
    assert copier.move([(a, c)])
    assert copier.move([(b, c)])
    assert copier.move([(b, c), (a, c)])
    assert copier.move([])  # the next call moves nothing
    assert not copier.move([])
    copier.move([(a, b)] * _C.MAX_MOVES)
    with pytest.raises(ValueError, match="more outputs than one launch moves"):
        copier.move([(a, b)] * (_C.MAX_MOVES + 1))


def test_more_outputs_than_one_launch_moves(backend: Backend) -> None:
    count = _C.MAX_MOVES + 3
    graphed = cuda_graphed(lambda x: [x + number for number in range(count)], sizes=(4,))
    kept = []
    for _ in range(5):
        x = values(backend, (3, 5), torch.int32)
        kept.append((x, graphed(x)))
    for x, outs in kept:
        for number, out in enumerate(outs):
            assert torch.equal(out, x + number)
    assert graphed.cache_info().copied == 2 * count
