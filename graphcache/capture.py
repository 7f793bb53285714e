"""Captures the sizes of one signature: the ladder, what a failure leaves, and what a warm-up may not."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from graphcache import _C
from graphcache.errors import CaptureError
from graphcache.observe import Observer
from graphcache.ops import user_line_of
from graphcache.outputs import Output, Place, Result
from graphcache.pool import GraphPool, Lane, Stale
from graphcache.runtime import Graph, inlining
from graphcache.signature import BOUND, Call
from graphcache.staging import Pad, Stager, StaticInputs
from graphcache.state import uncached_autocast
from graphcache.tree import NotATree, flatten

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """What is to be captured.

    Attributes:
        name: of the forward, for messages.
        function: the forward itself.
        call: the first call of its signature.
        outside: a tensor for each storage that the forward reached and was not given, by its key.
        pool, pad, stale, progress: see `cuda_graphed`.
    """

    name: str
    function: Callable[..., Any]
    call: Call
    outside: dict[int, Tensor]
    pool: GraphPool
    pad: Pad
    stale: Stale
    progress: bool | None

    def arguments(self, static: list[Tensor]) -> list[Tensor]:
        """Returns the tensors of the call: static inputs where it is staged, its own where bound."""
        leaves = list(self.call.leaves)
        for (index, _), tensor in zip(self.call.staged(), static, strict=True):
            leaves[index] = tensor
        return leaves

    def run(self, leaves: list[Tensor]) -> Any:
        """Runs the forward over other tensors than the caller's."""
        args, kwargs = self.call.arguments(leaves)
        return self.function(*args, **kwargs)


@dataclass
class Bucket:
    """One captured size: its graph, where its inputs go, what it returns.

    Attributes:
        checked: a padded replay was compared with eager, or need not be.
        exact_only: captured for batches of exactly this size.
    """

    size: int
    graph: Graph
    lane: Lane
    stager: Stager
    result: Result
    checked: bool = False
    exact_only: bool = False


def capture_ladder(job: Job, sizes: Sequence[int]) -> list[Bucket]:
    """Captures one graph per size, largest first, into one lane of the pool.

    The largest size takes the memory; as its outputs are weak references, all of that is free again
    when the next size is captured. The order, the one pool and the weak references together are
    vLLM's (pull request 9724). Sizes that do not fit into the device are left out.

    Raises:
        Exception: what stopped the capture of a size.
    """
    inputs = StaticInputs(job.call, max(sizes))
    lane = job.pool.lane()
    buckets: list[Bucket] = []
    with job.pool.runtime.ladder(job.pool.device), inlining(), uncached_autocast():
        for size in _progress(job, sorted(sizes, reverse=True)):
            stager = _stager(job, inputs, size)
            body = _Body(job, stager.static)
            try:
                graph, weak = lane.capture(body)
            except torch.OutOfMemoryError:
                logger.warning("graphcache: %s: size %d does not fit into memory", job.name, size)
                lane = job.pool.lane()
                continue
            buckets.append(Bucket(size, graph, lane, stager, body.result(weak)))
    return buckets


def capture_or_warm_up(job: Job, sizes: Sequence[int]) -> list[Bucket]:
    """Captures the ladder; where that fails, warms every size up for real and tries once more.

    A library that initialises itself, or tunes a kernel, at a size that it has not seen stops a
    capture, and only a real run gets it over that. What such a run writes is put back.

    Raises:
        CaptureError: if a graph can't hold the forward.
    """
    try:
        return capture_ladder(job, sizes)
    except CaptureError:  # ours: it knows what can't be captured
        raise
    except Exception as error:
        logger.debug("%s: warming up, as its capture failed", job.name, exc_info=error)
    try:
        inputs = StaticInputs(job.call, max(sizes))
        for size in sorted(sizes, reverse=True):
            leaves = job.arguments(_stager(job, inputs, size).static)
            with inlining(), Observer(job.pool.device, leaves, restore=True).watch():
                job.run(leaves)
        return capture_ladder(job, sizes)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}, at {user_line_of(error)}") from error


def learn_batch_dims(
    buckets: Sequence[Bucket], batch: int, layout: Any, tensors: Sequence[Tensor]
) -> str | None:
    """Learns which dimensions of the outputs carry the batch, by comparing sizes.

    Args:
        buckets: what was captured.
        batch: rows of an eager call, whose result had `layout` and `tensors`.
        layout: see above.
        tensors: see above.

    Returns:
        None, or why the outputs can't be cut back to a smaller batch.
    """
    seen = {batch: [Place.of(tensor) for tensor in tensors]}
    for bucket in buckets:
        if bucket.result.layout != layout:
            return "the structure of its result, or a Python value in it, depends on the batch"
        seen.setdefault(bucket.size, [output.place for output in bucket.result.outputs])
    for bucket in buckets:
        other = next((size for size in seen if size != bucket.size), None)
        if other is None:
            continue  # one size only: the first padded call teaches the rest
        for output, there in zip(bucket.result.outputs, seen[other], strict=True):
            why = output.learn(bucket.size, there, other)
            if why is not None:
                return why
    return None


class _Body:
    """Runs the forward over static inputs and sorts what it returns by where that lies."""

    def __init__(self, job: Job, static: list[Tensor]) -> None:
        self._job = job
        self._static = static
        self._layout: Any = None
        self._outputs: list[Output | None] = []

    def __call__(self) -> list[Tensor]:
        """Returns the output tensors that lie in memory of the graph."""
        leaves = self._job.arguments(self._static)
        tensors: list[Tensor] = []
        try:
            self._layout = flatten(self._job.run(leaves), tensors, [])
        except NotATree as error:
            raise CaptureError(str(error)) from None
        owned = []
        for tensor in tensors:
            output = self._lies_outside(tensor, leaves)
            if isinstance(output, Tensor):
                owned.append(output)
            self._outputs.append(output if isinstance(output, Output) else None)
        return owned

    def result(self, weak: list[Tensor]) -> Result:
        """Returns the result, with the owned tensors replaced by `weak`."""
        rest = iter(weak)
        outputs = [_in_pool(next(rest)) if output is None else output for output in self._outputs]
        return Result(self._layout, outputs, self._job.stale)

    def _lies_outside(self, tensor: Tensor, leaves: list[Tensor]) -> Output | Tensor:
        key, place = _C.storage_key(tensor), Place.of(tensor)
        for index, leaf in enumerate(leaves):
            if tensor is leaf:
                return Output(_C.weak_ref(tensor), place, argument=index, same=True)
            if key == _C.storage_key(leaf):
                if self._job.call.roles[index].role is not BOUND:
                    return tensor.clone()  # the next call overwrites the static input it lies in
                offset = int(tensor.storage_offset()) - int(leaf.storage_offset())
                base = _C.weak_ref(tensor)
                view = _C.alias(base, tensor.shape, tensor.stride(), offset)
                return Output(view, place, argument=index)
        if key in self._job.outside:
            same = tensor is self._job.outside[key]
            return Output(tensor, place, outside=True, same=same)
        if tensor.device != self._job.pool.device:  # a constant on the host
            return Output(tensor, place, outside=True, same=True)
        return tensor


def _in_pool(weak: Tensor) -> Output:
    return Output(weak, Place.of(weak))


def _stager(job: Job, inputs: StaticInputs, size: int) -> Stager:
    """Returns the stager of one size, its static inputs holding rows of the call.

    Emulation reads them while it captures, and a warm-up does so everywhere.
    """
    static = inputs.at(size)
    rows = min(job.call.batch, size)
    leaves = [
        tensor if role.dim is None or role.role is BOUND else tensor.narrow(role.dim, 0, rows)
        for tensor, role in zip(job.call.leaves, job.call.roles, strict=True)
    ]
    Stager(static, job.call, size, "edge").stage(leaves, rows)
    return Stager(static, job.call, size, job.pad)


def _progress(job: Job, sizes: list[int]) -> "tqdm[int]":
    # None: only on a terminal. Captures that are over within a second show nothing.
    return tqdm(
        sizes,
        desc=f"graphcache: capturing {job.name}",
        unit="size",
        leave=False,
        delay=0.0 if job.progress else 1.0,
        disable=None if job.progress is None else not job.progress,
    )
