"""Modules that depend on the batch, keep Python values by size, or hide what rows do to each other.

Most are a forward alone: `of` makes a class of it, over `Base`, which has whatever a forward may read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz import modules
from tests.fuzz.modules import SLOTS, WIDTH, Arguments, Inputs, Kind, Slots

FACTOR = 3.0  # a global, which `changes` sets


def _far(x: Tensor) -> Tensor:
    return x * FACTOR


class Base(nn.Module):
    """Has a parameter, a closed gate, buffers, and Python values of several types."""

    CONSTANT: ClassVar[float] = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.25, WIDTH))
        self.gate = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("rows", torch.zeros(SLOTS + 1, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.options = {"far": 1.5}
        self.shift = 0.5
        self.table: dict[int, Tensor] = {}
        self.batches: list[int] = []
        self.tally = np.zeros(1)
        self.batch = 0
        self.odd = False
        self.longest: Tensor | None = None


def of(forward: Callable[..., Any]) -> type[nn.Module]:
    """Makes a module of its forward, by whose name `pickle` finds the class."""
    return type(forward.__name__, (Base,), {"forward": forward, "__module__": __name__})


# The batch decides


@of
def branches(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] == 3:
        x = x * 2
    elif x.shape[0] > 4:
        x = x * self.weight
    return x + self.CONSTANT


@of
def helper_at_one(self: Any, x: Tensor) -> Tensor:
    return _far(x) if x.shape[0] == 1 else x * 2


@of
def reads_at_some(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] >= 3:
        x = x * self.options["far"]
    return x + self.shift if x.shape[0] == 1 else x


@of
def squeezes(self: Any, x: Tensor) -> Tensor:
    return (x * self.weight).sum(1, keepdim=True).squeeze()


@of
def first_of_one(self: Any, x: Tensor) -> Tensor:
    y = x * self.weight
    return y[0] if x.shape[0] == 1 else y


@of
def python_values(self: Any, x: Tensor) -> dict[str, Any]:
    n = x.shape[0]
    return {"rows": n, "odd": n % 2 == 1, "x": x + 1, f"{n} rows": [n] * (n % 3)}


@of
def large_or_not(self: Any, x: Tensor) -> tuple[Tensor, bool]:
    return x + 1, x.shape[0] > 2


@of
def raises_at_odd(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] % 2:
        raise ValueError("an odd batch")
    return x * self.weight


@of
def pairs_of_rows(self: Any, x: Tensor) -> Tensor:
    return x.reshape(-1, 2, WIDTH) * self.weight


@of
def list_of_rows(self: Any, x: Tensor) -> list[Tensor]:
    return list((x * self.weight).unbind(0))


@of
def none_at_one(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return x * 2, None if x.shape[0] == 1 else x[:, 0]


# Tables by size, and bookkeeping


def _steps(n: int, x: Tensor) -> Tensor:
    return torch.arange(n, device=x.device, dtype=torch.float32)[:, None] / 2


@of
def dict_by_size(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] not in self.table:
        self.table[x.shape[0]] = _steps(x.shape[0], x)
    return x + self.table[x.shape[0]]


@of
def buffer_by_size(self: Any, x: Tensor) -> Tensor:
    name = f"steps{x.shape[0]}"
    if not hasattr(self, name):
        self.register_buffer(name, _steps(x.shape[0], x), persistent=False)
    return x + getattr(self, name)


@of
def table_grows(self: Any, x: Tensor) -> Tensor:
    if self.longest is None or self.longest.shape[0] < x.shape[0]:
        self.longest = _steps(x.shape[0], x)
    return x + self.longest[: x.shape[0]]


class KeepsInFunctions(nn.Module):
    """Keeps tables in a default argument and in an `lru_cache`; `rebind` changes a closure."""

    def __init__(self) -> None:
        super().__init__()
        factor = 1.0

        def table(x: Tensor, kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
            if x.shape[0] not in kept:
                kept[x.shape[0]] = _steps(x.shape[0], x)
            return kept[x.shape[0]]

        @functools.lru_cache
        def memo(n: int, device: torch.device) -> Tensor:
            return torch.arange(n, device=device)[:, None] * 2

        def scaled(x: Tensor) -> Tensor:
            return x * factor

        def rebind(to: float) -> None:
            nonlocal factor
            factor = to

        self.of_default, self.of_memo, self.scaled, self.rebind = table, memo, scaled, rebind

    @property
    def kept(self) -> Any:
        return sorted(self.of_default.__defaults__[0]), self.of_memo.cache_info().currsize

    @kept.setter
    def kept(self, value: Any) -> None:
        self.of_default.__defaults__[0].clear()
        self.of_memo.cache_clear()


class DefaultBySize(KeepsInFunctions):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x) + self.of_default(x)


class MemoBySize(KeepsInFunctions):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x) + self.of_memo(x.shape[0], x.device)


@of
def notes_the_batch(self: Any, x: Tensor) -> Tensor:
    self.batch = x.shape[0]
    return x * self.weight


@of
def tallies(self: Any, x: Tensor) -> Tensor:
    self.tally[0] += x.shape[0]
    return x * self.weight


@of
def lists_batches(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] not in self.batches:
        self.batches.append(x.shape[0])
    return x * len(self.batches)


@of
def flag_in_except(self: Any, x: Tensor) -> Tensor:
    try:
        y = x.reshape(-1, 2, WIDTH).sum(1)
    except RuntimeError:
        self.odd = True
        y = x * 3
    return y


@of
def notes_the_largest(self: Any, x: Tensor) -> Tensor:
    self.batch = max(self.batch, x.shape[0])
    return x * 2 if self.batch > 4 else x


# Effects at some batches


@of
def counts_at_large(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 2:
        self.count.add_(1)
    return x * 2 + self.count


@of
def counts_at_one(self: Any, x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        self.count += 1
        self.rows[0] += x[0].to(self.rows.dtype)
    return x + self.rows[0]


@of
def writes_at_large(self: Any, x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    if x.shape[0] > 2:
        cache[slots] = (cache[slots] * 0.5 + x).to(cache.dtype)
    return x + cache[slots]


@of
def slots_and_batch(self: Any, x: Tensor, slots: Tensor) -> Tensor:
    self.batch = x.shape[0]
    self.rows[slots] = (self.rows[slots] * 0.5 + x).to(self.rows.dtype)
    return self.rows[slots] + x


@of
def slots_squeezed(self: Any, x: Tensor, slots: Tensor) -> Tensor:
    self.rows.index_add_(0, slots, x.to(self.rows.dtype))
    return self.rows[slots].squeeze(0)


@of
def draws_at_large(self: Any, x: Tensor) -> Tensor:
    return x + torch.rand_like(x) if x.shape[0] > 2 else x * 2


@of
def draws_at_three(self: Any, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=x.shape[0] == 3)


# Rows that depend on each other, and hide it


@of
def weak_mean(self: Any, x: Tensor) -> Tensor:
    return x + 0.05 * x.mean(0)


@of
def weak_norm(self: Any, x: Tensor) -> Tensor:
    return x / (1 + 0.05 * x.norm())


@of
def gated(self: Any, x: Tensor) -> Tensor:
    return x + self.gate * x.mean(0)


@of
def gated_tokens(self: Any, tokens: Tensor) -> Tensor:
    x = self.weight * tokens.sum(1, keepdim=True)
    return x + self.gate * x.sum(0)


@of
def masked(self: Any, x: Tensor) -> Tensor:
    return (x + 0.05 * x.mean(0)).masked_fill(x > 1, torch.finfo(x.dtype).min)


@of
def large_column(self: Any, x: Tensor) -> Tensor:
    return torch.cat((x[:, :1] * 1e4, x + 0.05 * x.mean(0)), 1)


@of
def large_row(self: Any, x: Tensor) -> Tensor:
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    return torch.where(steps == 0, x * 1e4, x + 0.05 * x.mean(0))


@of
def coarse_mean(self: Any, x: Tensor) -> Tensor:
    return (x.bfloat16() + (0.05 * x.mean(0)).bfloat16()).float()


@of
def mixes_at_three(self: Any, x: Tensor) -> Tensor:
    return x + 0.05 * x.mean(0) if x.shape[0] == 3 else x * 2


@of
def not_a_number(self: Any, x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x - x)


# Arguments


@of
def order_of_keywords(self: Any, x: Tensor, **named: Any) -> tuple[Tensor, list[str]]:
    for number, value in enumerate(named.values()):
        x = x * (number + 1) + value
    return x, list(named)


def _wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def body(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = inner(self, *args, **kwargs)
        return y * len(args) + 3 * len(kwargs) if args and args[0].shape[0] != 3 else y

    return body


@of
@_wrap
def wrapped(self: Any, x: Tensor, scale: float = 1.0) -> Tensor:
    return x * scale


@of
def asks(self: Any, x: Tensor) -> tuple[Any, ...]:
    asked = (x.requires_grad, isinstance(x, nn.Parameter), x.is_inference(), x.is_neg())
    return x * 2, *asked, x.is_contiguous()


@of
def branches_on_asked(self: Any, x: Tensor) -> Tensor:
    x = x * 2 if x.requires_grad else x
    x = x + 1 if isinstance(x, nn.Parameter) or x.is_neg() else x
    return x * 3 if x.is_inference() else x + self.weight


@of
def complex_numbers(self: Any, z: Tensor) -> tuple[Any, ...]:
    return torch.view_as_real(z.resolve_conj()) * 2, z.is_conj(), (z * z).real, z.imag.is_neg()


@of
def same_or_not(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, bool]:
    return x * 2 + y, x is y


@of
def writes_to_one(self: Any, x: Tensor, y: Tensor) -> Tensor:
    x.mul_(2)
    return x + y


@of
def two_objects(self: Any, x: Tensor, a: Slots, b: Slots) -> Tensor:
    rows = a.layers[0]["rows"]
    rows.add_(1)
    return x + b.layers[0]["rows"][0] * 2 + (1 if a is b else 0)


# Code that is replaced


class OfLibrary(nn.Module):
    """Calls functions of torch itself and through modules of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(WIDTH, WIDTH), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.relu(self.linear(x))) + F.relu(x)


@of
def reads_globals(self: Any, x: Tensor) -> Tensor:
    return _far(x) + FACTOR + self.CONSTANT


class Decodes(nn.Module):
    """One method is graphed, and lies in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("rows", torch.zeros(SLOTS + 1, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.decode = self._decode

    def _decode(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.linear(x) + self.count

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(x) * 2


class DecodesPurely(Decodes):
    def _decode(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.count


def _x(m: Inputs) -> Arguments:
    return (m.floats(m.batch, WIDTH),), {}


def _small(m: Inputs) -> Arguments:
    m.values = "zeros" if m.values == "zeros" else "random"
    return _x(m)


def _two(m: Inputs) -> Arguments:
    return (m.floats(m.batch, WIDTH), m.floats(m.batch, WIDTH)), {}


def _in_order(m: Inputs) -> Arguments:
    x, a, b = m.floats(m.batch, WIDTH), m.floats(m.batch, WIDTH), m.floats(m.batch, WIDTH)
    return m.number(
        ((x,), {"a": a, "b": b}),
        ((x,), {"b": b, "a": a}),
        ((x,), {"a": a, "c": 2.0, "b": b}),
        ((x,), {"c": 2.0, "b": b, "a": a}),
    )


def _wrapped(m: Inputs) -> Arguments:
    x = m.floats(m.batch, WIDTH)
    return m.number(((x,), {}), ((x, 2.0), {}), ((x,), {"scale": 2.0}), ((), {"x": x}))


def _complex(m: Inputs) -> Arguments:
    z = torch.complex(m.floats(m.batch, WIDTH).float(), m.floats(m.batch, WIDTH).float())
    z = m.strided(z)
    return (m.number(z, z, z.conj(), z.conj().resolve_conj(), z.conj().conj_physical()),), {}


def _slots(m: Inputs) -> Arguments:
    return (m.state("rows"), m.slots()), {}


def _objects(m: Inputs) -> Arguments:
    made = [Slots(m.kept[name]) for name in (m.number("cache", "other"), m.number("cache", "other"))]
    a, b = m.number(made, made, made, made[:1] * 2)
    return (m.floats(m.batch, WIDTH), a, b), {}


_PADS = (None, {"slots": -1})
_effects = functools.partial(Kind, pure=False)
_hides = functools.partial(Kind, inputs=_small, mixes=True)


def _keeps(build: Callable[[], nn.Module], *attributes: str, **others: Any) -> Kind:
    return Kind(build, **{"inputs": _x, **others}, pure=False, attributes=attributes)


KINDS = modules.KINDS | {
    "branches": Kind(branches, _x),
    "a helper at one": Kind(helper_at_one, _x),
    "reads at some": Kind(reads_at_some, _x),
    "squeezes": Kind(squeezes, _x),
    "first of one": Kind(first_of_one, _x),
    "Python values": Kind(python_values, _x),
    "large or not": Kind(large_or_not, _x),
    "raises at odd": Kind(raises_at_odd, _x),
    "pairs of rows": Kind(pairs_of_rows, _x),
    "list of rows": Kind(list_of_rows, _x),
    "None at one": Kind(none_at_one, _x),
    "dict by size": _keeps(dict_by_size, "table"),
    "buffer by size": _keeps(buffer_by_size),
    "table grows": _keeps(table_grows, "longest"),
    "default by size": _keeps(DefaultBySize, "kept", functions=True),
    "memo by size": _keeps(MemoBySize, "kept", functions=True),
    "notes the batch": _keeps(notes_the_batch, "batch"),
    "tallies": _keeps(tallies, "tally"),
    "lists batches": _keeps(lists_batches, "batches"),
    "flag in except": _keeps(flag_in_except, "odd"),
    "notes the largest": _keeps(notes_the_largest, "batch"),
    "counts at large": _effects(counts_at_large, _x),
    "counts at one": _effects(counts_at_one, _x),
    "writes at large": _effects(
        writes_at_large, modules._writes, pads=_PADS, spare=("cache", "other"), kept=modules._CACHES
    ),
    "slots and batch": _keeps(slots_and_batch, "batch", inputs=_slots, pads=_PADS, spare=("rows",)),
    "slots, squeezed": _effects(slots_squeezed, _slots, pads=(None, {"slots": SLOTS}), spare=("rows",)),
    "draws at large": _effects(draws_at_large, _x),
    "draws at three": _effects(draws_at_three, _x),
    "weak mean": _hides(weak_mean),
    "weak norm": _hides(weak_norm),
    "gated": _hides(gated),
    "gated tokens": Kind(gated_tokens, modules._tokens, pads=(None, 0, 1, "edge"), mixes=True),
    "masked": _hides(masked, seen=lambda y: y.where(y > -100, 0.0)),
    "large column": _hides(large_column, seen=lambda y: y[:, 1:]),
    "large row": _hides(large_row, seen=lambda y: y[1:]),
    "coarse mean": _hides(coarse_mean),
    "mixes at three": _hides(mixes_at_three),
    "not a number": _hides(not_a_number, smooth=False),
    "order of keywords": Kind(order_of_keywords, _in_order),
    "wrapped": Kind(wrapped, _wrapped),
    "asks": Kind(asks, _x),
    "branches on asked": Kind(branches_on_asked, _x),
    "complex numbers": Kind(complex_numbers, _complex, smooth=False),
    "same or not": Kind(same_or_not, _two),
    "writes to one": Kind(writes_to_one, _two, smooth=False, pure=False),
    "two objects": _effects(two_objects, _objects, spare=("cache", "other"), kept=modules._CACHES),
    "of the library": Kind(OfLibrary, _x),
    "reads globals": Kind(reads_globals, _x),
    "decodes": Kind(Decodes, _x, pure=False, method="decode"),
    "decodes purely": Kind(DecodesPurely, _x, method="decode"),
}
