"""`python -m graphcache`: `doctor` reports the environment and tries it, `demo` serves a module."""

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


def demo() -> int:
    """Serves a small module at batches that shrink, and prints what `cache_info()` tells of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
    model = graphcache.cuda_graphed(torch.nn.Sequential(*layers).to(device), sizes=(1, 2, 4, 8, 16))
    with graphcache.emulate(), torch.inference_mode():
        for batch in range(16, 0, -1):
            for _ in range(3):
                model(torch.randn(batch, 256, device=device))
    print(model.forward.cache_info())  # type: ignore[attr-defined]
    return 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m graphcache", description=__doc__)
    parser.add_argument("command", choices=["doctor", "demo"])
    return {"doctor": doctor, "demo": demo}[parser.parse_args().command]()


if __name__ == "__main__":
    sys.exit(main())
