"""Contexts around a forward that restore mutated memory and switch off caches and the collector."""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch

from graphcache.runtime.torch_patches import Patch


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Switches off autocast's cache of cast weights inside the block."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled forwards eagerly inside the block.

    Dynamo never compiles code again that it met under a dispatch mode, for all modules that share the
    code. Their compiled forwards, and their captures, would run eagerly from then on.
    """
    # Without Dynamo in the process nothing is compiled, and its import takes a second.
    if "torch._dynamo" in sys.modules:
        with _forced_eager:
            yield
        return
    before, _stances.open = _stances.open, ExitStack()
    try:
        with _compiling, _stances.open:
            yield
    finally:
        _stances.open = before


class _ForcedEager:
    """Runs compiled forwards eagerly as long as any thread is inside.

    torch has one stance for all threads. If each thread put back what it found, the last one could leave
    compiled code switched off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                with suppress(RuntimeError):  # refused between the graphs of a compiled caller
                    self._stance = torch.compiler.set_stance("force_eager")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                stance, self._stance = self._stance, nullcontext()
                stance.__exit__(None, None, None)


_forced_eager = _ForcedEager()


class _Stances(threading.local):
    """The stance for code that imports Dynamo only inside the block, as `torch.cond` does."""

    open = ExitStack()


def _compile(*args: Any, **kwargs: Any) -> Any:
    _stances.open.enter_context(_forced_eager)
    return _compiling.before(*args, **kwargs)


_stances = _Stances()
_compiling = Patch(torch, "compile", _compile)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector off inside the block; a search makes enough objects to start it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
