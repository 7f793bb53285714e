"""Import, build and installation, each in a process of its own."""

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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


DAMAGES: dict[str, Callable[[Path], object]] = {
    "other torch": lambda folder: (folder / "_built.py").write_text('TORCH_VERSION = "1.2.3"\n'),
    "not built": lambda folder: (folder / "_built.py").unlink(),
    "no library": lambda folder: [path.write_bytes(b"none") for path in folder.glob("*.so")],
}
IMPORT_EACH = """
import sys
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    try:
        import graphcache
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", end="\\0")
    for name in [name for name in sys.modules if name.partition(".")[0] == "graphcache"]:
        del sys.modules[name]
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The errors of imports of damaged copies, which one process after the other tries."""
    folders = []
    for name, damage in DAMAGES.items():
        folders.append(tmp_path_factory.mktemp(name.replace(" ", "_")))
        copy = folders[-1] / "graphcache"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        damage(copy / "_C")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folders[0].parent,
    )
    return dict(zip(DAMAGES, done.stdout.split("\0"), strict=False))


def test_a_helper_built_for_another_torch_names_both_versions(failures: dict[str, str]) -> None:
    failed = failures["other torch"]
    assert "NativeModuleError" in failed
    assert "built for torch 1.2.3" in failed
    assert f"installed torch is {torch.__version__}" in failed
    assert "pip install --no-build-isolation" in failed


def test_a_helper_that_is_not_built_says_so(failures: dict[str, str]) -> None:
    failed = failures["not built"]
    assert "graphcache._C is not built" in failed
    assert torch.__version__ in failed
    assert "pip install --no-build-isolation" in failed


def test_a_helper_that_does_not_load_says_so(failures: dict[str, str]) -> None:
    failed = failures["no library"]
    assert "does not load with the installed torch" in failed
    assert torch.__version__ in failed


def test_native_module_error_is_an_import_error(failures: dict[str, str]) -> None:
    """Each was caught as an ImportError by the process that tried it."""
    assert [failures[name].split(":")[0] for name in DAMAGES] == 3 * ["NativeModuleError"]


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
    """By the time of the processor, as others use the machine, too; the best of three."""
    code = (
        "import time, torch\nstart = time.process_time()\nimport graphcache\n"
        "print(time.process_time() - start)"
    )
    assert any(float(python(code).stdout) < 0.2 for _ in range(3))


def test_import_initialises_no_gpu() -> None:
    code = "import graphcache, torch; print(torch.cuda.is_initialized())"
    assert python(code).stdout == "False\n"


# Switches are read at import: each environment has a process of its own, forked once torch is there.
IN_EACH_ENVIRONMENT = """
import os, sys, torch
for name in sys.argv[1:]:
    if not os.fork():
        os.environ.update((item.split("=") for item in name.split()))
        from graphcache import cuda_graphed
        f = cuda_graphed(lambda x: x * 2, sizes=(2,))
        for _ in range(3): f(torch.ones(2))
        i = f.cache_info()
        print(i.hits, i.launch, i.eager)
        sys.exit()
    status = os.wait()[1]
    if status:
        print("failed")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_switches_by_environment() -> None:
    emulate = "GRAPHCACHE_EMULATE=1"
    names = [emulate, f"{emulate} GRAPHCACHE_PORTABLE=1", f"{emulate} GRAPHCACHE_DISABLE=1"]
    done = subprocess.run(
        [sys.executable, "-c", IN_EACH_ENVIRONMENT, *names, "GRAPHCACHE_EMULATE=perhaps"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    on, portable, off, bad = done.stdout.splitlines()
    assert on.startswith("2 copies ")
    assert portable.startswith("2 torch ")
    assert off == "0 none {'disabled': 3}"
    assert bad == "failed"
    assert "GRAPHCACHE_EMULATE is 'perhaps'" in done.stderr


def test_logging_through_torch_logs() -> None:
    code = (
        "import torch, graphcache\n"
        "with graphcache.emulate():\n"
        "    f = graphcache.cuda_graphed(lambda x: x * 2, sizes=(2,)); f(torch.ones(2))"
    )
    assert "captured <lambda> at sizes [2]" in python(code, TORCH_LOGS="graphcache").stderr


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
    assert ended.stderr == ""  # nothing is logged that was not asked for
    assert ended.returncode == 0
