"""Compares with eager: what a capture would run, a first replay, and padded replays.

The first padded call of each batch runs eagerly, and its graph has to return the same: the same
structure, the same Python values, and the same values within the rounding of another kernel. A batch
that has not shown this is never padded. So nothing that depends on the number of rows gets through.

Rows that depend on each other are found by replays of one graph, whose padded rows hold this and that.
They run the same kernels, so the rows of the caller have to come out bit for bit. The other rows are
rows of this call and of an earlier one, also those with the largest and least values. Where nothing
can go wrong on the device, they are NaN and infinities, too. Zero times NaN is NaN, so neither a gate
that is closed, nor a small factor, nor one large value hides a dependence from them.

Integers can't be NaN, and `where` can hide one. So a write to what a graph reads ends what was proved,
as far as torch counts it: to integers and booleans, and to all tensors where NaN has not shown enough.
A result that is all alike or NaN proves nothing either.

With `pad`, the caller says that padded rows of this content do no harm, and only these are compared.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, BoundCall
from graphcache.call.pytree import ObjectRef, flatten
from graphcache.capture.bucket import Bucket
from graphcache.capture.closeness import bits_equal, can_be_nan, close, described, same
from graphcache.capture.outputs import Output
from graphcache.capture.plan import CapturePlan
from graphcache.capture.samples import Sample
from graphcache.config import Pad
from graphcache.errors import CaptureError, CheckError
from graphcache.report.reasons import Reason
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.runtime.undo_log import restored_afterwards
from graphcache.tracing.trace import Forward, Trace, trace_forward

logger = logging.getLogger(__name__)

MAX_ALIKE = 3  # comparisons in a row that proved nothing
ROWS_ALIKE = (
    "all of its rows were alike, or its results were, or NaN, so that padding could not be compared "
    "with eager"
)
ROWS_MIX = "its rows depend on each other"
DIFFERS = "it computes something else at this batch"
NOT_REPEATED = (
    "its graph does not repeat itself bit for bit, so that padding is compared within rounding"
)
STRUCTURE_ONLY = (
    "what it writes is too large to be put back, so that padding is compared by structure only"
)
MAX_UNDONE = 64 << 20  # bytes of mutated memory that a comparison copies
MAX_CHANGES = 3  # after which a tensor is state: several of its values were compared


def first_rows(result: Any, outputs: Sequence[Output], batch: int) -> list[Tensor]:
    """Returns the tensors of a result that a graph made, cut to their first `batch` rows."""
    tensors: list[Tensor] = []
    flatten(result, tensors, [], other=lambda *_: ObjectRef(0))
    for index, output in enumerate(outputs):
        for dim in output.batch_dims or ():
            if tensors[index].shape[dim] > batch:
                tensors[index] = tensors[index].narrow(dim, 0, batch)
    return [t for t, output in zip(tensors, outputs, strict=True) if output.is_made()]


def _is_informative(tensor: Tensor, dims: Sequence[int], *, rows_differ: bool) -> bool:
    """Return True if finite values of an output differ, between its rows where those of the call do."""
    values = torch.where(tensor.isfinite(), tensor, 0) if can_be_nan(tensor) else tensor
    if values.numel() <= 1:
        return bool((values != 0).any())
    dim = next((dim for dim in dims if values.shape[dim] > 1), None) if rows_differ else None
    like = values.flatten()[0] if dim is None else values.narrow(dim, 0, 1)
    return bool((values != like).any())


def retraced_as_captured(forward: Forward, call: BoundCall, traced: Trace) -> Trace:
    """Returns the trace of what a capture runs, where a forward asks whether one is under way.

    Libraries then skip what a capture can't hold: transformers looks no further whether a mask hides
    anything. So the forward is traced once more, without effects, and has to return the same.

    Raises:
        CaptureError: where it returns something else.
    """
    if not traced.asks_for_capture or traced.changes:
        return traced
    moved = traced.mutated or traced.draws_random  # then the first call began elsewhere
    try:
        with restored_afterwards(traced.mutated):
            like = trace_forward(forward, call, restore=True) if moved else traced
        with restored_afterwards(traced.mutated), as_in_a_capture:
            again = trace_forward(forward, call, restore=True)
    except Exception as error:  # perhaps for want of a warm-up; the capture will show
        logger.debug("it raised as in a capture", exc_info=error)
        return traced
    if again.layout is None and again.blocker is not None:
        raise CaptureError(again.blocker[0], reason=again.blocker[1])
    if again.layout != like.layout or not same(like.tensors, again.tensors):
        raise CaptureError(
            "it returns something else while a capture is under way", reason=Reason.DIFFERS_IN_CAPTURE
        )
    return again


def check_first_replay(plan: CapturePlan, buckets: Sequence[Bucket], number: int) -> None:
    """Compares a replay with what the first call returned, where neither has effects or draws.

    Kernels that a capture did not see, on a stream of their own, are missing from its graph. Compiled
    code did not run at the first call, and rounds otherwise.

    Raises:
        CaptureError: where they differ.
    """
    call, trace = plan.call, plan.trace
    bucket = next((bucket for bucket in buckets if bucket.size == call.batch), None)
    if bucket is None or not plan.is_pure or trace.draws_random or trace.compiled:
        return
    outputs = bucket.result.outputs
    expected = first_rows(trace.tensors, outputs, call.batch)
    try:
        result = bucket.try_out(call, number)
        agrees = same(expected, first_rows(result, outputs, call.batch))
    except torch.OutOfMemoryError:  # a replay needs none, so this is all that fails
        return
    if not agrees:
        raise CaptureError(
            "its graph returns something else than it does itself: it launches kernels that no capture "
            "sees, or returns something else each time",
            reason=Reason.REPLAY_DIFFERS,
        )


class PaddingCheck:
    """Compares padded replays of one signature with eager: each batch once, and each size now and then.

    Attributes:
        interval: the number of padded calls after the next comparison until another.
        notes: how padding can't be compared, for `CacheInfo`.
        mixed: a call of full size whose other rows changed the first ones, where that was found.
    """

    def __init__(self) -> None:
        self.interval = 64
        self.notes: set[str] = set()
        self.batches: set[int] = set()
        self.mixed: BoundCall | None = None
        self._sample: Sample | None = None
        self._alike = 0
        self._bears_nan = self._is_pure = True
        self._hides_nan = False
        self._read: list[_C.Versions] = []  # of all that graphs read, and of integers and booleans
        self._known: dict[_C.Versions, list[int]] = {}
        self._changes: Counter[tuple[_C.Versions, int]] = Counter()
        self._shown: dict[_C.Bucket, tuple[_C.Versions, list[int]]] = {}

    def add(self, plan: CapturePlan) -> None:
        """Takes down what a first call has shown, and keeps its rows for comparisons of later ones."""
        call, trace = plan.call, plan.trace
        self._sample = self._sample or Sample(call)
        self.batches.add(call.batch)
        self._bears_nan = self._bears_nan and trace.bears_nan
        self._hides_nan = self._hides_nan or trace.hides_nan
        self._is_pure = self._is_pure and plan.is_pure
        read = [t for t in trace.reached if _C.storage_key(t) not in trace.mutated_keys]
        exact = [tensor for tensor in read if not can_be_nan(tensor)]
        self._read = [_C.Versions(read), _C.Versions(exact)]

    def is_ambiguous(self, call: BoundCall) -> bool:
        """Return True if an argument may be as long as the batch by chance: no other batch came."""
        self.batches.add(call.batch)
        return len(self.batches) == 1 and sum(leaf.role is BATCHED for leaf in call.roles) > 1

    def why_unlike(
        self,
        trace: Trace,
        call: BoundCall,
        bucket: Bucket,
        pad: Pad,
        number: int,
    ) -> str | None:
        """Explains why the signature is not padded from here on; None where replays agree with eager.

        Args:
            trace: the eager run.
            call: the call that had it.
            bucket: the size that serves the call.
            pad: see `cuda_graphed`.
            number: the number of the call.
        """
        pairs = zip(trace.tensors, bucket.result.outputs, strict=True)
        if not all(output.is_like(tensor, call.tensors) for tensor, output in pairs):
            return DIFFERS
        # All of this first: an argument may be an output that the replays below overwrite.
        sample, self._sample = self._sample or Sample(call), Sample(call)
        rows_differ = self._sample.are_unlike(call, "edge")
        can_show = sample.can_show(call, pad)
        expected = [t.clone() for t in first_rows(trace.tensors, bucket.result.outputs, call.batch)]
        is_promised = pad is not None and pad != "edge"
        nan = self._bears_nan and any(map(can_be_nan, sample.tensors()))
        if not self._is_pure:
            why = self._why_state_unlike(expected, trace, call, bucket, number)
        else:
            others = []
            if not is_promised:
                thorough = self._is_thorough(bucket)
                others = sample.full(call, bucket.size, thorough=thorough, nan=nan)
            why = self._why_rows_unlike(expected, others, call, bucket, number)
        if why is not None:
            return why
        made = [output.batch_dims or () for output in bucket.result.outputs if output.is_made()]
        informative = [
            _is_informative(tensor, dims, rows_differ=rows_differ)
            for tensor, dims in zip(expected, made, strict=True)
        ]
        is_nan = any(can_be_nan(tensor) and bool(tensor.isnan().any()) for tensor in expected)
        if can_show and not is_nan and (any(informative) or not expected):
            # NaN has reached all that floating point can do to a result.
            all_shown = nan and not is_promised and not self._hides_nan and all(informative)
            all_shown = all_shown and all(map(can_be_nan, sample.tensors()))
            self._prove(bucket, call.batch, self._read[all_shown])
            return None
        self._alike += 1
        return ROWS_ALIKE if self._alike >= MAX_ALIKE else None  # until then, eager serves such calls

    def _is_thorough(self, bucket: Bucket) -> bool:
        """Return True if rows of this size may depend on each other for all that is known."""
        versions, then = self._shown.get(bucket.native, (None, []))
        return bucket.native.check_budget <= 0 or versions is None or versions.current() != then

    def _why_rows_unlike(
        self,
        expected: list[Tensor],
        others: list[list[Tensor]],
        call: BoundCall,
        bucket: Bucket,
        number: int,
    ) -> str | None:
        """Compares replays with other rows beside those of the call, and the first one with eager."""
        outputs = bucket.result.outputs
        again = call._replace(tensors=[tensor.clone() for tensor in call.tensors])

        def rows(of: BoundCall) -> list[Tensor]:
            return first_rows(bucket.try_out(of, number), outputs, call.batch)

        base = [tensor.clone() for tensor in rows(call)]
        for tensors in others:
            other = call._replace(tensors=tensors, batch=bucket.size)
            found = [tensor.clone() for tensor in rows(other)]  # held, they would be invalidated
            if all(map(bits_equal, base, found)):
                continue
            repeats = all(all(map(bits_equal, base, rows(again))) for _ in range(3))
            if not repeats:
                self.notes.add(NOT_REPEATED)
            if repeats or not same(base, found):
                self.mixed = other
                return ROWS_MIX
        return None if same(expected, base) else DIFFERS

    def _why_state_unlike(
        self, expected: list[Tensor], trace: Trace, call: BoundCall, bucket: Bucket, number: int
    ) -> str | None:
        """Compares a padded replay from the state before the call, and puts back what that left.

        Where `pad` names a row that counts, padded rows write where eager did not. So all memory that
        the forward mutates is put back, unless it is large.
        """
        undo = trace.undo
        if not undo.is_complete:
            self.notes.add(STRUCTURE_ONLY)
            return None
        sizes = {_C.storage_key(t): t.untyped_storage().nbytes() for t in trace.mutated}
        everything = trace.mutated if sum(sizes.values()) <= MAX_UNDONE else ()
        with restored_afterwards(everything), undo.undone() as after:
            found = first_rows(bucket.try_out(call, number), bucket.result.outputs, call.batch)
            agrees = same(expected, found) and all(map(close, after, undo.values()))
        return None if agrees else DIFFERS

    def _prove(self, bucket: Bucket, batch: int, versions: _C.Versions) -> None:
        """Has calls of this batch replayed until the next comparison of the size, or a write."""
        native, now = bucket.native, versions.current()
        for index, (old, new) in enumerate(zip(self._known.get(versions, now), now, strict=True)):
            self._changes[versions, index] += old != new
            if self._changes[versions, index] == MAX_CHANGES:
                versions.drop(index)
        self._known[versions] = versions.current()
        self._shown[native] = versions, versions.current()
        native.versions = versions
        native.prove(batch)
        self._alike = 0
        if native.check_budget <= 0:
            native.check_budget = self.interval if self._is_pure else sys.maxsize
            self.interval *= 4


def checked_replay(
    forward: Forward, call: BoundCall, bucket: Bucket, replay: Callable[[], Any], number: int
) -> Any:
    """Serves call `number` by a replay, and compares that with an eager run from the same state.

    Raises:
        CheckError: where they differ.
    """
    device = call.tensors[0].device
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            trace = trace_forward(forward, call, restore=False)
        expected = [tensor.clone() for tensor in trace.tensors]
    except torch.OutOfMemoryError:
        if bucket.has_effects:  # perhaps some of them have happened
            raise
        return replay()
    with trace.undo.undone() as after:
        result = replay()[0] if bucket.makes_values else replay()
        state = trace.undo.values()
    found: list[Tensor] = []
    if flatten(result, found, [], other=call.object_ref) != trace.layout:
        what = f"eager returns {trace.result!r}, the replay {result!r}"
        raise _check_error(call, bucket, number, what)
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        if not close(want, got):
            what = f"in tensor {index} of its result, {described(want, got)}"
            raise _check_error(call, bucket, number, what)
    if not all(map(close, after, state)):
        raise _check_error(call, bucket, number, "in what it wrote outside itself")
    return result


def _check_error(call: BoundCall, bucket: Bucket, number: int, what: str) -> CheckError:
    rows = f"{call.batch} rows" + (f", padded to {bucket.size}" if call.batch != bucket.size else "")
    where = f"{bucket.native.forward_name}, call {number} ({rows})"
    return CheckError(f"graphcache: {where}: the replay differs from eager: {what}")
