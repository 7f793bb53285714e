"""Traps: a forward changes state, on the device or in Python."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import (
    EMULATED,
    ON_A_GPU,
    Backend,
    Counter,
    equal,
    graphed_twin,
    in_step,
    info,
    same_as_eager,
    triton_knows,
)
from tests.models import Steps

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def steps(backend: Backend, write: Callable[[Tensor, Tensor], Any], **options: Any) -> Any:
    model, twin = (Steps(write).to(backend.device) for _ in range(2))
    return cuda_graphed(model, sizes=(2, 4), **options), twin


def add_sum(state: Tensor, x: Tensor) -> None:
    state.add_(x.sum(0))


@torch.library.custom_op("footguns::declared", mutates_args={"state"})
def declared(state: Tensor, x: Tensor) -> None:
    state.add_(x.sum(0))


@torch.library.custom_op("footguns::undeclared", mutates_args=())
def undeclared(state: Tensor, x: Tensor) -> Tensor:
    state.add_(x.sum(0))
    return x + 1


@pytest.mark.parametrize("write", [add_sum, declared])
@pytest.mark.parametrize("inference", [False, True])
def test_forward_writes_to_a_buffer(backend: Backend, write: Any, inference: bool) -> None:
    """Warm-ups advance it, captures don't, and padded rows write to it too."""
    model, twin = steps(backend, write)
    with torch.inference_mode(inference):
        for batch in (4, 4, 3, 3, 2, 4, 3, 3):
            in_step(model, twin, backend.randn(batch, 8))
    assert info(model).hits >= 4


def test_a_custom_op_writes_and_does_not_declare_it(backend: Backend) -> None:
    """Padding and comparison write more often than eager: no schema declares the write."""
    model, twin = steps(backend, undeclared)
    for batch in (4, 4, 3, 3, 2, 4, 3, 3):
        in_step(model, twin, backend.randn(batch, 8))


def test_custom_op_writes_to_an_argument_undeclared(backend: Backend) -> None:
    """The op writes to the graph's own copy of the argument; the caller's stays as it was."""

    def forward(x: Tensor, state: Tensor) -> Tensor:
        return undeclared(state, x) + state

    model = cuda_graphed(forward, sizes=(2, 4))
    mine, theirs = torch.zeros(8, device=backend.device), torch.zeros(8, device=backend.device)
    for batch in (4, 4, 3, 3, 2, 4, 3):
        x = backend.randn(batch, 8)
        equal(model(x, mine), forward(x, theirs))
        equal(mine, theirs)


def bump_by_address(state: Tensor, x: Tensor) -> None:
    """As an extension does that never told torch of its operator."""
    first = ctypes.c_float.from_address(state.data_ptr())
    first.value += float(x.shape[0])


def bump_by_numpy(state: Tensor, x: Tensor) -> None:
    state.numpy()[0] += float(x.shape[0])


class WritesByTriton(nn.Module):
    """Advances a buffer and an argument, past torch's operators; raises in so many captures."""

    def __init__(self, kernels: ModuleType, *, failing: int = 0) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(16))
        self.kernels, self.failing, self.captures = kernels, failing, Counter()

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        self.kernels.add_one[(1,)](self.state, 16)
        self.kernels.add_one[(1,)](counts, 16)
        if torch._C._cuda_isCurrentStreamCapturing() and self.captures.add() <= self.failing:
            raise RuntimeError("not initialised")
        return x + self.state[:8] + counts[8:]


@ON_A_GPU
@pytest.mark.parametrize("failing", [0, 1])
def test_a_triton_kernel_writes_to_a_buffer_and_to_an_argument(
    backend: Backend, x: Tensor, kernels: ModuleType, failing: int
) -> None:
    """The kernel writes to a copy of the argument, and no operator declares the write.

    Nor to a warm-up, which follows a capture that fails, and has to undo it.
    """
    model = cuda_graphed(WritesByTriton(kernels, failing=failing).to(backend.device), sizes=(2,))
    counts = torch.zeros(16, device=backend.device)
    for step in range(1, 7):
        equal(model(x, counts), x + 2 * step)
        assert model.state.eq(step).all()
        assert counts.eq(step).all()
    assert int(model.captures) > failing
    assert info(model).hits >= 3


@ON_A_GPU
def test_a_triton_kernel_reads_a_global_tensor(backend: Backend, x: Tensor, kernels: ModuleType) -> None:
    """The graph reads the old tensor; no operator declares the read."""
    scratch = [torch.zeros(16, device=backend.device)]

    def forward(x: Tensor) -> Tensor:
        kernels.add_one[(1,)](scratch[0], 16)
        return x * 2

    model = cuda_graphed(forward, sizes=(2, 4))
    model.warmup(x)
    assert scratch[0].eq(0).all()
    for _ in range(3):
        equal(model(x), x * 2)
    equal(model(x[:1]), x[:1] * 2)
    before, scratch[0] = scratch[0], torch.zeros(16, device=backend.device)
    for step in range(1, 4):
        model(x)
        assert scratch[0].eq(step).all()
    assert before.eq(4).all()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("triton.compiler.compiler", "CompiledKernel"),
        ("torch._inductor.runtime.static_triton_launcher", "StaticallyLaunchedTritonKernel"),
    ],
)
@pytest.mark.parametrize("derived", [False, True])
def test_kernel_is_unloaded_by_what_loaded_it(
    backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch, file: str, name: str, derived: bool
) -> None:
    """The graph launches a kernel that is no longer on the device."""
    base = type(name, (), {})
    kind = type("ForOneDevice", (base,), {}) if derived else base
    monkeypatch.setitem(sys.modules, file, SimpleNamespace(**{name: base}))  # type: ignore[misc]
    triton_knows(monkeypatch, SimpleNamespace(_active="a device"))
    kernel = kind()
    known = weakref.ref(kernel)
    model = cuda_graphed(lambda x: x * 2, sizes=(2,))
    model(x)
    del kernel
    gc.collect()
    assert known() is not None
    model.cache_clear()
    gc.collect()
    assert known() is None


@ON_A_GPU
def test_a_triton_kernel_tunes_itself(backend: Backend, kernels: ModuleType) -> None:
    """The kernel waits for measurements at each new size, which ends a capture."""

    def forward(x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        kernels.double[lambda chosen: (-(-x.numel() // chosen["block"]),)](x, y, x.numel())
        return y + 1

    model = cuda_graphed(forward, sizes=(2, 4, 8))
    for batch in (4, 8, 3, 2, 8, 4, 3):
        x = backend.randn(batch, 8)
        equal(model(x), x * 2 + 1)
    assert info(model).sizes == (2, 4, 8)
    assert info(model).hits >= 4


@EMULATED
@pytest.mark.parametrize("write", [bump_by_address, bump_by_numpy])
def test_host_writes_by_data_ptr(backend: Backend, write: Any) -> None:
    """The host writes once, at capture; no operator records the write."""
    pytest.importorskip("numpy")
    model, twin = steps(backend, write)
    for batch in (4, 4, 3, 3, 2, 4, 3):
        in_step(model, twin, backend.randn(batch, 8))


@EMULATED
def test_host_writes_by_data_ptr_on_later_calls_only(backend: Backend) -> None:
    """The host never writes: at the first call there was nothing to write."""
    step = [0]

    def write(state: Tensor, x: Tensor) -> None:
        step[0] += 1
        if step[0] > 2:
            ctypes.c_float.from_address(state.data_ptr()).value += 1.0

    model = cuda_graphed(Steps(write), sizes=(2,))
    for call in range(1, 7):
        x = backend.randn(2, 8)
        model(x)
        assert model.state[0].item() == max(0, call - 2)


class Cached(nn.Module):
    """One row of a KV cache for each slot; the last one is a sink."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(9, 8))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        self.k[slots] = self.k[slots] * 0.5 + x
        return (x @ self.k[:-1].T).softmax(-1) @ self.k[:-1]


def test_a_kv_cache_without_pad(backend: Backend) -> None:
    """Padded rows of zeros write to slot 0."""
    twin = Cached().to(backend.device)
    model = graphed_twin(twin, sizes=(2, 4))
    for batch in (4, 3, 2, 3, 1, 4, 3, 1):
        slots = torch.randperm(8, device=backend.device)[:batch]
        in_step(model, twin, backend.randn(batch, 8), slots)
    assert info(model).hits >= 4
    assert info(model).padded_rows == 0


def test_a_kv_cache_with_a_sentinel(backend: Backend) -> None:
    """The tail of the static slots holds those of an earlier, larger batch."""
    twin = Cached().to(backend.device)
    model = graphed_twin(twin, sizes=(2, 4), pad={"slots": -1})
    for batch in (4, 3, 2, 3, 1, 4, 3, 1, 1):
        slots = torch.randperm(8, device=backend.device)[:batch]
        x = backend.randn(batch, 8)
        equal(model(x, slots), twin(x, slots))
        equal(model.k[:-1], twin.k[:-1])
    assert info(model).padded_rows >= 4


def test_a_sentinel_that_is_a_slot(backend: Backend) -> None:
    """Padded rows write to a slot that the user promised to be spare, by another argument."""
    twin = Cached().to(backend.device)
    model = graphed_twin(twin, sizes=(2, 4), pad={"slots": -1, "x": 7.0})
    for batch in (3, 3, 2, 1, 4, 3):
        slots = torch.randperm(8, device=backend.device)[:batch]
        x = backend.randn(batch, 8)
        equal(model(x, slots), twin(x, slots))
        equal(model.k[:-1], twin.k[:-1])


def test_a_python_counter_advances(backend: Backend, x: Tensor) -> None:
    """`self.step += 1` runs at capture only, and its value is baked in."""

    class Counts(nn.Module):
        step = 0

        def forward(self, x: Tensor) -> Tensor:
            self.step += 1
            return x * self.step

    model, twin = cuda_graphed(Counts(), sizes=(2,)), Counts()
    for _ in range(8):
        equal(model(x), twin(x))
        assert model.step == twin.step


def test_a_python_counter_advances_after_a_while(backend: Backend, x: Tensor) -> None:
    """The counter stops at the capture; the first calls, which are watched, leave it alone."""

    class Counts(nn.Module):
        step = 0
        start = False

        def forward(self, x: Tensor) -> Tensor:
            if self.start:
                self.step += 1
            return x * (1 + self.step)

    model, twin = cuda_graphed(Counts(), sizes=(2,)), Counts()
    for call in range(10):
        model.start = twin.start = call >= 4
        equal(model(x), twin(x))
        assert model.step == twin.step


def test_a_python_counter_of_an_object_advances(backend: Backend, x: Tensor) -> None:
    """`past_key_values.seen_tokens += 1` runs at capture only."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = SimpleNamespace(seen=0)

        def forward(self, x: Tensor) -> Tensor:
            self.cache.seen += x.shape[0]
            return x * self.cache.seen

    model, twin = cuda_graphed(Counts(), sizes=(2, 4)), Counts()
    for _ in range(8):
        equal(model(x), twin(x))
        assert model.cache.seen == twin.cache.seen


def test_a_python_counter_crosses_a_limit(backend: Backend, x: Tensor) -> None:
    """The branch below the limit is replayed for ever."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            full = self.seen >= 6
            self.seen += x.shape[0]
            return x * (2 if full else 1)

    model, twin = cuda_graphed(Counts(), sizes=(2, 4)), Counts()
    for _ in range(8):
        equal(model(x), twin(x))
        assert model.seen == twin.seen
    assert info(model).hits >= 5


def test_a_python_counter_is_compared_with_the_batch(backend: Backend) -> None:
    """The comparison is made with the padded batch, or with that of the capture."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * (2 if self.seen > x.shape[0] else 1)

    model, twin = cuda_graphed(Counts(), sizes=(4, 8)), Counts()
    for batch in (8, 5, 3, 8, 5, 3, 8, 5, 3, 8, 5, 3):
        x = backend.randn(batch, 4)
        equal(model(x), twin(x))
        assert model.seen == twin.seen


def test_a_python_counter_wraps_around(backend: Backend, x: Tensor) -> None:
    """The counter goes on past the end, or stays at zero."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = 0

        def forward(self, x: Tensor) -> Tensor:
            self.phase += 1
            if self.phase >= 5:
                self.phase = 0
            return x * (2 if self.phase == 3 else 1)

    model, twin = cuda_graphed(Counts(), sizes=(2,)), Counts()
    for _ in range(18):
        equal(model(x), twin(x))
        assert model.phase == twin.phase


def test_a_python_counter_is_reset_between_calls(backend: Backend, x: Tensor) -> None:
    """The reset is not seen: the replay belongs to another count."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * (2 if self.seen > 5 else 1)

    model, twin = cuda_graphed(Counts(), sizes=(2,)), Counts()
    for call in range(16):
        if call % 5 == 4:
            model.seen = twin.seen = call % 3 * 4
        equal(model(x), twin(x))
        assert model.seen == twin.seen


def test_two_modules_count_in_one_object(backend: Backend, x: Tensor) -> None:
    """Each replay counts from the value of its own capture."""

    class Counts(nn.Module):
        def __init__(self, shared: SimpleNamespace) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> Tensor:
            self.shared.seen += 1
            return x * (2 if self.shared.seen > 9 else 1)

    shared, theirs = SimpleNamespace(seen=0), SimpleNamespace(seen=0)
    models = [cuda_graphed(Counts(shared), sizes=(2,)) for _ in range(2)]
    twins = [Counts(theirs) for _ in range(2)]
    for _ in range(8):
        for model, twin in zip(models, twins, strict=True):
            equal(model(x), twin(x))
            assert shared.seen == theirs.seen
    assert all(info(model).hits >= 5 for model in models)


def test_a_result_is_left_in_an_attribute(backend: Backend) -> None:
    """`self.attention = ...` runs at capture only: the attribute is overwritten by each replay."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.attention = x.softmax(-1)
            return self.attention * 2

    model, twin = cuda_graphed(Keeps(), sizes=(4, 8)), Keeps()
    held = []
    for batch in (4, 4, 4, 4, 4, 3, 3, 3, 3, 4):
        x = backend.randn(batch, 4)
        equal(model(x), twin(x))
        equal(model.attention, twin.attention)
        held.append((model.attention, twin.attention))
    for got, want in held:
        equal(got, want)
    assert info(model).hits >= 3


def test_a_flag_is_set_by_each_call(backend: Backend, x: Tensor) -> None:
    """`self.called = True` runs at capture only, and a caller who resets the flag waits for ever."""

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called = False

        def forward(self, x: Tensor) -> Tensor:
            self.called = True
            return x * 2

    model = cuda_graphed(Sets(), sizes=(2,))
    for _ in range(8):
        model.called = False
        equal(model(x), x * 2)
        assert model.called is True
    assert info(model).hits >= 4


COUNT = 0

SEEN: list[Any] = []


def test_a_global_counter_advances(backend: Backend, x: Tensor) -> None:
    """`global COUNT; COUNT += 1` runs at capture only."""
    global COUNT
    COUNT = 0

    def forward(x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return x * COUNT

    model = cuda_graphed(forward, sizes=(2,))
    for call in range(1, 8):
        equal(model(x), x * call)
        assert call == COUNT


def test_a_counter_in_a_closure_advances(backend: Backend, x: Tensor) -> None:
    """`nonlocal count; count += 1` runs at capture only."""
    count = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * count

    model = cuda_graphed(forward, sizes=(2,))
    for call in range(1, 8):
        equal(model(x), x * call)
        assert call == count


def test_a_counter_in_an_argument_advances(backend: Backend, x: Tensor) -> None:
    """The caller's dict is written to at capture only."""

    def forward(x: Tensor, state: dict[str, int]) -> Tensor:
        state["step"] += 1
        return x * state["step"]

    model, state = cuda_graphed(forward, sizes=(2,)), {"step": 0}
    for call in range(1, 8):
        equal(model(x, state), x * call)
        assert state["step"] == call


def test_an_argument_dict_is_given_new_tensors(backend: Backend, x: Tensor) -> None:
    """`cache["k"] = torch.cat(...)` runs at capture only: no replay rebuilds the caller's dict."""

    def forward(x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        cache["k"] = cache["k"] + x.sum(0)
        return x + cache["k"]

    model = cuda_graphed(forward, sizes=(2,))
    mine, theirs = ({"k": torch.zeros(8, device=backend.device)} for _ in range(2))
    for _ in range(6):
        equal(model(x, mine), forward(x, theirs))
        equal(mine["k"], theirs["k"])


def test_a_list_is_appended_to(backend: Backend, x: Tensor) -> None:
    """The list grows at capture only, by a tensor of the graph."""

    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x * 2)
            return x + len(self.seen)

    model, twin = cuda_graphed(Collects(), sizes=(2,)), Collects()
    for _ in range(6):
        equal(model(x), twin(x))
        equal(model.seen, twin.seen)


def test_a_global_list_is_appended_to(backend: Backend) -> None:
    """A global list grows at capture only, by a tensor of the graph."""
    SEEN.clear()

    def forward(x: Tensor) -> Tensor:
        SEEN.append(x * 2)
        return x + 1

    model = cuda_graphed(forward, sizes=(2,))
    xs = [backend.randn(2, 8) for _ in range(6)]
    for x in xs:
        equal(model(x), x + 1)
    equal(SEEN, [x * 2 for x in xs])


@pytest.mark.parametrize("where", ["module", "object", "dict", "list", "global"])
def test_an_intermediate_is_stored(backend: Backend, where: str) -> None:
    """The stored tensor is that of the last capture, in memory that later graphs overwrite."""
    SEEN[:] = [None]
    keep = SimpleNamespace(hidden=None)

    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden: Any = None
            self.keep: Any = keep
            self.held: dict[str, Any] = {"hidden": None}
            self.listed: list[Any] = [None]

        def forward(self, x: Tensor) -> Tensor:
            hidden = x.tanh()
            if where == "module":
                self.hidden = hidden
            elif where == "object":
                self.keep.hidden = hidden
            elif where == "dict":
                self.held["hidden"] = hidden
            elif where == "list":
                self.listed[0] = hidden
            else:
                SEEN[0] = hidden
            return hidden * 2

    model = cuda_graphed(Stores(), sizes=(2, 4))
    places: dict[str, Callable[[], Any]] = {
        "module": lambda: model.hidden,
        "object": lambda: keep.hidden,
        "dict": lambda: model.held["hidden"],
        "list": lambda: model.listed[0],
        "global": lambda: SEEN[0],
    }
    for batch in (2, 2, 4, 3, 3, 2, 2):
        x = backend.randn(batch, 8)
        equal(model(x), x.tanh() * 2)
        equal(places[where](), x.tanh())


def test_an_intermediate_is_stored_where_nothing_looks(backend: Backend) -> None:
    """The stored tensor is that of the capture; it is in a default argument's list."""

    def forward(x: Tensor, *, kept: Any = SimpleNamespace(hidden=[])) -> Tensor:  # noqa: B008
        kept.hidden.append(x.tanh())
        return x * 2

    model, kept = cuda_graphed(forward, sizes=(2,)), forward.__kwdefaults__["kept"]
    for call in range(1, 6):
        x = backend.randn(2, 8)
        equal(model(x), x * 2)
        assert len(kept.hidden) == call
        equal(kept.hidden[-1], x.tanh())


def test_activations_are_captured_by_a_closure_list(backend: Backend) -> None:
    """The list holds the activations of the capture. Interpretability code does this without hooks."""
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.tanh())
        return x * 2

    model = cuda_graphed(forward, sizes=(2,))
    for call in range(1, 6):
        x = backend.randn(2, 8)
        equal(model(x), x * 2)
        assert len(seen) == call
        equal(seen[-1], x.tanh())


def numpy_seed(seed: int) -> None:
    pytest.importorskip("numpy").random.seed(seed)


def numpy_draw() -> float:
    return float(sys.modules["numpy"].random.rand())


DRAWS: dict[str, tuple[Callable[[int], Any], Callable[[], float]]] = {
    "random": (random.seed, random.random),
    "numpy": (numpy_seed, numpy_draw),
    "torch on the host": (torch.manual_seed, lambda: float(torch.rand((), device="cpu"))),
}


@pytest.mark.parametrize("which", DRAWS)
def test_host_draws_a_number(backend: Backend, which: str) -> None:
    """The draw of the capture is made for good; layer drop is an example."""
    seed, draw = DRAWS[which]

    def forward(x: Tensor) -> Tensor:
        return x * (2.0 if draw() < 0.5 else draw())

    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    seed(3)
    want = [forward(x) for _ in range(8)]
    seed(3)
    for result in want:
        equal(model(x), result)


GENERATOR = torch.Generator("cpu")

RANDOM = random.Random(1)


def test_a_generator_on_the_host_decides(backend: Backend) -> None:
    """The decision of the capture is made for good: a CPU `torch.Generator`, or a `random.Random`."""

    def forward(x: Tensor) -> Tensor:
        drawn = torch.randint(0, 1000, (), generator=GENERATOR, device="cpu")
        return x * int(drawn)

    model, x = cuda_graphed(forward, sizes=(2,)), backend.randn(2, 8)
    GENERATOR.manual_seed(3)
    want = [forward(x) for _ in range(6)]
    GENERATOR.manual_seed(3)
    for result in want:
        equal(model(x), result)


def test_a_random_random_decides(backend: Backend) -> None:
    """The decision of the capture is made for good; the generator's state is not a global one."""
    model = cuda_graphed(lambda x: x * RANDOM.random(), sizes=(2,))
    x = backend.randn(2, 8)
    RANDOM.seed(3)
    want = [x * RANDOM.random() for _ in range(6)]
    RANDOM.seed(3)
    for result in want:
        equal(model(x), result)


def test_a_numpy_generator_decides(backend: Backend, x: Tensor) -> None:
    """The decision of the capture is made for good: `numpy.random.default_rng()` in an attribute."""
    numpy = pytest.importorskip("numpy")

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rng = numpy.random.default_rng(3)

        def forward(self, x: Tensor) -> Tensor:
            return x * float(self.rng.random())

    model, twin = cuda_graphed(Draws(), sizes=(2,)), Draws()
    for _ in range(6):
        equal(model(x), twin(x))


def test_clock_decides_a_branch(backend: Backend, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.time()` is that of the capture for ever."""
    now = [1.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    model = cuda_graphed(lambda x: x * time.time(), sizes=(2,))
    same_as_eager(model, x)
    now[0] = 2.0
    same_as_eager(model, x)
