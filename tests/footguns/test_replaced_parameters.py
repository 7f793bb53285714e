"""Traps: parameters are replaced, cast, tied or moved after the capture."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphcache import GraphCacheWarning, cuda_graphed
from tests.helpers import Backend, info, replays, same_as_eager, survives
from tests.models import Net

# Warnings about a trap are asked for by single tests only.
pytestmark = pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")


def test_p_data_is_assigned(net: Net, x: Tensor) -> None:
    """The graph reads the old storage for ever."""

    def change() -> None:
        for p in net.parameters():
            p.data = p.data * 2

    survives(net, change, x)


def test_a_new_parameter_is_put_in(net: Net, x: Tensor) -> None:
    """The graph reads the parameter that was there before."""
    survives(net, lambda: setattr(net.up, "weight", nn.Parameter(net.up.weight * 2)), x)


def test_load_state_dict_with_assign(net: Net, x: Tensor) -> None:
    """Parameters are replaced, not filled; the graph reads the old ones."""
    state = {name: tensor * 2 for name, tensor in net.state_dict().items()}
    survives(net, lambda: net.load_state_dict(state, assign=True), x)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_module_is_cast(net: Net, x: Tensor, cast: Callable[[nn.Module], nn.Module]) -> None:
    """The graph computes with the freed memory of the old weights; eager refuses the old dtype."""
    replays(net, x)
    cast(net)
    same_as_eager(net, x)  # raises in eager
    replays(net, x.to(net.up.weight.dtype))
    net.float()
    same_as_eager(net, x)


def test_module_is_cast_to_and_fro(net: Net, x: Tensor) -> None:
    """The graph reads the old address; dtypes are those of the capture again."""

    def change() -> None:
        net.up.weight.mul_(1.001)
        net.to(torch.bfloat16).to(torch.float32)

    survives(net, change, x)


def test_lora_is_merged_in_place(net: Net, x: Tensor) -> None:
    """The graph reads the merged weight, as it should; a recapture would be a waste."""
    delta = torch.ones_like(net.up.weight)
    survives(net, lambda: net.up.weight.add_(delta), x)
    survives(net, lambda: net.up.weight.sub_(delta), x)
    assert info(net).captures == 2


def test_lora_is_merged_by_replacing_the_weight(net: Net, x: Tensor) -> None:
    """The graph reads the weights without the adapter; merging out brings the old address back."""
    old = net.up.weight.data
    for _ in range(3):
        survives(net, lambda: setattr(net.up.weight, "data", old + 1), x)
        survives(net, lambda: setattr(net.up.weight, "data", old), x)


def test_old_parameter_lives_on_in_an_optimizer(net: Net, x: Tensor) -> None:
    """The graph serves the old weights; their memory is intact, so nothing crashes."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    survives(net, lambda: setattr(net.up, "weight", nn.Parameter(net.up.weight * 2)), x)
    assert optimizer.param_groups


def test_parameters_are_swapped_with_an_average(net: Net, x: Tensor) -> None:
    """The graph serves one of the two sets at all times."""
    average = [nn.Parameter(p * 0.9) for p in net.up.parameters()]

    def swap() -> None:
        average[0], net.up.weight = net.up.weight, average[0]
        average[1], net.up.bias = net.up.bias, average[1]

    for _ in range(3):
        survives(net, swap, x)


def test_parameter_data_is_swapped_with_an_average(net: Net, x: Tensor) -> None:
    """The graph reads the memory of the capture, which now belongs to the average."""
    average = copy.deepcopy(net.up).to(x.device)
    average.weight.mul_(0.5)

    def swap() -> None:
        net.up.weight.data, average.weight.data = average.weight.data, net.up.weight.data

    for _ in range(3):
        survives(net, swap, x)


def test_old_parameters_live_on_in_a_list(net: Net, x: Tensor) -> None:
    """The graph serves the snapshot, not the new parameters."""
    old = list(net.up.parameters())
    survives(net, lambda: setattr(net, "up", nn.Linear(8, 8).to(x.device)), x)
    net.up.weight, net.up.bias = old
    same_as_eager(net, x)


def test_a_view_of_a_weight_is_kept_by_the_module(backend: Backend, x: Tensor) -> None:
    """The graph reads one memory for weight and view; in eager these are two by now."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.row = [self.up.weight.data[0]]

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.row[0]

    model = cuda_graphed(Viewing().to(backend.device), sizes=(2,))
    model.row = [model.up.weight.data[0]]
    survives(model, lambda: setattr(model.up.weight, "data", model.up.weight * 2), x)
    survives(model, lambda: model.row[0].fill_(5), x)
    survives(model, lambda: model.row.__setitem__(0, model.up.weight.data[1]), x)


def test_a_view_of_a_weight_is_written_by_the_caller(net: Net, x: Tensor) -> None:
    """The graph reads what the caller wrote, as it should; weights may not be copied."""
    view = net.up.weight.data[:3]
    survives(net, lambda: view.mul_(3), x)
    assert info(net).captures == 2


def test_old_weight_is_freed_and_its_memory_used_again(backend: Backend, net: Net, x: Tensor) -> None:
    """The graph reads whatever lies in the old weight's memory now."""
    replays(net, x)
    for _ in range(4):
        net.up.weight = nn.Parameter(net.up.weight.detach() * 1.5)
        litter = [torch.full((8, 8), 9.0, device=backend.device) for _ in range(8)]
        same_as_eager(net, x)
    assert litter


def test_a_parameter_is_deleted_and_set_again(net: Net, x: Tensor) -> None:
    """The graph reads the deleted parameter. (`weight_norm` and pruning put a plain tensor in its
    place.)
    """

    def change() -> None:
        weight = net.up.weight
        del net.up.weight
        net.up.weight = weight.data * 2

    survives(net, change, x)
    survives(net, lambda: setattr(net.up, "weight", net.up.weight * 2), x)


def test_a_parameter_is_replaced_on_every_call(net: Net, x: Tensor) -> None:
    """The graph reads the first parameter; a capture for each call would cost more than eager."""
    with pytest.warns(GraphCacheWarning) as told:
        for _ in range(40):
            net.up.weight = nn.Parameter(net.up.weight * 1.01)
            same_as_eager(net, x, times=1)
    assert len(told) == 1
    assert "up.weight" in str(told[0].message)
    assert info(net).captures <= 2 * 20
    captures = info(net).captures
    net.up.weight = nn.Parameter(net.up.weight * 1.01)
    same_as_eager(net, x)
    assert info(net).captures <= captures + 2


def test_a_number_changes_on_every_call(net: Net, x: Tensor) -> None:
    """The number of the capture is baked in; a capture for each call would cost more than eager."""
    with pytest.warns(GraphCacheWarning) as told:
        for step in range(40):
            net.scale = float(step)
            same_as_eager(net, x, times=1)
    assert len(told) == 1
    assert "scale" in str(told[0].message)
    captures = info(net).captures
    net.scale = 0.5
    same_as_eager(net, x)
    assert info(net).captures <= captures + 2


def test_a_weight_is_swapped_now_and_then_in_a_long_run(net: Net, x: Tensor) -> None:
    """The graph serves the first night's weights; no number of swaps may end the use of graphs."""
    for _ in range(24):
        net.up.weight = nn.Parameter(net.up.weight * 1.01)
        for _ in range(60):
            net(x)
        replays(net, x)


def test_weights_are_tied(backend: Backend) -> None:
    """The graph reads two weights where the module has one, or the other way round."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 8)
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = cuda_graphed(Tied().to(backend.device), sizes=(2,))
    tokens = torch.tensor([1, 5], device=backend.device)
    survives(model, lambda: model.embed.weight.mul_(2), tokens)
    survives(model, lambda: setattr(model.head, "weight", nn.Parameter(model.head.weight * 2)), tokens)
    survives(model, lambda: setattr(model.head, "weight", model.embed.weight), tokens)


@pytest.mark.parametrize(
    ("make", "view"),
    [
        (lambda: torch.randn(3, dtype=torch.complex64), Tensor.conj),
        (lambda: torch.randn(3, dtype=torch.complex64).imag, Tensor._neg_view),
        (lambda: torch.arange(1, 4, dtype=torch.int32), lambda w: w.view(torch.float32)),
        (lambda: torch.randn(3).bfloat16(), lambda w: w.view(torch.float16)),
        (lambda: torch.arange(36.0).view(6, 6)[:2, :3], lambda w: w.as_strided((3, 2), (6, 1))),
        (lambda: torch.randn(2, 3, 1), lambda w: w.as_strided((2, 1, 3), (3, 1, 1))),
        (lambda: torch.zeros(0, 3), lambda w: w.as_strided((0, 1), (3, 1))),
        (lambda: torch.randn(3, 1), lambda w: w.view(3)),
    ],
)
def test_p_data_becomes_another_view_of_its_memory(
    backend: Backend, make: Callable[[], Tensor], view: Callable[[Tensor], Tensor]
) -> None:
    """The graph reads the memory as it was to be read at the capture."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with backend.device:
                self.register_buffer("w", make())

        def forward(self, x: Tensor) -> Tensor:
            w = torch.view_as_real(self.w.resolve_conj()) if self.w.is_complex() else self.w
            return x[:, :1, None] * w.sum(0) + w.shape[-1]

    model = cuda_graphed(Reads(), sizes=(2,))
    survives(model, lambda: setattr(model.w, "data", view(model.w.data)), backend.randn(2, 3))


def test_set_puts_another_memory_under_a_parameter(net: Net, x: Tensor) -> None:
    """The graph reads the old memory after `weight.set_(...)` and `swap_tensors`."""
    survives(net, lambda: net.up.weight.set_(net.up.weight.detach() * 2), x)
    fresh = nn.Parameter(net.up.weight.detach() * 2)
    survives(net, lambda: torch.utils.swap_tensors(net.up.weight, fresh), x)


def test_a_storage_is_resized(backend: Backend, x: Tensor) -> None:
    """The graph reads freed memory: FSDP frees a storage after use, and fills another one later."""
    model = cuda_graphed(nn.Linear(8, 8).to(backend.device), sizes=(2,))
    replays(model, x)
    storage, keep = model.weight.untyped_storage(), model.weight.data.clone()
    size = storage.nbytes()
    for step in range(3):
        storage.resize_(0)
        litter = [torch.full((8, 8), 9.0, device=backend.device) for _ in range(4)]
        storage.resize_(size)
        model.weight.data.copy_(keep * (step + 2))
        same_as_eager(model, x)
        assert litter
