"""One captured size: its graph, its inputs and outputs, and the times of its calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BoundCall
from graphcache.capture.outputs import Result
from graphcache.capture.static_inputs import with_bits
from graphcache.guards.guards import Guards
from graphcache.pool import Lane
from graphcache.report.cache_info import Times
from graphcache.runtime.base import Stopwatch

# Replays before a graph is timed: it matters by then, and a call that runs eagerly is lost among them.
AFTER = 512
SETTLED = 64  # further replays, after which the device is done with both


@dataclass
class Timing:
    """The stopwatches of one graph: one call with it and one without, measured on the device."""

    eager: Stopwatch | None = None
    replay: Stopwatch | None = None

    def is_done(self) -> bool:
        """Return True if the device is done with all that was started."""
        return all(watch is None or watch.is_done() for watch in (self.eager, self.replay))

    def times(self) -> Times:
        """Returns the times that are known by now."""
        watches = self.eager, self.replay
        return Times(*(watch.seconds() if watch and watch.is_done() else None for watch in watches))


@dataclass(frozen=True)
class Dependencies:
    """The dependencies of a graph besides the arguments of its calls.

    Attributes:
        guards: the values that it captured.
        mutated: the memory that it mutates besides its own, and the arguments that are copied before.
        mutated_keys: the keys of the storages that its forward mutates.
        mutates_only_passed: whether all of these are of passed objects, or of arguments named in `bind`;
            and all that it counts in Python, too.
        ran: the code that its forward ran at any size, but for libraries'.
        external: the keys of the storages that its forward reads or writes and was not given.
        draws_random: whether its forward draws random numbers.
    """

    guards: Guards
    mutated: _C.MutatedMemory
    mutated_keys: frozenset[int]
    mutates_only_passed: bool
    ran: Mapping[tuple[int, int], CodeType]
    external: frozenset[int]
    draws_random: bool


@dataclass(frozen=True, eq=False)
class Bucket:
    """One captured size.

    Attributes:
        size: its rows.
        lane: the lane whose memory its graph uses.
        static: its static inputs.
        result: its result, as captured.
        native: the native counterpart, which serves calls and counts them.
        dependencies: what the graph depends on besides its arguments; shared by the sizes of a plan.
        launch: how a call reaches the device: "node", "copies" or "torch"; see `CacheInfo`.
        has_effects: whether replays repeat effects on Python values.
        makes_values: whether its graph makes values that replays store in Python, besides the result.
        exact_only: whether it serves batches of exactly this size.
        resources: the graph, and what has to live as long: constants, and loaded kernels.
        timing: the times of its calls.
    """

    size: int
    lane: Lane
    static: list[Tensor]
    result: Result
    native: _C.Bucket
    dependencies: Dependencies
    launch: str
    resources: list[Any]
    has_effects: bool = False
    makes_values: bool = False
    exact_only: bool = False
    timing: Timing = field(default_factory=Timing)

    @property
    def graph(self) -> Any:
        """The graph; None once it is retired."""
        return self.resources[0] if self.resources else None

    def replay(self, call: BoundCall, number: int, *, repeat: bool = True) -> Any:
        """Serves call `number`, with the lock of the pool held.

        Without `repeat`, effects on Python values are left out, and the tensors among them are returned
        together with the result.
        """
        stream = self.lane.follow_stream()
        tensors = list(call.tensors)
        for (index, _), static in zip(call.copied_in(), self.static, strict=True):
            tensors[index] = with_bits(tensors[index], static)
        return self.native.run(tensors, call.batch, number, stream, repeat)

    def try_out(self, call: BoundCall, number: int) -> Any:
        """Replays for a comparison: nobody gets the result, and no count changes."""
        native = self.native
        before = native.replays, native.padded_rows, native.check_budget
        result = self.replay(call, number, repeat=False)
        native.replays, native.padded_rows, native.check_budget = before
        return result

    def retire(self) -> None:
        """Releases the graph; its counts and times stay."""
        self.native.retire()
        self.resources.clear()

    def is_gone(self) -> bool:
        """Return True if guards that fail will never hold again: something that they compare was freed.

        Also where the result is memory outside, which the graph keeps alive itself.
        """
        keeps_memory = any(output.is_external() for output in self.result.outputs)
        return keeps_memory or self.dependencies.guards.native.is_gone()

    def output_bytes(self) -> int:
        """Returns the bytes of its outputs that lie in the pool, which strong references would pin."""
        storages = [out.tensor.untyped_storage() for out in self.result.outputs if out.is_weak()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
