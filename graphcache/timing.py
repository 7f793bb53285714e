"""What a call takes with its graph and without, each measured once and on the device."""

from dataclasses import dataclass

from graphcache.runtime import Stopwatch
from graphcache.stats import Times

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
