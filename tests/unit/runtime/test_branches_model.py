"""Runs the rules of branches, and checks of the model, on the model of a device: without CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT

RULES = ("tests/unit/runtime/test_branch_rules.py", "tests/unit/runtime/branches_model/checks.py")


@pytest.mark.skipif(torch.version.cuda is not None, reason="CUDA is there: the rules run on it")
@pytest.mark.skipif(sys.platform != "linux", reason="the model is linked as on Linux")
def test_branches_on_a_model_of_a_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *RULES],
        cwd=ROOT,
        env=os.environ | {"BRANCHES_MODEL": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout
