"""Serves the calls that native code hands over: by a graph, or eagerly with the reason."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch

from graphcache import config
from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import inlining
from graphcache.capture.bucket import SETTLED, Bucket
from graphcache.capture.mixing import mixing_operator
from graphcache.capture.other_sizes import why_unlike_captured
from graphcache.capture.outputs import find_batch_dims
from graphcache.capture.samples import scaled_down
from graphcache.capture.verify import ROWS_ALIKE, checked_replay
from graphcache.config import Options
from graphcache.dispatch.bypass import (
    check_bucket,
    check_call,
    check_no_profiler,
    check_pool,
    check_surroundings,
)
from graphcache.dispatch.entry import Entry
from graphcache.dispatch.first_call import first_call
from graphcache.dispatch.store import Store
from graphcache.guards.static_objects import with_slots
from graphcache.pool import GraphPool
from graphcache.report.cache_info import CacheInfo, Counts
from graphcache.report.reasons import WARNED, Bypass, EagerReason, Reason
from graphcache.report.suggest_sizes import Suggestion, suggestion
from graphcache.tracing.trace import Forward, trace_forward

MAX_BLOCKED = 4  # calls of an entry for which another thread held an output of its lane
MAX_MOVES = 2  # to other lanes; threads that call one forward would block each other there, too


class GraphCache:
    """The graphs of one forward, and how its calls are served by them.

    Args:
        function: the forward, bound; only its signature is kept.
        name: its qualified name, for messages.
        options: see `cuda_graphed`.
        instance: the instance that the forward is bound to, or None; not kept.

    Attributes:
        store: the graphs and the counts.
        beside: the caches of the same forward over compiled code; they count as parts of this one.
    """

    def __init__(self, function: Callable[..., Any], name: str, options: Options, instance: Any) -> None:
        self.name = name
        self.store = Store(function, name, options, instance)
        self.native = self.store.native
        self.beside: list[GraphCache] = []
        self._moves = 0

    def __call__(
        self,
        function: Callable[..., Any],
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Serves one call that `native` did not."""
        self.native.calls += 1
        if (why := self.native.eager_reason(args, kwargs)) is not None:
            return self._eager(why, function, args, kwargs)
        try:
            check_surroundings(instance)
            call = self.store.read(args, kwargs, instance)
            pool = self.store.pool_for(call)
            self.native.count(call.batch)
            self.store.check_known(call)  # before slots are looked for, which takes longer
            return self._serve(Forward(function, instance), call, pool)
        except Bypass as bypass:
            if bypass.why.reason is Reason.CPU_TENSORS and self.store.pool is not None:
                with self.store.pool.lock:  # the module may have left its device for good
                    self.store.drop_gone()
            return self._eager(bypass.why, function, args, kwargs)

    def bypass(
        self,
        why: EagerReason,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a call that no graph is looked for, and counts it."""
        self.native.calls += 1
        return self._eager(why, function, args, kwargs)

    def _eager(
        self,
        why: EagerReason,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.store.counts.eager[why] += 1
        if why.reason in WARNED:
            text = f"runs eagerly where its call has no graph: {why}"
            self.store.warn(why.reason.name, text, why.reason.advice)
        return function(*args, **kwargs)

    def _serve(self, forward: Forward, call: BoundCall, pool: GraphPool) -> Any:
        """Serves one call by a graph, or by the first call that makes one.

        The forward itself runs without the lock of the pool: it may wait for threads that need the lock.

        Raises:
            Bypass: where the call has to run eagerly.
        """
        check_pool(pool)
        with pool.lock:
            call, checks, compares = with_slots(call, pool), config.is_checking(), False
            entry = self._entry(forward, call)
            bucket = None if entry is None else entry.bucket(call.batch)
            if entry is not None and bucket is not None and self._leaves_lane(call, entry, bucket):
                entry = None
            elif entry is not None and bucket is not None:
                check_bucket(bucket, call)
                compares = not bucket.native.serves(call.batch)
                is_timed = bucket.native.replays >= bucket.native.time_at
                times_eager = is_timed and entry.is_pure and bucket.timing.eager is None
                if not compares and not times_eager and not checks:
                    return (self._timed_replay if is_timed else self._replay)(call, bucket)
        if entry is not None and bucket is not None and times_eager and not compares:
            return self._timed_eager(forward, call, bucket)
        check_no_profiler()
        if entry is None or bucket is None:
            return first_call(self.store, forward, call, exactly=False, restore=False)
        if checks and not compares:
            replay = partial(self._replay, call, bucket, repeat=False)
            return checked_replay(forward, call, bucket, replay, self.native.calls)
        names_batch = not entry.is_pure or self.store.signature.names_batch(call)  # by pad
        if entry.padding.is_ambiguous(call) and not names_batch:
            return first_call(self.store, forward, call, exactly=True, restore=False)
        return self._compare(forward, call, entry, bucket)

    def _entry(self, forward: Forward, call: BoundCall) -> Entry | None:
        """Returns the entry that serves `call`; None if there is none for the values of now.

        Raises:
            Bypass: where the call has to run eagerly.
        """
        check_call(call)
        entry = self.store.find(call)
        if entry is None:
            self.store.check_worth_a_capture(call)
            return None
        entry.last = self.native.calls
        if entry.complete and entry.no_padding_reason is None and entry.bucket(call.batch) is None:
            raise Bypass(Reason.ABOVE_LARGEST_SIZE)
        return entry

    def _leaves_lane(self, call: BoundCall, entry: Entry, bucket: Bucket) -> bool:
        """Drops an entry whose lane another thread goes on using, so that it is captured elsewhere.

        Raises:
            Bypass: where that thread may let go of its output soon.
        """
        if not bucket.lane.native.is_held_elsewhere():
            return False
        entry.blocked += 1
        if entry.blocked <= MAX_BLOCKED or self._moves == MAX_MOVES:
            raise Bypass(Reason.HELD_BY_ANOTHER_THREAD)
        self._moves += 1
        self.store.drop(entry)
        return True

    def _replay(self, call: BoundCall, bucket: Bucket, *, repeat: bool = True) -> Any:
        with self.store.pool_for(call).lock:
            return bucket.replay(call, self.native.calls, repeat=repeat)

    def _compare(self, forward: Forward, call: BoundCall, entry: Entry, bucket: Bucket) -> Any:
        """Returns the eager result, and compares padded replays with it."""
        try:
            trace = trace_forward(forward, call, restore=False)
        except torch.OutOfMemoryError:  # which a replay needs none of
            if not entry.is_pure or not bucket.native.is_proved(call.batch):
                raise
            bucket.native.check_budget = entry.padding.interval
            return self._replay(call, bucket)
        self.store.counts.eager[EagerReason(Reason.COMPARED)] += 1
        pad, compared = self.store.options.pad, [(call, trace)]
        if pad is not None and entry.is_pure and (small := scaled_down(call)) is not None:
            with suppress(Exception):  # it may take no such values
                compared.insert(0, (small, trace_forward(forward, small, restore=True)))
        with self.store.pool_for(call).lock:
            why = why_unlike_captured(trace, bucket, call.batch) or find_batch_dims(
                [bucket], call.batch, trace.layout, trace.tensors
            )
            for each, of in compared:
                if why is None or why is ROWS_ALIKE:
                    why = entry.padding.why_unlike(of, each, bucket, pad, self.native.calls)
            if trace.changes:
                self.store.note_by_batch(why)
            if why is not None:
                entry.no_padding_reason = why
                self.store.hand_over(call, None, entry)
        if (mixed := entry.padding.mixed) is not None:  # without the lock: it runs the forward
            entry.padding.mixed = None
            with suppress(Exception):  # it only explains, and the caller has a result
                if (name := mixing_operator(forward, mixed, call.batch)) is not None:
                    why = entry.no_padding_reason = f"{why}, first in {name}"
        if why is not None and why is not ROWS_ALIKE:
            self.store.warn(
                "rows",
                "is captured at exactly the batch sizes that it is called with: padding batch "
                f"{call.batch} to {bucket.size} changes its result ({why})",
                "Nothing, if each batch comes often.",
                "Or keep rows independent of each other, such as by a norm over features.",
            )
        return trace.result

    def _timed_eager(self, forward: Forward, call: BoundCall, bucket: Bucket) -> Any:
        """Serves a call eagerly, beside whose time that of the next replay is put."""
        bucket.timing.eager = bucket.lane.stopwatch()
        try:
            with bucket.timing.eager, inlining():
                result = forward.run(call)
        except torch.OutOfMemoryError:  # which a replay needs none of
            if bucket.has_effects:  # perhaps some of them have happened
                raise
            return self._replay(call, bucket)
        self.store.counts.eager[EagerReason(Reason.TIMED)] += 1
        return result

    def _timed_replay(self, call: BoundCall, bucket: Bucket) -> Any:
        """Serves a call by its graph, which is timed once."""
        timing, native = bucket.timing, bucket.native
        if timing.replay is None:
            timing.replay = bucket.lane.stopwatch()
            native.time_at = native.replays + SETTLED
            with timing.replay:
                return self._replay(call, bucket)
        native.time_at = sys.maxsize if timing.is_done() else native.replays + SETTLED
        gain, wanted = timing.times().gain, self.store.options.min_gain
        if gain is not None and wanted is not None and gain < wanted:
            bucket.retire()
            raise Bypass(Reason.TOO_SLOW)
        return self._replay(call, bucket)

    def warm_up(
        self,
        function: Callable[..., Any],
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Captures for such calls without making one: what the forward mutates is put back."""
        try:
            check_surroundings(instance)
            call = self.store.read(args, kwargs, instance)
            if call.objects:
                raise Bypass(
                    Reason.WARMUP_CHANGES_OBJECT,
                    text=f"it may change {call.objects[0].name}; call the forward itself instead",
                )
            self.store.check_known(call)
            self.store.entries.is_due(call.bare_key)  # it is asked for
            check_no_profiler()
            forward = Forward(function, instance)
            with self.store.pool_for(call).lock:
                entry = self._entry(forward, call)
            if entry is None or entry.bucket(call.batch) is None:
                first_call(self.store, forward, call, exactly=False, restore=True)
        except Bypass as reason:
            if not config.is_disabled():
                self.store.warn(
                    f"warmup {reason}", f"has no graphs yet, as warmup() captured nothing: {reason}"
                )

    def repeats_harmlessly(self) -> bool:
        """Return True if a graph served the latest call; see `Entry.mutates_only_passed`."""
        latest = self.native.calls
        for entry in self.store.graphed():
            if entry.native is not None and entry.native.last == latest:
                return entry.mutates_only_passed
        return False

    # Reports

    def info(self) -> CacheInfo:
        """Returns the counts; see `CacheInfo`."""
        stores = [cache.store for cache in (self, *self.beside)]
        counts, calls, batches = Counts(), 0, Counter[int]()
        for store in stores:
            counts.merge(store.counts)
            calls += store.native.calls
            batches.update(store.native.batches)
        graphed = self._graphed()
        for entry in graphed:
            for bucket in entry.buckets.values():
                counts.add(bucket.native)
        return counts.info(
            calls,
            [graphs for store in stores for graphs in store.graphs()],
            [entry.no_padding_reason for entry in graphed if entry.no_padding_reason is not None],
            sorted({note for entry in graphed for note in entry.padding.notes}),
            next((store.pool for store in stores if store.pool is not None), None),
            batches,
        )

    def suggest_sizes(self, count: int) -> Suggestion:
        """Returns the sizes that would have served the calls so far best."""
        reasons = [entry.no_padding_reason for entry in self._graphed()]
        return suggestion(self.info(), reasons, self.name, count)

    def _graphed(self) -> list[Entry]:
        return [entry for cache in (self, *self.beside) for entry in cache.store.graphed()]

    def replays(self) -> int:
        """Returns the number of replays by the graphs that there are now."""
        return sum(
            bucket.native.replays for entry in self._graphed() for bucket in entry.buckets.values()
        )

    def merge(self, other: "GraphCache") -> None:
        """Drops the graphs of a cache beside this one, and takes over its counts."""
        self.beside.remove(other)
        store = other.store
        for entry in list(store.entries):
            store.drop(entry)
        self.store.counts.merge(store.counts)
        self.native.calls += store.native.calls
        self.native.batches = Counter(self.native.batches) + Counter(store.native.batches)

    def clear(self) -> None:
        """Drops the graphs and the counts.

        Outputs that are held stay as they are, until another graph of their pool runs.
        """
        for cache in self.beside:
            cache.clear()
        pool = self.store.pool
        # No graph may go while another thread launches it.
        with pool.lock if pool is not None else nullcontext():
            self.store.clear()
        if pool is not None:
            pool.trim()
