"""Runs `branches_model/cases.py`: the rules of branches, where there is no CUDA."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.version.cuda is not None, reason="CUDA is there: tests/test_branches.py")
@pytest.mark.skipif(sys.platform != "linux", reason="the model is linked as on Linux")
def test_branches_on_a_model_of_a_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/branches_model/cases.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout
