"""The ways to call a module that are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.harness.timing import TimedCall
from benchmarks.harness.workload import Inputs, Scenario, Workload
from graphcache import GraphPool, config, cuda_graphed

WARM_UPS = 4  # calls of each batch before anything counts: peers capture at the second or third


@dataclass(frozen=True)
class Setup:
    """The parts that an arm is made from.

    Attributes:
        workload: see there.
        device: where it runs.
        duplicate: makes a module of the arm's own, in the state that all start from.
        example: makes valid inputs of a batch.
    """

    workload: Workload
    device: torch.device
    duplicate: Callable[[], nn.Module]
    example: Callable[[int], Inputs]


class Arm:
    """One way to call the module.

    Attributes:
        name: as it is recorded.
        about: one line for the docs.
        on_cpu: it exists without a GPU.
        graphed: it replays graphs, so that a profile shows what it does besides.
        pads: it serves a batch by the graph of a larger size; others get the very batch.
        before: called before each call, outside the timed part.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    on_cpu: ClassVar[bool] = False
    graphed: ClassVar[bool] = True
    pads: ClassVar[bool] = False
    before: Callable[[], None] | None = None

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = setup.duplicate()

    def served(self, scenario: Scenario) -> str | None:
        """Returns None, or why this arm has no part in a scenario."""
        return None

    def prepare(self, scenario: Scenario) -> None:
        """Captures or compiles what a scenario needs."""
        call = self.call(scenario)
        for batch in scenario.batches:
            for _ in range(WARM_UPS):
                if self.before is not None:
                    self.before()
                call(*self.setup.example(batch))

    def call(self, scenario: Scenario) -> Callable[..., Any]:
        """Returns the function that is called with the inputs."""
        return self.model

    def calls(self, scenario: Scenario, inputs: Sequence[Inputs]) -> list[TimedCall]:
        """Returns the timed calls, one for each of `inputs`."""
        call = self.call(scenario)
        return [(call, args) for args in inputs]

    def result(self, scenario: Scenario, args: Inputs) -> Tensor:
        """Returns a copy of the result for the comparison with eager."""
        if self.before is not None:
            self.before()
        out: Tensor = self.call(scenario)(*args)
        return out.clone()

    def facts(self) -> dict[str, Any]:
        """Returns further values for the record."""
        return {}


class Eager(Arm):
    """The module itself."""

    name = "eager"
    about = "the module as it is"
    graphed = False
    on_cpu = True


# Written by hand


class _HandGraph:
    """A graph of one size, captured as the documentation of torch shows."""

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        self.static = [tensor.clone() for tensor in example]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(*self.static)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # a pool of its own
            self.out: Tensor = model(*self.static)

    def fill(self, args: Inputs, fills: dict[int, int]) -> None:
        for index, (static, given) in enumerate(zip(self.static, args, strict=True)):
            static[: len(given)].copy_(given)
            static[len(given) :].fill_(fills.get(index, 0))


class _ByHand(Arm):
    pads = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._graphs: dict[int, _HandGraph] = {}

    def prepare(self, scenario: Scenario) -> None:
        """Captures each size, largest first."""
        for size in sorted({scenario.size_of(batch) for batch in scenario.batches}, reverse=True):
            if size not in self._graphs:
                self._graphs[size] = _HandGraph(self.model, self.setup.example(size))

    def call(self, scenario: Scenario) -> Callable[..., Any]:
        """Returns the function of the one size, or one that looks the size up."""
        served = {
            batch: self.step(self._graphs[scenario.size_of(batch)], batch) for batch in scenario.batches
        }
        if len(served) == 1:
            return served[scenario.batches[0]]

        def dispatch(*args: Tensor) -> Tensor:
            return served[args[0].shape[0]](*args)  # type: ignore[no-any-return]

        return dispatch

    def step(self, hand: _HandGraph, batch: int) -> Callable[..., Any]:
        """Returns the function that serves `batch` by a graph."""
        raise NotImplementedError


class ReplayAlone(_ByHand):
    """A bare replay, which no dispatcher over torch's graphs can beat."""

    name = "replay"
    about = "`CUDAGraph.replay()` alone, no inputs copied"

    def calls(self, scenario: Scenario, inputs: Sequence[Inputs]) -> list[TimedCall]:
        """Returns bare replays, of the sizes that the inputs would need."""
        return [(self._graphs[scenario.size_of(len(args[0]))].graph.replay, ()) for args in inputs]

    def result(self, scenario: Scenario, args: Inputs) -> Tensor:
        """Returns the output of a replay, for inputs that were copied in before."""
        hand = self._graphs[scenario.size_of(len(args[0]))]
        hand.fill(args, self.setup.workload.fills)
        hand.graph.replay()
        return hand.out[: len(args[0])].clone()


class CopyReplay(_ByHand):
    """The usual code around a graph."""

    name = "copies"
    about = "one `copy_` per input, `zero_` of the tail, replay, slice"

    def step(self, hand: _HandGraph, batch: int) -> Callable[..., Any]:
        """Returns a function that stages each input for itself."""
        static, replay, out = hand.static, hand.graph.replay, hand.out
        if batch == len(out):

            def exact(*args: Tensor) -> Tensor:
                for buffer, given in zip(static, args, strict=True):
                    buffer.copy_(given)
                replay()
                return out

            return exact
        fills = [self.setup.workload.fills.get(index, 0) for index in range(len(static))]

        def padded(*args: Tensor) -> Tensor:
            n = args[0].shape[0]
            for buffer, given, fill in zip(static, args, fills, strict=True):
                buffer[:n].copy_(given)
                if fill:
                    buffer[n:].fill_(fill)
                else:
                    buffer[n:].zero_()
            replay()
            return out[:n]

        return padded


class ForeachReplay(_ByHand):
    """The quicker code around a graph, its views made beforehand."""

    name = "foreach"
    about = "`torch._foreach_copy_` into views made beforehand (the tail filled once), replay, slice"

    def step(self, hand: _HandGraph, batch: int) -> Callable[..., Any]:
        """Returns a function that stages all inputs at once."""
        heads, replay, out = [buffer[:batch] for buffer in hand.static], hand.graph.replay, hand.out
        for index, buffer in enumerate(hand.static):
            buffer[batch:].fill_(self.setup.workload.fills.get(index, 0))

        def call(*args: Tensor) -> Tensor:
            torch._foreach_copy_(heads, args)
            replay()
            return out[:batch]

        return call


# Other libraries


class _PerBatch(Arm):
    """A peer that serves one shape: one of it for each batch."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._made: dict[int, Callable[..., Any]] = {}

    def make(self, batch: int) -> Callable[..., Any]:
        """Returns the peer for `batch`."""
        raise NotImplementedError

    def prepare(self, scenario: Scenario) -> None:
        """Makes and warms what is missing."""
        for batch in scenario.batches:
            if batch not in self._made:
                self._made[batch] = self.make(batch)
        super().prepare(scenario)

    def call(self, scenario: Scenario) -> Callable[..., Any]:
        """Returns the one of the batch, or a function that looks it up."""
        made = self._made
        if len(scenario.batches) == 1:
            return made[scenario.batches[0]]
        return lambda *args: made[args[0].shape[0]](*args)


class MakeGraphedCallables(_PerBatch):
    """torch's own wrapper."""

    name = "make_graphed_callables"
    about = "`torch.cuda.make_graphed_callables`, one for each batch"

    def make(self, batch: int) -> Callable[..., Any]:
        """Returns the graphed module."""
        # It replaces the module's forward, so each batch gets a module of its own over the same tensors.
        model = copy.copy(self.model)
        made: Callable[..., Any] = torch.cuda.make_graphed_callables(model, self.setup.example(batch))
        return made


class TensorDict(_PerBatch):
    """tensordict's wrapper."""

    name = "tensordict"
    about = "tensordict's `CudaGraphModule`, one for each batch"

    def make(self, batch: int) -> Callable[..., Any]:
        """Returns the wrapped module."""
        from tensordict.nn import CudaGraphModule

        made: Callable[..., Any] = CudaGraphModule(self.model)
        return made

    def facts(self) -> dict[str, Any]:
        """Returns its version."""
        import tensordict

        return {"version": tensordict.__version__}


class Compile(Arm):
    """Inductor without graphs."""

    name = "compile"
    about = "`torch.compile`"
    graphed = False
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._compiled = torch.compile(self.model, **self.options)

    def served(self, scenario: Scenario) -> str | None:
        """Leaves out scenarios that cost many compilations and show little."""
        if scenario.name == "exact" or self.setup.workload.recompiled:
            return None
        return "left out: compile time"

    def call(self, scenario: Scenario) -> Callable[..., Any]:
        """Returns the compiled module."""
        return self._compiled


class ReduceOverhead(Compile):
    """Inductor with its own graphs."""

    name = "reduce-overhead"
    about = '`torch.compile(mode="reduce-overhead")`; `cudagraph_mark_step_begin` before each timed call'
    graphed = True
    options: ClassVar[dict[str, Any]] = {"mode": "reduce-overhead"}

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.before = torch.compiler.cudagraph_mark_step_begin


# This library


class Graphcache(Arm):
    """The module under `cuda_graphed`."""

    name = "graphcache"
    about = "`cuda_graphed(model, sizes=...)`, a pool of its own"
    on_cpu = True
    pads = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.pool = GraphPool(setup.device)
        self.graph(self.model)

    def graph(self, model: nn.Module) -> None:
        """Decorates the module, as a user would."""
        workload = self.setup.workload
        cuda_graphed(
            model, sizes=workload.sizes, pad=workload.pad, pool=self.pool, fallback=False, progress=False
        )

    def facts(self) -> dict[str, Any]:
        """Returns the counts of `cache_info()`."""
        forward: Any = self.model.forward
        info = forward.cache_info()
        return {
            "launch": info.launch,
            "backend": info.backend,
            "sizes": list(info.sizes),
            "replayed": info.hits,
            "eager": dict(info.eager),
            "notes": list(info.notes),
        }


class GraphcacheCompiled(Graphcache):
    """The same over a forward that Inductor compiled."""

    name = "graphcache+compile"
    about = "`cuda_graphed` over `torch.compile(model.forward, dynamic=False)`, each size compiled first"
    on_cpu = True

    def served(self, scenario: Scenario) -> str | None:
        """Leaves out scenarios that cost many compilations and show little."""
        return None if scenario.name in self.setup.workload.compiled_in else "left out: compile time"

    def graph(self, model: nn.Module) -> None:
        """Compiles the forward at the sizes that are used, then decorates it."""
        workload = self.setup.workload
        shown = [scenario for scenario in workload.scenarios if self.served(scenario) is None]
        sizes = {scenario.size_of(batch) for scenario in shown for batch in scenario.batches}
        if not sizes:
            return
        backend = "inductor" if self.setup.device.type == "cuda" else "eager"
        # setattr: a type checker knows forward as a method
        setattr(model, "forward", torch.compile(model.forward, dynamic=False, backend=backend))  # noqa: B010
        for size in sorted(sizes, reverse=True):
            for _ in range(2):
                model(*self.setup.example(size))
        cuda_graphed(
            model,
            sizes=sorted(sizes),
            pad=workload.pad,
            pool=self.pool,
            fallback=False,
            progress=False,
        )


class _InALine(Graphcache):
    """Captures without branches."""

    def served(self, scenario: Scenario) -> str | None:
        """Leaves out workloads without branches."""
        return super().served(scenario) if self.setup.workload.branches else "left out: no branches"

    def prepare(self, scenario: Scenario) -> None:
        """Captures with branches switched off."""
        with config.switched(config.linear_var):
            super().prepare(scenario)


class GraphcacheInALine(_InALine):
    """The module under `cuda_graphed`, its graph a line."""

    name = "graphcache, in a line"
    about = "the same as `graphcache`, with no products side by side"


class GraphcacheCompiledInALine(_InALine, GraphcacheCompiled):
    """A compiled forward under `cuda_graphed`, its graph a line."""

    name = "graphcache+compile, in a line"
    about = "the same as `graphcache+compile`, with no products side by side"


ARMS: dict[str, type[Arm]] = {
    arm.name: arm
    for arm in (
        Eager,
        ReplayAlone,
        CopyReplay,
        ForeachReplay,
        MakeGraphedCallables,
        TensorDict,
        Compile,
        ReduceOverhead,
        Graphcache,
        GraphcacheCompiled,
        GraphcacheInALine,
        GraphcacheCompiledInALine,
    )
}
