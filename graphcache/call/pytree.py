"""Takes nested arguments and results apart into tensors and a hashable layout, and rebuilds them.

`torch.utils._pytree` supports only registered dataclasses, and takes 16 us for four leaves, where a call
has a few us.
"""

import enum
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from inspect import getattr_static
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache import _C
from graphcache.report.reasons import Reason

# Of exactly these types: an instance of a subclass may have attributes, which no comparison sees.
_PLAIN = (
    *(bool, int, str, bytes, type(None), type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
EXACT_TENSORS = (Tensor, torch.nn.Parameter)
# Attributes that torch.compile and transformers set on tensors; no forward reads them.
_MARKS = ("_specialize_on", "_is_hf_initialized", "_is_buffer", "persistent")
MAX_DEPTH = 64  # containers inside containers


class NotATree(TypeError):
    """A value that is neither a tensor, nor a plain constant, nor a container of such.

    Attributes:
        reason: the kind of reason for which a call that passes the value runs eagerly.
    """

    def __init__(self, text: str, reason: Reason = Reason.ARGUMENT_TYPE) -> None:
        super().__init__(text)
        self.reason = reason


TENSOR = "tensor"  # stands for a tensor in a layout


@dataclass(frozen=True)
class Constant:
    """A value that a graph bakes in; values of different types differ, such as 1, 1.0 and True."""

    kind: type
    text: Any
    # Not compared: the text tells -0.0 from 0.0, and range(0, 3, 2) from range(0, 4, 2).
    value: Any = field(compare=False)


class Node(NamedTuple):
    """A container: its type, its keys or field names (None for a sequence), and its items.

    Keys that are no strings are `Constant`s, because {1: x} and {1.0: x} are two layouts.
    """

    kind: type
    keys: tuple[Any, ...] | None
    children: tuple[Any, ...]
    extra: Any = None

    def plain_keys(self) -> list[Any]:
        """Returns the keys themselves, or the names of the fields."""
        return [key.value if isinstance(key, Constant) else key for key in self.keys or ()]


class ObjectRef(NamedTuple):
    """Stands for an object that holds tensors in a layout; see `static_objects`.

    Attributes:
        number: the index among the objects of a call.
        shape: the contents of the object without the values in tensors; None in a result.
    """

    number: int
    shape: Any = None


Other = Callable[[Any, str], Any]


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _is_return_type(kind: type) -> bool:
    """Return True for the type of a result of torch with names, such as that of `max(dim=…)`."""
    return kind.__module__ == "torch.return_types" and issubclass(kind, tuple)


def constant(value: Any) -> Constant | None:
    """Returns a plain value as a constant of a layout; None for any other value."""
    kind = type(value)
    if kind in (float, complex, range):
        return Constant(kind, repr(value), value)
    if kind is slice:
        parts = tuple(constant(part) for part in (value.start, value.stop, value.step))
        return None if None in parts else Constant(kind, parts, value)
    if kind in _PLAIN:
        return Constant(kind, value, value)
    if isinstance(value, enum.Enum):  # there is one object for each member
        return Constant(kind, id(value), value)
    return None


def _key(key: Any) -> Any:
    """Returns a key of a dictionary as a key of a `Node`; equal only for equal keys of one type."""
    kind = type(key)
    if kind is str:
        return key
    if kind is frozenset:
        return Constant(kind, tuple(map(_key, key)), key)  # a loop over it has an order
    if kind is tuple or _is_namedtuple(kind):
        return Constant(kind, tuple(map(_key, key)), key)
    if is_dataclass(kind):
        return Constant(kind, tuple(_key(getattr(key, each.name)) for each in fields(kind)), key)
    if kind.__module__ == "numpy" and kind.__name__ != "void" and hasattr(key, "item"):
        return Constant(kind, (key.dtype.str, constant(key.item())), key)
    return constant(key) or Constant(kind, id(key), key)


def attributes_besides(value: Any, fields: Sequence[str]) -> list[str]:
    """Returns the names of attributes of `value` that are no fields, and that a graph would lose."""
    slots = (name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()))
    known = (*fields, "__dict__", "__weakref__", "__orig_class__")
    return [
        name
        for name in (*getattr(value, "__dict__", ()), *slots)
        if name not in known and not isinstance(getattr_static(type(value), name, None), cached_property)
    ]


def attributes_of_tensor(tensor: Tensor) -> list[str]:
    """Returns the names of attributes that Python code has set on a tensor, without libraries' marks."""
    return [name for name in tensor.__dict__ if name not in _MARKS and "_dynamo_" not in name]


def flatten(
    value: Any,
    leaves: list[Tensor],
    names: list[str],
    name: str = "",
    other: Other | None = None,
    depth: int = MAX_DEPTH,
) -> Any:
    """Appends the tensors of `value` to `leaves`, their paths to `names`, and returns the layout.

    Args:
        value: the value to take apart.
        leaves: see above.
        names: see above.
        name: the path of `value`.
        other: returns the layout of a value of another kind, given the value and its path, or None.
        depth: the number of containers that `value` may contain in each other.

    Raises:
        NotATree: for an object that a graph can neither read from nor bake in.
    """
    kind = type(value)
    if kind in EXACT_TENSORS:
        leaves.append(value)
        names.append(name)
        return TENSOR
    if (plain := constant(value)) is not None:
        return plain
    if depth == 0:
        where = name.partition("[")[0] or "the result"
        raise NotATree(f"{where} has more than {MAX_DEPTH} containers in each other, or contains itself")
    keys: tuple[Any, ...] | None = None
    field_names: tuple[str, ...] = ()
    extra: Any = None
    if kind in (list, tuple) or _is_namedtuple(kind) or _is_return_type(kind):
        items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    elif is_dataclass(kind):
        # transformers' ModelOutput is a dictionary too, of those fields that are not None
        extra = tuple(value.keys()) if isinstance(value, dict) else None
        keys = field_names = tuple(each.name for each in fields(kind))
        items = [(f"{name}.{each}", getattr(value, each, None)) for each in field_names]
    elif kind in (dict, OrderedDict, defaultdict):
        extra = value.default_factory if kind is defaultdict else None
        if any(isinstance(key, Tensor) for key in value):
            raise NotATree(f"{name or 'the result'} is a dictionary with tensors as keys")
        keys = tuple(map(_key, value))
        items = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif other is not None and (found := other(value, name)) is not None:
        return found
    elif kind is slice:
        raise NotATree(f"{name or 'the result'} is a slice of something that is no constant")
    else:
        what = "a tensor subclass" if isinstance(value, Tensor) else "an object"
        raise NotATree(f"{name or 'the result'} is {what} of type {kind.__module__}.{kind.__qualname__}")
    if besides := attributes_besides(value, field_names):
        raise NotATree(
            f"{name or 'the result'} has attributes that are no fields ({', '.join(besides)}), of "
            f"type {kind.__module__}.{kind.__qualname__}"
        )
    children = [flatten(item, leaves, names, path, other, depth - 1) for path, item in items]
    return Node(kind, keys, tuple(children), extra)


def rebuild(layout: Any, leaves: Iterator[Any], objects: Sequence[Any] = ()) -> Any:
    """Returns a new value of a layout, with tensors from `leaves`, in order, and with `objects`."""
    if layout is TENSOR:
        return next(leaves)
    if isinstance(layout, Constant):
        return layout.value
    if isinstance(layout, ObjectRef):
        return objects[layout.number]
    return _assemble(layout, [rebuild(child, leaves, objects) for child in layout.children])


def _assemble(layout: Node, items: list[Any]) -> Any:
    kind: Any = layout.kind
    if layout.keys is None:
        return kind._make(items) if _is_namedtuple(kind) else kind(items)
    pairs = zip(layout.plain_keys(), items, strict=True)
    if not is_dataclass(kind):
        return defaultdict(layout.extra, pairs) if kind is defaultdict else kind(pairs)
    new: Any = kind.__new__
    made = new(kind)
    for key, item in pairs:
        object.__setattr__(made, key, item)  # also where the dataclass is frozen
    for key in layout.extra or ():
        OrderedDict.__setitem__(made, key, getattr(made, key))
    return made


def native(layout: Any, static_objects: Sequence[Any] = ()) -> _C.Layout:
    """Returns a layout for native code.

    Args:
        layout: see `flatten`.
        static_objects: the native counterpart of each slot.
    """
    if layout is TENSOR:
        return _C.Layout.tensor()
    if isinstance(layout, Constant):
        return _C.Layout.constant(layout.value)
    if isinstance(layout, ObjectRef):
        return _C.Layout.static_object(static_objects[layout.number])
    parts = [native(child, static_objects) for child in layout.children]
    assemble = partial(_assemble, layout)
    if layout.keys is None:
        return _C.Layout.sequence(layout.kind, parts, assemble)
    make = _C.Layout.fields if is_dataclass(layout.kind) else _C.Layout.mapping
    return make(layout.kind, parts, layout.plain_keys(), layout.extra, assemble)
