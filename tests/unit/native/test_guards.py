"""Native guards: modules, tensors, storages and items that change."""

import ctypes
import gc
import operator
import sys
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import _C


@pytest.mark.parametrize("flag", ["with_kwargs", "always_call", "prepend"])
def test_hooks_count_except_those_of_the_root(flag: str) -> None:
    module = nn.Identity()
    module.register_forward_hook(lambda *_: None)
    inner, root = guard(module), guard(module, is_root=True)
    assert inner.check(False)
    handle = module.register_forward_hook(lambda *_: None, **{flag: True})
    assert inner.explain(False) == f"module._forward_hooks[{handle.id}]"
    assert root.check(False)
    handle.remove()
    assert inner.check(False)


def test_flags_of_hooks_count() -> None:
    module = nn.Identity()
    handle = module.register_forward_hook(lambda *_: None)
    held = guard(module)
    module._forward_hooks_with_kwargs[handle.id] = True
    assert held.explain(False) == f"module._forward_hooks_with_kwargs[{handle.id}]"


def test_order_of_hooks_counts() -> None:
    module = nn.Identity()
    first = module.register_forward_hook(lambda *_: None)
    last = module.register_forward_hook(lambda *_: None)
    held = guard(module)
    hooks: OrderedDict[int, object] = module._forward_hooks  # type: ignore[assignment]
    hooks.move_to_end(first.id)
    assert held.explain(False) == "module._forward_hooks"
    hooks.move_to_end(last.id)
    assert held.check(False)


def guard(module: nn.Module, *, is_root: bool = False) -> _C.Guard:
    made = _C.Guard()
    made.add_module(module, "module", is_root)
    return made


def guard_of_tensors(*tensors: Tensor) -> _C.Guard:
    made = _C.Guard()
    for tensor in tensors:
        made.add_tensor(tensor, "tensor")
    return made


class Anything:
    pass


Pair = namedtuple("Pair", "first second")


def test_another_object_at_the_same_address_is_noticed() -> None:
    module = nn.Identity()
    module.held = there = Anything()
    held = guard(module)
    module.held = None
    module.held = there
    assert held.check(False)
    module.held = None
    # As if it had died; what comes back is then another one, to which the allocator gave its memory.
    (reference,) = weakref.getweakrefs(there)
    ctypes.pythonapi._PyWeakref_ClearRef(ctypes.py_object(reference))
    module.held = there
    assert not held.check(False)


PLACES = [Anything(), Anything()]


@pytest.mark.parametrize(
    "make",
    [
        lambda index: slice(index, 3),
        lambda index: (slice(index, 3), PLACES[0]),
        lambda index: Pair(index, PLACES[index]),
        lambda index: PLACES[index].__str__,
        lambda index: property([guard, guard_of_tensors][index]),
        lambda index: staticmethod([guard, guard_of_tensors][index]),
        operator.itemgetter,
        lambda index: operator.methodcaller("view", index),
    ],
)
def test_object_without_references_is_known_by_its_items(make: Callable[[int], object]) -> None:
    module = nn.Identity()
    module.held = make(0)
    held = guard(module)
    assert held.check(False)
    for _ in range(100):  # some of them lie where the first one lay
        module.held = None
        module.held = make(1)
        assert not held.check(False)


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda: float("1.5"), True),
        (lambda: (float("1.5"), "text"), True),
        (lambda: torch.device("cpu", 0), True),
        (lambda: torch.ones(1), False),
        (nn.Identity, False),
        (lambda: [nn.Identity()], False),
        (lambda: (nn.Identity(),), False),
    ],
    ids=["number", "tuple", "device", "tensor", "module", "list", "tuple of a module"],
)
def test_only_what_leads_to_no_module_is_kept_alive(make, held: bool) -> None:
    module = nn.Identity()
    vars(module)["value"] = value = make()
    before = sys.getrefcount(value)
    watching = guard(module)
    assert watching.check(False)
    assert sys.getrefcount(value) - before == held


def test_a_renamed_attribute_is_noticed() -> None:
    module = nn.Identity()
    module.first = 1
    watching = guard(module)
    del module.first
    module.second = 1
    assert not watching.check(False)


def test_dict_of_a_module_replaced() -> None:
    module = nn.Identity()
    held = guard(module)
    assert held.check(False)
    old = module.__dict__
    module.__dict__ = {**old, "training": not module.training}
    assert not held.check(False)
    module.__dict__ = old
    assert held.check(False)


@pytest.mark.parametrize("name", ["_parameters", "_buffers", "_modules", "_forward_hooks"])
@pytest.mark.parametrize("keep", [True, False], ids=["old one kept", "old one freed"])
def test_table_of_a_module_replaced(name: str, keep: bool) -> None:
    module = nn.Linear(2, 2)
    held = guard(module)
    assert held.check(False)
    old = [getattr(module, name)] if keep else []
    setattr(module, name, type(getattr(module, name))(getattr(module, name)))
    assert not held.check(False)
    assert not held.check(False)
    assert len(old) == keep


def test_a_module_that_keeps_its_tables_elsewhere_is_refused() -> None:
    module = nn.Linear(2, 2)
    vars(module)["_parameters"] = UserDict(module._parameters)
    with pytest.raises(TypeError, match="_parameters is no dict"):
        guard(module)


def test_a_module_that_died_is_noticed() -> None:
    module = nn.Linear(2, 2)
    attributes = vars(module)
    held, other = guard(module), guard(nn.Identity())
    assert held.check(False)
    assert not other.check(False)
    del module
    gc.collect()
    assert not held.check(False)
    attributes.clear()
    assert not held.check(False)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (lambda t: t.add_(1), True),
        (lambda t: setattr(t, "data", t.data), True),
        (lambda t: setattr(t, "data", t.data.clone()), False),
        (lambda t: setattr(t, "data", t.data.as_strided((4, 4), (4, 1), 4)), False),
        (lambda t: setattr(t, "data", t.data.t()), False),
        (lambda t: setattr(t, "data", t.data[:2]), False),
        (lambda t: t.set_(torch.zeros(4, 4)), False),
        (lambda t: t.untyped_storage().resize_(0), False),
        (lambda t: torch.utils.swap_tensors(t, torch.zeros(4, 4)), False),
        (graphcache.expire, False),
    ],
    ids=["write", "same", "data", "offset", "layout", "shape", "set", "resize", "swap", "expired"],
)
def test_storage(change, holds: bool) -> None:
    other, tensor = torch.ones(2), torch.ones(8, 4)[:4]  # alive, as what a source holds is
    held = guard_of_tensors(other, tensor)
    assert held.check(True)
    change(tensor)
    assert held.check(False) == holds


def test_gradients() -> None:
    held = guard_of_tensors(tensor := torch.ones(4))
    tensor.requires_grad_()
    assert held.check(False)
    assert not held.check(True)


def cell(value: object):
    return (lambda: value).__closure__[0]


class Doubled(dict):
    def __getitem__(self, key):
        return super().__getitem__(key)[0]


@pytest.mark.parametrize(
    ("container", "key", "change"),
    [
        ({"k": 1}, "k", lambda d: d.clear()),
        ({(1, 2.5): 1}, (1, 2.5), lambda d: d.update({(1, 2.5): 2})),
        (defaultdict(lambda: 2, k=1), "k", lambda d: d.pop("k")),
        (Doubled(k=[1]), "k", lambda d: d.update(k=[2])),
        (Doubled(k=[1]), "k", lambda d: d.clear()),
        ([0, 1], 1, lambda d: d.pop()),
        ([0, 1], 1, lambda d: d.reverse()),
        (deque([0, 1]), 1, lambda d: d.pop()),
        (cell(1), None, lambda c: setattr(c, "cell_contents", 2)),
        (cell(1), None, lambda c: delattr(c, "cell_contents")),
    ],
    ids=["dict", "tuple key", "default", "override", "gone", "short", "list", "other", "cell", "empty"],
)
def test_sources(container, key, change) -> None:
    held = _C.Guard()
    held.add_source(container, key, 1, "first")
    held.add_source((0, 1), 1, 1, "second")
    assert held.check(False)
    change(container)
    assert not held.check(False)
    assert held.explain(False) == "first"
    assert not isinstance(container, defaultdict) or not container
