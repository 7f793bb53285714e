"""The zoo tells replayed, eager and failed models apart."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.report import tables
from benchmarks.workloads import families, zoo
from benchmarks.workloads.cases import GROUPS, Case
from graphcache import cuda_graphed

Run = Callable[..., tuple[int, dict[str, Any]]]


class Tame(nn.Module):
    """Would return next to nothing as it is made, and has a cache that its first call fills."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.scale = nn.Parameter(torch.full((8,), 1e-6))
        self.shape: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.shape = self.shape or x.shape[1:]
        return 1 + self.body(x) * self.scale


class Host(Tame):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * max(1, int(x.sum()))


class Flat(Tame):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0 + 1


class Unbuilt(nn.Module):
    def __init__(self) -> None:
        raise ValueError("no | weights")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs what is named, in a zoo of its own; returns the exit status and the figures."""

    recurrent, names = GROUPS["torch"]
    mine: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (Tame, Host, Flat, Unbuilt)}

    def made(torch_: Any, name: str) -> Case:
        if name not in mine:
            return recurrent(torch_, name)
        return Case(mine[name](), lambda batch: [torch.randn(batch, 8)])

    monkeypatch.setitem(GROUPS, "torch", (made, (*names, *mine)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)

    def run(*names: str) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "zoo-emulated.json"
        status = zoo.main(["--device", "cpu", "--out", str(path), "--only", *names])
        return status, json.loads(path.read_text())["figures"]

    return run


def test_replayed_eager_and_failed_are_told_apart(run: Run) -> None:
    status, figures = run("LSTMCell", "GRU", "Tame", "Host", "Flat", "Unbuilt")
    found = figures["groups"]["torch"]
    assert status == figures["status"] == 0
    assert {name: each["outcome"] for name, each in found.items()} == {
        "LSTMCell": "replayed",
        "GRU": "replayed",
        "Tame": "replayed",
        "Host": "eager",
        "Flat": "error",
        "Unbuilt": "error",
    }
    tame, host = found["Tame"], found["Host"]
    assert tame["equal"]
    assert tame["calls"] == len(zoo.BATCHES) == tame["replayed"] + sum(tame["eager"].values())
    assert tame["sizes"] == [1, 2, 4, 8]
    assert host["equal"]
    assert any("reads a value on the host" in why for why in host["eager"])
    assert len(host["warnings"]) == 1
    assert "speedup" not in host
    assert "whatever it is given" in found["Flat"]["error"]

    rows = {line.split(" | ")[0].strip("| "): line for line in tables.zoo(figures).splitlines()}
    assert f"**torch {torch.__version__}**" in rows
    assert "reads a value on the host" in rows["Host"]
    assert "did not run" in rows["Unbuilt"]
    assert "no / weights" in rows["Unbuilt"]
    assert "not measured" in rows["Tame"]


def test_outputs_that_differ_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def crooked(module: Any) -> nn.Module:
        with torch.no_grad():
            module.body[0].bias += 0.1
        return cuda_graphed(module)

    monkeypatch.setattr(zoo, "cuda_graphed", crooked)
    status, figures = run("Tame")
    assert status == figures["status"] == 1
    assert not figures["groups"]["torch"]["Tame"]["equal"]
    assert "**no**" in tables.zoo(figures)


def test_a_graphed_module_that_raises_is_not_equal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_body(module: Any) -> nn.Module:
        del module.body
        return cuda_graphed(module)

    monkeypatch.setattr(zoo, "cuda_graphed", without_body)
    status, figures = run("Tame")
    assert status == 1
    assert figures["groups"]["torch"]["Tame"].keys() == {"error", "outcome", "equal", "seconds"}


def test_a_missing_library_is_a_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    status, figures = run("resnet18", "GRUCell")
    assert status == 0
    assert list(figures["groups"]) == ["torch"]
    assert "timm: left out" in capsys.readouterr().out


def test_differences_are_relative_and_no_nan_passes() -> None:
    one = {"a": torch.tensor([1.0, -200.0]), "b": [torch.tensor([3])]}
    assert zoo.difference(one, one) == 0
    assert zoo.difference(one, {**one, "a": torch.tensor([2.0, -200.0])}) == 1 / 200
    for other in (
        {**one, "b": [torch.tensor([4])]},
        {**one, "a": torch.tensor([1.0, float("nan")])},
        {**one, "a": torch.tensor([1.0])},
        {**one, "a": torch.tensor([1.0, -200.0], dtype=torch.float64)},
        {"a": one["a"]},
    ):
        assert zoo.difference(one, other) == float("inf")
    for value in (float("nan"), float("inf")):
        assert zoo.difference(torch.tensor([value]), torch.tensor([value])) == float("inf")
    assert zoo.difference(torch.zeros(2), torch.ones(2)) == float("inf")


def test_paths_begin_at_the_package() -> None:
    where = "at /a/torch/lib/site-packages/timm/layers/mlp.py:3, in forward"
    assert (
        families.without_folders(f"x copies {where}") == "x copies at timm/layers/mlp.py:3, in forward"
    )
    assert families.without_folders("at /a/model.py:3") == "at /a/model.py:3"
