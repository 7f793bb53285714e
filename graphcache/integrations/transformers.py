"""Graphs over compiled code for transformers' `generate`, which asks a model for a compiled call.

`generate` asks for its decode steps with a static cache. The model's own answer compiles the call in a
mode in which Inductor makes CUDA graphs. Those copy each input and check each tensor at every step.
The graphs of this library need one launch, and the kernels are the same.
"""

import sys
import weakref
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

from graphcache.integrations import transformers_stop
from graphcache.runtime.source_lines import warn
from graphcache.wrappers import TRANSLATOR, InstanceForward

_METHOD = "get_compiled_call"
_PREPARE = "_prepare_cache_for_generation"
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def attach(module: nn.Module) -> None:
    """Answers `get_compiled_call` of a decorated module, where its class has that method.

    Warns for a compiled model: its `generate` calls the model inside, which has no graphs.
    """
    transformers_stop.install()
    if callable(getattr(type(module), _METHOD, None)):
        vars(module)[_METHOD] = CompiledCall(module)
    attach_default_cache(module)
    inner = vars(module).get("_modules", {}).get("_orig_mod")
    if callable(getattr(type(inner), _METHOD, None)):
        warn(
            f"{type(inner).__qualname__} has graphs that are not used: generate() of a compiled model "
            "calls the one inside it; give that: cuda_graphed(model)"
        )


def attach_default_cache(module: nn.Module) -> None:
    """Lets graphs serve the calls of one of transformers' models that name no cache."""
    models = sys.modules.get("transformers.modeling_utils")
    if models is None or not isinstance(module, models.PreTrainedModel):
        return
    from graphcache.integrations.transformers_cache import DefaultCache

    vars(module)[TRANSLATOR] = default = DefaultCache(module)
    if callable(getattr(type(module), _PREPARE, None)):
        vars(module)[_PREPARE] = default


class CompiledCall:
    """Stands in for `get_compiled_call` of one module.

    Args:
        module: the module in whose `__dict__` this lies; referred to weakly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, compile_config: Any = None) -> Any:
        """Returns the call for `generate`'s decode steps: graphed, where a graph can take its place."""
        module: Any = self._module()
        compiled = getattr(type(module), _METHOD)(module, compile_config)
        config: Any = compile_config or getattr(module, "_last_compile_config", None)
        forward = vars(module).get("forward")
        # Some models compile nothing, whatever they are asked for.
        is_compiled = hasattr(compiled, "_torchdynamo_orig_callable") and config is not None
        if not is_compiled or _is_hooked(module) or not isinstance(forward, InstanceForward):
            return compiled
        return forward.compiled_with(without_graphs(config.to_dict())) or compiled

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return CompiledCall, (self._module(),)  # for `copy.deepcopy`, too


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or nn_module._has_any_global_hook())


def without_graphs(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options of `torch.compile` without the CUDA graphs of Inductor."""
    inductor = options.get("options")
    if inductor and "triton.cudagraphs" in inductor:
        options = {**options, "options": {**inductor, "triton.cudagraphs": False}}
    mode = options.get("mode") or "default"
    return {**options, "mode": _WITHOUT_GRAPHS.get(mode, options.get("mode"))}
