"""Holds rows of earlier calls, and puts them after those of a later one as its other rows.

All are rows that a caller gave: one of the largest value of each argument, say, may be none that the
forward can take. Where all are alike, numbers in floating point come in halves, too.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from graphcache.call.bound_call import BATCHED, WHOLE, BoundCall
from graphcache.capture.closeness import can_be_nan
from graphcache.config import Pad, fill_of

_ORDERED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
LARGE = 16
MAX_EXTREMES = 3  # arguments whose largest and least values are looked for


class Sample:
    """Rows of an earlier call, to put after those of a later one."""

    def __init__(self, call: BoundCall) -> None:
        with _plainly(call):
            self.rows: list[tuple[int, Tensor] | None] = [
                (leaf.dim, tensor.clone()) if leaf.role is BATCHED and leaf.dim is not None else None
                for tensor, leaf in zip(call.tensors, call.roles, strict=True)
            ]
            self._whole = [tensor.clone() for tensor in _whole(call)]

    def can_show(self, call: BoundCall, pad: Pad) -> bool:
        """Return True if rows differ, or differ from padding: then a dependence on them can show."""
        return self.are_unlike(call, "edge") or self.are_unlike(call, pad) or self._can_be_halved()

    def tensors(self) -> list[Tensor]:
        """Returns the rows, one tensor for each argument that carries the batch."""
        return [held[1] for held in self.rows if held is not None]

    def are_unlike(self, call: BoundCall, pad: Pad) -> bool:
        """Return True if rows differ from the padding of `call`; "edge" stands for its first row."""
        for name, held, rows in zip(call.paths, self.rows, self._joined(call, call.batch), strict=True):
            if held is not None:
                fill = fill_of(pad, name)
                if bool((rows != (rows.narrow(held[0], 0, 1) if fill == "edge" else fill)).any()):
                    return True
        return False

    def _can_be_halved(self) -> bool:
        return any(held is not None and bool((_half(held[1]) != held[1]).any()) for held in self.rows)

    def _halved(self, call: BoundCall) -> "Sample":
        halved = Sample(call)
        halved.rows = [held and (held[0], _half(held[1])) for held in halved.rows]
        return halved

    def full(self, call: BoundCall, size: int, *, thorough: bool, nan: bool) -> list[list[Tensor]]:
        """Returns arguments of `size` rows, the first of which are those of `call`.

        Args:
            call: the call.
            size: the number of rows.
            thorough: all kinds of other rows, and not just one.
            nan: floating point of other rows may be NaN and infinite.
        """
        with _plainly(call):
            # What goes with other values beside it, such as offsets, may be no valid row here.
            fits = all(map(torch.equal, self._whole, _whole(call)))
            earlier = self if fits else Sample(call)
            tails = [earlier]
            if thorough:
                tails += [Sample(call), *earlier._extremes(call)]
                if not self.are_unlike(call, "edge"):
                    tails.append(self._halved(call))
            if nan:
                values = ("nan", "inf", "-inf") if thorough else ("nan",)
                tails += [earlier._filled(call, float(value)) for value in values]
        return [each._joined(call, size - call.batch) for each in tails]

    def _filled(self, call: BoundCall, value: float) -> "Sample":
        """Returns these rows with `value` in place of all floating point."""
        filled = Sample(call)
        filled.rows = [
            held and (held[0], torch.full_like(held[1], value) if can_be_nan(held[1]) else held[1])
            for held in self.rows
        ]
        return filled

    def _extremes(self, call: BoundCall) -> Iterator["Sample"]:
        """Yields, by single rows of `call` and this, those that have the largest and least values.

        Whole rows: the largest value of one argument need not go with that of another.
        """
        joined = self._joined(call, self._count())
        batched = [(held[0], t) for t, held in zip(joined, self.rows, strict=True) if held is not None]
        ordered = [(dim, t) for dim, t in batched if t.dtype in _ORDERED and t.numel()]
        for dim, tensor in ordered[:MAX_EXTREMES]:
            values = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).double()
            for row in (values.amax(1).argmax(), values.amin(1).argmin()):
                single = Sample(call)
                single.rows = [
                    held and (held[0], t.index_select(held[0], row.reshape(1)))
                    for t, held in zip(joined, self.rows, strict=True)
                ]
                yield single

    def _count(self) -> int:
        return next((held[1].shape[held[0]] for held in self.rows if held is not None), 0)

    def _joined(self, call: BoundCall, count: int) -> list[Tensor]:
        with _plainly(call):
            return [
                tensor if held is None else torch.cat([tensor, _cycle(held[1], held[0], count)], held[0])
                for tensor, held in zip(call.tensors, self.rows, strict=True)
            ]


def scaled_down(call: BoundCall) -> BoundCall | None:
    """Returns the call with large floating point brought down to 1; None where there is none.

    Large rows hide what rows of padding add to them, as in a softmax over all rows.
    """
    tensors = list(call.tensors)
    with _plainly(call):
        for index, (tensor, leaf) in enumerate(zip(call.tensors, call.roles, strict=True)):
            if leaf.role is BATCHED and tensor.dtype in _ORDERED[:4] and tensor.numel():
                largest = torch.where(tensor.isfinite(), tensor, 0).abs().max()
                if bool(largest > LARGE):
                    tensors[index] = tensor / largest
    if all(map(operator.is_, tensors, call.tensors)):
        return None
    args, kwargs = call.arguments(tensors)
    return call._replace(args=args, kwargs=kwargs, tensors=tensors)


def _whole(call: BoundCall) -> list[Tensor]:
    return [t for t, leaf in zip(call.tensors, call.roles, strict=True) if leaf.role is WHOLE]


def _half(tensor: Tensor) -> Tensor:
    return tensor * 0.5 if tensor.is_floating_point() and tensor.dtype in _ORDERED else tensor


@contextmanager
def _plainly(call: BoundCall) -> Iterator[None]:
    """Keeps the modes of the caller out: autocast would refuse or convert what is only copied here."""
    device = call.tensors[0].device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _cycle(rows: Tensor, dim: int, count: int) -> Tensor:
    index = torch.arange(count, device=rows.device) % rows.shape[dim]
    return rows.index_select(dim, index)
