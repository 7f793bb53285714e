"""Parts of a loop that does not wait for its device: late reads on the host, and draws taken back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Integers of a device, copied to the host without waiting.

    Args:
        count: how many tensors.
        length: of each.
        device: of each.
    """

    def __init__(self, count: int, length: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._event = torch.cuda.Event() if on_cuda else None
        self._values = [torch.empty(length, dtype=torch.long, pin_memory=on_cuda) for _ in range(count)]

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Queues the copies."""
        for value, tensor in zip(self._values, tensors, strict=True):
            value.copy_(tensor, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """Returns the values, which the next `start` overwrites."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


class DrawMarks:
    """The states of a device's random generator after each step, so that a step can be taken back."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            self._generator = torch.cuda.default_generators[device.index]
        else:
            self._generator = torch.default_generator
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Records the state after a step."""
        state = self._generator.get_offset() if self._on_cuda else self._generator.get_state()
        self._marks = [*self._marks[-2:], state]

    def take_back(self) -> None:
        """Restores the state of the mark before the last one.

        Does nothing if the last step advanced the generator otherwise than the step before: then
        another thread drew too, and its numbers must not come twice.
        """
        if not self._on_cuda:
            self._generator.set_state(self._marks[-2])
        elif len(self._marks) == 3:
            first, second, third = self._marks
            if third - second == second - first:
                self._generator.set_offset(second)
