"""Lets `generate` of a graphed model run one step ahead of the GPU.

After each token, transformers asks the GPU whether to stop, and the GPU idles until the host has
prepared the next step. A graphed step costs the host little, so the answer is read one step later: by
then the next step is queued. If the answer was yes, that step was one too many, and is taken back.
transformers has such a check itself, for one kind of device; this one takes its place in calls of
`generate` that know of nothing but graphs and transformers' own parts.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from graphcache import config
from graphcache.runtime.deferred import DrawMarks, HostCopy
from graphcache.wrappers import graph_cache_of

logger = logging.getLogger(__name__)

_LIBRARY = "transformers.generation.utils"
# The parts of transformers' code that this module relies on, as transformers 5.17 and 5.24 have them.
_SAMPLE = (
    *("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    *("synced_gpus", "streamer", "model_kwargs"),
)
_CHECK = {
    "__init__": ("self", "input_ids", "max_length", "cache", "cache_is_returned", "streamer"),
    "is_supported": ("device", "cache", "cache_is_returned", "is_assistant"),
    "__call__": ("self", "unfinished_sequences", "tokens", "length"),
    "finish": ("self",),
}
# Stateless parts: one call more leaves nothing behind.
_CRITERIA = frozenset({"MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria"})
_PROCESSORS = frozenset(
    {
        *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "TemperatureLogitsWarper"),
        *("RepetitionPenaltyLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor"),
        *("TopPLogitsWarper", "TopKLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper"),
        *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper"),
        *("NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor"),
        *("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor", "ForcedBOSTokenLogitsProcessor"),
        *("ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor"),
        *("ExponentialDecayLengthPenalty", "LogitNormalization", "SuppressTokensLogitsProcessor"),
        *("SuppressTokensAtBeginLogitsProcessor", "WhisperTimeStampLogitsProcessor"),
    }
)
_STEP_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
_POSITION_OFFSET = 8  # some models begin to count positions at 2

_plan: ContextVar["_Plan | None"] = ContextVar("graphcache_generate", default=None)


def install() -> None:
    """Makes `generate` ask for the deferred check, where transformers is there and is as known.

    Models without graphs, and calls that no deferred check may serve, keep transformers' own way.
    """
    library: Any = sys.modules.get(_LIBRARY)
    mixin: Any = getattr(library, "GenerationMixin", None)
    sample = getattr(mixin, "_sample", None)
    check = getattr(library, "DeferredStopCheck", None)
    if hasattr(sample, "graphcache_original") or library is None:
        return
    if sample is None or check is None or not _is_known(sample, check):
        logger.debug("graphcache: generate() waits for the GPU at each token: unknown transformers")
        return
    methods = {"is_supported": _supports(check), "__new__": _new, "__module__": __name__}
    library.DeferredStopCheck = type(check.__name__, (check,), methods)
    mixin._sample = _with_plan(sample)


def _is_known(sample: Any, check: Any) -> bool:
    """Return True if transformers has the loop and the check that this module was written for."""
    methods = ((getattr(check, name, None), wanted) for name, wanted in _CHECK.items())
    return (
        _parameters(sample) == _SAMPLE
        and {check.__name__, "is_supported", "finish", "_undo_generation_steps"} <= _names(sample)
        and all(_parameters(method) == wanted for method, wanted in methods)
    )


def _parameters(function: Any) -> tuple[str, ...] | None:
    return tuple(inspect.signature(function).parameters) if callable(function) else None


def _names(function: Any) -> set[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else set(code.co_names)


def _with_plan(sample: Any) -> Any:
    """Returns the loop of `generate` with a plan in `_plan` as long as a call lasts."""
    signature = inspect.signature(sample)

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _ignores_tokenizer(self):
            kwargs.pop("tokenizer", None)  # which no graph takes; it is with the stop strings already
        plan = _Plan.of(self, signature.bind(self, *args, **kwargs).arguments)
        token = _plan.set(plan)
        try:
            result = sample(self, *args, **kwargs)
        finally:
            _plan.reset(token)
        return result if plan is None else plan.tidied(result)

    _sample.graphcache_original = sample  # type: ignore[attr-defined]
    return _sample


def _ignores_tokenizer(model: Any) -> bool:
    """Return True for a graphed model of transformers whose forward only hands a tokenizer on."""
    own = _is_of_library(type(model)) and graph_cache_of(model) is not None
    return own and "tokenizer" not in inspect.signature(type(model).forward).parameters


def _supports(check: Any) -> Any:
    def is_supported(device: Any, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
        plan = _plan.get()
        if plan is not None and plan.accepts(device, cache, cache_is_returned):
            return True
        return bool(check.is_supported(device, cache, cache_is_returned, is_assistant))

    return staticmethod(is_supported)


def _new(
    kind: Any,
    input_ids: Tensor,
    max_length: int | None,
    cache: Any,
    cache_is_returned: bool,
    streamer: Any = None,
) -> Any:
    """Makes the check that `generate` asked for; no instance of `kind` where a plan has accepted."""
    plan = _plan.get()
    if plan is None or not plan.accepted:
        return object.__new__(kind)
    return DeferredStop(plan, input_ids, max_length, _layers(cache) or (), cache_is_returned, streamer)


class _Plan:
    """One call of `generate`, as known before its first token.

    Args:
        model: the graphed model.
        cache: its graphs.

    Attributes:
        accepted: whether the call gets a deferred check.
        undone: whether a step was taken back.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self._model = model
        self._cache = cache
        self._calls: dict[int, int] = {}
        self.accepted = False
        self.undone = False

    @classmethod
    def of(cls, model: Any, given: dict[str, Any]) -> "_Plan | None":
        """Returns a plan for the call; None where a step too many could be seen by anybody.

        Args:
            model: the model that generates.
            given: the arguments of the loop, by name.
        """
        cache = graph_cache_of(model)
        settings, criteria = given["generation_config"], given["stopping_criteria"]
        if (
            cache is None
            or cache.store.options.bind  # what is no cache can't be taken back
            or given.get("synced_gpus")
            or settings.is_assistant
            or model.training
            or _is_hooked(model)
            or not _consists_of(given["logits_processor"], "LogitsProcessorList", _PROCESSORS)
            or not _consists_of(criteria, "StoppingCriteriaList", _CRITERIA)
            or not all(_is_of_library(getattr(model, name, None)) for name in _STEP_METHODS)
            or not _can_read_ends(model, settings)
        ):
            return None
        return cls(model, cache)

    def accepts(self, device: torch.device, cache: Any, is_returned: bool) -> bool:
        """Return True if a step too many can be taken back from `cache`, or if nobody sees that."""
        layers = _layers(cache)
        self.accepted = (
            (device.type == "cuda" or config.is_emulated())
            and layers is not None
            and (not is_returned or all(type(layer).__name__ in _TAKEN_BACK for layer in layers))
        )
        return self.accepted

    def replayed(self) -> bool:
        """Return True if the calls since the last question were replays that mutate a cache only."""
        caches = (self._cache, *self._cache.beside)
        before, self._calls = self._calls, {id(cache): cache.native.calls for cache in caches}
        moved = [cache for cache in caches if self._calls[id(cache)] != before.get(id(cache), 0)]
        return bool(moved) and all(cache.repeats_harmlessly() for cache in moved)

    def positions(self) -> int | None:
        """Returns how many positions the model has for certain; None where it names no number."""
        text = self._model.config.get_text_config(decoder=True)
        known = [getattr(text, name, None) for name in _POSITIONS]
        numbers = [number for number in known if isinstance(number, int) and number > 0]
        return min(numbers) - _POSITION_OFFSET if numbers else None

    def tidied(self, result: Any) -> Any:
        """Returns the result of `generate` with its tokens laid out as if no step was taken back."""
        if not self.undone:
            return result
        if isinstance(result, Tensor):
            return _dense(result)
        result.sequences = _dense(result.sequences)
        return result


def _dense(tensor: Tensor) -> Tensor:
    """Returns a copy without gaps: what a step was taken from has a larger stride."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _is_hooked(model: nn.Module) -> bool:
    return bool(model._forward_hooks or model._forward_pre_hooks or nn_module._has_any_global_hook())


def _consists_of(parts: Any, kind: str, names: frozenset[str]) -> bool:
    """Return True if a list of transformers holds nothing but parts of transformers, of these names."""
    found = {type(part) for part in parts}
    of_library = all(map(_is_of_library, (type(parts), *found)))
    return of_library and type(parts).__name__ == kind and names.issuperset(x.__name__ for x in found)


def _is_of_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).split(".")[0] in ("transformers", "peft", "graphcache")


def _can_read_ends(model: Any, settings: Any) -> bool:
    """Return True if the model takes the tokens that end a sequence: a step too many is given them."""
    try:
        rows = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return False
    ends = settings.eos_token_id
    return all(end < rows for end in ([ends] if isinstance(ends, int) else ends or ()))


class DeferredStop:
    """Decides one step late whether to stop, and hands each token to a streamer.

    Stands in for transformers' `StopCheck`.

    Args:
        plan: of this call of `generate`.
        input_ids: the prompt.
        max_length: tokens after which the loop ends for certain, or None.
        layers: those of the cache.
        is_returned: somebody sees the cache after the loop.
        streamer: gets each token; or None.
    """

    def __init__(
        self,
        plan: "_Plan",
        input_ids: Tensor,
        max_length: int | None,
        layers: Sequence[Any],
        is_returned: bool,
        streamer: Any,
    ) -> None:
        self._plan = plan
        self._max_length = max_length
        self._layers = layers
        self._is_returned = is_returned
        self._streamer = streamer
        count = 1 if streamer is None else 2
        self._copies = [HostCopy(count, input_ids.shape[0], input_ids.device) for _ in range(2)]
        self._draws = DrawMarks(input_ids.device)
        self._is_ahead = False
        self._room: int | None = None  # calls of the model that fit; unknown before the first answer

    def __call__(self, unfinished_sequences: Tensor, tokens: Tensor, length: int) -> bool:
        """Queues the answer for this step; returns True if the loop has to end.

        Args:
            unfinished_sequences: 1 for each sequence that goes on.
            tokens: the tokens of this step.
            length: tokens of a sequence so far.
        """
        self._draws.mark()
        copy, before = self._copies
        self._copies.reverse()
        copy.start((unfinished_sequences,) if self._streamer is None else (unfinished_sequences, tokens))
        replayed, was_ahead, self._is_ahead = self._plan.replayed(), self._is_ahead, False
        if was_ahead and self._ended(before):
            return True
        if self._room is None:
            ends = self._read(copy)
            self._room = self._room_after(length)
            return ends
        self._room -= 1
        if replayed and self._room > 0 and (self._max_length is None or length < self._max_length):
            self._is_ahead = True
            return False
        return self._read(copy)

    def finish(self) -> int:
        """Returns how many steps the loop has to undo."""
        return int(self._plan.undone)

    def _ended(self, before: HostCopy) -> bool:
        """Returns True if the step before was the last one; the step of now is taken back then."""
        try:
            ends = self._read(before)
        except BaseException:  # of the streamer, which may stop the loop so
            self._take_back()
            raise
        if ends:
            self._take_back()
            self._plan.undone = True
        return ends

    def _read(self, copy: HostCopy) -> bool:
        values = copy.wait()
        if self._streamer is not None:
            self._streamer.put(values[1].clone())
        return not any(values[0].tolist())

    def _room_after(self, length: int) -> int:
        """Returns how many more calls of the model stay inside its cache and its positions."""
        position, room = length - 1, sys.maxsize
        kinds = {(type(each), getattr(each, "max_cache_len", None)): each for each in self._layers}
        for (_, places), layer in kinds.items():
            cached = int(layer.get_seq_length()) if getattr(layer, "is_initialized", False) else 0
            position = max(position, cached)
            # A sliding window overwrites its first place, which can't be taken back.
            if places is not None and (self._is_returned or not layer.is_sliding):
                room = min(room, places - cached)
        positions = self._plan.positions()
        return room if positions is None else min(room, positions - position)

    def _take_back(self) -> None:
        self._draws.take_back()
        for layer in self._layers if self._is_returned else ():
            if type(layer).__module__.startswith("graphcache."):
                layer.crop(-1)
            elif layer.is_initialized:
                _TAKEN_BACK[type(layer).__name__](layer)


def _crop_fixed(layer: Any) -> None:
    """Takes the last token out of a layer with places, and empties its place."""
    layer.cumulative_length.sub_(1)
    if layer.is_sliding:
        layer.cumulative_length_int -= 1
    place = layer.cumulative_length.reshape(1)
    layer.keys.index_fill_(-2, place, 0)
    layer.values.index_fill_(-2, place, 0)


def _crop_grown(layer: Any) -> None:
    """Takes the last token out of a layer that grows."""
    layer.keys = _dense(layer.keys[..., :-1, :])
    layer.values = _dense(layer.values[..., :-1, :])


_TAKEN_BACK: dict[str, Callable[[Any], None]] = {
    "DynamicLayer": _crop_grown,
    "StaticLayer": _crop_fixed,
    "StaticSlidingWindowLayer": _crop_fixed,
}


def _layers(cache: Any) -> Sequence[Any] | None:
    """Returns the layers of a cache that grow; None for a cache of a kind that is not known."""
    if cache is None:
        return ()
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    known = isinstance(layers, list) and all(_is_of_library(type(part)) for part in (cache, *layers))
    return layers if known else None
