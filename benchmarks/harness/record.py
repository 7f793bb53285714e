"""One JSON file for each run: its figures, and the device, driver, versions, date and commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def environment(*, emulated: bool = False) -> dict[str, str]:
    """Returns the device, driver, versions, date and commit of this run."""
    where = {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "commit": os.environ.get("GRAPHCACHE_COMMIT") or _commit(),
    }
    if emulated:
        return {"device": "emulated on a CPU", "driver": "none", **where}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[0]
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.strip(),
        **where,
    }


def short_name(where: dict[str, str]) -> str:
    """Returns the name of a device in file names, such as "h100"."""
    return where["device"].replace("NVIDIA ", "").split()[0].lower()


def write(path: Path, name: str, figures: dict[str, Any], *, emulated: bool) -> None:
    """Writes one record of what ran on this machine."""
    record = {"name": name, "environment": environment(emulated=emulated), "figures": figures}
    path.write_text(json.dumps(record, indent=2) + "\n")


def _commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"
