"""Recognises the hooks of submodules that run inside a forward, so that messages can name them.

A hook is code like any other of the forward: traced, guarded and captured. Only its caller is special:
a line of `nn.Module._call_impl`. A forward that no graph can hold because of a hook gets another chance
when that hook is gone.
"""

import inspect
import re
import weakref
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

from torch import nn

from graphcache.tracing.bytecode import words_in


def _lines_that_call_hooks() -> dict[CodeType, frozenset[int]]:
    """Returns the numbers of the lines of torch that call a hook, by the code that they are in."""
    code = nn.Module._call_impl.__code__
    try:
        lines, first = inspect.getsourcelines(code)
    except OSError:  # a torch without its sources
        return {}
    numbers = frozenset(first + i for i, line in enumerate(lines) if re.search(r"= hook\(self", line))
    return dict.fromkeys((code, *(c for c in code.co_consts if isinstance(c, CodeType))), numbers)


_LINES = _lines_that_call_hooks()


class Hook:
    """A hook of a submodule that ran inside a forward.

    Args:
        module: the submodule; referred to weakly, as is the hook.
        key: the number under which the submodule keeps the hook.
        function: the hook itself.

    Attributes:
        names: those in the code that the hook ran.
        effect: something that the hook did and that nothing puts back, such as printing; or None.
    """

    def __init__(self, module: nn.Module, key: int, function: Any) -> None:
        self._module, self._key = weakref.ref(module), key
        try:
            self._function: Callable[[], Any] = weakref.ref(function)
        except TypeError:
            self._function = self._registered
        function = getattr(function, "func", function)  # of a partial
        name = getattr(function, "__qualname__", type(function).__qualname__)
        self._name = name.rpartition("<locals>.")[2]
        self.names: set[str] = set()
        self.effect: str | None = None

    def _registered(self) -> Any:
        module: Any = self._module()
        tables = () if module is None else (module._forward_hooks, module._forward_pre_hooks)
        return next((table[self._key] for table in tables if self._key in table), None)

    def is_registered(self) -> bool:
        """Return True if the submodule would still call this hook."""
        found = self._registered()
        return found is not None and found is self._function()

    def described(self, root: Any) -> str:
        """Returns the name of the hook, and that of its submodule as `root` calls it."""
        module = self._module()
        paths = root.named_modules() if isinstance(root, nn.Module) else ()
        path = next((repr(path) for path, each in paths if each is module), type(module).__qualname__)
        return f"`{self._name}` on {path}"

    def changes(self, names: Iterable[str]) -> list[str]:
        """Returns those names of changed values that the code of this hook can have changed."""
        if "setattr" in self.names:
            return list(names)
        own = f"hooks[{self._key}]"  # such as a default argument
        return [name for name in names if own in name or not self.names.isdisjoint(words_in(name))]


class HookRecorder:
    """Records the hooks that run, and the names in their code.

    Attributes:
        found: the hooks, each once.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Hook] = {}
        self._running: list[tuple[FrameType, Hook]] = []

    def enter(self, frame: FrameType) -> None:
        """Takes a frame that begins."""
        hook = self._called_by(frame.f_back)
        if hook is not None:
            self._running.append((frame, hook))
        code = frame.f_code
        for _, running in self._running:
            running.names.update(code.co_names, code.co_freevars)

    def leave(self, frame: FrameType) -> None:
        """Takes a frame that ends."""
        if self._running and self._running[-1][0] is frame:
            self._running.pop()

    def running(self, caller: FrameType) -> Hook | None:
        """Returns the hook that runs when `caller` calls a function of C, which may be one itself."""
        return self._called_by(caller) or (self._running[-1][1] if self._running else None)

    def _called_by(self, caller: FrameType | None) -> Hook | None:
        if caller is None or caller.f_lineno not in _LINES.get(caller.f_code, ()):
            return None
        module, key, function = (caller.f_locals[name] for name in ("self", "hook_id", "hook"))
        if (id(module), key) not in self.found:
            self.found[id(module), key] = Hook(module, key, function)
        return self.found[id(module), key]
