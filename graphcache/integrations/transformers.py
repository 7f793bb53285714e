"""Graphs over compiled code, for those who ask a module for a compiled call.

transformers' `generate` does so for its decode steps with a static cache. The model's own answer
compiles the call in a mode in which Inductor makes CUDA graphs. Those need a copy of each input and a
check of each tensor at every step; ours need one launch, and the kernels are the same.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

ASKED = "get_compiled_call"
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def is_asked(module: nn.Module) -> bool:
    """Tells whether somebody may ask `module` for a compiled call."""
    return callable(getattr(type(module), ASKED, None))


class CompiledCall:
    """Stands in for `get_compiled_call` of one module.

    Args:
        module: whose method it stands in for; it lies in the module's `__dict__` and refers back weakly.
        graphed: given the module and how to compile, returns a graphed forward over compiled code; None
            where that can't take the place of a call.
    """

    def __init__(self, module: nn.Module, graphed: Callable[[nn.Module, Any], Any | None]) -> None:
        self._module = weakref.ref(module)
        self._graphed = graphed

    def __call__(self, compile_config: Any = None) -> Any:
        """Returns what `generate` calls for a decode step."""
        module: Any = self._module()
        theirs = getattr(type(module), ASKED)(module, compile_config)
        asked = compile_config or getattr(module, "_last_compile_config", None)
        if not hasattr(theirs, "_torchdynamo_orig_callable") or asked is None or _is_hooked(module):
            return theirs  # some models compile nothing, whatever is asked for
        ours = self._graphed(module, asked)
        return theirs if ours is None else ours

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return CompiledCall, (self._module(), self._graphed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledCall":
        module: Any = self._module()
        return CompiledCall(copy.deepcopy(module, memo), self._graphed)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or nn_module._has_any_global_hook())


def compiled_as(asked: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` compiled as a `CompileConfig` of transformers says, but for graphs."""
    return torch.compile(function, **without_graphs(asked.to_dict()))


def without_graphs(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options of `torch.compile` without the CUDA graphs of Inductor."""
    inductor = options.get("options")
    if inductor and "triton.cudagraphs" in inductor:
        options = {**options, "options": {**inductor, "triton.cudagraphs": False}}
    mode = options.get("mode") or "default"
    return {**options, "mode": _WITHOUT_GRAPHS.get(mode, options.get("mode"))}
