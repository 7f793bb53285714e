"""Effects of a forward on Python values that each replay repeats: counters, constants, tensors.

A place is an item of a dict or a list, an attribute, a slot. A replay adds to the int there, or
stores a constant or a tensor that the graph made. What the place has to hold before is guarded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, MemberDescriptorType
from typing import Any, NamedTuple

from graphcache import _C
from graphcache.call.bound_call import BoundCall
from graphcache.call.pytree import Constant
from graphcache.guards.guards import Guards
from graphcache.guards.reachability import ABSENT, Source, key_of


class Effect(NamedTuple):
    """One place that the forward counted at or set, or whose int it compared.

    Attributes:
        source: the place, with the value that the forward began with.
        bounds: of an int, those for which the graph holds; the upper one is excluded.
        kind: the type of a value that the forward did not look at; None where the value is guarded.
        base: the number of the effect whose int is added to; None where none is.
        amount: the number that is added.
        constant: the constant that is stored, or None.
        output: the number of the tensor, or the tree of tensors, that is stored; or None.
        is_exact: whether the forward changes an int that it uses otherwise than counters are used, so
            that each value needs a graph of its own.
    """

    source: Source
    bounds: tuple[int, int] | None
    kind: type | None
    base: int | None = None
    amount: int = 0
    constant: Constant | None = None
    output: int | None = None
    is_exact: bool = False

    @property
    def is_free(self) -> bool:
        """Return True if other values than the first may lie there."""
        return self.bounds is not None or self.kind is not None


@dataclass(frozen=True)
class Effects:
    """All effects of one forward at one batch.

    Attributes:
        each: the effects; one may be the base of others.
        is_shown: a run of the forward has shown them, as in a capture if the forward asks for that.
    """

    each: tuple[Effect, ...] = ()
    is_shown: bool = False

    def __bool__(self) -> bool:
        return bool(self.each)

    @property
    def makes_values(self) -> bool:
        """Return True if graphs make some of the values that are stored."""
        return any(effect.output is not None for effect in self.each)

    @property
    def only_counts(self) -> bool:
        """Return True if all that replays do is to add to ints."""
        stored = ((i, effect) for i, effect in enumerate(self.each) if _stores(effect))
        return all(effect.base == i for i, effect in stored)

    @property
    def exact_values(self) -> tuple[Any, ...]:
        """The values of ints of which each needs a graph of its own."""
        return tuple(effect.source.value for effect in self.each if effect.is_exact)

    @property
    def names(self) -> str:
        """The names of the first places."""
        return ", ".join(effect.source.label for effect in self.each[:3])

    def sources(self) -> list[tuple[Source, bool]]:
        """Returns each place, and whether no guard may compare the value there."""
        return [(effect.source, effect.is_free) for effect in self.each]

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Begins the block with the values that the forward began with; puts those of now back."""
        now = [value_at(effect.source) for effect in self.each]
        try:
            for effect in self.each:
                put(effect.source, effect.source.value)
            yield
        finally:
            for effect, value in zip(self.each, now, strict=True):
                put(effect.source, value)

    def with_outputs(self, result: Any) -> Any:
        """Returns a result of the forward together with what it stored and made; as it is if nothing."""
        return self.combined(result, [value_at(effect.source) for effect in self.each])

    def combined(self, result: Any, values: Sequence[Any]) -> Any:
        """Returns a result together with those of `values`, one for each effect, that graphs make."""
        pairs = zip(self.each, values, strict=True)
        outputs = tuple(value for effect, value in pairs if effect.output is not None)
        return (result, outputs) if self.makes_values else result

    def differing(self) -> str | None:
        """Names a place where a run from the first values left something else; None where none is."""
        for effect in (each for each in self.each if each.output is None):
            value, first = value_at(effect.source), effect.source.value
            if effect.base is not None:
                first = self.each[effect.base].source.value + effect.amount
            if effect.constant is not None:
                first = effect.constant.value
            if value is not first and (type(value) is not type(first) or repr(value) != repr(first)):
                return effect.source.label
        return None

    def add_to(self, guards: Guards, call: BoundCall) -> None:
        """Has the guards check the places, and replays change them.

        Places in objects among the arguments are those of whatever object is passed.
        """
        counters = {
            key_of(source): (slot, index)
            for slot, passed in zip(call.slots, call.objects, strict=True)
            for index, source in enumerate(passed.counters)
        }
        for effect in self.each:
            container, key, _, label = effect.source
            if (place := key_of(effect.source)) in counters:
                slot, index = counters[place]
                native = _C.Effect.of_object(slot.native, index, label)
            else:
                native = _C.Effect(_C.Location(container, key, place not in guards.held), label)
            if effect.bounds is not None:
                native.expect_int(*effect.bounds)
            elif effect.kind is not None:
                native.expect_type(effect.kind)
            if effect.base is not None:
                native.store_sum(effect.base, effect.amount)
            elif effect.constant is not None:
                native.store_constant(effect.constant.value)
            elif effect.output is not None:
                native.store_output(effect.output)
            guards.native.add_effect(native)


def _stores(effect: Effect) -> bool:
    return (effect.base, effect.constant, effect.output) != (None, None, None)


def value_at(source: Source) -> Any:
    """Returns the value at a place now; `ABSENT` where there is none."""
    container, key = source.container, source.key
    if isinstance(key, MemberDescriptorType):
        return getattr(container, key.__name__, ABSENT)
    if isinstance(container, CellType):
        return container.cell_contents
    if isinstance(container, dict):
        return dict.get(container, key, ABSENT)
    return container[key] if key < len(container) else ABSENT


def put(source: Source, value: Any) -> None:
    """Stores a value at a place."""
    container, key = source.container, source.key
    if isinstance(key, MemberDescriptorType):
        key.__set__(container, value)
    elif isinstance(container, CellType):
        container.cell_contents = value
    elif isinstance(container, dict):
        dict.__setitem__(container, key, value)
    else:
        container[key] = value
