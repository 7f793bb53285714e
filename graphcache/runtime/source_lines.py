"""Distinguishes user code from library code, names the line of the user, and warns there."""

import contextlib
import os
import sys
import sysconfig
import traceback
import warnings
from functools import cache
from pathlib import Path
from types import FrameType

import torch
import wrapt

from graphcache.errors import GraphCacheWarning

_TORCH = str(Path(torch.__file__).parent) + os.sep  # torchvision lies beside it
OURS = str(Path(__file__).parent.parent) + os.sep
_GENERATED = ("<frozen", "<built-in", "<eval_with_key>")  # `<stdin>` and `<string>` are the user's
# Decorators: their frames lie between a user's call and what it calls.
_WRAPPERS = (str(Path(wrapt.__file__).parent) + os.sep, contextlib.__file__)
_NOT_THE_USERS = (_TORCH, OURS, *_WRAPPERS, *_GENERATED)
_STDLIB = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
_INSTALLED = {"site-packages", "dist-packages"}


def is_ours(frame: FrameType | None) -> bool:
    """Return True if `frame` runs code of graphcache."""
    return frame is not None and frame.f_code.co_filename.startswith(OURS)


@cache
def is_library(file: str) -> bool:
    """Return True if code in `file` is torch's, graphcache's, or Python's own."""
    if file.startswith((_TORCH, OURS, "<frozen", "<built-in")):
        return True
    return file.startswith(_STDLIB) and not is_installed(file)


def is_torch(file: str) -> bool:
    """Return True if code in `file` is torch's."""
    return file.startswith(_TORCH)


def is_installed(file: str) -> bool:
    """Return True if `file` lies where packages are installed; a project's own files do not."""
    return not _INSTALLED.isdisjoint(Path(file).parts)


def _user_frame() -> FrameType:
    """Returns the innermost frame of user code; the outermost frame where there is none."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    return frame


def user_line() -> str:
    """Returns `file:line, in function` of the innermost user code."""
    frame = _user_frame()
    return _line(frame, frame.f_lineno)


def _line(frame: FrameType, number: int) -> str:
    return f"{frame.f_code.co_filename}:{number}, in {frame.f_code.co_name}"


def user_line_of(error: BaseException) -> str:
    """Returns `file:line, in function` of the user code that raised `error`, or else of torch's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    of_user = [each for each in frames if not each[0].f_code.co_filename.startswith(_NOT_THE_USERS)]
    of_torch = [each for each in frames if each[0].f_code.co_filename.startswith(_TORCH)]
    innermost = (of_user or of_torch)[-1:]
    return _line(*innermost[0]) if innermost else "an unknown line"


def warn(text: str) -> None:
    """Issues a `GraphCacheWarning` at the user's line, as if that line had issued the warning."""
    frame = _user_frame()
    warnings.warn_explicit(
        f"graphcache: {text}",
        GraphCacheWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
