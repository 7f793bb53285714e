"""State of torch that first calls change for a while."""

from __future__ import annotations

import torch
import torch._dynamo.eval_frame

from graphcache.runtime.torch_state import uncompiled


def stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


def test_stance_comes_back_whichever_thread_leaves_last() -> None:
    """Each puts back what it found, and the last one found compiled code switched off."""
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    assert stance() == "force_eager"
    first.__exit__(None, None, None)
    assert stance() == "force_eager"
    second.__exit__(None, None, None)
    assert stance() == "default"
