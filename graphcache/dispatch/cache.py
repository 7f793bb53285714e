"""Which graph of a forward serves a call, and what happens where none does."""

import logging
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from graphcache import config
from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import (
    NEEDS_GRAD,
    inlining,
    modes_of,
    check_no_profiler,
    check_nobody_watches,
)
from graphcache.call.object_args import MutationHistory
from graphcache.call.pytree import NotATree, flatten
from graphcache.capture.bucket import SETTLED, Bucket
from graphcache.capture.ladder import learn_batch_dims
from graphcache.config import Options
from graphcache.dispatch.entry import CHANGE_IN_PLACE, MANY_WAYS, MAX_SIGNATURES, Entries, Entry
from graphcache.dispatch.first_call import first_call, learn
from graphcache.dispatch.store import Graphs
from graphcache.guards.guards import submodule_with_hooks
from graphcache.guards.static_objects import with_slots
from graphcache.report.cache_info import CacheInfo, Counts
from graphcache.report.reasons import Bypass
from graphcache.report.suggest_sizes import Suggestion, suggestion
from graphcache.tracing.trace import trace

logger = logging.getLogger(__name__)

MAX_RECAPTURES = 8
TOO_SLOW = "its graph saves less than min_gain"


class GraphCache(Graphs):
    """The graphs of one forward, and how its calls are served by them.

    Attributes:
        beside: those of the same forward over compiled code; they count as parts of this.
    """

    def __init__(self, function: Callable[..., Any], name: str, options: Options, instance: Any) -> None:
        super().__init__(function, name, options, instance)
        self.beside: list[GraphCache] = []

    # The call

    def __call__(
        self,
        function: Callable[..., Any],
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Serves one call that `native` did not: by a graph, or eagerly with the reason counted."""
        self.native.calls += 1
        if (why := self.native.why_eager(args, kwargs, instance)) is not None:
            self.counts.eager[why] += 1
            return function(*args, **kwargs)
        try:
            check_nobody_watches(instance)
            call = self.signature.read(args, kwargs, modes_of(instance), self.mutated)
            pool = self.pool_for(call)
            self.native.count(call.batch)
            if (why := self.signature.mutation_history.known(call.objects)) is not None:
                raise Bypass(why)
            self._bypass_known(call)  # before homes are looked for, which takes longer
            with pool.lock:
                call = with_slots(call, pool)
                entry = self._serving(call, instance)
                if entry is None or (bucket := entry.bucket(call.batch)) is None:
                    return first_call(self, function, instance, call)
                if bucket.native.retired:
                    raise Bypass(TOO_SLOW)
                if entry.mutated.overlaps(call.tensors):
                    raise Bypass("an argument lies in memory that the forward writes")
                if bucket.lane.native.is_held_elsewhere():
                    raise Bypass("another thread holds an output of its lane")
                if call.batch != bucket.size and bucket.native.check_budget <= 0:
                    if entry.is_ambiguous(call) and not self.signature.names_batch(call):
                        return first_call(self, function, instance, call, exactly=True)
                    return self._compared(function, call, entry, bucket)
                if bucket.native.replays >= bucket.native.time_at:
                    return self._timed(function, call, entry, bucket)
                return bucket.replay(call, self.native.calls)
        except Bypass as reason:
            self.counts.eager[str(reason)] += 1
            return function(*args, **kwargs)

    def _bypass_known(self, call: BoundCall) -> None:
        """Raises `Bypass` for a kind of calls that was refused for good."""
        entry = self.entries.get(call.bare_key)
        if entry is not None and entry.eager is not None:
            entry.last = self.native.calls
            raise Bypass(entry.eager)

    def _serving(self, call: BoundCall, instance: Any) -> Entry | None:
        """Returns the entry that serves `call`; None if there is none, or no more.

        Raises:
            Unservable: where the call has to run eagerly.
        """
        if call.batch == 0:
            raise Bypass("an empty batch")
        grad = torch.is_grad_enabled()
        if grad and any(tensor.requires_grad for tensor in call.tensors):
            raise Bypass(NEEDS_GRAD)
        entry = self.entries.get(call.key)
        if entry is not None:
            entry.last = self.native.calls
            if not entry.guards.check(grad=grad):
                self._count_recapture(entry, grad=grad)
                self.drop(self.entries.pop(call.key))
                entry = None

        if entry is None:
            hooked = submodule_with_hooks(instance)
            if hooked is not None:
                raise Bypass(f"hooks inside the forward, on {hooked}")
            if self.recaptures > MAX_RECAPTURES:
                many = f"after {self.recaptures} captures in a row"
                self.warn(
                    "recaptures", f"{self.replaced} was replaced or changed {many}; {CHANGE_IN_PLACE}"
                )
                raise Bypass("what it captured is replaced again and again")
            # An object that a call changes is another kind of call each time.
            if not self.entries.is_due(call.bare_key) and not call.objects:
                if self.entries.once > MAX_SIGNATURES:
                    self.warn("signatures", MANY_WAYS)
                raise Bypass("the first call of another signature")
            if len(self.entries) >= MAX_SIGNATURES:
                lru_victim = self.entries.lru_victim()
                if lru_victim is None:
                    self.warn("signatures", MANY_WAYS)
                    raise Bypass(f"more than {MAX_SIGNATURES} signatures")
                self.drop(self.entries.pop(lru_victim))
                self.counts.dropped += 1
        elif entry.complete and entry.no_padding_reason is None and entry.bucket(call.batch) is None:
            raise Bypass("a batch above the largest size")
        return entry

    def _count_recapture(self, entry: Entry, *, grad: bool) -> None:
        if entry.amortized():
            self.recaptures = 0
        self.recaptures += 1
        self.replaced = entry.guards.explain(grad=grad)
        logger.info("%s is captured anew: %s changed", self.name, self.replaced)

    def _compared(self, function: Callable[..., Any], call: BoundCall, entry: Entry, bucket: Bucket) -> Any:
        """Returns the eager result, and compares padded replays with it."""
        try:
            with inlining():
                eager = function(*call.args, **call.kwargs)
        except torch.OutOfMemoryError:  # which a replay needs none of
            if not entry.pure or not bucket.native.padded_rows:
                raise
            bucket.native.check_budget = entry.check_interval
            return bucket.replay(call, self.native.calls)
        self.counts.eager["compared with a padded replay"] += 1
        tensors: list[Tensor] = []
        try:
            layout = flatten(eager, tensors, [], other=call.object_ref)
            why = learn_batch_dims([bucket], call.batch, layout, tensors)
        except NotATree as error:
            why = str(error)
        if why is None and entry.pure:
            why = entry.why_unlike(tensors, call, bucket, self.options.pad, self.native.calls)
        if why is None:
            if entry.no_padding_reason is not None:
                self.publish(call, None, entry)
            return eager
        entry.no_padding_reason = why
        self.publish(call, None, entry)
        self.warn(
            "rows",
            f"padding batch {call.batch} to {bucket.size} changes its result ({why}), so it is "
            "captured at exactly the batch sizes that it is called with",
        )
        return eager

    def _timed(self, function: Callable[..., Any], call: BoundCall, entry: Entry, bucket: Bucket) -> Any:
        """Serves a call of a graph that is timed: one runs eagerly, and the next by the graph."""
        timing, native = bucket.timing, bucket.native
        if entry.pure and timing.eager is None:
            timing.eager = bucket.lane.stopwatch()
            try:
                with timing.eager, inlining():
                    result = function(*call.args, **call.kwargs)
            except torch.OutOfMemoryError:  # which a replay needs none of
                return bucket.replay(call, self.native.calls)
            self.counts.eager["timed beside its graph"] += 1
            return result
        if timing.replay is None:
            timing.replay = bucket.lane.stopwatch()
            native.time_at = native.replays + SETTLED
            with timing.replay:
                return bucket.replay(call, self.native.calls)
        native.time_at = sys.maxsize if timing.is_done() else native.replays + SETTLED
        gain = timing.times().gain
        if gain is not None and self.options.min_gain is not None and gain < self.options.min_gain:
            bucket.retire()
            raise Bypass(TOO_SLOW)
        return bucket.replay(call, self.native.calls)

    def warm_up(
        self,
        function: Callable[..., Any],
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Captures for such calls without making one: what the forward writes is put back."""
        try:
            check_nobody_watches(instance)
            check_no_profiler()
            call = self.signature.read(args, kwargs, modes_of(instance), self.mutated)
            if call.objects:
                raise Bypass(f"it may change {call.objects[0].name}; call the forward itself instead")
            self._bypass_known(call)
            self.entries.is_due(call.bare_key)  # it is asked for
            with self.pool_for(call).lock:
                entry = self._serving(call, instance)
                if entry is not None and entry.bucket(call.batch) is not None:
                    return
                learn(self, function, instance, call, trace(function, instance, call, restore=True))
        except Bypass as reason:
            if not config.is_disabled():
                self.warn(f"warmup {reason}", f"warmup() captured nothing: {reason}")

    # What users ask

    def info(self) -> CacheInfo:
        """Returns the counts; see `CacheInfo`."""
        counts, calls, batches = Counts(), 0, Counter[int]()
        graphed = self._graphed()
        for cache in (self, *self.beside):
            counts.merge(cache.counts)
            calls += cache.native.calls
            batches.update(cache.native.batches)
        for entry in graphed:
            for bucket in entry.buckets.values():
                counts.add(bucket.native)
        return counts.info(
            calls,
            [entry.buckets for entry in graphed],
            [entry.no_padding_reason for entry in graphed if entry.no_padding_reason is not None],
            next((cache.pool for cache in (self, *self.beside) if cache.pool is not None), None),
            batches,
        )

    def suggest_sizes(self, count: int) -> Suggestion:
        """Returns the sizes that would have served the calls so far best."""
        return suggestion(self.info(), [entry.no_padding_reason for entry in self._graphed()], self.name, count)

    def _graphed(self) -> list[Entry]:
        entries = chain(*(cache.entries.values() for cache in (self, *self.beside)))
        return [entry for entry in entries if entry.buckets]

    def clear(self) -> None:
        """Drops the graphs and the counts.

        Outputs that are held stay as they are, until another graph of their pool runs.
        """
        for cache in self.beside:
            cache.clear()
        # No graph may go while another thread launches it.
        with self.pool.lock if self.pool is not None else nullcontext():
            while self.entries:
                self.drop(self.entries.popitem()[1])
            self.entries = Entries()
        if self.pool is not None:
            self.pool.trim()
        self.mutated.clear()
        self.warned.clear()
        self.signature.mutation_history = MutationHistory()
        self.recaptures = self.unsettled = 0
        self.native.calls, self.native.batches = 0, {}
        self.counts = Counts()
