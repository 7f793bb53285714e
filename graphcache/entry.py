"""What is known of one signature: how it is served, by which graphs, and what those depend on."""

from dataclasses import dataclass, field

from graphcache import _C
from graphcache.buckets import padded_size
from graphcache.capture import Bucket
from graphcache.guards import Guards


@dataclass
class Entry:
    """What is known of one signature.

    Attributes:
        eager: why it always runs eagerly, or None.
        exact: why it is captured only at the sizes that it is called with, or None.
        guards: what its graphs depend on besides the arguments.
        pure: the forward writes to nothing outside, so that running it twice does no harm.
        complete: no sizes will be added: they were given, or no more fit into memory.
        buckets: its graphs by size, ascending.
        native: the same, for the calls that native code serves.
    """

    eager: str | None = None
    exact: str | None = None
    pure: bool = True
    complete: bool = False
    guards: Guards = field(default_factory=Guards)
    buckets: dict[int, Bucket] = field(default_factory=dict)
    native: _C.Entry | None = None

    def add(self, buckets: list[Bucket]) -> None:
        """Adds graphs, keeping the sizes ascending."""
        merged = self.buckets | {bucket.size: bucket for bucket in buckets}
        self.buckets = {size: merged[size] for size in sorted(merged)}

    def bucket(self, batch: int) -> Bucket | None:
        """Returns the graph that serves `batch` rows, or None."""
        if self.exact is not None:
            return self.buckets.get(batch)
        size = padded_size(tuple(self.buckets), batch)
        return None if size is None else self.buckets[size]
