"""The plan of a capture: what is captured at which sizes, what guards it, and why it is not padded."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from graphcache import _C
from graphcache.call.bound_call import BOUND, BoundCall
from graphcache.capture.bucket import Dependencies
from graphcache.config import Options, Pad, top_name
from graphcache.errors import CaptureError, describe
from graphcache.guards.guards import Guards
from graphcache.guards.reachability import key_of
from graphcache.pool import GraphPool
from graphcache.report.reasons import Bypass, Reason, text_of
from graphcache.runtime.undo_log import UndoLog
from graphcache.tracing.trace import Forward, Trace

PAD_IS_MISSING = "it writes to outside state, and pad does not say what a padded row must hold"
COUNTS = "it changes Python values or depends on counters ({}), perhaps by batch"
CHANGES = "it changes attributes, which no graph replays: {}"


@dataclass(frozen=True)
class CapturePlan:
    """A capture that is about to be made.

    Attributes:
        name: the qualified name of the forward, for messages.
        forward: the forward itself.
        call: the first call of its signature, with the arguments bound that the forward mutates.
        trace: the facts of that call.
        guards: what the graphs will depend on besides their arguments.
        pool: the memory of the graphs.
        options: see `cuda_graphed`.
        sizes: the sizes to capture, where the forward can be padded.
        no_padding_reason: why the forward is captured only at the batch of the call; or None.
        undo: for each size that ran, what puts its effects back.
    """

    name: str
    forward: Forward
    call: BoundCall
    trace: Trace
    guards: Guards
    pool: GraphPool
    options: Options
    sizes: tuple[int, ...]
    no_padding_reason: str | None
    undo: dict[int, UndoLog]

    @property
    def is_pure(self) -> bool:
        """Return True if the forward mutates nothing outside, so that running it twice does no harm."""
        return not self.trace.mutated_keys

    def run(self, tensors: list[torch.Tensor]) -> Any:
        """Runs the forward over other tensors, from the Python values that the first call began with.

        Returns:
            The result; with the tensors that effects store, if there are some.
        """
        args, kwargs = self.call.arguments(tensors)
        effects = self.trace.effects
        with effects.begun():
            result = self.forward.function(*args, **kwargs)
            if (name := effects.differing()) is not None:
                raise CaptureError(CHANGES.format(name), reason=Reason.CHANGES_VALUES)
            return effects.with_outputs(result)

    @cached_property
    def dependencies(self) -> Dependencies:
        """Returns what the graphs will depend on besides their arguments."""
        trace = self.trace
        return Dependencies(
            self.guards,
            self._mutated_memory(),
            trace.mutated_keys,
            trace.mutated_keys <= _passed_keys(self.call, self.options.bind)
            and all(key_of(source) in _counters_in(self.call) for source, _ in trace.effects.sources()),
            trace.read_set.ran,
            frozenset(trace.external),
            trace.draws_random,
        )

    def _mutated_memory(self) -> _C.MutatedMemory:
        """Returns the memory that the graphs will mutate besides their own, and that of objects.

        An argument in either is passed to no graph.
        """
        trace = self.trace
        external = {key: t for key, t in trace.external.items() if key in trace.mutated_keys}
        for tensor in (tensor for passed in self.call.objects for tensor in passed.tensors):
            if tensor.device == self.pool.device:
                external[_C.storage_key(tensor)] = tensor
        mutated = _C.MutatedMemory(
            list(external.values()),
            trace.mutated_positions(self.call),
            [index for index, _ in self.call.copied_in()],
        )
        arguments = {id(tensor): index for index, tensor in enumerate(self.call.tensors)}
        mutated.versions_of_arguments = [arguments[id(t)] for t in trace.raised if id(t) in arguments]
        for tensor in trace.raised:
            if id(tensor) not in arguments:
                mutated.add_version(tensor, self.call.static_objects())
        return mutated


def check_trace(trace: Trace, root: Any) -> None:
    """Raises where no graph can do what the forward did.

    Args:
        trace: the run of the forward.
        root: the object that the forward is bound to, or None.

    Raises:
        CaptureError: for the first thing that no graph can hold.
        Bypass: where something that is no parameter wants gradients: this call only.
    """
    if trace.blocker is not None:
        text, reason = trace.blocker
        raise CaptureError(text, reason=reason)
    if any(tensor.grad_fn is not None for tensor in trace.tensors):
        raise Bypass(Reason.NEEDS_GRAD)
    if "_version" in trace.read_set.users_names:
        raise CaptureError("it reads _version, which no graph advances", reason=Reason.READS_VALUE)
    for hook in trace.hooks:
        changed = hook.changes(trace.changes)
        if hook.effect is not None or changed:
            does = f"changes {', '.join(changed[:3])}" if changed else f"calls {hook.effect}"
            text = text_of(Reason.HOOKS, f"{hook.described(root)} {does}, which no graph replays")
            raise CaptureError(text, reason=Reason.HOOKS)
    if trace.python_mutations:
        raise CaptureError(
            CHANGES.format(", ".join(trace.python_mutations[:3])), reason=Reason.CHANGES_VALUES
        )
    if trace.leak is not None:
        raise CaptureError(CHANGES.format(trace.leak), reason=Reason.KEEPS_TENSOR)


def build_guards(trace: Trace, forward: Forward, call: BoundCall) -> Guards:
    """Returns what the graphs depend on besides their arguments.

    Raises:
        CaptureError: where an address that the forward reaches can't be captured safely.
    """
    objects = {id(tensor) for passed in call.objects for tensor in passed.tensors}
    owned = {_C.storage_key(tensor) for passed in call.objects for tensor in passed.tensors}
    reached = [tensor for tensor in trace.reached if id(tensor) not in objects]
    external = [tensor for key, tensor in trace.external.items() if key not in owned]
    effects = trace.effects
    try:
        with effects.begun():
            places = effects.sources()
            guards = Guards.find(forward.instance, trace.read_set, reached, external, places)
    except TypeError as error:  # its tables lie elsewhere than in Python
        raise CaptureError(str(error), reason=Reason.SCRIPTED) from error
    if guards.iterators:
        raise CaptureError(
            f"it reads an iterator, {guards.iterators[0]}, which no graph advances; keep an index",
            reason=Reason.ITERATOR,
        )
    for source, _ in places:
        if key_of(source) not in guards.places | _counters_in(call):
            raise CaptureError(CHANGES.format(source.label), reason=Reason.CHANGES_VALUES)
    device = call.tensors[0].device
    for tensor in trace.external.values():
        if tensor.device != device:
            raise CaptureError(
                f"it reads a tensor on {tensor.device} ({describe(tensor)})", reason=Reason.TWO_DEVICES
            )
        if _C.is_weak(tensor):
            raise CaptureError(
                f"it reads an output of a graph that was kept ({describe(tensor)}); keep a .clone()",
                reason=Reason.READS_HELD_OUTPUT,
            )
    if guards.unguarded:
        raise CaptureError(
            f"it reaches a tensor ({describe(guards.unguarded[0])}) in a way that can't be "
            "watched; make it an argument, a buffer or an attribute",
            reason=Reason.UNGUARDED_TENSOR,
        )
    return guards


def why_not_padded(trace: Trace, call: BoundCall, pad: Pad) -> str | None:
    """Explains why rows may not be added to this forward; None where they may."""
    if trace.effects:
        return COUNTS.format(trace.effects.names)
    if trace.draws_random:
        return "it draws random numbers, and padded rows would draw some too"
    if any(role.role is BOUND and role.dim is not None for role in call.roles):
        return "an argument that is bound by address carries the batch"
    if not trace.mutated_keys or pad is not None:
        return None
    # What a caller passes for this batch alone, such as a cache, need not fit another.
    if trace.mutated_keys <= _passed_keys(call):
        return "it writes to an object that it is passed, and pad does not say where else"
    return PAD_IS_MISSING


def _counters_in(call: BoundCall) -> set[tuple[int, Any]]:
    """Returns the places in passed objects that forwards count at."""
    return {key_of(source) for passed in call.objects for source in passed.counters}


def _passed_keys(call: BoundCall, bind: Collection[str] = ()) -> set[int]:
    """Returns the keys of the storages of objects that are passed, and of arguments named in `bind`."""
    keys = {_C.storage_key(tensor) for each in call.objects for tensor in each.tensors}
    named = (t for t, path in zip(call.tensors, call.paths, strict=True) if top_name(path) in bind)
    return keys.union(map(_C.storage_key, named))
