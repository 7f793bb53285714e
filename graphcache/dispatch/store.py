"""The store of one forward: its graphs by signature, what native code knows of them, and the counts."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from graphcache import _C, config
from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import is_stream_capturing, modes_of
from graphcache.call.object_args import MutationHistory
from graphcache.call.pytree import NotATree
from graphcache.call.signature import Signature
from graphcache.capture.bucket import Bucket
from graphcache.capture.default_sizes import default_sizes
from graphcache.capture.ladder import Captured
from graphcache.capture.plan import CHANGES, PAD_IS_MISSING, CapturePlan, why_not_padded
from graphcache.config import Options
from graphcache.dispatch.bypass import check_device
from graphcache.dispatch.entry import MAX_SIGHTED, Entries, Entry
from graphcache.errors import CaptureError, OptionError
from graphcache.guards.reachability import key_of
from graphcache.guards.static_objects import add_counters, read_object, with_slots
from graphcache.pool import GraphPool, default_pool
from graphcache.report.cache_info import Counts
from graphcache.report.reasons import Bypass, EagerReason, Reason
from graphcache.runtime.source_lines import warn
from graphcache.tracing.effects import Effects
from graphcache.tracing.trace import Trace

logger = logging.getLogger(__name__)

# A forward that needs more is not one that graphs can speed up: each costs a capture.
MAX_SIGNATURES = 32
MAX_RECAPTURES = 8
MAX_UNSETTLED = 3  # first calls of one batch that may change values before that is called a habit
MAX_EMPTY_SLOTS = 4
RETRACED_AFTER = 8  # eager calls of a signature because of hooks, and each time the number has doubled
MANY_WAYS = (
    f"is called in more than {MAX_SIGNATURES} ways (shapes, dtypes, constants), each seldom; such calls "
    "run eagerly",
    "Pad the other dimensions, and pass numbers as tensors.",
    "Keep large arguments, and those that are written to, at one address.",
)


class Store:
    """The graphs of one forward, of one instance where it is a method.

    Args:
        function: the forward, bound; only its signature is kept.
        name: its qualified name, for messages.
        options: see `cuda_graphed`.
        instance: the instance that the forward is bound to, or None; not kept.

    Attributes:
        signature: reads the calls of the forward.
        native: serves calls before Python is asked.
        entries: the graphs of each signature, for each set of values that they were captured with.
        mutated: by the form of a call, the positions of the tensors that the forward mutates.
        counts: the counts of no graph's own, and of graphs that are gone.
        pool: the pool that the last call was captured into.
        is_quiet: nothing is warned about.
    """

    def __init__(self, function: Callable[..., Any], name: str, options: Options, instance: Any) -> None:
        self.name = name
        self.options = options
        self.signature = Signature(function, options.batch_dim, options.bind, read_object)
        self.native = _C.Dispatcher(
            config.disabled_var,
            config.emulated_var,
            DeviceContext,
            is_stream_capturing,
            hasattr(instance, "training"),
        )
        self.pool: GraphPool | None = options.pool
        self.entries = Entries()
        self.is_quiet = False
        self._forget()

    def _forget(self) -> None:
        """Starts the counts and the history anew."""
        self.counts = Counts()
        self.mutated: dict[Any, frozenset[int]] = {}
        self.signature.mutation_history = MutationHistory()
        self._recaptures = Counter[Any]()
        self._changed_itself = False
        self._unsettled = Counter[Any]()
        self._exact_values: dict[Any, set[Any]] = {}
        self._eager_calls = Counter[Any]()
        self._by_batch: str | None = None
        self._replaced = ""
        self._warned: set[str] = set()
        self.native.calls, self.native.batches = 0, {}

    # Calls

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], instance: Any) -> BoundCall:
        """Reads one call.

        Raises:
            Bypass: where no graph can serve such a call.
        """
        return self.signature.read(args, kwargs, modes_of(instance), self.mutated)

    def pool_for(self, call: BoundCall) -> GraphPool:
        """Returns the pool that a call's graphs belong to.

        Raises:
            Bypass: where there are no graphs on its device.
            OptionError: where the pool that was given is on another device.
        """
        check_device(call)
        device = call.tensors[0].device
        pool = self.options.pool or self.pool
        if pool is None or (pool.device != device and self.options.pool is None):
            pool = default_pool(device)
        if pool.device != device:
            raise OptionError(
                f"graphcache: {self.name} was called with tensors on {device}, and its pool is on "
                f"{pool.device}; give it GraphPool({str(device)!r}), or no pool"
            )
        self.pool = pool
        return pool

    def rebound(self, call: BoundCall, instance: Any, trace: Trace) -> BoundCall:
        """Returns the call with the arguments bound that the forward mutates, under the modes of now.

        Its key tells apart what the code that ran can see.

        Switches of torch may have moved: the first attention of a process sets the order of its kernels.
        """
        mutated = frozenset(trace.mutated_positions(call))
        known = self.mutated.get(call.form, frozenset())
        sees_more = self.signature.notice(trace.read_set.users_names)
        if mutated <= known and modes_of(instance) == call.key[1] and not sees_more:
            return call
        self.mutated[call.form] = mutated | known
        return with_slots(self.read(call.args, call.kwargs, instance), self.pool_for(call))

    def with_counters(self, call: BoundCall, trace: Trace) -> BoundCall:
        """Returns the call with the ints that the forward counts in no part of its key."""
        places = {key_of(source) for source, _ in trace.effects.sources()}
        added = [add_counters(passed, places) for passed in call.objects]
        if not any(added):
            return call
        return with_slots(
            self.signature.read(call.args, call.kwargs, call.key[1], self.mutated), self.pool_for(call)
        )

    def check_known(self, call: BoundCall) -> None:
        """Raises `Bypass` for a kind of calls that was found to run eagerly."""
        if (why := self.signature.mutation_history.known(call.objects)) is not None:
            raise Bypass(Reason.OBJECT_FILLED, text=why)
        entries = self.entries.of(call.bare_key)
        if not any(entry.buckets for entry in entries):
            self._check_not_eager(call, entries)

    def _check_not_eager(self, call: BoundCall, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.eager is None:
                continue
            if self._may_be_served(call, entry):
                self.drop(entry)
                continue
            entry.last = self.native.calls
            raise Bypass(entry.eager.reason, text=entry.eager)

    def _may_be_served(self, call: BoundCall, entry: Entry) -> bool:
        """Return True where hooks that made calls eager are gone, or may have come to rest.

        A hook may look only while somebody asks it to. So such calls are traced again, more and more
        seldom.
        """
        if not all(hook.is_registered() for hook in entry.hooks):
            return True
        if len(self._eager_calls) > MAX_SIGHTED:
            self._eager_calls.clear()
        self._eager_calls[call.bare_key] += bool(entry.hooks)
        count = self._eager_calls[call.bare_key]
        return count >= RETRACED_AFTER and count.bit_count() == 1

    def find(self, call: BoundCall) -> Entry | None:
        """Returns the entry whose values are those of now, or None.

        First comes one with a graph for the call; then one that may get another size.
        """
        grad = torch.is_grad_enabled()
        found = [entry for entry in self.entries.of(call.key) if entry.serves(call.batch, grad=grad)]
        return next((entry for entry in found if entry.bucket(call.batch)), next(iter(found), None))

    def check_worth_a_capture(self, call: BoundCall) -> None:
        """Raises `Bypass` for a call that is not captured yet; makes room for one that is."""
        self._check_not_eager(call, self.entries.of(call.bare_key))
        recaptures = self._note_changes(call)
        if nn_module._has_any_global_hook():
            raise Bypass(Reason.HOOKS, "a global one, of every module")
        if recaptures > MAX_RECAPTURES:
            self.warn(
                "recaptures",
                f"runs eagerly now: {self._replaced} was replaced or changed after {recaptures} "
                "captures in a row",
                "Pass what changes as an argument.",
                "Change tensors in place (copy_).",
            )
            raise Bypass(Reason.RECAPTURED_TOO_OFTEN)
        # An object that a call changes is another kind of call each time.
        if not self.entries.is_due(call.bare_key) and not call.objects:
            if self.entries.once > MAX_SIGNATURES:
                self.warn("signatures", *MANY_WAYS)
            raise Bypass(Reason.SEEN_ONCE)
        self.drop_gone()
        if len(self.entries) >= MAX_SIGNATURES:
            victim = self.entries.lru_victim()
            if victim is None:
                self.warn("signatures", *MANY_WAYS)
                raise Bypass(Reason.TOO_MANY_SIGNATURES, text=f"more than {MAX_SIGNATURES} signatures")
            self.drop(victim)
            self.counts.dropped += 1

    def _note_changes(self, call: BoundCall) -> int:
        """Drops graphs of a signature whose values will not come back.

        Returns:
            The number of captures in a row that were not worth it, as what they captured had changed.
        """
        key, entries = call.bare_key, [each for each in self.entries.of(call.key) if each.buckets]
        if not entries:
            return self._recaptures[key]
        newest, by_itself = entries[-1], self._changed_itself
        self._changed_itself = False
        if not newest.is_replaced:
            newest.is_replaced = True
            if len(self._recaptures) > MAX_SIGHTED:
                self._recaptures.clear()
            if not by_itself:  # as a table does that gets an entry for another batch
                self._recaptures[key] = 1 if newest.amortized() else self._recaptures[key] + 1
            grad = torch.is_grad_enabled()
            for bucket in newest.changed(newest.buckets.values(), grad=grad)[:1]:
                self._replaced = bucket.dependencies.guards.explain(grad=grad)
            logger.info("%s will be recaptured: %s changed", self.name, self._replaced)
        given_up = self._recaptures[key] > MAX_RECAPTURES
        for entry in entries:
            buckets = entry.buckets.values()
            never_used = given_up and not any(bucket.native.replays for bucket in buckets)
            returns = any(bucket.has_effects for bucket in buckets)  # as a count does that starts anew
            self._drop_changed(entry, only_gone=not (never_used or (by_itself and not returns)))
        return self._recaptures[key]

    def drop_gone(self) -> None:
        """Drops graphs over memory that was freed; the lock of the pool is held."""
        for entry in list(self.entries):
            self._drop_changed(entry, only_gone=True)

    def _drop_changed(self, entry: Entry, *, only_gone: bool) -> None:
        """Drops graphs of an entry whose values have changed; or only those whose values are gone."""
        changed = entry.changed(entry.buckets.values(), grad=False)
        gone = [bucket for bucket in changed if not only_gone or bucket.is_gone()]
        for bucket in gone:
            self.counts.add(entry.buckets.pop(bucket.size).native)
        if gone and not entry.buckets:
            self.drop(entry)
        elif gone and entry.native is not None:
            self._set_buckets(entry, entry.native)

    def check_objects_unchanged(self, call: BoundCall) -> None:
        """Records which objects a call changed.

        Raises:
            Bypass: where it changed one; that need not be a habit.
            CaptureError: where it is one.
        """
        self.signature.mutation_history.note(call.objects)
        if (why := self.signature.mutation_history.known(call.objects)) is not None:
            raise Bypass(Reason.OBJECT_FILLED, text=why)

    def check_arguments_unchanged(self, call: BoundCall) -> None:
        """Raises where a call changed what it was passed, other than by values in tensors.

        Raises:
            Bypass: for an object whose change need not be a habit.
            CaptureError: for any other argument.
        """
        self.check_objects_unchanged(call)
        error = "it changes an argument, which no graph replays: {}"
        try:
            now = self.signature.read(call.args, call.kwargs, call.key[1], self.mutated)
        except Bypass as reason:
            raise CaptureError(error.format(reason.detail), reason=Reason.CHANGES_ARGUMENT) from None
        layouts = zip(call.layout.keys, call.layout.children, now.layout.children, strict=True)
        label = self.signature.parameters.label
        changed = [label(name) for name, before, after in layouts if before != after]
        if not changed:
            pairs = zip(call.paths, call.tensors, now.tensors, strict=True)
            changed = [path for path, before, after in pairs if before is not after]
        if not changed and (now.key != call.bare_key or now.batch != call.batch):
            changed = ["the shape of a tensor"]
        if changed:
            raise CaptureError(error.format(", ".join(changed)), reason=Reason.CHANGES_ARGUMENT)

    def wait_until_settled(self, call: BoundCall, times: int = MAX_UNSETTLED) -> None:
        """Raises `Bypass` for a forward that changed Python values: perhaps it does so once.

        What fills a cache may well do what no graph can hold, such as a copy from the host. A table that
        gets an entry for each batch settles batch by batch.

        Args:
            call: the call that changed something.
            times: how many such calls of one signature and batch are a habit.
        """
        if len(self._unsettled) > MAX_SIGHTED:
            self._unsettled.clear()
        self._unsettled[call.bare_key, call.batch] += 1
        if self._unsettled[call.bare_key, call.batch] < times:
            self._changed_itself = True
            raise Bypass(Reason.UNSETTLED)

    def wait_until_back(self, call: BoundCall, effects: Effects) -> None:
        """Raises until ints that need a graph for each value are back at values that they had before.

        Raises:
            Bypass: where they may come back.
            CaptureError: where they had more values than there would be graphs.
        """
        if len(self._exact_values) > MAX_SIGHTED:
            self._exact_values.clear()
        seen = self._exact_values.setdefault((call.bare_key, call.batch), set())
        if effects.exact_values in seen:
            return
        seen.add(effects.exact_values)
        if len(seen) > MAX_RECAPTURES:
            raise CaptureError(CHANGES.format(effects.names), reason=Reason.CHANGES_VALUES)
        raise Bypass(Reason.UNSETTLED)

    # Graphs

    def sizes_to_capture(self, call: BoundCall, *, exactly: bool) -> tuple[int, ...]:
        """Returns the sizes that a call asks for and that are not captured yet.

        Raises:
            Bypass: where another thread captured them meanwhile.
        """
        entry = self.find(call) or Entry(call.key)
        if call.batch in entry.buckets or not (exactly or entry.bucket(call.batch) is None):
            raise Bypass(Reason.FIRST_CALL)
        sizes = self.options.sizes or default_sizes(call.batch)
        return (call.batch,) if exactly else tuple(each for each in sizes if each not in entry.buckets)

    def why_not_padded(self, call: BoundCall, trace: Trace) -> str | None:
        """Explains why no rows may be added to this signature; None where nothing speaks against it."""
        entry = self.find(call) or Entry(call.key)
        if trace.effect is not None:
            return f"it does what nothing puts back ({trace.effect})"
        return entry.no_padding_reason or self._by_batch or why_not_padded(trace, call, self.options.pad)

    def note_by_batch(self, why: str | None) -> None:
        """Records that the forward changes Python values by batch: it is padded no more."""
        self._by_batch = why

    def publish(self, plan: CapturePlan, captured: Captured, held: list[Tensor]) -> None:
        """Adds the graphs of a plan to its signature, and hands them to native code.

        Args:
            plan: the plan.
            captured: its graphs.
            held: tensors of the first result that a replay's will take the place of.
        """
        with plan.trace.effects.begun():
            entry = self.find(plan.call)
        if entry is None:
            entry = Entry(plan.call.key)
            self.entries.add(entry)
        self.withdraw(entry)
        if captured.no_padding_reason is not None:
            exact = {size: bucket for size, bucket in entry.buckets.items() if bucket.exact_only}
            for size in entry.buckets.keys() - exact.keys():
                self.counts.add(entry.buckets[size].native)
            entry.buckets = exact
        entry.slots = plan.call.slots
        entry.no_padding_reason = captured.no_padding_reason
        entry.complete = captured.complete
        entry.padding.add(plan)
        entry.last = self.native.calls
        entry.add(captured.buckets)
        self.counts.captures += len(captured.buckets)
        self.counts.capture_seconds += captured.seconds
        self.hand_over(plan.call, plan.forward.instance, entry)
        for entries in self.entries.with_empty_slots()[:-MAX_EMPTY_SLOTS]:  # their memory may be large
            for each in entries:
                self.drop(each)
        for bucket in entry.buckets.values():
            bucket.lane.reserve_for(held)
        if entry.no_padding_reason is PAD_IS_MISSING:  # at last, since warnings may be errors
            self.warn(
                "pad",
                "writes to state outside itself (a cache, a buffer), so it is captured at exactly the "
                "batch sizes that it is called with",
                "To have it padded, say what a padded row must hold to write nowhere that counts: "
                "pad={'argument': value}.",
            )

    def handle_error(self, call: BoundCall, instance: Any, error: Exception, trace: Trace) -> None:
        """Runs a signature eagerly from here on, with one warning; a `Bypass` only lets it wait.

        Without the hooks that ran, it may be another forward: it is eager as long as they stay.

        Raises:
            CaptureError: with `fallback=False`.
        """
        if isinstance(error, Bypass):
            return  # a later call of the signature is another first one
        expected = isinstance(error, (CaptureError, NotATree))
        why = str(error) if expected else f"{type(error).__name__}: {error}"
        reason = error.reason if isinstance(error, CaptureError) else Reason.CAPTURE_FAILED
        logger.debug("%s can't be captured", self.name, exc_info=error)
        if not self.options.fallback:
            text = f"graphcache: {self.name} can't be captured: {why}"
            raise CaptureError(text, reason=reason) from error
        found = None if trace.changes else self.find(call)  # else it is found by values of the next call
        for each in self.entries.of(call.key):
            if each is found or each.eager is not None:
                self.drop(each)
        entry = Entry(call.bare_key, eager=EagerReason(reason, why), hooks=trace.hooks)
        self.entries.add(entry)
        if not call.objects and not trace.hooks:  # whose slot is not known, or who may go
            self.hand_over(call, instance, entry)
        self.warn_of_failures()

    def warn_of_failures(self) -> None:
        """Warns of each signature that can't be captured, once."""
        for why in [entry.eager for entry in self.entries if entry.eager is not None]:
            self.warn(
                str(why),
                f"can't be captured, so it runs eagerly: {why}",
                why.reason.advice,
                "Or decorate a smaller part, without that.",
                "Or silence this warning with graphcache.disabled().",
            )

    def hand_over(self, call: BoundCall, instance: Any, entry: Entry) -> None:
        """Lets native code serve calls like this one with the graphs that there are now, or eagerly."""
        if entry.native is None:
            lock = self.pool_for(call).lock
            entry.native = _C.Entry(lock)
            parameters, leaves = self.signature.native(call)
            training = getattr(instance, "training", None)
            self.native.add(parameters, leaves, call.identities, training, entry.native)
        if entry.eager is not None:
            entry.native.set_eager(entry.eager)
        self._set_buckets(entry, entry.native)

    def _set_buckets(self, entry: Entry, native: _C.Entry) -> None:
        # Python compares each replay, where that is asked for.
        served = () if config.is_checking() else entry.buckets.values()
        native.set([bucket.native for bucket in served], entry.no_padding_reason is not None)

    def drop(self, entry: Entry) -> None:
        """Drops an entry and its graphs; their counts stay."""
        self.entries.remove(entry)
        self.withdraw(entry)
        for bucket in entry.buckets.values():
            self.counts.add(bucket.native)

    def withdraw(self, entry: Entry) -> None:
        """Ends what native code serves of an entry, so that Python sees its next call."""
        if entry.native is not None:
            self.native.forget(entry.native)
            entry.native = None

    def graphed(self) -> list[Entry]:
        """Returns the entries that have graphs."""
        return [entry for entry in self.entries if entry.buckets]

    def graphs(self) -> list[list[Mapping[int, Bucket]]]:
        """Returns the graphs by size, of each entry of each signature."""
        by_key: dict[Any, list[Mapping[int, Bucket]]] = {}
        for entry in self.graphed():
            by_key.setdefault(entry.key, []).append(entry.buckets)
        return list(by_key.values())

    def clear(self) -> None:
        """Drops all graphs, the counts and the history."""
        for entry in list(self.entries):
            self.drop(entry)
        self.entries = Entries()
        self._forget()

    def warn(self, about: str, text: str, *steps: str) -> None:
        """Warns, once about each thing, and numbers the next steps."""
        if about not in self._warned and not self.is_quiet:
            self._warned.add(about)
            numbered = (f"\n  {number}. {step}" for number, step in enumerate(steps, 1))
            warn(f"{self.name} {text}{''.join(numbered)}")
