"""Memory of graphs in a pool, and when it is returned."""

import gc
import weakref

import pytest
import torch

import graphcache
from graphcache import GraphPool, OptionError, cuda_graphed, default_pool
from tests.helpers import Backend, eager
from tests.models import MLP

MIB = 2**20


@pytest.mark.parametrize(("weak", "units"), [(True, 4), (False, 10)])
def test_all_sizes_cost_what_the_largest_costs(backend: Backend, weak: bool, units: int) -> None:
    """The claim of the seed: 4, 3, 2 and 1 units in 4 units of memory instead of 10."""
    unit = 32 * MIB if backend.name == "cuda" else MIB  # CUDA hands out segments in steps of 2 MiB
    pool = backend.pool(weak=weak)
    x = torch.ones(4, unit // 4, device=backend.device)
    lane = pool.lane()
    kept = [lane.capture(lambda n=n: [x[:n] + 1]) for n in (4, 3, 2, 1)]
    assert pool.memory().reserved == units * unit
    assert pool.memory().allocated == (0 if weak else units * unit)
    for graph, (output,) in kept:
        graph.replay()
        assert output.eq(2).all()


def test_a_capture_leaves_what_earlier_graphs_wrote(backend: Backend) -> None:
    lane = backend.pool().lane()
    x = torch.ones(4, device=backend.device)
    first, (output,) = lane.capture(lambda: [x + 1])
    first.replay()
    second, (other,) = lane.capture(lambda: [x * 5])
    assert other.data_ptr() == output.data_ptr()
    assert output.eq(2).all()
    second.replay()
    assert output.eq(5).all()


def test_graph_can_be_captured_after_the_last_one_died(backend: Backend) -> None:
    lane = backend.pool().lane()
    x = torch.ones(2, device=backend.device)
    for _ in range(3):
        graph, (output,) = lane.capture(lambda: [x + 1])
        graph.replay()
        assert output.eq(2).all()
        del graph, output


def test_module_can_be_captured_after_the_last_one_died(backend: Backend) -> None:
    def reserved(sizes: range | tuple[int], *, weak: bool) -> int:
        model = torch.nn.Linear(16, 2**18).to(backend.device)  # outputs of 1 MiB a row
        cuda_graphed(model, sizes=sizes, pool=(pool := backend.pool(weak=weak)))
        model(backend.randn(32, 16))
        assert len(pool.lanes) == 1
        return pool.memory().reserved

    all_sizes = range(1, 33)
    assert reserved(all_sizes, weak=True) <= 1.05 * reserved((32,), weak=True)
    assert reserved(all_sizes, weak=False) >= sum(all_sizes) * MIB


def test_captures_overlap_in_memory_and_outputs_change_together(backend: Backend) -> None:
    pool = backend.pool()
    x = torch.ones(4, MIB, device=backend.device)
    lane = pool.lane()
    large, (out_large,) = lane.capture(lambda: [x + 1])
    small, (out_small,) = lane.capture(lambda: [x[:1] + 1])
    large.replay()
    x.fill_(5)
    small.replay()
    assert out_small.data_ptr() == out_large.data_ptr()
    assert out_large[:, 0].tolist() == [6, 2, 2, 2]


def test_pool_of_a_module_is_the_one_of_its_device(backend: Backend, mlp: MLP) -> None:
    before = len(default_pool(backend.device).lanes)
    cuda_graphed(mlp, sizes=(2,))(backend.randn(2, 8))
    assert default_pool(backend.device) is default_pool(str(backend.device))
    assert len(default_pool(backend.device).lanes) >= max(before, 1)


def test_pool_on_another_device_is_refused(backend: Backend) -> None:
    with pytest.raises(OptionError, match="no graphs on meta"):
        GraphPool("meta")
    if backend.name == "cuda":
        with graphcache.emulate(), pytest.raises(OptionError, match="its pool is on cpu"):
            cuda_graphed(MLP().cuda(), pool=GraphPool("cpu"))(backend.randn(2, 8))


def test_graphs_die_with_their_module(backend: Backend) -> None:
    """Both forms, without the help of the garbage collector."""

    class Net(MLP):
        forward = cuda_graphed(MLP.forward, sizes=(1, 2))

    # torch imports parts of itself under the first dispatch mode, and those keep the frames of then.
    cuda_graphed(MLP().to(backend.device))(backend.randn(2, 8))
    gc.collect()
    gc.disable()
    try:
        for make in (Net, lambda: cuda_graphed(MLP(), sizes=(1, 2))):
            module = make().to(backend.device)
            module(backend.randn(2, 8))
            cache = weakref.ref(module.forward._cache())
            owner = weakref.ref(module)
            assert module.forward.cache_info().captures == 2
            del module
            assert owner() is None
            assert cache() is None
    finally:
        gc.enable()


def test_an_output_that_outlives_its_pool_expires(backend: Backend) -> None:
    pool = backend.pool()
    model = cuda_graphed(MLP().to(backend.device), sizes=(2,), pool=pool, stale="error")
    x = backend.randn(2, 8)
    model(x)
    output = model(x)
    del model, pool
    gc.collect()
    with pytest.raises(RuntimeError, match="the deletion of its graph pool"):
        output + 1


def test_a_held_output_outlives_its_pool(backend: Backend) -> None:
    """Whichever goes first, the memory of the lane is there until the output has moved out."""
    for order in range(2):
        pool = backend.pool()
        model = cuda_graphed(MLP().to(backend.device), sizes=(2,), pool=pool)
        x = backend.randn(2, 8)
        model(x)
        output, expected = model(x), eager(model, x)
        gone = [model, pool] if order else [pool, model]
        del model, pool
        while gone:
            gone.pop()
        gc.collect()
        torch.full((64, 8), 9.0, device=backend.device)
        assert torch.equal(output, expected)


def test_a_pool_is_used_again_after_its_last_graph_died(backend: Backend) -> None:
    pool = backend.pool()
    for _ in range(3):
        model = cuda_graphed(MLP().to(backend.device), sizes=(1, 2), pool=pool)
        x = backend.randn(2, 8)
        expected = model(x)
        assert torch.allclose(model(x), expected, atol=1e-5)
        del model, expected
    assert len(pool.lanes) == 1


def test_clear_and_capture_again(backend: Backend, mlp: MLP) -> None:
    pool = backend.pool()
    cuda_graphed(mlp, sizes=(1, 2, 4), pool=pool)
    x = backend.randn(4, 8)
    taken = []
    for _ in range(5):
        expected = mlp(x).clone()
        assert torch.allclose(mlp(x), expected, atol=1e-5)
        mlp.forward.cache_clear()
        assert mlp.forward.cache_info().calls == 0
        assert pool.memory().reserved == 0
        if backend.name == "cuda":
            torch.cuda.empty_cache()
            taken.append(torch.cuda.memory_reserved())
    assert len(set(taken[1:])) <= 1


def test_trim_spares_what_is_in_use(backend: Backend, mlp: MLP) -> None:
    pool = backend.pool()
    cuda_graphed(mlp, sizes=(2,), pool=pool)
    x = backend.randn(2, 8)
    mlp(x)
    expected = mlp(x).clone()
    pool.trim()
    assert len(pool.lanes) == 1
    held = mlp(x)
    mlp.forward.cache_clear()
    assert len(pool.lanes) == 1
    assert torch.equal(held, expected)
    del held
    pool.trim()
    assert pool.lanes == []


def test_repr_tells_what_is_in_it(backend: Backend) -> None:
    assert repr(backend.pool()) == f"<GraphPool on {backend.device}: 0 lanes, 0.0 MiB, weak outputs>"
