"""Facts that only the model of a device knows; `test_branches_model.py` runs this file, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from tests.unit.runtime.branches_model import Model, here
from tests.unit.runtime.test_branch_rules import random_program


@pytest.fixture
def model() -> Iterator[Model]:
    found = here()
    assert isinstance(found, Model)
    with torch.no_grad():
        yield found
    found.waits = True


def test_products_of_one_argument_have_no_order(model: Model) -> None:
    model.reset(0)
    x, (a, b, c) = model.tensor(), model.weights(3)
    with model.captured():
        x @ a, x @ b, x @ c
    assert model.unordered() >= 3


def test_races_are_found(model: Model) -> None:
    model.waits, racing = False, 0
    for seed in range(100):
        with suppress(AssertionError):
            random_program(model, seed)
        racing += bool(model.races())
    assert racing > 90
