"""Watches one eager forward: what it reads and writes by address, and what a graph can't hold.

The first call of every signature runs under `OpRecorder`. What it finds decides everything after: which
arguments are bound, whether rows may be padded, what has to be guarded, whether to capture at all.
"""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache import _C
from graphcache.errors import describe
from graphcache.runtime.host_transfers import Constants, HostReads, Key
from graphcache.runtime.op_info import obstacle, overrides_dispatch, take_apart, tensors_in, mutated_by
from graphcache.runtime.source_lines import user_line
from graphcache.runtime.torch_state import SavedState, restored_afterwards, uncached_autocast, uncompiled
from graphcache.tracing.checksums import Checksums

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_TAKES_STORAGE = (_aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset)


def _holder(tensor: Tensor, seen_in: list[Any], references: int) -> str | None:
    """Returns the type of what holds `tensor` besides `seen_in`, the caller, and frames that die late.

    Args:
        tensor: what may be held.
        seen_in: a list that holds it.
        references: how many more there are to it than those two have.
    """
    known = id(seen_in), id(sys._getframe(0)), id(sys._getframe(1))
    for holder in gc.get_referrers(tensor):
        kind = type(holder).__name__
        if id(holder) not in known and kind not in ("frame", "list_iterator"):
            return kind
    # What was frozen is not told of: then any other reference counts.
    return "container (frozen by gc.freeze)" if references > 0 and gc.get_freeze_count() else None


def _has_storage(value: Any) -> bool:
    """Tells whether `value` is a tensor that lies in one storage."""
    return (
        issubclass(type(value), Tensor)  # not isinstance: some objects warn when they are asked
        and torch._C._has_storage(value)
        and value.layout is torch.strided
        and not overrides_dispatch(value)
    )


class _Report(HostReads):
    def __init__(self, recorder: "OpRecorder") -> None:
        super().__init__(recorder.device)
        self._observer = recorder

    def found(self, what: str) -> None:
        self._observer.blocked(f"{what} at {user_line()}")

    def addressed(self, tensor: Tensor) -> None:
        super().addressed(tensor)
        self._observer.note_addressed(tensor)


class OpRecorder(TorchDispatchMode):
    """Runs operations as they are and keeps book of the storages that they touch.

    Args:
        device: where the graphs are to be.
        inputs: the tensors that the forward is given.
        restore: put back what the forward wrote.
        outside: what it may write to past torch's operators.

    Attributes:
        external: a tensor for each storage that the forward neither was given nor made, by its key; an
            alias, so that nobody takes it for the one that somebody holds.
        written: keys of the storages written to that the forward did not make.
        blocker: the first thing that a graph can't hold, with file and line, or None.
        draws: whether random numbers were drawn.
        constants: what it made of numbers and lists on the device, or None; see `Constants`.
        saved: with `restore`, the state to put back; see `SavedState`.
    """

    def __init__(
        self,
        device: torch.device,
        inputs: Iterable[Tensor],
        *,
        restore: bool,
        outside: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.device = device
        self.external: dict[int, Tensor] = {}
        self.mutated: set[int] = set()
        self.blocker: str | None = None
        self.draws = False
        self.constants: dict[Key, Tensor] | None = None
        self.saved = SavedState() if restore else None
        given = list(inputs)
        self._suspects = [*given, *outside]
        self._bytes = Checksums(())
        self._inputs = {_C.storage_key(tensor) for tensor in given}
        # Weak references keep the keys of dead storages from being used again.
        self._made: dict[int, StorageWeakRef] = {}
        self._constants: set[int] = set()  # of those, what was written out in the source
        # By identity: what operations gave, the arguments, and what came from elsewhere.
        self._known = {id(tensor): ref(tensor) for tensor in given}
        self._reached: dict[int, ref[Tensor]] = {}

    def blocked(self, why: str) -> None:
        """Notes why this forward can't be captured; the first reason counts."""
        self.blocker = self.blocker or why

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Observes what runs inside the block; with `restore`, undoes its writes afterwards."""
        before, host_before = self._random_state(), torch.get_rng_state()
        self._bytes = Checksums(t for t in self._suspects if t.device == self.device)
        host = _Report(self)
        constants = Constants(self.device, read=self.note_read, learned=self._note_constant)
        try:
            # The autocast cache would hide which parameters are read, and outlive a capture.
            with uncached_autocast(), uncompiled(), constants, host, self:
                yield
        finally:
            self.constants = constants.made if constants.used else None
            self.draws = not torch.equal(before, self._random_state())
            if self.device.type != "cpu" and not torch.equal(host_before, torch.get_rng_state()):
                self.blocked("it draws random numbers from the generator of the CPU")
            for tensor in self._bytes.changed(self.mutated):
                self._note_mutated_unseen(tensor)
            if self.saved is not None:
                self.saved.restore()
                self._set_random_state(before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = take_apart(func, args, kwargs, self)
        if parts is not NotImplemented:
            return parts
        for tensor in tensors_in(args, kwargs):
            if overrides_dispatch(tensor):
                kind = type(tensor)
                self.blocked(
                    f"it uses a tensor subclass ({kind.__module__}.{kind.__qualname__}) at {user_line()}"
                )
                return func(*args, **kwargs)
        why = obstacle(func, args, kwargs, self.device)
        if why is not None:
            self.blocked(f"{why}, at {user_line()}")
        if func in _INDEXING and any(_C.storage_key(t) in self._constants for t in tensors_in(args[1])):
            self.blocked(
                f"{func} takes its index from a list, which is copied from the host, at {user_line()}; "
                "make it a tensor on the device, once, or use slices"
            )
        constant = func is _aten.lift_fresh.default
        for tensor in tensors_in(args, kwargs):
            if constant:
                self._note_made(tensor)
                self._constants.add(_C.storage_key(tensor))
            else:
                self.note_read(tensor)
        for tensor in mutated_by(func, args, kwargs):
            self._note_mutated(tensor)
        there = self._storages_before if func in _TAKES_STORAGE else None
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            if there is not None:
                self._note_taken_over(tensor, there)
            self._note_made(tensor)
        return result

    def _note_taken_over(self, tensor: Tensor, there: set[int]) -> None:
        """Notes a storage that no operation read: so cuDNN takes over the one of all its weights."""
        key = _C.storage_key(tensor)
        if key in there and key not in self._made and key not in self._inputs:
            self._hold(key, tensor)

    @cached_property
    def _storages_before(self) -> set[int]:
        """Keys of the storages of all tensors that there were when one first took over a storage."""
        return {_C.storage_key(value) for value in gc.get_objects() if _has_storage(value)}

    def note_read(self, tensor: Tensor) -> None:
        """Notes a tensor that the forward has got hold of."""
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
            return
        known = self._known.get(id(tensor))
        if known is not None and known() is tensor:
            return
        key = _C.storage_key(tensor)
        if key in self._made:
            return  # a view that no operation made, such as x.data
        if tensor.is_quantized:
            self.blocked(f"a quantised tensor is read at {user_line()}")
            return
        self._reached[id(tensor)] = ref(tensor)
        if key not in self._inputs:
            self._hold(key, tensor)

    def note_addressed(self, tensor: Tensor) -> None:
        """Notes a tensor that a kernel past torch's operators is about to be given."""
        self.note_read(tensor)
        if tensor.layout is torch.strided and _C.storage_key(tensor) not in self._made:
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                self._bytes.add(tensor)
                if self.saved is not None:
                    self.saved.save(tensor)

    def _note_constant(self, tensor: Tensor) -> None:
        """Notes a tensor that is ours, and which the forward sees copies of."""
        self._inputs.add(_C.storage_key(tensor))
        self._known[id(tensor)] = ref(tensor)

    def _hold(self, key: int, tensor: Tensor) -> None:
        if key not in self.external:
            self.external[key] = _C.alias(
                tensor, tensor.shape, tensor.stride(), int(tensor.storage_offset())
            )

    def _note_mutated(self, tensor: Tensor) -> None:
        key = _C.storage_key(tensor)
        if key not in self._made:
            self.mutated.add(key)
            if self.saved is not None:
                self.saved.save(tensor)

    def _note_mutated_unseen(self, tensor: Tensor) -> None:
        key = _C.storage_key(tensor)
        self.mutated.add(key)
        if key not in self._inputs:
            self._hold(key, tensor)
        if self.device.type == "cpu":
            self.blocked("it writes to memory past torch's operators, which emulation can't record")

    def _note_made(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
            self.blocked(f"{kind} is made at {user_line()}")
            return
        if tensor.is_quantized:
            self.blocked(f"a quantised tensor is made at {user_line()}")
            return
        if id(tensor) not in self._reached:
            self._known[id(tensor)] = ref(tensor)
        key = _C.storage_key(tensor)
        if key not in self.external and key not in self._inputs and key not in self._made:
            self._made[key] = StorageWeakRef(tensor.untyped_storage())

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Puts back afterwards what was seen to be written, and the generator; watches nothing."""
        before = self._random_state()
        try:
            with restored_afterwards(self.mutated_external()):
                yield
        finally:
            self._set_random_state(before)

    def mutated_external(self) -> list[Tensor]:
        """Returns a tensor for each storage that was written to and that the forward did not make."""
        known = [*self.external.values(), *self._suspects]
        written = {_C.storage_key(tensor): tensor for tensor in known}
        return [tensor for key, tensor in written.items() if key in self.mutated]

    def reached(self) -> list[Tensor]:
        """Returns the tensors that came from elsewhere and that somebody holds still."""
        return [tensor for known in self._reached.values() if (tensor := known()) is not None]

    def mutated_positions(self, tensors: Iterable[Tensor]) -> list[int]:
        """Returns the places of those that were written to."""
        return [i for i, tensor in enumerate(tensors) if _C.storage_key(tensor) in self.mutated]

    def kept(self, result: Iterable[Tensor]) -> str | None:
        """Describes something that the forward made and that lives on besides its result, or None.

        Call it when nothing of the call is under way any more.
        """
        returned = {_C.storage_key(tensor) for tensor in result}

        def alive() -> set[int]:
            made = {key for key, storage in self._made.items() if not storage.expired()}
            return made - returned

        if not alive():
            return None
        gc.collect()  # a cycle of objects dies late
        keys = alive()
        objects = gc.get_objects() if keys else []
        for tensor in [object()]:
            usual = sys.getrefcount(tensor)
        for tensor in objects:
            references = sys.getrefcount(tensor) - usual
            if (
                _has_storage(tensor)
                and _C.storage_key(tensor) in keys
                and (holder := _holder(tensor, objects, references)) is not None
            ):
                return f"a tensor that it made ({describe(tensor)}) and that a {holder} keeps"
        for tensor in self.reached():
            # torch holds it, where Python does not see.
            grad = tensor.grad if tensor.is_leaf and tensor.requires_grad else None
            if grad is not None and _C.storage_key(grad) in keys:
                return f"a gradient that it made ({describe(grad)}); use torch.autograd.grad inside"
        return None

    def _random_state(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _set_random_state(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
