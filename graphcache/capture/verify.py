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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, WHOLE, BoundCall
from graphcache.call.pytree import ObjectRef, flatten
from graphcache.capture.bucket import Bucket
from graphcache.capture.outputs import Output
from graphcache.capture.plan import CapturePlan
from graphcache.config import Pad, fill_of
from graphcache.errors import CaptureError, CheckError, describe
from graphcache.report.reasons import Reason
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.runtime.torch_state import restored_afterwards
from graphcache.tracing.trace import Forward, Trace, trace_forward

logger = logging.getLogger(__name__)

# Of the largest value of its row or column. Another batch size takes another kernel, so rounding
# differs; what depends on the batch is off by more, and rows that mix are found by bits.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-3,  # TF32 rounds to three digits
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
    torch.complex128: 1e-9,
    torch.complex64: 2e-3,
}


_ORDERED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)

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
MAX_ON_HOST = 16 << 20  # bytes of a result that is compared on the CPU
MAX_UNDONE = 64 << 20  # bytes of mutated memory that a comparison copies
MAX_CHANGES = 3  # after which a tensor is state: several of its values were compared
MANY = 8  # values in a row or column, among which one is large enough to measure the others by
OUTLIER = 1000  # times the tenth part of the values: no measure for others
MAX_EXTREMES = 3  # arguments whose largest and least values are looked for


class Sample:
    """Rows of an earlier call, to put after those of a later one."""

    def __init__(self, call: BoundCall) -> None:
        with _plainly(call):
            self.rows: list[tuple[int, Tensor] | None] = [
                (leaf.dim, tensor.clone()) if leaf.role is BATCHED and leaf.dim is not None else None
                for tensor, leaf in zip(call.tensors, call.roles, strict=True)
            ]
            self._whole = [tensor.clone() for tensor in _whole(call)]

    def can_show(self, call: BoundCall, pad: Pad) -> bool:
        """Return True if rows differ, or differ from padding: then a dependence on them can show."""
        return self.are_unlike(call, "edge") or self.are_unlike(call, pad) or self._can_be_halved()

    def tensors(self) -> list[Tensor]:
        """Returns the rows, one tensor for each argument that carries the batch."""
        return [held[1] for held in self.rows if held is not None]

    def are_unlike(self, call: BoundCall, pad: Pad) -> bool:
        """Return True if rows differ from the padding of `call`; "edge" stands for its first row."""
        for name, held, rows in zip(call.paths, self.rows, self._joined(call, call.batch), strict=True):
            if held is not None:
                fill = fill_of(pad, name)
                if bool((rows != (rows.narrow(held[0], 0, 1) if fill == "edge" else fill)).any()):
                    return True
        return False

    def _can_be_halved(self) -> bool:
        return any(held is not None and bool((_half(held[1]) != held[1]).any()) for held in self.rows)

    def _halved(self, call: BoundCall) -> "Sample":
        halved = Sample(call)
        halved.rows = [held and (held[0], _half(held[1])) for held in halved.rows]
        return halved

    def full(self, call: BoundCall, size: int, *, thorough: bool, nan: bool) -> list[list[Tensor]]:
        """Returns arguments of `size` rows, the first of which are those of `call`.

        Args:
            call: the call.
            size: the number of rows.
            thorough: all kinds of other rows, and not just one.
            nan: floating point of other rows may be NaN and infinite.
        """
        with _plainly(call):
            # What goes with other values beside it, such as offsets, may be no valid row here.
            fits = all(map(torch.equal, self._whole, _whole(call)))
            earlier = self if fits else Sample(call)
            tails = [earlier]
            if thorough:
                tails += [Sample(call), *earlier._extremes(call)]
                if not self.are_unlike(call, "edge"):
                    tails.append(self._halved(call))
            if nan:
                values = ("nan", "inf", "-inf") if thorough else ("nan",)
                tails += [earlier._filled(call, float(value)) for value in values]
        return [each._joined(call, size - call.batch) for each in tails]

    def _filled(self, call: BoundCall, value: float) -> "Sample":
        """Returns these rows with `value` in place of all floating point."""
        filled = Sample(call)
        filled.rows = [
            held and (held[0], torch.full_like(held[1], value) if _can_be_nan(held[1]) else held[1])
            for held in self.rows
        ]
        return filled

    def _extremes(self, call: BoundCall) -> Iterator["Sample"]:
        """Yields, by single rows of `call` and this, those that have the largest and least values.

        Whole rows: the largest value of one argument need not go with that of another.
        """
        joined = self._joined(call, self._count())
        batched = [(held[0], t) for t, held in zip(joined, self.rows, strict=True) if held is not None]
        ordered = [(dim, t) for dim, t in batched if t.dtype in _ORDERED and t.numel()]
        for dim, tensor in ordered[:MAX_EXTREMES]:
            values = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).double()
            for row in (values.amax(1).argmax(), values.amin(1).argmin()):
                single = Sample(call)
                single.rows = [
                    held and (held[0], t.index_select(held[0], row.reshape(1)))
                    for t, held in zip(joined, self.rows, strict=True)
                ]
                yield single

    def _count(self) -> int:
        return next((held[1].shape[held[0]] for held in self.rows if held is not None), 0)

    def _joined(self, call: BoundCall, count: int) -> list[Tensor]:
        with _plainly(call):
            return [
                tensor if held is None else torch.cat([tensor, _cycle(held[1], held[0], count)], held[0])
                for tensor, held in zip(call.tensors, self.rows, strict=True)
            ]


def _whole(call: BoundCall) -> list[Tensor]:
    return [t for t, leaf in zip(call.tensors, call.roles, strict=True) if leaf.role is WHOLE]


def _can_be_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _half(tensor: Tensor) -> Tensor:
    return tensor * 0.5 if tensor.is_floating_point() and tensor.dtype in _ORDERED else tensor


@contextmanager
def _plainly(call: BoundCall) -> Iterator[None]:
    """Keeps the modes of the caller out: autocast would refuse or convert what is only copied here."""
    device = call.tensors[0].device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _cycle(rows: Tensor, dim: int, count: int) -> Tensor:
    index = torch.arange(count, device=rows.device) % rows.shape[dim]
    return rows.index_select(dim, index)


def first_rows(result: Any, outputs: Sequence[Output], batch: int) -> list[Tensor]:
    """Returns the tensors of a result that a graph made, cut to their first `batch` rows."""
    tensors: list[Tensor] = []
    flatten(result, tensors, [], other=lambda *_: ObjectRef(0))
    for index, output in enumerate(outputs):
        for dim in output.batch_dims or ():
            if tensors[index].shape[dim] > batch:
                tensors[index] = tensors[index].narrow(dim, 0, batch)
    return [t for t, output in zip(tensors, outputs, strict=True) if output.is_made()]


def same(eager: Any, padded: Any) -> bool:
    """Return True if two results agree: exactly for integers, within rounding for floating point."""
    expected: list[Tensor] = []
    found: list[Tensor] = []
    if flatten(eager, expected, []) != flatten(padded, found, []):
        return False
    return all(map(_close, expected, found))


def _close(eager: Tensor, replayed: Tensor) -> bool:
    if eager.shape != replayed.shape or eager.dtype != replayed.dtype:
        return False
    if _bits_equal(eager, replayed):
        return True
    if eager.nbytes <= MAX_ON_HOST:  # the kernels below would have to be loaded, which takes long
        eager, replayed = eager.cpu(), replayed.cpu()
    return _can_be_nan(eager) and not bool(_differences(eager, replayed).any())


def _differences(eager: Tensor, replayed: Tensor) -> Tensor:
    """Returns where two tensors in floating point differ by more than rounding.

    The measure is the row or column of a value, so that no large value elsewhere hides it. Outliers,
    such as those of masks, are measured by themselves.
    """
    wide = torch.complex128 if eager.is_complex() else torch.float64
    exact = wide if eager.dtype.itemsize >= 8 else torch.float32
    want, got = eager.to(exact), replayed.to(exact)
    off, size = (want - got).abs(), want.abs()
    finite = want.isfinite() & got.isfinite()
    equal = (want == got) | (want.isnan() & got.isnan())
    ordinary = finite & (size <= OUTLIER * _tenth(size[finite & (size > 0)]))
    scale = _scale(torch.where(ordinary, size, 0))
    tolerance = _TOLERANCE.get(eager.dtype, 0.1) * torch.where(ordinary, scale, size)
    return ~equal & ~(finite & (off <= tolerance))


def _tenth(sizes: Tensor) -> Tensor:
    """Returns the value that a tenth of `sizes` do not exceed; zero of none."""
    if not sizes.numel():
        return sizes.new_zeros(())
    return sizes.flatten().kthvalue(1 + sizes.numel() // 10).values


def _scale(sizes: Tensor) -> Tensor:
    """Returns the largest of each value's row or column, whichever is less, where these are many."""
    scale = sizes.amax()
    for dim in {0, sizes.dim() - 1} if sizes.dim() > 1 else ():
        if sizes.numel() // sizes.shape[dim] >= MANY:
            others = [other for other in range(sizes.dim()) if other != dim]
            scale = torch.minimum(scale, sizes.amax(others, keepdim=True))
    return scale


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors of one shape are equal bit for bit; NaN equals itself."""
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.resolve_conj().resolve_neg()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.contiguous().view(_INTEGERS[plain.element_size()])


def _is_informative(tensor: Tensor, dims: Sequence[int], *, rows_differ: bool) -> bool:
    """Return True if finite values of an output differ, between its rows where those of the call do."""
    values = torch.where(tensor.isfinite(), tensor, 0) if _can_be_nan(tensor) else tensor
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
    """

    def __init__(self) -> None:
        self.interval = 64
        self.notes: set[str] = set()
        self.batches: set[int] = set()
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
        exact = [tensor for tensor in read if not _can_be_nan(tensor)]
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
        nan = self._bears_nan and any(map(_can_be_nan, sample.tensors()))
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
        is_nan = any(_can_be_nan(tensor) and bool(tensor.isnan().any()) for tensor in expected)
        if can_show and not is_nan and (any(informative) or not expected):
            # NaN has reached all that floating point can do to a result.
            all_shown = nan and not is_promised and not self._hides_nan and all(informative)
            all_shown = all_shown and all(map(_can_be_nan, sample.tensors()))
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
            if all(map(_bits_equal, base, found)):
                continue
            if all(all(map(_bits_equal, base, rows(again))) for _ in range(3)):
                return ROWS_MIX
            self.notes.add(NOT_REPEATED)
            if not same(base, found):
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
            agrees = same(expected, found) and all(map(_close, after, undo.values()))
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
        return replay()
    with trace.undo.undone() as after:
        result = replay()
        state = trace.undo.values()
    found: list[Tensor] = []
    if flatten(result, found, [], other=call.object_ref) != trace.layout:
        what = f"eager returns {trace.result!r}, the replay {result!r}"
        raise _check_error(call, bucket, number, what)
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        if not _close(want, got):
            what = f"in tensor {index} of its result, {_both(want, got)}"
            raise _check_error(call, bucket, number, what)
    if not all(map(_close, after, state)):
        raise _check_error(call, bucket, number, "in what it wrote outside itself")
    return result


def _check_error(call: BoundCall, bucket: Bucket, number: int, what: str) -> CheckError:
    rows = f"{call.batch} rows" + (f", padded to {bucket.size}" if call.batch != bucket.size else "")
    where = f"{bucket.native.forward_name}, call {number} ({rows})"
    return CheckError(f"graphcache: {where}: the replay differs from eager: {what}")


def _both(want: Tensor, got: Tensor) -> str:
    """Describes how two tensors differ: the first values that do, and the largest difference."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"eager has {describe(want)}, the replay {describe(got)}"
    differ = _differences(want, got) if _can_be_nan(want) else want != got
    places = differ.nonzero()
    shown = [
        f"{tuple(place)}: {want[tuple(place)].item()} eagerly, {got[tuple(place)].item()} replayed"
        for place in places[:3].tolist()
    ]
    largest = (
        (want.double() - got.double()).abs().max() if not want.is_complex() else (want - got).abs().max()
    )
    return (
        f"at {len(places)} of {want.numel()} places, such as {'; '.join(shown)}; the largest difference "
        f"is {largest.item():.3g}"
    )
