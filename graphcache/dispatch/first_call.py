"""The first call of a signature: trace, plan, capture, verify, publish."""

from dataclasses import replace
from typing import Any

from graphcache.call.bound_call import BoundCall
from graphcache.capture.ladder import Captured, capture
from graphcache.capture.other_sizes import NOT_AT_OTHER_SIZES, SizeTraces, trace_sizes
from graphcache.capture.plan import CHANGES, CapturePlan, build_guards, check_trace
from graphcache.capture.repeatable import with_effects
from graphcache.capture.verify import check_first_replay, retraced_as_captured
from graphcache.dispatch.store import Store
from graphcache.errors import CaptureError
from graphcache.guards.static_objects import lease_all
from graphcache.report.reasons import Bypass, EagerReason, Reason
from graphcache.runtime.torch_state import uncollected
from graphcache.tracing.trace import Forward, Trace, trace_forward


@uncollected()
def first_call(store: Store, forward: Forward, call: BoundCall, *, exactly: bool, restore: bool) -> Any:
    """Runs the forward eagerly, once, and captures it; exactly for this batch, or restoring state."""
    trace = trace_forward(forward, call, restore=restore)  # without the lock: it may wait for threads
    if not restore:
        store.counts.eager[EagerReason(Reason.FIRST_CALL)] += 1
    with store.pool_for(call).capturing():
        try:
            plan = make_plan(store, forward, call, trace, exactly=exactly)
            captured = capture(plan)
            verify(store, plan, captured)
        except Exception as error:  # whatever it is, the caller has a result, and gets it
            store.handle_error(call, forward.instance, error, trace)
        else:
            store.publish(plan, captured, held=trace.made(call))
    return trace.result


def make_plan(
    store: Store, forward: Forward, call: BoundCall, trace: Trace, *, exactly: bool
) -> CapturePlan:
    """Returns the plan that follows from a trace.

    Raises:
        Bypass: where the signature may have graphs later, but has none yet.
        CaptureError: where no graph can do what the forward did.
    """
    if trace.layout is not None:
        trace = with_effects(forward, call, trace)
    with trace.effects.begun():
        store.check_arguments_unchanged(call)
    if trace.effects:
        if trace.effects.exact_values:
            store.wait_until_back(call, trace.effects)
        elif not trace.effects.only_counts:
            store.wait_until_settled(call)
        call = store.with_counters(call, trace)
    if trace.layout is not None and not trace.effects.is_shown:
        effects = trace.effects
        trace = replace(retraced_as_captured(forward, call, trace), effects=effects)
        if trace.changes:
            store.wait_until_settled(call)
        elif trace.effect is not None:
            store.wait_until_settled(call, times=2)
    check_trace(trace, forward.instance)
    guards = build_guards(trace, forward, call)
    pool = store.pool_for(call)
    lease_all(call, pool.device)
    call = store.rebound(call, forward.instance, trace)
    with trace.effects.begun():  # entries are found by the values that the call began with
        sizes = store.sizes_to_capture(call, exactly=exactly)
        why = store.why_not_padded(call, trace)
    found = SizeTraces(trace, {call.batch: trace.undo}, why)
    if why is None:
        found = trace_sizes(forward, call, trace, sizes, store.options.pad)
        if found.trace is not trace and found.why is None:
            try:
                check_trace(found.trace, forward.instance)
                guards = build_guards(found.trace, forward, call)
            except (CaptureError, Bypass) as error:
                found = found._replace(trace=trace, why=NOT_AT_OTHER_SIZES.format(error))
        if found.by_batch:
            store.note_by_batch(found.why)
        call = store.rebound(call, forward.instance, found.trace)
    trace = found.trace
    trace.effects.add_to(guards, call)
    return CapturePlan(
        name=store.name,
        forward=forward,
        call=call,
        trace=trace,
        guards=guards,
        pool=pool,
        options=store.options,
        sizes=sizes,
        no_padding_reason=found.why,
        undo=found.undo,
    )


def verify(store: Store, plan: CapturePlan, captured: Captured) -> None:
    """Checks that the graphs return what eager did, and that capturing them changed nothing.

    Raises:
        Bypass: where the forward changed Python values, perhaps once.
        CaptureError: where the graphs can't be used.
    """
    store.check_objects_unchanged(plan.call)  # a capture runs the forward's Python
    check_first_replay(plan, captured.buckets, store.native.calls)
    with plan.trace.effects.begun():
        if plan.guards.check(grad=False):
            return
        store.wait_until_settled(plan.call)
        why = plan.guards.explain(grad=False)
        raise CaptureError(CHANGES.format(why), reason=Reason.CHANGES_VALUES)
