"""Times arms in turn: host time, latency and throughput."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

TimedCall = tuple[Callable[..., Any], tuple[Any, ...]]

BLOCK = 32  # timed calls of an arm before the next arm takes its turn
WARM = 2  # untimed calls that begin each block: the arm before has left its own code in the caches


@dataclass
class Timed:
    """The calls of one arm, and their times.

    Attributes:
        name: of the arm.
        calls: functions and their arguments, called in turn.
        mode: the mode that the calls are made in.
        reset: puts the state of its module back, before each block.
        before: called before each call, outside the timed part.
        error: what stopped it, if anything did.
    """

    name: str
    calls: Sequence[TimedCall]
    mode: Callable[[], AbstractContextManager[Any]]
    reset: Callable[[], None]
    before: Callable[[], None] | None = None
    host: list[int] = field(default_factory=list)
    latency: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    error: str | None = None


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Keeps the garbage collector out of the timings."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def take_turns(
    arms: Sequence[Timed], rounds: int, block: Callable[[Timed], None], synchronize: Callable[[], Any]
) -> None:
    """Runs `block` for each arm in turn, so often; who goes first changes from round to round."""
    with quiet_collector():
        for turn in range(rounds):
            first = turn % max(len(arms), 1)
            for arm in (*arms[first:], *arms[:first]):
                if arm.error is None:
                    try:
                        with arm.mode():
                            arm.reset()
                            synchronize()
                            block(arm)
                    except Exception as error:
                        arm.error = f"while timed: {type(error).__name__}: {error}"


def host_and_latency(arm: Timed, synchronize: Callable[[], Any], count: int = BLOCK) -> None:
    """Times calls one by one.

    Each is made with the queue of the GPU drained, so that a launch waits for nothing: until it
    returns is the host time, until a synchronise returns the latency.
    """
    calls, before = arm.calls, arm.before
    start = len(arm.host)
    for index in range(-WARM, count):
        function, args = calls[(start + index) % len(calls)]
        if before is not None:
            before()
        begin = perf_counter_ns()
        out = function(*args)
        returned = perf_counter_ns()
        synchronize()
        done = perf_counter_ns()
        del out  # no output is held when the next call is made
        if index >= 0:
            arm.host.append(returned - begin)
            arm.latency.append(done - begin)


def throughput(arm: Timed, synchronize: Callable[[], Any], count: int) -> None:
    """Times many calls that nothing waits for, up to a synchronise at their end."""
    run = [arm.calls[index % len(arm.calls)] for index in range(count)]
    before = arm.before
    begin = perf_counter_ns()
    if before is None:
        for function, args in run:
            function(*args)
    else:
        for function, args in run:
            before()
            function(*args)
    synchronize()
    arm.rates.append(count * 1e9 / (perf_counter_ns() - begin))


def summary(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Returns median, 99th percentile, least and count, in microseconds."""
    ordered = sorted(nanoseconds)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {
        "median": statistics.median(ordered) / 1e3,
        "p99": p99 / 1e3,
        "min": ordered[0] / 1e3,
        "count": len(ordered),
    }


def figures_of(arm: Timed) -> dict[str, Any]:
    """Returns the figures of an arm, or its error."""
    if arm.error is not None:
        return {"error": arm.error}
    return {
        "host_us": summary(arm.host),
        "latency_us": summary(arm.latency),
        "calls_per_second": statistics.median(arm.rates),
    }


def median_seconds(
    arms: Mapping[str, Callable[[], Any]], repeats: int, synchronize: Callable[[], Any]
) -> dict[str, float]:
    """Returns the median seconds of one run of each arm; the arms take turns, also at going first."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in list(arms)[:: 1 if repeat % 2 == 0 else -1]:
            synchronize()
            begin = perf_counter_ns()
            arms[name]()
            synchronize()
            seconds[name].append((perf_counter_ns() - begin) / 1e9)
    return {name: statistics.median(each) for name, each in seconds.items()}
