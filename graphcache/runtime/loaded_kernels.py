"""Finds kernels that were compiled at run time, which are unloaded once nobody holds them.

Triton since its pull request 9444, and Inductor since pytorch's 176988, unload a kernel with the last
reference to the object that loaded it: `torch.compiler.reset()` is enough. A graph holds no reference.
"""

import gc
import sys
from collections.abc import Iterator

_TRITONS = ("triton.compiler.compiler", "CompiledKernel")
_INDUCTORS = ("torch._inductor.runtime.static_triton_launcher", "StaticallyLaunchedTritonKernel")


def loaded() -> list[object]:
    """Returns the objects that have loaded kernels; a graph's owner holds them as long as the graph."""
    kinds = set(_kinds())
    return [value for value in gc.get_objects() if type(value) in kinds] if kinds else []


def _kinds() -> Iterator[type]:
    # A search through all objects takes as long as ten captures of a small model.
    for file, name in (_TRITONS, _INDUCTORS) if _has_triton_run() else (_INDUCTORS,):
        kind = getattr(sys.modules.get(file), name, None)
        if kind is not None:
            yield kind
            yield from kind.__subclasses__()


def _has_triton_run() -> bool:
    """Return True if Triton has looked for the device, which precedes its first kernel."""
    driver = getattr(sys.modules.get("triton.runtime.driver"), "driver", None)
    return getattr(driver, "_active", driver) is not None
