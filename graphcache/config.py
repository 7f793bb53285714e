"""Switches that change what every graphed call does: off altogether, or emulated on the CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from graphcache.errors import OptionError

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
disabled_var: ContextVar[bool] = ContextVar("graphcache_disabled", default=_DISABLE)
emulated_var: ContextVar[bool] = ContextVar("graphcache_emulated", default=_EMULATE)

portable_var: ContextVar[bool] = ContextVar("graphcache_portable", default=_PORTABLE)
linear_var: ContextVar[bool] = ContextVar("graphcache_linear", default=_LINEAR)

is_disabled = disabled_var.get
is_emulated = emulated_var.get
is_portable = portable_var.get  # stage by torch calls, as where the driver offers no better
is_linear = linear_var.get  # capture without branches, for a comparison


@contextmanager
def switched(variable: ContextVar[bool], value: bool = True) -> Iterator[None]:
    """Sets one of these inside the block, or the function that it decorates."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def disabled() -> Iterator[None]:
    """Runs every graphed forward eagerly inside the block (this thread or task only).

    `GRAPHCACHE_DISABLE=1` does the same for the whole process.
    """
    with switched(disabled_var):
        yield


@contextmanager
def emulate() -> Iterator[None]:
    """Serves CPU tensors by emulated graphs inside the block (this thread or task only).

    The emulation has the rules and the hazards of CUDA graphs, and none of their speed: it is there
    to test on any machine that a model is fit for graphs. `GRAPHCACHE_EMULATE=1` does the same for
    the whole process.
    """
    with switched(emulated_var):
        yield
