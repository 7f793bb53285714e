"""The modules that the fuzzer drives: small, and each with a habit that graphs have to cope with.

A `Kind` says how to build one, what arguments it takes and which options make sense for it. The width
is 4 throughout, so that what one module returns can often be fed to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 4
SLOTS = 8  # of a cache; one more is spare, for padded rows

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Inputs:
    """Makes the arguments of one call, the same ones each time: once for either side.

    Attributes:
        fed: an earlier output to pass instead of the first tensor that it fits.
        overlap: whether an argument may lie in memory that the forward writes.
        kept: tensors that live on from call to call: a cache that is passed in, buffers of the module.
        flavor: `requires_grad` and the like.
        alias: how a second argument of a shape lies to the first one.
    """

    batch: int
    seed: int
    dtype: torch.dtype
    layout: str
    values: str
    batch_dim: int
    device: torch.device
    fed: Tensor | None
    kept: dict[str, Tensor]
    overlap: bool
    flavor: str = "plain"
    alias: str = "none"
    first: Tensor | None = None

    def generator(self) -> torch.Generator:
        self.seed += 1
        return torch.Generator().manual_seed(self.seed)

    def rows(self, *shape: int) -> Tensor:
        """Floating point of exact quarters, with the batch where `batch_dim` says."""
        return self.floats(*((3, self.batch, *shape) if self.batch_dim else (self.batch, *shape)))

    def floats(self, *shape: int) -> Tensor:
        if self.fed is not None and self.fed.dtype == self.dtype and self.fed.dim() == len(shape):
            fed, self.fed = self.fed, None
            if fed.shape == shape:
                return fed
            if fed.shape[1:] == shape[1:] and fed.shape[0] > shape[0]:
                return fed[: shape[0]]
        if self.alias != "none" and shape:
            return self.aliased(*shape)
        return self.flavored(self.strided(self.numbers(*shape)))

    def numbers(self, *shape: int) -> Tensor:
        values = torch.randint(-8, 9, shape, generator=self.generator()) / 4
        if self.values != "random":
            values = values.zero_() if self.values == "zeros" else values * 1000
        return values.to(self.device, self.dtype)

    def aliased(self, *shape: int) -> Tensor:
        """The first tensor again, a view of it, or its rows but the first and one more."""
        if self.first is None or self.first.shape != (shape[0] + 1, *shape[1:]):
            self.first = self.flavored(self.strided(self.numbers(shape[0] + 1, *shape[1:])))
            self.same = self.first[:-1]
            return self.same
        if self.alias == "same":
            return self.same
        return self.same[:] if self.alias == "view" else self.first[1:]

    def flavored(self, x: Tensor) -> Tensor:
        """The same values, in a tensor about which code may ask."""
        # In inference mode torch converts such a view wrongly, if any dispatch mode is on.
        if self.flavor == "negative" and not torch.is_inference_mode_enabled():
            return torch._neg_view(-x)
        if self.flavor == "parameter":
            return nn.Parameter(x, requires_grad=False)
        if self.flavor == "inference":
            with torch.inference_mode():
                return x.clone()
        return x.requires_grad_() if self.flavor == "requires_grad" else x

    def ints(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        values = torch.randint(0, high, shape, generator=self.generator())
        return self.strided((values * (self.values != "zeros")).to(self.device, dtype))

    def slots(self) -> Tensor:
        """A slot of its own for each row."""
        return torch.randperm(SLOTS, generator=self.generator())[: self.batch].to(self.device)

    def state(self, name: str) -> Tensor:
        """Now and then, rows of what the forward itself writes to, instead of some of their own."""
        overlaps = self.number(*[False] * 5, True)
        return (
            self.kept[name][: self.batch]
            if overlaps and self.overlap
            else self.floats(self.batch, WIDTH)
        )

    def number(self, *choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=self.generator()))]

    def strided(self, x: Tensor) -> Tensor:
        if self.layout == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "sliced":
            return torch.stack((x, x), -1)[..., 0]
        if self.layout == "offset" and x.dim() > 0:
            return torch.cat((x[:1], x))[min(1, x.shape[0]) :]
        if self.layout == "expanded" and x.dim() > 0 and x.shape[0] > 0:
            return x[:1].expand_as(x)
        if self.layout == "channels last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sum(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, causal: bool = False, *, scale: float = 1.0) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal) * scale


class Named(NamedTuple):
    twice: Tensor
    label: str


@dataclass
class Record:
    total: Tensor
    parts: list[Tensor]


class Nested(nn.Module):
    def forward(self, x: Tensor, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        y = x if extra is None else x + extra["shift"] * extra["by"][0]
        return {
            "named": Named(y * 2, "a"),
            "record": Record(y + 1, [y[..., :2], y]),
            "none": (None, 3),
        }


class ViewOfInput(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, x[..., 1:], x.transpose(0, -1), x + 1


class ViewOfParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(WIDTH)))
        self.register_buffer("table", torch.arange(3.0 * WIDTH).view(3, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.weight, self.weight[1:], self.table.t(), x * self.weight + self.table[0]


class Integers(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        positive = x > 0
        return positive, positive.sum(-1), x.round().to(torch.int32), (x * 4).long() // 3


class Casts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.double() / 3, x.to(torch.bfloat16).float(), x.half() * 2


class Makes(nn.Module):
    """Makes tensors out of nothing: their dtype follows the default."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ones = torch.ones(3, device=x.device)
        steps = torch.arange(WIDTH, device=x.device)
        listed = torch.tensor([0.5, 2.0], device=x.device)
        return ones, steps * 2, x + steps, torch.zeros((), device=x.device) + 1.5, x[..., [1, 0]], listed


class Constants(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, torch.tensor([1.0, 2.0])


class Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cumsum(0), x.flip(0)


class OverRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(0)


class CountsRows(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x * x.shape[0], x.shape[0]


class Total(nn.Module):
    """An output without the batch that depends on every row, unless added rows are zero."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(0), x * 2


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return x * self.steps


class Cache(nn.Module):
    """A KV cache as in a decode step: one row of state for each slot, and a spare one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(SLOTS + 1, WIDTH))
        self.register_buffer("lengths", torch.zeros(SLOTS + 1, dtype=torch.int64))
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        self.cache[slots] = self.cache[slots] * 0.5 + self.project(x).to(self.cache.dtype)
        self.lengths[slots] += 1
        return self.cache[slots] + self.lengths[slots, None] + x.to(self.cache.dtype)


class Writes(nn.Module):
    """Writes to an argument, through a slot for each row, and returns a view of it."""

    def forward(self, x: Tensor, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        cache[slots] = (cache[slots] * 0.5 + x).to(cache.dtype)
        return x + cache[slots], cache[:2]


class Slots:
    """Keeps rows for a forward, which is given it each time."""

    def __init__(self, rows: Tensor, scale: float = 1.0) -> None:
        self.layers = [{"rows": rows}]
        self.scale = scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and self.scale == other.scale

    __hash__ = object.__hash__


class WritesToObject(nn.Module):
    def forward(self, x: Tensor, cache: Slots, slots: Tensor) -> tuple[Tensor, Slots]:
        rows = cache.layers[0]["rows"]
        rows[slots] = (rows[slots] * 0.5 + x).to(rows.dtype)
        return x + rows[slots] * cache.scale, cache


class ReplacesInObject(nn.Module):
    def forward(self, x: Tensor, cache: Slots, slots: Tensor) -> Tensor:
        rows = cache.layers[0]["rows"]
        cache.layers[0]["rows"] = rows * 0.5
        return x + rows[slots] * cache.scale


class ReadsObject(nn.Module):
    """Rows without the batch, which any batch reads."""

    def forward(self, x: Tensor, table: Slots) -> Tensor:
        return x @ table.layers[0]["rows"].t() * table.scale


class InPlace(nn.Module):
    """Writes to the very argument that carries the batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Recurrent(nn.Module):
    """Its state has the batch in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state * 0.5 + self.mix(x)
        return state.sum(0), state


class Remembers(nn.Module):
    """Changes attributes: what no graph replays."""

    calls: int = 0
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = x * self.calls if self.last is None else x * self.calls + self.last
        self.last = x.new_ones(()) * self.calls
        return out


class Lazy(nn.Module):
    """Makes its table when it is first called."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.dtype != x.dtype:
            self.table = torch.arange(WIDTH, dtype=x.dtype, device=x.device) / 4
        return x + self.table


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, self.training)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + torch.rand_like(x), torch.randn(3, device=x.device)


@dataclass
class Config:
    scale: float
    shift: Tensor
    flags: dict[str, Any]


class Settings(nn.Module):
    """Reads tensors and Python values from every place that a module has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.plain = torch.ones(WIDTH)
        self.options = {"factor": 1.5, "bias": torch.ones(WIDTH), "list": [torch.ones(WIDTH), 2.0]}
        self.config = Config(0.5, torch.ones(WIDTH), {"square": False})
        self.inner = nn.Identity()
        self.inner.flag = True

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.plain.to(x)
        x = x * self.options["factor"] + self.options["bias"].to(x)
        x = x * torch.tensor([self.options["list"][1]], device=x.device) + self.options["list"][0].to(x)
        x = x * self.config.scale + self.config.shift.to(x)
        x = x * x if self.config.flags["square"] else x
        return x / 2 if self.inner.flag else x


class Siblings(nn.Module):
    """Decorated children, one after the other, both results of which are used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        second = self.b(first)
        return first + second


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Twice(nn.Module):
    """One decorated child that two parents share, each of which calls it again on its own result."""

    def __init__(self) -> None:
        super().__init__()
        shared = Mlp()
        self.left, self.right = nn.Sequential(shared), nn.Sequential(shared, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


class Sum(nn.Module):
    """Calls one decorated child twice and needs both results: the second overwrites the first."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) + self.child(x * 2)


class Keywords(nn.Module):
    def forward(
        self, x: Tensor, scale: float = 1.0, *more: Tensor, mode: str = "add", **named: Any
    ) -> Tensor:
        for other in (*more, *named.get("others", ())):
            x = x + other if mode == "add" else x * other
        return x * scale + math.prod(named.get("shape", ()))


class Table(nn.Module):
    """An argument without the batch, of three rows: at batch 3 it looks as if it carried it."""

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return x @ table.t(), x + table.mean(0)


def leaves(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in what a forward takes or returns."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in children(tree) or ():
            yield from leaves(part)


def children(tree: Any) -> list[Any] | None:
    """Returns what a container holds, or None for anything else."""
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, (list, tuple)):
        return list(tree)
    return list(vars(tree).values()) if is_dataclass(tree) else None


def itself(module: nn.Module) -> list[nn.Module]:
    """Has the whole module decorated."""
    return [module]


FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kind:
    """One kind of module, and how it may be driven.

    Attributes:
        parts: the modules that are decorated, of a built one.
        pads, binds, batch_dims: the options to choose from.
        smooth: it may be fed with outputs: a little rounding in them makes little rounding out.
        typed: its arguments have the dtype of its parameters, as a kernel of torch does not check that.
        pure: calls may be made in any order, so from two threads at once.
        mixes: its rows depend on each other, so it can't be padded, which is for graphcache to find out.
        attributes: names of what the forward changes besides tensors.
        views: its results share memory with its arguments, and so with each other, in eager alone.
        spare: buffers whose last row is for padding, and is not compared.
        kept: shapes of the tensors that are passed to every call.
        seen: a part of a result that is compared by itself, as the rest would hide it.
        functions: it has functions of its own, which no copy has.
        method: an attribute with the bound method that is graphed, instead of the module.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[Inputs], Arguments]
    parts: Callable[[Any], Sequence[nn.Module]] = itself
    pads: tuple[Any, ...] = (None, 0, 1.5, "edge")
    binds: tuple[tuple[str, ...], ...] = ((),)
    batch_dims: tuple[Any, ...] = (0,)
    smooth: bool = True
    typed: bool = False
    pure: bool = True
    mixes: bool = False
    attributes: tuple[str, ...] = ()
    views: bool = False
    spare: tuple[str, ...] = ()
    kept: tuple[tuple[str, tuple[int, ...]], ...] = ()
    seen: Callable[[Any], Any] | None = None
    functions: bool = False
    method: str | None = None

    @property
    def warms(self) -> bool:
        """Return True if one warm-up stands for the whole. It leaves entries in memos."""
        return self.parts is itself and self.method is None and not self.functions


def _x(m: Inputs) -> Arguments:
    return (m.rows(WIDTH),), {}


def _near_zero(m: Inputs) -> Arguments:
    m.values = "zeros" if m.values == "zeros" else "random"  # a norm of large ones is rounding alone
    return _x(m)


def _image(m: Inputs) -> Arguments:
    return (m.floats(m.batch, 2, 4, 3),), {}


def _tokens(m: Inputs) -> Arguments:
    return (m.ints(7, m.batch, 3, dtype=m.number(torch.int64, torch.int32)),), {}


def _attention(m: Inputs) -> Arguments:
    return (m.floats(m.batch, 3, WIDTH),), m.number({}, {"causal": True}, {"scale": 0.5})


def _nested(m: Inputs) -> Arguments:
    x = m.floats(m.batch, WIDTH)
    extra = {"shift": m.floats(m.batch, WIDTH), "by": [m.number(1.0, 2.0)]}
    return (x,), m.number({}, {"extra": extra})


def _slots(m: Inputs) -> Arguments:
    return (m.state("cache"), m.slots()), {}


def _writes(m: Inputs) -> Arguments:
    return (m.state("cache"), m.kept[m.number("cache", "cache", "other")], m.slots()), {}


def _slots_object(m: Inputs) -> Arguments:
    """One object for each of two tensors, now and then a new one, or one of other values."""
    rows = m.kept[m.number("cache", "cache", "cache", "other")]
    fresh = m.number("", "", "", "", "object", "rows", "scale")
    passed = getattr(rows, "passed", None)
    if passed is None or fresh in ("object", "scale"):
        passed = rows.passed = Slots(rows, 0.5 if fresh == "scale" else 1.0)  # type: ignore[attr-defined]
    elif fresh == "rows":
        passed.layers[0]["rows"] = rows.clone()
    return (m.state("cache"), passed, m.slots()), {}


def _read_object(m: Inputs) -> Arguments:
    return (m.floats(m.batch, WIDTH), Slots(m.floats(3, WIDTH), m.number(1.0, 1.0, 2.0))), {}


def _in_place(m: Inputs) -> Arguments:
    layout, m.layout = m.layout, "plain"
    x, m.layout = m.floats(m.batch, WIDTH), layout
    other = m.floats(m.batch, WIDTH)
    return (x, m.number(x, other) if m.overlap else other), {}


def _keywords(m: Inputs) -> Arguments:
    x, other = m.rows(WIDTH), m.rows(WIDTH)
    return m.number(
        ((x,), {}),
        ((x, 2.0), {}),
        ((x,), {"scale": 3.0, "mode": "multiply"}),
        ((x, 1.0, other), {}),
        ((x, 1.0, other, x), {"mode": "multiply"}),
        ((x,), {"others": [other], "shape": (1, 2)}),
        ((x,), {"shape": (2, 2), "scale": 0.5}),
        ((), {"x": x}),
    )


def _recurrent(m: Inputs) -> Arguments:
    return (m.floats(m.batch, WIDTH), m.floats(2, m.batch, WIDTH)), {}


def _table(m: Inputs) -> Arguments:
    return (m.floats(m.batch, WIDTH), m.floats(3, WIDTH)), {}


def _bound_table(m: Inputs) -> Arguments:
    return (m.floats(m.batch, WIDTH), m.kept[m.number("table", "other")].to(m.dtype)), {}


def _pair(module: Siblings) -> Sequence[nn.Module]:
    return [module.a, module.b]


_CACHES = (("cache", (SLOTS + 1, WIDTH)), ("other", (SLOTS + 1, WIDTH)))
_TABLES = (("table", (3, WIDTH)), ("other", (3, WIDTH)))
_ROWS = (0, 1, -2)

KINDS = {
    "mlp": Kind(Mlp, _x, batch_dims=_ROWS),
    "conv": Kind(Conv, _image),
    "embedding": Kind(Embed, _tokens, pads=(None, 0, 1, "edge")),
    "attention": Kind(Attention, _attention),
    "nested": Kind(Nested, _nested),
    "view of input": Kind(ViewOfInput, _x, batch_dims=_ROWS, views=True),
    "view of parameter": Kind(ViewOfParameter, _x),
    "integers": Kind(Integers, _x, batch_dims=_ROWS, smooth=False),
    "casts": Kind(Casts, _x),
    "makes": Kind(Makes, _x),
    "constants": Kind(Constants, _x),
    "centered": Kind(Centered, _x, mixes=True),
    "cumulative": Kind(Cumulative, _x, mixes=True),
    "softmax over rows": Kind(OverRows, _x, mixes=True),
    "counts rows": Kind(CountsRows, _x, mixes=True),
    "total": Kind(Total, _x, mixes=True),
    "steps": Kind(Steps, _x, pure=False, batch_dims=_ROWS),
    "cache": Kind(Cache, _slots, pads=(None, {"slots": -1}), pure=False, spare=("cache", "lengths")),
    "writes": Kind(
        Writes,
        _writes,
        pads=(None, {"slots": -1}),
        binds=((), ("cache",)),
        pure=False,
        spare=("cache", "other"),
        kept=_CACHES,
    ),
    "writes to an object": Kind(
        WritesToObject,
        _slots_object,
        pads=(None, {"slots": -1}),
        pure=False,
        spare=("cache", "other"),
        kept=_CACHES,
    ),
    "replaces in an object": Kind(
        ReplacesInObject, _slots_object, pure=False, spare=("cache", "other"), kept=_CACHES
    ),
    "reads an object": Kind(ReadsObject, _read_object),
    # Not fed: what eager returned as a view of an argument is a copy from a graph, and stays as it was.
    "in place": Kind(InPlace, _in_place, binds=((), ("x",)), smooth=False, pure=False),
    "batch norm": Kind(Norm, _near_zero, typed=True, pads=(None,), pure=False),
    "recurrent": Kind(
        Recurrent, _recurrent, batch_dims=({"x": 0, "state": 1}, {"state": 1}, 0), typed=True
    ),
    "remembers": Kind(Remembers, _x, pure=False, attributes=("calls", "last")),
    "lazy": Kind(Lazy, _x, pure=False, attributes=("table",)),
    "dropout": Kind(Dropout, _x, pure=False),
    "noise": Kind(Noise, _x, pure=False),
    "settings": Kind(Settings, _x),
    "siblings": Kind(Siblings, _x, parts=_pair),
    "siblings, and the parent": Kind(Siblings, _x, parts=lambda m: [m.a, m.b, m]),
    "residual": Kind(Residual, _x, parts=lambda m: list(m.blocks)),
    "twice": Kind(Twice, _x, parts=lambda m: [m.left[0]]),
    "shared": Kind(Twice, _x, parts=lambda m: [m.left, m.right]),
    "sum": Kind(Sum, _x, parts=lambda m: [m.child]),
    "keywords": Kind(Keywords, _keywords, batch_dims=_ROWS),
    "table": Kind(Table, _table, mixes=True, binds=((), ("table",))),
    "bound table": Kind(Table, _bound_table, mixes=True, binds=((), ("table",)), kept=_TABLES),
}
