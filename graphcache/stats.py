"""What `cache_info()` tells."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphcache import _C


@dataclass(frozen=True)
class CacheInfo:
    """Counts of one graphed forward since it was made, or since `cache_clear()`.

    Attributes:
        backend: "cuda" or "emulated"; "none" before the first capture.
        launch: how a replay gets its inputs: "node" is one launch of a graph whose first node copies
            them, "copies" is emulation's, "torch" is by torch calls where neither is to be had.
        calls: all calls; each is either a replay or eager.
        replays: calls served by each size.
        padded_rows: rows that were replayed and cut away again.
        eager: calls that ran eagerly, by reason.
        sizes: captured sizes, ascending, of all signatures.
        signatures: how many kinds of call have graphs.
        dropped: kinds of call whose graphs went for others, as they were not called for longest.
        captures: graphs captured, those dropped since included.
        capture_seconds: time that took.
        expired: held outputs that a later call made unreadable (stale="error").
        copied: held outputs that a later call moved away (stale="copy").
        pool_bytes: memory reserved by the pool, which other modules may share.
        notes: what keeps this forward from being padded or captured, if anything.
    """

    backend: str
    launch: str
    calls: int
    replays: dict[int, int]
    padded_rows: int
    eager: dict[str, int]
    sizes: tuple[int, ...]
    signatures: int
    dropped: int
    captures: int
    capture_seconds: float
    expired: int
    copied: int
    pool_bytes: int
    notes: tuple[str, ...]

    @property
    def hits(self) -> int:
        """Calls served by a graph, as `functools.lru_cache` names them."""
        return sum(self.replays.values())

    @property
    def misses(self) -> int:
        """Calls that ran eagerly."""
        return sum(self.eager.values())

    def __str__(self) -> str:
        rows = [
            ("calls", f"{self.calls}: {self.hits} replayed, {self.misses} eager"),
            ("sizes", ", ".join(map(str, self.sizes)) or "none"),
            ("replays by size", ", ".join(f"{k}: {v}" for k, v in self.replays.items()) or "none"),
            ("padded rows", str(self.padded_rows)),
            *((f"eager: {reason}", str(count)) for reason, count in self.eager.items()),
            ("signatures", f"{self.signatures} with graphs, {self.dropped} dropped for others"),
            ("captures", f"{self.captures} in {self.capture_seconds:.2f} s"),
            ("held outputs", f"{self.expired} expired, {self.copied} copied"),
            ("pool", f"{_readable(self.pool_bytes)} ({self.backend}, {self.launch})"),
            *(("note", note) for note in self.notes),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _readable(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


@dataclass
class Counts:
    """The counters behind `CacheInfo` that outlive a graph."""

    replays: Counter[int] = field(default_factory=Counter)
    padded_rows: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    captures: int = 0
    capture_seconds: float = 0.0
    expired: int = 0
    copied: int = 0

    def copy(self) -> "Counts":
        """Returns counters that can be added to without changing these."""
        return replace(self, replays=self.replays.copy(), eager=self.eager.copy())

    def add(self, bucket: _C.Bucket, *, copied: bool) -> None:
        """Adds what one graph counted; `copied` tells what it did to held outputs."""
        if bucket.replays:
            self.replays[bucket.size] += bucket.replays
        self.padded_rows += bucket.padded_rows
        if copied:
            self.copied += bucket.given_up
        else:
            self.expired += bucket.given_up

    def info(
        self,
        calls: int,
        signatures: Sequence[Mapping[int, Any]],
        exact: Iterable[str],
        pool: Any,
    ) -> CacheInfo:
        """Returns what `cache_info()` tells.

        Args:
            calls: all of them.
            signatures: the graphs of each, by size.
            exact: why some are captured at exact sizes only.
            pool: what they share, or None.
        """
        buckets = [bucket for graphs in signatures for bucket in graphs.values()]
        return CacheInfo(
            backend=pool.runtime.name if pool is not None and buckets else "none",
            launch=" and ".join(sorted({bucket.launch for bucket in buckets})) or "none",
            calls=calls,
            replays=dict(sorted(self.replays.items())),
            padded_rows=self.padded_rows,
            eager=dict(self.eager),
            sizes=tuple(sorted({bucket.size for bucket in buckets})),
            signatures=len(signatures),
            dropped=self.dropped,
            captures=self.captures,
            capture_seconds=self.capture_seconds,
            expired=self.expired,
            copied=self.copied,
            pool_bytes=pool.memory().reserved if pool is not None else 0,
            notes=tuple(f"exact sizes only: {why}" for why in exact),
        )
