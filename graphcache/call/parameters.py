"""The parameters of a forward: those of the code that a call runs, and those that it shows.

A wrapper made by `functools.wraps` shows the parameters of the function inside. Its body may change the
arguments on the way. So calls are told apart by what the outermost code is passed. The parameters that
a wrapper shows only name arguments, for options and messages.
"""

import inspect
import weakref
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.amp.autocast_mode import autocast_decorator

REQUIRED = inspect.Parameter.empty
_ANY = inspect.signature(lambda *args, **kwargs: None).parameters
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _nothing() -> None: ...


# Decorators of torch that pass their arguments on as they are, to the function in their cell `func`.
_PASS_ON = {
    getattr(made, "__code__", None): made.__code__.co_freevars.index("func")
    for made in (torch.no_grad()(_nothing), autocast_decorator(None, _nothing))
    if "func" in made.__code__.co_freevars
}


def shown_parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters that a function shows; for a builtin that shows none, `*args, **kwargs`."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return _ANY


def _running(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function whose code takes the arguments of a call."""
    if type(function) is MethodType:
        return _running(function.__func__)
    while type(function) is FunctionType and function.__code__ in _PASS_ON:
        cells: Any = function.__closure__
        function = cells[_PASS_ON[function.__code__]].cell_contents
    return function


def _own_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Returns the parameters of the code that a call runs; `*args, **kwargs` where that is no Python."""
    running: Any = _running(function)
    if type(running) is not FunctionType:
        return list(_ANY.values())
    # A function of its own shows neither `__wrapped__` nor `__signature__`.
    bare = FunctionType(running.__code__, {}, "", running.__defaults__, running.__closure__)
    bare.__kwdefaults__ = running.__kwdefaults__
    own = list(inspect.signature(bare).parameters.values())
    is_bound = type(function) is MethodType
    return own[1:] if is_bound and own and own[0].kind in _BY_POSITION else own


class Parameters:
    """The parameters of one forward.

    Args:
        function: the forward, bound where it is a method; known weakly.

    Attributes:
        defaults: by the name of each parameter, its default or `REQUIRED`.
        by_position_only: the names that can't be given by name.
        positional: the names that can be given by position.
        takes_names: takes other names, too.
        takes_positions: takes more positional arguments, too.
        function: returns the function whose code takes the arguments; None for other code.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        parameters = _own_parameters(function)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.defaults = {p.name: p.default for p in named}
        self.by_position_only = {p.name for p in named if p.kind is p.POSITIONAL_ONLY}
        self.positional = [p.name for p in named if p.kind in _BY_POSITION]
        self.takes_names = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes_positions = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        shown = shown_parameters(function)
        self._shown = [p.name for p in shown.values() if p.kind in _BY_POSITION]
        own = dict.fromkeys(self.positional)
        self._labels = {
            name: label for name, label in zip(own, self._shown, strict=False) if name not in shown
        }
        running = _running(function)
        is_python = type(running) is FunctionType
        self.function: Callable[[], Any] = weakref.ref(running) if is_python else lambda: None
        self._known = self._default_ids()

    def label(self, name: str) -> str:
        """Returns the name under which options and messages know an argument."""
        if not name.startswith("*"):
            return self._labels.get(name, name)
        position = len(self.positional) + int(name[1:])
        return self._shown[position] if position < len(self._shown) else name

    def refresh(self) -> None:
        """Reads the defaults again where somebody has replaced them."""
        if self._known == (known := self._default_ids()):
            return
        self._known, function = known, self.function()
        for parameter in _own_parameters(function) if function is not None else ():
            if parameter.name in self.defaults:
                self.defaults[parameter.name] = parameter.default

    def _default_ids(self) -> tuple[Any, ...]:
        function = self.function()
        if function is None:
            return ()
        by_name = function.__kwdefaults__ or {}
        return (*map(id, function.__defaults__ or ()), *by_name, *map(id, by_name.values()))

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the arguments by name, given or default; None where they do not fit.

        Parameters come in their own order. Other names follow in the caller's, which `**kwargs` keeps.
        """
        more = len(args) - len(self.positional)
        names = (*self.positional, *(f"*{index}" for index in range(more)))
        named = dict(zip(names, args, strict=False))
        given = len(named)
        for name, default in self.defaults.items():
            if name not in named:
                by_name = name in kwargs and name not in self.by_position_only
                named[name] = kwargs[name] if by_name else default
                given += by_name
        extras = [name for name in kwargs if name not in self.defaults] if self.takes_names else []
        named.update((name, kwargs[name]) for name in extras)
        is_whole = all(value is not REQUIRED for value in named.values())
        takes_all = given + len(extras) == len(args) + len(kwargs) and (
            more <= 0 or self.takes_positions
        )
        fits = is_whole and takes_all and not any(name.startswith("*") for name in extras)
        return named if fits else None
