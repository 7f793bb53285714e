"""Captures the sizes of one signature: the ladder, what a failure leaves, and what a warm-up may not."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from graphcache import _C, config
from graphcache.call import pytree
from graphcache.call.bound_call import BOUND, BoundCall
from graphcache.call.modes import inlining
from graphcache.call.pytree import NotATree, flatten
from graphcache.capture.bucket import AFTER, Bucket
from graphcache.capture.outputs import Output, Place, Result
from graphcache.capture.static_inputs import TorchInputCopier, StaticInputs, native_input_copier
from graphcache.config import Pad, Stale
from graphcache.errors import CaptureError
from graphcache.pool import GraphPool, Lane
from graphcache.runtime import loaded_kernels
from graphcache.runtime.base import Graph
from graphcache.runtime.host_transfers import Constants, Key
from graphcache.runtime.source_lines import user_line_of
from graphcache.runtime.torch_state import restored_afterwards, uncached_autocast
from graphcache.tracing.op_recorder import OpRecorder

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """What is to be captured.

    Attributes:
        name: of the forward, for messages.
        function: the forward itself.
        call: the first call of its signature.
        outside: a tensor for each storage that the forward reached and was not given, by its key.
        reached: the tensors themselves, by identity, as far as somebody holds them.
        written: a tensor for each storage that it writes to and did not make.
        draws: whether it draws random numbers.
        constants: what it makes of numbers and lists on the device; None where it makes nothing of any.
        compiled: whether `torch.compile` makes some of it, which has to be done before a capture.
        pool, pad, stale, progress: see `cuda_graphed`.
    """

    name: str
    function: Callable[..., Any]
    call: BoundCall
    outside: dict[int, Tensor]
    reached: dict[int, Tensor]
    written: list[Tensor]
    draws: bool
    constants: dict[Key, Tensor] | None
    compiled: bool
    pool: GraphPool
    pad: Pad
    stale: Stale
    progress: bool | None

    def arguments(self, static: list[Tensor]) -> list[Tensor]:
        """Returns the tensors of the call: static inputs where it is staged, its own where bound."""
        leaves = list(self.call.tensors)
        for (index, _), tensor in zip(self.call.copied_in(), static, strict=True):
            leaves[index] = tensor
        return [leaves[first] for first in self.call.identities]

    def run(self, leaves: list[Tensor]) -> Any:
        """Runs the forward over other tensors than the caller's."""
        args, kwargs = self.call.arguments(leaves)
        return self.function(*args, **kwargs)


def capture_ladder(job: Job, sizes: Sequence[int]) -> list[Bucket]:
    """Captures one graph per size, largest first, into one lane of the pool.

    The largest size takes the memory; as its outputs are weak references, all of that is free again
    when the next size is captured. The order, the one pool and the weak references together are
    vLLM's (pull request 9724). Sizes that do not fit into the device are left out.

    Raises:
        Exception: what stopped the capture of a size.
    """
    inputs = StaticInputs(job.call, max(sizes))
    kernel, native = _staging(job, inputs, max(sizes))
    lane = job.pool.lane()
    buckets: list[Bucket] = []
    with job.pool.runtime.ladder(job.pool.device), inlining(), uncached_autocast(), _constants(job):
        for size in _progress(job, sorted(sizes, reverse=True)):
            static = inputs.at(size)
            stage = native_input_copier(static, job.call, job.pad) if native else None
            body = _Body(job, static)
            try:
                graph, weak = lane.capture(body, stage, kernel)
            except torch.OutOfMemoryError:
                logger.warning("graphcache: %s: size %d does not fit into memory", job.name, size)
                lane = job.pool.lane_after(lane)
                continue
            buckets.append(_bucket(job, size, lane, graph, static, stage, body.result(weak)))
    loaded = loaded_kernels.loaded() if buckets else []
    for bucket in buckets:
        bucket.kernels = loaded
    return buckets


def _constants(job: Job) -> AbstractContextManager[Any]:
    # Compiled code is compiled without such a mode, and knows its constants.
    if job.constants is None or job.compiled:
        return nullcontext()
    return Constants(job.pool.device, job.constants)


def _staging(job: Job, inputs: StaticInputs, largest: int) -> tuple[_C.CopyInKernel | None, bool]:
    """Puts rows of the call into the static inputs, and says how calls to come will get there.

    Returns:
        The kernel of the staging nodes, if there are any, and whether native code stages at all.
    """
    # Emulation reads them while it captures.
    static = inputs.at(largest)
    _fill(job, static, largest)
    if config.is_portable():
        return None, False
    try:
        stage = native_input_copier(static, job.call, job.pad)
        return job.pool.runtime.prepare(stage, job.pool.device), True
    except RuntimeError as error:
        logger.warning("graphcache: %s is staged by torch calls: %s", job.name, error)
        return None, False


def _bucket(
    job: Job,
    size: int,
    lane: Lane,
    graph: Graph,
    static: list[Tensor],
    stage: _C.InputCopier | None,
    result: Result,
) -> Bucket:
    by_driver = graph.node is not None and not job.draws
    native = _C.Bucket(
        job.name,
        size,
        lane.native,
        stage,
        graph.node,
        TorchInputCopier(static, job.call, size, job.pad).stage,
        None if by_driver else graph.replay,
        pytree.native(result.layout, job.call.static_objects()),
        [output.native() for output in result.outputs],
        job.stale == "copy",
    )
    native.time_at = AFTER
    launch = "torch" if stage is None else "copies" if graph.node is None else "node"
    constants = list((job.constants or {}).values())
    return Bucket(size, graph, lane, static, result, native, launch, constants=constants)


def capture_or_warm_up(job: Job, sizes: Sequence[int]) -> list[Bucket]:
    """Captures the ladder; where that fails, warms every size up for real and tries once more.

    A library that initialises itself, or tunes a kernel, at a size that it has not seen stops a
    capture, and only a real run gets it over that. Code that is to be compiled always does.

    Raises:
        CaptureError: if a graph can't hold the forward.
    """
    if not job.compiled:
        try:
            return capture_ladder(job, sizes)
        except CaptureError:  # ours: it knows what can't be captured
            raise
        except Exception as error:
            logger.debug("%s: warming up, as its capture failed", job.name, exc_info=error)
    try:
        _warm_up(job, sizes)
        return capture_ladder(job, sizes)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}, at {user_line_of(error)}") from error


def _warm_up(job: Job, sizes: Sequence[int]) -> None:
    """Runs the forward at every size, and puts back what it writes.

    That is what it wrote at the first call, also past torch's operators, and what it is seen to write.
    """
    inputs = StaticInputs(job.call, max(sizes))
    for size in sorted(sizes, reverse=True):
        static = inputs.at(size)
        _fill(job, static, size)
        leaves = job.arguments(static)
        recorder = OpRecorder(job.pool.device, leaves, restore=True)
        try:
            with inlining(), restored_afterwards(job.written):
                with recorder.watch():
                    job.run(leaves)
                if job.compiled:  # what is compiled does not run while it is watched
                    with uncached_autocast(), recorder.undone():
                        job.run(leaves)
        except torch.OutOfMemoryError:
            continue  # as its capture will


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
        bucket.native.set_batch_dims(bucket.result.batch_dims())
    return None


class _Body:
    """Runs the forward over static inputs and sorts what it returns by where that lies."""

    def __init__(self, job: Job, static: list[Tensor]) -> None:
        self._job = job
        self._static = static
        self._layout: Any = None
        self._outputs: list[Output | int | None] = []  # an argument's place: a copy of a view of it

    def __call__(self) -> list[Tensor]:
        """Returns the output tensors that lie in memory of the graph."""
        leaves = self._job.arguments(self._static)
        tensors: list[Tensor] = []
        try:
            self._layout = flatten(self._job.run(leaves), tensors, [], other=self._job.call.object_ref)
        except NotATree as error:
            raise CaptureError(str(error)) from None
        owned = []
        for tensor in tensors:
            output = self._lies_outside(tensor, leaves)
            if output is None:
                owned.append(tensor)
            elif isinstance(output, int):
                owned.append(tensor.clone())  # the next call overwrites the static input it lies in
            self._outputs.append(output)
        return owned

    def result(self, weak: list[Tensor]) -> Result:
        """Returns the result, with the owned tensors replaced by `weak`."""
        rest = iter(weak)
        outputs = [
            output if isinstance(output, Output) else _in_pool(next(rest), output)
            for output in self._outputs
        ]
        return Result(self._layout, outputs)

    def _lies_outside(self, tensor: Tensor, leaves: list[Tensor]) -> Output | int | None:
        key, place = _C.storage_key(tensor), Place.of(tensor)
        for index, leaf in enumerate(leaves):
            if tensor is leaf:
                return Output(_C.weak_ref(tensor), place, argument=index, same=True)
            if key == _C.storage_key(leaf):
                if self._job.call.roles[index].role is not BOUND:
                    return index
                offset = int(tensor.storage_offset()) - int(leaf.storage_offset())
                base = _C.weak_ref(tensor)
                view = _C.alias(base, tensor.shape, tensor.stride(), offset)
                return Output(view, place, argument=index)
        if key in self._job.outside:
            same = id(tensor) in self._job.reached
            return Output(tensor, place, outside=True, same=same)
        if tensor.device != self._job.pool.device:  # a constant on the host
            return Output(tensor, place, outside=True, same=True, constant=True)
        return None


def _in_pool(weak: Tensor, copied: int | None) -> Output:
    return Output(weak, Place.of(weak), copied=copied)


def _fill(job: Job, static: list[Tensor], size: int) -> None:
    """Puts rows of the call into static inputs of one size, the last one again where they end."""
    rows = min(job.call.batch, size)
    leaves = [
        tensor if role.dim is None or role.role is BOUND else tensor.narrow(role.dim, 0, rows)
        for tensor, role in zip(job.call.tensors, job.call.roles, strict=True)
    ]
    TorchInputCopier(static, job.call, size, "edge").stage(leaves, rows)


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
