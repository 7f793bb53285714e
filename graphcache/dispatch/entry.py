"""What is known of one signature: how it is served, by which graphs, and what those depend on."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, BoundCall
from graphcache.capture.bucket import Bucket
from graphcache.capture.sizes import padded_size
from graphcache.capture.verify import Sample, first_rows, same
from graphcache.config import Pad
from graphcache.guards.guards import Guards
from graphcache.guards.static_objects import Slot

# A forward that needs more than this is not one that graphs can speed up: each costs a capture.
MAX_SIGNATURES = 32
MAX_WASTED = 8  # signatures in a row that were dropped before they were worth their captures
WORTH_A_CAPTURE = 16  # replays after which another capture is no waste
MAX_SIGHTED = 256
MAX_ALIKE = 3
CHANGE_IN_PLACE = (
    "it runs eagerly now. Pass what changes as an argument, and change tensors in place (copy_)"
)
MANY_WAYS = (
    f"it is called in more than {MAX_SIGNATURES} ways (shapes, dtypes, constants), each seldom; such "
    "calls run eagerly. Pad the other dimensions, pass numbers as tensors, and keep large arguments "
    "and those that are written to at one address"
)


@dataclass
class Entry:
    """What is known of one signature.

    Attributes:
        eager: why it always runs eagerly, or None.
        no_padding_reason: why it is captured only at the sizes that it is called with, or None.
        guards: what its graphs depend on besides the arguments.
        pure: the forward writes to nothing outside, so that running it twice does no harm.
        complete: no sizes will be added: they were given, or no more fit into memory.
        sample: rows of an earlier call, to compare padded replays with eager.
        batches: how many rows its calls had, as far as it matters: whether that ever changed.
        alike: padded calls in a row whose rows were all alike, so that nothing could be learned.
        trust: how many padded calls follow the next comparison without one.
        mutated: what its graphs write outside, and what they read of it beforehand.
        homes: of the objects that its calls pass; see `static_objects`.
        buckets: its graphs by size, ascending.
        native: the same, for the calls that native code serves.
        last: the number of the last call of its kind that Python saw.
    """

    eager: str | None = None
    no_padding_reason: str | None = None
    pure: bool = True
    complete: bool = False
    guards: Guards = field(default_factory=Guards)
    buckets: dict[int, Bucket] = field(default_factory=dict)
    sample: Sample | None = None
    batches: set[int] = field(default_factory=set)
    alike: int = 0
    check_interval: int = 64
    mutated: _C.MutatedMemory = field(default_factory=lambda: _C.MutatedMemory([], [], []))
    slots: tuple[Slot, ...] = ()
    native: _C.Entry | None = None
    last: int = 0

    def add(self, buckets: list[Bucket]) -> None:
        """Adds graphs, keeping the sizes ascending."""
        merged = self.buckets | {bucket.size: bucket for bucket in buckets}
        self.buckets = {size: merged[size] for size in sorted(merged)}

    def bucket(self, batch: int) -> Bucket | None:
        """Returns the graph that serves `batch` rows, or None."""
        if self.no_padding_reason is not None:
            return self.buckets.get(batch)
        size = padded_size(tuple(self.buckets), batch)
        return None if size is None else self.buckets[size]

    def is_ambiguous(self, call: BoundCall) -> bool:
        """Tells whether an argument may be as long as the batch by chance: no other was seen."""
        self.batches.add(call.batch)
        return len(self.batches) == 1 and sum(leaf.role is BATCHED for leaf in call.roles) > 1

    def why_unlike(
        self, tensors: list[Tensor], call: BoundCall, bucket: Bucket, pad: Pad, number: int
    ) -> str | None:
        """Says how padded replays differ from an eager result, or returns None where they do not."""
        # All of this first: an argument may be an output that the replays below overwrite.
        sample, self.sample = self.sample or Sample(call), Sample(call)
        tells = sample.tells(call, pad)
        outputs = bucket.result.outputs
        expected = [t.clone() for t in first_rows(tensors, outputs, call.batch)]
        padded = [call._replace(tensors=ls, batch=bucket.size) for ls in sample.full(call, bucket.size)]
        for each in (call, *padded):
            rows = first_rows(bucket.try_out(each, number), outputs, call.batch)
            if not same(expected, rows):
                return "its rows depend on each other"
            del rows  # held, it would be given up by the next
        if tells:
            bucket.native.check_budget, self.alike = self.check_interval, 0
            self.check_interval *= 4
            return None
        self.alike += 1
        if self.alike < MAX_ALIKE:
            return None  # served by eager until rows come that differ
        self.no_padding_reason = "all of its rows were alike, so that padding could not be compared with eager"
        return None

    def used(self) -> int:
        """Returns the number of its last call."""
        return max(self.last, self.native.last if self.native is not None else 0)

    def amortized(self) -> bool:
        """Tells whether its graphs served so many calls that their capture was no waste."""
        replays = sum(bucket.native.replays for bucket in self.buckets.values())
        return replays >= WORTH_A_CAPTURE


class Entries(dict[Any, Entry]):
    """The signatures of one forward: a bounded number, of which the last used stay.

    Attributes:
        once: how many kinds of calls came once only. One that never comes again is not worth a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sighted: dict[Any, int] = {}
        self._wasted = 0
        self.once = 0

    def is_due(self, key: Any) -> bool:
        """Notes a call; tells whether to capture for it: the very first, or one whose kind was seen."""
        due = not self._sighted or key in self._sighted
        times = self._sighted.pop(key, 0) + 1
        self._sighted[key] = times
        self.once += {1: 1, 2: -1}.get(times, 0)
        if len(self._sighted) > MAX_SIGHTED:
            del self._sighted[next(iter(self._sighted))]
        return due

    def with_empty_slots(self) -> list[Any]:
        """Returns the keys of those over memory of objects that are gone, in the order of last use."""
        keys = [key for key, entry in self.items() if any(slot.is_empty() for slot in entry.slots)]
        return sorted(keys, key=lambda key: self[key].used())

    def lru_victim(self) -> Any:
        """Returns the key that was not called for longest; None if dropping is all that ever happens."""
        key, entry = min(self.items(), key=lambda item: item[1].used())
        self._wasted = 0 if entry.amortized() else self._wasted + 1
        return key if self._wasted <= MAX_WASTED else None
