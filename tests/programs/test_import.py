"""Import, build and installation, each in a process of its own."""

import io
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphcache
from tests.helpers import ROOT

PACKAGE = Path(graphcache.__file__).parent


def python(code: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package, to be damaged."""
    shutil.copytree(PACKAGE, tmp_path / "graphcache", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_helper_built_for_another_torch_names_both_versions(copied: Path) -> None:
    (copied / "graphcache/_C/_built.py").write_text('TORCH_VERSION = "1.2.3"\n')
    failed = python("import graphcache", copied)
    assert "NativeModuleError" in failed.stderr
    assert "built for torch 1.2.3" in failed.stderr
    assert f"installed torch is {torch.__version__}" in failed.stderr
    assert "pip install --no-build-isolation" in failed.stderr


def test_a_helper_that_is_not_built_says_so(copied: Path) -> None:
    (copied / "graphcache/_C/_built.py").unlink()
    failed = python("import graphcache", copied)
    assert "graphcache._C is not built" in failed.stderr
    assert torch.__version__ in failed.stderr
    assert "pip install --no-build-isolation" in failed.stderr


def test_a_helper_that_does_not_load_says_so(copied: Path) -> None:
    for library in (copied / "graphcache/_C").glob("*.so"):
        library.write_bytes(b"not a library")
    failed = python("import graphcache", copied)
    assert "does not load with the installed torch" in failed.stderr
    assert torch.__version__ in failed.stderr


def test_native_module_error_is_an_import_error(copied: Path) -> None:
    (copied / "graphcache/_C/_built.py").unlink()
    code = "try:\n    import graphcache\nexcept ImportError:\n    print('caught')"
    assert python(code, copied).stdout == "caught\n"


def test_build_without_torch_names_the_command(tmp_path: Path) -> None:
    """As pip's build isolation hides it; nothing is downloaded, since nothing asks for it."""
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')\n")
    failed = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert failed.returncode != 0
    assert "pip install --no-build-isolation ." in failed.stderr
    assert "Traceback" not in failed.stderr
    requires = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert '"torch' not in requires


def test_import_takes_a_fifth_of_a_second_beyond_torch() -> None:
    code = (
        "import time, torch\nstart = time.process_time()\nimport graphcache\n"
        "print(time.process_time() - start)"  # of this process alone, however busy the machine is
    )
    seconds = [float(python(code).stdout) for _ in range(3)]
    assert statistics.median(seconds) < 0.2


def test_import_initialises_no_gpu() -> None:
    code = "import graphcache, torch; print(torch.cuda.is_initialized())"
    assert python(code).stdout == "False\n"


def test_switches_by_environment() -> None:
    code = (
        "import torch\nfrom graphcache import cuda_graphed\n"
        "f = cuda_graphed(lambda x: x * 2, sizes=(2,))\n"
        "for _ in range(3): f(torch.ones(2))\ni = f.cache_info()\n"
        "print(i.hits, i.launch, i.eager)"
    )
    assert python(code, GRAPHCACHE_EMULATE="1").stdout.startswith("2 copies ")
    portable = python(code, GRAPHCACHE_EMULATE="1", GRAPHCACHE_PORTABLE="1")
    assert portable.stdout.startswith("2 torch ")
    off = python(code, GRAPHCACHE_EMULATE="1", GRAPHCACHE_DISABLE="1")
    assert off.stdout == "0 none {'disabled': 3}\n"
    bad = python("import graphcache", GRAPHCACHE_EMULATE="perhaps")
    assert "GRAPHCACHE_EMULATE is 'perhaps'" in bad.stderr


def test_logging_through_torch_logs() -> None:
    code = (
        "import torch, graphcache\n"
        "with graphcache.emulate():\n"
        "    f = graphcache.cuda_graphed(lambda x: x * 2, sizes=(2,)); f(torch.ones(2))"
    )
    assert "captured <lambda> at sizes [2]" in python(code, TORCH_LOGS="graphcache").stderr
    assert python(code).stderr == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_a_slow_capture_shows_its_progress_on_a_terminal_only(
    stderr: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.25)
        return x * 2

    monkeypatch.setattr(sys, "stderr", shown := stderr())
    with graphcache.emulate():
        graphcache.cuda_graphed(slow, sizes=range(1, 9))(torch.ones(2))
    text = shown.getvalue()
    assert "graphcache: capturing" in text if shown.isatty() else text == ""


def test_a_process_ends_well_with_live_graphs() -> None:
    code = (
        "import torch, graphcache\n"
        "device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "with graphcache.emulate(), torch.no_grad():\n"
        "    model = graphcache.cuda_graphed(torch.nn.Linear(4, 4).to(device))\n"
        "    for _ in range(3): out = model(torch.ones(2, 4, device=device))\n"
        "print('done')"
    )
    ended = python(code)
    assert ended.stdout == "done\n"
    assert ended.stderr == ""
    assert ended.returncode == 0
