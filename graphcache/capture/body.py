"""The body of a capture: the forward over static inputs, its result sorted by where that lies."""

from typing import Any

from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BOUND
from graphcache.call.pytree import NotATree, flatten
from graphcache.capture.outputs import Geometry, Output, Result
from graphcache.capture.plan import CapturePlan
from graphcache.errors import CaptureError
from graphcache.report.reasons import Reason


class Body:
    """Runs the forward of a plan over the static inputs of one size."""

    def __init__(self, plan: CapturePlan, static: list[Tensor]) -> None:
        self._plan = plan
        self._static = static
        self._reached = {id(tensor) for tensor in plan.trace.reached}
        self._layout: Any = None
        self._outputs: list[Output | int | None] = []  # an argument's position: a copy of a view of it

    def __call__(self) -> list[Tensor]:
        """Runs the forward, and returns the output tensors that lie in memory of the graph."""
        arguments = self._plan.arguments(self._static)
        tensors: list[Tensor] = []
        try:
            result = self._plan.run(arguments)
            self._layout = flatten(result, tensors, [], other=self._plan.call.object_ref)
        except NotATree as error:
            raise CaptureError(str(error), reason=Reason.RESULT_TYPE) from None
        own = []
        for tensor in tensors:
            output = self._origin(tensor, arguments)
            if output is None:
                own.append(tensor)
            elif isinstance(output, int):
                own.append(tensor.clone())  # the next call overwrites the static input it lies in
            self._outputs.append(output)
        return own

    def result(self, weak: list[Tensor]) -> Result:
        """Returns the result, with the tensors of the graph's memory replaced by `weak`."""
        rest = iter(weak)
        outputs = [
            output if isinstance(output, Output) else _in_pool(next(rest), output)
            for output in self._outputs
        ]
        return Result(self._layout, outputs)

    def _origin(self, tensor: Tensor, arguments: list[Tensor]) -> Output | int | None:
        key, geometry = _C.storage_key(tensor), Geometry.of(tensor)
        for index, argument in enumerate(arguments):
            if tensor is argument:
                return Output(_C.weak_ref(tensor), geometry, argument=index, same=True)
            if key == _C.storage_key(argument):
                if self._plan.call.roles[index].role is not BOUND:
                    return index
                offset = int(tensor.storage_offset()) - int(argument.storage_offset())
                base = _C.weak_ref(tensor)
                view = _C.alias(base, tensor.shape, tensor.stride(), offset)
                return Output(view, geometry, argument=index)
        if key in self._plan.trace.external:
            return Output(tensor, geometry, external=True, same=id(tensor) in self._reached)
        if tensor.device != self._plan.pool.device:  # a constant on the host
            return Output(tensor, geometry, external=True, same=True, constant=True)
        return None


def _in_pool(weak: Tensor, copied: int | None) -> Output:
    return Output(weak, Geometry.of(weak), copied=copied)
