"""Compares with eager: what a capture would run, a first replay, and padded replays now and then.

A module whose rows depend on each other is found out by padded replays.

Padding can look harmless by the values of one call: where all rows are zero, as in a warm-up, the rows
that are added look like those of the caller. So the tail holds other rows too, of this call and of an
earlier one, and of both those with the largest and the least values, which a sum, a maximum or a
softmax over rows shows most clearly. All are rows that a caller gave: one of the largest value of each
argument, say, may be none that the forward can take. Where all are alike, numbers in floating point come
in halves, too.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphcache.call.bound_call import BATCHED, WHOLE, BoundCall
from graphcache.call.pytree import ObjectRef, flatten
from graphcache.capture.bucket import Bucket
from graphcache.capture.outputs import Output
from graphcache.capture.plan import CapturePlan
from graphcache.config import Pad, fill_of
from graphcache.errors import CaptureError
from graphcache.report.reasons import Reason
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.runtime.torch_state import restored_afterwards
from graphcache.tracing.trace import Forward, Trace, trace_forward

logger = logging.getLogger(__name__)

# Of the largest value of an output. Another batch size takes another kernel, so rounding differs;
# rows that mix are off by much more.
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

MAX_ALIKE = 3  # comparisons in a row of rows that were all alike
ROWS_ALIKE = "all of its rows were alike, so that padding could not be compared with eager"
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
        return self._are_unlike(call, "edge") or self._are_unlike(call, pad) or self._can_be_halved()

    def _are_unlike(self, call: BoundCall, pad: Pad) -> bool:
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

    def full(self, call: BoundCall, size: int) -> list[list[Tensor]]:
        """Returns arguments of `size` rows, the first of which are those of `call`."""
        with _plainly(call):
            # What goes with other values beside it, such as offsets, may be no valid row here.
            fits = all(map(torch.equal, self._whole, _whole(call)))
            earlier = self if fits else Sample(call)
            tails = [earlier, Sample(call), *earlier._extremes(call)]
            if not self._are_unlike(call, "edge"):
                tails.append(self._halved(call))
        return [each._joined(call, size - call.batch) for each in tails]

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
    return [t for t, output in zip(tensors, outputs, strict=True) if output.is_weak()]


def same(eager: Any, padded: Any) -> bool:
    """Return True if two results agree: exactly for integers, within rounding for floating point."""
    expected: list[Tensor] = []
    found: list[Tensor] = []
    if flatten(eager, expected, []) != flatten(padded, found, []):
        return False
    return all(map(_close, expected, found))


def _close(eager: Tensor, padded: Tensor) -> bool:
    if eager.shape != padded.shape or eager.dtype != padded.dtype:
        return False
    if not (eager.is_floating_point() or eager.is_complex()):
        return torch.equal(eager, padded)
    if eager.numel() == 0:
        return True
    exact = eager.to(torch.complex128 if eager.is_complex() else torch.float64)
    finite = exact[exact.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    tolerance = _TOLERANCE.get(eager.dtype, 0.1) * scale
    return torch.allclose(padded.to(exact.dtype), exact, rtol=0.0, atol=tolerance, equal_nan=True)


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
    """Compares padded replays of one signature with eager, now and then.

    Attributes:
        interval: the number of padded calls after the next comparison until another.
    """

    def __init__(self) -> None:
        self.interval = 64
        self.batches: set[int] = set()
        self._sample: Sample | None = None
        self._alike = 0

    def add(self, call: BoundCall) -> None:
        """Keeps rows of a first call for the comparisons of later ones."""
        self._sample = self._sample or Sample(call)
        self.batches.add(call.batch)

    def is_ambiguous(self, call: BoundCall) -> bool:
        """Return True if an argument may be as long as the batch by chance: no other batch came."""
        self.batches.add(call.batch)
        return len(self.batches) == 1 and sum(leaf.role is BATCHED for leaf in call.roles) > 1

    def why_unlike(
        self, tensors: list[Tensor], call: BoundCall, bucket: Bucket, pad: Pad, number: int
    ) -> str | None:
        """Explains why the signature is not padded from here on; None where replays agree with eager.

        Args:
            tensors: the tensors of the eager result.
            call: the call that had this result.
            bucket: the size that serves the call.
            pad: see `cuda_graphed`.
            number: the number of the call.
        """
        # All of this first: an argument may be an output that the replays below overwrite.
        sample, self._sample = self._sample or Sample(call), Sample(call)
        can_show = sample.can_show(call, pad)
        outputs = bucket.result.outputs
        expected = [t.clone() for t in first_rows(tensors, outputs, call.batch)]
        padded = [
            call._replace(tensors=each, batch=bucket.size) for each in sample.full(call, bucket.size)
        ]
        for each in (call, *padded):
            rows = first_rows(bucket.try_out(each, number), outputs, call.batch)
            if not same(expected, rows):
                return "its rows depend on each other"
            del rows  # held, it would be invalidated by the next
        if can_show:
            bucket.native.check_budget, self._alike = self.interval, 0
            self.interval *= 4
            return None
        self._alike += 1
        return ROWS_ALIKE if self._alike >= MAX_ALIKE else None  # until then, eager serves such calls
