"""`generate` of a graphed model reads one step late whether to stop; nobody sees the step too many."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import queue
import string
import sys
import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from graphcache.integrations import transformers_stop
from graphcache.runtime.deferred import DrawMarks
from tests.helpers import RUNTIMES, Backend

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the library
    pytest.mark.parametrize("backend", RUNTIMES, indirect=True),
]

PROMPT, NEW, VOCABULARY = 5, 12, 64


class LateCopy(transformers_stop.HostCopy):
    """Copies at the last moment: who reads without waiting finds the values of an earlier step."""

    unread = 0
    log: ClassVar[list[int]] = []  # how many answers had not been read, whenever one was asked for

    @classmethod
    def forget(cls) -> None:
        cls.unread, cls.log = 0, []

    def start(self, tensors: Any) -> None:
        LateCopy.unread += 1
        LateCopy.log.append(LateCopy.unread)
        self._tensors = [tensor.clone() for tensor in tensors]
        for value in self._values:
            value.fill_(-1)

    def wait(self) -> list[Tensor]:
        LateCopy.unread -= 1
        super().start(self._tensors)
        return super().wait()


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    LateCopy.forget()
    monkeypatch.setattr(transformers_stop, "HostCopy", LateCopy)


def steps_ahead() -> int:
    """Returns how many steps were queued before the answer of the step before was read."""
    return LateCopy.log.count(2)


def configuration(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return transformers.LlamaConfig(**sizes | heads | ends | {"max_position_embeddings": 256} | changes)


def twins(backend: Backend, kind: Any = None, config: Any = None) -> tuple[Any, Any]:
    kind = transformers.LlamaForCausalLM if kind is None else kind
    plain = kind(configuration() if config is None else config).to(backend.device).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(4)  # so that greedy tokens differ from step to step
    return plain, cuda_graphed(copy.deepcopy(plain))


def prompt(backend: Backend, rows: int = 2) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, PROMPT), device=backend.device)


def generate(model: Any, ids: Tensor, seed: int = 3, **settings: Any) -> tuple[Any, Tensor]:
    """Returns what `generate` returns, and the next random numbers."""
    torch.manual_seed(seed)
    known = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    if "cache" not in settings and "past_key_values" not in settings:
        known["cache_implementation"] = "static"
    mask = torch.ones_like(ids)
    result = model.generate(ids, attention_mask=mask, **known | settings)
    return result, torch.rand(4, device=ids.device)


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, Tensor):
        equal = theirs.dtype == torch.long or torch.allclose(mine, theirs, atol=1e-5)
        return (
            mine.shape == theirs.shape
            and mine.stride() == theirs.stride()
            and bool(equal and (theirs.dtype != torch.long or torch.equal(mine, theirs)))
        )
    if isinstance(theirs, (tuple, list)):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return bool(mine == theirs)


def same_generations(models: tuple[Any, Any], ids: Tensor, **settings: Any) -> int:
    """Compares both models; returns how many steps the graphed one ran ahead."""
    want = generate(models[0], ids, **settings)
    LateCopy.forget()
    got = generate(models[1], ids, **settings)
    assert same(got, want)
    return steps_ahead()


def graphs_there(models: tuple[Any, Any], ids: Tensor, **settings: Any) -> list[int]:
    """Captures the step; returns the tokens of the first row."""
    found = generate(models[1], ids, **settings)[0][0, PROMPT:].tolist()
    assert models[1].forward.cache_info().hits
    LateCopy.forget()
    return list(dict.fromkeys(found))


def cache_name(model: Any) -> str:
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


# What is generated


@pytest.mark.parametrize("do_sample", [False, True])
def test_sequence_ends_at_any_step_as_without_deferral(backend: Backend, do_sample: bool) -> None:
    models, ids = twins(backend), prompt(backend, 1)
    tokens = graphs_there(models, ids, do_sample=do_sample)
    assert len(tokens) > 4
    ahead = [same_generations(models, ids, do_sample=do_sample, eos_token_id=end) for end in tokens]
    assert ahead[0] == 0  # the first answer is waited for
    assert ahead[-1] > 1


def test_several_ends_stop_rows_at_different_steps(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend, 3)
    graphs_there(models, ids)
    rows = generate(models[0], ids)[0][:, PROMPT:].tolist()
    for column in range(1, NEW):
        ends = [row[(column + 3 * index) % NEW] for index, row in enumerate(rows)]
        assert same_generations(models, ids, eos_token_id=ends)


def test_length_limit_is_no_step_too_many(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend)
    graphs_there(models, ids, max_new_tokens=NEW + 8)  # so that the cache does not end there
    calls = models[1].forward.cache_info().calls
    assert same_generations(models, ids) > NEW - 5
    assert models[1].forward.cache_info().calls == calls + NEW


@pytest.mark.parametrize("processor", [{"repetition_penalty": 1.3}, {"min_new_tokens": 5}, {"top_k": 5}])
def test_standard_processors_are_deferred(backend: Backend, processor: dict[str, Any]) -> None:
    models, ids = twins(backend), prompt(backend)
    tokens = graphs_there(models, ids, do_sample=True, **processor)
    settings = {"do_sample": True, "eos_token_id": tokens[-1], **processor}
    assert same_generations(models, ids, **settings)


def test_time_limit_ends_at_the_same_step(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    models, ids = twins(backend), prompt(backend)
    graphs_there(models, ids)
    found = []
    for model in models:
        ticks = iter(range(1000))
        criteria = transformers.generation.stopping_criteria
        clock = SimpleNamespace(time=lambda ticks=ticks: next(ticks))
        monkeypatch.setattr(criteria, "time", clock)
        found.append(generate(model, ids, max_time=6.5))
    assert found[0][0].shape[1] < PROMPT + NEW
    assert same(found[1], found[0])
    assert steps_ahead()


def test_stop_string_ends_at_the_same_step(backend: Backend) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    letters = string.ascii_letters + string.digits + "-+"
    words = {letter: index for index, letter in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    models, ids = twins(backend), prompt(backend)
    tokens = graphs_there(models, ids)
    settings = {"stop_strings": [letters[tokens[-3]] + letters[tokens[-2]]], "tokenizer": tokenizer}
    assert same_generations(models, ids, **settings)


@pytest.mark.parametrize("do_sample", [False, True])
def test_everything_asked_for_has_the_true_length(backend: Backend, do_sample: bool) -> None:
    models, ids = twins(backend), prompt(backend, 1)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    end = graphs_there(models, ids, do_sample=do_sample)[-2]
    found = [generate(model, ids, do_sample=do_sample, eos_token_id=end, **asked)[0] for model in models]
    for name in ("sequences", "scores", "logits"):
        assert same(found[1][name], found[0][name]), name
    assert len(found[0]["scores"]) == found[0]["sequences"].shape[1] - PROMPT < NEW
    caches = [result[cache_name(models[0])] for result in found]
    assert same_caches(*caches)
    assert steps_ahead()


def same_caches(mine: Any, theirs: Any) -> bool:
    names = ("cumulative_length", "cumulative_length_int", "keys", "values")
    return all(
        same(getattr(a, name), getattr(b, name))
        for a, b in zip(mine.layers, theirs.layers, strict=True)
        for name in names
        if hasattr(b, name)
    )


# Caches that somebody sees


def static_cache(model: Any, places: int) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=places)


def test_given_cache_goes_on_as_without_deferral(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend, 1)
    given = {cache_name(models[1]): static_cache(models[1], 64)}
    end = graphs_there(models, ids, **given)[-2]
    found = []
    for model in models:
        given = {cache_name(model): static_cache(model, 64)}
        first, _ = generate(model, ids, eos_token_id=end, **given)
        assert first.shape[1] < PROMPT + NEW
        assert steps_ahead() or model is models[0]
        cache = copy.deepcopy(next(iter(given.values())))
        again, _ = generate(model, torch.cat([first, ids], 1), max_new_tokens=4, **given)
        found.append((first, again, cache))
    assert same(found[1][:2], found[0][:2])
    assert same_caches(found[1][2], found[0][2])


def test_last_place_of_a_cache_is_not_exceeded(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend, 1)
    tokens = generate(models[0], ids)[0][0, PROMPT:].tolist()
    step = next(index for index in range(5, NEW) if tokens[index] not in tokens[:index])
    for places in range(PROMPT + step, PROMPT + step + 3):
        graphs_there(
            models, ids, max_new_tokens=5, **{cache_name(models[1]): static_cache(models[1], places)}
        )
        found = []
        for model in models:
            cache = static_cache(model, places)
            LateCopy.forget()
            given = {cache_name(model): cache}
            found.append((*generate(model, ids, eos_token_id=tokens[step], **given), cache))
        assert same(found[1][:2], found[0][:2])
        assert same_caches(found[1][2], found[0][2])
        assert steps_ahead()


def test_last_position_of_a_model_is_not_exceeded(backend: Backend) -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=PROMPT + NEW
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    models, ids = twins(backend, transformers.GPT2LMHeadModel, config), prompt(backend, 1)
    graphs_there(models, ids, pad_token_id=0, max_new_tokens=5)
    room = NEW - transformers_stop._POSITION_OFFSET
    assert 0 < same_generations(models, ids, pad_token_id=0) < room


def test_window_that_is_full_is_not_moved_once_more(backend: Backend) -> None:
    layer = transformers.cache_utils.StaticSlidingWindowLayer(max_cache_len=16, sliding_window=8)
    layer.update(*(torch.ones(1, 2, PROMPT, 4, device=backend.device) for _ in range(2)))
    full = transformers.cache_utils.StaticLayer(max_cache_len=16)
    full.update(*(torch.ones(1, 2, PROMPT, 4, device=backend.device) for _ in range(2)))
    plan: Any = SimpleNamespace(positions=lambda: None)
    ids = prompt(backend, 1)
    for is_returned, room in ((True, 3), (False, 11)):
        stop = transformers_stop.DeferredStop(plan, ids, None, [layer, full], is_returned, None)
        assert stop._room_after(PROMPT + 1) == room


def test_layers_are_as_before_the_step_too_many(backend: Backend) -> None:
    for kind, sizes in (
        ("StaticLayer", {"max_cache_len": 9}),
        ("StaticSlidingWindowLayer", {"max_cache_len": 9, "sliding_window": 8}),
        ("DynamicLayer", {}),
    ):
        want, got = (getattr(transformers.cache_utils, kind)(**sizes) for _ in range(2))
        for layer in (want, got):
            layer.update(*(torch.ones(2, 2, PROMPT, 4, device=backend.device) for _ in range(2)))
        got.update(*(torch.ones(2, 2, 1, 4, device=backend.device) for _ in range(2)))
        transformers_stop._TAKEN_BACK[kind](got)
        assert same_caches(SimpleNamespace(layers=[got]), SimpleNamespace(layers=[want])), kind


# Streamers


class Streamer:
    """Notes what it is given; raises at a step."""

    def __init__(self, raises_at: int = -1) -> None:
        self.tokens: list[Any] = []
        self.raises_at = raises_at

    def put(self, tokens: Tensor) -> None:
        if len(self.tokens) == self.raises_at:
            raise KeyboardInterrupt
        self.tokens.append((tokens.device.type, tokens.dtype, tokens.tolist()))

    def end(self) -> None:
        self.tokens.append("end")


@pytest.mark.parametrize("end", [None, 0, 1, 4, -1])
def test_streamer_gets_each_token_once(backend: Backend, end: int | None) -> None:
    models, ids = twins(backend), prompt(backend)
    tokens = graphs_there(models, ids)
    streamers = Streamer(), Streamer()
    for model, streamer in zip(models, streamers, strict=True):
        generate(model, ids, streamer=streamer, eos_token_id=None if end is None else tokens[end])
    assert streamers[1].tokens == streamers[0].tokens
    assert steps_ahead() or end == 0


def test_streamer_in_another_thread_gets_all_tokens(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend)
    end, found = graphs_there(models, ids)[-1], []

    class Queue(Streamer):
        def __init__(self) -> None:
            self.waiting: Any = queue.Queue()

        def put(self, tokens: Tensor) -> None:
            self.waiting.put(tokens)

        def end(self) -> None:
            self.waiting.put(None)

    for model in models:
        streamer = Queue()
        thread = threading.Thread(
            target=lambda streamer=streamer: found.append(
                [tokens.tolist() for tokens in iter(streamer.waiting.get, None)]
            )
        )
        thread.start()
        generate(model, ids, streamer=streamer, eos_token_id=end)
        thread.join()
    assert found[1] == found[0]


def test_streamer_that_raises_leaves_the_same_cache(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend, 1)
    graphs_there(models, ids, do_sample=True)
    found = []
    for model in models:
        cache = static_cache(model, 64)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, streamer=Streamer(9), do_sample=True, **{cache_name(model): cache})
        found.append((cache, torch.rand(4, device=ids.device)))
    assert same_caches(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])
    assert steps_ahead()


# Where nothing is deferred


class Ends(transformers.StoppingCriteria):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return torch.full((len(input_ids),), self.calls == 7, device=input_ids.device)


class Processor(transformers.LogitsProcessor):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores


@pytest.mark.parametrize("whose", ["criterion", "processor", "prefix"])
def test_code_of_the_user_is_called_as_often_as_before(backend: Backend, whose: str) -> None:
    models, ids = twins(backend), prompt(backend)
    end, counts = graphs_there(models, ids)[-1], []
    for model in models:
        if whose == "prefix":
            counter = SimpleNamespace(calls=0)

            def allowed(row: int, tokens: Tensor, counter: Any = counter) -> list[int]:
                counter.calls += 1
                return list(range(VOCABULARY))

            given: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed}
        elif whose == "criterion":
            counter = Ends()
            given = {"stopping_criteria": transformers.StoppingCriteriaList([counter])}
        else:
            counter = Processor()
            given = {"logits_processor": transformers.LogitsProcessorList([counter])}
        generate(model, ids, eos_token_id=end, **given)
        counts.append(counter.calls)
    assert counts[0] == counts[1]
    assert steps_ahead() == 0


@pytest.mark.parametrize("why", ["hook", "training", "ends", "method", "peers", "undecorated"])
def test_call_that_shows_a_step_too_many_is_not_deferred(
    backend: Backend, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, ids = twins(backend), prompt(backend)
    settings: dict[str, Any] = {}
    graphs_there(models, ids)
    for model in models:
        if why == "hook":
            model.register_forward_hook(lambda *_: None)
        elif why == "training":
            model.train()
        elif why == "ends":
            settings["eos_token_id"] = [VOCABULARY, 1]  # which the embedding does not take
        elif why == "method":
            inner = model.prepare_inputs_for_generation
            own = functools.wraps(inner)(lambda *args, inner=inner, **kwargs: inner(*args, **kwargs))
            own.__module__ = __name__
            monkeypatch.setattr(model, "prepare_inputs_for_generation", own, raising=False)
        elif why == "peers":
            settings["synced_gpus"] = True
            library = sys.modules["transformers.generation.utils"]
            monkeypatch.setattr(library.dist, "all_reduce", lambda *_, **__: None)
            monkeypatch.setattr(library.dist, "get_world_size", lambda *_: 2, raising=False)
    model = models[0] if why == "undecorated" else models[1]
    assert same(generate(model, ids, **settings), generate(models[0], ids, **settings))
    assert steps_ahead() == 0


class Counting(transformers.LlamaForCausalLM):
    """Counts its calls in a buffer, which a graph does too."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.add_(1)
        return super().forward(*args, **kwargs)


def test_state_of_a_model_counts_no_step_too_many(backend: Backend) -> None:
    plain, _ = models = twins(backend, Counting)
    ids = prompt(backend, 1)
    end = graphs_there(models, ids)[-2]
    plain.calls.copy_(models[1].calls)
    assert same_generations(models, ids, eos_token_id=end) == 0
    assert torch.equal(plain.calls, models[1].calls)


class Noting(transformers.LlamaForCausalLM):
    """Counts its calls in a tensor of the caller's."""

    def forward(self, *args: Any, notes: Any = None, **kwargs: Any) -> Any:
        notes.add_(1)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("bind", [(), ("notes",)])
def test_tensor_of_the_caller_counts_no_step_too_many(backend: Backend, bind: tuple[str, ...]) -> None:
    plain, graphed = twins(backend, Noting)
    models = plain, cuda_graphed(graphed, bind=bind)
    ids = prompt(backend, 1)
    notes = torch.zeros((), dtype=torch.long, device=backend.device)
    end, counts = graphs_there(models, ids, notes=notes)[-2], []
    for model in models:
        notes.zero_()
        generate(model, ids, eos_token_id=end, notes=notes)
        counts.append(int(notes))
    assert counts[0] == counts[1]
    assert steps_ahead() == 0


def test_assisted_decoding_is_left_alone(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend, 1)
    assistants = twins(backend)
    end = graphs_there(models, ids)[-2]
    found = []
    for model, assistant in zip(models, assistants, strict=True):
        torch.manual_seed(3)
        settings = {"assistant_model": assistant, "max_new_tokens": NEW, "eos_token_id": end}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    assert torch.equal(found[0], found[1])
    assert steps_ahead() == 0


def test_beams_are_left_alone(backend: Backend) -> None:
    models, ids = twins(backend), prompt(backend)
    end = graphs_there(models, ids)[-2]
    assert same_generations(models, ids, num_beams=3, eos_token_id=end) == 0


# The seam


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of `generate`, as it was before anything was decorated."""
    real = sys.modules["transformers.generation.utils"]
    sample = real.GenerationMixin._sample
    original = getattr(sample, "graphcache_original", sample)
    check = real.DeferredStopCheck
    check = check.__mro__[1] if check.__module__ == transformers_stop.__name__ else check

    class Mixin:
        _sample = original

    fake = SimpleNamespace(GenerationMixin=Mixin, DeferredStopCheck=check)
    monkeypatch.setitem(sys.modules, "transformers.generation.utils", fake)
    return fake


def test_known_library_is_patched_once(backend: Backend, library: Any) -> None:
    before = library.DeferredStopCheck, library.GenerationMixin._sample
    transformers_stop.install()
    after = library.DeferredStopCheck, library.GenerationMixin._sample
    assert after[0] is not before[0]
    assert after[1] is not before[1]
    transformers_stop.install()
    assert (library.DeferredStopCheck, library.GenerationMixin._sample) == after


@pytest.mark.parametrize("change", ["no check", "no loop", "another check", "another loop"])
def test_unknown_library_is_left_alone(
    backend: Backend, library: Any, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    if change == "no check":
        del library.DeferredStopCheck
    elif change == "no loop":
        del library.GenerationMixin._sample
    elif change == "another check":
        library.DeferredStopCheck = type("DeferredStopCheck", (), {"finish": lambda self, steps: 0})
    else:
        library.GenerationMixin._sample = lambda self, input_ids, **kwargs: None
    before = dict(vars(library)), dict(vars(library.GenerationMixin))
    with caplog.at_level(logging.DEBUG, logger=transformers_stop.__name__):
        cuda_graphed(nn.Linear(2, 2))
    assert (dict(vars(library)), dict(vars(library.GenerationMixin))) == before
    assert "unknown transformers" in caplog.text


def test_numbers_that_another_thread_drew_do_not_come_twice(backend: Backend) -> None:
    class Fake:
        offset = 0

        def get_offset(self) -> int:
            return self.offset

        def set_offset(self, offset: int) -> None:
            self.offset = offset

    for drawn, left in (([4, 4, 4], 8), ([4, 4, 8], 16), ([0, 0, 0], 0)):
        generator = DrawMarks(torch.device("cpu"))
        generator._on_cuda, generator._generator = True, Fake()  # type: ignore[assignment]
        for count in drawn:
            generator._generator.offset += count
            generator.mark()
        generator.take_back()
        assert generator._generator.offset == left
