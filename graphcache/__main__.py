"""`python -m graphcache`: `doctor` tries the environment, `demo` serves a module, `bench` times one."""

import argparse
import copy
import os
import platform
import sys
from statistics import median
from time import perf_counter

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
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    equal = {device: _try(device) for device in (*devices, torch.device("cpu"))}
    for device, is_equal in equal.items():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "emulated graphs"
        rows.append((str(device), f"{name}: replays {'equal' if is_equal else 'DIFFER FROM'} eager"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0 if all(equal.values()) else 1


_SWITCHES = tuple(f"GRAPHCACHE_{name}" for name in ("DISABLE", "EMULATE", "PORTABLE", "LINEAR", "CHECK"))


def _try(device: torch.device) -> bool:
    plain = _module(device).forward
    graphed = graphcache.cuda_graphed(plain, sizes=(2, 4), pool=graphcache.GraphPool(device))
    with graphcache.emulate(), torch.no_grad():
        for batch in (4, 3, 3, 1, 2):
            x = torch.randn(batch, 256, device=device)
            if not torch.allclose(graphed(x), plain(x), rtol=1e-3, atol=1e-4):
                return False
    return bool(graphed.cache_info().hits == 2)  # type: ignore[attr-defined]


def _module(device: torch.device) -> torch.nn.Module:
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers).to(device)


def demo() -> int:
    """Serves a small module at batches that shrink, and prints its `cache_info()`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = graphcache.cuda_graphed(_module(device), sizes=(1, 2, 4, 8, 16))
    with graphcache.emulate(), torch.inference_mode():
        for batch in range(16, 0, -1):
            for _ in range(3):
                model(torch.randn(batch, 256, device=device))
    print(model.forward.cache_info())  # type: ignore[attr-defined]
    return 0


def bench(calls: int = 500) -> int:
    """Times a small module eagerly and by its graphs, in turns, and prints the medians."""
    if not torch.cuda.is_available():
        print("graphcache: bench measures on a GPU only, and torch finds none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    plain = _module(device)
    arms = plain, graphcache.cuda_graphed(copy.deepcopy(plain), sizes=(4, 16))
    print(f"{torch.cuda.get_device_name(device)}: 4 layers of 256; medians of {calls} calls")
    print("batch  host us: eager  graphcache   latency us: eager  graphcache")
    with torch.inference_mode():
        for batch in (4, 11, 16):
            times: list[list[tuple[float, float]]] = [[] for _ in arms]
            for _ in range(calls + 10):
                x = torch.randn(batch, 256, device=device)
                results = []
                for module, pairs in zip(arms, times, strict=True):
                    torch.cuda.synchronize(device)
                    start = perf_counter()
                    results.append(module(x))
                    host = perf_counter() - start
                    torch.cuda.synchronize(device)
                    pairs.append((host * 1e6, (perf_counter() - start) * 1e6))
                if not torch.allclose(results[0], results[1], rtol=1e-3, atol=1e-4):
                    print(f"graphcache: batch {batch} DIFFERS FROM eager", file=sys.stderr)
                    return 1
                del results  # the next call would copy a held output
            medians = (median(column) for pairs in times for column in zip(*pairs[10:], strict=True))
            # Each arm gives its host time and its latency; the columns are in another order.
            row = "{0:>5} {1:>15.1f} {3:>11.1f} {2:>19.1f} {4:>11.1f}"
            print(row.format(batch, *medians))
    return 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m graphcache", description=__doc__)
    parser.add_argument("command", choices=["doctor", "demo", "bench"])
    return {"doctor": doctor, "demo": demo, "bench": bench}[parser.parse_args().command]()


if __name__ == "__main__":
    sys.exit(main())
