"""The default cache of transformers' models: the user's grows, and that of graphs has a fixed length.

A call that names no cache gets a `DynamicCache`, which grows by a token at each step, so no graph holds
for two steps. Here such a call is translated. The keys and values of the cache move into memory of a
fixed address, and a graph of the forward reads and writes them there. The user's cache counts on.
"""

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from graphcache import config
from graphcache.call.pytree import NotATree
from graphcache.capture.closeness import same
from graphcache.dispatch.bypass import check_surroundings
from graphcache.dispatch.cache import GraphCache
from graphcache.errors import CaptureError
from graphcache.integrations.transformers_memory import (
    Lease,
    Memory,
    Template,
    layers_of,
    plans_of,
    step_cache,
    tensors_of,
)
from graphcache.report.reasons import Bypass, EagerReason, Reason
from graphcache.tracing.python_recorder import values_restored
from graphcache.wrappers import InstanceForward, class_forward

NAMES = ("cache", "past_key_values")
_PREPARE = "_prepare_cache_for_generation"
SMALLEST = 128  # tokens
AT_ONCE = 512  # tokens; a limit up to this one is taken at once, since each growth costs a capture
MAX_MEMORIES = 2
FIRST_WAIT, MAX_WAIT = 64, 4096  # calls that are left alone after one that no graph serves
MAX_UNREPLAYED = 8  # calls
CHECKED_AGAIN = 4  # times the calls so far
_MASKS = "attention_mask", "decoder_attention_mask"
_ELSEWHERE = EagerReason(Reason.HELD_BY_ANOTHER_THREAD, "another thread decodes with this model")
_PREFILL = EagerReason(Reason.OBJECT_FILLED, "it fills a cache; later calls are replayed")


_MAKES = EagerReason(Reason.OBJECT_FILLED, "it makes a cache; later calls are replayed")
_DIFFERS = EagerReason(Reason.OBJECT_CHANGES, "it returns something else with a cache of a fixed length")


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
        self._name = next((name for name in NAMES if name in parameters), "")
        # The caches that nobody passed, each with the most tokens that it may get; 0 for unknown.
        self._limits: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # Only tried for: a cache may be filled and read by one thread at a time.
        self._lock = threading.RLock()
        self._leases: weakref.WeakKeyDictionary[Any, Lease] = weakref.WeakKeyDictionary()
        self._moved_out: weakref.WeakSet[Any] = weakref.WeakSet()
        self._steps: list[Step] = []
        self._made: First | None = None
        self._makes_none = False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return DefaultCache, (self._module(),)  # for `copy.deepcopy`, too

    # What `generate` asks for

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **more: Any
    ) -> Any:
        """Stands in for the method with which `generate` makes a cache."""
        module = self._module()
        result = getattr(type(module), _PREPARE)(module, generation_config, model_kwargs, *args, **more)
        cache = next((model_kwargs[name] for name in NAMES if model_kwargs.get(name) is not None), None)
        # What the user says is left alone, and so is what an assistant takes back.
        asked = (
            generation_config.cache_implementation is not None
            or generation_config.is_assistant
            or getattr(cache, "_is_user_defined", False)
        )
        if cache is not None and cache not in self._limits and not asked:
            self._limits[cache] = more.get("max_cache_length", args[-1] if args else 0)
        return result

    # Calls

    def translate(
        self,
        graphs: GraphCache,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Serves one call of the forward, which `graphs` would serve as it is.

        Args:
            graphs: the graphs of the forward.
            function: the forward, bound.
            args: the arguments.
            kwargs: likewise.
        """
        if not self._name or len(args) > len(self._parameters):
            return graphs(function, self._module(), args, kwargs)
        if not self._lock.acquire(blocking=False):
            return graphs.bypass(_ELSEWHERE, function, args, kwargs)
        try:
            if any(step.is_used_elsewhere() for step in self._steps):
                return graphs.bypass(_ELSEWHERE, function, args, kwargs)
            return self._translate(graphs, function, args, kwargs)
        finally:
            self._lock.release()

    def _translate(
        self,
        graphs: GraphCache,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        named = dict(zip(self._parameters, args, strict=False)) | kwargs if args else kwargs
        cache = next((named[name] for name in NAMES if named.get(name) is not None), None)
        if cache is None:
            return self._first(graphs, function, (args, kwargs), named)
        if cache not in self._limits:
            return graphs(function, self._module(), args, kwargs)
        why = self._why_not(cache, named)
        if why is None:
            return self._decode(graphs, function, cache, named)
        self._end(cache)
        return graphs.bypass(why, function, args, kwargs)

    def _first(self, graphs: GraphCache, function: Any, call: Any, named: dict[str, Any]) -> Any:
        """Serves a call without a cache, whose result may hold a new one.

        Args:
            graphs: the graphs of the forward.
            function: the forward, bound.
            call: the arguments as they were given.
            named: the arguments by name.
        """
        module: Any = self._module()
        asked = named.get("use_cache")
        if asked is None:
            asked = getattr(module.config.get_text_config(), "use_cache", False)
        why = self._why_unfit(named) if asked else None
        if not asked or why is not None or self._makes_none:
            return self._mark(graphs(function, module, *call))
        if self._made is not None:
            arguments = {key: value for key, value in named.items() if key not in NAMES}
            result, tensors = self._made.forward(**arguments)
            cache = self._made.template.make(tensors, _inputs(named).shape[1])  # type: ignore[union-attr]
            return self._mark(_with_cache(result, self._name, cache))
        if callable(getattr(type(module), _PREPARE, None)) or not graphs.store.options.fallback:
            result = graphs.bypass(_MAKES, function, *call)
        else:
            result = _quietly(graphs, function, module, call)
        cache = self._cache_in(self._mark(result))
        self._makes_none = cache is None
        if self._makes_none:
            graphs.store.warn_of_failures()
        plans = "" if cache is None else plans_of(cache)
        if not isinstance(plans, str):
            self._made = First(module, graphs, Template(cache, plans), self._name)
        return result

    def _cache_in(self, result: Any) -> Any:
        """Returns the cache of a result, if it is one that grows; else None."""
        cache = result.get(self._name) if isinstance(result, dict) else None
        inner = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        return cache if type(inner) is DynamicCache else None

    def _mark(self, result: Any) -> Any:
        """Returns a result; its cache is none of the user's."""
        if (cache := self._cache_in(result)) is not None:
            self._limits.setdefault(cache, 0)
        return result

    def _why_unfit(self, named: dict[str, Any]) -> EagerReason | None:
        """Returns the reason why a call is not translated, whatever its cache; None for none."""
        module: Any = self._module()
        try:
            check_surroundings(module)
        except Bypass as bypass:
            return bypass.why
        inputs = _inputs(named)
        if inputs is None or module.training:
            return _PREFILL
        if not inputs.is_cuda and not (inputs.device.type == "cpu" and config.is_emulated()):
            return EagerReason(
                Reason.CPU_TENSORS if inputs.device.type == "cpu" else Reason.OTHER_DEVICE
            )
        if named.get("return_dict") is False or not getattr(module.config, "return_dict", True):
            return EagerReason(Reason.OBJECT_CHANGES, "it returns a tuple with a cache that grows")
        return None

    def _why_not(self, cache: Any, named: dict[str, Any]) -> EagerReason | None:
        """Returns the reason why a call is not translated; None where it is."""
        if (why := self._why_unfit(named)) is not None:
            return why
        module: Any = self._module()
        length, inputs = _length(cache), _inputs(named)
        if not length or inputs is None or inputs.shape[1] != 1:
            return _PREFILL
        if named.get("output_attentions") or getattr(module.config, "output_attentions", False):
            return EagerReason(Reason.OBJECT_CHANGES, "it returns attentions of the cache")
        mask = named.get(_MASKS[isinstance(cache, EncoderDecoderCache)])
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape[1:] == (length + 1,)):
            return EagerReason(Reason.OBJECT_CHANGES, "its mask is not as long as the cache that grows")
        return None

    def _end(self, cache: Any) -> None:
        lease = self._leases.pop(cache, None)
        if lease is not None:
            lease.end()

    def _decode(self, graphs: GraphCache, function: Any, cache: Any, named: dict[str, Any]) -> Any:
        step = self._step(graphs, cache)
        if not isinstance(step, Step):
            return graphs.bypass(step, function, (), named)
        lease, name = self._leases[cache], self._name
        arguments = {key: value for key, value in named.items() if key not in NAMES}

        def expected() -> Any:
            grown = {**arguments, name: lease.reference(cache)}
            with values_restored(self._module(), function, grown):
                return _without_cache(function(**grown), name)

        result, is_served = step.run(graphs, arguments, expected)
        if not is_served:
            self._end(cache)
            return function(**named)
        lease.length += 1
        return _with_cache(result, name, cache)

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
            step.end()
        if step is None:
            others = [each for each in self._steps if each.shape != shape]
            for old in others[: max(len(others) + 1 - MAX_MEMORIES, 0)]:
                self._drop(graphs, old)
            capacity = _capacity(_length(cache) + 1, self._limits[cache])
            module: Any = self._module()
            step = Step(module, graphs, Memory(cache, plans, capacity), shape, self._name)
        else:
            self._steps.remove(step)
            step.make_room(graphs, _length(cache) + 1, self._limits[cache])
        self._steps.append(step)
        return step

    def _drop(self, graphs: GraphCache, step: "Step") -> None:
        step.end()
        step.drop(graphs)
        self._steps.remove(step)


def _capacity(tokens: int, limit: int) -> int:
    return capacity_for(limit if tokens <= limit <= AT_ONCE else tokens)


def _inputs(named: dict[str, Any]) -> Tensor | None:
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    return next((named[name] for name in names if named.get(name) is not None), None)


def _length(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # there is no attention in it
        return int(cache.has_previous_state())


def _shape(cache: Any) -> Any:
    tensors: list[Any] = []
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


def _same(expected: Any, result: Any) -> bool:
    try:
        return same(expected, result)
    except NotATree:
        return False


def _without_cache(result: Any, name: str) -> Any:
    """Returns a result of the model as it is without a cache."""
    return type(result)(**{key: value for key, value in result.items() if key != name})


def _with_cache(result: Any, name: str, cache: Any) -> Any:
    """Returns a result of the model with the user's cache in its place."""
    if next(reversed(result)) in ("logits", "last_hidden_state"):
        result[name] = cache
        return result
    return type(result)(**result, **{name: cache})


def _quietly(graphs: GraphCache, function: Any, module: Any, call: Any) -> Any:
    graphs.store.is_quiet = True
    try:
        return graphs(function, module, *call)
    finally:
        graphs.store.is_quiet = False


class First:
    """The graphs of a forward that makes a cache.

    Args:
        module: the module.
        graphs: the graphs of its own calls.
        template: makes the caches.
        name: the name of the field with the cache.

    Attributes:
        forward: returns the result without the cache, and the tensors of the cache.
        template: makes the caches.
    """

    def __init__(self, module: nn.Module, graphs: GraphCache, template: Template, name: str) -> None:
        plans = template.plans

        def first(module: Any, **arguments: Any) -> Any:
            result = class_forward(type(module))(module, **arguments)
            return _without_cache(result, name), tensors_of(result[name], plans)

        self.template = template
        self.forward = _beside(module, graphs, first, graphs.store.options)


def _beside(module: nn.Module, graphs: GraphCache, function: Any, options: Any) -> InstanceForward:
    """Returns a graphed forward of the module whose counts are parts of those of `graphs`."""
    forward = InstanceForward(module, function, options, compiled=True)
    made = forward._cache()
    made.name = made.store.name = graphs.name
    graphs.beside.append(made)
    return forward


class Step:
    """The graphs of a forward over one memory.

    Args:
        module: the module.
        graphs: the graphs of its own calls.
        memory: the memory.
        shape: all by which caches that fit into the memory are alike.
        name: the name of the parameter for the cache.
    """

    def __init__(
        self, module: nn.Module, graphs: GraphCache, memory: Memory, shape: Any, name: str
    ) -> None:
        self.memory, self.shape, self._name = memory, shape, name
        self._module = weakref.ref(module)
        self._options = graphs.store.options._replace(batch_dim=0, sizes=None, pad=None, bind=("state",))
        self._makes_mask = False
        self._waits, self._wait = 0, FIRST_WAIT
        self._why: EagerReason | None = None
        self._start(graphs)

    def _start(self, graphs: GraphCache) -> None:
        self._is_proved, self._unreplayed = False, 0
        self._checks: dict[Any, tuple[int, int]] = {}
        plans, own, name = self.memory.plans, self.memory.own, self._name
        made = _MASKS[own >= 0] if self._makes_mask else None
        rows, capacity = self.memory.rows, self.memory.capacity

        def step(module: Any, state: list[Tensor], **arguments: Any) -> Any:
            if made is not None and arguments.get(made) is None:
                seen = torch.arange(capacity, device=state[0].device) <= state[0]
                arguments[made] = seen.long().expand(rows, -1)
            cache = step_cache(plans, own, state)
            result = class_forward(type(module))(module, **arguments, **{name: cache})
            state[0].add_(1)
            return _without_cache(result, name)

        module: Any = self._module()
        self._forward = _beside(module, graphs, step, self._options)
        self._graphs = self._forward._cache()

    def end(self) -> None:
        """Ends the lease of the memory."""
        if (lease := self.memory.lease) is not None:
            lease.end()

    def drop(self, graphs: GraphCache) -> None:
        """Drops the graphs; their counts go over to `graphs`."""
        graphs.merge(self._graphs)

    def make_room(self, graphs: GraphCache, tokens: int, limit: int) -> None:
        """Grows the memory where it does not hold as many tokens."""
        if tokens > self.memory.capacity:
            self.drop(graphs)
            self.memory.grow(_capacity(tokens, limit))
            self._start(graphs)

    def run(
        self, graphs: GraphCache, arguments: dict[str, Any], expected: Callable[[], Any]
    ) -> "tuple[Any, bool]":
        """Runs the forward for the next token of the cache in the memory.

        Args:
            graphs: the graphs of the module's own calls.
            arguments: those of the call but for the cache.
            expected: returns the result of a call that grows the user's cache.

        Returns:
            The result without a cache, and True; or None and False, and then the call is left alone.
        """
        memory, lease = self.memory, self.memory.lease
        length = 0 if lease is None else lease.length
        mask_name = _MASKS[memory.own >= 0]
        mask = arguments.get(mask_name)
        given = dict(arguments)
        if mask is not None:
            given[mask_name] = nn.functional.pad(mask, (0, memory.capacity - mask.shape[1]))
        want = expected() if self._is_check_due(frozenset(given), mask is None) else None
        if memory.counted != length:
            memory.length.fill_(length)
        memory.counted = -1
        self._graphs.store.is_quiet = mask is None and not self._makes_mask  # there is another way
        try:
            result = self._forward(memory.step(memory.capacity), **given)
        except CaptureError:
            raise
        except Exception as error:
            if self._is_proved:
                raise
            self._reject(
                graphs, mask, EagerReason(Reason.OBJECT_CHANGES, f"{type(error).__name__}: {error}")
            )
            return None, False
        if want is not None and not _same(want, result):
            self._reject(graphs, mask, _DIFFERS)
            return None, False
        memory.counted = length + 1
        memory.note(length + 1)
        if not self._is_proved:
            self._judge(graphs, mask)
        return result, True

    def _is_check_due(self, *form: Any) -> bool:
        """Return True if a call is to be compared with the one that grows the user's cache."""
        calls, due = self._checks.get(form, (0, 0))
        self._checks[form] = calls + 1, (CHECKED_AGAIN * max(calls, 16) if calls == due else due)
        return calls == due

    def _judge(self, graphs: GraphCache, mask: Any) -> None:
        self._is_proved = self._graphs.replays() > 0
        self._unreplayed += 1
        found = self._failure()
        if not self._is_proved and (found is not None or self._unreplayed >= MAX_UNREPLAYED):
            eager = self._graphs.store.counts.eager
            known = [why for why in reversed(eager) if isinstance(why, EagerReason)]
            self._reject(graphs, mask, found or next(iter(known), _DIFFERS))

    def _failure(self) -> EagerReason | None:
        entries = self._graphs.store.entries
        return next((entry.eager for entry in entries if entry.eager is not None), None)

    def _reject(self, graphs: GraphCache, mask: Any, why: EagerReason) -> None:
        """Leaves calls alone for a while, and for longer each time."""
        self._why = why
        if (
            mask is None and not self._makes_mask
        ):  # some models make one as long as the cache on the host
            self._makes_mask = True
        else:
            self._waits, self._wait = self._wait, min(4 * self._wait, MAX_WAIT)
        self.drop(graphs)
        self._start(graphs)

    def is_used_elsewhere(self) -> bool:
        """Return True if the memory holds the cache of another thread that runs."""
        lease = self.memory.lease
        if lease is None or lease.thread == threading.get_ident():
            return False
        return any(lease.thread == thread.ident for thread in threading.enumerate())

    def is_waiting(self) -> bool:
        """Return True if the call is left alone."""
        self._waits -= self._waits > 0
        return self._waits > 0

    def reason(self) -> EagerReason:
        """Returns the reason why calls are left alone."""
        return self._why or _DIFFERS
