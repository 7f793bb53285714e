"""The default cache of transformers' models: a `DynamicCache` for the user, one of a fixed length for graphs.

A call that names no cache gets a `DynamicCache`, which grows by a token at each step, so no graph holds
for two steps. Here such a call is translated. The keys and values of the cache move into memory of a fixed
address, and a graph of the forward reads and writes them there. The cache that the user sees counts on.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from graphcache import config
from graphcache.dispatch.bypass import check_surroundings
from graphcache.dispatch.cache import GraphCache
from graphcache.errors import CaptureError
from graphcache.integrations.transformers_memory import Lease, Memory, layers_of, plans_of, step_cache
from graphcache.report.reasons import Bypass, EagerReason, Reason
from graphcache.wrappers import InstanceForward, class_forward

NAMES = ("cache", "past_key_values")
_PREPARE = "_prepare_cache_for_generation"
SMALLEST = 128  # tokens
AT_ONCE = 512  # tokens; a limit up to this one is taken at once, since each growth costs a capture
MAX_MEMORIES = 2
MAX_WAIT = 4096  # calls
_PREFILL = EagerReason(Reason.OBJECT_FILLED, "it fills a cache of keys and values; later calls are replayed")


def capacity_for(tokens: int) -> int:
    """Returns the capacity of the step that holds as many tokens; steps grow by at most a quarter."""
    capacity = SMALLEST
    while capacity < tokens:
        capacity += max(capacity // 4 // 16, 1) * 16
    return capacity


class DefaultCache:
    """Serves the calls of one module that have no cache of the user's.

    Lies in the module's `__dict__`, also in place of the method with which `generate` makes a cache.

    Args:
        module: the module; referred to weakly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        parameters = inspect.signature(class_forward(type(module))).parameters
        self._parameters = [name for name in parameters if name != "self"]
        self._name = next((name for name in NAMES if name in parameters), None)
        # The caches that nobody passed, and the largest number of tokens that each may get; 0 for unknown.
        self._limits: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._leases: weakref.WeakKeyDictionary[Any, Lease] = weakref.WeakKeyDictionary()
        self._moved_out: weakref.WeakSet[Any] = weakref.WeakSet()
        self._steps: list[Step] = []
        self._rejected: dict[Any, EagerReason] = {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return DefaultCache, (self._module(),)  # for `copy.deepcopy`, too

    # What `generate` asks for

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **more: Any) -> Any:
        """Stands in for the method with which `generate` makes a cache."""
        module = self._module()
        result = getattr(type(module), _PREPARE)(module, generation_config, model_kwargs, *args, **more)
        cache = next((model_kwargs[name] for name in NAMES if model_kwargs.get(name) is not None), None)
        # What the user says is left alone, and so is what an assistant takes back.
        asked = generation_config.cache_implementation is not None or generation_config.is_assistant
        if cache is not None and cache not in self._limits and not asked:
            if not getattr(cache, "_is_user_defined", False):
                self._limits[cache] = more.get("max_cache_length", args[-1] if args else 0)
        return result

    # Calls

    def translate(
        self, graphs: GraphCache, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Serves one call of the forward, which `graphs` would serve as it is.

        Args:
            graphs: the graphs of the forward.
            function: the forward, bound.
            args: the arguments.
            kwargs: likewise.
        """
        if self._name is None or len(args) > len(self._parameters):
            return graphs(function, self._module(), args, kwargs)
        named = dict(zip(self._parameters, args, strict=False)) | kwargs if args else kwargs
        cache = next((named[name] for name in NAMES if named.get(name) is not None), None)
        if cache is None:
            return self._without_cache(graphs, function, args, kwargs)
        if cache not in self._limits:
            return graphs(function, self._module(), args, kwargs)
        why = self._why_not(cache, named)
        if why is None:
            return self._decode(graphs, function, cache, named)
        self._end(cache)
        return graphs.bypass(why, function, args, kwargs)

    def _without_cache(self, graphs: GraphCache, function: Any, args: Any, kwargs: Any) -> Any:
        result = graphs(function, self._module(), args, kwargs)
        for cache in (result.get(name) for name in NAMES) if isinstance(result, dict) else ():
            inner = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            if type(inner) is DynamicCache:
                self._limits.setdefault(cache, 0)
        return result

    def _why_not(self, cache: Any, named: dict[str, Any]) -> EagerReason | None:
        """Returns the reason why a call is not translated; None where it is."""
        module = self._module()
        try:
            check_surroundings(module)
        except Bypass as bypass:
            return bypass.why
        inputs = _inputs(named)
        if inputs is None or inputs.shape[1] != 1 or module.training:
            return _PREFILL
        if not inputs.is_cuda and not (inputs.device.type == "cpu" and config.is_emulated()):
            return EagerReason(Reason.CPU_TENSORS if inputs.device.type == "cpu" else Reason.OTHER_DEVICE)
        length = _length(cache)
        if not length:
            return _PREFILL
        mask = named.get(_mask_name(cache))
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape[1:] == (length + 1,)):
            return EagerReason(Reason.OBJECT_CHANGES, "the mask has not the length of the cache")
        return None

    def _end(self, cache: Any) -> None:
        lease = self._leases.pop(cache, None)
        if lease is not None:
            lease.end()

    def _decode(self, graphs: GraphCache, function: Any, cache: Any, named: dict[str, Any]) -> Any:
        step = self._step(graphs, cache)
        if not isinstance(step, Step):
            return graphs.bypass(step, function, (), named)
        lease = step.memory.lease
        arguments = {name: value for name, value in named.items() if name not in NAMES}
        try:
            result = step.run(arguments, _mask_name(cache))
        except CaptureError:
            raise
        except Exception:
            if step.is_proved:
                raise
            step.wait()
            step.memory.length.fill_(lease.length)
            self._end(cache)
            return graphs.bypass(step.reason(), function, (), named)
        lease.length += 1
        return _with_cache(result, self._name, cache)

    def _step(self, graphs: GraphCache, cache: Any) -> "Step | EagerReason":
        """Returns the graphs for the next step of a cache, whose tensors lie in their memory then."""
        lease = self._leases.get(cache)
        if lease is not None and lease.memory.lease is not lease:
            del self._leases[cache]
            self._moved_out.add(cache)
            lease = None
        if lease is not None and not lease.is_even():
            self._end(cache)
            lease = None
        if lease is None:
            plans = plans_of(cache)
            if isinstance(plans, str):
                return EagerReason(Reason.OBJECT_CHANGES, f"{Reason.OBJECT_CHANGES.meaning}: {plans}")
            step = self._step_for(graphs, cache, plans)
            if step.is_waiting():
                return step.reason()
            lease = self._leases[cache] = Lease(step.memory, cache, _length(cache))
        step = next(each for each in self._steps if each.memory is lease.memory)
        if step.is_waiting():
            self._end(cache)
            return step.reason()
        step.make_room(graphs, lease.length + 1, self._limits[cache])
        return step

    def _step_for(self, graphs: GraphCache, cache: Any, plans: Any) -> "Step":
        """Returns free memory for a cache."""
        shape = plans, _shape(cache)
        alike = [step for step in self._steps if step.shape == shape]
        step = next((each for each in alike if each.memory.lease is None), None)
        if step is None and alike and (cache not in self._moved_out or len(alike) >= MAX_MEMORIES):
            step = alike[0]
            step.memory.lease.end()
        if step is None:
            others = [each for each in self._steps if each.shape != shape]
            for old in others[: max(len(others) + 1 - MAX_MEMORIES, 0)]:
                self._drop(graphs, old)
            capacity = _capacity(_length(cache) + 1, self._limits[cache])
            step = Step(self._module(), graphs, Memory(cache, plans, capacity), shape, self._name)
        else:
            self._steps.remove(step)
            step.make_room(graphs, _length(cache) + 1, self._limits[cache])
        self._steps.append(step)
        return step

    def _drop(self, graphs: GraphCache, step: "Step") -> None:
        lease = step.memory.lease
        if lease is not None:
            lease.end()
        step.drop(graphs)
        self._steps.remove(step)


def _capacity(tokens: int, limit: int) -> int:
    return capacity_for(limit if tokens <= limit <= AT_ONCE else tokens)


def _inputs(named: dict[str, Any]) -> Tensor | None:
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    return next((named[name] for name in names if named.get(name) is not None), None)


def _mask_name(cache: Any) -> str:
    return "decoder_attention_mask" if isinstance(cache, EncoderDecoderCache) else "attention_mask"


def _length(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # there is no attention in it
        return int(cache.has_previous_state())


def _shape(cache: Any) -> Any:
    tensors = []
    for layer in layers_of(cache):
        for name in ("keys", "values"):
            t = getattr(layer, name, None)
            if t is not None:
                tensors.append((t.shape[:2], t.shape[3:], t.dtype, t.device))
        for name in ("conv_states", "recurrent_states"):
            for t in getattr(layer, name, {}).values():
                tensors.append(None if t is None else (t.shape, t.dtype, t.device))
    if isinstance(cache, EncoderDecoderCache):
        tensors.append(tuple(layer.keys.shape for layer in cache.cross_attention_cache.layers))
    return tuple(tensors)


def _with_cache(result: Any, name: str, cache: Any) -> Any:
    """Returns a result of the model with the user's cache in its place."""
    if next(reversed(result)) in ("logits", "last_hidden_state"):
        result[name] = cache
        return result
    return type(result)(**result, **{name: cache})


class Step:
    """The graphs of a forward over one memory.

    Args:
        module: the module.
        graphs: the graphs of its own calls.
        memory: the memory.
        shape: all by which caches that fit into the memory are alike.
        name: the name of the parameter for the cache.

    Attributes:
        is_proved: a call has been replayed.
    """

    def __init__(self, module: nn.Module, graphs: GraphCache, memory: Memory, shape: Any, name: str) -> None:
        self.memory, self.shape, self._name = memory, shape, name
        self._module = weakref.ref(module)
        self._options = graphs.store.options._replace(batch_dim=0, sizes=None, pad=None, bind=("state",))
        self._counted = 0
        self._unreplayed = 0
        self._waits, self._wait = 0, 64
        self._start(graphs)

    def _start(self, graphs: GraphCache) -> None:
        self.is_proved = False
        plans, own, name = self.memory.plans, self.memory.own, self._name

        def step(module: Any, state: list[Tensor], **arguments: Any) -> Any:
            cache = step_cache(plans, own, state)
            result = class_forward(type(module))(module, **arguments, **{name: cache})
            state[0].add_(1)
            return type(result)(**{key: value for key, value in result.items() if key != name})

        module = self._module()
        self._forward = InstanceForward(module, step, self._options, compiled=True)
        self._graphs = self._forward._cache()
        self._graphs.name = graphs.name
        graphs.beside.append(self._graphs)

    def drop(self, graphs: GraphCache) -> None:
        """Drops the graphs; their counts go over to `graphs`."""
        graphs.merge(self._graphs)

    def make_room(self, graphs: GraphCache, tokens: int, limit: int) -> None:
        """Grows the memory where it does not hold as many tokens."""
        if tokens > self.memory.capacity:
            self.drop(graphs)
            self.memory.grow(_capacity(tokens, limit))
            self._start(graphs)

    def run(self, arguments: dict[str, Any], mask_name: str) -> Any:
        """Runs the forward for the next token of the cache in the memory."""
        memory, lease = self.memory, self.memory.lease
        length = memory.capacity
        if memory.counted != lease.length:
            memory.length.fill_(lease.length)
        mask = arguments.get(mask_name)
        if mask is not None:
            arguments[mask_name] = nn.functional.pad(mask, (0, length - mask.shape[1]))
        memory.counted = -1
        result = self._forward(memory.step(length), **arguments)
        memory.counted = lease.length + 1
        memory.note(lease.length + 1)
        if not self.is_proved:
            self._judge()
        return result

    def _judge(self) -> None:
        self.is_proved = self._graphs.replays() > 0
        self._unreplayed += 1
        if self.is_proved:
            self._unreplayed = 0
        elif self._unreplayed >= 8 or any(e.eager for e in self._graphs.store.entries.values()):
            self.wait()

    def wait(self) -> None:
        """Leaves calls alone for a while, and for longer each time."""
        self._unreplayed = 0
        self._waits, self._wait = self._wait, min(2 * self._wait, MAX_WAIT)

    def is_waiting(self) -> bool:
        """Return True if the call is left alone."""
        if self._waits:
            self._waits -= 1
            return True
        return False

    def reason(self) -> EagerReason:
        """Returns the reason why calls are left alone."""
        found = [e.eager for e in self._graphs.store.entries.values() if e.eager is not None]
        known = [*found, *(why for why in self._graphs.store.counts.eager if isinstance(why, EagerReason))]
        return known[0] if known else EagerReason(Reason.OBJECT_CHANGES)
