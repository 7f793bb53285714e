"""The first call of a signature: it runs eagerly, and from what was seen of it graphs are captured."""

import logging
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import modes_of, check_no_profiler
from graphcache.call.pytree import NotATree
from graphcache.capture.bucket import Bucket
from graphcache.capture.ladder import Job, capture_or_warm_up, learn_batch_dims
from graphcache.capture.sizes import default_sizes
from graphcache.capture.verify import Sample, retraced_as_captured, first_rows, same
from graphcache.dispatch.entry import Entry
from graphcache.dispatch.store import Graphs
from graphcache.errors import CaptureError
from graphcache.guards.static_objects import with_slots
from graphcache.report.reasons import Bypass
from graphcache.runtime.torch_state import uncollected
from graphcache.tracing.op_recorder import OpRecorder
from graphcache.tracing.trace import GIVE_PAD, PAD_IS_MISSING, Trace, trace

logger = logging.getLogger(__name__)

MAX_UNSETTLED = 3  # first calls that may change attributes (lazy caches) before that is called a habit
MAX_EMPTY_SLOTS = 4
CHANGES = "it changes attributes, which no graph replays: {}"


def first_call(
    graphs: Graphs, function: Callable[..., Any], instance: Any, call: BoundCall, *, exactly: bool = False
) -> Any:
    """Runs the forward eagerly, once, and captures it afterwards; perhaps just for this batch."""
    check_no_profiler()
    seen = trace(function, instance, call, restore=False)
    graphs.counts.eager["the first call of a signature"] += 1
    learn(graphs, function, instance, call, seen, exactly=exactly)
    return seen.result


@uncollected()
def learn(
    graphs: Graphs,
    function: Callable[..., Any],
    instance: Any,
    call: BoundCall,
    seen: Trace,
    *,
    exactly: bool = False,
) -> None:
    """Decides from an observed eager call how its signature is served, and captures it."""
    try:
        _leave_changed(graphs, call)
        _check_arguments(graphs, call)
        seen.layout()
        made = seen.made(call)  # what the caller gets, whatever is observed again
        seen = retraced_as_captured(function, instance, call, seen)
        recorder, layout = seen.recorder, seen.layout()
        if seen.changed:
            _leave_unsettled(graphs)
        seen.check()
        if any(tensor.grad_fn is not None for tensor in seen.tensors):
            return  # something that is no parameter wants gradients
        if seen.changed:
            raise CaptureError(CHANGES.format(", ".join(seen.changed[:3])))
        guards = seen.guards(instance)
        for passed, slot in zip(call.objects, call.slots, strict=True):
            slot.lease(passed, recorder.device)
        call = _read_again(graphs, instance, call, recorder)
        entry = graphs.entries.get(call.key) or Entry()
        graphs.withdraw(entry)
        entry.guards = guards
        entry.pure = not recorder.mutated
        entry.mutated = seen.written(call)
        entry.no_padding_reason = entry.no_padding_reason or seen.why_exact(call, graphs.options.pad)
        job = Job(
            graphs.name,
            function,
            call,
            recorder.external,
            {id(tensor): tensor for tensor in recorder.reached()},
            recorder.mutated_external(),
            recorder.draws,
            recorder.constants,
            seen.compiled,
            graphs.pool_for(call),
            graphs.options.pad,
            graphs.options.stale,
            graphs.options.progress,
        )
        entry.sample = entry.sample or Sample(call)
        entry.batches.add(call.batch)
        entry.slots, entry.last = call.slots, graphs.native.calls
        _capture(graphs, job, entry, layout, seen.tensors, exactly=exactly)
        _leave_changed(graphs, call)  # a capture runs the forward's Python
        _check_own_replay(graphs, entry, call, seen)
        if not guards.check(grad=False):
            _leave_unsettled(graphs)
            raise CaptureError(CHANGES.format(guards.explain(grad=False)))
    except Bypass:
        return  # with its written arguments bound, or unsettled, or hooked
    except Exception as error:  # whatever it is, the caller has a result, and gets it
        _give_up(graphs, instance, call, error)
        return
    graphs.entries[call.key] = entry
    graphs.publish(call, instance, entry)
    _drop_empty_slots(graphs)
    for bucket in entry.buckets.values():
        bucket.lane.reserve_for(made)
    if entry.no_padding_reason is PAD_IS_MISSING:  # at last, since warnings may be errors
        graphs.warn("pad", GIVE_PAD)


def _leave_changed(graphs: Graphs, call: BoundCall) -> None:
    """Leaves a call that changed an object it was passed."""
    graphs.signature.mutation_history.note(call.objects)
    if (why := graphs.signature.mutation_history.known(call.objects)) is not None:
        raise Bypass(why)


def _check_arguments(graphs: Graphs, call: BoundCall) -> None:
    """Raises `CaptureError` where the call changed its arguments, other than by values in tensors."""
    try:
        now = graphs.signature.read(call.args, call.kwargs, call.key[1], graphs.mutated)
    except Bypass as reason:
        raise CaptureError(f"it changes an argument, which no graph replays: {reason}") from None
    layouts = zip(call.layout.keys, call.layout.children, now.layout.children, strict=True)
    changed = [name for name, before, after in layouts if before != after]
    if not changed:
        pairs = zip(call.paths, call.tensors, now.tensors, strict=True)
        changed = [name for name, before, after in pairs if before is not after]
    if not changed and (now.key != call.bare_key or now.batch != call.batch):
        changed = ["the shape of a tensor"]
    if changed:
        raise CaptureError(f"it changes an argument, which no graph replays: {', '.join(changed)}")


def _leave_unsettled(graphs: Graphs) -> None:
    """Leaves a forward that changes Python values for its next call: perhaps it does so once.

    What fills a cache may well do what no graph can hold, such as a copy from the host.
    """
    graphs.unsettled += 1
    if graphs.unsettled < MAX_UNSETTLED:
        raise Bypass("it changed attributes")


def _drop_empty_slots(graphs: Graphs) -> None:
    """Drops graphs over memory of objects that are gone, but for the last few: it may be large."""
    for key in graphs.entries.with_empty_slots()[:-MAX_EMPTY_SLOTS]:
        graphs.drop(graphs.entries.pop(key))


def _read_again(graphs: Graphs, instance: Any, call: BoundCall, recorder: OpRecorder) -> BoundCall:
    """Returns the call with the arguments bound that the forward wrote to, under the modes of now.

    Switches of torch may have moved: the first attention of a process sets the order of its kernels.
    """
    written = frozenset(recorder.mutated_positions(call.tensors))
    known = graphs.mutated.get(call.form, frozenset())
    modes = modes_of(instance)
    if written <= known and modes == call.key[1]:
        return call
    graphs.mutated[call.form] = written | known
    again = graphs.signature.read(call.args, call.kwargs, modes, graphs.mutated)
    return with_slots(again, graphs.pool_for(call))


def _capture(
    graphs: Graphs, job: Job, entry: Entry, layout: Any, tensors: list[Tensor], *, exactly: bool
) -> None:
    """Captures what `entry` lacks for this call, and finds out whether it can be padded."""
    start, batch = perf_counter(), job.call.batch
    buckets: list[Bucket] = []
    if entry.no_padding_reason is None:
        wanted = (batch,) if exactly else graphs.options.sizes or default_sizes(batch)
        sizes = [size for size in wanted if size not in entry.buckets]
        try:
            buckets = capture_or_warm_up(job, sizes)
            entry.no_padding_reason = learn_batch_dims(buckets, batch, layout, tensors)
        except CaptureError as error:
            if sizes == [batch]:
                raise
            entry.no_padding_reason = f"it can't be captured at other sizes ({error})"
        entry.complete = graphs.options.sizes is not None or len(buckets) < len(sizes)
    if entry.no_padding_reason is not None:
        logger.info("%s is captured at exact sizes: %s", graphs.name, entry.no_padding_reason)
        kept = {size: b for size, b in entry.buckets.items() if b.exact_only}
        for size in entry.buckets.keys() - kept.keys():
            graphs.retire(entry.buckets[size])
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
            bucket.native.check_budget = sys.maxsize
    entry.add(buckets)
    seconds = perf_counter() - start
    graphs.counts.captures += len(buckets)
    graphs.counts.capture_seconds += seconds
    captured = [bucket.size for bucket in buckets]
    logger.info("captured %s at sizes %s in %.2f s", graphs.name, captured, seconds)


def _check_own_replay(graphs: Graphs, entry: Entry, call: BoundCall, seen: Trace) -> None:
    """Compares a replay with what the first call returned, where neither has effects or draws.

    Kernels that a capture did not see, on a stream of their own, are missing from its graph. Compiled
    code did not run at the first call, and rounds otherwise.

    Raises:
        CaptureError: where they differ.
    """
    bucket = entry.buckets.get(call.batch)
    if bucket is None or not entry.pure or seen.recorder.draws or seen.compiled:
        return
    outputs = bucket.result.outputs
    wanted = first_rows(seen.tensors, outputs, call.batch)
    try:
        result = bucket.try_out(call, graphs.native.calls)
        agrees = same(wanted, first_rows(result, outputs, call.batch))
    except torch.OutOfMemoryError:  # a replay needs none, so this is all that fails
        return
    if not agrees:
        raise CaptureError(
            "its graph returns something else than it does itself: it launches kernels that no capture "
            "sees, or returns something else each time"
        )


def _give_up(graphs: Graphs, instance: Any, call: BoundCall, error: Exception) -> None:
    """Runs this signature eagerly from here on, with one warning; or raises."""
    expected = isinstance(error, (CaptureError, NotATree))
    why = str(error) if expected else f"{type(error).__name__}: {error}"
    logger.debug("%s can't be captured", graphs.name, exc_info=error)
    if not graphs.options.fallback:
        raise CaptureError(f"graphcache: {graphs.name} can't be captured: {why}") from error
    if call.key in graphs.entries:
        graphs.drop(graphs.entries.pop(call.key))
    graphs.entries[call.bare_key] = entry = Entry(eager=why)
    if not call.objects:  # whose home is not known
        graphs.publish(call, instance, entry)
    graphs.warn(
        why,
        f"it can't be captured, so it runs eagerly: {why}. Move that out of the forward, decorate "
        "a smaller part, or silence this with graphcache.disabled()",
    )
