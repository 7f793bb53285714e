"""The exceptions of graphcache: one root, so that `except GraphCacheError` catches them all."""

from torch import Tensor

from graphcache.report.reasons import Reason


class GraphCacheError(RuntimeError):
    """The root of every exception that graphcache raises.

    A stale output is the exception to the rule: touching it raises torch's own `RuntimeError`, from
    deep inside the operation, with a text of ours.
    """


class CaptureError(GraphCacheError):
    """A forward could not be captured into a graph.

    Args:
        message: what the forward does that no graph can hold, and where.
        reason: the kind of that; see docs/troubleshooting.md.
    """

    def __init__(self, message: str, *, reason: Reason = Reason.CAPTURE_FAILED) -> None:
        super().__init__(message)
        self.reason = reason


class OptionError(GraphCacheError, ValueError):
    """An option of `cuda_graphed` or of a pool has a value that makes no sense."""


class NativeModuleError(GraphCacheError, ImportError):
    """`graphcache._C` is not built, or was built for another torch."""


class GraphCacheWarning(UserWarning):
    """A forward is served more slowly than it could be; the text says why and what to do."""


def describe(tensor: Tensor) -> str:
    """Returns dtype and shape, as messages give them."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
