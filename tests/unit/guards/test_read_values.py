"""Python values that a forward reads from far-off places, and that change after the capture.

A plain CUDA graph would replay the numbers of its capture for ever, and no counter would advance.
"""

import array
import builtins
import collections
import contextvars
import copy
import ctypes
import dataclasses
import functools
import operator
import os
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import wrapt
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend
from tests.models import Forward, model_of

Patch = pytest.MonkeyPatch

Change = Callable[[Any, Patch], object]


class Config:
    SCALE = 2.0
    TABLE: ClassVar = {"scale": 2.0}
    STATE: ClassVar = types.SimpleNamespace(calls=0)
    CALLS = 0
    double = staticmethod(lambda x: x * 2)

    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        return x * Config.scaled.scale


class Own:
    """An object with a number, a special method and a place for weak references."""

    def __init__(self, scale: float = 2.0) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * 2

    def __getitem__(self, key: int) -> float:
        return 2.0


class Function(torch.autograd.Function):
    SCALE = 2.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * Function.SCALE


class Descriptor:
    """Keeps what it returns; no code that uses it names that."""

    def __init__(self) -> None:
        self.kept = 2.0

    def __get__(self, owner: object, kind: type) -> float:
        return self.kept


class OfClass(Own):
    config = types.SimpleNamespace(scale=2.0)
    kinds: ClassVar = {"fast"}
    described = Descriptor()


@dataclasses.dataclass
class Data:
    alpha: float = 2.0


class Meta(type):
    SCALE = 2.0


class OfMeta(metaclass=Meta):
    pass


class AttrDict(dict):
    __getattr__ = dict.__getitem__


class List(list):
    pass


class Cache:
    SCALE = 2.0
    config = types.SimpleNamespace(scale=2.0)

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.ones(2, 3, device=device)
        self.kind, self.function = Config, helper

    def double(self, x: Tensor) -> Tensor:
        return x * 2


class Key:
    alpha = 2.0


PACKAGE = sys.modules["values_package"] = types.ModuleType("values_package")

CONFIG = PACKAGE.config = types.ModuleType("values_package.config")

sys.modules[CONFIG.__name__] = CONFIG

PACKAGE.SCALE = CONFIG.SCALE = 2.0

CONFIG.CALLS = 0

CONFIG.TABLE = [types.SimpleNamespace(scale=2.0)]

VARIABLE = contextvars.ContextVar("VARIABLE", default=2.0)

UNSET = contextvars.ContextVar("UNSET")

OWN = Own()

OWN.calls = 0

DEQUE = collections.deque([0])

F = torch.nn.functional

DATA = Data()

BEHIND = {"k": 2.0}

Config.scaled.scale = 2.0

FIRST = operator.itemgetter(0)

READ_ALPHA = operator.attrgetter("al" + "pha")


def helper(x: Tensor) -> Tensor:
    return x * helper.scale


def with_defaults(x: Tensor, data: Data = DATA, *, more: dict[str, float] = {"k": 2.0}) -> Tensor:  # noqa: B006
    return x * data.alpha * more["k"]


def in_a_closure() -> tuple[Forward, Callable[[torch.device], Any], Change]:
    class Local:
        SCALE = 2.0

    def forward(m: Any, x: Tensor) -> Tensor:
        return x * Local.SCALE

    return forward, lambda _: None, lambda m, patch: patch.setattr(Local, "SCALE", 3.0)


helper.scale = 2.0

helper.calls = 0


def weight(device: torch.device) -> nn.Parameter:
    made = nn.Parameter(torch.ones(3, device=device))
    made.scale = 2.0
    return made


def absent(_: Any, x: Tensor) -> Tensor:
    try:
        return x * LATER
    except NameError:
        return x


def asks_for_a_global(_: Any, x: Tensor) -> Tensor:
    return x * 3 if "LATER" in globals() else x


def asks_for_globals(_: Any, x: Tensor) -> Tensor:
    for name in ("NUMBER", "BEHIND"):
        held = globals()[name]
        x = x * (held if isinstance(held, float) else 1)
    return x


def imports(_: Any, x: Tensor) -> Tensor:
    from values_package.config import SCALE as scale

    return x * scale


def imports_by_dots(_: Any, x: Tensor) -> Tensor:
    import values_package.config

    return x * values_package.config.SCALE


def imports_the_package(_: Any, x: Tensor) -> Tensor:
    import values_package.config

    return x * values_package.SCALE


def matches(m: Any, x: Tensor) -> Tensor:
    match m.held:
        case Data(alpha):
            return x * alpha
    return x


def matches_by_name(m: Any, x: Tensor) -> Tensor:
    match m.held:
        case Data(alpha=value):
            return x * value
    return x


def scaled(x: Tensor, alpha: float) -> Tensor:
    return x * alpha


def put(key: Any, value: Any = 3.0) -> Change:
    return lambda m, patch: m.held.__setitem__(key, value)


# The forward, what it holds in an attribute, and what changes then.
CASES: dict[str, tuple[Forward, Callable[[torch.device], Any], Change]] = {
    "a class as a namespace": (
        lambda m, x: x * Config.SCALE,
        lambda _: None,
        lambda m, patch: patch.setattr(Config, "SCALE", 3.0),
    ),
    "a dict of a class": (
        lambda m, x: x * Config.TABLE["scale"],
        lambda _: None,
        lambda m, patch: patch.setitem(Config.TABLE, "scale", 3.0),
    ),
    "a static method": (
        lambda m, x: Config.double(x),
        lambda _: None,
        lambda m, patch: patch.setattr(Config, "double", staticmethod(lambda x: x * 3)),
    ),
    "an attribute of a static method": (
        lambda m, x: Config.scaled(x),
        lambda _: None,
        lambda m, patch: patch.setattr(Config.scaled, "scale", 3.0),
    ),
    "a class in an attribute": (
        lambda m, x: x * m.held.SCALE,
        lambda _: Config,
        lambda m, patch: patch.setattr(Config, "SCALE", 3.0),
    ),
    "a constant of a function of autograd": (
        lambda m, x: Function.apply(x),
        lambda _: None,
        lambda m, patch: patch.setattr(Function, "SCALE", 3.0),
    ),
    "an object of a class": (
        lambda m, x: x * m.held.config.scale,
        lambda _: OfClass(),
        lambda m, patch: patch.setattr(OfClass.config, "scale", 3.0),
    ),
    "a set of a class": (
        lambda m, x: x * 3 if "slow" in m.held.kinds else x,
        lambda _: OfClass(),
        lambda m, patch: OfClass.kinds.add("slow"),
    ),
    "a descriptor": (
        lambda m, x: x * m.held.described,
        lambda _: OfClass(),
        lambda m, patch: patch.setattr(vars(OfClass)["described"], "kept", 3.0),
    ),
    "a metaclass": (
        lambda m, x: x * OfMeta.SCALE,
        lambda _: None,
        lambda m, patch: patch.setattr(Meta, "SCALE", 3.0),
    ),
    "a class in a closure": in_a_closure(),
    "a method of the class of an object": (
        lambda m, x: m.held(x),
        lambda _: Own(),
        lambda m, patch: patch.setattr(Own, "__call__", lambda _, x: x * 3),
    ),
    "an item of an object": (
        lambda m, x: x * m.held[0],
        lambda _: Own(),
        lambda m, patch: patch.setattr(Own, "__getitem__", lambda _, key: 3.0),
    ),
    "a dict in order": (
        lambda m, x: x * m.held["k"],
        lambda _: collections.OrderedDict(k=2.0),
        put("k"),
    ),
    "a counter": (lambda m, x: x * m.held["k"], lambda _: collections.Counter(k=2), put("k")),
    "a dict with attributes": (lambda m, x: x * m.held.k, lambda _: AttrDict(k=2.0), put("k")),
    "a chain of dicts": (
        lambda m, x: x * m.held["k"],
        lambda _: collections.ChainMap({}, {"k": 2.0}),
        lambda m, patch: m.held.maps[1].update(k=3.0),
    ),
    "a list of a class in Python": (lambda m, x: x * m.held[0], lambda _: List([2.0]), put(0)),
    "a dict in a tuple": (
        lambda m, x: x * m.held[0]["k"],
        lambda _: ({"k": 2.0},),
        lambda m, patch: m.held[0].update(k=3.0),
    ),
    "a dict in a list": (
        lambda m, x: x * m.held[0]["k"],
        lambda _: [{"k": 2.0}],
        lambda m, patch: m.held[0].update(k=3.0),
    ),
    "keywords of a partial": (
        lambda m, x: m.held(x),
        lambda _: functools.partial(scaled, alpha=2.0),
        lambda m, patch: m.held.keywords.update(alpha=3.0),
    ),
    "an environment variable": (
        lambda m, x: x * 3 if os.environ.get("GRAPHCACHE_OF_A_TEST") else x * 2,
        lambda _: None,
        lambda m, patch: patch.setenv("GRAPHCACHE_OF_A_TEST", "1"),
    ),
    "an environment variable, by a function": (
        lambda m, x: x * float(os.getenv("GRAPHCACHE_OF_A_TEST", "2")),
        lambda _: None,
        lambda m, patch: patch.setenv("GRAPHCACHE_OF_A_TEST", "3"),
    ),
    "a deque": (lambda m, x: x * m.held[0], lambda _: collections.deque([2.0]), put(0)),
    "a longer deque": (
        lambda m, x: x * sum(m.held),
        lambda _: collections.deque([2.0]),
        lambda m, patch: m.held.append(1.0),
    ),
    "behind a weak reference": (
        lambda m, x: x * m.held().scale,
        lambda _: weakref.ref(OWN),
        lambda m, patch: patch.setattr(OWN, "scale", 3.0),
    ),
    "a context variable": (
        lambda m, x: x * VARIABLE.get(),
        lambda _: None,
        lambda m, patch: VARIABLE.set(3.0),
    ),
    "a context variable that is not set": (
        lambda m, x: x * UNSET.get(2.0),
        lambda _: None,
        lambda m, patch: UNSET.set(3.0),
    ),
    "a view of a dict": (
        lambda m, x: x * m.held["k"],
        lambda _: types.MappingProxyType(BEHIND),
        lambda m, patch: patch.setitem(BEHIND, "k", 3.0),
    ),
    "the values of a dict": (
        lambda m, x: x * next(iter(m.held)),
        lambda _: BEHIND.values(),
        lambda m, patch: patch.setitem(BEHIND, "k", 3.0),
    ),
    "an object in a set": (
        lambda m, x: x * next(iter(m.held)).alpha,
        lambda _: {Key()},
        lambda m, patch: setattr(next(iter(m.held)), "alpha", 3.0),
    ),
    "a key of a dict": (
        lambda m, x: x * next(iter(m.held)).alpha,
        lambda _: {Key(): 1},
        lambda m, patch: setattr(next(iter(m.held)), "alpha", 3.0),
    ),
    "a default": (
        lambda m, x: with_defaults(x),
        lambda _: None,
        lambda m, patch: patch.setattr(DATA, "alpha", 3.0),
    ),
    "a default of a keyword": (
        lambda m, x: with_defaults(x),
        lambda _: None,
        lambda m, patch: patch.setitem(with_defaults.__kwdefaults__["more"], "k", 3.0),
    ),
    "a method of a dict": (
        lambda m, x: x * m.held("k"),
        lambda _: {"k": 2.0}.get,
        lambda m, patch: m.held.__self__.update(k=3.0),
    ),
    "a number of C": (
        lambda m, x: x * m.held.value,
        lambda _: ctypes.c_double(2.0),
        lambda m, patch: setattr(m.held, "value", 3.0),
    ),
    "an array of numbers": (lambda m, x: x * m.held[0], lambda _: array.array("d", [2.0]), put(0)),
    "a column": (lambda m, x: x * float(m.held[0]), lambda _: np.full((3, 2), 2.0)[:, 0], put(0)),
    "an array backwards": (lambda m, x: x * float(m.held[0]), lambda _: np.full(3, 2.0)[::-1], put(0)),
    "times": (
        lambda m, x: x * int(m.held[0].astype(int)),
        lambda _: np.array([2], "m8[s]"),
        put(0, np.timedelta64(3, "s")),
    ),
    "records": (
        lambda m, x: x * float(m.held.a[0]),
        lambda _: np.rec.array([(2.0,)], dtype=[("a", "f8")]),
        lambda m, patch: m.held.a.__setitem__(0, 3.0),
    ),
    "a mask": (
        lambda m, x: x * float(m.held.sum()),
        lambda _: np.ma.array([2.0, 1.0], mask=[False, True]),
        lambda m, patch: m.held.mask.__setitem__(1, False),
    ),
    "a module of a package": (
        lambda m, x: x * PACKAGE.config.SCALE,
        lambda _: None,
        lambda m, patch: patch.setattr(CONFIG, "SCALE", 3.0),
    ),
    "an object in a list of a module": (
        lambda m, x: x * PACKAGE.config.TABLE[0].scale,
        lambda _: None,
        lambda m, patch: patch.setattr(CONFIG.TABLE[0], "scale", 3.0),
    ),
    "a module in an attribute": (
        lambda m, x: x * m.held.SCALE,
        lambda _: CONFIG,
        lambda m, patch: patch.setattr(CONFIG, "SCALE", 3.0),
    ),
    "an import in the forward": (
        imports,
        lambda _: None,
        lambda m, patch: patch.setattr(CONFIG, "SCALE", 3.0),
    ),
    "an import of a package in the forward": (
        imports_by_dots,
        lambda _: None,
        lambda m, patch: patch.setattr(CONFIG, "SCALE", 3.0),
    ),
    "a package that an import gives": (
        imports_the_package,
        lambda _: None,
        lambda m, patch: patch.setattr(PACKAGE, "SCALE", 3.0),
    ),
    "another module by that name": (
        imports,
        lambda _: None,
        lambda m, patch: patch.setitem(
            sys.modules, "values_package.config", types.SimpleNamespace(SCALE=3.0)
        ),
    ),
    "a function of torch": (
        lambda m, x: torch.nn.functional.relu(x),
        lambda _: None,
        lambda m, patch: patch.setattr(F, "relu", lambda x: x * 3),
    ),
    "a method of tensors": (
        lambda m, x: x.relu(),
        lambda _: None,
        lambda m, patch: patch.setattr(Tensor, "relu", lambda x: x * 3, raising=False),
    ),
    "a module by its name": (
        lambda m, x: x * sys.modules["values_package.config"].SCALE,
        lambda _: None,
        lambda m, patch: patch.setattr(CONFIG, "SCALE", 3.0),
    ),
    "a function of Python": (
        lambda m, x: x * abs(-2.0),
        lambda _: None,
        lambda m, patch: patch.setattr(builtins, "abs", lambda x: 3.0),
    ),
    "keywords out of an object": (
        lambda m, x: scaled(x, **dataclasses.asdict(m.held)),
        lambda _: Data(),
        lambda m, patch: setattr(m.held, "alpha", 3.0),
    ),
    "arguments out of an object": (
        lambda m, x: torch.mul(x, *dataclasses.astuple(m.held)),
        lambda _: Data(),
        lambda m, patch: setattr(m.held, "alpha", 3.0),
    ),
    "a pattern": (matches, lambda _: Data(), lambda m, patch: setattr(m.held, "alpha", 3.0)),
    "a pattern with names": (
        matches_by_name,
        lambda _: Data(),
        lambda m, patch: setattr(m.held, "alpha", 3.0),
    ),
    "whether an attribute is there": (
        lambda m, x: x * sum(hasattr(m, "ot" + letter) for letter in ("her", "x")),
        lambda _: None,
        lambda m, patch: setattr(m, "other", 1),
    ),
    "a format": (
        lambda m, x: x * float("{0.alpha}".format(m.held)),  # noqa: UP030, UP032
        lambda _: Data(),
        lambda m, patch: setattr(m.held, "alpha", 3.0),
    ),
    "an attribute by a getter": (
        lambda m, x: x * READ_ALPHA(DATA),
        lambda _: None,
        lambda m, patch: patch.setattr(DATA, "alpha", 3.0),
    ),
    "a global by its name": (
        lambda m, x: x * globals()["NUMBER"],
        lambda _: None,
        lambda m, patch: patch.setitem(globals(), "NUMBER", 3.0),
    ),
    "globals by their names": (
        asks_for_globals,
        lambda _: None,
        lambda m, patch: patch.setitem(globals(), "NUMBER", 3.0),
    ),
    "a global that comes later": (
        absent,
        lambda _: None,
        lambda m, patch: patch.setitem(globals(), "LATER", 3.0),
    ),
    "whether a global is there": (
        asks_for_a_global,
        lambda _: None,
        lambda m, patch: patch.setitem(globals(), "LATER", 3.0),
    ),
    "an attribute of a function": (
        lambda m, x: helper(x),
        lambda _: None,
        lambda m, patch: patch.setattr(helper, "scale", 3.0),
    ),
    "an attribute of a parameter": (
        lambda m, x: x * m.held * m.held.scale,
        weight,
        lambda m, patch: setattr(m.held, "scale", 3.0),
    ),
    "whether a parameter is frozen": (
        lambda m, x: x * m.held * (2.0 if m.held.requires_grad else 3.0),
        weight,
        lambda m, patch: m.held.requires_grad_(False),
    ),
    "a slot of a module": (
        lambda m, x: x * m.place,
        lambda _: None,
        lambda m, patch: setattr(m, "place", 3.0),
    ),
}

NUMBER = 2.0


def check(backend: Backend, patch: Patch, case: str) -> None:
    forward, make, change = CASES[case]
    model = cuda_graphed(model_of(forward, make(backend.device)), sizes=(2,))
    x = torch.ones(2, 3, device=backend.device)
    before = forward(model, x).clone()
    for _ in range(3):
        assert torch.equal(model(x), before)
    assert model.forward.cache_info().hits == 2
    change(model, patch)
    assert not torch.equal(forward(model, x), before)
    for _ in range(3):
        assert torch.equal(model(x), forward(model, x))


@pytest.mark.parametrize("case", CASES)
def test_read_value_changes_after_the_capture(backend: Backend, monkeypatch: Patch, case: str) -> None:
    """The graph holds the number, or the function's kernels, of the capture."""
    kinds = set(OfClass.kinds)
    try:
        contextvars.copy_context().run(check, backend, monkeypatch, case)
    finally:
        OfClass.kinds.intersection_update(kinds)


def in_a_function(m: Any, x: Tensor) -> Tensor:
    helper.calls += 1
    return x * helper.calls


def in_a_module(m: Any, x: Tensor) -> Tensor:
    CONFIG.CALLS += 1
    return x * CONFIG.CALLS


def in_a_module_of_a_package(m: Any, x: Tensor) -> Tensor:
    PACKAGE.config.CALLS += 1
    return x * PACKAGE.config.CALLS


def in_a_module_that_it_imports(m: Any, x: Tensor) -> Tensor:
    from values_package import config

    config.CALLS += 1
    return x * config.CALLS


def in_a_module_that_it_holds(m: Any, x: Tensor) -> Tensor:
    m.held.CALLS += 1
    return x * m.held.CALLS


def in_a_key(m: Any, x: Tensor) -> Tensor:
    (key,) = m.held
    key.calls += 1
    return x * key.calls


def in_a_class(m: Any, x: Tensor) -> Tensor:
    Config.CALLS += 1
    return x * Config.CALLS


def in_its_class(m: Any, x: Tensor) -> Tensor:
    type(m).calls += 1
    return x * m.calls


def in_an_object_of_a_class(m: Any, x: Tensor) -> Tensor:
    Config.STATE.calls += 1
    return x * Config.STATE.calls


def in_a_deque(m: Any, x: Tensor) -> Tensor:
    DEQUE[0] += 1
    return x * DEQUE[0]


def behind_a_weak_reference(m: Any, x: Tensor) -> Tensor:
    m.held().calls += 1
    return x * m.held().calls


def in_a_parameter(m: Any, x: Tensor) -> Tensor:
    m.held.scale += 1
    return x * (m.held.scale - 2)


def in_a_slot(m: Any, x: Tensor) -> Tensor:
    m.place += 1
    return x * (m.place - 2)


def in_a_context(m: Any, x: Tensor) -> Tensor:
    VARIABLE.set(VARIABLE.get() + 1)
    return x * (VARIABLE.get() - 2)


def in_a_new_global(m: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS = globals().get("CALLS", 0) + 1
    return x * CALLS


def in_the_class_of_an_argument(m: Any, x: Tensor, c: Cache) -> Tensor:
    Counted = type(c)
    Counted.calls += 1
    return x * c.calls


HELD: dict[Forward, Callable[[torch.device], Any]] = {
    behind_a_weak_reference: lambda _: weakref.ref(OWN),
    in_a_parameter: weight,
    in_a_module_that_it_holds: lambda _: CONFIG,
    in_a_key: lambda _: {OWN: None},
}

COUNTERS = (
    *(in_a_function, in_a_module, in_a_module_of_a_package, in_a_module_that_it_imports, in_a_class),
    *(in_its_class, in_an_object_of_a_class, in_a_deque, in_a_slot, in_a_context, in_a_new_global),
    *HELD,
)


def count(backend: Backend, forward: Forward) -> None:
    model = model_of(forward, HELD.get(forward, lambda _: None)(backend.device))
    type(model).calls = 0
    cuda_graphed(model, sizes=(2,))
    x = torch.ones(2, 3, device=backend.device)
    with pytest.warns(GraphCacheWarning, match="it changes attributes"):
        assert [model(x)[0, 0].item() for _ in range(5)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("forward", COUNTERS)
def test_forward_that_counts_its_calls_runs_eagerly(
    backend: Backend, monkeypatch: Patch, forward: Forward
) -> None:
    """A replay counts nothing, and the capture counts once too often."""
    for owner, name in ((helper, "calls"), (CONFIG, "CALLS"), (Config, "CALLS"), (OWN, "calls")):
        monkeypatch.setattr(owner, name, 0)
    monkeypatch.setattr(Config.STATE, "calls", 0)
    monkeypatch.delitem(globals(), "CALLS", raising=False)
    DEQUE[0] = 0
    contextvars.copy_context().run(count, backend, forward)


def test_counter_in_the_class_of_an_argument_runs_eagerly(backend: Backend) -> None:
    class Counted(Cache):
        calls = 0

    model = cuda_graphed(model_of(in_the_class_of_an_argument, None), sizes=(2,))
    x, argument = torch.ones(2, 3, device=backend.device), Counted(backend.device)
    with pytest.warns(GraphCacheWarning, match="it changes attributes"):
        assert [model(x, argument)[0, 0].item() for _ in range(5)] == [1, 2, 3, 4, 5]


def reads_all_kinds(m: Any, x: Tensor) -> Tensor:
    known = Config.SCALE * CONFIG.SCALE * PACKAGE.config.SCALE * helper.scale * m.held.scale
    return FIRST((x * m.held * known, torch.nn.functional.relu(x)))


def test_unread_values_change_without_a_capture(backend: Backend, monkeypatch: Patch) -> None:
    """Other entries of the same classes, modules, functions and parameters: no reason for a capture.

    Nor is data of a library, by whatever name: it keeps its caches there.
    """
    monkeypatch.setattr(F, "SCALE", 1, raising=False)
    model = cuda_graphed(model_of(reads_all_kinds, weight(backend.device)), sizes=(2,))
    x = torch.ones(2, 3, device=backend.device)
    for owner in (None, Config, CONFIG, PACKAGE, helper, F, model.held, model, type(model), Own):
        if owner is not None:
            monkeypatch.setattr(owner, "unread", 1, raising=False)
        model.held.requires_grad_(not model.held.requires_grad)
        assert torch.equal(model(x), x * 32)
    monkeypatch.setitem(globals(), "UNREAD", 1)
    monkeypatch.setattr(F, "gelu", F.relu)
    monkeypatch.setattr(F, "SCALE", 2)
    assert torch.equal(model(x), x * 32)
    told = model.forward.cache_info()
    assert (told.captures, told.hits) == (1, 10)


@pytest.mark.parametrize(
    ("read", "change"),
    [
        (lambda x, c: x * c.SCALE, lambda patch: patch.setattr(Cache, "SCALE", 3.0)),
        (
            lambda x, c: x * c.config.scale,
            lambda patch: patch.setattr(Cache.config, "scale", 3.0),
        ),
        (
            lambda x, c: c.double(x),
            lambda patch: patch.setattr(Cache, "double", lambda _, x: x * 3),
        ),
        (lambda x, c: x * c.kind.SCALE, lambda patch: patch.setattr(Config, "SCALE", 3.0)),
        (lambda x, c: c.function(x), lambda patch: patch.setattr(helper, "scale", 3.0)),
    ],
    ids=["constant", "object", "method", "class", "function"],
)
def test_class_attributes_of_an_argument_are_guarded(
    backend: Backend, monkeypatch: Patch, read, change
) -> None:
    """The object is part of the key, by what it holds itself."""
    model = cuda_graphed(read, sizes=(2,))
    x, argument = backend.randn(2, 3), Cache(backend.device)
    for step in range(6):
        if step == 3:
            assert model.cache_info().hits == 2
            change(monkeypatch)
        assert torch.equal(model(x, argument), x * (2 if step < 3 else 3))


@pytest.mark.parametrize(
    "held",
    [
        {Key() for _ in range(5000)},
        collections.deque(range(5000)),
        mock.Mock(spec=helper),
        mock.MagicMock(spec=dict),
        wrapt.ObjectProxy(helper),
        weakref.proxy(OWN),
        weakref.ref(Key),
        weakref.ref(Key()),
    ],
    ids=["set", "deque", "function", "dict", "wrapper", "proxy", "class", "gone"],
)
def test_objects_that_are_hard_to_search_do_no_harm(backend: Backend, held: object) -> None:
    """No guard breaks by such an object: a profile function may not raise."""
    model = cuda_graphed(model_of(lambda m, x: x * (2 if m.held is not None else 3), held), sizes=(2,))
    x = backend.randn(2, 3)
    for _ in range(3):
        assert torch.equal(model(x), x * 2)
    assert model.forward.cache_info().hits == 2
    model.held = None
    assert torch.equal(model(x), x * 3)


def test_a_copy_is_made(backend: Backend) -> None:
    """Python notes in each class how its objects are copied, when the first one is."""

    class Held:
        scale = 2.0

    model = cuda_graphed(model_of(lambda m, x: x * getattr(m.held, "sca" + "le"), Held()), sizes=(2,))
    x = backend.randn(2, 3)
    for _ in range(3):
        assert torch.equal(model(x), x * 2)
        copy.copy(model.held)
    assert "__slotnames__" in vars(Held)
    assert model.forward.cache_info().captures == 1


def test_a_getter_is_no_state(backend: Backend) -> None:
    """A getter's offset, kept in C, is another int object each time that it is asked for."""
    model = cuda_graphed(lambda x: FIRST((x * 2,)), sizes=(2,))
    x = backend.randn(2, 3)
    for _ in range(3):
        assert torch.equal(model(x), x * 2)
    assert model.cache_info().hits == 2


def test_attributes_and_defaults_of_a_function_are_guarded(backend: Backend) -> None:
    """Its attributes and defaults, where its own name is that of the graphed one."""
    data = Data()

    def forward(x: Tensor, *, by: Data = data) -> Tensor:
        return x * by.alpha * model.__wrapped__.scale

    forward.scale = 2.0
    model = cuda_graphed(forward, sizes=(2,))
    x = torch.ones(2, 3, device=backend.device)
    for owner, name in ((None, ""), (forward, "scale"), (data, "alpha")):
        if owner is not None:
            setattr(owner, name, 3.0)
        for _ in range(3):
            assert torch.equal(model(x), forward(x))
    assert model.cache_info().captures == 3
