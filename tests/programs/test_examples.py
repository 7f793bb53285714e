"""The examples, as a user runs them: from another folder, as programs."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

pytestmark = pytest.mark.programs

EXAMPLES = ROOT / "examples"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))
# Lines of the output that show that the example worked.
PRINTED = {
    "char_decode.py": r"characters of 16 texts, identical to eager: True",
    "continuous_batching.py": r"tokens of 24 requests, identical to eager: True",
    "embeddings.py": r"signatures +3 with graphs",
    "generate.py": r"prompt of 5 tokens, sampled: identical to eager",
    "plain_module.py": r"three sizes for these batches: sizes=\(5, 12, 20\)",
    "two_models.py": r"is whole: True(.|\n)*instead of 32, tokens identical to eager: True",
    "weak_refs.py": r"weak references save 60%",
}


def run(path: Path, folder: Path, device: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Threads gain nothing on tensors this small, and wait for each other where others use the machine.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(path)]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_example_runs(tmp_path: Path, name: str, device: str) -> None:
    if name == "generate.py" and find_spec("transformers") is None:
        pytest.skip("needs transformers")
    done = run(EXAMPLES / name, tmp_path, device)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[name], done.stdout), done.stdout
    if name != "weak_refs.py":
        replayed = re.findall(r"(\d+) replayed", done.stdout)
        assert replayed
        assert min(map(int, replayed)) > 5


@pytest.mark.parametrize("name", PROGRAMS)
def test_example_is_short_and_shows_the_one_line_first(name: str) -> None:
    lines = (EXAMPLES / name).read_text().splitlines()
    assert len(lines) <= 76
    assert any("cuda_graphed(" in line and "the one line" in line for line in lines[:25])
    assert not re.search("perf_counter|argparse|json", "\n".join(lines))


@pytest.mark.parametrize(
    ("name", "right"),
    [("char_decode.py", 'pad={"slots": TEXTS}'), ("continuous_batching.py", 'pad={"slots": SPARE}')],
)
def test_padded_rows_in_a_real_slot_are_found_out(tmp_path: Path, name: str, right: str) -> None:
    """Here padded rows write into the first row's slot, which eager wrote to, too."""
    text = (EXAMPLES / name).read_text()
    assert right in text
    broken = tmp_path / "broken.py"
    broken.write_text(text.replace(right, 'pad={"slots": 0}').replace(", 600\n", ", 20\n"))
    done = run(broken, tmp_path, "cpu")
    assert done.returncode == 0
    assert "changes its result (it computes something else at this batch)" in done.stderr


@pytest.mark.parametrize("name", sorted({*PROGRAMS} - {"generate.py", "char_decode.py"}))
def test_example_fails_where_nothing_is_replayed(tmp_path: Path, name: str) -> None:
    done = run(EXAMPLES / name, tmp_path, "cpu", GRAPHCACHE_DISABLE="1")
    assert done.returncode == 1
    assert "FAILED: " in done.stderr
    assert "Traceback" not in done.stderr
