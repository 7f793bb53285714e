"""Branches: matrix products of one capture that the graph runs beside one another.

`cuda.py` opens branches around the body of a capture; nothing else knows of them.
"""

import threading

import torch

from graphcache import _C, config

SIDES = 3  # streams for branches: attention has three products of its input


class Streams:
    """The stream of an arena, and the streams of the branches of its graphs."""

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.Stream(device)
        self.sides: list[torch.cuda.Stream] = []

    def branches(self) -> _C.Branches:
        """Returns a context that captures independent products on the side streams."""
        if not self.sides:
            device = self.main.device
            self.sides = [torch.cuda.ExternalStream(_C.new_stream(), device) for _ in range(SIDES)]
        return _C.Branches(self.main.cuda_stream, self.main, self.sides)


class Branching(threading.local):
    """Chooses the captures of a ladder that get branches, in this thread.

    Attributes:
        pays: False once a size had no branches. Smaller sizes have none then, and the search makes a
            capture a quarter longer.
    """

    pays = True

    def open(self, streams: Streams) -> _C.Branches | None:
        """Returns the context of the next capture; None for a capture without branches."""
        return streams.branches() if self.pays and not config.is_linear() else None

    def close(self, branches: _C.Branches | None) -> int:
        """Returns the number of products that run beside others; notes whether the search pays."""
        if branches is None:
            return 0
        self.pays = branches.count + branches.large > 0
        return branches.count
