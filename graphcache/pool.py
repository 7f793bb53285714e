"""The memory of graphs: one global pool per device, divided into lanes."""

import threading
import weakref
from collections.abc import Callable, Iterable
from functools import cache, reduce
from operator import add
from typing import Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from graphcache import _C
from graphcache.errors import OptionError
from graphcache.runtime import Graph, PoolMemory, Runtime, runtime_for

Stale = Literal["error", "copy"]


class Outputs:
    """The storages that one replay handed to its caller, until a graph of the lane overwrites them.

    Attributes:
        storages: a weak tensor for each storage; None where the caller keeps it for good.
        made_by: which call that was, for the message.
    """

    def __init__(self, stale: Stale) -> None:
        self.stale = stale
        self.storages: list[Tensor | None] = []
        self.made_by: Callable[[], str] = lambda: "a replay"

    def held(self) -> list[int]:
        """Returns the indices of the storages that somebody else still holds."""
        return [i for i, kept in enumerate(self.storages) if kept is not None and _C.is_held(kept)]

    def give_up(self, overwritten_by: Callable[[], str]) -> int:
        """Expires or moves what is still held, and returns how many storages that were."""
        held = self.held()
        for index in held:
            kept = self.storages[index]
            if kept is None:
                continue
            if self.stale == "copy":
                _C.materialize(kept)
            else:
                _C.expire(kept, _stale_message(self.made_by(), overwritten_by()))
            self.storages[index] = None
        return len(held)


def _stale_message(made_by: str, overwritten_by: str) -> str:
    return (
        f"graphcache: this tensor is an output of {made_by}, and its memory was overwritten by "
        f"{overwritten_by}. An output is valid until the next graph of its pool runs. Use it before "
        "that, or keep a copy with .clone(), or decorate with cuda_graphed(..., stale='copy') to have "
        "outputs that are still held copied for you."
    )


class Lane:
    """One allocator pool, in which only one graph's results are live at a time.

    Attributes:
        open: False after a failed capture: its graphs still replay, but no more are captured into it.
    """

    def __init__(self, runtime: Runtime, device: torch.device, *, weak: bool) -> None:
        self.open = True
        self.arena = runtime.new_arena(device)
        self._runtime = runtime
        self._weak = weak
        self._live: list[Outputs] = []
        self._guests: list[StorageWeakRef] = []
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        # The memory goes with the lane; whoever holds an output then must not read what follows.
        weakref.finalize(self, _bury, self._live).atexit = False

    def is_free(self) -> bool:
        """Tells whether a graph may be captured here that runs while today's outputs are held."""
        self._guests = [guest for guest in self._guests if not guest.expired()]
        return self.open and not self._guests and not self._holds_outputs()

    def is_done(self) -> bool:
        """Tells whether nothing refers to the memory of this lane any more."""
        return not self._graphs and not self._holds_outputs()

    def _holds_outputs(self) -> bool:
        return any(outputs.held() for outputs in self._live)

    def capture(self, body: Callable[[], list[Tensor]]) -> tuple[Graph, list[Tensor]]:
        """Captures `body` into this lane.

        Args:
            body: runs the forward and returns its output tensors.

        Returns:
            The graph, and the outputs as weak references: their memory is free for the next capture.
            In a pool with `weak=False` they are the outputs themselves and pin it.

        Raises:
            Exception: what `body` or the driver raised; the lane is closed then.
        """

        def weakened() -> list[Tensor]:
            outputs = body()
            return _C.weak_ref(outputs) if self._weak else outputs

        try:
            graph, outputs = self._runtime.capture(self.arena, weakened)
        except BaseException:
            self.open = False
            raise
        self._graphs.add(graph)
        return graph, outputs

    def before_replay(self, overwritten_by: Callable[[], str]) -> int:
        """Makes the lane ready to be overwritten; returns how many held storages were given up."""
        self.arena.follow_stream()
        given_up = sum(outputs.give_up(overwritten_by) for outputs in self._live)
        self._live.clear()
        return given_up

    def hand_out(self, outputs: Outputs) -> None:
        """Notes what the replay that just ran gave to its caller."""
        self._live.append(outputs)

    def reserve_for(self, tensors: Iterable[Tensor]) -> None:
        """Counts the results of an eager first call as held, as a replay's will be in their place."""
        self._guests = [
            StorageWeakRef(t.untyped_storage()) for t in tensors if t.layout is torch.strided
        ]


def _bury(live: list[Outputs]) -> None:
    for outputs in live:
        outputs.give_up(lambda: "the deletion of its graph pool")


class GraphPool:
    """The memory that captured graphs share.

    Modules use the pool of their device, `default_pool(device)`, unless they are given another one.

    Args:
        device: where the memory lies; the current CUDA device, or the CPU (emulation) without one.
        weak: keep outputs as weak references. With False every output pins its memory, as in plain
            use of CUDA graphs: more memory, and nothing gained; it is there to compare.

    Raises:
        OptionError: for a device that has no graphs.
    """

    def __init__(self, device: torch.device | str | None = None, *, weak: bool = True) -> None:
        self.device = _indexed(device)
        if self.device.type not in ("cuda", "cpu"):
            raise OptionError(f"graphcache: no graphs on {device}; use a CUDA device or the CPU")
        self.weak = weak
        self.runtime = runtime_for(self.device)
        self.lanes: list[Lane] = []
        self.lock = threading.RLock()  # one graph of a pool is dispatched at a time

    def lane(self) -> Lane:
        """Returns the first lane in which no output is held, opening one where there is none."""
        for lane in self.lanes:
            if lane.is_free():
                return lane
        self.lanes.append(Lane(self.runtime, self.device, weak=self.weak))
        return self.lanes[-1]

    def trim(self) -> None:
        """Gives the memory of lanes that no graph and no output uses back to the allocator.

        On CUDA, `torch.cuda.empty_cache()` then returns it to the device.
        """
        with self.lock:
            self.lanes = [lane for lane in self.lanes if not lane.is_done()]

    def memory(self) -> PoolMemory:
        """Returns the bytes of all lanes: taken from the device, and of that owned by somebody."""
        return reduce(add, (lane.arena.memory() for lane in self.lanes), PoolMemory(0, 0))

    def __repr__(self) -> str:
        mib = self.memory().reserved / 2**20
        kind = "weak" if self.weak else "strong"
        return f"<GraphPool on {self.device}: {len(self.lanes)} lanes, {mib:.1f} MiB, {kind} outputs>"


def default_pool(device: torch.device | str | None = None) -> GraphPool:
    """Returns the global pool of `device` (default: the current CUDA device, or the CPU)."""
    return _default_pool(_indexed(device))


def _indexed(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(asked) == "cuda" else asked


@cache
def _default_pool(device: torch.device) -> GraphPool:
    return GraphPool(device)
