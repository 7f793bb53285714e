"""Changes of Python values that each replay repeats, and those that none can."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import config, cuda_graphed
from graphcache.wrappers import graph_cache_of
from tests.helpers import Backend, equal, info

pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
Forward = Callable[[Any, Tensor], Any]


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Model(nn.Module):
    def __init__(self, forward: Forward, **attributes: Any) -> None:
        super().__init__()
        self._run = forward
        self.up = nn.Linear(4, 4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def values(of: Any) -> Any:
    """Returns all Python values of an object, tensors as lists, each with its type."""
    if isinstance(of, Tensor):
        return of.tolist()
    if isinstance(of, dict):
        return {key: values(item) for key, item in of.items()}
    if isinstance(of, (list, tuple)):
        return [values(item) for item in of]
    if isinstance(of, Slotted):
        return values(of.n)
    if isinstance(of, SimpleNamespace):
        return values(vars(of))
    return type(of), of


def state(model: Model) -> Any:
    held = {name: item for name, item in vars(model).items() if name[0] != "_" and name != "forward"}
    return values(held), values(dict(model.named_buffers()))


class Pair:
    """A model and its graphed copy, which are called side by side."""

    def __init__(self, backend: Backend, forward: Forward, **attributes: Any) -> None:
        self.backend = backend
        self.twin = Model(forward, **attributes).to(backend.device)
        self.model: Any = cuda_graphed(copy.deepcopy(self.twin))

    def step(self, calls: int = 1, batch: int = 3) -> None:
        with torch.inference_mode():
            for _ in range(calls):
                x = self.backend.randn(batch, 4)
                equal(self.model(x), self.twin(x))
                got, want = state(self.model), state(self.twin)
                if str(got) != str(want):
                    equal(flat(got), flat(want))

    @property
    def hits(self) -> int:
        return info(self.model).hits


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for item in tree.items() for leaf in flat(item)]
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in flat(item)]
    return [tree if isinstance(tree, (int, float)) else str(tree)]


def attribute(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.up(x) * (2 if m.n > 9 else 1)


def of_an_object(m: Any, x: Tensor) -> Any:
    m.n.seen += 3
    return m.up(x) * (2 if m.n.seen >= 30 else 1)


def in_a_list(m: Any, x: Tensor) -> Any:
    m.n[1] -= 1
    return m.up(x) * (2 if m.n[1] < -9 else 1)


def in_a_dict(m: Any, x: Tensor) -> Any:
    m.n["k"] += 1
    return m.up(x) * (2 if m.n["k"] > 9 else 1)


def in_a_slot(m: Any, x: Tensor) -> Any:
    m.n.n += 1
    return m.up(x) * (2 if m.n.n > 9 else 1)


def by_rows(m: Any, x: Tensor) -> Any:
    m.n += x.shape[0]
    return m.up(x) * (2 if m.n > 30 else 1)


def several(m: Any, x: Tensor) -> Any:
    m.last = m.n
    m.n += 1
    m.next = m.n + 5
    return m.up(x)


def many_times(m: Any, x: Tensor) -> Any:
    for _ in range(3):
        m.n += 1
    return m.up(x)


def clamped(m: Any, x: Tensor) -> Any:
    m.n = min(m.n + 1, 10)
    return m.up(x) * (2 if m.n == 10 else 1)


def kept(m: Any, x: Tensor) -> Any:
    m.seen = m.up(x).softmax(-1)
    return m.seen * x


def kept_in_a_list(m: Any, x: Tensor) -> Any:
    m.seen = [m.up(x), x * 2]
    return m.seen[0] + 1


def kept_argument(m: Any, x: Tensor) -> Any:
    m.seen = x
    return m.up(x)


def kept_in_a_buffer(m: Any, x: Tensor) -> Any:
    m.held = m.up(x)
    return m.held + 1


def flagged(m: Any, x: Tensor) -> Any:
    m.flag, m.mode, m.n = True, "used", None
    return m.up(x)


REPEATED: dict[str, tuple[Forward, dict[str, Any]]] = {
    "attribute": (attribute, {"n": 0}),
    "of an object": (of_an_object, {"n": SimpleNamespace(seen=0)}),
    "in a list": (in_a_list, {"n": ["a", 0]}),
    "in a dict": (in_a_dict, {"n": {"k": 0}}),
    "in an ordered dict": (in_a_dict, {"n": OrderedDict(k=0)}),
    "in a slot": (in_a_slot, {"n": Slotted()}),
    "by rows": (by_rows, {"n": 0}),
    "several": (several, {"n": 0, "last": 0, "next": 0}),
    "many times": (many_times, {"n": 0}),
    "clamped": (clamped, {"n": 0}),
    "tensor": (kept, {"seen": None}),
    "list of tensors": (kept_in_a_list, {"seen": None}),
    "argument": (kept_argument, {"seen": None}),
}


@pytest.mark.parametrize("case", REPEATED)
def test_replays_change_what_eager_changes(backend: Backend, case: str) -> None:
    forward, attributes = REPEATED[case]
    pair = Pair(backend, forward, **attributes)
    pair.step(24)
    assert pair.hits >= 18
    assert info(pair.model).captures <= 5
    pair.step(12, batch=5)
    pair.step(3)
    assert pair.hits >= 26


def test_buffer_that_the_forward_replaces_is_replaced(backend: Backend) -> None:
    pair = Pair(backend, kept_in_a_buffer)
    for module in (pair.twin, pair.model):
        module.register_buffer("held", torch.zeros(3, 4, device=backend.device))
    pair.step(12)
    assert pair.hits >= 8


def test_constants_are_set_by_replays(backend: Backend) -> None:
    pair = Pair(backend, flagged, flag=False, mode="", n=None)
    for call in range(12):
        for module in (pair.twin, pair.model):
            module.flag, module.mode, module.n = False, f"reset {call}", None
        pair.step()
    assert pair.hits >= 8


def indexed(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.up(x) * m.scales[m.n]


def long_modulo(m: Any, x: Tensor) -> Any:
    m.n = (m.n + 1) % 11
    return m.up(x) * (m.n + 1)


def multiplied(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.up(x) * m.n


def returned(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.up(x), m.n


def formatted(m: Any, x: Tensor) -> Any:
    m.n += 1
    m.name = f"step {m.n}"
    return m.up(x)


def of_a_float(m: Any, x: Tensor) -> Any:
    m.n += 0.5
    return m.up(x) * (2 if m.n > 3 else 1)


def asks_for_its_type(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.up(x) * (2 if type(m.n) is int and m.n > 6 else 1)


def as_a_key(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.up(x) * m.table.get(m.n, 1.0)


def recurrent(m: Any, x: Tensor) -> Any:
    m.h = (m.up(x) + m.h).tanh()
    return m.h * 2


def moved_on(m: Any, x: Tensor) -> Any:
    m.last, m.now = m.now, m.up(x)
    return m.now * 2


def remembers_the_argument(m: Any, x: Tensor) -> Any:
    if m.key is not x:
        m.key, m.found = x, m.up(x)
    return m.found + 1


def in_a_new_list(m: Any, x: Tensor) -> Any:
    m.n += 1
    m.log = [m.n]
    return m.up(x)


EAGER: dict[str, tuple[Forward, dict[str, Any]]] = {
    "index": (indexed, {"n": 0, "scales": [float(i) for i in range(99)]}),
    "long modulo": (long_modulo, {"n": 0}),
    "multiplied": (multiplied, {"n": 0}),
    "returned": (returned, {"n": 0}),
    "formatted": (formatted, {"n": 0, "name": ""}),
    "float": (of_a_float, {"n": 0.0}),
    "type": (asks_for_its_type, {"n": 0}),
    "key": (as_a_key, {"n": 0, "table": {9: 2.0}}),
    "recurrent": (recurrent, {"h": torch.zeros(4)}),
    "moved on": (moved_on, {"last": None, "now": None}),
    "identity": (remembers_the_argument, {"key": None, "found": None}),
    "in a new list": (in_a_new_list, {"n": 0, "log": []}),
    "huge": (attribute, {"n": 2**70}),
}


@pytest.mark.parametrize("case", EAGER)
def test_change_that_no_replay_can_repeat_runs_eagerly(backend: Backend, case: str) -> None:
    forward, attributes = EAGER[case]
    pair = Pair(backend, forward, **attributes)
    for module in (pair.twin, pair.model):
        if "h" in attributes:
            module.h = module.h.to(backend.device)
    pair.step(12)
    assert pair.hits == 0


def started_anew(m: Any, x: Tensor) -> Any:
    m.n += 1
    y = m.up(x)
    if m.n >= 8:
        m.n = 0
        y = y * 2
    return y


def counted_down(m: Any, x: Tensor) -> Any:
    m.n -= 1
    if m.n <= 0:
        m.n = 6
    return m.up(x)


def by_steps(m: Any, x: Tensor) -> Any:
    m.n += 1
    y = m.up(x)
    for bound in (3, 5, 7, 9, 11):
        if m.n < bound:
            return y * bound
    m.n = 0
    return y


def flipped(m: Any, x: Tensor) -> Any:
    m.flag = not m.flag
    return m.up(x) if m.flag else -m.up(x)


def renamed(m: Any, x: Tensor) -> Any:
    m.mode = "b" if m.mode == "a" else "a"
    return m.up(x) if m.mode == "a" else -m.up(x)


def toggled(m: Any, x: Tensor) -> Any:
    m.n = 1 - m.n
    return m.up(x) * (1 + m.n)


def toggled_bit(m: Any, x: Tensor) -> Any:
    m.n ^= 1
    return m.up(x) + m.n


def modulo(m: Any, x: Tensor) -> Any:
    m.n = (m.n + 1) % 3
    return m.up(x) * (m.n + 1)


def ring(m: Any, x: Tensor) -> Any:
    y = m.up(x) * m.scales[m.n[0]]
    m.n[0] = (m.n[0] + 1) % len(m.scales)
    return y


def swapped(m: Any, x: Tensor) -> Any:
    m.n, m.k = m.k, m.n
    return m.up(x) * (2 if m.n < m.k else 1)


CYCLES: dict[str, tuple[Forward, dict[str, Any], int]] = {
    "started anew": (started_anew, {"n": 0}, 2),
    "counted down": (counted_down, {"n": 6}, 2),
    "by steps": (by_steps, {"n": 0}, 6),
    "flipped": (flipped, {"flag": False}, 2),
    "renamed": (renamed, {"mode": "a"}, 2),
    "toggled": (toggled, {"n": 0}, 2),
    "toggled bit": (toggled_bit, {"n": 1}, 2),
    "modulo": (modulo, {"n": 0}, 3),
    "ring": (ring, {"n": [0], "scales": [1.0, 2.0, 3.0, 4.0]}, 4),
    "swapped": (swapped, {"n": 0, "k": 1}, 2),
}


@pytest.mark.parametrize("case", CYCLES)
def test_values_that_come_back_have_a_graph_each(backend: Backend, case: str) -> None:
    forward, attributes, graphs = CYCLES[case]
    pair = Pair(backend, forward, **attributes)
    pair.step(40)
    assert info(pair.model).captures == graphs
    before = pair.hits
    pair.step(30)
    assert info(pair.model).captures == graphs
    assert pair.hits == before + 30


def test_count_that_starts_anew_by_an_eager_call(backend: Backend) -> None:
    """The last call of a cycle reads a value; graphs serve the rest."""

    def forward(m: Any, x: Tensor) -> Any:
        m.n += 1
        y = m.up(x)
        if m.n >= 6:
            m.n = 0
            y.sum().item()
        return y

    pair = Pair(backend, forward, n=0)
    pair.step(36)
    assert info(pair.model).captures == 1
    assert pair.hits >= 25


def test_counting_replays_do_not_repeat_harmlessly(backend: Backend) -> None:
    pair = Pair(backend, attribute, n=0)
    pair.step(3)
    cache = graph_cache_of(pair.model)
    assert pair.hits > 0
    assert cache is not None
    assert not cache.repeats_harmlessly()


def test_counter_is_set_by_the_user(backend: Backend) -> None:
    pair = Pair(backend, attribute, n=0)
    for value in (0, 20, -3, True, 2.5, 8, 10**30, 3):
        pair.model.n = pair.twin.n = value
        pair.step(4)
    assert pair.hits >= 8


def test_list_with_a_count_is_replaced_by_the_user(backend: Backend) -> None:
    """An equal list takes its place, and the first one is gone."""
    pair = Pair(backend, in_a_list, n=["a", 0])
    for _ in range(3):
        pair.step(6)
        for module in (pair.twin, pair.model):
            module.n = ["a", module.n[1]]
    assert pair.hits >= 12


def test_counter_is_deleted_by_the_user(backend: Backend) -> None:
    pair = Pair(backend, attribute, n=0)
    pair.step(4)
    del pair.model.n
    with pytest.raises(AttributeError):
        pair.model(backend.randn(3, 4))


def test_eager_calls_in_between_count_on(backend: Backend) -> None:
    pair = Pair(backend, attribute, n=0)
    pair.step(4)
    with graphcache.disabled():
        pair.step(2)
    pair.step(2)
    copies = copy.deepcopy((pair.model, pair.twin))
    pair.model, pair.twin = copies
    pair.step(4)
    pair.model.forward.cache_clear()
    pair.step(4)
    assert pair.model.n == 16


def test_unguarded_count_needs_no_comparison(backend: Backend) -> None:
    """Other values of the int are no reason for a capture; what the forward does not ask is free."""
    pair = Pair(backend, many_times, n=0)
    for value in range(0, 400, 40):
        pair.model.n = pair.twin.n = value
        pair.step(2)
    assert info(pair.model).captures == 1


def test_exception_leaves_the_count_as_eager_does(backend: Backend) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.n += 1
        if m.n == 6:
            raise ValueError("six")
        return m.up(x)

    pair = Pair(backend, forward, n=0)
    pair.step(5)
    for module in (pair.model, pair.twin):
        with pytest.raises(ValueError, match="six"):
            module(backend.randn(3, 4))
    pair.step(5)
    assert pair.model.n == 11


def test_stand_ins_are_put_back_after_an_error(backend: Backend) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.n += 1
        return m.up(x) + torch.full((4,), m.n, device=x.device)

    pair = Pair(backend, forward, n=0)
    pair.step(6)
    assert type(pair.model.n) is int
    assert pair.hits == 0


def test_warmup_leaves_the_count(backend: Backend) -> None:
    pair = Pair(backend, attribute, n=0)
    with torch.inference_mode():
        pair.model.forward.warmup(backend.randn(3, 4))
    assert pair.model.n == 0
    pair.step(4)
    assert pair.hits == 4


def test_checked_replay_counts_once(backend: Backend) -> None:
    with config.switched(config.check_var):
        for forward, attributes in (REPEATED["attribute"], REPEATED["tensor"]):
            pair = Pair(backend, forward, **attributes)
            pair.step(8)
            assert info(pair.model).captures == 1


def test_stored_tensor_is_held_by_the_user(backend: Backend) -> None:
    pair = Pair(backend, kept, seen=None)
    pair.step(5)
    before = info(pair.model).copied
    pair.step(5)
    assert info(pair.model).copied == before  # nobody else held what was replaced
    held = []
    for _ in range(3):
        pair.step()
        held.append((pair.model.seen, pair.twin.seen, weakref.ref(pair.model.seen)))
    pair.step(2)
    for got, want, _ in held:
        equal(got, want)
    assert info(pair.model).copied > before
    for read in (lambda m: m.seen[0], lambda m: m.seen.untyped_storage()):
        part, want = read(pair.model), pair.twin.seen.clone()
        pair.step(2)
        part = part if isinstance(part, Tensor) else torch.empty(0, device=backend.device).set_(part)
        equal(part[:4], want[0])


def test_stored_tensor_is_fed_back(backend: Backend) -> None:
    pair = Pair(backend, kept, seen=None)
    pair.step(5)
    with torch.inference_mode():
        for _ in range(4):
            equal(pair.model(pair.model.seen), pair.twin(pair.twin.seen))
            equal(pair.model.seen, pair.twin.seen)


def test_stored_tensor_is_unset_by_the_user(backend: Backend) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        scale = 1 if m.seen is None else 2
        m.seen = m.up(x)
        return m.seen * scale

    pair = Pair(backend, forward, seen=None)
    pair.step(6)
    for module in (pair.model, pair.twin):
        module.seen = None
    pair.step(4)


def test_threads_count_every_call(backend: Backend) -> None:
    pair = Pair(backend, many_times, n=0)
    pair.step(3)

    def work() -> None:
        emulated = backend.device.type == "cpu"
        with config.switched(config.emulated_var, emulated), torch.inference_mode():
            for _ in range(20):
                pair.model(backend.randn(3, 4))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pair.model.n == 3 * (3 + 60)


class Layer:
    def __init__(self, window: int, device: torch.device) -> None:
        self.keys = torch.zeros(2, window, 4, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.window, self.seen = window, 0

    def update(self, x: Tensor) -> Tensor:
        full = self.seen >= self.window
        self.seen += 1
        if full:
            self.keys.copy_(self.keys.roll(-1, 1))
            self.keys[:, -1] = x
        else:
            self.keys.index_copy_(1, self.place, x[:, None])
            self.place.add_(1)
        return self.keys


class Cache:
    def __init__(self, device: torch.device) -> None:
        self.layers = [Layer(window, device) for window in (4, 9)]


class Decoder(nn.Module):
    def __init__(self, layer: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.layer = layer

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        layers = cache.layers if self.layer is None else [cache.layers[self.layer]]
        for layer in layers:
            x = self.up(layer.update(x).sum(1))
        return x


class Reader(nn.Module):
    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return x * (2 if cache.layers[0].seen > 6 else 1) + cache.layers[0].keys.sum(1)


def contents(cache: Cache) -> Any:
    return [(each.seen, each.keys.tolist(), each.place.tolist()) for each in cache.layers]


def test_window_of_a_cache_is_crossed(backend: Backend) -> None:
    """The cache counts in Python: below its window it writes at a place, and rolls from there on."""
    twin = Decoder().to(backend.device)
    model: Any = cuda_graphed(copy.deepcopy(twin))
    with torch.inference_mode():
        for _ in range(2):
            caches = [Cache(backend.device) for _ in range(2)]
            for _ in range(16):
                x = backend.randn(2, 4)
                equal(model(x, caches[0]), twin(x, caches[1]))
                assert contents(caches[0]) == contents(caches[1])
    assert info(model).hits >= 24
    assert info(model).captures <= 6


def test_blocks_count_in_one_cache(backend: Backend) -> None:
    twins = [Decoder(0).to(backend.device), Reader(), Decoder(1).to(backend.device)]
    models: Any = [cuda_graphed(copy.deepcopy(twin)) for twin in twins]
    with torch.inference_mode():
        for _ in range(2):
            caches = [Cache(backend.device) for _ in range(2)]
            for _ in range(16):
                got = want = backend.randn(2, 4)
                for model, twin in zip(models, twins, strict=True):
                    got, want = model(got, caches[0]), twin(want, caches[1])
                equal(got, want)
                assert contents(caches[0]) == contents(caches[1])
    assert all(info(model).hits >= 20 for model in models)


def test_two_caches_take_turns(backend: Backend) -> None:
    twin = Decoder().to(backend.device)
    model: Any = cuda_graphed(copy.deepcopy(twin))
    caches = [[Cache(backend.device) for _ in range(2)] for _ in range(2)]
    with torch.inference_mode():
        for call in range(40):
            mine, theirs = caches[call // 3 % 2]
            x = backend.randn(2, 4)
            equal(model(x, mine), twin(x, theirs))
            assert contents(mine) == contents(theirs)
    assert info(model).hits >= 30


def test_user_resets_a_count_in_a_cache(backend: Backend) -> None:
    twin = Decoder().to(backend.device)
    model: Any = cuda_graphed(copy.deepcopy(twin))
    caches = [Cache(backend.device) for _ in range(2)]
    with torch.inference_mode():
        for call in range(30):
            for cache in caches:
                if call in (7, 13, 19):
                    cache.layers[0].seen = (2, 3.0, 1)[call // 7 % 3]  # type: ignore[assignment]
                    cache.layers[0].place.fill_(1)
            x = backend.randn(2, 4)
            equal(model(x, caches[0]), twin(x, caches[1]))
            assert contents(caches[0]) == contents(caches[1])
    assert info(model).hits >= 4
