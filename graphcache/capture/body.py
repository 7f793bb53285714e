"""The body of a capture: the forward over static inputs, its result sorted by where that lies."""

from typing import Any

from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BOUND
from graphcache.call.pytree import NotATree, flatten
from graphcache.capture.outputs import Geometry, Output, Result
from graphcache.capture.plan import CapturePlan
from graphcache.capture.static_inputs import arguments_over, with_bits
from graphcache.errors import CaptureError
from graphcache.report.reasons import Reason


class Body:
    """Runs the forward of a plan over the static inputs of one size."""

    def __init__(self, plan: CapturePlan, static: list[Tensor]) -> None:
        self._plan = plan
        self._static = static
        self._reached = {id(tensor) for tensor in plan.trace.reached}
        self._layout: Any = None
        self._outputs: list[
            Output | int
        ] = []  # of one in the pool, the argument that it copies a view of

    def __call__(self) -> list[Tensor]:
        """Runs the forward, and returns the output tensors that lie in memory of the graph."""
        arguments = arguments_over(self._plan.call, self._static, self._plan.options.pad)
        tensors: list[Tensor] = []
        try:
            result = self._plan.run(arguments)
            self._layout = flatten(result, tensors, [], other=self._plan.call.object_ref)
        except NotATree as error:
            raise CaptureError(str(error), reason=Reason.RESULT_TYPE) from None
        self._outputs = [self._origin(tensor, arguments) for tensor in tensors]
        # The next call overwrites the static input that a view lies in.
        return [
            tensor if copied < 0 else with_bits(tensor.clone(), tensor)
            for tensor, copied in zip(tensors, self._outputs, strict=True)
            if isinstance(copied, int)
        ]

    def result(self, weak: list[Tensor]) -> Result:
        """Returns the result, with the tensors of the graph's memory replaced by `weak`."""
        rest = iter(weak)
        return Result(
            self._layout,
            [
                Output(made := next(rest), Geometry.of(made), _C.OutputKind.POOL, output)
                if isinstance(output, int)
                else output
                for output in self._outputs
            ],
        )

    def _origin(self, tensor: Tensor, arguments: list[Tensor]) -> Output | int:
        """Returns an output outside the pool; of one in it, the argument that it views, or -1."""
        kinds, key, geometry = _C.OutputKind, _C.storage_key(tensor), Geometry.of(tensor)
        for index, argument in enumerate(arguments):
            if tensor is argument:
                return Output(_C.weak_ref(tensor), geometry, kinds.ARGUMENT, index)
            if key == _C.storage_key(argument):
                if self._plan.call.roles[index].role is not BOUND:
                    return index
                offset = int(tensor.storage_offset()) - int(argument.storage_offset())
                view = _C.alias(_C.weak_ref(tensor), tensor.shape, tensor.stride(), offset)
                return Output(view, geometry, kinds.ARGUMENT_VIEW, index)
        if key in self._plan.trace.external:
            is_same = id(tensor) in self._reached
            return Output(tensor, geometry, kinds.EXTERNAL if is_same else kinds.EXTERNAL_VIEW)
        return (
            -1 if tensor.device == self._plan.pool.device else Output(tensor, geometry, kinds.CONSTANT)
        )
