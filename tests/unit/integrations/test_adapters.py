"""A wrapper of PEFT or sentence-transformers leaves the graphs to the model inside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcache import cuda_graphed
from tests.helpers import Backend


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)

    def generate(self, x: Tensor) -> Tensor:
        return self(self(x))


class Transformer(nn.Module):
    """As the first module of sentence-transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Inside()

    def forward(self, features: Any) -> Tensor:
        return self.model(features.x)  # type: ignore[no-any-return]


class PeftModel(nn.Module):
    __module__ = "peft.peft_model"

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Inside()

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)  # type: ignore[no-any-return]

    def generate(self, x: Tensor) -> Tensor:
        return self.base_model.generate(x)


class SentenceTransformer(nn.Sequential):
    __module__ = "sentence_transformers.model"

    def __init__(self) -> None:
        super().__init__(Transformer())

    def generate(self, x: Tensor) -> Tensor:
        class Features:
            __slots__ = ("x",)

        features = Features()
        features.x = x  # type: ignore[attr-defined]
        return self(features)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [PeftModel, SentenceTransformer])
def test_a_model_inside_gets_the_graphs(backend: Backend, kind: Any) -> None:
    model = kind().to(backend.device)
    x = backend.randn(2, 8)
    expected = model.generate(x)
    assert cuda_graphed(model, sizes=(2,)) is model
    for _ in range(5):
        torch.testing.assert_close(model.generate(x), expected)
    info = model.forward.cache_info()
    assert info.calls - info.hits == 1
    assert info.captures == 1
    model.forward.cache_clear()
    model.get_submodule("base_model" if kind is PeftModel else "0.model").forward.warmup(x)
    assert model.forward.cache_info().captures == 1


def test_warmup_is_passed_on(backend: Backend) -> None:
    model: Any = cuda_graphed(PeftModel().to(backend.device), sizes=(2,))
    model.forward.warmup(backend.randn(2, 8))
    model(backend.randn(2, 8))
    assert model.forward.cache_info().hits == 1
