"""The graphs of one forward: which serves a call, and what happens where none can."""

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from graphcache import _C, config
from graphcache.buckets import Suggestion, default_sizes
from graphcache.capture import Bucket, Job, capture_or_warm_up, learn_batch_dims
from graphcache.entry import CHANGE_IN_PLACE, MANY_WAYS, MAX_SIGNATURES, Entries, Entry
from graphcache.errors import CaptureError, GraphCacheWarning, OptionError
from graphcache.guards import submodule_with_hooks
from graphcache.keepers import Habits
from graphcache.learn import GIVE_PAD, PAD_IS_MISSING, Observation, as_captured, observe
from graphcache.modes import modes_of, refuse_where_watched, wants_grad
from graphcache.observe import Observer
from graphcache.options import Options
from graphcache.pool import GraphPool, default_pool
from graphcache.runtime import inlining, is_stream_capturing
from graphcache.signature import Call, Signature, Unservable
from graphcache.stats import CacheInfo, Counts, suggestion
from graphcache.timing import SETTLED
from graphcache.tree import NotATree, flatten
from graphcache.verify import Sample

logger = logging.getLogger(__name__)

MAX_RECAPTURES = 8
MAX_UNSETTLED = 3  # first calls that may change attributes (lazy caches) before that is called a habit
MAX_EMPTY_HOMES = 4

TOO_SLOW = "its graph saves less than min_gain"
_NEEDS_GRAD = "gradients are needed (torch.no_grad() or inference_mode() is not on)"


class GraphCache:
    """The graphs of one forward, of one instance where it is a method.

    Args:
        function: the forward, bound; only its signature is kept.
        name: its qualified name, for messages.
        options: see `cuda_graphed`.
        instance: what it is bound to, or None; not kept.

    Attributes:
        native: what serves calls before this is asked.
        beside: those of the same forward over compiled code; they count as parts of this.
    """

    def __init__(self, function: Callable[..., Any], name: str, options: Options, instance: Any) -> None:
        self.name = name
        self.options = options
        self._signature = Signature(function, options.batch_dim, options.bind)
        self.native = _C.Dispatcher(
            config.disabled_var,
            config.emulated_var,
            DeviceContext,
            is_stream_capturing,
            hasattr(instance, "training"),
        )
        self._entries = Entries()
        self._written: dict[Any, frozenset[int]] = {}
        self._recaptures = 0
        self._replaced = ""
        self._unsettled = 0
        self._warned: set[str] = set()
        self._counts = Counts()
        self._pool: GraphPool | None = options.pool
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
        try:
            refuse_where_watched(instance)
            call = self._signature.read(args, kwargs, modes_of(instance), self._written)
            pool = self._pool_for(call)
            self.native.count(call.batch)
            if (why := self._signature.habits.known(call.kept)) is not None:
                raise Unservable(why)
            with pool.lock:
                call = call.at_home(pool.homes)
                entry = self._serving(call, instance)
                if entry is None or (bucket := entry.bucket(call.batch)) is None:
                    return self._first(function, instance, call)
                if bucket.native.retired:
                    raise Unservable(TOO_SLOW)
                if entry.written.overlaps(call.leaves):
                    raise Unservable("an argument lies in memory that the forward writes")
                if bucket.lane.native.is_held_elsewhere():
                    raise Unservable("another thread holds an output of its lane")
                if call.batch != bucket.size and bucket.native.trusted <= 0:
                    if entry.is_ambiguous(call):
                        return self._first(function, instance, call, exactly=True)
                    return self._compared(function, call, entry, bucket)
                if bucket.native.replays >= bucket.native.time_at:
                    return self._timed(function, call, entry, bucket)
                return bucket.replay(call, self.native.calls)
        except Unservable as reason:
            self._counts.eager[str(reason)] += 1
            return function(*args, **kwargs)

    def _pool_for(self, call: Call) -> GraphPool:
        device = call.leaves[0].device
        if any(tensor.device != device for tensor in call.leaves):
            raise Unservable("tensors on several devices")
        if device.type == "cpu" and not config.is_emulated():
            raise Unservable("CPU tensors (graphcache.emulate() emulates graphs there)")
        if device.type not in ("cuda", "cpu"):
            raise Unservable(f"tensors on {device.type}")
        pool = self.options.pool or self._pool
        if pool is None or (pool.device != device and self.options.pool is None):
            pool = default_pool(device)
        if pool.device != device:
            raise OptionError(
                f"graphcache: {self.name} was called with tensors on {device}, and its pool is on "
                f"{pool.device}; give it GraphPool({str(device)!r}), or no pool"
            )
        self._pool = pool
        return pool

    def _serving(self, call: Call, instance: Any) -> Entry | None:
        """Returns the entry that serves `call`; None if there is none, or no more.

        Raises:
            Unservable: where the call has to run eagerly.
        """
        if call.batch == 0:
            raise Unservable("an empty batch")
        grad = torch.is_grad_enabled()
        if grad and any(tensor.requires_grad for tensor in call.leaves):
            raise Unservable(_NEEDS_GRAD)
        entry = self._entries.get(call.key) or self._entries.get(call.bare_key)
        if entry is not None:
            entry.last = self.native.calls
            if entry.eager is not None:
                raise Unservable(entry.eager)
            if not entry.guards.hold(grad=grad):
                self._note_recapture(entry, grad=grad)
                self._drop(self._entries.pop(call.key))
                entry = None

        if entry is None:
            if grad and wants_grad(instance):
                raise Unservable(_NEEDS_GRAD)
            hooked = submodule_with_hooks(instance)
            if hooked is not None:
                raise Unservable(f"hooks inside the forward, on {hooked}")
            if self._recaptures > MAX_RECAPTURES:
                many = f"after {self._recaptures} captures in a row"
                self._warn(
                    "recaptures", f"{self._replaced} was replaced or changed {many}; {CHANGE_IN_PLACE}"
                )
                raise Unservable("what it captured is replaced again and again")
            # An object that a call changes is another kind of call each time.
            if not self._entries.is_due(call.bare_key) and not call.kept:
                if self._entries.once > MAX_SIGNATURES:
                    self._warn("signatures", MANY_WAYS)
                raise Unservable("the first call of another signature")
            if len(self._entries) >= MAX_SIGNATURES:
                surplus = self._entries.surplus()
                if surplus is None:
                    self._warn("signatures", MANY_WAYS)
                    raise Unservable(f"more than {MAX_SIGNATURES} signatures")
                self._drop(self._entries.pop(surplus))
                self._counts.dropped += 1
        elif entry.complete and entry.exact is None and entry.bucket(call.batch) is None:
            raise Unservable("a batch above the largest size")
        return entry

    def _note_recapture(self, entry: Entry, *, grad: bool) -> None:
        if entry.paid():
            self._recaptures = 0
        self._recaptures += 1
        self._replaced = entry.guards.broken(grad=grad)
        logger.info("%s is captured anew: %s changed", self.name, self._replaced)

    def _publish(self, call: Call, instance: Any, entry: Entry) -> None:
        """Lets native code serve calls like this one with the graphs that there are now."""
        if entry.native is None:
            lock = self._pool_for(call).lock
            entry.native = _C.Entry(lock, entry.guards.native, entry.written)
            parameters, leaves = self._signature.native(call)
            training = getattr(instance, "training", None)
            self.native.add(parameters, leaves, training, entry.native)
        entry.native.set([bucket.native for bucket in entry.buckets.values()], entry.exact is not None)

    def _drop(self, entry: Entry) -> None:
        """Keeps the counts of graphs that go."""
        self._withdraw(entry)
        for bucket in entry.buckets.values():
            self._retire(bucket)

    def _withdraw(self, entry: Entry) -> None:
        if entry.native is not None:
            self.native.forget(entry.native)
            entry.native = None

    def _retire(self, bucket: Bucket) -> None:
        self._counts.add(bucket.native)

    # The first call of a signature

    def _first(
        self, function: Callable[..., Any], instance: Any, call: Call, *, exactly: bool = False
    ) -> Any:
        """Runs the forward eagerly, once, and captures it afterwards; perhaps just for this batch."""
        seen = observe(function, instance, call, restore=False)
        self._counts.eager["the first call of a signature"] += 1
        self._learn(function, instance, call, seen, exactly=exactly)
        return seen.result

    def warm_up(
        self,
        function: Callable[..., Any],
        instance: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Captures for such calls without making one: what the forward writes is put back."""
        try:
            refuse_where_watched(instance)
            call = self._signature.read(args, kwargs, modes_of(instance), self._written)
            if call.kept:
                raise Unservable(f"it may change {call.kept[0].name}; call the forward itself instead")
            self._entries.is_due(call.bare_key)  # it is asked for
            with self._pool_for(call).lock:
                entry = self._serving(call, instance)
                if entry is not None and entry.bucket(call.batch) is not None:
                    return
                self._learn(function, instance, call, observe(function, instance, call, restore=True))
        except Unservable as reason:
            if not config.is_disabled():
                self._warn(f"warmup {reason}", f"warmup() captured nothing: {reason}")

    def _learn(
        self,
        function: Callable[..., Any],
        instance: Any,
        call: Call,
        seen: Observation,
        *,
        exactly: bool = False,
    ) -> None:
        """Decides from an observed eager call how its signature is served, and captures it."""
        try:
            self._leave_changed(call)
            seen.layout()
            made = seen.made(call)  # what the caller gets, whatever is observed again
            seen = as_captured(function, instance, call, seen)
            observer, layout = seen.observer, seen.layout()
            seen.check()
            if any(tensor.grad_fn is not None for tensor in seen.tensors):
                return  # something that is no parameter wants gradients
            if seen.changed:
                self._leave_unsettled(seen.changed)
            guards = seen.guards(instance)
            for passed, home in zip(call.kept, call.homes, strict=True):
                home.lend(passed, observer.device)
            call = self._bind_written(call, observer)
            entry = self._entries.get(call.key) or Entry()
            self._withdraw(entry)
            entry.guards = guards
            entry.pure = not observer.written
            entry.written = seen.written(call)
            entry.exact = entry.exact or self._why_exact(call, seen)
            job = Job(
                self.name,
                function,
                call,
                observer.external,
                {id(tensor): tensor for tensor in observer.reached()},
                observer.written_outside(),
                observer.draws,
                observer.fills,
                seen.compiled,
                self._pool_for(call),
                self.options.pad,
                self.options.stale,
                self.options.progress,
            )
            entry.sample = entry.sample or Sample(call)
            entry.batches.add(call.batch)
            entry.homes, entry.last = call.homes, self.native.calls
            self._capture(job, entry, layout, seen.tensors, exactly=exactly)
            self._leave_changed(call)  # a capture runs the forward's Python
            if not guards.hold(grad=False):
                self._leave_unsettled([guards.broken(grad=False)])
        except Unservable:
            return  # with its written arguments bound, or unsettled, or hooked
        except Exception as error:  # whatever it is, the caller has a result, and gets it
            self._give_up(call, error)
            return
        self._entries[call.key] = entry
        self._publish(call, instance, entry)
        self._drop_empty_homes()
        for bucket in entry.buckets.values():
            bucket.lane.reserve_for(made)

    def _leave_changed(self, call: Call) -> None:
        """Leaves a call that changed an object it was passed."""
        self._signature.habits.note(call.kept)
        if (why := self._signature.habits.known(call.kept)) is not None:
            raise Unservable(why)

    def _leave_unsettled(self, changed: list[str]) -> None:
        """Leaves a forward that changes Python values for its next call: perhaps it does so once."""
        self._unsettled += 1
        if self._unsettled < MAX_UNSETTLED:
            raise Unservable("it changed attributes")
        names = ", ".join(changed[:3])
        raise CaptureError(f"it changes attributes, which no graph replays: {names}")

    def _drop_empty_homes(self) -> None:
        """Drops graphs over memory of objects that are gone, but for the last few: it may be large."""
        for key in self._entries.homeless()[:-MAX_EMPTY_HOMES]:
            self._drop(self._entries.pop(key))

    def _bind_written(self, call: Call, observer: Observer) -> Call:
        """Returns the call read again, with the arguments that the forward wrote to bound."""
        written = frozenset(observer.written_of(call.leaves))
        known = self._written.get(call.layout, frozenset())
        if written <= known:
            return call
        self._written[call.layout] = written | known
        again = self._signature.read(call.args, call.kwargs, call.key[1], self._written)
        return again.at_home(self._pool_for(call).homes)

    def _why_exact(self, call: Call, seen: Observation) -> str | None:
        why = seen.why_exact(call, self.options.pad)
        if why is PAD_IS_MISSING:
            self._warn("pad", GIVE_PAD)
        return why

    def _capture(
        self, job: Job, entry: Entry, layout: Any, tensors: list[Tensor], *, exactly: bool
    ) -> None:
        """Captures what `entry` lacks for this call, and finds out whether it can be padded."""
        start, batch = perf_counter(), job.call.batch
        buckets: list[Bucket] = []
        if entry.exact is None:
            wanted = (batch,) if exactly else self.options.sizes or default_sizes(batch)
            sizes = [size for size in wanted if size not in entry.buckets]
            try:
                buckets = capture_or_warm_up(job, sizes)
                entry.exact = learn_batch_dims(buckets, batch, layout, tensors)
            except CaptureError as error:
                if sizes == [batch]:
                    raise
                entry.exact = f"it can't be captured at other sizes ({error})"
            entry.complete = self.options.sizes is not None or len(buckets) < len(sizes)
        if entry.exact is not None:
            logger.info("%s is captured at exact sizes: %s", self.name, entry.exact)
            kept = {size: b for size, b in entry.buckets.items() if b.exact_only}
            for size in entry.buckets.keys() - kept.keys():
                self._retire(entry.buckets[size])
            entry.buckets = kept
            buckets = capture_or_warm_up(job, [batch])
            if not buckets:
                raise CaptureError(f"batch {batch} does not fit into memory")
            if buckets[0].result.layout != layout:
                raise CaptureError("its result holds a Python value that changes from call to call")
            buckets[0].exact_only = True
        for bucket in buckets:
            # State would be advanced twice by a comparison; there, pad has said what is safe.
            if not entry.pure and bucket.result.knows_batch_dims():
                bucket.native.trusted = sys.maxsize
        entry.add(buckets)
        seconds = perf_counter() - start
        self._counts.captures += len(buckets)
        self._counts.capture_seconds += seconds
        captured = [bucket.size for bucket in buckets]
        logger.info("captured %s at sizes %s in %.2f s", self.name, captured, seconds)

    def _compared(self, function: Callable[..., Any], call: Call, entry: Entry, bucket: Bucket) -> Any:
        """Returns the eager result, and compares padded replays with it."""
        try:
            with inlining():
                eager = function(*call.args, **call.kwargs)
        except torch.OutOfMemoryError:  # which a replay needs none of
            if not entry.pure or not bucket.native.padded_rows:
                raise
            bucket.native.trusted = entry.trust
            return bucket.replay(call, self.native.calls)
        self._counts.eager["compared with a padded replay"] += 1
        tensors: list[Tensor] = []
        try:
            layout = flatten(eager, tensors, [], other=call.place)
            why = learn_batch_dims([bucket], call.batch, layout, tensors)
        except NotATree as error:
            why = str(error)
        if why is None and entry.pure:
            why = entry.why_unlike(tensors, call, bucket, self.options.pad, self.native.calls)
        if why is None:
            if entry.exact is not None:
                self._publish(call, None, entry)
            return eager
        self._warn(
            "rows",
            f"padding batch {call.batch} to {bucket.size} changes its result ({why}), so it is "
            "captured at exactly the batch sizes that it is called with",
        )
        entry.exact = why
        self._publish(call, None, entry)
        return eager

    def _timed(self, function: Callable[..., Any], call: Call, entry: Entry, bucket: Bucket) -> Any:
        """Serves a call of a graph that is timed: one runs eagerly, and the next by the graph."""
        timing, native = bucket.timing, bucket.native
        if entry.pure and timing.eager is None:
            timing.eager = bucket.lane.stopwatch()
            try:
                with timing.eager, inlining():
                    result = function(*call.args, **call.kwargs)
            except torch.OutOfMemoryError:  # which a replay needs none of
                return bucket.replay(call, self.native.calls)
            self._counts.eager["timed beside its graph"] += 1
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
            raise Unservable(TOO_SLOW)
        return bucket.replay(call, self.native.calls)

    def _give_up(self, call: Call, error: Exception) -> None:
        """Runs this signature eagerly from here on, with one warning; or raises."""
        expected = isinstance(error, (CaptureError, NotATree))
        why = str(error) if expected else f"{type(error).__name__}: {error}"
        logger.debug("%s can't be captured", self.name, exc_info=error)
        if not self.options.fallback:
            raise CaptureError(f"graphcache: {self.name} can't be captured: {why}") from error
        if call.key in self._entries:
            self._drop(self._entries.pop(call.key))
        self._entries[call.bare_key] = Entry(eager=why)
        self._warn(
            why,
            f"it can't be captured, so it runs eagerly: {why}. Move that out of the forward, decorate "
            "a smaller part, or silence this with graphcache.disabled()",
        )

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"graphcache: {self.name}: {text}", GraphCacheWarning, stacklevel=2)

    # What users ask

    def info(self) -> CacheInfo:
        """Returns the counts; see `CacheInfo`."""
        counts, calls, batches = Counts(), 0, Counter[int]()
        graphed = self._graphed()
        for cache in (self, *self.beside):
            counts.merge(cache._counts)
            calls += cache.native.calls
            batches.update(cache.native.batches)
        for entry in graphed:
            for bucket in entry.buckets.values():
                counts.add(bucket.native)
        return counts.info(
            calls,
            [entry.buckets for entry in graphed],
            [entry.exact for entry in graphed if entry.exact is not None],
            next((cache._pool for cache in (self, *self.beside) if cache._pool is not None), None),
            batches,
        )

    def suggest_sizes(self, count: int) -> Suggestion:
        """Returns the sizes that would have served the calls so far best."""
        return suggestion(self.info(), [entry.exact for entry in self._graphed()], self.name, count)

    def _graphed(self) -> list[Entry]:
        entries = chain(*(cache._entries.values() for cache in (self, *self.beside)))
        return [entry for entry in entries if entry.buckets]

    def clear(self) -> None:
        """Drops the graphs and the counts.

        Outputs that are held stay as they are, until another graph of their pool runs.
        """
        for cache in self.beside:
            cache.clear()
        # No graph may go while another thread launches it.
        with self._pool.lock if self._pool is not None else nullcontext():
            while self._entries:
                self._drop(self._entries.popitem()[1])
            self._entries = Entries()
        if self._pool is not None:
            self._pool.trim()
        self._written.clear()
        self._warned.clear()
        self._signature.habits = Habits()
        self._recaptures = self._unsettled = 0
        self.native.calls, self.native.batches = 0, {}
        self._counts = Counts()
