"""The exceptions of graphcache: one root, so that `except GraphCacheError` catches them all."""

from torch import Tensor


class GraphCacheError(RuntimeError):
    """The root of every exception that graphcache raises.

    A stale output is the exception to the rule: touching it raises torch's own `RuntimeError`, from
    deep inside the operation, with a text of ours.
    """


class CaptureError(GraphCacheError):
    """A forward could not be captured into a graph."""


class OptionError(GraphCacheError, ValueError):
    """An option of `cuda_graphed` or of a pool has a value that makes no sense."""


class NativeModuleError(GraphCacheError, ImportError):
    """`graphcache._C` is not built, or was built for another torch."""


class GraphCacheWarning(UserWarning):
    """A forward is served more slowly than it could be; the text says why and what to do."""


def describe(tensor: Tensor) -> str:
    """Returns dtype and shape, as messages give them."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
