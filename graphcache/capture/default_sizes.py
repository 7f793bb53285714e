"""The sizes that are captured by default, and the size that serves a batch."""

from bisect import bisect_left
from collections.abc import Sequence


def default_sizes(batch: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, multiples of 8 up to 256 and of 16 above, all below `batch`, and `batch`.

    These are vLLM's sizes. For weight-bound work their padding costs about 1 % of the time.
    """
    ladder = (1, 2, 4, *range(8, 257, 8), *range(272, batch + 1, 16))
    return (*(size for size in ladder if size < batch), batch)


def padded_size(sizes: Sequence[int], batch: int) -> int | None:
    """Returns the least of the ascending `sizes` that holds `batch` rows, or None above the largest."""
    index = bisect_left(sizes, batch)
    return sizes[index] if index < len(sizes) else None
