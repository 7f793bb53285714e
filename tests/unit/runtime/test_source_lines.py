"""An error is told by the user's line."""

import pytest
import torch
from torch import nn

from graphcache.runtime.source_lines import user_line_of


def test_error_line_is_torchs_without_a_user_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 2)(torch.ones(3))
    error = caught.value
    assert user_line_of(error).startswith(f"{__file__}:")
    assert error.__traceback__ is not None
    inside = error.with_traceback(error.__traceback__.tb_next)
    assert "linear.py:" in user_line_of(inside)
    assert user_line_of(error.with_traceback(None)) == "an unknown line"
