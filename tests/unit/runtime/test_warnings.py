"""Warnings point at the line of the user's that leads to them."""

import linecache
import threading

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import GraphCacheWarning, cuda_graphed


class Reader(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _check(caught: pytest.WarningsRecorder, text: str) -> None:
    """Checks that the one warning points at a line of this file with this text."""
    [warning] = caught
    assert warning.filename == __file__
    assert linecache.getline(__file__, warning.lineno).strip() == text


def test_warning_of_a_module_call_names_the_callers_line() -> None:
    model = cuda_graphed(Reader())
    with graphcache.emulate(), torch.no_grad(), pytest.warns(GraphCacheWarning) as caught:
        model(torch.ones(2, 2))
    _check(caught, "model(torch.ones(2, 2))")


def test_warning_of_a_bare_forward_names_the_callers_line() -> None:
    model = cuda_graphed(Reader())
    with graphcache.emulate(), torch.no_grad(), pytest.warns(GraphCacheWarning) as caught:
        model.forward(torch.ones(2, 2))
    _check(caught, "model.forward(torch.ones(2, 2))")


def test_warning_of_a_wrapped_module_names_the_wrappers_line() -> None:
    model = Wrapper(cuda_graphed(Reader()))
    with graphcache.emulate(), torch.no_grad(), pytest.warns(GraphCacheWarning) as caught:
        model(torch.ones(2, 2))
    _check(caught, "return self.inner(x)")


def test_warning_skips_frames_of_decorators() -> None:
    model = torch.no_grad()(graphcache.emulate()(cuda_graphed(Reader())))
    with pytest.warns(GraphCacheWarning) as caught:
        model(torch.ones(2, 2))
    _check(caught, "model(torch.ones(2, 2))")


def test_warning_at_decoration_names_the_decorators_line() -> None:
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    with pytest.warns(GraphCacheWarning, match="compiled in place") as caught:
        cuda_graphed(module)
    _check(caught, "cuda_graphed(module)")


def test_warning_of_a_decorator_with_options_names_its_line() -> None:
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    with pytest.warns(GraphCacheWarning, match="compiled in place") as caught:
        cuda_graphed(sizes=(2,))(module)
    _check(caught, "cuda_graphed(sizes=(2,))(module)")


def test_warning_in_a_thread_without_user_code_is_given() -> None:
    model = cuda_graphed(Reader())
    served = torch.no_grad()(graphcache.emulate()(model))
    thread = threading.Thread(target=served, args=(torch.ones(2, 2),))
    with pytest.warns(GraphCacheWarning) as caught:
        thread.start()
        thread.join()
    [warning] = caught
    assert warning.filename == threading.__file__
