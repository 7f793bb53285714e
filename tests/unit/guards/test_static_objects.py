"""Objects that are passed as arguments get static memory, which the next object takes over."""

import copy
import gc
import random
import re
import threading
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import CaptureError, GraphCacheWarning, cuda_graphed, default_pool
from graphcache.guards.static_objects import _SLOTS, Slots
from graphcache.report.reasons import Reason
from tests.helpers import Backend, Counter

# Warnings about eager calls are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")

LENGTH = 16


class Layer:
    def __init__(self, x: Tensor) -> None:
        self.keys = torch.zeros(x.shape[0], LENGTH, x.shape[1], device=x.device)
        self.length = torch.zeros(1, dtype=torch.int64, device=x.device)


class Cache:
    """As those of transformers: layers that hold tensors, which a forward writes to."""

    def __init__(self, x: Tensor | None = None, scale: float = 1.0) -> None:
        self.scale = scale
        self.layers = [] if x is None else [Layer(x), Layer(x)]


class Decoder(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8, device=device)

    def forward(self, x: Tensor, cache: Cache) -> dict[str, Any]:
        for layer in cache.layers:
            layer.keys.index_copy_(1, layer.length, self.linear(x)[:, None])
            layer.length += 1
            x = x + layer.keys.sum(1) * cache.scale
        return {"y": x, "cache": cache}


class Pair:
    """A graphed decoder and its twin, each with a cache."""

    def __init__(self, backend: Backend, **options: Any) -> None:
        self.backend = backend
        self.twin = Decoder(backend.device)
        self.graphed = cuda_graphed(copy.deepcopy(self.twin), **options)

    def new(self, batch: int = 2, **options: Any) -> tuple[Cache, Cache]:
        x = self.backend.randn(batch, 8)
        return Cache(x, **options), Cache(x, **options)

    def step(self, caches: tuple[Cache, Cache], steps: int = 1) -> None:
        for _ in range(steps):
            x = self.backend.randn(caches[0].layers[0].keys.shape[0], 8)
            mine, theirs = self.twin(x, caches[0]), self.graphed(x, caches[1])
            torch.testing.assert_close(theirs["y"], mine["y"])
            assert theirs["cache"] is caches[1]
            same(*caches)

    def slots(self) -> list[Any]:
        gc.collect()
        slots = _SLOTS.get(default_pool(self.backend.device))
        return [] if slots is None else list(slots._by_shape.values())

    @property
    def info(self) -> Any:
        return self.graphed.forward.cache_info()


def same(mine: Cache, theirs: Cache) -> None:
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close(b.keys, a.keys)
        torch.testing.assert_close(b.length, a.length)


@pytest.fixture
def pair(backend: Backend) -> Pair:
    return Pair(backend)


def test_a_new_object_takes_the_place_of_one_that_is_gone(pair: Pair) -> None:
    """One capture serves them all: a decode makes a new cache for each text."""
    for _ in range(4):
        pair.step(pair.new(), steps=5)
    assert (pair.info.captures, pair.info.hits) == (1, 19)


def test_adopted_object_keeps_its_contents(pair: Pair) -> None:
    """Also where a view of it is read elsewhere: it follows."""
    pair.step(pair.new(), steps=3)
    caches = pair.new()
    view = caches[1].layers[0].keys[0]
    for cache in caches:
        cache.layers[0].keys[0, 5:] = 3.0
    pair.step(caches, steps=3)
    torch.testing.assert_close(view, caches[0].layers[0].keys[0])
    view[7] = 9.0
    caches[0].layers[0].keys[0, 7] = 9.0
    pair.step(caches)
    assert pair.info.captures == 1


def test_two_objects_take_turns(pair: Pair) -> None:
    """Both are in use, so each has graphs of its own."""
    first, second = pair.new(), pair.new()
    for _ in range(4):
        pair.step(first)
        pair.step(second)
    assert (pair.info.captures, pair.info.hits) == (2, 6)


@pytest.mark.parametrize("kept", [lambda t: t, lambda t: t[0], lambda t: t.untyped_storage()])
def test_a_tensor_of_an_object_that_is_gone_is_held(pair: Pair, kept: Callable[[Tensor], Any]) -> None:
    """Its memory can't be given to the next object: somebody reads it still."""
    caches = pair.new()
    pair.step(caches, steps=3)
    held, want = kept(caches[1].layers[1].keys), caches[1].layers[1].keys.clone()
    del caches
    pair.step(pair.new(), steps=3)
    if not isinstance(held, Tensor):
        held = torch.empty(0, device=want.device).set_(held).view_as(want)
    torch.testing.assert_close(held, want if held.dim() == 3 else want[0])
    assert pair.info.captures == 2


def test_tensors_of_the_object_are_replaced(pair: Pair) -> None:
    caches = pair.new()
    for _ in range(3):
        pair.step(caches, steps=3)
        for cache in caches:
            cache.layers[0].keys = cache.layers[0].keys * 0.5
    pair.step(caches, steps=2)
    assert pair.info.captures == 1


def test_a_tensor_of_the_object_is_replaced_and_held(pair: Pair) -> None:
    caches = pair.new()
    pair.step(caches, steps=3)
    old = caches[1].layers[0].keys
    want = old.clone()
    for cache in caches:
        cache.layers[0].keys = cache.layers[0].keys * 0.5
    pair.step(caches, steps=3)
    torch.testing.assert_close(old, want)


def test_a_number_in_the_object_changes(pair: Pair) -> None:
    """A graph has it baked in."""
    caches = pair.new()
    pair.step(caches, steps=3)
    for cache in caches:
        cache.scale = 0.5
    pair.step(caches, steps=3)
    for cache in caches:
        cache.scale = 1.0
    pair.step(caches, steps=3)
    assert pair.info.captures == 2


def test_static_object_gets_more_layers(pair: Pair) -> None:
    caches = pair.new()
    pair.step(caches, steps=3)
    for cache in caches:
        cache.layers.append(Layer(torch.ones(2, 8, device=pair.backend.device)))
    pair.step(caches, steps=3)


def test_static_object_is_passed_at_other_batches(pair: Pair) -> None:
    for batch in (2, 3, 2, 3, 4):
        pair.step(pair.new(batch), steps=3)
    assert pair.info.captures == 3


class Filling(Decoder):
    def forward(self, x: Tensor, cache: Cache) -> dict[str, Any]:
        if not cache.layers:
            cache.layers.extend([Layer(x), Layer(x)])
        return super().forward(x, cache)


def test_forward_fills_a_new_object(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a prefill does, eagerly; the steps after it have graphs, also the next time."""
    monkeypatch.setattr("tests.unit.guards.test_static_objects.Decoder", Filling)
    pair = Pair(backend)
    for number in range(5):
        caches = Cache(), Cache()
        x = backend.randn(2, 8)
        torch.testing.assert_close(pair.graphed(x, caches[1])["y"], pair.twin(x, caches[0])["y"])
        pair.step(caches, steps=4)
        assert pair.info.captures == 1, number
    assert pair.info.hits == 19
    assert any("it changes cache.layers" in reason for reason in pair.info.eager)


class Functional(Decoder):
    def forward(self, x: Tensor, cache: Cache) -> dict[str, Any]:
        for layer in cache.layers:
            layer.keys = layer.keys.index_copy(1, layer.length, x[:, None])
        return super().forward(x, cache)


def test_forward_replaces_tensors_of_a_static_object(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay would leave the object with the tensor of the capture."""
    monkeypatch.setattr("tests.unit.guards.test_static_objects.Decoder", Functional)
    pair = Pair(backend)
    caches = pair.new()
    with pytest.warns(GraphCacheWarning, match="it changes the tensors of cache"):
        pair.step(caches, steps=6)
    assert pair.info.hits == 0


class Warming(Decoder):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.runs = Counter()

    def forward(self, x: Tensor, cache: Cache) -> dict[str, Any]:
        if self.runs.add() == 2:
            cache.scale = 3.0
        return super().forward(x, cache)


def test_capture_changes_the_object_by_itself(backend: Backend) -> None:
    """The graph has what the forward's Python made of it when it ran once more."""
    twin, graphed = Decoder(backend.device), cuda_graphed(Warming(backend.device))
    x = backend.randn(2, 8)
    caches = Cache(x), Cache(x)
    for _ in range(4):
        caches[1].scale = 1.0
        torch.testing.assert_close(graphed(x, caches[1])["y"], twin(x, caches[0])["y"])


class Counting(Decoder):
    def forward(self, x: Tensor, cache: Any) -> dict[str, Any]:
        cache.seen = getattr(cache, "seen", 0) + 1
        return super().forward(x * cache.seen, cache)


def test_forward_counts_in_a_static_object(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would not."""
    monkeypatch.setattr("tests.unit.guards.test_static_objects.Decoder", Counting)
    pair = Pair(backend)
    caches = pair.new()
    with pytest.warns(GraphCacheWarning, match=r"it changes cache\.seen, which no graph replays"):
        pair.step(caches, steps=8)
    assert caches[1].seen == 8
    assert pair.info.hits == 0


def test_static_object_outlives_its_module(pair: Pair) -> None:
    """Its memory is that of graphs that are no more."""
    pair.step(pair.new(), steps=3)
    caches = pair.new()
    pair.step(caches, steps=3)
    del pair.graphed
    gc.collect()
    pair.backend.pool().trim()
    same(*caches)
    for cache in caches:
        cache.layers[0].keys.add_(1)
    same(*caches)


def test_a_copy_of_the_object_has_memory_of_its_own(pair: Pair) -> None:
    caches = pair.new()
    pair.step(caches, steps=3)
    copies = copy.deepcopy(caches)
    pair.step(caches, steps=3)
    pair.step(copies, steps=3)
    pair.step(caches, steps=1)


def test_layers_lie_in_one_block(pair: Pair) -> None:
    """Another tensor of that block is not in the object at all, and follows."""
    blocks = []
    for _ in range(3):
        caches = pair.new()
        for cache in caches:
            block = torch.zeros(3, 2, LENGTH, 8, device=pair.backend.device)
            block[2] = 7.0
            cache.layers[0].keys, cache.layers[1].keys = block[0], block[1]
            blocks.append(block)
        pair.step(caches, steps=3)
        for block in blocks[-2:]:
            torch.testing.assert_close(block[2], torch.full_like(block[2], 7.0))
        torch.testing.assert_close(*blocks[-2:])


def test_static_object_tensor_lies_in_a_larger_block(pair: Pair) -> None:
    for rows in (2, 5, 3, 2):
        caches = pair.new()
        for cache in caches:
            block = torch.zeros(rows, LENGTH, 8, device=pair.backend.device)
            cache.layers[0].keys = block[:2]
        pair.step(caches, steps=3)


def test_two_layers_share_a_tensor(pair: Pair) -> None:
    for shares in (True, False, True):
        caches = pair.new()
        for cache in caches:
            if shares:
                cache.layers[1].length = cache.layers[0].length
        pair.step(caches, steps=3)


def test_another_object_at_each_call(pair: Pair) -> None:
    """To let each of them in would cost more than it gains."""
    for _ in range(14):
        pair.step(pair.new())
    assert any("another object at each call" in reason for reason in pair.info.eager)
    assert Reason.OBJECT_EACH_CALL in {reason.reason for reason in pair.info.eager}
    before = pair.info.hits
    pair.step(pair.new(), steps=4)  # one that is passed again is let in
    assert pair.info.hits == before + 3


def test_blocks_share_the_object(backend: Backend) -> None:
    """Each of them has graphs over the same memory."""

    class Block(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            layer = cache.layers[self.number]
            layer.keys.index_copy_(1, layer.length, x[:, None])
            layer.length += 1
            return x + layer.keys.sum(1)

    twins = [Block(0), Block(1)]
    graphed = [cuda_graphed(copy.deepcopy(block)) for block in twins]
    for _ in range(3):
        x = backend.randn(2, 8)
        caches = Cache(x), Cache(x)
        for _ in range(4):
            x = backend.randn(2, 8)
            mine = twins[1](twins[0](x, caches[0]), caches[0])
            theirs = graphed[1](graphed[0](x, caches[1]), caches[1])
            torch.testing.assert_close(theirs, mine)
            same(*caches)
        del mine, theirs
    assert [block.forward.cache_info().captures for block in graphed] == [1, 1]


def test_static_object_is_passed_twice(backend: Backend) -> None:
    model = cuda_graphed(lambda x, a, b: x + a.layers[0].keys.sum() - b.layers[1].keys.sum())
    x = backend.randn(2, 8)
    one, other = Cache(x), Cache(x)
    other.layers[0].keys += 1
    for a, b in ((one, one), (one, one), (one, other), (one, other), (other, one), (one, one)):
        want = x + a.layers[0].keys.sum() - b.layers[1].keys.sum()
        torch.testing.assert_close(model(x, a, b), want)
        one.layers[0].keys += 0.5


def test_padding_with_slots_in_the_object(backend: Backend) -> None:
    """Rows of the cache are chosen by an argument, so that any batch fits."""

    def forward(x: Tensor, slots: Tensor, cache: Cache) -> Tensor:
        keys = cache.layers[0].keys[:, 0]
        keys.index_copy_(0, slots, x)
        return keys[slots] * 2

    model = cuda_graphed(forward, sizes=(2, 4), pad={"slots": 8})
    caches = [Cache(backend.randn(9, 8)) for _ in range(2)]
    for batch in (4, 3, 2, 1, 3, 1, 4):
        x, slots = backend.randn(batch, 8), torch.arange(batch, device=backend.device) + 2
        torch.testing.assert_close(model(x, slots, caches[1]), forward(x, slots, caches[0]))
        torch.testing.assert_close(caches[1].layers[0].keys[:8], caches[0].layers[0].keys[:8])
    info = model.cache_info()
    assert info.sizes == (2, 4)
    assert info.padded_rows >= 2


def test_objects_of_inference_mode_and_others(pair: Pair) -> None:
    for _ in range(2):
        with torch.inference_mode():
            caches = pair.new()
        with torch.inference_mode():
            pair.step(caches, steps=3)
        pair.step(pair.new(), steps=3)


def test_static_object_needs_gradients(pair: Pair) -> None:
    caches = pair.new()
    pair.step(caches, steps=3)
    for cache in caches:
        cache.layers[0].keys = torch.ones_like(cache.layers[0].keys).requires_grad_()
    with torch.no_grad():
        pair.step(caches, steps=2)


def test_static_object_refers_to_itself(pair: Pair) -> None:
    for _ in range(2):
        caches = pair.new()
        for cache in caches:
            cache.parent = cache  # type: ignore[attr-defined]
        pair.step(caches, steps=3)
        del caches, cache
        gc.collect()
    assert pair.info.captures == 1


class Dict(UserDict):  # type: ignore[type-arg]
    pass


class Exact(dict):  # type: ignore[type-arg]
    pass


class Draws(random.Random):
    """Its state lies in memory of C's."""


def with_a_lock(x: Tensor) -> Cache:
    cache = Cache(x)
    cache.lock = threading.Lock()  # type: ignore[attr-defined]
    return cache


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_a_lock, r"cache\.lock is an object of type _thread\.lock"),
        (lambda x: Draws(1), "cache is an object of type"),
        (lambda x: Exact(keys=x), "cache is an object of type"),
        (lambda x: iter([x]), "cache is an object of type"),
    ],
)
def test_an_object_that_can_not_be_compared(
    backend: Backend, make: Callable[[Tensor], Any], reason: str
) -> None:
    """Such an object runs eagerly, with a reason."""
    model = cuda_graphed(lambda x, cache: x + 1)
    x = backend.randn(2, 8)
    for _ in range(3):
        torch.testing.assert_close(model(x, make(x)), x + 1)
    assert any(re.search(reason, each) for each in model.cache_info().eager)
    assert model.cache_info().hits == 0


def test_a_dictionary_of_a_class_in_python(backend: Backend) -> None:
    """The items lie in an attribute, and its tensors are others at each call, which ends eagerly."""
    model = cuda_graphed(lambda x, more: x + more["a"])
    x = backend.randn(2, 8)
    for number in range(14):
        a = torch.full((2, 8), float(number), device=backend.device)
        torch.testing.assert_close(model(x, Dict(a=a)), x + number)


def test_a_weak_output_is_put_into_the_object(pair: Pair) -> None:
    """The next replay would overwrite it."""
    caches = pair.new()
    pair.step(caches, steps=3)
    x = pair.backend.randn(2, 8)
    for model, cache in ((pair.twin, caches[0]), (pair.graphed, caches[1])):
        cache.layers[0].start = model(x, cache)["y"]
    x = pair.backend.randn(2, 8)
    torch.testing.assert_close(pair.graphed(x, caches[1])["y"], pair.twin(x, caches[0])["y"])
    same(*caches)
    torch.testing.assert_close(caches[1].layers[0].start, caches[0].layers[0].start)
    assert any("holds an output of a graph" in reason for reason in pair.info.eager)
    assert Reason.OBJECT_HOLDS_OUTPUT in {reason.reason for reason in pair.info.eager}


def test_warmup_does_not_touch_the_object(pair: Pair) -> None:
    caches = pair.new()
    with pytest.warns(GraphCacheWarning, match="it may change cache"):
        pair.graphed.forward.warmup(pair.backend.randn(2, 8), caches[1])
    pair.step(caches, steps=3)


def test_memory_of_objects_that_are_gone_is_not_kept_for_ever(pair: Pair) -> None:
    """A decode of each length has a cache of its own shape: only the last few keep theirs."""
    sizes = [2, 3, 4, 5, 6, 7, 8]
    for batch in sizes:
        pair.step(pair.new(batch), steps=3)
    assert pair.info.sizes == (*sizes[-5:],)
    pair.step(pair.new(8), steps=3)  # its graphs are still there
    assert pair.info.captures == len(sizes)


def test_memory_is_not_kept_for_what_can_not_be_captured(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise CaptureError("it can't be")

    monkeypatch.setattr("graphcache.capture.ladder.capture_or_warm_up", fails)
    caches = pair.new()
    with pytest.warns(GraphCacheWarning, match="it can't be"):
        pair.step(caches, steps=3)
    # That is not tried again for another object, and no place is looked for where it could live.
    monkeypatch.setattr(Slots, "of", fails)
    pair.step(pair.new(), steps=3)
    assert pair.info.eager["it can't be"] == 5
    assert not any(True for slots in pair.slots() for _ in slots)
