"""Traps: two calls whose arguments differ by what shapes, dtypes and constants do not show."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend, equal, info, same_as_eager

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")

Call = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def take_turns(forward: Callable[..., Any], *calls: Call, times: int = 3) -> Any:
    """Calls a graphed forward and the plain one with equal arguments of each kind, several times."""
    graphed = cuda_graphed(forward)
    for _ in range(times):
        for make in calls:
            given = []
            for _ in range(2):
                torch.manual_seed(0)
                given.append(make())
            (args, kwargs), (args_, kwargs_) = given
            want, got = forward(*args, **kwargs), graphed(*args_, **kwargs_)
            equal(got, want)
            equal(given[1], given[0])  # what it wrote, it wrote to both
            del want, got
    return graphed


def served_apart(forward: Callable[..., Any], *calls: Call) -> None:
    """Asserts that each kind of call returns what eager does, and that graphs serve the last round."""
    graphed = take_turns(forward, *calls)
    before = info(graphed).hits
    assert before > 0, info(graphed)


def joined(x: Tensor, **features: Tensor) -> Tensor:
    return torch.cat([x, *features.values()], -1)


def test_keyword_arguments_come_in_another_order(backend: Backend) -> None:
    """The graph joins them in the order of the capture."""

    def features(*names: str) -> Call:
        return lambda: ((backend.randn(4, 2),), {name: backend.randn(4, 2) for name in names})

    served_apart(joined, features("user", "item"), features("item", "user"), features("user", "item"))


def bits(x: Tensor) -> Any:
    return x * 2, x.is_conj(), x.is_neg(), x.resolve_conj().resolve_neg()


BITS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda z: z,
    "conjugate": lambda z: z.conj(),
    "adjoint": lambda z: z.mH,
    "negative": lambda z: z.conj().imag,
    "window": lambda z: z.conj()[:, 1:, ::2],
}


@pytest.mark.parametrize("name", BITS)
def test_an_argument_is_conjugate_or_negative(backend: Backend, name: str) -> None:
    """The bytes are copied, and the bit that tells how to read them is lost."""

    def make(batch: int, change: Callable[[Tensor], Tensor]) -> Call:
        return lambda: ((change(backend.randn(batch, 3, 3, dtype=torch.complex64)),), {})

    change = BITS[name]
    served_apart(bits, make(4, change), make(3, change), make(4, BITS["plain"]), make(2, change))


def conjugates(x: Tensor) -> Any:
    return x.conj(), (x * 2).conj(), x.conj().imag, x.imag


@pytest.mark.parametrize("name", ["plain", "conjugate"])
def test_an_output_is_conjugate_or_negative(backend: Backend, name: str) -> None:
    """The bit is a part of the tensor that is returned, not of its memory."""
    graphed = cuda_graphed(conjugates)
    for _ in range(3):
        x = BITS[name](backend.randn(4, 3, dtype=torch.complex64))
        for got, want in zip(graphed(x), conjugates(x), strict=True):
            equal(got, want)
            assert (got.is_conj(), got.is_neg()) == (want.is_conj(), want.is_neg())
    assert info(graphed).hits > 0


def test_padded_rows_of_a_negative_argument(backend: Backend) -> None:
    """A padded row holds the number that pad gives, as the forward reads it."""
    graphed = cuda_graphed(lambda x: x / x, sizes=(4,), pad=2.0)
    for batch in (4, 3, 3, 3):
        x = backend.randn(batch, 3, dtype=torch.complex64).conj().imag
        equal(graphed(x), x / x)
    static = next(iter(graphed._cache().store.entries)).buckets[4].static[0]
    assert static[3].tolist() == [2.0] * 3


def test_a_tensor_without_memory(backend: Backend) -> None:
    """There is no address to copy from."""
    graphed = cuda_graphed(lambda x: x + 1)
    x = torch._efficientzerotensor(4, 3, device=backend.device)
    same_as_eager(graphed, x)
    assert info(graphed).hits == 0


def with_scale(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("scale", 5.0)
        return forward(*args, **kwargs)

    return wrapper


def rounded(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*[arg.round() for arg in args], **kwargs)

    return wrapper


def rounded_with_signature(forward: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*[arg.round() for arg in args], **kwargs)

    wrapper.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return wrapper


def scaled_sum(x: Tensor, y: Tensor | None = None, scale: float | None = None) -> Tensor:
    total = x if y is None else x + y
    return total if scale is None else total * scale


@pytest.mark.parametrize("wrapper", [with_scale, rounded, rounded_with_signature])
def test_a_wrapper_does_more_than_its_signature_shows(backend: Backend, wrapper: Any) -> None:
    """A default that is left out is none that is given, and a name is no position."""

    def call(*others: str) -> Call:
        return lambda: ((backend.randn(4, 3),), {name: values[name]() for name in others})

    values: dict[str, Any] = {"y": lambda: backend.randn(4, 3), "scale": lambda: None}
    both: Call = lambda: ((backend.randn(4, 3), backend.randn(4, 3)), {})  # noqa: E731
    served_apart(wrapper(scaled_sum), call(), call("scale"), both, call("y"), call("y", "scale"))


@pytest.mark.parametrize("by_name", [False, True])
def test_default_of_the_forward_is_replaced(backend: Backend, by_name: bool) -> None:
    """The graph holds the default of its capture."""

    class Net(nn.Module):
        if by_name:

            def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
                return x * scale
        else:

            def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:  # type: ignore[misc]
                return x * scale

    net = cuda_graphed(Net())
    x = backend.randn(4, 3)
    for value in (2.0, 5.0, 2.0):
        if by_name:
            Net.forward.__kwdefaults__["scale"] = value
        else:
            Net.forward.__defaults__ = (value,)
        for _ in range(3):
            equal(net(x).clone(), x * value)
            equal(net(x, scale=3.0).clone(), x * 3.0)
            equal(net(x, scale=2.0).clone(), x * 2.0)
    assert info(net).hits > 0


def made_dense(x: Tensor) -> Any:
    return x.contiguous(), x.is_contiguous(), x.flatten(1) * 2, outcome_of_view(x)


def outcome_of_view(x: Tensor) -> bool:
    try:
        x.view(x.shape[0] * x.shape[1], *x.shape[2:])
    except RuntimeError:
        return False
    return True


def numbers_of(x: Tensor) -> Any:
    return x.stride(), x * x.stride(0), x * 2


def offset_of(x: Tensor) -> Any:
    return x.storage_offset(), x * 2


GAPS: dict[str, Callable[[Backend, int], Tensor]] = {
    "dense": lambda backend, batch: backend.randn(batch, 4, 3),
    "first columns": lambda backend, batch: backend.randn(batch, 9, 3)[:, :4],
    "last columns": lambda backend, batch: backend.randn(batch, 9, 3)[:, 5:],
    "every other": lambda backend, batch: backend.randn(batch, 4, 6)[:, :, ::2],
    "one row": lambda backend, batch: backend.randn(1, 4, 3).expand(batch, 4, 3),
    "one column": lambda backend, batch: backend.randn(batch, 1, 3).expand(batch, 4, 3),
    "transposed": lambda backend, batch: backend.randn(batch, 3, 4).transpose(1, 2),
    "other first": lambda backend, batch: backend.randn(4, batch, 3).transpose(0, 1),
    "window": lambda backend, batch: backend.randn(batch + 3, 3).unfold(0, 4, 1).transpose(1, 2),
}


@pytest.mark.parametrize("forward", [made_dense, numbers_of, offset_of])
def test_arguments_have_gaps_or_none(backend: Backend, forward: Any) -> None:
    """A static input is dense: `contiguous()` returns it, where eager makes a copy."""
    calls: list[Call] = [lambda make=make: ((make(backend, 4),), {}) for make in GAPS.values()]
    served_apart(forward, *calls)


@pytest.mark.parametrize("name", GAPS)
def test_arguments_with_gaps_are_padded(backend: Backend, name: str) -> None:
    """Each stride would need a graph of its own."""
    net = cuda_graphed(lambda x: x * 2, sizes=(4,))
    for batch in (4, 3, 2, 3, 2):
        same_as_eager(net, GAPS[name](backend, batch), times=1)
    assert info(net).padded_rows > 0
    assert info(net).captures == 1


def test_rows_of_tensors_of_different_lengths(backend: Backend) -> None:
    """The stride of the batch differs at each call, and the forward can't see it."""
    net = cuda_graphed(lambda x: x * 2, sizes=(4,))
    for length in range(5, 12):
        same_as_eager(net, backend.randn(4, length, 3)[:, -1], times=1)
    assert info(net).hits == 6


def doubles_in_place(x: Tensor) -> Tensor:
    return x.flatten(1).mul_(2) + 1


def test_a_flat_view_is_written_to(backend: Backend) -> None:
    """With gaps it is a copy, without it is the argument."""
    take_turns(
        doubles_in_place,
        lambda: ((backend.randn(4, 3, 2, 2)[:, ::2],), {}),
        lambda: ((backend.randn(4, 2, 2, 2),), {}),
    )


def test_a_dense_copy_of_the_argument_is_written_to(backend: Backend) -> None:
    """The graph returns the argument itself, where eager returns a copy."""
    graphed = cuda_graphed(made_dense)
    for _ in range(3):
        x = torch.ones(4, 4, device=backend.device)
        graphed(x[:, :2])[0].zero_()
        assert x.eq(1).all()
        graphed(x[:, ::2])[0].zero_()
        assert x.eq(1).all()
        graphed(x)[0].zero_()
        assert x.eq(0).all()


def flags(x: Tensor) -> Any:
    return x * 2, x.requires_grad, isinstance(x, nn.Parameter), x.is_leaf


def of_a_graph(x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x.requires_grad_() * 1


FLAGS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "requires grad": lambda x: x.requires_grad_(),
    "parameter": nn.Parameter,
    "frozen parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "has a history": of_a_graph,
}


@pytest.mark.parametrize("name", FLAGS)
def test_forward_asks_what_an_argument_is(backend: Backend, name: str) -> None:
    """A static input is a plain tensor."""
    changes = FLAGS[name], FLAGS["plain"]
    calls: list[Call] = [
        lambda change=change: ((change(backend.randn(4, 3)),), {}) for change in changes
    ]
    served_apart(flags, *calls)


def inferred(x: Tensor) -> Any:
    return x * 2, x.is_inference()


def test_forward_asks_for_an_inference_tensor(backend: Backend) -> None:
    """A static input is none."""

    def make() -> Any:
        with torch.inference_mode():
            return (backend.randn(4, 3),), {}

    served_apart(inferred, make, lambda: ((backend.randn(4, 3),), {}))


def test_forward_reads_a_version(backend: Backend) -> None:
    """The counter of a static input is another one, and it goes on."""
    graphed = take_turns(
        lambda x: x * x._version,
        lambda: ((backend.randn(4, 3).add_(1),), {}),
        lambda: ((backend.randn(4, 3).add_(1).add_(1),), {}),
    )
    assert info(graphed).hits == 0


class Cache:
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


def writes_first(x: Tensor, first: Cache, second: Cache) -> Any:
    first.keys.add_(x)
    return second.keys * 2, first.keys is second.keys


def check_objects(
    forward: Any, rows: Callable[..., Tensor], makes: list[Callable[[Tensor], tuple[Any, ...]]]
) -> Any:
    """Passes new objects over one tensor of zeros, three times each, and compares it afterwards."""
    graphed = cuda_graphed(forward)
    for make in makes * 3:
        kept = [torch.zeros(8, 3, device=rows().device) for _ in range(2)]
        objects = [make(each) for each in kept]
        for _ in range(3):
            x = rows()
            want, got = forward(x, *objects[0]), graphed(x, *objects[1])
            equal(got, want)
            equal(kept[1], kept[0])
            del want, got
        del objects
    return graphed


def one(keys: Tensor) -> tuple[Cache, Cache]:
    return Cache(keys[:4]), Cache(keys[:4].clone())


def both(keys: Tensor) -> tuple[Cache, Cache]:
    rows = keys[:4]
    return Cache(rows), Cache(rows)


def views(keys: Tensor) -> tuple[Cache, Cache]:
    return Cache(keys[:4]), Cache(keys[:4])


def halves(keys: Tensor) -> tuple[Cache, Cache]:
    return Cache(keys[:4]), Cache(keys[2:6])


def itself(keys: Tensor) -> tuple[Cache, Cache]:
    cache = Cache(keys[:4])
    return cache, cache


def test_two_objects_share_a_tensor(backend: Backend) -> None:
    """The graph reads and writes two tensors, or one, as at its capture."""
    graphed = check_objects(
        writes_first, lambda: backend.randn(4, 3), [one, both, views, halves, itself]
    )
    assert info(graphed).hits > info(graphed).captures


def writes_object(x: Tensor, cache: Cache, other: Tensor) -> Any:
    cache.keys.add_(x)
    return other * 2, other is cache.keys


def reads_object(x: Tensor, cache: Cache, other: Tensor) -> Any:
    return x + cache.keys, other * 2, other is cache.keys


@pytest.mark.parametrize("forward", [writes_object, reads_object])
def test_an_argument_lies_in_an_object(backend: Backend, forward: Any) -> None:
    """The argument is copied before the graph writes to the object."""

    def inside(keys: Tensor) -> tuple[Cache, Tensor]:
        cache = Cache(keys[:4])
        return cache, cache.keys

    def view(keys: Tensor) -> tuple[Cache, Tensor]:
        return Cache(keys[:4]), keys[2:6]

    def apart(keys: Tensor) -> tuple[Cache, Tensor]:
        return Cache(keys[:4]), keys[:4].clone()

    graphed = check_objects(forward, lambda: backend.randn(4, 3), [apart, inside, view])
    assert info(graphed).hits > 0


def test_an_object_holds_state_of_the_module(backend: Backend) -> None:
    """The memory of an object is taken over by the next one, and the module's is not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(4, 3, device=backend.device))

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            cache.keys.add_(x)
            return self.keys * 2

    twin = Net()
    net = cuda_graphed(copy.deepcopy(twin))
    for turn in range(9):
        if turn % 4 == 3:
            for each in (net, twin):
                each.keys = torch.ones(4, 3, device=backend.device)
        made = [Cache(each.keys if turn % 2 else torch.zeros_like(each.keys)) for each in (net, twin)]
        for _ in range(3):
            x = backend.randn(4, 3)
            equal(net(x, made[0]).clone(), twin(x, made[1]))
            equal(made[0].keys, made[1].keys)
            equal(net.keys, twin.keys)
        del made
    assert info(net).hits > 0


def test_a_key_of_a_dictionary_is_a_set(backend: Backend) -> None:
    """Two sets are equal and are gone through in another order."""
    orders = [frozenset([8, 0]), frozenset([0, 8])]
    assert [list(each) for each in orders] == [[8, 0], [0, 8]]

    def forward(x: Tensor, table: dict[Any, int]) -> Any:
        return torch.stack([x * number for key in table for number in key])

    calls: list[Call] = [lambda key=key: ((backend.randn(4, 3), {key: 1}), {}) for key in orders]
    served_apart(forward, *calls)


def test_a_negative_view_is_cast_in_inference_mode(backend: Backend) -> None:
    """torch's own `half()` has the wrong sign there, under the mode that records the first call."""
    model = cuda_graphed(lambda x: x.half(), sizes=(2,))
    with torch.inference_mode():
        for _ in range(3):
            x = torch._neg_view(backend.randn(2, 3))
            equal(model(x), x.half())
