"""Tells code of the user from that of libraries, and names the user's line."""

import os
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import FrameType

import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep  # torchvision lies beside it


_OURS = str(Path(__file__).parent.parent) + os.sep


_PATHS = sysconfig.get_paths()


def is_ours(frame: FrameType | None) -> bool:
    """Tells whether `frame` runs code of graphcache."""
    return frame is not None and frame.f_code.co_filename.startswith(_OURS)


@cache
def is_library(file: str) -> bool:
    """Tells whether code in `file` is torch's, ours, or of Python itself."""
    if file.startswith((_TORCH, _OURS, "<frozen", "<built-in")) or file == "<":
        return True
    installed = (_PATHS["purelib"], _PATHS["platlib"])
    return file.startswith((_PATHS["stdlib"], _PATHS["platstdlib"])) and not file.startswith(installed)


def user_line() -> str:
    """Returns `file:line, in function` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _OURS, "<")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


def user_line_of(error: BaseException) -> str:
    """Returns the same for the place that raised `error`, and torch's own line where no other is."""
    theirs = place = None
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        here = f"{code.co_filename}:{trace.tb_lineno}, in {code.co_name}"
        if not code.co_filename.startswith((_TORCH, _OURS, "<")):
            place = here
        elif not code.co_filename.startswith((_OURS, "<")):
            theirs = here
        trace = trace.tb_next
    return place or theirs or "an unknown line"
