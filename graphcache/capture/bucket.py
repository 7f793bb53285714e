"""One captured size: its graph, its inputs and outputs, and the times of its calls."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BoundCall
from graphcache.capture.outputs import Result
from graphcache.pool import Lane
from graphcache.report.cache_info import Times
from graphcache.runtime.base import Graph, Stopwatch

# Replays before a graph is timed: it matters by then, and a call that runs eagerly is lost among them.
AFTER = 512


SETTLED = 64  # further replays, after which the device is done with both


@dataclass
class Timing:
    """The stopwatches of one graph."""

    eager: Stopwatch | None = None
    replay: Stopwatch | None = None

    def is_done(self) -> bool:
        """Tells whether the device is done with all that was started."""
        return all(watch is None or watch.is_done() for watch in (self.eager, self.replay))

    def times(self) -> Times:
        """Returns what is known by now."""
        watches = self.eager, self.replay
        return Times(*(watch.seconds() if watch and watch.is_done() else None for watch in watches))


@dataclass
class Bucket:
    """One captured size: its graph, where its inputs go, what it returns.

    Attributes:
        native: what serves calls with it.
        launch: how that reaches the device: "node", "copies" or "torch"; see `CacheInfo`.
        timing: what its calls take.
        exact_only: captured for batches of exactly this size.
        constants: what its graph reads of `Constants`.
        kernels: what keeps kernels on the device that its graph launches.
    """

    size: int
    graph: Graph | None
    lane: Lane
    static: list[Tensor]
    result: Result
    native: _C.Bucket
    launch: str
    timing: Timing = field(default_factory=Timing)
    exact_only: bool = False
    constants: list[Tensor] = field(default_factory=list)
    kernels: list[object] = field(default_factory=list)

    def replay(self, call: BoundCall, number: int) -> Any:
        """Serves call `number`, with the lock of the pool held."""
        stream = self.lane.follow_stream()
        tensors = [tensor.resolve_conj().resolve_neg() for tensor in call.tensors]
        return self.native.run(tensors, call.batch, number, stream)

    def try_out(self, call: BoundCall, number: int) -> Any:
        """Replays for a comparison: the result goes to nobody, and counts for nothing."""
        native = self.native
        before = native.replays, native.padded_rows, native.check_budget
        result = self.replay(call, number)
        native.replays, native.padded_rows, native.check_budget = before
        return result

    def retire(self) -> None:
        """Lets go of the graph; its counts and times stay."""
        self.native.retire()
        self.graph = None
        self.kernels = []

    def output_bytes(self) -> int:
        """Returns the bytes of its outputs that lie in the pool, which strong references would pin."""
        storages = [out.tensor.untyped_storage() for out in self.result.outputs if out.is_weak()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
