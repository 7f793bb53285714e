"""Counts the calls of one forward, and reports them as `CacheInfo`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any, NamedTuple

from graphcache import _C

NO_GAIN = 0.02  # share of eager's time; a graph that saves less is not worth its memory


class Times(NamedTuple):
    """The time of one call of a size on the device, in seconds.

    Attributes:
        eager: time from the first kernel of an eager call to its last, as fast as Python launches
            them. None before it is measured, and for a forward that writes to state outside itself.
        replay: time of a replay.
    """

    eager: float | None
    replay: float | None

    @property
    def gain(self) -> float | None:
        """Share of eager's time that a replay saves."""
        if self.eager is None or self.replay is None or self.eager <= 0:
            return None
        return 1 - self.replay / self.eager


def mean_times(times: Iterable[Times]) -> Times:
    """Returns the means over several graphs of one size."""
    return Times(*(_mean(column) for column in zip(*times, strict=True)))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


@dataclass(frozen=True)
class CacheInfo:
    """The counts of one graphed forward since it was made, or since `cache_clear()`.

    `print(info)` shows the counts as a table.

    Attributes:
        backend: "cuda" or "emulated"; "none" before the first capture.
        launch: the way inputs reach a graph. "node": the first node of the graph copies them, in the
            same launch. "copies": emulation copies them. "torch": torch calls copy them.
        calls: all calls; each is either replayed or eager.
        replays: replayed calls by size.
        padded: padded rows by size; `padded_rows` is their sum.
        eager: eager calls by reason; docs/troubleshooting.md explains each reason.
        batches: calls by number of rows, eager calls included.
        times: the times of a call by size, measured once after 512 replays of that size.
        sizes: captured sizes of all signatures, ascending.
        signatures: number of signatures (shapes, dtypes, constants, modes) that have graphs.
        dropped: number of least recently used sets of graphs that were dropped for new ones. A
            signature has one set, or one for each value of what goes back and forth.
        captures: number of captured graphs, including those dropped since.
        capture_seconds: time spent on captures.
        expired: number of held outputs that calls of this forward made unreadable (`stale="error"`).
        copied: number of held outputs that calls of this forward copied to memory of their own.
        pool_bytes: memory reserved by the pool, which other forwards may share.
        saved_bytes: bytes of outputs that only strong references would keep in memory.
        notes: reasons why the forward is not padded, how padding can't be compared, and sizes that
            gain little.
    """

    backend: str
    launch: str
    calls: int
    replays: dict[int, int]
    padded: dict[int, int]
    eager: dict[str, int]
    batches: dict[int, int]
    times: dict[int, Times]
    sizes: tuple[int, ...]
    signatures: int
    dropped: int
    captures: int
    capture_seconds: float
    expired: int
    copied: int
    pool_bytes: int
    saved_bytes: int
    notes: tuple[str, ...]

    @property
    def padded_rows(self) -> int:
        """Number of padded rows of all sizes."""
        return sum(self.padded.values())

    @property
    def hits(self) -> int:
        """Number of replayed calls; the name is that of `functools.lru_cache`."""
        return sum(self.replays.values())

    @property
    def misses(self) -> int:
        """Number of eager calls."""
        return sum(self.eager.values())

    def __str__(self) -> str:
        facts = [
            ("calls", f"{self.calls}: {self.hits} replayed, {self.misses} eager"),
            *((f"eager: {reason}", str(count)) for reason, count in self.eager.items()),
            ("padded rows", str(self.padded_rows)),
            ("signatures", f"{self.signatures} with graphs, {self.dropped} dropped for others"),
            ("captures", f"{self.captures} in {self.capture_seconds:.2f} s"),
            ("held outputs", f"{self.expired} expired, {self.copied} copied"),
            ("launch", f"{self.backend}, {self.launch}"),
            ("pool", _readable(self.pool_bytes)),
            ("saved by weak references", _readable(self.saved_bytes)),
            *(("note", note) for note in self.notes),
        ]
        rows = [
            ("size", "replays", "padded rows", "replay us", "eager us", "saved"),
            *map(self._row, sorted({*self.sizes, *self.replays})),
        ]
        shown = [column for column in zip(*rows, strict=True) if any(column[1:]) or len(rows) == 1]
        table = _aligned(list(zip(*shown, strict=True)), left=0)
        return "\n".join([*_aligned(facts, left=2), "", *table])

    def _row(self, size: int) -> tuple[str, ...]:
        times = self.times.get(size, Times(None, None))
        return (
            f"{size}" if size in self.sizes else f"{size} (gone)",
            str(self.replays.get(size, 0)),
            str(self.padded.get(size, 0)),
            *("" if t is None else f"{t * 1e6:.1f}" for t in (times.replay, times.eager)),
            "" if times.gain is None else f"{times.gain:.0%}",
        )


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Returns lines of aligned columns; the first `left` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _saved_bytes(buckets: Iterable[Any]) -> int:
    """Returns the bytes of the outputs of each lane's graphs, without the largest of the lane."""
    by_lane: dict[int, list[int]] = {}
    for bucket in buckets:
        by_lane.setdefault(id(bucket.lane), []).append(bucket.output_bytes())
    return sum(sum(each) - max(each) for each in by_lane.values())


def _readable(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


@dataclass
class Counts:
    """The counters behind `CacheInfo` that outlive a graph."""

    replays: Counter[int] = field(default_factory=Counter)
    padded: Counter[int] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    captures: int = 0
    capture_seconds: float = 0.0
    expired: int = 0
    copied: int = 0

    def merge(self, other: "Counts") -> None:
        """Adds all counts of `other`."""
        for count in fields(self):
            value, added = getattr(self, count.name), getattr(other, count.name)
            if isinstance(value, Counter):
                value.update(added)
            else:
                setattr(self, count.name, value + added)

    def add(self, bucket: _C.Bucket) -> None:
        """Adds the counts of one graph."""
        if bucket.replays:
            self.replays[bucket.size] += bucket.replays
            self.padded[bucket.size] += bucket.padded_rows
        self.expired += bucket.expired
        self.copied += bucket.copied

    def info(
        self,
        calls: int,
        signatures: Sequence[Sequence[Mapping[int, Any]]],
        no_padding_reasons: Iterable[str],
        notes: Iterable[str],
        pool: Any,
        batches: Mapping[int, int],
    ) -> CacheInfo:
        """Returns these counts, and those of the graphs, as `CacheInfo`.

        Args:
            calls: the number of all calls.
            signatures: the graphs by size, of each set of values of each signature.
            no_padding_reasons: the reasons why signatures are captured at exact sizes only.
            notes: how padding can't be compared.
            pool: the pool of the graphs, or None.
            batches: the number of calls by their number of rows.
        """
        buckets = [bucket for each in signatures for graphs in each for bucket in graphs.values()]
        live = [bucket for bucket in buckets if not bucket.native.retired]
        times = {
            size: mean_times(bucket.timing.times() for bucket in buckets if bucket.size == size)
            for size in sorted({bucket.size for bucket in buckets if bucket.timing.replay})
        }
        gains = {size: each.gain for size, each in times.items() if each.gain is not None}
        counts = {each.name: getattr(self, each.name) for each in fields(self)}
        return CacheInfo(
            **counts
            | {
                "replays": dict(sorted(self.replays.items())),
                "padded": dict(sorted(self.padded.items())),
                "eager": dict(self.eager),
            },
            backend=pool.runtime.name if pool is not None and buckets else "none",
            launch=" and ".join(sorted({bucket.launch for bucket in buckets})) or "none",
            calls=calls,
            batches=dict(sorted(batches.items())),
            times=times,
            sizes=tuple(sorted({bucket.size for bucket in live})),
            signatures=len(signatures),
            pool_bytes=pool.memory().reserved if pool is not None else 0,
            saved_bytes=_saved_bytes(live) if pool is not None and pool.weak else 0,
            notes=(
                *(f"exact sizes only: {reason}" for reason in no_padding_reasons),
                *notes,
                *(
                    f"size {size}: a replay takes {1 - gain:.0%} of eager's time"
                    for size, gain in gains.items()
                    if gain < NO_GAIN
                ),
            ),
        )
