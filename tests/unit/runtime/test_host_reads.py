"""Functions of torch that read values on the host in C++, where no operator shows it."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from graphcache import cuda_graphed
from graphcache.report.reasons import Reason
from tests.helpers import EMULATED, Backend, equal, info

LSTM, GRU = (kind(3, 3).requires_grad_(False) for kind in (nn.LSTM, nn.GRU))


def saved(offsets: Tensor) -> int:
    file = io.BytesIO()
    torch.save(offsets, file)
    return sum(file.getvalue())


# Offsets are two numbers that add up to six.
READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tensor_split": lambda x, of: x.tensor_split(of)[0].sum(0),
    "tensor_split by name": lambda x, of: torch.tensor_split(x, tensor_indices_or_sections=of)[0].sum(0),
    "the overload": lambda x, of: torch.ops.aten.tensor_split.tensor_indices_or_sections(x, of)[0].sum(
        0
    ),
    "lengths": lambda x, of: (
        pack_padded_sequence(x[:2, :, None], of.sort(descending=True)[0].clamp(max=3), True).data.sum()
        + x
    ),
    "pad": lambda x, of: pad_packed_sequence(PackedSequence(x, of.sort(descending=True)[0]))[0].sum(1),
    "LSTM": lambda x, of: LSTM(PackedSequence(x, of.sort(descending=True)[0]))[0].data,
    "GRU": lambda x, of: GRU(PackedSequence(x, of.sort(descending=True)[0]))[0].data,
    "tensor": lambda x, of: x + torch.tensor([[of[0]], [2]]).sum(),
    "as_tensor": lambda x, of: x + torch.as_tensor((of[0], of[1])).argmax(),
    "new_tensor": lambda x, of: x + x.new_tensor([of[0], 2]).sum(),
    "asarray": lambda x, of: x + torch.asarray([of[0], 2]).sum(),
    "save": lambda x, of: x * (saved(of) % 1000),
}


@EMULATED
@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", READS)
def test_values_read_in_cpp_run_eagerly(backend: Backend, name: str, inference: bool) -> None:
    forward = READS[name]
    model = cuda_graphed(forward)
    with torch.inference_mode(inference):
        for first in (3, 4, 5, 3, 4):
            x, offsets = backend.randn(6, 3), torch.tensor([first, 6 - first])
            equal(model(x, offsets), forward(x, offsets))
    assert Reason.READS_VALUE in {why.reason for why in info(model).eager}


def test_split_by_numbers_and_recurrent_layers_are_replayed(backend: Backend) -> None:
    layers = [layer.to(backend.device) for layer in (LSTM, GRU)]

    def forward(x: Tensor) -> Tensor:
        first, *_ = x.tensor_split((1, 2), dim=1)
        return first + sum(layer(x)[0] for layer in layers)

    model = cuda_graphed(forward, sizes=(4,))
    for _ in range(3):
        x = backend.randn(4, 5, 3)
        equal(model(x), forward(x))
    assert info(model).hits == 2, info(model)


@pytest.mark.filterwarnings("ignore::graphcache.errors.GraphCacheWarning")
def test_tensors_as_keys_are_told_for_what_they_are(backend: Backend) -> None:
    """Their `repr` would be a read; a dictionary in an attribute is guarded by identity."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
            self.scales = {self.weight: 2.0}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.scales[self.weight]

    model = Scaled().to(backend.device)
    cuda_graphed(model, sizes=(2,))
    x = backend.randn(2, 3)
    for scale in (2.0, 2.0, 5.0, 5.0):
        model.scales[model.weight] = scale
        assert torch.equal(model(x), x * scale)
    assert info(model).hits == 2
    keyed = cuda_graphed(lambda x: {x: x + 1})
    assert [next(iter(keyed(x).values())).shape for _ in range(2)] == [x.shape] * 2
    assert "the result is a dictionary with tensors as keys" in info(keyed).eager
