"""Wrong options of `cuda_graphed` are told at once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import OptionError, cuda_graphed
from tests.models import MLP


def forward(x: Tensor, slots: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, r"sizes=\(\); give one or more positive integers, such as sizes=\(1, 2"),
        ({"sizes": (0, 1)}, "one or more positive integers"),
        ({"sizes": (1, 2.0)}, "one or more positive integers"),
        ({"sizes": 8}, "sizes=8 is not a sequence"),
        ({"batch_dim": "x"}, "batch_dim='x'; give the number of a dimension"),
        ({"batch_dim": True}, "batch_dim=True"),
        ({"batch_dim": {"x": "0"}}, "batch_dim={'x': '0'}; give the number of a dimension, for all arg"),
        ({"batch_dim": {"y": 0}}, "batch_dim names 'y', and forward takes x, slots"),
        ({"batch_dim": {0: 1}}, "in a dictionary by argument name, where None"),
        ({"pad": "zero"}, "pad='zero'; a padded row holds a number, or 'edge'"),
        ({"pad": {"slots": None}}, "a padded row holds a number"),
        ({"pad": {"slot": -1}}, "pad names 'slot', and forward takes x, slots"),
        ({"bind": ["cache"]}, "bind names 'cache', and forward takes x, slots"),
        ({"bind": (1,)}, r"bind=\(1,\); give the names of arguments, such as bind=\('x',\)"),
        ({"bind": 1}, "bind=1; give the names of arguments"),
        ({"pad": {1: 0}}, "in a dictionary by argument name"),
        ({"stale": "clone"}, "stale='clone'; give one of error, copy"),
        ({"pool": "cuda"}, "pool='cuda'; give a GraphPool"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cuda_graphed(forward, **options)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_targets() -> None:
    with pytest.raises(OptionError, match=r"can't decorate 0; .*cuda_graphed\(batch_dim=0\)"):
        cuda_graphed(0)
    with pytest.raises(OptionError, match="int has no forward to decorate"):
        cuda_graphed(int)
    with pytest.raises(OptionError, match=r"can't decorate a ScriptModule.* before torch\.jit"):
        cuda_graphed(torch.jit.script(nn.Linear(2, 2)))
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, graphcache.GraphCacheError)


def test_pad_names_may_be_paths_and_open_signatures_take_any() -> None:
    cuda_graphed(forward, pad={"x['ids'][0]": 1, "slots": "edge"})
    cuda_graphed(lambda **kwargs: kwargs, pad={"anything": 1})


@pytest.mark.parametrize("value", [1, -0.1, "5%", float("nan")])
def test_a_share_that_makes_no_sense(value: Any) -> None:
    with pytest.raises(OptionError, match=r"min_gain=.*such as 0\.05"):
        cuda_graphed(MLP(), min_gain=value)
