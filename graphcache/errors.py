"""Defines the exceptions of graphcache, with one root for `except GraphCacheError`."""

from torch import Tensor

from graphcache.report.reasons import Reason


class GraphCacheError(RuntimeError):
    """The root of every exception that graphcache raises.

    One error has another type: with `stale="error"`, touching a stale output raises torch's own
    `RuntimeError`, from inside the operation that touches it. Its text is graphcache's.
    """


class CaptureError(GraphCacheError):
    """A forward can't be captured into a graph.

    Args:
        message: the text, which names the line that no graph can hold.
        reason: the kind of the reason; docs/troubleshooting.md explains each kind.
    """

    def __init__(self, message: str, *, reason: Reason = Reason.CAPTURE_FAILED) -> None:
        super().__init__(message)
        self.reason = reason


class CheckError(GraphCacheError):
    """A replay returned something else than eager; raised only with `GRAPHCACHE_CHECK=1`."""


class OptionError(GraphCacheError, ValueError):
    """An option of `cuda_graphed`, of a pool or of the environment has a value that makes no sense."""


class NativeModuleError(GraphCacheError, ImportError):
    """The native library of graphcache is not built, or was built for another version of torch."""


class GraphCacheWarning(UserWarning):
    """A forward runs more slowly than it could; the text gives the reason and the next step."""


def describe(tensor: Tensor) -> str:
    """Returns the dtype and shape of a tensor, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
