"""`generate` of transformers asks for a compiled call, and gets graphs over compiled code."""

import copy
import gc
import pickle
import sys
import weakref
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcache import GraphCacheError, GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, close
from tests.models import Counting
from tests.unit.integrations.compiler import compiled_graphs, compiler

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


# Who asks for a compiled call


@dataclass
class Config:
    """As transformers' `CompileConfig`."""

    backend: Any = compiler
    mode: str | None = None
    dynamic: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"backend": self.backend}


class Asking(Counting):
    """As a model of transformers: decodes by what it is answered."""

    compiles = True

    def get_compiled_call(self, config: Config | None) -> Any:
        if not self.compiles:
            return self.__call__
        self._last_compile_config = config or Config()
        self._compiled_call = torch.compile(self.__call__, **self._last_compile_config.to_dict())
        return self._compiled_call

    def decode(self, x: Tensor, steps: int = 4, config: Config | None = None) -> list[Tensor]:
        call = self.get_compiled_call(config)
        return [call(x=x).clone() for _ in range(steps)]


def asking(backend: Backend, **options: Any) -> tuple[Asking, Any]:
    twin = Asking().to(backend.device)
    return twin, cuda_graphed(copy.deepcopy(twin), **options)


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(close(a, b) for a, b in zip(mine, theirs, strict=True))


def plainly(twin: Asking, x: Tensor, steps: int = 4) -> list[Tensor]:
    return [twin(x).clone() for _ in range(steps)]


def test_compiled_call_runs_graphs_over_compiled_code(backend: Backend) -> None:
    twin, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)
    assert same(plainly(twin, x), model.decode(x))
    info = model.forward.cache_info()
    assert compiled_graphs
    assert (info.calls, info.hits, info.captures) == (4, 3, 1)
    assert same(plainly(twin, x), model.decode(x))  # a second time: nothing is captured
    assert model.forward.cache_info().captures == 1
    assert model.forward.cache_info().hits == 7


def test_compiled_and_plain_calls_are_counted_together(backend: Backend) -> None:
    twin, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)
    for _ in range(2):
        assert same(plainly(twin, x), [model(x).clone() for _ in range(4)])
        assert same(plainly(twin, x), model.decode(x))
    info = model.forward.cache_info()
    assert (info.calls, info.hits, info.captures, info.signatures) == (16, 14, 2, 2)
    assert info.batches == {2: 16}
    assert info.eager == {"the first call of a signature": 2}
    assert "16: 14 replayed, 2 eager" in str(info)
    model.forward.cache_clear()
    assert model.forward.cache_info().calls == 0
    assert same(plainly(twin, x), model.decode(x))
    assert model.forward.cache_info().captures == 1


def test_another_configuration_is_compiled_anew(backend: Backend) -> None:
    twin, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)
    assert same(plainly(twin, x), model.decode(x))
    before = len(compiled_graphs)
    assert same(plainly(twin, x), model.decode(x, config=Config(dynamic=False)))
    assert len(compiled_graphs) > before
    assert model.forward.cache_info().captures == 2


@pytest.mark.parametrize("why", ["a hook", "another forward", "it compiles nothing"])
def test_compiled_call_falls_back_to_the_model(backend: Backend, why: str) -> None:
    twin, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)
    for module in (twin, model):
        if why == "a hook":
            module.register_forward_hook(lambda module, args, out: out * 2)
        elif why == "another forward":
            module.forward = lambda x, under=module.forward: under(x) * 2
        else:
            module.compiles = False
    assert same(plainly(twin, x), model.decode(x, config=Config()))
    assert bool(compiled_graphs) == (why != "it compiles nothing")


def test_a_deep_copy_and_a_pickle_are_answered_for_themselves(backend: Backend) -> None:
    twin, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.up.weight.zero_()
        changed = copy.deepcopy(twin)
        with torch.no_grad():
            changed.up.weight.zero_()
        assert same(plainly(changed, x), other.decode(x))
        assert other.forward.cache_info().hits == 3
    assert model.forward.cache_info().calls == 0


def test_a_shallow_copy_is_told_apart(backend: Backend) -> None:
    _, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)
    model.decode(x)
    other = copy.copy(model)
    with pytest.raises(GraphCacheError, match="deepcopy"):
        other.decode(x)


def test_a_compiled_model_says_that_generate_gets_round_it(backend: Backend) -> None:
    compiled = torch.compile(Asking().to(backend.device), backend=compiler)
    with pytest.warns(GraphCacheWarning, match=r"Asking has graphs that are not used.*generate"):
        cuda_graphed(compiled, sizes=(2,))


def test_owners_of_a_forward_are_not_searched_at_each_call(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search goes through all objects of the process, which takes a tenth of a second."""
    _, model = asking(backend, sizes=(2,), pad=0)
    x, larger = backend.randn(2, 8), backend.randn(3, 8)

    def use() -> None:
        for rows in (x, larger, x):  # replayed, and not
            model.decode(rows)
            model.forward(rows)

    use()
    use()
    searched: list[Any] = []
    monkeypatch.setattr(gc, "get_referrers", lambda *of: searched.append(of) or [])
    hits = model.forward.cache_info().hits
    use()
    use()
    assert model.forward.cache_info().hits > hits
    assert not searched


def test_a_call_of_compiled_code_is_of_its_module(backend: Backend) -> None:
    """No module holds such a forward, so Python is not asked who shares it."""
    _, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)

    def asks(call: Any) -> bool:
        call(x=x)
        called: list[str] = []
        before = sys.getprofile()
        sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name))
        try:
            call(x=x)
        finally:
            sys.setprofile(before)
        return "_meant" in called

    assert asks(model.forward)
    assert not asks(model.get_compiled_call())
    assert model.forward.cache_info().hits == 2


def test_compiled_forward_dies_with_its_module(backend: Backend) -> None:
    _, model = asking(backend, sizes=(2,), pad=0)
    model.decode(backend.randn(2, 8))
    known = weakref.ref(model)
    del model
    torch.compiler.reset()
    gc.collect()
    assert known() is None


@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
def test_generate_of_transformers(backend: Backend) -> None:
    """One line added; `generate` compiles its decode step, and graphs replay that."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    asked = transformers.CompileConfig(backend=compiler, mode=None)
    asked._compile_all_devices = True

    def generate(model: Any, length: int, **options: Any) -> Tensor:
        torch.manual_seed(length)
        prompt = torch.randint(1, 97, (2, length)).to(backend.device)
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=12,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation="static",
            **options,
        )

    plain = transformers.AutoModelForCausalLM.from_config(config).to(backend.device).eval()
    model = cuda_graphed(copy.deepcopy(plain))
    captures = []
    for length in (5, 9, 5, 9, 5):
        want = generate(plain, length, disable_compile=True)
        assert torch.equal(generate(model, length, compile_config=asked), want)
        captures.append(model.forward.cache_info().captures)
    assert compiled_graphs
    assert model.forward.cache_info().hits > 40
    assert captures[-1] == captures[-3] <= 3  # one a length of cache, and one while Dynamo holds a cache


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_hidden_states_do_not_end_replays(backend: Backend) -> None:
    """transformers adds hooks for good where somebody asks for hidden states; then they sleep."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    model = cuda_graphed(transformers.BertModel(config).eval().to(backend.device), sizes=(2,))
    tokens = torch.randint(0, 99, (2, 8), device=backend.device)
    for asked in (False, True, False, True):
        before = model.forward.cache_info().hits
        for _ in range(6):
            found = model(tokens, output_hidden_states=asked)
            assert len(found.get("hidden_states") or ()) == 3 * asked
        assert model.forward.cache_info().hits >= before + 3
    info = model.forward.cache_info()
    assert not any("hook" in why for why in info.eager)


@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
def test_sliding_window_is_crossed_in_a_decode(backend: Backend) -> None:
    """The cache counts tokens in Python, and takes another way once its window is full."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=10,
    )
    plain = transformers.AutoModelForCausalLM.from_config(config).to(backend.device).eval()
    model = cuda_graphed(copy.deepcopy(plain))
    for length in (4, 6):
        prompt = torch.randint(1, 97, (2, length)).to(backend.device)
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": 16,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
            "cache_implementation": "static",
            "disable_compile": True,
        }
        assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))
    assert model.forward.cache_info().hits >= 24
