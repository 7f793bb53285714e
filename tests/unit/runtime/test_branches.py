"""Products beside one another in a graph: only those that may be, and to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphcache import GraphCacheWarning, GraphPool, config, cuda_graphed
from tests.helpers import Counter
from tests.unit.runtime.branches_model import Cuda

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


WIDTH = 512

CUDA = "cuda"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def device() -> Cuda:
    return Cuda()


class Wrapped(Tensor):
    """Holds a tensor, and does with it what it is asked for."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(func(*(arg.inner if isinstance(arg, cls) else arg for arg in args), **(kwargs or {})))


def weights(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(WIDTH, WIDTH, device=CUDA, dtype=dtype) / WIDTH**0.5 for _ in range(count)]


def branches_of(
    forward: Callable[[Tensor], object], rows: int = 4, dtype: torch.dtype = torch.float32
) -> int:
    """Captures `forward`, compares replays with eager, and returns how many products are on branches."""
    graphed = cuda_graphed(forward, sizes=(rows,), pool=GraphPool(CUDA))
    graphed(torch.randn(rows, WIDTH, device=CUDA, dtype=dtype))  # not compiled, and rounds otherwise
    for _ in range(5):
        x = torch.randn(rows, WIDTH, device=CUDA, dtype=dtype)
        torch.testing.assert_close(graphed(x), forward(x), rtol=0, atol=0)
    info = graphed.cache_info()
    assert (info.hits, info.captures) == (5, 1), info
    (entry,) = graphed._cache().store.entries
    return int(entry.buckets[rows].graph.branches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_three_attention_products_run_side_by_side(dtype: torch.dtype, bias: bool) -> None:
    q, k, v = (nn.Linear(WIDTH, WIDTH, bias=bias, device=CUDA, dtype=dtype) for _ in range(3))

    def forward(x: Tensor) -> Tensor:
        for _ in range(3):
            query, key, value = q(x), k(x), v(x)
            x = torch.softmax(query * key, -1) * value
        return x

    assert branches_of(forward, dtype=dtype) == 6


def test_products_with_an_out_run_side_by_side() -> None:
    a, b, c = weights(3)

    def forward(x: Tensor) -> Tensor:
        outs = [torch.empty_like(x) for _ in range(3)]
        for weight, out in zip((a, b, c), outs, strict=True):
            torch.mm(x, weight, out=out)
        return outs[0] + outs[1] * outs[2]

    assert branches_of(forward) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, torch.sigmoid, torch.tanh])
def test_a_gate_and_its_activation_run_beside_what_they_open(
    activation: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    gate, up, down = (nn.Linear(WIDTH, WIDTH, device=CUDA, dtype=dtype) for _ in range(3))

    def forward(x: Tensor) -> Tensor:
        for _ in range(3):
            x = down(activation(gate(x)) * up(x))
        return x

    assert branches_of(forward, dtype=dtype) == 3


def test_scale_and_norm_run_beside_the_next_product() -> None:
    q, k, v = weights(3, torch.bfloat16)
    norm, by = nn.RMSNorm(WIDTH, device=CUDA, dtype=torch.bfloat16), nn.LayerNorm(WIDTH, device=CUDA)

    def by_hand(x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(x: Tensor) -> Tensor:
        query = norm(x @ q) * 0.125
        key = by_hand(by((x @ k).float()).to(x.dtype))
        value = x @ v
        return torch.softmax(query * key, -1) * value

    assert branches_of(forward, dtype=torch.bfloat16) == 2


def test_many_products_share_the_streams_that_there_are() -> None:
    found = weights(9)

    def forward(x: Tensor) -> Tensor:
        return torch.stack([x @ weight for weight in found]).sum(0)

    assert branches_of(forward) == 8


def needs_the_one_before(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (x @ a) @ b


def needs_a_view_of_it(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (x @ a)[:, :4] @ b[:4]


def adds_to_it(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(x @ a, x, b)


def needs_what_was_made_of_it(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.relu(x @ a) @ b


def needs_what_was_made_of_its_argument(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first = x @ a
    return first + (x * 2) @ b


def has_a_kernel_in_between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first = x @ a
    second = torch.cumsum(first, 1)
    return second + x @ b


def has_an_out_and_something_in_between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first, second = torch.empty_like(x), torch.empty_like(x)
    torch.mm(x, a, out=first)
    third = torch.relu(first)
    torch.mm(x, b, out=second)
    return second + third


def has_a_write_in_between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = x.clone()
    first = x @ a
    y.add_(first)
    return first + y @ b


def writes_where_the_one_before_read(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y, out = x.clone(), torch.empty_like(x)
    torch.mm(y, a, out=out)
    torch.mm(x, b, out=y)
    return out + y


def writes_where_the_one_before_wrote(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.mm(x, a, out=out)
    torch.mm(x, b, out=out)
    return out + 1


def writes_beside_it_in_the_same_rows(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], 2 * WIDTH)
    torch.mm(x, a, out=out[:, :WIDTH])
    torch.mm(x, b, out=out[:, WIDTH:])
    return out + 1


def writes_to_memory_that_the_one_before_may_have_used(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first = x[:, ::2] @ a[::2]  # copies what lies apart, to memory of its own
    out = torch.empty_like(x)
    torch.mm(x, b, out=out)
    return first + out


@pytest.mark.parametrize(
    "forward",
    [
        needs_the_one_before,
        needs_a_view_of_it,
        adds_to_it,
        needs_what_was_made_of_it,
        needs_what_was_made_of_its_argument,
        has_a_kernel_in_between,
        has_an_out_and_something_in_between,
        has_a_write_in_between,
        writes_where_the_one_before_read,
        writes_where_the_one_before_wrote,
        writes_beside_it_in_the_same_rows,
        writes_to_memory_that_the_one_before_may_have_used,
    ],
)
def test_a_product_stays_in_its_place_that(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    a, b = weights(2)
    assert branches_of(lambda x: forward(x, a, b)) == 0


def test_memory_that_a_product_reads_is_not_given_to_the_next(device: Cuda) -> None:
    a, b, c = weights(3)
    x = torch.randn(4, WIDTH, device=CUDA)
    with device.captured() as branches:
        first, second = x @ a, x @ b  # the second lies in memory of a branch, as what comes next will
        address = second.data_ptr()
        third = second @ a
        del second
        fourth = x @ c
        assert branches.count == 2
        assert fourth.data_ptr() != address
        fifth = fourth @ (third + first).t()  # waits for all that read it
        sixth = x @ a
        assert branches.count == 3
        assert sixth.data_ptr() == address
        del fifth


def test_parts_of_a_tensor_subclass_are_looked_at_themselves(device: Cuda) -> None:
    a, b = weights(2)
    x = torch.randn(4, WIDTH, device=CUDA)
    with device.captured() as branches:
        first, second = Wrapped(x) @ Wrapped(a), Wrapped(x) @ Wrapped(b)
        assert branches.count == 1
        (first @ second.t(), second @ first.t())
        assert branches.count == 2


def test_a_product_that_raises_leaves_the_stream_as_it_was(device: Cuda) -> None:
    a, b = weights(2)
    x = torch.randn(4, WIDTH, device=CUDA)
    with device.captured() as branches:
        main = torch.cuda.current_stream()
        first = x @ a
        for wrong in (b[:3], b[0, 0]):
            with pytest.raises(RuntimeError):
                torch.mm(x, wrong)
            with pytest.raises(RuntimeError):
                torch.mm(wrong, x)
        assert torch.cuda.current_stream() == main
        second = torch.relu(first)
        x @ b
        assert branches.count == 0
    assert torch.equal(second, torch.relu(x @ a))


def test_products_with_a_gradient_stay_in_their_place(device: Cuda) -> None:
    a, b = weights(2)
    x = torch.randn(4, WIDTH, device=CUDA, requires_grad=True)

    def gradient() -> Tensor:
        with torch.enable_grad():
            first, second = x @ a, x @ b
            (found,) = torch.autograd.grad((first.sin() + second.cos()).sum(), x)
        return found

    wanted = gradient()
    with device.captured() as branches:
        found = gradient()
        assert branches.count == 0
        x @ a, x @ b
        assert branches.count == 1
    assert torch.equal(found, wanted)


def test_memory_read_between_products_is_not_reused(device: Cuda) -> None:
    a, b = weights(2)
    x = torch.randn(4, WIDTH, device=CUDA)
    with device.captured() as branches:
        first, second = x @ a, x @ b  # the second lies in memory of a branch
        address = second.data_ptr()
        third = (first * 2).cumsum(1) @ a
        between = torch.relu(second)
        del second
        fourth = x @ b
        assert branches.count == 2
        assert fourth.data_ptr() != address
    del third, between


def test_memory_is_held_no_longer_than_products_run(device: Cuda) -> None:
    a, b = weights(2)
    x = torch.randn(4, WIDTH, device=CUDA)
    with device.captured():
        made = x * 3
        address = made.data_ptr()
        both = [made @ a, made @ b]
        del made
        torch.cumsum(torch.stack(both), 0)
        assert (x * 2).data_ptr() == address


def test_memory_that_was_given_away_stops_the_capture(device: Cuda) -> None:
    a, b = weights(2)
    x = torch.randn(4, WIDTH, device=CUDA)

    def capture() -> None:
        with device.captured():
            results = [x @ weight for weight in (a, b, a, b)]  # one on the main stream, three beside
            torch.relu(results[1])
            results[1].untyped_storage().resize_(0)
            x @ a

    with pytest.raises(RuntimeError, match="memory that a parallel one uses"):
        capture()


def test_capture_that_fails_among_branches_leaves_nothing() -> None:
    a, b = weights(2)
    runs = Counter()

    def forward(x: Tensor) -> Tensor:
        first, second = x @ a, x @ b
        if runs.add() in (2, 3):
            raise RuntimeError("not now")
        return first + second

    graphed = cuda_graphed(forward, sizes=(4,), pool=GraphPool(CUDA))
    x = torch.randn(4, WIDTH, device=CUDA)
    with pytest.warns(GraphCacheWarning, match="not now"):
        graphed(x)
    assert torch.equal(graphed(x), forward(x))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert branches_of(lambda x: x @ a + x @ b) == 1


def test_compiled_products_run_side_by_side() -> None:
    options: dict[str, Any] = {"bias": False, "device": CUDA, "dtype": torch.bfloat16}
    q, k, v, out = (nn.Linear(WIDTH, WIDTH, **options) for _ in range(4))

    @torch.compile
    def forward(x: Tensor) -> Tensor:
        x = torch.relu(x)
        return out(torch.softmax(q(x) * k(x), -1) * v(x))

    assert branches_of(forward, dtype=torch.bfloat16) >= 1


def test_a_capture_in_one_line_has_none() -> None:
    a, b = weights(2)
    with config.switched(config.linear_var):
        assert branches_of(lambda x: x @ a + x @ b) == 0


def branches_by_size(forward: Callable[[Tensor], Tensor], width: int, *sizes: int) -> dict[int, int]:
    graphed = cuda_graphed(forward, sizes=sizes, pool=GraphPool(CUDA))
    x = torch.randn(min(sizes), width, device=CUDA)
    graphed(x)
    assert torch.equal(graphed(x), forward(x))
    (entry,) = graphed._cache().store.entries
    return {size: bucket.graph.branches for size, bucket in entry.buckets.items()}


def test_smaller_sizes_branch_if_the_largest_has_many_rows() -> None:
    a, b = weights(2)
    assert branches_by_size(lambda x: x @ a + x @ b, WIDTH, 512, 256) == {512: 0, 256: 1}


def test_smaller_sizes_branch_if_a_large_operator_intervenes() -> None:
    a, b = torch.randn(2, 20 << 10, 8, device=CUDA)

    def forward(x: Tensor) -> Tensor:
        y = x * 3  # 20 MiB in the larger one
        first, between, second = x @ a, torch.relu(y), x @ b
        return first + between[:, :8] + second

    assert branches_by_size(forward, 20 << 10, 256, 4) == {256: 0, 4: 1}


def test_smaller_sizes_have_no_branches_if_the_largest_has_none() -> None:
    """As a captured operator is looked at for a microsecond; the next ladder begins anew."""
    a, b = weights(2)

    def forward(x: Tensor) -> Tensor:
        return x @ a + x @ b if x.shape[0] < 16 else x @ a

    assert branches_by_size(forward, WIDTH, 16, 4) == {16: 0, 4: 0}
    assert branches_by_size(forward, WIDTH, 4, 8) == {8: 1, 4: 1}


def test_graphs_of_a_ladder_keep_to_the_memory_of_the_largest() -> None:
    a, b, c = weights(3)
    pool = GraphPool(CUDA)
    graphed = cuda_graphed(lambda x: (x @ a) * (x @ b) + x @ c, sizes=(64,), pool=pool)
    graphed(torch.randn(64, WIDTH, device=CUDA))
    one = pool.memory()
    graphed = cuda_graphed(lambda x: (x @ a) * (x @ b) + x @ c, sizes=range(1, 65), pool=pool)
    graphed(torch.randn(64, WIDTH, device=CUDA))
    assert pool.memory().reserved == one.reserved
