"""The walker: the members that values have, kind by kind; each is guarded and in a snapshot."""

import ctypes
import gc
import operator
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcache import _C
from graphcache.call.pytree import NotATree
from graphcache.guards.guards import Guards, ReadSet
from graphcache.guards.reachability import (
    LONGEST,
    Kind,
    Source,
    Walker,
    code_in,
    members_of,
)
from graphcache.guards.static_objects import read_object
from graphcache.tracing.python_snapshot import Snapshot


class Leaf:
    """An object that is changed deep down."""

    def __init__(self) -> None:
        self.number = 1.0


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class OnlyAttributes:
    """Allows no weak reference."""

    __slots__ = ("__dict__",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Object:
    def __init__(self, held: Any) -> None:
        self.held = held

    def method(self) -> None:
        pass


class Pair(NamedTuple):
    first: Any
    second: Any = None


class OwnDict(dict):  # type: ignore[type-arg]
    pass


class ByClass:
    pass


class Meta(type):
    pass


def function_with(held: Any, *, as_attribute: bool = False) -> Callable[..., Any]:
    def function(default: Any = None if as_attribute else held) -> Any:
        return default

    if as_attribute:
        function.held = held  # type: ignore[attr-defined]
    return function


def keyword_default(held: Any) -> Callable[..., Any]:
    def function(*, default: Any = held) -> Any:
        return default

    return function


def class_with(held: Any) -> type:
    return type("Made", (), {"held": held})


def by_base(held: Any) -> Any:
    return type("Derived", (class_with(held),), {})()


def by_metaclass(held: Any) -> Any:
    return type("Meta", (type,), {"held": held})("Made", (), {})


def variable(held: Any) -> Any:
    made: ContextVar[Any] = ContextVar("variable")
    made.set(held)
    return made


def tensor_with(held: Any) -> Tensor:
    tensor = torch.ones(1)
    tensor.held = held  # type: ignore[attr-defined]
    return tensor


def python_module(held: Any) -> types.ModuleType:
    module = types.ModuleType("made_by_a_test")
    module.held = held  # type: ignore[attr-defined]
    return module


def module_with(held: Any) -> nn.Module:
    module = nn.Identity()
    module.held = held
    return module


def child(held: Any) -> nn.Module:
    return nn.Sequential(nn.Sequential(module_with(held)))


class SlottedModule(nn.Module):
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held


# Each leads to what it is given, by one kind of member.
WAYS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda held: {"k": held},
    "dict key": lambda held: {held: 1},
    "tuple key": lambda held: {(1, held): 1},
    "ordered dict": lambda held: OrderedDict(k=held),
    "defaultdict": lambda held: defaultdict(list, k=held),
    "own dict": lambda held: OwnDict(k=held),
    "list": lambda held: [held],
    "set": lambda held: {held},
    "frozenset": lambda held: frozenset([held]),
    "deque": lambda held: deque([held]),
    "tuple": lambda held: (held,),
    "named tuple": Pair,
    "attribute": Object,
    "attribute, no weak reference": OnlyAttributes,
    "slot": Slotted,
    "class attribute": class_with,
    "class of an object": lambda held: class_with(held)(),
    "base class": by_base,
    "metaclass": by_metaclass,
    "default": function_with,
    "default of a keyword": keyword_default,
    "attribute of a function": partial(function_with, as_attribute=True),
    "partial": lambda held: partial(print, held),
    "partial, by keyword": lambda held: partial(print, end=held),
    "method": lambda held: Object(held).method,
    "method of C": lambda held: {"k": held}.get,
    "static method": lambda held: staticmethod(function_with(held)),
    "class method": lambda held: classmethod(function_with(held)),
    "mapping proxy": lambda held: types.MappingProxyType({"k": held}),
    "keys": lambda held: {held: 1}.keys(),
    "values": lambda held: {"k": held}.values(),
    "items": lambda held: {"k": held}.items(),
    "weak reference": weakref.ref,
    "context variable": variable,
    "default of a context variable": lambda held: ContextVar("variable", default=held),
    "attribute of a tensor": tensor_with,
    "module": module_with,
    "child of a module": child,
    "slot of a module": SlottedModule,
    "module of Python": python_module,
    "two deep": lambda held: [{"k": Object(held)}],
}


def guards_of(value: Any, names: frozenset[str] | None = None) -> Guards:
    source = Source({"root": value}, "root", value, "root")
    return Guards.find(None, ReadSet(names, frozenset({"held"}), [], [source]), [], [])


def snapshot_of(value: Any) -> Snapshot:
    snapshot = Snapshot()
    snapshot.add_names({"held"})
    snapshot.walk(value, "root")
    return snapshot


def test_a_context_variable_that_is_set_later_is_noticed() -> None:
    unset: ContextVar[int] = ContextVar("unset")
    guards = guards_of([unset])
    assert guards.check(grad=False)
    unset.set(1)
    assert not guards.check(grad=False)
    assert guards.explain(grad=False) == "root[0]"


@pytest.mark.parametrize("way", WAYS)
def test_members_of_each_kind_are_guarded(way: str) -> None:
    leaf = Leaf()
    value = WAYS[way](leaf)
    guards = guards_of(value)
    assert guards.check(grad=False)
    leaf.number = 2.0
    assert not guards.check(grad=False)
    assert guards.explain(grad=False).endswith(".number")
    leaf.number = 1.0
    assert guards.check(grad=False)


@pytest.mark.parametrize("way", WAYS)
def test_members_of_each_kind_are_in_a_snapshot(way: str) -> None:
    leaf = Leaf()
    value = WAYS[way](leaf)
    snapshot = snapshot_of(value)
    assert snapshot.changed() == []
    leaf.number = 2.0
    (name,) = snapshot.changed()
    assert name.endswith(".number")
    del value
    gc.collect()


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"weak reference"}))
def test_tensors_behind_each_kind_are_found(way: str) -> None:
    tensor = torch.ones(3)
    value = WAYS[way](Object(tensor))
    guards = Guards.of_object(value, "root", 8, [tensor])
    if way != "module of Python":  # no code names anything in it
        assert not guards.unguarded
        tensor.data = torch.zeros(3)
        assert not guards.check(grad=False)
        assert guards.explain(grad=False).endswith(".held")


# What is replaced, in what leads there, and the name of that; None: it can't be replaced.
REPLACED: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "dict": (lambda v: v.update(k=2), "root['k']"),
    "ordered dict": (lambda v: v.update(k=2), "root['k']"),
    "own dict": (lambda v: v.update(k=2), "root['k']"),
    "list": (lambda v: v.append(1), "root"),
    "set": (lambda v: v.clear(), "root"),
    "deque": (lambda v: v.append(1), "root"),
    "attribute": (lambda v: setattr(v, "held", 1), "root.held"),
    "attribute, no weak reference": (lambda v: setattr(v, "held", 1), "root.held"),
    "slot": (lambda v: setattr(v, "held", 1), "root.held"),
    "class attribute": (lambda v: setattr(v, "held", 1), "Made.held"),
    "class of an object": (lambda v: setattr(type(v), "held", 1), "Made.held"),
    "base class": (lambda v: setattr(type(v).__base__, "held", 1), "Made.held"),
    "metaclass": (lambda v: setattr(type(v), "held", 1), "Meta.held"),
    "attribute of a function": (lambda v: setattr(v, "held", 1), "root.held"),
    "context variable": (lambda v: v.set(1), "root"),
    "attribute of a tensor": (lambda v: setattr(v, "held", 1), "root.held"),
    "module": (lambda v: setattr(v, "held", 1), "root.held"),
    "child of a module": (lambda v: setattr(v[0][0], "held", 1), "root.0.0.held"),
    "slot of a module": (lambda v: setattr(v, "held", 1), "root.held"),
    "module of Python": (lambda v: setattr(v, "held", 1), "root.held"),
    "mapping proxy": (lambda v: gc.get_referents(v)[0].update(k=1), "root['k']"),
}


@pytest.mark.parametrize("way", REPLACED)
def test_a_replaced_member_is_named(way: str) -> None:
    change, name = REPLACED[way]
    value = WAYS[way](Leaf())
    guards, snapshot = guards_of(value), snapshot_of(value)
    change(value)
    assert not guards.check(grad=False)
    assert guards.explain(grad=False) == name
    if "slot" in way:  # those of one object are compared together
        name = "root"
    assert snapshot.changed() == [name]


def kinds(value: Any) -> list[Kind]:
    return [members.kind for members in members_of(value, "")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, []),
        ("text", []),
        (torch.float32, []),
        ({}, [Kind.DICT]),
        ([], [Kind.LIST]),
        (set(), [Kind.LIST]),
        (deque(), [Kind.ITEMS]),
        ((), [Kind.FIXED]),
        (partial(print), [Kind.FIXED]),
        (weakref.ref(Leaf), [Kind.FIXED]),
        (Leaf(), [Kind.ATTRIBUTES, Kind.TYPE]),
        (Slotted(1), [Kind.ITEMS, Kind.TYPE]),
        (OwnDict(), [Kind.DICT, Kind.ATTRIBUTES, Kind.TYPE]),
        (Leaf, [Kind.CLASS]),
        (Meta("Made", (), {}), [Kind.CLASS, Kind.TYPE]),
        (function_with(1), [Kind.EXTRA, Kind.LOOSE]),
        (torch.ones(1), [Kind.EXTRA]),
        (nn.Linear(1, 1), [Kind.MODULE, *[Kind.TABLE] * 5, Kind.TYPE]),
        (types.ModuleType("made"), [Kind.SCOPE]),
        (torch._C, []),  # no state of the user's
        (_C.Guard(), []),
        (nn.Linear, []),  # a library's class, unless it is that of an object
        (dict, []),
        (object(), []),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_kinds_of_members(value: Any, expected: list[Kind]) -> None:
    assert kinds(value) == expected


def test_a_class_met_as_a_value_is_guarded_as_a_class_too() -> None:
    """A library's class is no state itself, but its methods run where an object has it."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind = nn.SiLU
            self.act = nn.SiLU()

    guards = guards_of(Both())
    forward = nn.SiLU.forward
    nn.SiLU.forward = lambda self, x: x  # type: ignore[method-assign]
    try:
        assert not guards.check(grad=False)
        assert guards.explain(grad=False) == "SiLU.forward"
    finally:
        nn.SiLU.forward = forward  # type: ignore[method-assign]


def test_names_that_no_code_reads_do_not_count() -> None:
    leaf = Leaf()
    guards = guards_of(Object(leaf), frozenset({"held"}))
    leaf.number = 2.0
    assert guards.check(grad=False)


def test_long_containers_are_searched_for_objects_only() -> None:
    leaf = Leaf()
    for value in ([leaf, *range(LONGEST)], {"k": leaf, **dict.fromkeys(map(str, range(LONGEST)))}):
        guards = guards_of(value)
        assert len(members_of(value, "").__next__().items) > LONGEST
        leaf.number += 1
        assert not guards.check(grad=False)
        assert snapshot_of(value).changed() == []


def test_objects_in_long_containers_may_not_be_replaced() -> None:
    leaf = Leaf()  # lives on elsewhere
    value: list[Any] = [leaf, *range(LONGEST)]
    guards = guards_of(value)
    value[1] = -1
    assert guards.check(grad=False)
    value[0] = Leaf()
    assert not guards.check(grad=False)
    assert guards.explain(grad=False) == "root[0]"


def test_long_sets_are_not_searched() -> None:
    value = {Leaf() for _ in range(LONGEST + 1)}
    guards = guards_of(value)
    next(iter(value)).number = 2.0
    assert guards.check(grad=False)


def test_attributes_of_tensors_are_searched_deep_down() -> None:
    leaf = Leaf()
    value = [[[[tensor_with(leaf)]]]]
    guards = guards_of(value)
    leaf.number = 2.0
    assert not guards.check(grad=False)


def test_a_deep_tree_of_modules_needs_no_deep_stack() -> None:
    deepest = module = nn.Sequential()
    for _ in range(900):
        module = nn.Sequential(module)
    walker = Walker()
    walker.walk(module, "")
    assert id(deepest) in walker._visited


def test_a_module_behind_a_weak_proxy_is_guarded() -> None:
    module = nn.Linear(2, 2)
    guards = guards_of(weakref.proxy(module))
    assert guards.check(grad=False)
    module.weight = nn.Parameter(torch.zeros(2, 2))
    assert not guards.check(grad=False)
    assert guards.explain(grad=False) == "root.weight"


def test_a_weak_proxy_of_what_is_gone_does_no_harm() -> None:
    proxy = weakref.proxy(Leaf())
    assert guards_of(proxy).check(grad=False)
    assert snapshot_of(proxy).changed() == []


def test_a_dict_that_its_list_lets_go_of_is_noticed() -> None:
    """Before Python 3.12 nobody can ask whether a dict lives, so the guard keeps it alive."""
    inner = {"k": 1}
    value = [inner]
    references = sys.getrefcount(inner)
    guards = guards_of(value)
    assert sys.getrefcount(inner) - references == (sys.version_info < (3, 12))
    del inner
    value.clear()
    gc.collect()
    assert not guards.check(grad=False)
    assert guards.explain(grad=False) in ("root", "root[0]")


def test_a_dict_that_its_owner_lets_go_of_is_named() -> None:
    value = Object({"k": 1})
    guards = guards_of(value)
    value.held = {"k": 1}
    gc.collect()
    assert not guards.check(grad=False)
    assert guards.explain(grad=False) == "root.held"


def test_an_attribute_dict_that_is_replaced_is_in_a_snapshot() -> None:
    value = Object(1.0)
    snapshot = snapshot_of(value)
    value.__dict__ = {"held": 2.0}
    assert snapshot.changed() == ["root.held"]


def test_bytes_of_arrays_are_guarded() -> None:
    for value in (np.ones(2), ctypes.c_double(1.0), bytearray(b"x")):
        guards = guards_of([value])
        assert guards.check(grad=False)
        if isinstance(value, ctypes.c_double):
            value.value = 2.0
        else:
            value[0] = 2
        assert not guards.check(grad=False)
        assert guards.explain(grad=False) == "root[0]"


def test_iterators_are_named() -> None:
    assert guards_of([iter([1])]).iterators == ["root[0] (list_iterator)"]


def test_numpy_generators_are_in_a_snapshot() -> None:
    value = [np.random.default_rng(0)]
    snapshot = snapshot_of(value)
    assert snapshot.changed() == []
    value[0].random()
    assert snapshot.changed() == ["root[0]"]


def test_getters_by_text_read_any_attribute() -> None:
    assert not snapshot_of([len]).dynamic
    assert snapshot_of([operator.attrgetter("a")]).dynamic


def test_code_among_arguments() -> None:
    function, held = function_with(1), Leaf()
    module = nn.Linear(1, 1)
    found = code_in(([held, {"k": function}], {"kind": Slotted, "m": module}))
    assert {Leaf, function, Slotted} <= set(found)
    assert held not in found
    assert not any(code is type(module).forward for code in found)


def state(**values: Any) -> Any:
    made = Object([torch.ones(2), {"k": 1.0}])
    vars(made).update(values)
    return made


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda v: v.held.append(2), "a.held[2]"),
        (lambda v: v.held.pop(), "a.held[1]"),
        (lambda v: v.held[1].update(k=2.0), "a.held[1]['k']"),
        (lambda v: v.held[1].update(k=1), "a.held[1]['k']"),
        (lambda v: v.held[1].update(n=2.0), "a.held[1]['n']"),
        (lambda v: setattr(v, "more", 1), "a.more"),
        (lambda v: setattr(v, "held", tuple(v.held)), "a.held"),
        (lambda v: delattr(v, "held"), "a.held"),
        (lambda v: v.held.__setitem__(0, torch.ones(3)), "a.held[0]"),
        (lambda v: v.held.__setitem__(0, v), "a.held[0]"),
        (lambda v: v.held.__setitem__(1, {1: 1.0}), "a.held[1]['k']"),
        (lambda v: setattr(v, "held", {1, 2}), "a.held"),
        (lambda v: v.__dict__.update(b=v.__dict__.pop("held")), "a.held"),
        (lambda v: setattr(v, "held", print), "a"),
    ],
)
def test_shape_of_an_object_names_what_changed(change: Callable[[Any], Any], path: str) -> None:
    value = state()
    passed = read_object(value, "a")
    assert passed is not None
    assert passed.changed() is None
    change(value)
    assert passed.changed() == (path, False)


def test_shapes_of_like_objects_are_equal() -> None:
    first, second = read_object(state(), "first"), read_object(state(), "second")
    assert first is not None
    assert second is not None
    assert first.shape == second.shape
    assert hash(first.shape) == hash(second.shape)
    assert first.tensors[0] is first.value.held[0]
    other = read_object(state(held=[torch.ones(2), {"k": True}]), "other")
    assert other is not None
    assert other.shape != first.shape
    first.value.held[0] = torch.ones(2)
    assert first.changed() == ("the tensors of first", True)


def test_shapes_tell_keys_that_are_equal_apart() -> None:
    shapes = {read_object(state(held={key: 0}), "a").shape for key in (1, True, 1.0)}  # type: ignore[union-attr]
    assert len(shapes) == 3


def test_shapes_tell_keys_of_one_name_apart() -> None:
    keys = [next(iter(Enum("Color", "RED"))) for _ in range(2)]
    shapes = {read_object(state(held={key: 0}), "a").shape for key in keys}  # type: ignore[union-attr]
    assert len(shapes) == 2


def test_shapes_tell_which_object_comes_again() -> None:
    first, second = [1], [1]
    lists = ([first, second, first], [first, second, second])
    shapes = {read_object(state(held=held), "a").shape for held in lists}  # type: ignore[union-attr]
    assert len(shapes) == 2


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (nn.Identity(), r"a\.held is an object of type torch.nn.modules.linear.Identity"),
        ({object(): 1}, r"a\.held has a key of type object"),
        ([[[[[[[[[1]]]]]]]]], "is an object of type builtins.list"),
        ({object()}, r"a\.held is an object of type builtins.set"),
        (torch.ones(2).to_sparse(), "a tensor of layout torch.sparse"),
    ],
    ids=["module", "key", "deep", "set", "sparse"],
)
def test_objects_without_a_shape_are_rejected(held: Any, why: str) -> None:
    with pytest.raises(NotATree, match=why):
        read_object(state(held=held), "a")
