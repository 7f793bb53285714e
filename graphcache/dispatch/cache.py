"""Serves the calls that native code hands over: by a graph, or eagerly with the reason."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from graphcache import config
from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import inlining
from graphcache.call.pytree import NotATree, flatten
from graphcache.capture.bucket import SETTLED, Bucket
from graphcache.capture.outputs import find_batch_dims
from graphcache.capture.verify import ROWS_ALIKE
from graphcache.config import Options
from graphcache.dispatch.bypass import check_bucket, check_call, check_surroundings
from graphcache.dispatch.entry import Entry
from graphcache.dispatch.first_call import first_call
from graphcache.dispatch.store import Store
from graphcache.guards.static_objects import with_slots
from graphcache.report.cache_info import CacheInfo, Counts
from graphcache.report.reasons import Bypass, EagerReason, Reason
from graphcache.report.suggest_sizes import Suggestion, suggestion
from graphcache.tracing.trace import Forward


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
            with pool.lock:
                call = with_slots(call, pool)
                return self._serve(Forward(function, instance), call)
        except Bypass as bypass:
            return self._eager(bypass.why, function, args, kwargs)

    def _eager(
        self,
        why: EagerReason,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.store.counts.eager[why] += 1
        return function(*args, **kwargs)

    def _serve(self, forward: Forward, call: BoundCall) -> Any:
        """Serves one call by a graph, or by the first call that makes one.

        Raises:
            Bypass: where the call has to run eagerly.
        """
        entry = self._entry(forward, call)
        if entry is None or (bucket := entry.bucket(call.batch)) is None:
            return first_call(self.store, forward, call, exactly=False, restore=False)
        check_bucket(entry, bucket, call)
        if call.batch != bucket.size and bucket.native.check_budget <= 0:
            if entry.padding.is_ambiguous(call) and not self.store.signature.names_batch(call):
                return first_call(self.store, forward, call, exactly=True, restore=False)
            return self._compare(forward, call, entry, bucket)
        if bucket.native.replays >= bucket.native.time_at:
            return self._time(forward, call, entry, bucket)
        return bucket.replay(call, self.native.calls)

    def _entry(self, forward: Forward, call: BoundCall) -> Entry | None:
        """Returns the entry that serves `call`; None if there is none, or no more.

        Raises:
            Bypass: where the call has to run eagerly.
        """
        check_call(call)
        entry = self.store.entries.get(call.key)
        if entry is not None:
            entry.last = self.native.calls
            if self.store.expire_changed(call, entry, grad=torch.is_grad_enabled()):
                entry = None
        if entry is None:
            self.store.check_worth_a_capture(call, forward.instance)
        elif entry.complete and entry.no_padding_reason is None and entry.bucket(call.batch) is None:
            raise Bypass(Reason.ABOVE_LARGEST_SIZE)
        return entry

    def _compare(self, forward: Forward, call: BoundCall, entry: Entry, bucket: Bucket) -> Any:
        """Returns the eager result, and compares padded replays with it."""
        number = self.native.calls
        try:
            with inlining():
                eager = forward.run(call)
        except torch.OutOfMemoryError:  # which a replay needs none of
            if not entry.is_pure or not bucket.native.padded_rows:
                raise
            bucket.native.check_budget = entry.padding.interval
            return bucket.replay(call, number)
        self.store.counts.eager[EagerReason(Reason.COMPARED)] += 1
        tensors: list[Tensor] = []
        try:
            layout = flatten(eager, tensors, [], other=call.object_ref)
            why = find_batch_dims([bucket], call.batch, layout, tensors)
        except NotATree as error:
            why = str(error)
        if why is None and entry.is_pure:
            why = entry.padding.why_unlike(tensors, call, bucket, self.store.options.pad, number)
        if why is not None:
            entry.no_padding_reason = why
            self.store.hand_over(call, None, entry)
        if why is not None and why is not ROWS_ALIKE:
            self.store.warn(
                "rows",
                "is captured at exactly the batch sizes that it is called with: padding batch "
                f"{call.batch} to {bucket.size} changes its result ({why})",
                "Nothing, if each batch comes often.",
                "Or keep rows independent of each other, such as by a norm over features.",
            )
        return eager

    def _time(self, forward: Forward, call: BoundCall, entry: Entry, bucket: Bucket) -> Any:
        """Serves a call of a graph that is timed: one runs eagerly, and the next by the graph."""
        timing, native = bucket.timing, bucket.native
        if entry.is_pure and timing.eager is None:
            timing.eager = bucket.lane.stopwatch()
            try:
                with timing.eager, inlining():
                    result = forward.run(call)
            except torch.OutOfMemoryError:  # which a replay needs none of
                return bucket.replay(call, self.native.calls)
            self.store.counts.eager[EagerReason(Reason.TIMED)] += 1
            return result
        if timing.replay is None:
            timing.replay = bucket.lane.stopwatch()
            native.time_at = native.replays + SETTLED
            with timing.replay:
                return bucket.replay(call, self.native.calls)
        native.time_at = sys.maxsize if timing.is_done() else native.replays + SETTLED
        gain, wanted = timing.times().gain, self.store.options.min_gain
        if gain is not None and wanted is not None and gain < wanted:
            bucket.retire()
            raise Bypass(Reason.TOO_SLOW)
        return bucket.replay(call, self.native.calls)

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
            with self.store.pool_for(call).lock:
                forward = Forward(function, instance)
                entry = self._entry(forward, call)
                if entry is None or entry.bucket(call.batch) is None:
                    first_call(self.store, forward, call, exactly=False, restore=True)
        except Bypass as reason:
            if not config.is_disabled():
                self.store.warn(
                    f"warmup {reason}", f"has no graphs yet, as warmup() captured nothing: {reason}"
                )

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
            [entry.buckets for entry in graphed],
            [entry.no_padding_reason for entry in graphed if entry.no_padding_reason is not None],
            next((store.pool for store in stores if store.pool is not None), None),
            batches,
        )

    def suggest_sizes(self, count: int) -> Suggestion:
        """Returns the sizes that would have served the calls so far best."""
        reasons = [entry.no_padding_reason for entry in self._graphed()]
        return suggestion(self.info(), reasons, self.name, count)

    def _graphed(self) -> list[Entry]:
        return [entry for cache in (self, *self.beside) for entry in cache.store.graphed()]

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
