"""Kernels that were compiled at run time, which are gone from the device once nobody holds them.

Triton since its pull request 9444, and Inductor since pytorch's 176988, unload a kernel with the last
reference to the object that loaded it: `torch.compiler.reset()` is enough. A graph by itself holds none.
"""

import gc
import sys
from collections.abc import Iterator

_OWNERS = (
    ("triton.compiler.compiler", "CompiledKernel"),
    ("torch._inductor.runtime.static_triton_launcher", "StaticallyLaunchedTritonKernel"),
)


def loaded() -> list[object]:
    """Returns what has loaded kernels, to be held for as long as a graph that may launch them."""
    kinds = set(_kinds())
    return [value for value in gc.get_objects() if type(value) in kinds] if kinds else []


def _kinds() -> Iterator[type]:
    for file, name in _OWNERS:
        kind = getattr(sys.modules.get(file), name, None)
        if kind is not None:
            yield kind
            yield from kind.__subclasses__()
