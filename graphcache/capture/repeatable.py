"""Finds out whether each replay can repeat what a forward changed in Python.

The forward runs once more, from the state that the first call began from. In place of the values that it
changes are others, which record how it uses them. All of it is put back.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from graphcache.call.bound_call import BoundCall
from graphcache.call.pytree import NotATree, constant, flatten
from graphcache.capture.closeness import same
from graphcache.guards.reachability import Source, key_of
from graphcache.guards.static_objects import containers_of, counters_like
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.tracing.effects import Effect, Effects, put, value_at
from graphcache.tracing.python_snapshot import memos_restored
from graphcache.tracing.stand_in import (
    LIMIT,
    Count,
    Counted,
    asks_for_identity,
    asks_for_type,
    is_stand_in,
    unread,
)
from graphcache.tracing.trace import Forward, Trace, result_blocker, trace_forward

MAX_RUNS = 3  # each may find more places that the forward sets
_KINDS = (float, str, Tensor, list, tuple, dict)  # of values that may be replaced unread


def with_effects(forward: Forward, call: BoundCall, trace: Trace) -> Trace:
    """Returns the trace with the changes of Python values as effects, where replays can repeat all.

    Ints of objects that other forwards count in get bounds, too: they are no part of the call's key.

    Args:
        forward: the forward.
        call: the call.
        trace: that of the call; the values are as the call left them.
    """
    known = [source for passed in call.objects for source in passed.counters]
    places = _sources(call, trace)
    found = None if places is None else _traced_again(forward, call, trace, places)
    if found is None and known and not trace.changes:
        exact = (Effect(each, (each.value, each.value + 1), None) for each in known)
        found = replace(trace, effects=Effects(tuple(exact)))
    return found or trace


def _sources(call: BoundCall, trace: Trace) -> list[Source] | None:
    """Returns the places to look at, with the values before the call; None where that is no use."""
    if trace.replaced is None or trace.effect is not None:  # which a second run would repeat
        return None
    if trace.blocker is not None and not trace.asks_for_capture:
        return None
    found = {change.key: change.source for change in trace.replaced}
    for passed in call.objects:
        there = containers_of(passed)
        inside = {key for key in found if key[0] in there}
        if any(type(found[key].value) is not int for key in inside):
            return None
        for source in counters_like(passed, inside):
            found.setdefault(key_of(source), source)
    return list(found.values()) or None


def _traced_again(forward: Forward, call: BoundCall, trace: Trace, places: list[Source]) -> Trace | None:
    for _ in range(MAX_RUNS):
        search = _Search(trace, places)
        run = search.run(forward, call)
        if run is None or run.replaced is None:
            return None
        more = [change.source for change in run.replaced if change.key not in search.stand_ins]
        if not more:
            return search.found(call, run)
        places = [*places, *more]
    return None


class _Search:
    """Runs a forward with other values at some places, and reads off what it does to them."""

    def __init__(self, trace: Trace, places: Sequence[Source]) -> None:
        self._trace = trace
        self._places = places
        self._counts: list[Count] = []
        self.stand_ins = {key_of(source): self._stand_in(source.value) for source in places}

    def _stand_in(self, value: Any) -> Any:
        if type(value) is int:
            count = Count(value)
            self._counts.append(count)
            return Counted(count)
        return unread(value) if type(value) in _KINDS else value

    def run(self, forward: Forward, call: BoundCall) -> Trace | None:
        """Traces the forward; returns None where it does something else than in the first run."""
        trace = self._trace
        now = [value_at(source) for source in self._places]
        # What is too large to be put back is as the first call left it.
        undone = trace.undo.undone() if trace.undo.is_complete else nullcontext()
        mode = as_in_a_capture if trace.asks_for_capture else nullcontext()
        try:
            for source in self._places:
                put(source, self.stand_ins[key_of(source)])
            with undone, memos_restored(trace.memos), mode:
                run = trace_forward(forward, call, restore=True)
        except Exception:  # as code in C raises that is given something else than an int
            return None
        finally:
            for source, value in zip(self._places, now, strict=True):
                put(source, value)
        return run if self._is_like(run) else None

    def _is_like(self, run: Trace) -> bool:
        trace = self._trace
        if run.layout is None or run.layout != trace.layout or run.draws_random != trace.draws_random:
            return False
        if run.leak is not None or asks_for_type(run.read_set.ran.values()):
            return False
        if not trace.asks_for_capture and (
            run.read_set.ran.keys() != trace.read_set.ran.keys()
            or run.mutated_keys != trace.mutated_keys
        ):
            return False
        exact = trace.undo.is_complete and not trace.draws_random
        return not exact or same(trace.tensors, run.tensors)

    def found(self, call: BoundCall, run: Trace) -> Trace | None:
        """Returns the first trace with the effects that this run has shown; None where some can't be."""
        trace = self._trace
        first = {change.key: change.after for change in trace.replaced or ()}
        then = {change.key: change.after for change in run.replaced or ()}
        each: list[Effect] = []
        inside = {container for passed in call.objects for container in containers_of(passed)}
        outputs = 0
        for source in self._places:
            key = key_of(source)
            stand_in = self.stand_ins[key]
            value = then.get(key, stand_in)
            effect = self._expecting(source, stand_in, stored=key in then, run=run)
            if effect is not None and value is not stand_in:
                effect = self._storing(effect, value, first.get(key, source.value), call, outputs)
            elif key in first:  # the first run changed the value
                return None
            if effect is None:
                return None
            if effect.is_exact and (key[0] in inside or _only_grows(effect, len(each), stand_in)):
                return None
            outputs += effect.output is not None
            each.append(effect)
        effects = Effects(tuple(each), is_shown=True)
        result = effects.combined(
            trace.result, [first.get(key_of(source), source.value) for source in self._places]
        )
        tensors: list[Tensor] = []
        layout = flatten(result, tensors, [], other=call.object_ref)
        base = run if trace.asks_for_capture else trace.united(run)
        external = (*call.tensors, *base.reached)
        return replace(
            base,
            result=trace.result,
            layout=layout,
            tensors=tensors,
            blocker=base.blocker or result_blocker(tensors, external, base.external),
            undo=trace.undo,
            snapshot=None,
            python_mutations=[],
            replaced=[],
            effects=effects,
            leak=None,
        )

    def _expecting(self, source: Source, stand_in: Any, *, stored: bool, run: Trace) -> Effect | None:
        """Returns an effect that stores nothing yet; None where the value is used in an unknown way."""
        value = source.value
        if not is_stand_in(stand_in):
            return Effect(source, None, None) if value is None or type(value) is bool else None
        if type(stand_in) is Counted:
            if not stand_in.count.escaped:
                return Effect(source, (stand_in.count.low, stand_in.count.high), None)
            if not -LIMIT < value < LIMIT:
                return None
            return Effect(source, (value, value + 1), None, is_exact=stored)
        if asks_for_identity(run.read_set.ran.values()):
            return None
        if not stand_in.used:
            return Effect(source, None, type(value))
        # Of texts that go back and forth, each gets graphs of its own. None is ever made anew.
        written_out = {id(item) for code in run.read_set.ran.values() for item in code.co_consts}
        return Effect(source, None, None) if type(value) is str and id(value) in written_out else None

    def _storing(
        self, effect: Effect, value: Any, first: Any, call: BoundCall, outputs: int
    ) -> Effect | None:
        """Returns the effect with what it stores; None where no replay can make that.

        Args:
            effect: an effect that stores nothing.
            value: the value that the run stored.
            first: the value that the first run stored.
            call: the call.
            outputs: how many effects before store tensors.
        """
        if type(value) is Counted:
            if value.value() != first or type(first) is not int:
                return None
            base = next(
                index
                for index, source in enumerate(self._places)
                if type(known := self.stand_ins[key_of(source)]) is Counted
                and known.count is value.count
            )
            if value.sign == 1:
                return effect._replace(base=base, amount=value.offset)
            place, before = self._places[base], value.count.value
            if key_of(place) != key_of(effect.source):
                return None
            exact = before, before + 1
            return effect._replace(bounds=exact, constant=constant(first), is_exact=True)
        if is_stand_in(value):
            return None
        if (known := constant(value)) is not None:
            return effect._replace(constant=known) if known == constant(first) else None
        try:
            layouts = [flatten(each, [], [], other=call.object_ref) for each in (value, first)]
        except NotATree:
            return None
        return effect._replace(output=outputs) if layouts[0] == layouts[1] else None


def _only_grows(effect: Effect, index: int, stand_in: Counted) -> bool:
    """Return True for an int that is added to and never compared, so that no value comes back."""
    count = stand_in.count
    return effect.base == index and effect.amount != 0 and (count.low, count.high) == (-LIMIT, LIMIT)
