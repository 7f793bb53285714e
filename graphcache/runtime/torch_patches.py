"""Replaces functions of torch inside a block, for the threads that are in the block."""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch._C._dynamo import eval_frame
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache.runtime.source_lines import is_torch


def _dynamo_looks() -> bool:
    """Return True if Dynamo is called for the frames of this thread."""
    if "torch._dynamo" not in sys.modules:
        return False
    callback = eval_frame.get_eval_frame_callback()
    return callback is not None and callback is not False


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not import Dynamo.

    torch hides `__torch_dispatch__` from Dynamo by a wrapper that imports Dynamo and 800 modules more,
    at the first operation. The wrapper takes as long as an operation. It is called only where Dynamo
    looks at frames just now.
    """

    supports_higher_order_operators = True  # which `take_apart` runs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        plain = cls.__torch_dispatch__
        super().__init_subclass__(**kwargs)
        hidden = _disable_dynamo(plain)

        def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return (hidden if _dynamo_looks() else plain)(mode, func, types, args, kwargs)

        cls.__torch_dispatch__ = dispatch  # type: ignore[method-assign]


class Patch:
    """Replaces a function of a module while any thread is in a `with` block of this.

    Args:
        module: the module that the function is looked up in.
        name: the function's name there.
        answer: the replacement, for threads inside a block. Other threads get the function itself.

    Attributes:
        before: the function itself.
    """

    def __init__(self, module: Any, name: str, answer: Callable[..., Any]) -> None:
        self.before: Callable[..., Any] = getattr(module, name)
        self._module, self._name, self._answer = module, name, answer
        self._inside: Counter[int] = Counter()
        self._lock = threading.Lock()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        inside = self._inside[threading.get_ident()] > 0
        return self._answer(*args, **kwargs) if inside else self.before(*args, **kwargs)

    def __enter__(self) -> None:
        with self._lock:
            self._inside[threading.get_ident()] += 1
            setattr(self._module, self._name, self._call)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside[threading.get_ident()] -= 1
            self._inside = +self._inside
            if not self._inside:
                setattr(self._module, self._name, self.before)


_HANDLES = torch.overrides.handle_torch_function.__code__
# Libraries skip what a capture can't hold, such as checks of values, where they believe to be in one.
as_in_a_capture = Patch(torch.cuda, "is_current_stream_capturing", lambda: True)


class HiddenMode(TorchFunctionMode):
    """A mode that torch does not find when it asks for active modes: a first call runs as eager does.

    nn.MultiheadAttention and nn.Transformer leave their fast path under a mode.
    """

    def __enter__(self) -> Any:
        _hiding.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _hiding.__exit__(*error)


def unpatched(func: Any) -> Any:
    """Returns the function of torch that asked the mode, where the user's stands in its place.

    A function of torch hands a mode what the module of torch holds under its name. If the user has
    replaced that, and the replacement calls the function, it would run once more for each mode.
    """
    if not isinstance(func, FunctionType) or is_torch(func.__code__.co_filename):
        return func
    frame = sys._getframe(2)
    caller = frame.f_back if frame.f_code is _HANDLES else None
    if caller is None or caller.f_code is func.__code__ or caller.f_code.co_freevars:
        return func
    return FunctionType(caller.f_code, caller.f_globals)


def _has_torch_function(args: Any) -> Any:
    if not isinstance(torch.overrides._get_current_function_mode(), HiddenMode):
        return _hiding.before(args)
    with torch.overrides._pop_mode_temporarily():
        return _has_torch_function(args)


_hiding = Patch(torch.overrides, "has_torch_function", _has_torch_function)
