"""What a first call has shown: the forward runs eagerly, once, and everything that matters is noted."""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BOUND, BoundCall
from graphcache.call.modes import inlining
from graphcache.call.pytree import attributes_of_tensor, flatten
from graphcache.config import Pad
from graphcache.errors import CaptureError, describe
from graphcache.guards.guards import Guards
from graphcache.report.reasons import Bypass
from graphcache.runtime.torch_state import uncollected
from graphcache.tracing.op_recorder import OpRecorder
from graphcache.tracing.python_recorder import PythonRecorder

logger = logging.getLogger(__name__)

PAD_IS_MISSING = "it writes to outside state, and pad does not say what a padded row must hold"
COMPILED_TO_GRAPHS = (
    "torch.compile makes CUDA graphs of it (mode='reduce-overhead' or 'max-autotune'), which no graph "
    "can hold; compile it with mode='default' or 'max-autotune-no-cudagraphs'"
)
GIVE_PAD = (
    "its forward writes to state outside itself (a cache, a buffer), so it is captured at exactly the "
    "batch sizes that it is called with. To have it padded, say what a padded row must hold so that it "
    "writes nowhere that counts: pad={'argument': value}"
)


@uncollected()
def trace(function: Callable[..., Any], instance: Any, call: BoundCall, *, restore: bool) -> "Trace":
    """Runs the forward under observation; with `restore`, what it wrote is put back."""
    reads = PythonRecorder(instance, function, (call.args, call.kwargs))
    suspects = [*reads.tensors, *(tensor for passed in call.objects for tensor in passed.tensors)]
    recorder = OpRecorder(call.tensors[0].device, call.tensors, restore=restore, outside=suspects)
    with inlining(), recorder.watch(), reads.watch():
        result = function(*call.args, **call.kwargs)
    return Trace(result, recorder, reads, call)


class Trace:
    """The result of an observed call, and what it says about graphs.

    Attributes:
        result: what eager returned.
        observer: the tensors and operations that the forward came across.
        tensors: those of the result, once `layout` was asked for.
    """

    def __init__(self, result: Any, recorder: OpRecorder, reads: PythonRecorder, call: BoundCall) -> None:
        self.result = result
        self.recorder = recorder
        self.tensors: list[Tensor] = []
        self._reads = reads
        self._call = call
        self._changed = reads.changed()  # at once: it lets go of what was there before

    def layout(self) -> Any:
        """Returns the shape of the result's containers.

        Raises:
            NotATree: if it holds something that a graph could not return again.
        """
        self.tensors = []
        layout = flatten(self.result, self.tensors, [], other=self._call.object_ref)
        for tensor in self.tensors:
            self.recorder.note_read(tensor)
        return layout

    @property
    def asks(self) -> bool:
        """Whether the forward asks if a capture is under way."""
        return self._reads.asks

    @property
    def compiled(self) -> bool:
        """Whether `torch.compile` made some of the forward; it ran as it was before that."""
        return self._reads.compiled

    def check(self) -> None:
        """Raises `CaptureError` if a graph can't do what the forward did."""
        if self.recorder.blocker is not None:
            raise CaptureError(self.recorder.blocker)
        self._check_result()
        if self._reads.captures:
            raise CaptureError(COMPILED_TO_GRAPHS)
        if self._reads.launches:
            what = self._reads.launches
            raise CaptureError(f"it {what}: such kernels may run on a stream that no capture sees")
        if self._reads.seeded:
            raise CaptureError(f"it sets the state of a random generator ({self._reads.seeded})")
        if self._reads.drew_on_the_host():
            raise CaptureError("it draws random numbers of Python's or numpy's, which a graph freezes")

    def _check_result(self) -> None:
        """Raises `CaptureError` for a tensor that it made and that is more than its data."""
        there = {id(tensor) for tensor in (*self._call.tensors, *self.recorder.reached())}
        for tensor in self.tensors:
            if id(tensor) in there or tensor.grad_fn is not None:
                continue
            if attributes := attributes_of_tensor(tensor):
                what = f"with attributes ({', '.join(attributes)})"
            elif type(tensor) is not Tensor:
                what = "made an nn.Parameter"
            # A view of a parameter, made without grad, requires it; replays return such a view too.
            elif tensor.requires_grad and _C.storage_key(tensor) not in self.recorder.external:
                what = "that requires grad"
            else:
                continue
            raise CaptureError(f"it returns a tensor {what}, which no graph makes ({describe(tensor)})")

    @cached_property
    def changed(self) -> list[str]:
        """The Python values that the forward changed, and what it left behind."""
        if self._changed:
            return self._changed
        kept = self.recorder.kept(self.tensors)
        return [] if kept is None else [kept]

    def guards(self, instance: Any) -> Guards:
        """Returns what the forward's graphs depend on besides its arguments.

        Raises:
            CaptureError: where an address that it reaches can't be captured safely.
            Unservable: where hooks would run inside it.
        """
        kept = {id(tensor) for passed in self._call.objects for tensor in passed.tensors}
        reached = [tensor for tensor in self.recorder.reached() if id(tensor) not in kept]
        theirs = {_C.storage_key(tensor) for passed in self._call.objects for tensor in passed.tensors}
        outside = [tensor for key, tensor in self.recorder.external.items() if key not in theirs]
        guards = Guards.find(instance, self._reads.read_set(), reached, outside)
        if guards.hooked is not None:
            raise Bypass(f"hooks inside the forward, on {guards.hooked}")
        if guards.iterators:
            what = guards.iterators[0]
            raise CaptureError(f"it reads an iterator, {what}, which no graph advances; keep an index")
        for tensor in self.recorder.external.values():
            if tensor.device != self.recorder.device:
                raise CaptureError(f"it reads a tensor on {tensor.device} ({describe(tensor)})")
            if _C.is_weak(tensor):
                raise CaptureError(
                    f"it reads an output of a graph that was kept ({describe(tensor)}); keep a .clone()"
                )
        if guards.unguarded:
            raise CaptureError(
                f"it reaches a tensor ({describe(guards.unguarded[0])}) in a way that can't be "
                "watched; make it an argument, a buffer or an attribute"
            )
        return guards

    def why_exact(self, call: BoundCall, pad: Pad) -> str | None:
        """Says why rows may not be added to this forward, or returns None."""
        if self.recorder.draws:
            return "it draws random numbers, and padded rows would draw some too"
        if any(role.role is BOUND and role.dim is not None for role in call.roles):
            return "an argument that is bound by address carries the batch"
        if not self.recorder.mutated or pad is not None:
            return None
        # What a caller passes for this batch alone, such as a cache, need not fit another.
        passed = {_C.storage_key(tensor) for kept in call.objects for tensor in kept.tensors}
        if self.recorder.mutated <= passed:
            return "it writes to an object that it is passed, and pad does not say where else"
        return PAD_IS_MISSING

    def written(self, call: BoundCall) -> _C.MutatedMemory:
        """Returns what the forward wrote outside, and which arguments that are."""
        recorder = self.recorder
        return _C.MutatedMemory(
            [_C.owned(tensor) for key, tensor in recorder.external.items() if key in recorder.mutated],
            recorder.mutated_positions(call.tensors),
            [index for index, _ in call.copied_in()],
        )

    def made(self, call: BoundCall) -> list[Tensor]:
        """Returns the tensors of the result that the forward made itself."""
        theirs = {_C.storage_key(tensor) for tensor in call.tensors} | self.recorder.external.keys()
        return [tensor for tensor in self.tensors if _C.storage_key(tensor) not in theirs]
