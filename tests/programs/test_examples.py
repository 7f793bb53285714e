"""The examples, as a user runs them: from another folder, as programs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import BACKENDS, ROOT

pytestmark = pytest.mark.programs


EXAMPLES = ROOT / "examples"

DEVICES = ["cpu", *(["cuda"] if "cuda" in BACKENDS else [])]

# Threads gain nothing on tensors this small, and wait for each other where others use the machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(name: str, folder: Path, *options: str) -> tuple[dict, str]:
    figures = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--json", str(figures), *options],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text()), done.stdout


@pytest.mark.parametrize("device", DEVICES)
def test_weak_refs(tmp_path: Path, device: str) -> None:
    figures, printed = run("weak_refs.py", tmp_path, "--device", device)
    unit = 2**30 if device == "cuda" else 2**20
    assert figures["strong_reserved_bytes"] == 10 * unit
    assert figures["weak_reserved_bytes"] == 4 * unit
    assert figures["weak_values_after"]["4"] == [6, 2, 2, 2]
    assert figures["strong_values_after"]["4"] == [2, 2, 2, 2]
    assert "weak references: 4.00" in printed


@pytest.mark.parametrize("device", DEVICES)
def test_char_decode(tmp_path: Path, device: str) -> None:
    figures, printed = run(
        "char_decode.py", tmp_path, "--device", device, "--steps", "30", "--prompts", "12"
    )
    assert figures["identical"] == figures["tokens"] > 500
    assert figures["sizes"] == [1, 2, 4, 8, 16]
    assert set(figures["replays"]) == {"16", "8", "4", "2", "1"}
    assert figures["eager"] == {"the first call of a signature": 1}
    assert figures["padded_rows"] > 0
    assert figures["pool_bytes_weak"] <= figures["pool_bytes_strong"]
    assert figures["at_rest_bytes_weak"] < figures["at_rest_bytes_strong"]
    assert ("tokens per second" in printed) == (device == "cuda")


@pytest.mark.parametrize("device", DEVICES if find_spec("transformers") else [])
def test_generate(tmp_path: Path, device: str) -> None:
    figures, printed = run("generate.py", tmp_path, "--device", device, "--tokens", "16")
    assert figures["identical"] == figures["tokens"] > 200
    assert figures["captures"] == 1  # for all prompts, greedy or not
    assert figures["replays"] > 150
    assert ("tokens per second" in printed) == (device == "cuda")


def test_generate_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "generate.py"), "--device", "cpu"],
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install transformers" in done.stderr


@pytest.mark.parametrize(
    ("name", "right", "wrong", "options"),
    [
        (
            "char_decode.py",
            'pad={"slots": SPARE_SLOT}',
            'pad={"slots": 0, "positions": "edge"}',
            ("--steps", "60", "--prompts", "12"),
        ),
        ("continuous_batching.py", 'pad={"slots": SPARE}', 'pad={"slots": 0}', ("--requests", "16")),
    ],
)
def test_example_fails_if_padded_rows_write_elsewhere(
    tmp_path: Path, name: str, right: str, wrong: str, options: tuple[str, ...]
) -> None:
    """A check that can't fail is worth nothing: here padded rows write into the first row's slot."""
    explain = tmp_path / "broken.py"
    text = (EXAMPLES / name).read_text()
    assert right in text
    explain.write_text(text.replace(right, wrong))
    done = subprocess.run(
        [sys.executable, str(explain), "--device", "cpu", *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED: tokens differ from eager" in done.stderr


@pytest.mark.parametrize("device", DEVICES)
def test_plain_module(tmp_path: Path, device: str) -> None:
    figures, printed = run("plain_module.py", tmp_path, "--device", device, "--calls", "100")
    assert figures["largest_difference"] < 1e-4
    assert figures["calls"] == sum(figures["batches"].values()) == 100
    assert figures["replays"] + sum(figures["eager"].values()) == 100
    assert figures["replays"] > 80
    assert figures["padded_rows"] > 0
    assert {1, 2, 4, 8} < set(figures["sizes"])
    assert len(figures["suggested"]) == 3
    assert figures["suggested"][-1] == max(map(int, figures["batches"]))
    assert "three sizes for these batches: sizes=(" in printed
    assert ("speed against eager" in printed) == (device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_continuous_batching(tmp_path: Path, device: str) -> None:
    figures, printed = run("continuous_batching.py", tmp_path, "--device", device, "--requests", "24")
    assert figures["identical"] == figures["requests"] == 24
    assert figures["tokens"] > 500
    assert set(figures["batches"]) == set("12345678")
    assert set(figures["replays"]) == {"1", "2", "4", "8"}
    assert figures["eager"] == {"the first call of a signature": 1}
    assert figures["padded_rows"] > 0
    assert ("tokens per second" in printed) == (device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_embeddings(tmp_path: Path, device: str) -> None:
    figures, printed = run("embeddings.py", tmp_path, "--device", device, "--requests", "30")
    assert figures["largest_difference"] < 1e-4
    assert figures["signatures"] == 3  # one for each length
    assert figures["sizes"] == [1, 2, 4, 8, 16, 32]
    assert set(figures["eager"]) == {"compared with a padded replay"}  # no request waited for a capture
    assert figures["replays"] + sum(figures["eager"].values()) == figures["requests"] == 30
    assert figures["replays"] > 10
    assert figures["texts"] > 300
    assert figures["padded_rows"] > 0
    assert len(figures["suggested"]) == 4
    assert ("requests per second" in printed) == (device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_two_models(tmp_path: Path, device: str) -> None:
    figures, printed = run("two_models.py", tmp_path, "--device", device, "--tokens", "16")
    assert figures["identical"] == figures["tokens"] == 8 * 16
    assert figures["target_calls"] < 16
    assert min(figures["replays"].values()) > 5
    assert figures["lanes"] == 1
    assert 0 < figures["pool_bytes_shared"] < figures["pool_bytes_apart"]
    assert [figures[name] for name in ("expired", "cloned", "moved")] == [True, True, True]
    assert "its memory was overwritten by call" in printed
    assert ("tokens per second" in printed) == (device == "cuda")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("plain_module.py", "--calls"),
        ("continuous_batching.py", "--requests"),
        ("embeddings.py", "--requests"),
        ("two_models.py", "--tokens"),
    ],
)
def test_an_example_fails_where_nothing_is_replayed(tmp_path: Path, name: str, option: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--device", "cpu", option, "4"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "GRAPHCACHE_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED: " in done.stderr
    assert "Traceback" not in done.stderr
