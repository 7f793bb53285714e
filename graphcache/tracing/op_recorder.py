"""Records the operations of one eager forward: the memory that they touch, and what no graph can hold.

The first call of every signature runs under `OpRecorder`. Its record decides everything after: which
arguments are bound, whether rows may be padded, what is guarded, whether to capture at all.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from graphcache import _C, config
from graphcache.report.reasons import Reason, text_of
from graphcache.runtime.host_transfers import Constants, HostReads, Key
from graphcache.runtime.obstacles import Obstacle, is_plain, obstacle
from graphcache.runtime.op_schemas import (
    bears_nan,
    discretises,
    mutated_by,
    overrides_dispatch,
    take_apart,
    tensors_in,
)
from graphcache.runtime.source_lines import user_line
from graphcache.runtime.torch_patches import DispatchMode
from graphcache.runtime.torch_state import uncached_autocast, uncompiled
from graphcache.runtime.undo_log import UndoLog
from graphcache.tracing.checksums import Checksums
from graphcache.tracing.leaks import has_storage

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
MAX_UNDO = 64 << 20  # bytes that are copied to put back what the first call overwrites
_TAKES_STORAGE = (_aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset)


class _HostReads(HostReads):
    """Records what is read on the host, where a capture raises."""

    def __init__(self, recorder: "OpRecorder") -> None:
        super().__init__(recorder.device)
        self._recorder = recorder

    def found(self, obstacle: Obstacle) -> None:
        self._recorder.block(*obstacle)

    def addressed(self, tensor: Tensor) -> None:
        super().addressed(tensor)
        self._recorder.note_addressed(tensor)


def _version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class OpRecorder(DispatchMode):
    """Runs operations as they are and records the storages that they touch.

    Args:
        device: the device of the graphs.
        inputs: the tensors that the forward is given.
        restore: put back what the forward mutates, at the end of the recording.
        suspects: other tensors that the forward may mutate past torch's operators.

    Attributes:
        external: a tensor for each storage that the forward neither was given nor made, by its key; an
            alias, so that nobody takes it for the one that somebody holds.
        mutated: keys of the storages that were mutated and that the forward did not make.
        blocker: the first thing that no graph can hold, with file and line, and its kind; or None.
        draws_random: whether random numbers were drawn.
        constants: the tensors made of numbers and lists on the device, or None; see `Constants`.
        hides_nan: whether an operation can make NaN of its arguments disappear.
        made: weak references to the storages that the forward made, by their keys.
        undo: copies of what the forward overwrote outside what it made.
    """

    def __init__(
        self,
        device: torch.device,
        inputs: Sequence[Tensor],
        *,
        restore: bool,
        suspects: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.device = device
        self.external: dict[int, Tensor] = {}
        self.mutated: set[int] = set()
        self.blocker: tuple[str, Reason] | None = None
        self.draws_random = False
        self.constants: dict[Key, Tensor] | None = None
        self._generator = (
            torch.default_generator
            if device.type == "cpu"
            else torch.cuda.default_generators[device.index]
        )
        self.undo = UndoLog(None if restore or config.is_checking() else MAX_UNDO)
        self._restore = restore
        self._suspects = [*inputs, *suspects]
        self._bytes = Checksums()
        self._inputs = {_C.storage_key(tensor) for tensor in inputs}
        # Weak references keep the keys of dead storages from being used again.
        self.made: dict[int, StorageWeakRef] = {}
        self._operators: dict[int, torch._ops.OpOverload] = {}  # by address
        self.hides_nan = self._addressed = False
        self._constants: set[int] = set()  # of those, what was written out in the source
        # By identity: what operations gave, the arguments, and what came from elsewhere.
        self._known = {id(tensor): ref(tensor) for tensor in inputs}
        self._reached: dict[int, ref[Tensor]] = {}
        self._versions = {id(tensor): _version_of(tensor) for tensor in inputs}

    def block(self, reason: Reason, detail: str) -> None:
        """Records why this forward can't be captured, with the user's line; the first reason counts."""
        self.blocker = self.blocker or (f"{text_of(reason, detail)} at {user_line()}", reason)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Records what runs inside the block; with `restore`, puts back what that mutated."""
        before, host_before = self._generator.get_state(), torch.get_rng_state()
        for tensor in self._suspects:
            if tensor.device == self.device:
                self._bytes.add(tensor)
        host = _HostReads(self)
        constants = Constants(self.device, on_read=self.note_read, on_made=self._note_constant)
        try:
            # The autocast cache would hide which parameters are read, and outlive a capture.
            with uncached_autocast(), uncompiled(), constants, host, self:
                yield
        finally:
            self.constants = constants.made if constants.used else None
            self.draws_random = not torch.equal(before, self._generator.get_state())
            if self.device.type != "cpu" and not torch.equal(host_before, torch.get_rng_state()):
                self.block(Reason.HOST_RANDOM, "from the generator of the CPU")
            for tensor in self._bytes.changed(self.mutated):
                self._add_external(tensor)
                self.mutated.add(_C.storage_key(tensor))
                self.undo.is_complete = False
                if self.device.type == "cpu":
                    self.block(Reason.NOT_EMULATED, "it writes to memory past torch's operators")
            if self._restore:
                self.undo.undo()
                self._generator.set_state(before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not types and is_plain(func):
            given = tensors_in(args, kwargs)
            for tensor in given:
                self.note_read(tensor)
            return self._made_by(func, given, func(*args, **kwargs))
        parts = take_apart(func, args, kwargs, self)
        if parts is not NotImplemented:
            return parts
        if kinds := [type(tensor) for tensor in tensors_in(args, kwargs) if overrides_dispatch(tensor)]:
            self.block(Reason.TENSOR_SUBCLASS, f"{kinds[0].__module__}.{kinds[0].__qualname__}")
            return func(*args, **kwargs)
        if (why := obstacle(func, args, kwargs, self.device)) is not None:
            self.block(*why)
        if func in _INDEXING and any(_C.storage_key(t) in self._constants for t in tensors_in(args[1])):
            self.block(Reason.HOST_COPY, f"{func} takes its index from a list; use a tensor or slices,")
        constant = func is _aten.lift_fresh.default
        for tensor in tensors_in(args, kwargs):
            if constant:
                self._note_made(tensor)
                self._constants.add(_C.storage_key(tensor))
            else:
                self.note_read(tensor)
        for tensor in mutated_by(func, args, kwargs):
            if _C.storage_key(tensor) not in self.made:
                self.mutated.add(_C.storage_key(tensor))
                self.undo.before(func, args, tensor)
        # cuDNN takes over the storage of all its weights, which no operation reads.
        there = self._storages_before if func in _TAKES_STORAGE else ()
        result = func(*args, **kwargs)
        for tensor in tensors_in(result) if there else ():
            if _C.storage_key(tensor) in there:
                self._add_external(tensor)
        return self._made_by(func, tensors_in(args), result)

    def _made_by(self, func: Any, given: list[Tensor], result: Any) -> Any:
        """Records an operation, and what it made; returns its result."""
        made = tensors_in(result)
        self._operators[id(func)] = func
        self.hides_nan = self.hides_nan or discretises(func, given, made)
        for tensor in made:
            self._note_made(tensor)
        return result

    @cached_property
    def _storages_before(self) -> set[int]:
        """Keys of the storages of all tensors that there were when one first took over a storage."""
        return {_C.storage_key(value) for value in gc.get_objects() if has_storage(value)}

    def note_read(self, tensor: Tensor) -> None:
        """Records a tensor that the forward has got hold of."""
        known = self._known.get(id(tensor))
        if known is not None and known() is tensor:
            return
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
            return
        if _C.storage_key(tensor) in self.made:
            return  # what is made and not known is a view that no operation made, such as x.data
        if tensor.is_quantized:
            self.block(Reason.UNSUPPORTED_TENSOR, "a quantised one is read")
            return
        reached = self._reached.get(id(tensor))
        if reached is None or reached() is not tensor:
            self._reached[id(tensor)] = ref(tensor)
            self._versions[id(tensor)] = _version_of(tensor)
        self._add_external(tensor)

    def raised_version_of(self, tensor: Tensor) -> bool:
        """Return True if the forward raised the version of a tensor that it was given or read."""
        return self._versions[id(tensor)] != _version_of(tensor)

    def note_addressed(self, tensor: Tensor) -> None:
        """Records a tensor that a kernel past torch's operators is about to be given."""
        self._addressed = True
        self.note_read(tensor)
        if tensor.layout is torch.strided and _C.storage_key(tensor) not in self.made:
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                self._bytes.add(tensor)
                self.undo.save(tensor)

    def _note_constant(self, tensor: Tensor) -> None:
        """Records a tensor of graphcache, of which the forward sees copies."""
        self._inputs.add(_C.storage_key(tensor))
        self._known[id(tensor)] = ref(tensor)

    def _add_external(self, tensor: Tensor) -> None:
        key = _C.storage_key(tensor)
        if not (key in self.external or key in self._inputs or key in self.made):
            offset = int(tensor.storage_offset())
            self.external[key] = _C.alias(tensor, tensor.shape, tensor.stride(), offset)

    def _note_made(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
            kind = "a quantised one" if tensor.is_quantized else kind
            self.block(Reason.UNSUPPORTED_TENSOR, f"{kind} is made")
            return
        if id(tensor) not in self._reached:
            self._known[id(tensor)] = ref(tensor)
        key = _C.storage_key(tensor)
        if key not in self.external and key not in self._inputs and key not in self.made:
            self.made[key] = StorageWeakRef(tensor.untyped_storage())

    def bears_nan(self) -> bool:
        """Return True if NaN in the arguments can't make a kernel stop the device."""
        return not self._addressed and bears_nan(self._operators.values(), hidden=self.hides_nan)

    def mutated_external(self) -> list[Tensor]:
        """Returns a tensor for each storage that was mutated and that the forward did not make."""
        known = [*self.external.values(), *self._suspects]
        by_key = {_C.storage_key(tensor): tensor for tensor in known}
        return [tensor for key, tensor in by_key.items() if key in self.mutated]

    def reached(self) -> list[Tensor]:
        """Returns the tensors that came from elsewhere and that somebody still holds."""
        return [tensor for known in self._reached.values() if (tensor := known()) is not None]
