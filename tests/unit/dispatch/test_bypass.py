"""Calls that no graph can serve run eagerly, and say why."""

import warnings
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import graphcache
from graphcache import CaptureError, GraphCacheWarning, cuda_graphed
from graphcache.call.signature import Signature
from graphcache.report.reasons import Reason
from graphcache.runtime.obstacles import obstacle
from tests.helpers import Backend, Counter, close, eager, info, reasons
from tests.models import MLP

# Warnings about eager calls are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def test_disabled(backend: Backend, mlp: MLP, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_graphed(mlp, sizes=(2,))
    with graphcache.disabled():
        mlp(backend.randn(2, 8))
        mlp.forward.warmup(backend.randn(2, 8))  # nothing to warn of: it was asked for
    assert reasons(mlp) == {"disabled": 1}


def test_cpu_tensors_without_emulation() -> None:
    model = cuda_graphed(MLP())
    with torch.no_grad():
        model(torch.ones(2, 8))
    (reason,) = reasons(model)
    assert "CPU tensors" in reason
    assert "graphcache.emulate()" in reason


def test_gradients(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    with torch.enable_grad():
        for _ in range(3):
            mlp(x).sum().backward()
    assert mlp.up.weight.grad is not None
    ((reason, count),) = reasons(mlp).items()
    assert "gradients are needed" in reason
    assert count == 3
    mlp(x)
    mlp(x)
    assert mlp.forward.cache_info().hits == 1
    mlp.requires_grad_(False)
    with torch.enable_grad():
        leaf = backend.randn(2, 8).requires_grad_()
        mlp(leaf).sum().backward()
    assert leaf.grad is not None


class Sub(Tensor):
    pass


TYPE = "an argument that no graph takes"


def test_arguments_that_no_graph_can_take(backend: Backend) -> None:
    @cuda_graphed(sizes=(2,))
    def forward(x: Any, y: Any = None) -> Any:
        return x

    x = backend.randn(2, 2)
    endless: list[Any] = [1]
    endless.append(endless)
    cases = {
        "no tensor among the arguments": (3, None),
        "no argument has the batch dimension: batch_dim=0": (x.sum(), None),
        f"{TYPE}: x is a tensor subclass of type tests.unit.dispatch.test_bypass.Sub": (
            x.as_subclass(Sub),
            None,
        ),
        f"{TYPE}: y is an object of type builtins.object": (x, object()),
        "a tensor argument that no graph takes: x has layout torch.sparse_coo": (x.to_sparse(), None),
        f"{TYPE}: y has more than 64 containers in each other, or contains itself": (x, endless),
        f"{TYPE}: y is a slice of something that is no constant": (x, slice([1], 2)),
    }
    for reason, (first, second) in cases.items():
        assert forward(first, second) is first
        assert forward.cache_info().eager[reason] == 1


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_part_is_scripted(backend: Backend) -> None:
    """Reads of a scripted part can't be guarded; the reason names the alternative."""
    x = backend.randn(2, 8)
    part = torch.jit.script(nn.Linear(8, 8).to(backend.device))
    model = cuda_graphed(nn.Sequential(part), sizes=(2,))
    with pytest.warns(GraphCacheWarning, match=r"a ScriptModule's.*use it as it was before torch\.jit"):
        model(x)
    assert close(model(x), part(x))
    assert Reason.SCRIPTED in {text.reason for text in info(model).eager}


def test_inside_modes_that_watch_operations(backend: Backend, mlp: MLP) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    cuda_graphed(mlp, sizes=(2,))
    x = backend.randn(2, 8)
    mlp(x)
    with Watch():
        mlp(x)
    assert seen
    with torch.overrides.BaseTorchFunctionMode():
        mlp(x)
    with torch.device(backend.device):  # of no harm, though another default device is another signature
        for _ in range(3):
            mlp(x)
    assert reasons(mlp)["a TorchDispatchMode is active"] == 1
    assert reasons(mlp)["a TorchFunctionMode is active"] == 1
    assert mlp.forward.cache_info().hits >= 1


def test_inside_another_capture_it_is_inlined(backend: Backend, mlp: MLP) -> None:
    inner = cuda_graphed(mlp, sizes=(2,))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    outer = cuda_graphed(Outer(), sizes=(2, 4))
    for batch in (4, 3, 3, 2):
        check = backend.randn(batch, 8)
        assert close(outer(check), eager(inner, check) * 2)
    assert set(reasons(inner)) == {"inside another capture or first call"}
    assert outer.forward.cache_info().hits == 2
    inner(backend.randn(2, 8))
    inner(backend.randn(2, 8))
    assert inner.forward.cache_info().hits == 1


BAD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (
        lambda x: x * x.sum().item(),
        r"reads a value on the host: `\.item\(\)` at .*test_bypass\.py:\d+",
    ),
    "float": (lambda x: x * float(x.sum()), r"`float\(tensor\)`"),
    "control flow": (lambda x: x if x.sum() > 0 else -x, "`if tensor:`"),
    "contains": (lambda x: x * (1.5 in x), "`value in tensor`"),
    "text": (lambda x: (repr(x), x * 2)[1], r"`print\(tensor\)`"),
    "nonzero": (lambda x: x.nonzero(), "a shape depends on values"),
    "mask": (lambda x: x[x > 0], r"a shape depends on values: `tensor\[mask\]`"),
    "masked_select": (lambda x: x.masked_select(x > 0), "a shape depends on values"),
    "unique": (lambda x: x.unique(), "a shape depends on values"),
    "host copy": (lambda x: x.cpu().to(x.device) * 2, r"`\.cpu\(\)`"),
    "to cpu": (lambda x: x + x.to("cpu").to(x.device), r"`\.to\('cpu'\)`"),
    "tolist": (lambda x: x * x[0].tolist()[0], r"`\.tolist\(\)`"),
    "from the host": (lambda x: x + torch.tensor(array("f", [1, 2]), device=x.device), "copies"),
    "index by a list": (lambda x: x[:, [[1, 0]]] + 1, "takes its index from a list"),
    "writes by a list": (lambda x: x.clone().__setitem__((slice(None), [[1]]), 2.0), "from a list"),
    "fft": (lambda x: torch.fft.rfft(x).abs(), "a plan that .* may drop"),
    "inverse fft": (lambda x: torch.fft.irfft(x, n=8), "a plan that .* may drop"),
    "stft": (lambda x: torch.stft(x, 2, 1, window=x[0] * 0 + 1, return_complex=True), "may drop"),
    "equal": (lambda x: x * torch.equal(x, x), "reads a value on the host"),
    "generator": (
        lambda x: x + torch.rand(x.shape, generator=GENERATORS[x.device.type], device=x.device),
        "torch.Generator",
    ),
}

GENERATORS = {kind: torch.Generator(kind) for kind in ("cpu", *(["cuda"] * torch.cuda.is_available()))}


@pytest.mark.parametrize("name", BAD)
def test_forward_that_cannot_be_captured_runs_eagerly(backend: Backend, name: str) -> None:
    forward, why = BAD[name]
    runs = Counter()

    def counted(x: Tensor) -> Any:
        runs.add()
        return forward(x)

    model = cuda_graphed(counted, sizes=(2, 4))
    x = backend.randn(2, 2)
    with pytest.warns(GraphCacheWarning, match=why) as caught:
        out = model(x)
    assert f"{__file__}:" in str(caught[0].message)  # the line of the operation
    assert "runs eagerly" in str(caught[0].message)
    if name not in ("generator", "writes by a list"):
        assert torch.equal(out, forward(x))
    for _ in range(3):
        model(x)  # without another warning, or another attempt
    assert int(runs) == 4
    assert model.cache_info().hits == 0
    assert model.cache_info().captures == 0


def test_permanent_bypass_does_not_read_the_call(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that no graph can hold should cost little more than it did undecorated."""

    @cuda_graphed(sizes=(4,))
    def forward(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor + x.sum().item()

    x = backend.randn(3, 2)
    with pytest.warns(GraphCacheWarning, match="reads a value on the host"):
        forward(x)
    reads: list[Any] = []
    read = Signature.read
    monkeypatch.setattr(
        Signature, "read", lambda self, *given: reads.append(given) or read(self, *given)
    )
    for rows in (3, 1, 4):
        y = backend.randn(rows, 2)
        assert torch.equal(forward(y), y * 2 + y.sum().item())
    assert not reads
    info = forward.cache_info()
    assert info.batches == {3: 2, 1: 1, 4: 1}
    assert sum(count for why, count in info.eager.items() if "reads a value" in why) == 3

    assert torch.equal(forward(x, 3.0), x * 3 + x.sum().item())  # another signature
    assert len(reads) == 1
    with graphcache.disabled():
        forward(x)
    assert forward.cache_info().eager["disabled"] == 1
    with pytest.warns(GraphCacheWarning, match="reads a value on the host"):
        forward.cache_clear()
        forward(x)  # tried anew
    assert len(reads) > 1


def test_reason_for_emulation_is_not_given_on_a_gpu() -> None:
    @cuda_graphed(sizes=(4,))
    def forward(x: Tensor) -> Tensor:
        return x * x.sum().item()

    x = torch.ones(3, 2)
    with graphcache.emulate(), pytest.warns(GraphCacheWarning, match="reads a value on the host"):
        forward(x)
    forward(x)
    (why,) = (why for why, count in forward.cache_info().eager.items() if "CPU tensors" in why)
    assert "graphcache.emulate()" in why


def test_operators_that_look_like_host_copies_are_captured(backend: Backend) -> None:
    """To the device where it is already: a no-op on a GPU, and so in emulation."""

    def forward(x: Tensor) -> Tensor:
        y = x.to(x.device).to(device=x.device, dtype=torch.float32)
        return torch.as_tensor(y, device=x.device) * torch.tensor(2.0)

    model = cuda_graphed(forward, sizes=(2,))
    x = backend.randn(2, 2)
    for _ in range(3):
        assert torch.equal(model(x), x * 2)
    assert model.cache_info().hits == 2


@pytest.mark.parametrize("name", BAD)
def test_fallback_false_raises(backend: Backend, name: str) -> None:
    forward, why = BAD[name]
    model = cuda_graphed(forward, sizes=(2,), fallback=False)
    with pytest.raises(CaptureError, match=why):
        model(backend.randn(2, 2))


@pytest.mark.parametrize("name", ["cupy", "cupyx.scipy", "numba.cuda.dispatcher", "warp._src.context"])
def test_a_library_launches_kernels_past_torch(backend: Backend, name: str) -> None:
    """They run on the library's stream: while a capture is under way at once, and in no replay."""
    library: dict[str, Any] = {"__name__": name}
    exec("def double(x): return x.mul_(2)", library)
    model = cuda_graphed(lambda x: library["double"](x + 0) + 1, sizes=(2,))
    x = backend.randn(2, 2)
    with pytest.warns(
        GraphCacheWarning, match=f"it calls {name.partition('.')[0]}: such kernels may run"
    ):
        assert torch.equal(model(x), x * 2 + 1)
    assert torch.equal(model(x), x * 2 + 1)
    assert model.cache_info().hits == 0


def test_a_library_launches_kernels_past_torch_in_code_of_c(backend: Backend) -> None:
    """As nearly all of cupy is."""
    launch = {}.get
    launch.__module__ = "cupy._core"

    def forward(x: Tensor) -> Tensor:
        launch(1)
        return x + 1

    model = cuda_graphed(forward, sizes=(2,))
    x = backend.randn(2, 2)
    with pytest.warns(GraphCacheWarning, match="it calls cupy: such kernels may run"):
        assert torch.equal(model(x), x + 1)


def test_a_library_of_another_name_is_code_as_any(backend: Backend) -> None:
    library: dict[str, Any] = {"__name__": "numba_cpu.warping"}
    exec("def double(x): return x.mul_(2)", library)
    model = cuda_graphed(lambda x: library["double"](x + 0) + 1, sizes=(2,))
    x = backend.randn(2, 2)
    for _ in range(3):
        assert torch.equal(model(x), x * 2 + 1)
    assert model.cache_info().hits == 2


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="fake tensors need the second CUDA device")
def test_a_copy_to_another_device_of_the_same_kind() -> None:
    copy, here, there = torch.ops.aten._to_copy.default, "cuda:0", "cuda:1"
    with FakeTensorMode():
        mine, theirs = torch.empty(2, device=here), torch.empty(2, device=there)
    for tensor, device in ((mine, here), (mine, "cuda"), (mine, None)):
        assert obstacle(copy, (tensor,), {"device": device}, mine.device) is None
    for tensor, device in ((mine, there), (theirs, here)):
        why = f"copies between {tensor.device} and {device}"
        assert why in str(obstacle(copy, (tensor,), {"device": device}, mine.device))


def test_a_sparse_tensor_is_asked_for_its_address(backend: Backend) -> None:
    """A sparse tensor has no address; torch raises the same as in eager."""

    def forward(x: Tensor) -> Tensor:
        try:
            x.to_sparse().data_ptr()
        except RuntimeError:
            return x * 2
        return x

    x = backend.randn(2, 2)
    with pytest.warns(GraphCacheWarning, match="runs eagerly"):
        assert torch.equal(cuda_graphed(forward, sizes=(2,))(x), x * 2)


def test_memory_is_handed_over_by_dlpack(backend: Backend) -> None:
    def forward(x: Tensor) -> Tensor:
        y = x + 0
        torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(y)).mul_(2)
        return y

    model = cuda_graphed(forward, sizes=(2,))
    x = backend.randn(2, 2)
    with pytest.warns(GraphCacheWarning, match="it hands memory over by DLPack: such kernels"):
        assert torch.equal(model(x), x * 2)
    assert torch.equal(model(x), x * 2)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_run_eagerly(backend: Backend) -> None:
    """Their sizes are on the host: a graph would keep those of its capture."""

    def forward(x: Tensor) -> Tensor:
        nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
        return nested.to_padded_tensor(0.0)

    model = cuda_graphed(forward, sizes=(2,), fallback=False)
    with pytest.raises(CaptureError, match="a nested tensor is made at"):
        model(backend.randn(2, 8))


def test_a_transformer_encoder_with_a_padding_mask(backend: Backend) -> None:
    """On its fast path it packs the rows that the mask leaves, which is another number each time."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).to(backend.device).eval()
    model = cuda_graphed(encoder, sizes=(2,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in (5, 3, 6, 6):
            x = backend.randn(2, 6, 16)
            mask = torch.arange(6, device=backend.device) >= torch.tensor([[6], [length]]).to(x.device)
            got = model(x, src_key_padding_mask=mask)
            assert torch.allclose(got, eager(model, x, src_key_padding_mask=mask), atol=1e-4)
    assert any("a nested tensor is made at" in why for why in reasons(model))
    assert torch.overrides.has_torch_function is torch._C._has_torch_function


def eager_for_good(backend: Backend) -> tuple[Callable[..., Any], Tensor]:
    """A forward that can't be captured, after the calls that find that out, and its argument."""
    graphed, x = cuda_graphed(lambda x, scale=1.0: x * x.sum().item() * scale), backend.randn(3, 4)
    with pytest.warns(GraphCacheWarning, match="can't be captured"):
        graphed(x)
    return graphed, x


def test_known_eager_call_is_matched_once(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The miss hands its reason over: neither the matcher nor Python reads the call again."""
    graphed, x = eager_for_good(backend)
    cache = graphed._cache()
    monkeypatch.setattr(cache.store, "signature", None)
    for _ in range(3):
        assert close(graphed(x), x * x.sum().item())
    assert close(graphed(x=x), x * x.sum().item())
    told = graphed.cache_info()
    assert told.calls == told.misses == 5
    assert told.batches == {3: 5}
    assert cache.native.eager_reason((x,), {}) is None  # taken once


def test_eager_reason_of_other_calls_is_not_given(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed, x = eager_for_good(backend)
    dispatcher = graphed._cache().native
    given: list[tuple[Any, Any]] = [((x.clone(),), {}), ((x, x), {}), ((), {"x": x.clone()}), ((x,), {})]
    reasons = []

    def unserved(
        *_: Any,
    ) -> None:  # in place of Python's way: the native matcher has just missed the call
        reasons.append(dispatcher.eager_reason(*given[len(reasons)]))

    with monkeypatch.context() as patch:
        patch.setattr(type(graphed), "_unserved_call", unserved)
        for _ in given:
            graphed(x)
    assert reasons[:3] == [None, None, None]
    assert reasons[3] is not None
