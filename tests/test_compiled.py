"""torch.compile under the graphs: what is compiled when, and who answers `get_compiled_call`."""

import copy
import gc
import pickle
import sys
import warnings
import weakref
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import CaptureError, GraphCacheError, GraphCacheWarning, cuda_graphed
from graphcache.integrations.transformers import without_graphs
from tests.conftest import MLP, Backend, close

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

compiled_graphs: list[torch.fx.GraphModule] = []
runs: list[int] = []


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()
    compiled_graphs.clear()
    runs.clear()


def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Changes nothing; notes what it is given, and when that runs. It synchronises, as Inductor does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    compiled_graphs.append(graph)

    def run(*args: Tensor) -> Any:
        runs.append(len(args))
        return graph.forward(*args)

    return run


class Counting(MLP):
    """Writes to a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x) + self.steps


# Compiled code


def test_lists_in_compiled_code(backend: Backend) -> None:
    """They become constants of what is compiled, where no mode of ours may be; captured or not."""

    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, [2, 0]] * torch.tensor([0.5, 2.0], device=x.device)

    model = cuda_graphed(torch.compile(Picks(), backend=compiler), sizes=(2,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphCacheWarning)
        for _ in range(4):
            x = backend.randn(2, 3)
            assert close(model(x), Picks()(x))
    assert compiled_graphs


def test_a_module_that_was_never_called_is_compiled_before_its_capture(backend: Backend) -> None:
    """Compiling inside a capture would synchronise, and end it."""
    plain = MLP().to(backend.device)
    model = cuda_graphed(torch.compile(plain, backend=compiler), sizes=(2, 4))
    x = backend.randn(4, 8)
    want = plain(x)
    assert close(model(x), want)
    assert compiled_graphs
    assert model.forward.cache_info().sizes == (2, 4)
    before = len(compiled_graphs)
    for batch in (4, 2, 4):
        assert close(model(x[:batch]), want[:batch])
    assert model.forward.cache_info().hits == 3
    assert len(compiled_graphs) == before


def test_graphs_hold_what_was_compiled(backend: Backend) -> None:
    """In emulation, what that was made of: compiled code does not run while it is recorded."""
    warm_up_and_capture = 2 if backend.name == "cuda" else 1
    model = cuda_graphed(torch.compile(MLP().to(backend.device), backend=compiler), sizes=(2,))
    model(backend.randn(2, 8))
    assert len(runs) == warm_up_and_capture
    model(backend.randn(2, 8))
    assert len(runs) == warm_up_and_capture


def test_a_part_is_compiled(backend: Backend) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP()
            self.part = torch.compile(self.inner, backend=compiler)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.part(x))

    model = cuda_graphed(Whole().to(backend.device), sizes=(2,))
    for _ in range(3):
        x = backend.randn(2, 8)
        assert close(model(x), torch.tanh(model.inner(x)))
    assert compiled_graphs
    assert model.forward.cache_info().hits == 2


def test_what_the_warm_up_writes_and_draws_is_put_back(backend: Backend) -> None:
    class Drops(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    twin = Drops().to(backend.device)
    model = cuda_graphed(torch.compile(copy.deepcopy(twin), backend=compiler), sizes=(2,))
    x = backend.randn(2, 8)
    results = []
    for module in (twin, model):
        torch.manual_seed(3)
        results.append([module(x).clone() for _ in range(4)])
    for mine, theirs in zip(*results, strict=True):
        assert close(theirs, mine)
    assert compiled_graphs
    assert model.forward.cache_info().hits == 3


@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}], ids=str
)
def test_graphs_of_inductor_are_refused_with_advice(backend: Backend, options: dict[str, Any]) -> None:
    model = torch.compile(MLP().to(backend.device), **options)
    cuda_graphed(model, sizes=(2,), fallback=False)
    with pytest.raises(CaptureError, match=r"reduce-overhead.*max-autotune-no-cudagraphs"):
        model(backend.randn(2, 8))
    part = cuda_graphed(nn.Sequential(torch.compile(MLP().to(backend.device), **options)), sizes=(2,))
    with pytest.warns(GraphCacheWarning, match="max-autotune-no-cudagraphs"):
        part(backend.randn(2, 8))


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


def test_it_is_answered_by_graphs_over_compiled_code(backend: Backend) -> None:
    twin, model = asking(backend, sizes=(2,), pad=0)
    x = backend.randn(2, 8)
    assert same(plainly(twin, x), model.decode(x))
    info = model.forward.cache_info()
    assert compiled_graphs
    assert (info.calls, info.hits, info.captures) == (4, 3, 1)
    assert same(plainly(twin, x), model.decode(x))  # a second time: nothing is captured
    assert model.forward.cache_info().captures == 1
    assert model.forward.cache_info().hits == 7


def test_calls_that_are_not_compiled_are_counted_with_those_that_are(backend: Backend) -> None:
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
def test_the_model_answers_itself_where_a_graph_can_not(backend: Backend, why: str) -> None:
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


def test_who_shares_a_forward_is_not_searched_for_at_each_call(
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
        return "_is_alone" in called

    assert asks(model.forward)
    assert not asks(model.get_compiled_call())
    assert model.forward.cache_info().hits == 2


def test_it_dies_with_its_module(backend: Backend) -> None:
    _, model = asking(backend, sizes=(2,), pad=0)
    model.decode(backend.randn(2, 8))
    known = weakref.ref(model)
    del model
    torch.compiler.reset()
    gc.collect()
    assert known() is None


def test_options_without_graphs() -> None:
    assert without_graphs({"mode": "reduce-overhead", "options": None}) == {
        "mode": "default",
        "options": None,
    }
    assert without_graphs({"mode": "max-autotune"}) == {"mode": "max-autotune-no-cudagraphs"}
    given = {"mode": None, "options": {"triton.cudagraphs": True, "max_autotune": True}}
    assert without_graphs(given) == {
        "mode": None,
        "options": {"triton.cudagraphs": False, "max_autotune": True},
    }
    assert given["options"]["triton.cudagraphs"]
    assert without_graphs({"mode": "default"}) == {"mode": "default"}


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
