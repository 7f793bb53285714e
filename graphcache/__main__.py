"""`python -m graphcache doctor`: the environment, and whether graphs work in it."""

import argparse
import os
import platform
import sys

import torch

import graphcache


def doctor() -> int:
    """Prints versions, devices and switches, and tries a small module on each device."""
    rows = [
        ("graphcache", graphcache.__version__),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("allocator", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default")),
        *((name, os.environ.get(name, "not set")) for name in _SWITCHES),
    ]
    works = True
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (*devices, torch.device("cpu")):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated graphs"
        equal = _try(device)
        works = works and equal
        rows.append((str(device), f"{name}: replays {'equal' if equal else 'DIFFER FROM'} eager"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0 if works else 1


_SWITCHES = ("GRAPHCACHE_DISABLE", "GRAPHCACHE_EMULATE")


def _try(device: torch.device) -> bool:
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    plain = module.to(device).forward
    graphed = graphcache.cuda_graphed(plain, sizes=(2, 4), pool=graphcache.GraphPool(device))
    with graphcache.emulate(), torch.no_grad():
        for batch in (4, 3, 3, 1, 2):
            x = torch.randn(batch, 16, device=device)
            if not torch.allclose(graphed(x), plain(x), rtol=1e-3, atol=1e-4):
                return False
    return bool(graphed.cache_info().hits == 2)  # type: ignore[attr-defined]


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m graphcache", description=__doc__)
    parser.add_argument("command", choices=["doctor"], help="doctor: report and try the environment")
    parser.parse_args()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
