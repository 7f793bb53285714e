"""Values in place of ints: what they record, and what gets at the int."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphcache.tracing.stand_in import LIMIT, Count, Counted, asks_for_identity, asks_for_type, unread

ONES, NAN = torch.ones(9), float("nan")
BOUNDS: dict[str, tuple[Callable[[Any], Any], tuple[int, int]]] = {
    "<, true": (lambda n: n < 8, (-LIMIT, 8)),
    "<, false": (lambda n: n < 3, (3, LIMIT)),
    "<=, true": (lambda n: n <= 3, (-LIMIT, 4)),
    "<=, false": (lambda n: n <= 2, (3, LIMIT)),
    ">, true": (lambda n: n > 1, (2, LIMIT)),
    ">=, false": (lambda n: n >= 4, (-LIMIT, 4)),
    "==, true": (lambda n: n == 3, (3, 4)),
    "==, false": (lambda n: n == 5, (-LIMIT, 5)),
    "!=, below": (lambda n: n != 1, (2, LIMIT)),
    "bool": (lambda n: not n, (1, LIMIT)),
    "in a tuple": (lambda n: n in (1, 7), (2, 7)),
    "a float": (lambda n: n < 3.5, (-LIMIT, 4)),
    "a whole float": (lambda n: n >= 3.0, (3, LIMIT)),
    "infinity": (lambda n: n < math.inf, (-LIMIT, LIMIT)),
    "a constant first": (lambda n: n > 2, (3, LIMIT)),
    "a sum": (lambda n: 1 + n - 2 < 4, (-LIMIT, 5)),
    "a difference": (lambda n: 10 - n <= 6, (-LIMIT, 4)),
    "negative": (lambda n: -n < -2, (3, LIMIT)),
    "max": (lambda n: max(n, 1), (1, LIMIT)),
    "min": (lambda n: min(9, n) < 20, (-LIMIT, 9)),
    "the type": (lambda n: isinstance(n, int) and not isinstance(n, torch.Tensor), (-LIMIT, LIMIT)),
    "a copy": (lambda n: copy.deepcopy(n) < 8, (-LIMIT, 8)),
    "None": (lambda n: n is None or n == None, (-LIMIT, LIMIT)),  # noqa: E711
}
ESCAPES: dict[str, Callable[[Any], Any]] = {
    "index": lambda n: [1, 2, 3, 4][n],
    "slice": lambda n: ONES[:n],
    "index of a tensor": lambda n: ONES[n],
    "range": range,
    "format": lambda n: f"{n}",
    "percent": lambda n: "%d" % n,  # noqa: UP031
    "text": str,
    "key": lambda n: {n: 1},
    "set": lambda n: n in {1, 2},
    "modulo": lambda n: n % 2,
    "floor": lambda n: n // 2,
    "times": lambda n: n * 2,
    "power": lambda n: 2**n,
    "bits": lambda n: n & 1,
    "int": int,
    "float": float,
    "method": lambda n: n.bit_length(),
    "plus a float": lambda n: n + 0.5,
    "plus a tensor": lambda n: n + ONES,
    "a tensor plus it": lambda n: ONES + n,
    "compared with a tensor": lambda n: n < ONES,
    "compared with nan": lambda n: n < NAN,
    "operator of torch": torch.arange,
    "scalar of torch": lambda n: torch.full((2,), n),
    "size of torch": torch.zeros,
}


@pytest.mark.parametrize("case", BOUNDS)
def test_comparison_bounds_the_int(case: str) -> None:
    use, bounds = BOUNDS[case]
    count = Count(3)
    use(Counted(count))
    assert not count.escaped
    assert (count.low, count.high) == bounds
    real = use(3)
    for value in range(-5, 12):
        agrees = bool(use(value)) == bool(real)
        assert agrees or not bounds[0] <= value < bounds[1]


@pytest.mark.parametrize("case", ESCAPES)
def test_other_use_of_the_int_is_an_escape(case: str) -> None:
    count = Count(3)
    try:
        got = ESCAPES[case](Counted(count))
    except (TypeError, RuntimeError):  # as from code in C, which also ends the run
        return
    assert count.escaped
    want = ESCAPES[case](3)
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def test_sum_is_of_the_same_count() -> None:
    count = Count(3)
    value = 2 + Counted(count) - 7
    assert type(value) is Counted
    assert (value.count, value.sign, value.offset, value.value()) == (count, 1, -5, -2)


@pytest.mark.parametrize("value", [LIMIT, -LIMIT, 10**30])
def test_huge_int_is_no_counter(value: int) -> None:
    assert Count(value).escaped


@pytest.mark.parametrize(
    "use", [len, str, bool, lambda v: v.upper(), lambda v: v == "a", lambda v: v[0]]
)
def test_any_use_of_an_unread_value_is_noticed(use: Callable[[Any], Any]) -> None:
    value: Any = unread("a")
    assert isinstance(value, str)
    assert not value.used
    assert use(value) == use("a")
    assert value.used


def of_self(self: Any) -> Any:
    return type(self)


def of_a_name(n: Any) -> Any:
    return type(n).__name__


def of_instance(n: Any) -> Any:
    return isinstance(n, type)


def asked(n: Any) -> Any:
    return type(n) is int


def handed_on(n: Any) -> Any:
    return list(map(type, [n]))


@pytest.mark.parametrize(
    ("function", "asks"),
    [(of_self, False), (of_a_name, False), (of_instance, False), (asked, True), (handed_on, True)],
)
def test_code_that_asks_for_a_type_is_found(function: Any, asks: bool) -> None:
    assert asks_for_type([function.__code__]) == asks


@pytest.mark.parametrize(
    ("function", "asks"),
    [(lambda a: a is None, False), (lambda a: a is not True, False), (lambda a, b: a is b, True)],
)
def test_code_that_asks_for_identity_is_found(function: Any, asks: bool) -> None:
    assert asks_for_identity([function.__code__]) == asks
