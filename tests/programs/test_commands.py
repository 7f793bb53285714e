"""The commands of `python -m graphcache`."""

import subprocess
import sys

import torch


def test_demo_shows_a_module_at_work() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "graphcache", "demo"], capture_output=True, text=True, check=True
    ).stdout
    assert "48: 44 replayed, 4 eager" in told
    assert [line.split()[0] for line in told.splitlines()[-5:]] == ["1", "2", "4", "8", "16"]


def test_bench_times_on_a_gpu_and_says_so_without() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "graphcache", "bench"], capture_output=True, text=True, check=False
    )
    if not torch.cuda.is_available():
        assert told.returncode == 2
        assert told.stdout == ""
        assert "on a GPU only" in told.stderr
        return
    assert told.returncode == 0, told.stderr
    assert [line.split()[0] for line in told.stdout.splitlines()[-3:]] == ["4", "11", "16"]


def test_doctor_tells_the_environment() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "graphcache", "doctor"], capture_output=True, text=True, check=True
    ).stdout
    assert torch.__version__ in told
    assert "graphcache" in told
    assert "replays equal eager" in told
