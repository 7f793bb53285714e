"""The graphs of one signature, for one set of values that guards compare; all entries of a forward.

A signature has an entry for each set of values that it was captured with, such as those of a flag that
goes back and forth, or of adapters that are switched. Their guards say which one serves a call.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from graphcache import _C
from graphcache.capture.bucket import Bucket
from graphcache.capture.default_sizes import padded_size
from graphcache.capture.verify import PaddingCheck
from graphcache.guards.static_objects import Slot
from graphcache.report.reasons import EagerReason
from graphcache.tracing.hooks import Hook

MAX_WASTED = 8  # entries in a row that were dropped before they were worth their captures
WORTH_A_CAPTURE = 16  # replays after which another capture is no waste
MAX_SIGHTED = 256


@dataclass
class Entry:
    """The graphs of one signature, for one set of values; or the reason why it has no more.

    Attributes:
        key: its signature.
        eager: why calls that no other entry serves always run eagerly, or None.
        hooks: those without which they may not have to.
        no_padding_reason: why it is captured only at the sizes that it is called with, or None.
        complete: no sizes will be added: they were given, or no more fit into memory.
        padding: compares padded replays with eager.
        slots: those of the objects that its calls pass; see `static_objects`.
        buckets: its graphs by size, ascending.
        native: its native counterpart.
        last: the number of the last call of its kind that Python saw.
        blocked: how many calls ran eagerly since another thread held an output of its lane.
        is_replaced: whether its values were found changed, and that was counted.
    """

    key: Any
    eager: EagerReason | None = None
    hooks: list[Hook] = field(default_factory=list)
    no_padding_reason: str | None = None
    complete: bool = False
    padding: PaddingCheck = field(default_factory=PaddingCheck)
    slots: tuple[Slot, ...] = ()
    buckets: dict[int, Bucket] = field(default_factory=dict)
    native: _C.Entry | None = None
    last: int = 0
    blocked: int = 0
    is_replaced: bool = False

    def add(self, buckets: Iterable[Bucket]) -> None:
        """Adds graphs, keeping the sizes ascending."""
        merged = self.buckets | {bucket.size: bucket for bucket in buckets}
        self.buckets = {size: merged[size] for size in sorted(merged)}

    def bucket(self, batch: int) -> Bucket | None:
        """Returns the graph that serves `batch` rows, or None."""
        if self.no_padding_reason is not None:
            return self.buckets.get(batch)
        size = padded_size(tuple(self.buckets), batch)
        return None if size is None else self.buckets[size]

    @property
    def is_pure(self) -> bool:
        """Return True if the forward mutates nothing outside, so that running it twice does no harm."""
        return not any(bucket.dependencies.mutated_keys for bucket in self.buckets.values())

    @property
    def mutates_only_passed(self) -> bool:
        """Return True if the forward mutates only passed objects, and arguments named in `bind`."""
        return all(bucket.dependencies.mutates_only_passed for bucket in self.buckets.values())

    def serves(self, batch: int, *, grad: bool) -> bool:
        """Return True if the values are those of its graph for `batch` rows, or of all graphs."""
        bucket = self.bucket(batch)
        used = self.buckets.values() if bucket is None else [bucket]
        return self.eager is None and not self.changed(used, grad=grad)

    @staticmethod
    def changed(buckets: Collection[Bucket], *, grad: bool) -> list[Bucket]:
        """Returns those of the graphs that depend on something which is not as it was."""
        guards = {id(each.dependencies.guards): each.dependencies.guards for each in buckets}
        valid = {key for key, each in guards.items() if each.check(grad=grad)}
        return [each for each in buckets if id(each.dependencies.guards) not in valid]

    def used(self) -> int:
        """Returns the number of its last call."""
        return max(self.last, self.native.last if self.native is not None else 0)

    def amortized(self) -> bool:
        """Return True if its graphs served so many calls that their capture was no waste."""
        replays = sum(bucket.native.replays for bucket in self.buckets.values())
        return replays >= WORTH_A_CAPTURE


class Entries:
    """The entries of all signatures of one forward: a bounded number, of which the last used stay.

    Attributes:
        once: how many kinds of calls came once only. One that never comes again is not worth a capture.
    """

    def __init__(self) -> None:
        self._by_key: dict[Any, list[Entry]] = {}
        self._sighted: dict[Any, int] = {}
        self._wasted = 0
        self.once = 0

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entries in self._by_key.values() for entry in entries)

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    def of(self, key: Any) -> list[Entry]:
        """Returns the entries of a signature, in the order of their captures."""
        return list(self._by_key.get(key, ()))

    def add(self, entry: Entry) -> None:
        """Adds an entry to those of its signature."""
        self._by_key.setdefault(entry.key, []).append(entry)

    def remove(self, entry: Entry) -> None:
        """Removes an entry; nothing happens where it is gone."""
        rest = [each for each in self._by_key.pop(entry.key, ()) if each is not entry]
        if rest:
            self._by_key[entry.key] = rest

    def is_due(self, key: Any) -> bool:
        """Counts a call; return True if it is worth a capture: the very first, or of a known kind."""
        due = not self._sighted or key in self._sighted
        times = self._sighted.pop(key, 0) + 1
        self._sighted[key] = times
        self.once += {1: 1, 2: -1}.get(times, 0)
        if len(self._sighted) > MAX_SIGHTED:
            del self._sighted[next(iter(self._sighted))]
        return due

    def with_empty_slots(self) -> list[list[Entry]]:
        """Returns the entries of each signature over memory of objects that are gone, by last use."""
        signatures = self._by_key.values()
        found = [of for of in signatures if any(slot.is_empty() for slot in of[0].slots)]
        return sorted(found, key=lambda entries: max(map(Entry.used, entries)))

    def lru_victim(self) -> Entry | None:
        """Returns the entry without a call for longest; None if dropping is all that ever happens."""
        entry = min(self, key=Entry.used)
        self._wasted = 0 if entry.amortized() else self._wasted + 1
        return entry if self._wasted <= MAX_WASTED else None
