"""Memory of a fixed address for a growing cache of keys and values, and the two faces of it.

The user's `DynamicCache` stays what it is. While a `Lease` lasts, its layers hold no tensors; the memory
of the graphs does. Whoever reads a tensor of the cache ends the lease: the cache gets tensors of its own
again. The captured forward sees a `StepCache` over views of the same memory, of a fixed length.
"""

import copy
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    StaticLayer,
)

# Not in each version.
DummyLayer = getattr(cache_utils, "DummyLayer", None)
_HYBRIDS = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
_STATES = ("conv_states", "recurrent_states")
_TENSORS = ("keys", "values", *_STATES)


class Plan(NamedTuple):
    """The kind of one layer of a cache.

    Attributes:
        base: the class of the layer.
        grows: the layer gets a key and a value for each token.
        window: the number of tokens that attention sees; 0 for all.
        fixed: the names and keys of tensors that keep their shape.
        states: the number of states of a layer with linear attention.
    """

    base: type
    grows: bool
    window: int
    fixed: tuple[tuple[str, Any], ...]
    states: int = 0


def layers_of(cache: Any) -> list[Any]:
    """Returns the layers of a cache, those of the encoder's keys last."""
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(cache.layers)


def plans_of(cache: Any) -> "tuple[Plan, ...] | str":
    """Returns the kind of each layer, or the reason why no memory serves the cache."""
    if isinstance(cache, EncoderDecoderCache):
        if not all(cache.is_updated.values()):
            return "a layer holds nothing of the encoder's"
        count = len(cache.self_attention_cache.layers)
    else:
        count = len(cache.layers)
    plans = []
    for index, layer in enumerate(layers_of(cache)):
        plan = _plan(layer, is_cross=index >= count)
        if plan is None:
            return f"a layer of type {type(layer).__qualname__} has no memory of a fixed address"
        plans.append(plan)
    return tuple(plans)


def _plan(layer: Any, is_cross: bool) -> Plan | None:
    base = type(layer)
    if base is DummyLayer:
        return Plan(base, False, 0, ())
    if base not in LEASED or getattr(layer, "record_past", False):
        return None
    grows = issubclass(base, CacheLayerMixin)
    if grows and (not layer.is_initialized or layer.keys is None or layer.keys.dim() != 4):
        return None
    window = layer.sliding_window if issubclass(base, DynamicSlidingWindowLayer) else 0
    if window == 1:
        return None
    if is_cross:
        return Plan(base, False, 0, (("keys", None), ("values", None))) if base is DynamicLayer else None
    if not issubclass(base, LinearAttentionLayer):
        return Plan(base, grows, window, ())
    if not all(layer.has_previous_state.values()):
        return None
    states = [(name, key, t) for name in _STATES for key, t in getattr(layer, name).items()]
    fixed = tuple((name, key) for name, key, tensor in states if tensor is not None)
    return Plan(base, grows, window, fixed, layer.number_of_states)


def _get(layer: Any, name: str, key: Any) -> Tensor:
    value = getattr(layer, name)
    return value if key is None else value[key]  # type: ignore[no-any-return]


# The cache that the captured forward sees


class StepLayer(StaticLayer):  # type: ignore[misc]
    """The keys and values of one layer, in memory of a fixed length.

    Args:
        positions: those of the new tokens.
        keys: the memory of the keys.
        values: the memory of the values.
        plan: the kind of the layer.
    """

    def __init__(self, positions: "Positions", keys: Tensor, values: Tensor, plan: Plan) -> None:
        CacheLayerMixin.__init__(self)
        self.positions = positions
        self.cumulative_length = positions.length
        self.keys, self.values = keys, values
        self.max_cache_len = keys.shape[-2]
        self.is_sliding = plan.window > 0
        self.is_initialized = True
        self.device, self.dtype = keys.device, keys.dtype
        self.batch_size = keys.shape[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Puts the keys and values of the new tokens at their positions."""
        positions = self.positions.of(key_states.shape[-2])
        self.keys.index_copy_(2, positions, key_states)
        self.values.index_copy_(2, positions, value_states)
        return self.keys, self.values


class StepCrossLayer(StepLayer):
    """The keys and values of an encoder, which no step changes."""

    def get_seq_length(self) -> int:
        """Returns the number of tokens of the encoder."""
        return int(self.max_cache_len)


class StepHybridLayer(LinearAttentionLayer, StepLayer):  # type: ignore[misc]
    """A layer with states of linear attention besides its keys and values."""

    is_compileable = True

    def __init__(self, positions: "Positions", keys: Tensor, values: Tensor, plan: Plan) -> None:
        LinearAttentionLayer.__init__(self, plan.states)
        StepLayer.__init__(self, positions, keys, values, plan)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: all tensors are there."""


def _set_states(layer: Any, plan: Plan, tensors: dict[tuple[str, Any], Tensor]) -> None:
    """Gives a layer of linear attention the states of the last step."""
    layer.has_previous_state = dict.fromkeys(range(plan.states), True)
    for name in _STATES:
        states = {key: tensors.get((name, key)) for key in range(plan.states)}
        setattr(layer, name, states)
        setattr(layer, f"is_{name}_initialized", {key: t is not None for key, t in states.items()})
    kernels = {key: t.shape[-1] for key, t in layer.conv_states.items() if t is not None}
    layer.conv_kernel_size = dict.fromkeys(range(plan.states)) | kernels
    first = next(iter(tensors.values()))
    layer.device, layer.dtype = first.device, first.dtype


class StepCache(Cache):  # type: ignore[misc]
    """A cache of a fixed length over the memory of a growing one.

    Args:
        plans: the kinds of the layers.
        positions: those of the new tokens.
        tensors: the tensors of all layers.
    """

    def __init__(self, plans: Iterable[Plan], positions: "Positions", tensors: Iterable[Tensor]) -> None:
        rest = iter(tensors)
        super().__init__(layers=[self._layer(plan, positions, rest) for plan in plans])

    @staticmethod
    def _layer(plan: Plan, positions: "Positions", rest: Iterator[Tensor]) -> Any:
        if plan.base is DummyLayer:
            return DummyLayer()
        if ("keys", None) in plan.fixed:
            return StepCrossLayer(positions, next(rest), next(rest), plan)
        if not plan.grows:
            layer = LinearAttentionLayer(plan.states)
        else:
            kind = StepHybridLayer if plan.states else StepLayer
            layer = kind(positions, next(rest), next(rest), plan)
        if plan.states:
            _set_states(layer, plan, {each: next(rest) for each in plan.fixed})
        return layer


class Positions:
    """The positions of the tokens of one call.

    Args:
        length: the number of tokens before the call.
    """

    def __init__(self, length: Tensor) -> None:
        self.length = length
        self._by_count: dict[int, Tensor] = {}

    def of(self, count: int) -> Tensor:
        """Returns the positions of as many new tokens."""
        if count not in self._by_count:
            self._by_count[count] = torch.arange(count, device=self.length.device) + self.length
        return self._by_count[count]


def step_cache(plans: Sequence[Plan], own: int, state: Sequence[Tensor]) -> Any:
    """Returns the cache that a forward is passed.

    Args:
        plans: the kinds of the layers.
        own: the number of layers that are not of an encoder; -1 where the model has none.
        state: the number of tokens, then the tensors of all layers.
    """
    cache = StepCache(plans, Positions(state[0]), state[1:])
    if own < 0:
        return cache
    cross = StepCache((), Positions(state[0]), ())
    cache.layers, cross.layers = cache.layers[:own], cache.layers[own:]
    return EncoderDecoderCache(cache, cross)


# The user's cache while the memory of graphs holds its tensors


class _Leased:
    """A layer of the user's cache whose tensors lie in a `Memory`."""

    _lease: "Lease"
    _index: int

    def get_seq_length(self) -> int:
        """Returns the number of tokens of the layer."""
        return self._lease.tokens(self._index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gives each beam the keys and values of the one that it goes on from."""
        if not self._lease.reorder(self._index, beam_idx):
            self._lease.end()
            self.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end of the layer."""
        if not self._lease.crop(self._index, tokens_to_remove):
            self._lease.end()
            self.crop(tokens_to_remove)

    def __repr__(self) -> str:
        return self._lease.memory.plans[self._index].base.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._lease.end()
        return self.__reduce_ex__(protocol)


def _moved(name: str) -> property:
    """Returns an attribute that ends the lease of its layer before it is read or replaced."""

    def read(layer: Any) -> Any:
        layer._lease.end()
        return getattr(layer, name)

    def replace(layer: Any, value: Any) -> None:
        layer._lease.end()
        setattr(layer, name, value)

    return property(read, replace)


def _leased(base: type) -> type:
    """Returns the class of a layer of type `base` whose tensors lie in a `Memory`."""
    names = [
        name for name in _TENSORS if name in ("keys", "values") or issubclass(base, LinearAttentionLayer)
    ]
    # No base class: an object's class can be replaced only by one of the same layout.
    shared = {name: value for name, value in vars(_Leased).items() if callable(value)}
    members: dict[str, Any] = {"__slots__": (), **shared, **{name: _moved(name) for name in names}}
    if issubclass(base, DynamicSlidingWindowLayer):
        moved = _moved("cumulative_length")
        members["cumulative_length"] = property(_Leased.get_seq_length, moved.fset)
    return type(base.__name__, (base,), members)


_BASES = [DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer]
_BASES += [getattr(cache_utils, name) for name in _HYBRIDS if hasattr(cache_utils, name)]
LEASED = {base: _leased(base) for base in _BASES}


_ENDING = threading.RLock()  # another thread may read the cache


class Lease:
    """The time in which the tensors of a user's cache lie in a memory.

    Args:
        memory: the memory.
        cache: the cache; referred to weakly.
        length: the number of tokens in the cache.

    Attributes:
        length: the number of tokens after the last call.
        thread: the thread that decodes with the cache.
        firsts: by layer, the position of the first token in the memory.
    """

    def __init__(self, memory: "Memory", cache: Any, length: int) -> None:
        self.memory, self.length = memory, length
        self.thread = threading.get_ident()
        layers = layers_of(cache)
        self._layers = [weakref.ref(layer) for layer in layers]
        self._removed = [0] * len(layers)
        self.firsts = [0] * len(layers)
        memory.take_in(self, layers)
        for index, (layer, plan) in enumerate(zip(layers, memory.plans, strict=True)):
            if plan.base is DummyLayer:
                continue
            members = vars(layer)
            for name in (*_TENSORS, "cumulative_length"):
                members.pop(name, None)
            layer.__class__ = LEASED[plan.base]
            members["_lease"], members["_index"] = self, index

    def reference(self, cache: Any) -> Any:
        """Returns a cache like the user's, over the same memory, that a call does not change."""
        layers = [self._reference_layer(index, layer) for index, layer in enumerate(layers_of(cache))]
        shell = copy.copy(cache)
        if self.memory.own < 0:
            shell.layers = layers
            return shell
        shell.is_updated = dict(cache.is_updated)
        for name, part in (
            ("self_attention_cache", layers[: self.memory.own]),
            (
                "cross_attention_cache",
                layers[self.memory.own :],
            ),
        ):
            setattr(shell, name, copy.copy(getattr(cache, name)))
            getattr(shell, name).layers = part
        return shell

    def _reference_layer(self, index: int, layer: Any) -> Any:
        plan = self.memory.plans[index]
        if plan.base is DummyLayer:
            return layer
        made: Any = object.__new__(_PEEKING.get(plan.base, plan.base))
        vars(made).update(vars(layer))
        del made._lease, made._index
        made.has_previous_state = dict(getattr(layer, "has_previous_state", {}))
        if plan.grows:
            first = self._first(index, self.length)
            views = (tensor[:, :, first : self.length] for tensor in self.memory.growing[index])
            made.keys, made.values = views
            made.cumulative_length = self.length
        _set_fixed(made, plan, [tensor.clone() for tensor in self.memory.fixed[index]])
        return made

    def _first(self, index: int, length: int) -> int:
        """Returns the position of the first token that a layer of the user's cache holds."""
        window = self.memory.plans[index].window
        return max(self.firsts[index], length - window + 1 if window else 0)

    def tokens(self, index: int) -> int:
        """Returns the number of tokens of a layer."""
        plan = self.memory.plans[index]
        if plan.fixed and not plan.grows:
            return int(self.memory.fixed[index][0].shape[-2])
        return self.length - self._removed[index]

    def crop(self, index: int, tokens: int) -> bool:
        """Removes tokens from the end of a layer; returns False where the layer has to do it itself."""
        plan = self.memory.plans[index]
        past_window = plan.window and self.length >= plan.window
        if tokens > 0 or not plan.grows or plan.fixed or past_window or -tokens > self.tokens(index):
            return False
        self._removed[index] -= tokens
        if len({n for n, p in zip(self._removed, self.memory.plans, strict=True) if p.grows}) == 1:
            self.length -= self._removed[index]
            self._removed = [0] * len(self._removed)
        return True

    def is_even(self) -> bool:
        """Return True if all layers hold the same number of tokens, which the memory knows."""
        return not any(self._removed)

    def reorder(self, index: int, rows: Tensor) -> bool:
        """Gives each row the content of another; returns False where the number of rows changes."""
        if rows.shape != (self.memory.rows,):
            return False
        for tensor in self.memory.views(index, self.length):
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))
        return True

    def end(self) -> None:
        """Gives the cache tensors of its own."""
        with _ENDING:
            self._end()

    def _end(self) -> None:
        if self.memory.lease is not self:
            return
        self.memory.reference = None
        for index, (reference, plan) in enumerate(zip(self._layers, self.memory.plans, strict=True)):
            layer = reference()
            if layer is None or plan.base is DummyLayer:
                continue
            length = self.tokens(index)
            layer.__class__ = plan.base
            del layer._lease, layer._index
            if plan.grows:
                first = self._first(index, length)
                if plan.window:
                    layer.cumulative_length = length
                for name, tensor in zip(("keys", "values"), self.memory.growing[index], strict=True):
                    setattr(layer, name, tensor[:, :, first:length].clone())
            _set_fixed(layer, plan, [tensor.clone() for tensor in self.memory.fixed[index]])


def _set_fixed(layer: Any, plan: Plan, tensors: list[Tensor]) -> None:
    """Gives a layer its tensors that keep their shape."""
    for name in _STATES if plan.states else ():
        setattr(layer, name, dict.fromkeys(range(plan.states)))
    for (name, key), tensor in zip(plan.fixed, tensors, strict=True):
        if key is None:
            setattr(layer, name, tensor)
        else:
            getattr(layer, name)[key] = tensor


def _peek(layer: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Returns the keys and values with those of new tokens, and does not keep them."""
    return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


_PEEKING = {
    base: type(base.__name__, (base,), {"update": _peek})
    for base in LEASED
    if issubclass(base, CacheLayerMixin)
}


def tensors_of(cache: Any, plans: Sequence[Plan]) -> list[Tensor]:
    """Returns the tensors of a cache whose layers are of these kinds."""
    tensors = []
    for layer, plan in zip(layers_of(cache), plans, strict=True):
        if plan.grows:
            tensors += [layer.keys, layer.values]
        tensors += [_get(layer, *each) for each in plan.fixed]
    return tensors


class Template:
    """Makes caches like the one that a forward has made.

    Args:
        cache: that cache.
        plans: the kinds of its layers.
    """

    def __init__(self, cache: Any, plans: tuple[Plan, ...]) -> None:
        self.plans = plans
        self._shells: list[Any] = []
        for layer in layers_of(cache):
            self._shells.append(shell := copy.copy(layer))
            for name in _TENSORS:
                vars(shell).pop(name, None)
        self._cache = copy.copy(cache)
        self._parts: dict[str, Any] = {"": self._cache}
        if isinstance(cache, EncoderDecoderCache):
            names = "self_attention_cache", "cross_attention_cache"
            self._parts = {name: copy.copy(getattr(cache, name)) for name in names}
        self._counts = [len(part.layers) for part in self._parts.values()]
        for part in self._parts.values():
            part.layers = []

    def make(self, tensors: Iterable[Tensor], tokens: int) -> Any:
        """Returns a cache of these tensors, which hold as many tokens."""
        rest, layers = iter(tensors), []
        for shell, plan in zip(self._shells, self.plans, strict=True):
            layers.append(layer := copy.copy(shell))
            if plan.grows:
                layer.keys, layer.values = next(rest), next(rest)
                if plan.window:
                    layer.cumulative_length = tokens
            if plan.base is DummyLayer:
                layer.keys = layer.values = None
            _set_fixed(layer, plan, [next(rest) for _ in plan.fixed])
        made, given = copy.copy(self._cache), iter(layers)
        for (name, part), count in zip(self._parts.items(), self._counts, strict=True):
            own = copy.copy(part) if name else made
            own.layers = list(islice(given, count))
            if name:
                setattr(made, name, own)
                made.is_updated = dict(made.is_updated)
        return made


class Memory:
    """Tensors of a fixed address for the caches of one shape.

    Args:
        cache: a cache of that shape.
        plans: the kinds of its layers.
        capacity: the number of tokens.

    Attributes:
        own: the number of layers that are not of an encoder; -1 where the model has none.
        growing: by layer, its keys and its values; nothing where it does not grow.
        fixed: by layer, its tensors that keep their shape.
        rows: the rows of the batch.
        length: the number of tokens, on the device.
        counted: the number that `length` holds.
        reference: the lease of now, weakly.
    """

    def __init__(self, cache: Any, plans: tuple[Plan, ...], capacity: int) -> None:
        self.plans, self.capacity = plans, capacity
        is_encoder_decoder = isinstance(cache, EncoderDecoderCache)
        self.own = len(cache.self_attention_cache.layers) if is_encoder_decoder else -1
        self.reference: weakref.ref[Lease] | None = None
        self._used = self.counted = 0
        self._steps: dict[int, list[Tensor]] = {}
        with torch.inference_mode(False):  # or calls outside that mode could not write to it
            pairs = list(zip(layers_of(cache), plans, strict=True))
            self.growing = [
                [self._zeros(t, capacity) for t in (layer.keys, layer.values)] if plan.grows else []
                for layer, plan in pairs
            ]
            self.fixed = [
                [torch.zeros_like(_get(layer, *each)) for each in plan.fixed] for layer, plan in pairs
            ]
            first = next(t for tensors in (*self.growing, *self.fixed) for t in tensors)
            self.length = torch.zeros((), dtype=torch.int64, device=first.device)
        self.rows = first.shape[0]

    @staticmethod
    def _zeros(like: Tensor, capacity: int) -> Tensor:
        return like.new_zeros((*like.shape[:2], capacity, like.shape[3]))

    @property
    def lease(self) -> Lease | None:
        """The lease of now, or None."""
        return None if self.reference is None else self.reference()

    def take_in(self, lease: Lease, layers: Sequence[Any]) -> None:
        """Copies the tensors of a cache, whose lease begins."""
        used, self._used = self._used, lease.length
        for index, (layer, plan) in enumerate(zip(layers, self.plans, strict=True)):
            if plan.grows:
                lease.firsts[index] = first = lease.length - layer.keys.shape[-2]
                for tensor, given in zip(self.growing[index], (layer.keys, layer.values), strict=True):
                    tensor[:, :, first : lease.length].copy_(given)
                    # What is masked is multiplied by zero, which hides no NaN of an earlier sequence.
                    tensor[:, :, :first].zero_()
                    tensor[:, :, lease.length : max(used, lease.length)].zero_()
            for tensor, each in zip(self.fixed[index], plan.fixed, strict=True):
                tensor.copy_(_get(layer, *each))
        self.length.fill_(lease.length)
        self.counted = lease.length
        self.reference = weakref.ref(lease)

    def grow(self, capacity: int) -> None:
        """Moves keys and values on to larger memory, layer by layer."""
        self._steps.clear()
        self.capacity = capacity
        with torch.inference_mode(False):
            for tensors in self.growing:
                for index, tensor in enumerate(tensors):
                    tensors[index] = self._zeros(tensor, capacity)
                    tensors[index][:, :, : self._used].copy_(tensor[:, :, : self._used])

    def views(self, index: int, length: int) -> list[Tensor]:
        """Returns the tensors of a layer, with as many tokens."""
        return [*(tensor[:, :, :length] for tensor in self.growing[index]), *self.fixed[index]]

    def step(self, length: int) -> list[Tensor]:
        """Returns the number of tokens, and the tensors of all layers with as many tokens."""
        if length not in self._steps:
            with torch.inference_mode(False):
                views = (self.views(index, length) for index in range(len(self.plans)))
                self._steps[length] = [self.length, *(tensor for layer in views for tensor in layer)]
        return self._steps[length]

    def note(self, length: int) -> None:
        """Records how many tokens the memory has held."""
        self._used = max(self._used, length)
