"""Finds the sizes that would have served the counted calls at the least cost."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Literal, NamedTuple

from graphcache.errors import GraphCacheError, OptionError
from graphcache.report.cache_info import CacheInfo


@dataclass(frozen=True)
class Suggestion:
    """The result of `suggest_sizes`: the sizes that would have served the calls so far at least cost.

    Attributes:
        sizes: the suggestion, for `cuda_graphed(..., sizes=...)`.
        unit: unit of the costs: "us" if replays were timed, else "rows" that are computed.
        expected: mean cost of a call with the suggested sizes.
        now: mean cost of a call with the current sizes.
        uncovered: number of calls above the largest current size. Both means count such a call as a
            replay at its own size.
    """

    sizes: tuple[int, ...]
    unit: Literal["us", "rows"]
    expected: float
    now: float
    uncovered: int

    @property
    def saved(self) -> float:
        """Share of the current cost that the suggested sizes save; negative if they cost more."""
        return 1 - self.expected / self.now if self.now else 0.0

    def __str__(self) -> str:
        text = (
            f"sizes={self.sizes}: {self.expected:.4g} {self.unit} a call instead of {self.now:.4g} "
            f"({self.saved:.1%} saved)"
        )
        if self.uncovered:
            text += f"; {self.uncovered} calls were above the largest size, and ran eagerly"
        return text


def _mean_cost(batches: Mapping[int, int], sizes: Sequence[int], cost: Callable[[int], float]) -> float:
    total = sum(
        calls * cost(next((size for size in sizes if size >= rows), rows))
        for rows, calls in batches.items()
    )
    return total / sum(batches.values())


def best_sizes(batches: Mapping[int, int], count: int, cost: Callable[[int], float]) -> tuple[int, ...]:
    """Returns the sizes that serve all calls at the least cost: exactly, not by search.

    A larger size is assumed to cost no less. Then only batches that came are worth a size. In the best
    choice, the second-largest size never decreases as the largest one increases. So each further size
    takes one pass of divide and conquer.

    Args:
        batches: the number of calls by their number of rows; not empty.
        count: the number of sizes; where there are fewer batches, each has a size.
        cost: the cost of a replay at a size.
    """
    rows = sorted(batches)
    calls = list(accumulate(batches[size] for size in rows))
    costs = list(accumulate(map(cost, rows), max))
    best = [_Choice(calls[last] * costs[last], (rows[last],)) for last in range(len(rows))]
    for _ in range(1, min(count, len(rows))):
        best = _with_one_more(best, calls, costs)
    return best[-1].sizes


class _Choice(NamedTuple):
    cost: float
    sizes: tuple[int, ...]  # ascending


def _with_one_more(best: list[_Choice], calls: list[int], costs: list[float]) -> list[_Choice]:
    """Returns the best choice for each largest size, with one more size below it."""
    found = [_Choice(inf, choice.sizes) for choice in best]
    pending = [(1, len(best), 0, len(best))]
    while pending:
        start, stop, lowest, highest = pending.pop()
        if start < stop:
            last = (start + stop) // 2
            cost, below = min(
                (best[below].cost + (calls[last] - calls[below]) * costs[last], below)
                for below in range(lowest, min(last, highest + 1))
            )
            found[last] = _Choice(cost, (*best[below].sizes, best[last].sizes[-1]))
            pending += (start, last, lowest, below), (last + 1, stop, below, highest)
    return found


def interpolated(seconds: Mapping[int, float]) -> Callable[[int], float]:
    """Returns a function that estimates the time of any size, linearly, from two sizes or more."""
    sizes = sorted(seconds)

    def time_of(size: int) -> float:
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        low, high = sizes[right - 1], sizes[right]
        slope = (seconds[high] - seconds[low]) / (high - low)
        return max(seconds[low] + slope * (size - low), 0.0)

    return time_of


def suggestion(
    info: CacheInfo, no_padding_reasons: Sequence[str | None], name: str, count: int
) -> Suggestion:
    """Returns the sizes with the least cost for the calls that a forward has counted.

    Args:
        info: the counts of the forward.
        no_padding_reasons: the reason, or None, for each signature of the forward that has graphs.
        name: the name of the forward, for messages.
        count: the number of sizes.

    Raises:
        GraphCacheError: without calls to count, or where no signature can be padded.
        OptionError: unless `count` is a positive integer.
    """
    if type(count) is not int or count < 1:
        raise OptionError(f"graphcache: suggest_sizes({count!r}); give how many sizes you want")
    if not info.batches:
        raise GraphCacheError(
            f"graphcache: no call of {name} was counted since it was graphed or cleared, so there are "
            "no batch sizes to choose from; call suggest_sizes() after some real traffic"
        )
    if no_padding_reasons and None not in no_padding_reasons:
        raise GraphCacheError(
            f"graphcache: {name} is captured at exactly the sizes that it is called with, so there are "
            f"none to choose: {no_padding_reasons[0]}"
        )
    us = {size: each.replay * 1e6 for size, each in info.times.items() if each.replay is not None}
    cost = interpolated(us) if len(us) > 1 else float
    best = best_sizes(info.batches, count, cost)
    return Suggestion(
        best,
        "us" if len(us) > 1 else "rows",
        expected=_mean_cost(info.batches, best, cost),
        now=_mean_cost(info.batches, info.sizes, cost),
        uncovered=sum(calls for rows, calls in info.batches.items() if rows > info.sizes[-1]),
    )
