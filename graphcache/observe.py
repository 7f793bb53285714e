"""Watches one eager forward: what it reads and writes by address, and what a graph can't hold.

The first call of every signature runs under `Observer`. What it finds decides everything after: which
arguments are bound, whether rows may be padded, what has to be guarded, whether to capture at all.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache import _C
from graphcache.ops import HostReads, obstacle, take_apart, tensors_in, user_line, written_by
from graphcache.state import SavedState, uncached_autocast, uncompiled

_aten = torch.ops.aten


class _Report(HostReads):
    def __init__(self, observer: "Observer") -> None:
        super().__init__(observer.device)
        self._observer = observer

    def found(self, what: str) -> None:
        self._observer.blocked(f"{what} at {user_line()}")


class Observer(TorchDispatchMode):
    """Runs operations as they are and keeps book of the storages that they touch.

    Attributes:
        external: a tensor for each storage that the forward neither was given nor made.
        written: keys of the storages written to that the forward did not make.
        blocker: the first thing that a graph can't hold, with file and line, or None.
        draws: whether random numbers were drawn.
        saved: with `restore`, the state to put back; see `SavedState`.
    """

    def __init__(self, device: torch.device, inputs: Iterable[Tensor], *, restore: bool) -> None:
        super().__init__()
        self.device = device
        self.external: dict[int, Tensor] = {}
        self.written: set[int] = set()
        self.blocker: str | None = None
        self.draws = False
        self.saved = SavedState() if restore else None
        self._inputs = {_C.storage_key(tensor) for tensor in inputs}
        # Weak references keep the keys of dead storages from being used again.
        self._made: dict[int, StorageWeakRef] = {}

    def blocked(self, why: str) -> None:
        """Notes why this forward can't be captured; the first reason counts."""
        self.blocker = self.blocker or why

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Observes what runs inside the block; with `restore`, undoes its writes afterwards."""
        before = self._random_state()
        host = _Report(self)
        try:
            # The autocast cache would hide which parameters are read, and outlive a capture.
            with uncached_autocast(), uncompiled(), host, self:
                yield
        finally:
            self.draws = not torch.equal(before, self._random_state())
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
        why = obstacle(func, args, kwargs, self.device)
        if why is not None:
            self.blocked(f"{why}, at {user_line()}")
        constant = func is _aten.lift_fresh.default
        for tensor in tensors_in(args, kwargs):
            if constant:
                self._note_made(tensor)
            else:
                self._note_read(tensor)
        for tensor in written_by(func, args, kwargs):
            self._note_written(tensor)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._note_made(tensor)
        return result

    def _note_read(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        key = _C.storage_key(tensor)
        if key not in self._made and key not in self._inputs:
            self.external.setdefault(key, tensor)

    def _note_written(self, tensor: Tensor) -> None:
        key = _C.storage_key(tensor)
        if key not in self._made:
            self.written.add(key)
            if self.saved is not None:
                self.saved.save(tensor)

    def _note_made(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            self.blocked(f"a tensor of layout {tensor.layout} is made at {user_line()}")
            return
        key = _C.storage_key(tensor)
        if key not in self.external and key not in self._inputs and key not in self._made:
            self._made[key] = StorageWeakRef(tensor.untyped_storage())

    def _random_state(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _set_random_state(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
