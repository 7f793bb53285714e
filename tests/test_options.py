"""Bad input gets a clear error: what, where, and what to do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import OptionError, cuda_graphed
from graphcache.capture.sizes import default_sizes, padded_size
from graphcache.config import check_sizes


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


def test_sizes() -> None:
    assert check_sizes([4, 1, 4]) == (1, 4)
    assert default_sizes(1) == (1,)
    assert default_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert default_sizes(300)[-4:] == (256, 272, 288, 300)
    assert [padded_size((2, 4), n) for n in (1, 2, 3, 4, 5)] == [2, 2, 4, 4, None]
    for batch in range(1, 600):
        sizes = default_sizes(batch)
        assert sizes[-1] == batch
        assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)]
)
def test_switches(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("GRAPHCACHE_DISABLE", value)
    assert graphcache.config._switch("GRAPHCACHE_DISABLE") is expected


def test_a_bad_switch_names_the_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCACHE_EMULATE", "maybe")
    with pytest.raises(OptionError, match="GRAPHCACHE_EMULATE is 'maybe'; set it to one of 1, true"):
        graphcache.config._switch("GRAPHCACHE_EMULATE")


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
