"""The trace of one instrumented run of a forward: all facts that a capture depends on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import inlining
from graphcache.call.pytree import NotATree, attributes_of_tensor, flatten
from graphcache.errors import describe
from graphcache.guards.guards import ReadSet
from graphcache.guards.reachability import DEPTH
from graphcache.report.reasons import Reason
from graphcache.runtime.host_transfers import Key
from graphcache.runtime.op_schemas import tensors_in
from graphcache.runtime.torch_state import uncollected
from graphcache.runtime.undo_log import UndoLog
from graphcache.tracing.effects import Effects
from graphcache.tracing.hooks import Hook
from graphcache.tracing.leaks import find_leak
from graphcache.tracing.op_recorder import OpRecorder
from graphcache.tracing.python_recorder import PythonRecorder
from graphcache.tracing.python_snapshot import Change, Snapshot
from graphcache.tracing.stand_in import is_stand_in


class Forward(NamedTuple):
    """A forward and the instance that it is bound to; None where it is a plain function."""

    function: Callable[..., Any]
    instance: Any

    def run(self, call: BoundCall) -> Any:
        """Runs the forward with the arguments as the caller gave them."""
        return self.function(*call.args, **call.kwargs)


@dataclass(frozen=True)
class Trace:
    """The facts of one run; two of them can be laid side by side, at any sizes.

    Attributes:
        result: what eager returned.
        layout: how the tensors of the result nest; None where `blocker` tells why no graph returns it.
        tensors: the tensors of the result, in order.
        external: a tensor for each storage that the forward neither was given nor made, by its key.
        reached: the tensors themselves, as far as somebody holds them.
        mutated: a tensor for each storage that the forward mutated and did not make.
        mutated_keys: the keys of these storages, and of those that are gone.
        raised: tensors whose version counter the forward raised: autograd then knows that they changed.
        draws_random: whether random numbers were drawn on the device.
        constants: the tensors made of numbers and lists on the device; None where there are none.
        asks_for_capture: whether the forward asked if a capture is under way.
        compiled: whether `torch.compile` makes some of it; that ran as it was before.
        blocker: the first thing that no graph can hold, and its kind; or None.
        python_mutations: names of the Python values that the forward changed.
        replaced: the places of Python values that the forward changed; None where it changed some in
            another way.
        effects: those changes that each replay will repeat; they are not among `python_mutations`.
        leak: a tensor that the forward made and that somebody keeps; or None.
        read_set: the code that ran, and what it can read.
        undo: puts back what the run overwrote outside what it made.
        snapshot: the Python values before the run, if they are the same after it; or None.
        memos: tables of results that functions keep, as `functools.lru_cache` does.
        effect: something that the run did and that nothing puts back, such as printing; or None.
        hooks: the hooks of submodules that ran.
        bears_nan: whether NaN in the arguments can't make a kernel stop the device.
        hides_nan: whether an operation can make NaN of its arguments disappear.
    """

    result: Any
    layout: Any
    tensors: list[Tensor]
    external: dict[int, Tensor]
    reached: list[Tensor]
    mutated: list[Tensor]
    mutated_keys: frozenset[int]
    raised: list[Tensor]
    draws_random: bool
    constants: dict[Key, Tensor] | None
    asks_for_capture: bool
    compiled: bool
    blocker: tuple[str, Reason] | None
    python_mutations: list[str]
    replaced: list[Change] | None
    effects: Effects
    leak: str | None
    read_set: ReadSet
    undo: UndoLog
    snapshot: Snapshot | None
    memos: list[dict[Any, Any]]
    effect: str | None
    hooks: list[Hook]
    bears_nan: bool
    hides_nan: bool

    @property
    def changes(self) -> list[str]:
        """The Python values that the forward changed, or the tensor that it left behind."""
        return self.python_mutations or ([] if self.leak is None else [self.leak])

    def covers(self, other: "Trace") -> bool:
        """Return True if another run can't have read anything that this one did not."""
        reached = {id(tensor) for tensor in self.reached}
        return (
            other.read_set.ran.keys() <= self.read_set.ran.keys()
            and other.external.keys() <= self.external.keys()
            and all(id(tensor) in reached for tensor in other.reached)
        )

    def united(self, other: "Trace") -> "Trace":
        """Returns this trace, with what another run of the forward reached and could read."""
        reached = {id(tensor): tensor for tensor in (*self.reached, *other.reached)}
        constants = [each.constants for each in (self, other) if each.constants is not None]
        return replace(
            self,
            external=self.external | other.external,
            reached=list(reached.values()),
            constants={key: made for each in constants for key, made in each.items()}
            if constants
            else None,
            read_set=self.read_set.united(other.read_set),
            memos=[*self.memos, *other.memos],
            bears_nan=self.bears_nan and other.bears_nan,
            hides_nan=self.hides_nan or other.hides_nan,
        )

    def made(self, call: BoundCall) -> list[Tensor]:
        """Returns the tensors of the result that the forward made itself."""
        given = {_C.storage_key(tensor) for tensor in call.tensors} | self.external.keys()
        return [tensor for tensor in self.tensors if _C.storage_key(tensor) not in given]

    def mutated_positions(self, call: BoundCall) -> list[int]:
        """Returns the positions of the arguments that the forward mutated."""
        return [i for i, t in enumerate(call.tensors) if _C.storage_key(t) in self.mutated_keys]


@uncollected()
def trace_forward(
    forward: Forward, call: BoundCall, *, restore: bool, again: Snapshot | None = None
) -> Trace:
    """Runs the forward once, recorded.

    Args:
        forward: the forward.
        call: its arguments.
        restore: put back all that the run changed: tensors, Python values, the generator.
        again: the snapshot of an earlier trace, after which the Python values are as they were. It is
            known by then whether the forward writes past torch's operators.

    Raises:
        Exception: what the forward raised.
    """
    python = PythonRecorder(forward.instance, forward.function, (call.args, call.kwargs), again)
    for passed in call.objects:
        python.snapshot.walk(passed.value, passed.name, 2 * DEPTH)
    held = (tensor for passed in call.objects for tensor in passed.tensors)
    ops = OpRecorder(
        call.tensors[0].device,
        call.tensors,
        restore=restore,
        suspects=() if again is not None else (*python.snapshot.tensors.values(), *held),
    )
    try:
        with inlining(), ops.record(), python.record():
            result = forward.run(call)
    except BaseException:
        python.changed(restore=restore)
        raise
    # At once: it lets go of what was there before.
    mutations, snapshot, replaced = python.changed(restore=restore)
    tensors: list[Tensor] = []
    layout, blocker = None, None
    try:
        layout = flatten(result, tensors, [], other=call.object_ref)
    except NotATree as error:
        blocker = str(error), Reason.RESULT_TYPE
    for tensor in tensors:
        ops.note_read(tensor)
    # Before the trace itself holds anything of the call.
    leak = None
    if blocker is None and (not mutations or (restore and replaced is not None)):
        kept = [*tensors, *tensors_in([c.after for c in replaced or () if not is_stand_in(c.after)])]
        leak = find_leak(ops.made, kept, ops.reached())
    reached = ops.reached()
    return Trace(
        result=result,
        layout=layout,
        tensors=tensors,
        external=ops.external,
        reached=reached,
        mutated=ops.mutated_external(),
        mutated_keys=frozenset(ops.mutated),
        raised=[tensor for tensor in (*call.tensors, *reached) if ops.raised_version_of(tensor)],
        draws_random=ops.draws_random,
        constants=ops.constants,
        asks_for_capture=python.asks,
        compiled=python.compiled,
        blocker=blocker
        or ops.blocker
        or result_blocker(tensors, (*call.tensors, *reached), ops.external)
        or python.blocker,
        python_mutations=mutations,
        replaced=replaced,
        effects=Effects(),
        leak=leak,
        read_set=python.read_set(),
        undo=ops.undo,
        snapshot=snapshot,
        memos=python.memos,
        effect=python.effect,
        hooks=list(python.hooks.found.values()),
        bears_nan=ops.bears_nan(),
        hides_nan=ops.hides_nan,
    )


def result_blocker(
    tensors: list[Tensor], given: tuple[Tensor, ...], external: dict[int, Tensor]
) -> tuple[str, Reason] | None:
    """Describes a tensor that the forward made and that is more than its data."""
    there = {id(tensor) for tensor in given}
    for tensor in tensors:
        if id(tensor) in there or tensor.grad_fn is not None:
            continue
        if attributes := attributes_of_tensor(tensor):
            what = f"with attributes ({', '.join(attributes)})"
        elif type(tensor) is not Tensor:
            what = "made an nn.Parameter"
        # A view of a parameter, made without grad, requires it; replays return such a view too.
        elif tensor.requires_grad and _C.storage_key(tensor) not in external:
            what = "that requires grad"
        else:
            continue
        text = f"it returns a tensor {what}, which no graph makes ({describe(tensor)})"
        return text, Reason.RESULT_TENSOR
    return None
