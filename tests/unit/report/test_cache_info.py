"""How `cache_info()` prints."""

import torch
from torch import nn

import graphcache
from graphcache import cuda_graphed


def test_info_prints_as_a_table() -> None:
    model = cuda_graphed(nn.Linear(2, 2), sizes=(4,), pool=graphcache.GraphPool("cpu"))
    with graphcache.emulate(), torch.no_grad():
        for _ in range(3):
            model(torch.ones(3, 2))
    lines = [line.split() for line in str(model.forward.cache_info()).splitlines()]
    assert ["calls", "3:", "1", "replayed,", "2", "eager"] in lines
    assert ["eager:", "the", "first", "call", "of", "a", "signature", "1"] in lines
    assert ["launch", "emulated,", "copies"] in lines
    assert lines[-2:] == [["size", "replays", "padded", "rows"], ["4", "1", "1"]]
