"""The commands of `python -m graphcache`."""

import subprocess
import sys

import pytest
import torch

from graphcache import __main__ as program


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["graphcache", command])
    return program.main()


def test_demo_shows_a_module_at_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("demo", monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "48: 36 replayed, 12 eager" in printed
    assert [line.split()[0] for line in printed.splitlines()[-5:]] == ["1", "2", "4", "8", "16"]


def test_bench_times_on_a_gpu_and_says_so_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run("bench", monkeypatch)
    out, err = capsys.readouterr()
    if not torch.cuda.is_available():
        assert status == 2
        assert out == ""
        assert "on a GPU only" in err
        return
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["4", "11", "16"]


def test_doctor_tells_the_environment() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "graphcache", "doctor"], capture_output=True, text=True, check=True
    ).stdout
    assert torch.__version__ in told
    assert "graphcache" in told
    assert "replays equal eager" in told
