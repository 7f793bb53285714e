"""Traces the forward at each size that gets a graph, besides the batch of the caller's own call.

A run at another size may take another path: it reads other values, writes elsewhere, or fills a table.
So every size is run once for real before its capture. These runs are not the caller's, and what they
change is put back: tensors, Python values, random states.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch

from graphcache.call.bound_call import BoundCall
from graphcache.capture.bucket import Bucket
from graphcache.capture.static_inputs import StaticInputs, arguments_over, fill_rows
from graphcache.config import Pad, fill_of
from graphcache.runtime.source_lines import user_line_of
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.runtime.undo_log import UndoLog
from graphcache.tracing.python_snapshot import memos_restored
from graphcache.tracing.trace import Forward, Trace, trace_forward

UNDO_TOO_LARGE = "it overwrites too much to be put back, and pad names no number for padded rows"
BY_BATCH = "it changes Python values by batch: {}"
NOT_AT_OTHER_SIZES = "it can't be captured at other sizes ({})"


class SizeTraces(NamedTuple):
    """The traces of all sizes.

    Attributes:
        trace: that of the caller's call, with what the others reached and could read.
        undo: for each size that ran, what puts its effects back.
        why: why rows may not be added to the forward; None where they may.
        by_batch: whether the forward changes Python values by batch.
    """

    trace: Trace
    undo: dict[int, UndoLog]
    why: str | None = None
    by_batch: bool = False


def trace_sizes(
    forward: Forward, call: BoundCall, trace: Trace, sizes: tuple[int, ...], pad: Pad
) -> SizeTraces:
    """Runs the forward at each of `sizes`, largest first, without a lasting effect."""
    found = SizeTraces(trace, {call.batch: trace.undo})
    others = sorted({*sizes} - {call.batch}, reverse=True)
    rows = call.batch
    if not trace.undo.is_complete:
        if not _pads_by_value(call, pad):
            return found._replace(why=UNDO_TOO_LARGE)
        rows = 0  # padded rows write nowhere that counts
    inputs = StaticInputs(call, max(others, default=0))
    for size in others:
        static = inputs.at(size)
        fill_rows(call, static, size, pad, rows)
        tensors = arguments_over(call, static, pad)
        args, kwargs = call.arguments(tensors)
        there = call._replace(args=args, kwargs=kwargs, tensors=tensors, batch=size)
        # From the state that the first call began with: its last step may be the last one there is.
        undone = trace.undo.undone() if rows else nullcontext()
        try:
            with undone, memos_restored(trace.memos):
                other = _trace(forward, there, trace, restore=rows > 0)
        except torch.OutOfMemoryError:
            continue  # as its capture will
        except Exception as error:
            text = f"{type(error).__name__}: {error}, at {user_line_of(error)}"
            return found._replace(why=NOT_AT_OTHER_SIZES.format(text))
        why = why_unlike(other, size, trace.mutated_keys, trace.draws_random)
        if why is not None:
            return found._replace(why=why, by_batch=bool(other.changes))
        found.undo[size] = other.undo
        if not found.trace.covers(other):
            found = found._replace(trace=found.trace.united(other))
    return found


def _trace(forward: Forward, call: BoundCall, trace: Trace, *, restore: bool) -> Trace:
    """Traces a call of another size; as in a capture, if the forward asks whether one is under way.

    A library that tunes itself at a new size can't do so in a capture: then a plain run comes first.
    """
    if not trace.asks_for_capture:
        return trace_forward(forward, call, restore=restore, again=trace.snapshot)
    try:
        with as_in_a_capture:
            other = trace_forward(forward, call, restore=restore, again=trace.snapshot)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        other = None
    if other is not None and other.blocker is None:
        return other
    trace_forward(forward, call, restore=restore, again=trace.snapshot)
    with as_in_a_capture:
        return trace_forward(forward, call, restore=restore, again=trace.snapshot)


def why_unlike(other: Trace, batch: int, mutated: frozenset[int], draws_random: bool) -> str | None:
    """Explains how a run at another batch does something else; None where it does the same.

    Args:
        other: that run.
        batch: its batch.
        mutated: the keys of the storages that the first run mutated.
        draws_random: whether the first run drew random numbers.
    """
    if other.changes:
        return BY_BATCH.format(", ".join(other.changes[:3]))
    if other.blocker is not None:
        return NOT_AT_OTHER_SIZES.format(other.blocker[0])
    if other.mutated_keys != mutated:
        return f"it writes to other memory at batch {batch}"
    if other.draws_random != draws_random:
        return f"whether it draws random numbers depends on the batch ({batch})"
    return None


def why_unlike_captured(other: Trace, bucket: Bucket, batch: int) -> str | None:
    """Explains how a run at a batch does something else than the graph that would serve the batch."""
    known = bucket.dependencies
    why = why_unlike(other, batch, known.mutated_keys, known.draws_random)
    more = other.read_set.ran.keys() - known.ran.keys() or other.external.keys() - known.external
    return f"it runs other code at batch {batch}" if why is None and more else why


def _pads_by_value(call: BoundCall, pad: Pad) -> bool:
    """Return True if every argument with the batch has a number for its padded rows."""
    paths = [path for path, role in zip(call.paths, call.roles, strict=True) if role.dim is not None]
    return pad is not None and all(fill_of(pad, path) != "edge" for path in paths)
