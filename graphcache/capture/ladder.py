"""Captures the sizes of one plan: the ladder, the warm-up where a capture needs one, exact sizes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from graphcache import _C, config
from graphcache.call import pytree
from graphcache.call.modes import inlining
from graphcache.capture.body import Body
from graphcache.capture.bucket import AFTER, Bucket
from graphcache.capture.outputs import Result, find_batch_dims
from graphcache.capture.plan import CapturePlan
from graphcache.capture.static_inputs import (
    StaticInputs,
    TorchInputCopier,
    arguments_over,
    fill_rows,
    native_input_copier,
)
from graphcache.errors import CaptureError
from graphcache.pool import Lane
from graphcache.report.reasons import Reason
from graphcache.runtime import loaded_kernels
from graphcache.runtime.base import Graph
from graphcache.runtime.host_transfers import Constants
from graphcache.runtime.source_lines import user_line_of
from graphcache.runtime.torch_state import uncached_autocast, uncompiled
from graphcache.runtime.undo_log import restored_afterwards
from graphcache.tracing.python_snapshot import memos_restored

logger = logging.getLogger(__name__)


class Captured(NamedTuple):
    """The graphs of one plan.

    Attributes:
        buckets: one for each captured size.
        no_padding_reason: why they serve exactly their sizes; None where smaller batches are padded.
        complete: no sizes will be added: they were given, or no more fit into memory.
        seconds: the time that the capture took.
    """

    buckets: list[Bucket]
    no_padding_reason: str | None
    complete: bool
    seconds: float


def capture(plan: CapturePlan) -> Captured:
    """Captures all sizes of a plan; only the batch of the call where rows can't be added or cut.

    Raises:
        CaptureError: if a graph can't hold the forward.
    """
    start, batch, reason = perf_counter(), plan.call.batch, plan.no_padding_reason
    complete = False
    buckets: list[Bucket] = []
    if reason is None:
        try:
            buckets = capture_or_warm_up(plan, plan.sizes)
            reason = find_batch_dims(buckets, batch, plan.trace.layout, plan.trace.tensors)
        except CaptureError as error:
            if plan.sizes == (batch,):
                raise
            reason = f"it can't be captured at other sizes ({error})"
        complete = plan.options.sizes is not None or len(buckets) < len(plan.sizes)
    if reason is not None:
        logger.info("%s is captured at exact sizes: %s", plan.name, reason)
        buckets = [replace(each, exact_only=True) for each in capture_or_warm_up(plan, [batch])]
        if not buckets:
            raise CaptureError(f"batch {batch} does not fit into memory", reason=Reason.OUT_OF_MEMORY)
        if buckets[0].result.layout != plan.trace.layout:
            raise CaptureError(
                "its result holds a Python value that changes from call to call",
                reason=Reason.RESULT_VALUE_CHANGES,
            )
    seconds = perf_counter() - start
    sizes = [bucket.size for bucket in buckets]
    logger.info("captured %s at sizes %s in %.2f s", plan.name, sizes, seconds)
    return Captured(buckets, reason, complete, seconds)


def capture_ladder(plan: CapturePlan, sizes: Sequence[int]) -> list[Bucket]:
    """Captures one graph per size, largest first, into one lane of the pool.

    The largest size takes the memory; as its outputs are weak references, all of that is free again
    when the next size is captured. The order, the one pool and the weak references together are
    vLLM's (pull request 9724). Sizes that do not fit into the device are left out.

    Raises:
        Exception: what stopped the capture of a size.
    """
    inputs = StaticInputs(plan.call, max(sizes))
    kernel, native = _prepare_inputs(plan, inputs, max(sizes))
    lane = plan.pool.lane()
    buckets: list[Bucket] = []
    with _surroundings(plan):
        for size in _progress(plan, sorted(sizes, reverse=True)):
            static = inputs.at(size)
            copier = native_input_copier(static, plan.call, plan.options.pad) if native else None
            body = Body(plan, static)
            try:
                graph, weak = lane.capture(body, copier, kernel)
            except torch.OutOfMemoryError:
                logger.warning("graphcache: %s: size %d does not fit into memory", plan.name, size)
                lane = plan.pool.lane_after(lane)
                continue
            buckets.append(_bucket(plan, size, lane, graph, static, copier, body.result(weak)))
    loaded = loaded_kernels.loaded() if buckets else []
    for bucket in buckets:
        bucket.resources.extend(loaded)
    return buckets


@contextmanager
def _surroundings(plan: CapturePlan) -> Iterator[None]:
    """Enters what surrounds all captures of a ladder."""
    constants = plan.trace.constants
    # Compiled code is compiled without such a mode, and knows its constants.
    plain = constants is None or plan.trace.compiled
    made = nullcontext() if plain else Constants(plan.pool.device, constants)
    runtime, undo = plan.pool.runtime, plan.undo[plan.call.batch]
    begun = undo.undone() if runtime.captures_run else nullcontext()
    memos = memos_restored(plan.trace.memos)
    # Higher-order operators would compile themselves in the middle of a capture.
    eager = nullcontext() if plan.trace.compiled else uncompiled()
    with runtime.ladder(plan.pool.device), inlining(), uncached_autocast(), eager, made, begun, memos:
        yield


def _prepare_inputs(
    plan: CapturePlan, inputs: StaticInputs, largest: int
) -> tuple[_C.CopyInKernel | None, bool]:
    """Copies rows of the call into the static inputs, and finds out how later calls are copied in.

    Returns:
        The kernel of the copy-in nodes, if there are any, and whether native code copies at all.
    """
    # Emulation reads the static inputs while it captures.
    static = inputs.at(largest)
    fill_rows(plan.call, static, largest, "edge", largest)
    if config.is_portable():
        return None, False
    try:
        copier = native_input_copier(static, plan.call, plan.options.pad)
        return plan.pool.runtime.prepare(copier, plan.pool.device), True
    except RuntimeError as error:
        logger.warning("graphcache: %s is copied in by torch calls: %s", plan.name, error)
        return None, False


def _bucket(
    plan: CapturePlan,
    size: int,
    lane: Lane,
    graph: Graph,
    static: list[Tensor],
    copier: _C.InputCopier | None,
    result: Result,
) -> Bucket:
    by_driver = graph.node is not None and not plan.trace.draws_random
    copy_in = TorchInputCopier(static, plan.call, size, plan.options.pad).copy_in
    native = _C.Bucket(
        name=plan.name,
        size=size,
        lane=lane.native,
        launch=_C.Launch(copier, graph.node, copy_in, None if by_driver else graph.replay),
        result=_C.Result(
            pytree.native(result.layout, plan.call.static_objects()),
            [output.native() for output in result.outputs],
            copy=plan.options.stale == "copy",
        ),
        guard=plan.guards.native,
        mutated=plan.dependencies.mutated,
    )
    native.time_at = AFTER
    given = (_C.storage_key(tensor) for tensor in plan.call.tensors)
    graph.release({*plan.trace.external, *given})
    launch = "torch" if copier is None else "copies" if graph.node is None else "node"
    resources = [graph, *(plan.trace.constants or {}).values()]
    effects = plan.trace.effects
    return Bucket(
        size,
        lane,
        static,
        result,
        native,
        plan.dependencies,
        launch,
        resources,
        has_effects=bool(effects),
        makes_values=effects.makes_values,
    )


def capture_or_warm_up(plan: CapturePlan, sizes: Sequence[int]) -> list[Bucket]:
    """Captures the ladder; where that fails, warms every size up for real and tries once more.

    Compiled code stops a capture, and so does a library that tunes a kernel for the static inputs.
    Only a real run gets them over that.

    Raises:
        CaptureError: if a graph can't hold the forward.
    """
    if not plan.trace.compiled:
        try:
            return capture_ladder(plan, sizes)
        except CaptureError:  # ours: it knows what can't be captured
            raise
        except Exception as error:
            logger.debug("%s: warming up, as its capture failed", plan.name, exc_info=error)
    try:
        _warm_up(plan, sizes)
        return capture_ladder(plan, sizes)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {error}, at {user_line_of(error)}") from error


def _warm_up(plan: CapturePlan, sizes: Sequence[int]) -> None:
    """Runs the forward at every size that was traced, without a lasting effect.

    Compiled code did not run while it was traced. Each run begins from the state that the first call
    began from: that may have filled the last place of a cache.
    """
    inputs = StaticInputs(plan.call, max(sizes))
    undo = plan.undo[plan.call.batch]
    device = plan.pool.device
    for size in sorted({*sizes} & plan.undo.keys(), reverse=True):
        static = inputs.at(size)
        fill_rows(plan.call, static, size, "edge", size)
        mutated = () if undo.is_complete else plan.trace.mutated
        try:
            with (
                inlining(),
                uncached_autocast(),
                torch.random.fork_rng([] if device.type == "cpu" else [device]),
                restored_afterwards(mutated),
                plan.undo[size].protected(),
                undo.undone(),
            ):
                plan.run(arguments_over(plan.call, static, plan.options.pad))
        except torch.OutOfMemoryError:
            continue  # as its capture will


def _progress(plan: CapturePlan, sizes: list[int]) -> "tqdm[int]":
    # None: only on a terminal. Captures that are over within a second show nothing.
    progress = plan.options.progress
    return tqdm(
        sizes,
        desc=f"graphcache: capturing {plan.name}",
        unit="size",
        leave=False,
        delay=0.0 if progress else 1.0,
        disable=None if progress is None else not progress,
    )
