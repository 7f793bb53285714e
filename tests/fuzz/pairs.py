"""A graphed module and its twin, what may be asked of them, and how their answers are compared."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcache import CheckError, GraphCacheError, GraphPool, cuda_graphed
from tests.fuzz.edges import KINDS
from tests.fuzz.modules import FLOATS, Arguments, Inputs, children, itself

HELD = 6  # results that a sequence keeps at most
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def sampled(*values: Any) -> st.SearchStrategy[Any]:
    """Chooses among the values, those first that make a simple example."""
    return st.sampled_from(values)


@dataclass(frozen=True)
class Setup:
    """How a pair is built; `pad`, `bind` and `batch_dim` choose among what its kind allows."""

    kind: str
    style: str
    sizes: tuple[int, ...] | None
    stale: str
    pad: int
    bind: int
    batch_dim: int
    fallback: bool


SEEDS = st.integers(0, 999)
BATCHES = sampled(4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 8, 5, 7, 0)
SETUPS = st.builds(
    Setup,
    kind=sampled(*KINDS, *("cache", "writes") * 2),
    style=sampled("instance", "instance", "class", "function", "closure"),
    sizes=sampled((2, 4), (1, 3), None, (4,), (1, 2, 8)),
    stale=sampled("copy", "copy", "error"),
    pad=st.integers(0, 3),
    bind=st.integers(0, 1),
    batch_dim=st.integers(0, 2),
    fallback=sampled(*[True] * 9, False),
)


@dataclass(frozen=True)
class Plan:
    """One call, but for the module."""

    batch: int
    seed: int
    dtype: int
    layout: str
    values: str
    mode: str
    by_name: bool
    default: str
    hold: str
    feed: int
    where: str
    flavor: str
    alias: str


_COMMON = {
    "seed": SEEDS,
    "hold": sampled("no", "all", "view"),
    "feed": st.integers(-4, HELD - 1),
    "where": sampled("here", "here", "here", "thread", "stream"),
    "flavor": sampled(*["plain"] * 20, "negative", "requires_grad", "parameter", "inference"),
    "alias": sampled(*["none"] * 12, "same", "view", "overlap"),
}
PLANS = st.builds(
    Plan,
    batch=BATCHES,
    dtype=sampled(*[-1] * 7, *range(len(FLOATS))),  # -1: that of the module
    layout=sampled(
        "plain", "plain", "plain", "transposed", "sliced", "offset", "expanded", "channels last"
    ),
    values=sampled("random", "random", "random", "zeros", "large"),
    mode=sampled(*["no_grad"] * 6, "inference", "inference", "grad", "autocast", "device", "disabled"),
    by_name=st.booleans(),
    default=sampled(*["float32"] * 6, "float64"),
    **_COMMON,
)
# Most calls are like the last one: that is when graphs serve.
AGAIN = st.fixed_dictionaries({"batch": BATCHES, **_COMMON})


class Pair:
    """A graphed module and its twin."""

    def __init__(self, setup: Setup, device: torch.device, pool: GraphPool | None, seed: int) -> None:
        kind = self.kind = KINDS[setup.kind]
        torch.default_generator.manual_seed(seed)
        self.setup = setup
        self.batch_dim = kind.batch_dims[setup.batch_dim % len(kind.batch_dims)]
        pad = kind.pads[setup.pad % len(kind.pads)]
        bind = kind.binds[setup.bind % len(kind.binds)]
        self.options = {
            "sizes": setup.sizes, "stale": setup.stale, "pad": pad, "bind": bind,
            "batch_dim": self.batch_dim, "fallback": setup.fallback, "pool": pool,
        }  # fmt: skip
        self.style = setup.style
        named = bool(bind) or isinstance(pad, dict)  # a closure has no names for its arguments
        in_part = kind.parts is not itself or kind.method is not None
        if (self.style == "closure" and named) or (in_part and not self.of_modules()):
            self.style = "instance"
        with device:
            self.twin = kind.build()
            subject = kind.build() if kind.functions else copy.deepcopy(self.twin)
        self.kept = {name: torch.zeros(shape, device=device) for name, shape in kind.kept}
        self.twin_kept = {name: tensor.clone() for name, tensor in self.kept.items()}
        self.tolerance = 0.0
        self.handles: list[tuple[Any, Any]] = []
        self.last: Plan | None = None
        self._classes: dict[type, type] = {}
        if kind.method:
            graphed = cuda_graphed(getattr(subject, kind.method), **self.options)
            setattr(subject, kind.method, graphed)
        elif self.style == "instance":
            for part in kind.parts(subject):
                cuda_graphed(part, **self.options)
        elif self.style == "class":
            for part in kind.parts(subject):
                part.__class__ = self._decorated(type(part))
        self.adopt(subject)

    def _decorated(self, plain: type) -> type:
        if plain not in self._classes:
            kind = type(plain.__name__, (plain,), {})
            self._classes[plain] = cuda_graphed(kind, **self.options)
        return self._classes[plain]

    def adopt(self, subject: nn.Module) -> None:
        """Takes another graphed module, such as a copy, in place of its own."""
        self.subject = subject
        self.call: Callable[..., Any] = subject
        if self.style == "function":
            self.call = cuda_graphed(subject.forward, **self.options)
        elif self.style == "closure":

            def closure(*args: Any, **kwargs: Any) -> Any:
                return subject(*args, **kwargs)

            self.call = cuda_graphed(closure, **self.options)

    def of_modules(self) -> bool:
        return self.style in ("instance", "class")

    def forwards(self) -> list[Any]:
        """Returns what has a `cache_info()`."""
        if self.kind.method:
            return [getattr(self.subject, self.kind.method)]
        return (
            [part.forward for part in self.kind.parts(self.subject)]
            if self.of_modules()
            else [self.call]
        )

    def call_twin(self, *args: Any, **kwargs: Any) -> Any:
        return (self.twin.forward if self.style == "function" else self.twin)(*args, **kwargs)

    def state(self, *, twin: bool) -> dict[str, Any]:
        """Returns all tensors that a call may change, by name, and the attributes that it may set."""
        module, kept = (self.twin, self.twin_kept) if twin else (self.subject, self.kept)
        named = {**dict(module.named_parameters()), **dict(module.named_buffers()), **kept}
        return named | {name: getattr(module, name) for name in self.kind.attributes}

    def forget_objects(self) -> None:
        """Has objects made anew over the kept tensors: one of the sides may have changed its own."""
        for tensor in (*self.kept.values(), *self.twin_kept.values()):
            vars(tensor).pop("passed", None)

    def compared(self, *, twin: bool) -> dict[str, Any]:
        state = self.state(twin=twin)
        return {k: v[:-1] if k in self.kind.spare and v.dim() else v for k, v in state.items()}

    def inputs(self, plan: Plan, fed: Tensor | None, device: torch.device, *, twin: bool) -> Arguments:
        module, kept = (self.twin, self.twin_kept) if twin else (self.subject, self.kept)
        own = next((p.dtype for p in module.parameters()), torch.float32)
        dtype = own if plan.dtype < 0 or self.kind.typed else FLOATS[plan.dtype]
        args, kwargs = self.kind.inputs(
            Inputs(
                plan.batch,
                plan.seed,
                dtype,
                plan.layout,
                plan.values,
                self.batch_dim,
                device,
                fed,
                {**dict(module.named_buffers()), **kept},
                True,
                plan.flavor,
                plan.alias,
            )
        )
        names = list(inspect.signature(self.twin.forward).parameters)
        if plan.by_name and args and "more" not in names[: len(args)] and self.style != "closure":
            return args[:-1], {names[len(args) - 1]: args[-1], **kwargs}
        return args, kwargs

    def replays(self) -> int:
        return sum(forward.cache_info().hits for forward in self.forwards())


@dataclass
class Attempt:
    """The result, or the exception, of calling one side."""

    result: Any = None
    error: Exception | None = None
    inputs: list[Tensor] = field(default_factory=list)
    random: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Held:
    """A result that somebody keeps, and what it has to be for as long as it can be read.

    Attributes:
        shared: it may share memory with an argument, so that nobody should write to it.
    """

    expected: list[Tensor]
    actual: list[Tensor]
    pair: Pair
    origin: str
    shared: bool


def is_ours(error: BaseException | None) -> bool:
    return (
        isinstance(error, GraphCacheError | RuntimeError)
        and not isinstance(error, CheckError)
        and (isinstance(error, GraphCacheError) or "graphcache:" in str(error))
    )


def difference(expected: Any, actual: Any, tolerance: float, where: str = "") -> str | None:
    """Returns the difference between two results, or None."""
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        wrong = _of_tensors(expected, actual, tolerance)
        return f"{where}: {wrong}" if wrong else None
    if type(expected) is not type(actual):
        return f"{where}: {type(actual)} instead of {type(expected)}"
    mine, theirs = children(expected), children(actual)
    if mine is None or theirs is None:
        return None if expected == actual else f"{where}: {actual!r} instead of {expected!r}"
    if len(mine) != len(theirs) or (isinstance(expected, dict) and list(expected) != list(actual)):
        return f"{where}: other items"
    keys = list(expected) if isinstance(expected, dict) else range(len(mine))
    found = (
        difference(a, b, tolerance, f"{where}[{key!r}]")
        for key, a, b in zip(keys, mine, theirs, strict=True)
    )
    return next((wrong for wrong in found if wrong), None)


def _of_tensors(expected: Tensor, actual: Tensor, tolerance: float) -> str | None:
    for name in ("shape", "dtype", "device", "requires_grad"):
        if getattr(expected, name) != getattr(actual, name):
            return f"{name} {getattr(actual, name)} instead of {getattr(expected, name)}"
    if expected.is_inference() != actual.is_inference():
        return "an inference tensor, or not"
    # A view of a staged argument that leaves gaps comes back without them (docs/semantics.md).
    if expected.numel() > 0 and is_dense(expected) and _strides(expected) != _strides(actual):
        return f"strides {actual.stride()} instead of {expected.stride()}"
    with torch.no_grad():
        return _of_values(expected, actual, tolerance)


def _of_values(expected: Tensor, actual: Tensor, tolerance: float) -> str | None:
    if torch.equal(expected, actual):
        return None
    equal = False
    if expected.is_floating_point():
        a, b = expected.double(), actual.double()
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        equal = torch.allclose(b, a, rtol=0.0, atol=tolerance * max(scale, 1.0), equal_nan=True)
    return None if equal else f"{actual.tolist()} instead of {expected.tolist()}"


def _strides(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def is_dense(x: Tensor) -> bool:
    """Return True if the elements fill their memory, each at an address of its own."""
    if 0 in x.stride():  # a part of one that repeats an element
        return False
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != extent:
            return False
        extent *= size
    return True
