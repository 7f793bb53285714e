"""Checks the keywords of `cuda_graphed`, and holds the switches that change every graphed call."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any, Literal, NamedTuple, TypeVar

from graphcache.errors import OptionError

T = TypeVar("T")
BatchDim = int | dict[str, int | None]
Fill = float | int | bool | Literal["edge"]
Pad = Fill | dict[str, Fill] | None
Stale = Literal["error", "copy"]

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def _switch(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise OptionError(
        f"graphcache: the environment variable {name} is {value!r}; "
        f"set it to one of {', '.join(_TRUE)} or {', '.join(v for v in _FALSE if v)}"
    )


_DISABLE, _EMULATE = _switch("GRAPHCACHE_DISABLE"), _switch("GRAPHCACHE_EMULATE")
_PORTABLE, _LINEAR = _switch("GRAPHCACHE_PORTABLE"), _switch("GRAPHCACHE_LINEAR")
_CHECK = _switch("GRAPHCACHE_CHECK")
disabled_var: ContextVar[bool] = ContextVar("graphcache_disabled", default=_DISABLE)
emulated_var: ContextVar[bool] = ContextVar("graphcache_emulated", default=_EMULATE)

portable_var: ContextVar[bool] = ContextVar("graphcache_portable", default=_PORTABLE)
linear_var: ContextVar[bool] = ContextVar("graphcache_linear", default=_LINEAR)
check_var: ContextVar[bool] = ContextVar("graphcache_check", default=_CHECK)

is_disabled = disabled_var.get
is_emulated = emulated_var.get
is_portable = portable_var.get  # copy in by torch calls, as where the driver lacks copy-in nodes
is_linear = linear_var.get  # capture without branches, for a comparison
is_checking = check_var.get  # compare each replay with eager; on before anything is captured


@contextmanager
def switched(variable: ContextVar[bool], value: bool = True) -> Iterator[None]:
    """Sets a switch inside the block, or inside the function that this decorates."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def disabled() -> Iterator[None]:
    """Runs every graphed forward eagerly inside the block, in this thread or task only.

    The environment variable `GRAPHCACHE_DISABLE=1` does the same for the whole process.
    """
    with switched(disabled_var):
        yield


@contextmanager
def emulate() -> Iterator[None]:
    """Serves CPU tensors by emulated graphs inside the block, in this thread or task only.

    Emulated graphs have the rules and the hazards of CUDA graphs, and none of their speed. So a test
    on any machine can check that a model is fit for graphs. The environment variable
    `GRAPHCACHE_EMULATE=1` does the same for the whole process.
    """
    with switched(emulated_var):
        yield


class Options(NamedTuple):
    """The keywords of `cuda_graphed`, which documents them."""

    batch_dim: BatchDim = 0
    sizes: tuple[int, ...] | None = None
    pad: Pad = None
    bind: tuple[str, ...] = ()
    stale: Stale = "copy"
    pool: Any = None
    fallback: bool = True
    progress: bool | None = None
    min_gain: float | None = None

    def checked(self) -> "Options":
        """Returns the options in their normal forms.

        Raises:
            OptionError: for an option that makes no sense.
        """
        bind: Any = self.bind
        names = (bind,) if isinstance(bind, str) or not isinstance(bind, Iterable) else tuple(bind)
        gain = self.min_gain
        _require("stale", self.stale, self.stale in ("error", "copy"), "give one of error, copy")
        _require(
            "batch_dim",
            self.batch_dim,
            self.batch_dim is not None
            and _all_fit(self.batch_dim, lambda dim: dim is None or type(dim) is int),
            "give the number of a dimension, for all arguments or in a dictionary by argument name, "
            "where None stands for no batch",
        )
        _require(
            "pad",
            self.pad,
            self.pad is None
            or _all_fit(self.pad, lambda fill: fill == "edge" or isinstance(fill, (int, float))),
            "a padded row holds a number, or 'edge' (the last row again), for all arguments or in a "
            "dictionary by argument name",
        )
        _require(
            "bind",
            bind,
            all(isinstance(name, str) for name in names),
            "give the names of arguments, such as bind=('x',)",
        )
        _require(
            "min_gain",
            gain,
            gain is None or (isinstance(gain, (int, float)) and 0 <= gain < 1),
            "give the share of eager's time that a graph has to save, such as 0.05, or None to keep all "
            "graphs",
        )
        return self._replace(
            batch_dim=copy(self.batch_dim),
            sizes=None if self.sizes is None else check_sizes(self.sizes),
            bind=names,
        )


def _require(option: str, value: Any, is_valid: bool, advice: str) -> None:
    if not is_valid:
        raise OptionError(f"graphcache: {option}={value!r}; {advice}")


def _all_fit(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Return True if `value` fits; of a dictionary by argument name, each entry has to fit."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and fits(entry) for name, entry in value.items())
    return fits(value)


def top_name(path: str) -> str:
    """Returns the parameter at the start of a path such as `batch['ids'][0]` or `state.h`."""
    return path.partition("[")[0].partition(".")[0]


def by_path(table: Mapping[str, T], path: str, default: T) -> T:
    """Returns the entry of an option for a path, or else for the path's parameter, or else `default`."""
    return table.get(path, table.get(top_name(path), default))


def fill_of(pad: Pad, name: str) -> Fill:
    """Returns the fill of padded rows of the argument at path `name`.

    Without `pad` that is the last row again, which the forward can take. A row of zeros may be no valid
    index, or may not fit the other arguments.
    """
    if isinstance(pad, dict):
        return by_path(pad, name, 0)
    return "edge" if pad is None else pad


def check_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    """Returns `sizes` ascending and without repetition.

    Raises:
        OptionError: unless `sizes` are one or more positive integers.
    """
    try:
        given = tuple(sizes)
    except TypeError:
        raise OptionError(
            f"graphcache: sizes={sizes!r} is not a sequence; give the batch sizes to capture, such as "
            "sizes=(1, 2, 4, 8)"
        ) from None
    if not given or any(type(size) is not int or size < 1 for size in given):
        raise OptionError(
            f"graphcache: sizes={given!r}; give one or more positive integers, such as "
            "sizes=(1, 2, 4, 8)"
        )
    return tuple(sorted(set(given)))
