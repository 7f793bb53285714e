"""Calls of transformers' models that name no cache are replayed; the user's cache is as in eager."""

import contextvars
import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcache import cuda_graphed
from tests.helpers import Backend

transformers = pytest.importorskip("transformers")
default_cache = pytest.importorskip("graphcache.integrations.transformers_cache")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:`past_key_values` is deprecated")

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
WINDOW = {**COMMON, "head_dim": 8, "sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "pad_token_id": 0}
BART |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": COMMON,
    "Qwen3": {**COMMON, "head_dim": 8},
    "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoX": {**SMALL, "intermediate_size": 64},
    "OPT": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {**SMALL, "alibi": False},
    "Mistral": WINDOW,
    "Gemma3Text": MIXED,
    "GptOss": {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "Lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "T5": {**T5, "pad_token_id": 0, "decoder_start_token_id": 0},
    "Bart": {**BART, "decoder_start_token_id": 1, "forced_eos_token_id": None},
}
TOKENS = 14


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_cache, "SMALLEST", 16)
    monkeypatch.setattr(default_cache, "AT_ONCE", 0)


def pair(backend: Backend, family: str = "Llama", **options: Any) -> tuple[Any, Any]:
    """Returns a model as it is, and a graphed copy."""
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    torch.manual_seed(0)
    plain = getattr(transformers, kind).from_config(config).to(backend.device).eval()
    return plain, cuda_graphed(copy.deepcopy(plain), **options)


def write(model: Any, length: int = 5, rows: int = 2, **options: Any) -> Any:
    torch.manual_seed(length)
    prompt = torch.randint(1, 97, (rows, length)).to(model.device)
    torch.manual_seed(3)
    tokens = options.setdefault("max_new_tokens", TOKENS)
    usual = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, **{**usual, "eos_token_id": None, "min_new_tokens": tokens, **options})


def left_padded(model: Any) -> Tensor:
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, :3] = 0
    return mask.to(model.device)


def eager_decodes(model: Any) -> list[str]:
    """Returns the reasons of eager calls that neither begin a sequence nor capture."""
    usual = ("it fills a cache", "it makes a cache", "the first call")
    usual += ("it changes cache_params",)  # as transformers 5.17 names Mamba's, which its prompt fills
    return [why for why in model.forward.cache_info().eager if not why.startswith(usual)]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_writes_the_same_tokens_by_graphs(backend: Backend, family: str) -> None:
    plain, model = pair(backend, family)
    for _ in range(2):
        before = model.forward.cache_info()
        assert torch.equal(write(plain), write(model))
    info = model.forward.cache_info()
    assert (info.hits - before.hits, info.captures) == (TOKENS - 1, before.captures)
    mask = left_padded(plain)
    assert torch.equal(
        write(plain, rows=3, attention_mask=mask), write(model, rows=3, attention_mask=mask)
    )
    assert not eager_decodes(model)
    assert model.forward.cache_info().hits >= 2 * TOKENS


WAYS: dict[str, dict[str, Any]] = {
    "a longer prompt": {"length": 9},
    "sampled": {"do_sample": True},
    "four beams": {"num_beams": 4},
    "several steps": {"max_new_tokens": 30},
    "chunks": {"prefill_chunk_size": 2},
    "two beams, two results": {"num_beams": 2, "num_return_sequences": 2},
    "a penalty": {"repetition_penalty": 1.3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "rows": 1},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_ways_to_generate_write_the_same_tokens(backend: Backend, family: str) -> None:
    plain, model = pair(backend, family)
    for name, way in WAYS.items():
        want, got = write(plain, **way), write(model, **way)
        if isinstance(want, Tensor):
            assert torch.equal(want, got), name
        else:
            assert torch.equal(want.sequences, got.sequences), name
            assert list(want) == list(got), name
    assert model.forward.cache_info().hits > 100


def assert_same_cache(want: Any, got: Any) -> None:
    assert isinstance(got, transformers.DynamicCache)
    assert got.get_seq_length() == want.get_seq_length()
    assert repr(got) == repr(want)
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
        assert type(mine) is type(theirs)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_returned_cache_is_a_dynamic_cache_of_its_own(backend: Backend, family: str) -> None:
    plain, model = pair(backend, family)
    want, got = (write(each, return_dict_in_generate=True) for each in (plain, model))
    keys = got[list(got)[-1]].layers[1].keys.clone()
    write(model)  # by the same memory
    caches = [result[list(result)[-1]] for result in (want, got)]
    assert torch.equal(caches[1].layers[1].keys, keys)
    assert_same_cache(*caches)
    copies = [copy.deepcopy(cache) for cache in caches]
    for each in copies:
        each.reorder_cache(torch.tensor([1, 0], device=backend.device))
    assert_same_cache(*copies)


def test_returned_cache_is_copied_before_its_memory_is_used(backend: Backend) -> None:
    plain, model = pair(backend)
    want, got = (write(each, return_dict_in_generate=True) for each in (plain, model))
    write(model, 9)
    assert_same_cache(*(result[list(result)[-1]] for result in (want, got)))


def test_returned_cache_is_gone_on_with(backend: Backend) -> None:
    plain, model = pair(backend)
    results = []
    for each in (plain, model):
        first = write(each, return_dict_in_generate=True)
        cache = first[list(first)[-1]]
        cache.crop(-2)
        more = each.generate(
            first.sequences,
            attention_mask=torch.ones_like(first.sequences),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=6,
            pad_token_id=0,
            eos_token_id=None,
        )
        results.append((more, cache))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_cache(results[0][1], results[1][1])
    assert model.forward.cache_info().hits >= TOKENS + 2


def test_a_pickled_cache_is_the_one_that_eager_makes(backend: Backend) -> None:
    plain, model = pair(backend)
    results = [write(each, return_dict_in_generate=True) for each in (plain, model)]
    caches = [pickle.loads(pickle.dumps(result[list(result)[-1]])) for result in results]
    assert_same_cache(*caches)


def loop(model: Any, steps: int, mask: Tensor | None, ids: Tensor) -> tuple[Tensor, Any]:
    """Decodes as a user writes it: passes on the cache that came back."""
    tokens = []
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        for _ in range(steps):
            tokens.append(out.logits[:, -1:].argmax(-1))
            if mask is not None:
                mask = torch.cat([mask, mask[:, -1:]], 1)
            out = model(
                tokens[-1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
            )
    return torch.cat(tokens, 1), out.past_key_values


@pytest.mark.parametrize("masked", [False, True])
def test_a_loop_that_passes_the_cache_on_is_replayed(backend: Backend, masked: bool) -> None:
    plain, model = pair(backend)
    mask = left_padded(plain) if masked else None
    ids = torch.randint(1, 97, (3, 5)).to(backend.device)
    for _ in range(3):  # the second one captures the call that makes a cache
        before = model.forward.cache_info()
        (want, theirs), (got, mine) = (loop(each, 14, mask, ids) for each in (plain, model))
        assert torch.equal(want, got)
        assert_same_cache(theirs, mine)
    info = model.forward.cache_info()
    assert (info.hits - before.hits, info.captures) == (15, before.captures)


def test_two_loops_take_turns(backend: Backend) -> None:
    plain, model = pair(backend)
    ids = torch.randint(1, 97, (2, 2, 5)).to(backend.device)
    both = []
    with torch.no_grad():
        for each in (plain, model):
            outs = [each(prompt, use_cache=True) for prompt in ids]
            tokens = []
            for _ in range(12):
                new = [out.logits[:, -1:].argmax(-1) for out in outs]
                tokens += new
                outs = [
                    each(token, past_key_values=out.past_key_values, use_cache=True)
                    for token, out in zip(new, outs, strict=True)
                ]
            both.append(torch.cat(tokens, 1))
    assert torch.equal(*both)
    assert model.forward.cache_info().hits >= 16


def test_a_call_that_makes_a_cache_is_replayed(backend: Backend) -> None:
    plain, model = pair(backend)
    made = []
    with torch.no_grad():
        for _ in range(6):
            ids = torch.randint(1, 97, (2, 8)).to(backend.device)
            want, got = plain(ids), model(ids)
            torch.testing.assert_close(want.logits, got.logits)
            made.append((want.past_key_values, got.past_key_values))
    for pair_of in made:
        assert_same_cache(*pair_of)
    assert model.forward.cache_info().hits == 4


@pytest.mark.filterwarnings("ignore::graphcache.GraphCacheWarning")
@pytest.mark.parametrize(
    "said",
    [
        {"past_key_values": "a cache"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False, "max_new_tokens": 4},
    ],
)
def test_choices_of_the_user_win(backend: Backend, said: dict[str, Any]) -> None:
    plain, model = pair(backend)
    caches = [transformers.DynamicCache(config=plain.config) for _ in range(2)]
    given = [
        said | ({"past_key_values": cache} if "past_key_values" in said else {}) for cache in caches
    ]
    assert torch.equal(write(plain, **given[0]), write(model, **given[1]))
    if "past_key_values" in said:
        assert_same_cache(*caches)


def test_model_and_its_settings_stay_as_they_are(backend: Backend, tmp_path: Any) -> None:
    plain, model = pair(backend)
    before = copy.deepcopy(model.generation_config)
    write(model)
    assert model.generation_config == before
    model.save_pretrained(tmp_path / "graphed")
    plain.save_pretrained(tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "graphed" / path.name).read_bytes()
    other = copy.deepcopy(model)
    assert torch.equal(write(plain), write(other))
    assert other.forward.cache_info().hits


def test_a_family_that_counts_keys_runs_eagerly_with_the_reason(backend: Backend) -> None:
    """GPT-Neo finds its window by the number of keys, which is not that of the tokens here."""
    FAMILIES["GPTNeo"] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    }
    plain, model = pair(backend, "GPTNeo")
    for _ in range(2):
        assert torch.equal(write(plain), write(model))
    info = model.forward.cache_info()
    assert not info.hits
    assert any("a cache of a fixed length" in why for why in info.eager)


def test_steps_grow_by_a_quarter() -> None:
    for tokens in range(1, 5000):
        capacity = default_cache.capacity_for(tokens)
        assert tokens <= capacity <= max(16, 1.3 * tokens + 16)


def test_compared_steps_count_once(backend: Backend) -> None:
    plain, model = pair(backend)

    def count(module: Any, *_: Any) -> None:
        module.calls += 1

    for each in (plain, model):
        mlp = each.model.layers[0].mlp
        mlp.calls = 0
        mlp.register_forward_hook(count)
    for _ in range(3):
        assert torch.equal(write(plain), write(model))
        assert plain.model.layers[0].mlp.calls == model.model.layers[0].mlp.calls
    assert model.forward.cache_info().hits >= 2 * (TOKENS - 1)


def test_threads_that_generate_at_once_write_their_own_tokens(backend: Backend) -> None:
    plain, model = pair(backend)
    lengths = (5, 6, 7)
    want = [write(plain, length) for length in lengths]
    torch.manual_seed(0)
    found: dict[int, Tensor] = {}
    gate = threading.Barrier(len(lengths))

    def run(length: int) -> None:
        gate.wait(30)
        with torch.no_grad():
            prompt = want[lengths.index(length)][:, :length]
            usual = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
            ends = {"eos_token_id": None, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
            found[length] = model.generate(prompt, do_sample=False, **usual, **ends)

    for _ in range(3):
        contexts = [contextvars.copy_context() for _ in lengths]
        threads = [
            threading.Thread(target=context.run, args=(run, length), daemon=True)
            for context, length in zip(contexts, lengths, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(
            torch.equal(found.pop(length), each) for length, each in zip(lengths, want, strict=True)
        )
    assert "another thread decodes with this model" in model.forward.cache_info().eager


def test_memory_of_a_thread_that_ended_is_taken_over(backend: Backend) -> None:
    plain, model = pair(backend)
    kept: list[Any] = []
    context = contextvars.copy_context()
    thread = threading.Thread(
        target=context.run, args=(lambda: kept.append(write(model, return_dict_in_generate=True)),)
    )
    thread.start()
    thread.join()
    before = model.forward.cache_info().hits
    assert torch.equal(write(plain, 6), write(model, 6))
    assert model.forward.cache_info().hits > before
    want, got = (write(plain, return_dict_in_generate=True), kept[0])
    assert_same_cache(*(result[list(result)[-1]] for result in (want, got)))
