"""Batches of any size and dimension equal eager, in graphs of padded sizes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, assert_close_to_eager, close, eager, info
from tests.models import MLP


def settle(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Makes the calls that run eagerly: the first, and the one that is compared."""
    for _ in range(2):
        assert_close_to_eager(module, *args, **kwargs)


def test_every_batch_equals_eager(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(1, 2, 4, 8))
    for _ in range(3):
        for batch in (*range(11), *reversed(range(11))):
            assert_close_to_eager(mlp, backend.randn(batch, 8))
    told = info(mlp)
    assert told.sizes == (1, 2, 4, 8)
    assert told.captures == 4
    assert set(told.replays) == {1, 2, 4, 8}
    assert told.eager["a batch above the largest size"] == 12
    assert told.eager["an empty batch"] == 6
    assert told.hits + told.misses == told.calls == 66


def test_a_call_goes_to_the_least_size_that_holds_it(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(8, 2, 4, 2))
    settle(mlp, backend.randn(3, 8))
    settle(mlp, backend.randn(5, 8))
    before = info(mlp)
    for batch in (1, 2, 3, 3, 5, 8):
        mlp(backend.randn(batch, 8))
    after = info(mlp)
    gained = {size: after.replays[size] - before.replays.get(size, 0) for size in after.replays}
    # batch 1 is the first to be padded to size 2, so that call is compared and not replayed
    assert gained == {2: 1, 4: 2, 8: 2}
    assert after.padded_rows - before.padded_rows == 1 + 1 + 3


def test_poisoned_rows_of_a_large_batch_do_not_reach_a_small_one(backend: Backend) -> None:
    """The tail of a static input is filled anew at each call."""

    class KeepsRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen[: x.shape[0]] = x
            return x * 2

    model = cuda_graphed(KeepsRows().to(backend.device), sizes=(1, 8), pad=7.0)
    model(backend.randn(8, 3))
    model(torch.full((8, 3), float("nan"), device=backend.device))
    for _ in range(2):  # the first is compared with eager
        small = backend.randn(3, 3)
        assert torch.equal(model(small), small * 2)
    assert torch.equal(model.seen[:3], small)
    assert model.seen[3:].eq(7.0).all()


@pytest.mark.parametrize(
    ("pad", "row"),
    [
        (None, [3.0, 4.0]),
        (5, [5.0, 5.0]),
        ("edge", [3.0, 4.0]),
        ({"x": -1.0}, [-1.0, -1.0]),
        ({"y": -1.0}, [0.0, 0.0]),
    ],
    ids=str,
)
def test_padded_rows_hold_the_pad_value(backend: Backend, pad: Any, row: list[float]) -> None:
    seen = torch.zeros(4, 2, device=backend.device)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    graphed = cuda_graphed(forward, sizes=(4,), pad=pad)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=backend.device)
    graphed(x[:1], x[:1].clone())  # one batch alone does not tell which arguments carry it
    for _ in range(3):
        graphed(x, x.clone())
    (entry,) = graphed._cache().store.entries
    seen.copy_(entry.buckets[4].static[0])
    assert seen[:2].tolist() == x.tolist()
    assert seen[2:].tolist() == [row, row]


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_batch_dim(backend: Backend, dim: int) -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) * 2 + 1

    model = cuda_graphed(Scale(), batch_dim=dim, sizes=(2, 4))
    for batch in (3, 3, 3, 1, 1, 2, 4, 5, 4, 3):
        shape = [5, 6, 7]
        shape[dim] = batch
        x = backend.randn(*shape)
        out = model(x)
        assert torch.equal(out, torch.relu(x) * 2 + 1)
        assert out.stride() == x.stride()
        out.view(-1)  # eager gives a contiguous result at every batch
    assert info(model).hits == 6


def test_batch_dim_differs_for_each_argument(backend: Backend) -> None:
    """As with `batch_first`: the state has it in its second one."""
    layer = nn.LSTM(4, 6, num_layers=2, batch_first=True).to(backend.device)
    plain = copy.deepcopy(layer).to(backend.device)
    model = cuda_graphed(layer, sizes=(2, 4), batch_dim={"input": 0, "hx": 1})
    for batch in (3, 4, 2, 1, 3, 4, 3, 1):
        given = backend.randn(batch, 5, 4), (backend.randn(2, batch, 6), backend.randn(2, batch, 6))
        (out, (h, c)), (want, (want_h, want_c)) = model(*given), plain(*given)
        assert close(out, want)
        assert close(h, want_h)
        assert close(c, want_c)
    assert info(model).hits == 5
    assert set(info(model).sizes) == {2, 4}


def test_an_argument_has_no_batch(backend: Backend) -> None:
    """The argument is as long as the batch by chance."""
    table = backend.randn(4, 8)
    model = cuda_graphed(lambda x, table: x @ table, sizes=(2, 4), batch_dim={"table": None})
    for batch in (4, 4, 3, 2, 4):
        x = backend.randn(batch, 4)
        assert close(model(x, table), x @ table)
    assert model.cache_info().hits >= 3
    assert set(model.cache_info().sizes) == {2, 4}


def test_a_path_names_one_tensor_of_an_argument(backend: Backend) -> None:
    model = cuda_graphed(
        lambda batch: batch["rows"] + batch["columns"].t(),
        sizes=(4,),
        batch_dim={"batch": 0, "batch['columns']": 1},
    )
    for rows in (3, 3, 3):
        given = {"rows": backend.randn(rows, 5), "columns": backend.randn(5, rows)}
        assert torch.equal(model(given), given["rows"] + given["columns"].t())
    assert model.cache_info().hits == 1  # and one was compared: which argument has the batch is known
    assert model.cache_info().sizes == (4,)


def test_inputs_that_are_not_contiguous(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(2, 4, 8))
    base = backend.randn(8, 32)
    for _ in range(3):
        assert_close_to_eager(mlp, base[:5, ::4])
        assert_close_to_eager(mlp, base[:, :5].t()[:, :8])
        assert_close_to_eager(mlp, base[:1, :8].expand(3, 8))
        assert_close_to_eager(mlp, base[::2, 3:11])
    assert info(mlp).hits > 0


def test_channels_last_stays(backend: Backend) -> None:
    model = cuda_graphed(nn.Conv2d(3, 4, 3).to(backend.device), sizes=(2, 4))
    x = backend.randn(3, 3, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(4):
        out, expected = model(x), eager(model, x)
        assert close(out, expected)
        assert out.stride() == expected.stride()
    assert info(model).hits == 2


def test_batch_dimensions_are_learned(backend: Backend) -> None:
    class Shapes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            fixed = x.new_ones(4) * 2  # four rows at any batch, four of them by chance
            return x.t(), x @ x.t(), x[:, None].expand(-1, 4, -1), fixed, x[:, -1]

    model = cuda_graphed(Shapes(), sizes=(2, 4, 8))
    for batch in (4, 4, 3, 3, 3, 5, 5, 5, 2, 1, 1):
        x = backend.randn(batch, 6)
        for mine, theirs in zip(model(x), eager(model, x), strict=True):
            assert close(mine, theirs)
    assert info(model).hits == 7


def test_one_size_learns_from_the_first_padded_call(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp, sizes=(4,))
    for batch in (4, 4, 3, 3, 2, 2):
        assert_close_to_eager(mlp, backend.randn(batch, 8))
    assert info(mlp).replays == {4: 3}


def test_rows_flattened_into_another_dimension_are_not_cut(backend: Backend) -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 2, 3).transpose(0, 1).reshape(-1, 3)  # heads first: rows interleave

    model = cuda_graphed(Heads(), sizes=(2, 4))
    for batch in (3, 3, 2, 4, 3):
        assert_close_to_eager(model, backend.randn(batch, 6))
    assert info(model).padded_rows == 0
    assert "dimension 0 of an output goes from 6 to 8" in info(model).notes[0]


def test_python_values_that_follow_the_batch_are_not_frozen(backend: Backend) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2, x.shape[0]

    model = cuda_graphed(Counts(), sizes=(2, 4))
    for batch in (3, 3, 1, 1, 2, 4, 3):
        assert model(backend.randn(batch, 2))[1] == batch
    assert info(model).padded_rows == 0


def test_rows_that_depend_on_each_other_are_found_out(backend: Backend) -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model = cuda_graphed(Centred(), sizes=(4,))
    x = backend.randn(3, 2)
    assert_close_to_eager(model, x)
    with pytest.warns(GraphCacheWarning, match="its rows depend on each other"):
        assert_close_to_eager(model, x)
    for batch in (3, 2, 2, 3, 2):
        assert_close_to_eager(model, backend.randn(batch, 2))
    assert info(model).padded_rows == 0
    assert info(model).hits == 3


def test_sizes_none_grows_with_the_batches(backend: Backend, mlp: MLP) -> None:
    cuda_graphed(mlp)
    for batch in (5, 5, 5, 3, 3, 12, 12, 9, 9, 11, 11, 4):
        assert_close_to_eager(mlp, backend.randn(batch, 8))
    assert info(mlp).sizes == (1, 2, 4, 5, 8, 12)
    assert info(mlp).captures == 6
    assert info(mlp).misses == 2 + 3  # first calls, and the first padded ones of 3, 9 and 11


def test_unbatched_arguments_are_staged_or_bound(backend: Backend) -> None:
    class Uses(nn.Module):
        def forward(self, x: Tensor, table: Tensor, offset: Tensor) -> Tensor:
            return x @ table + offset

    model = cuda_graphed(Uses(), sizes=(4,))
    small, large = backend.randn(8, 8), backend.randn(8, 2**18)
    offset = torch.tensor(1.0, device=backend.device)
    for table in (small, small, small, backend.randn(8, 8), large, large, large):
        assert_close_to_eager(model, backend.randn(3, 8), table, offset)
        offset += 1
    assert info(model).signatures == 2
    large.fill_(1)  # by address: a change in place is seen
    assert_close_to_eager(model, backend.randn(3, 8), large, offset)
    before = info(model).signatures
    elsewhere = large.clone()  # another signature
    for _ in range(2):
        assert_close_to_eager(model, backend.randn(3, 8), elsewhere, offset)
    assert info(model).signatures == before + 1


def test_bind_binds_by_name(backend: Backend) -> None:
    class Uses(nn.Module):
        def forward(self, table: Tensor, x: Tensor) -> Tensor:
            return x @ table

    model = cuda_graphed(Uses(), sizes=(4,), bind="table")
    table = backend.randn(8, 8)
    for batch in (3, 3, 3, 2, 2):
        assert_close_to_eager(model, table, backend.randn(batch, 8))
    assert info(model).replays == {4: 2}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.bool], ids=str)
def test_other_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    model = cuda_graphed(lambda x: torch.cat([x, x], 1), sizes=(4,))
    x = backend.randn(3, 4).gt(0).to(dtype)
    for _ in range(3):
        assert torch.equal(model(x), torch.cat([x, x], 1))
    assert model.cache_info().hits == 1
