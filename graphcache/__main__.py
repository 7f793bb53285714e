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


_SWITCHES = tuple(f"GRAPHCACHE_{name}" for name in ("DISABLE", "EMULATE", "PORTABLE", "LINEAR"))


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
    arms = {"eager": plain, "graphcache": graphcache.cuda_graphed(copy.deepcopy(plain), sizes=(4, 16))}
    print(f"{torch.cuda.get_device_name(device)}: 4 layers of 256; medians of {calls} calls")
    print("batch  host us: eager  graphcache   latency us: eager  graphcache")
    with torch.inference_mode():
        for batch in (4, 11, 16):
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
            for _ in range(calls + 10):
                x = torch.randn(batch, 256, device=device)
                results = []
                for name, module in arms.items():
                    torch.cuda.synchronize(device)
                    start = perf_counter()
                    results.append(module(x))
                    host = perf_counter() - start
                    torch.cuda.synchronize(device)
                    times[name].append((host * 1e6, (perf_counter() - start) * 1e6))
                eager, graphed = results
                if not torch.allclose(graphed, eager, rtol=1e-3, atol=1e-4):
                    print(f"graphcache: batch {batch} DIFFERS FROM eager", file=sys.stderr)
                    return 1
                del results, eager, graphed  # the next call would expire a held output
            columns = (zip(*pairs[10:], strict=True) for pairs in times.values())
            (host, latency), (graphed_host, graphed_latency) = (map(median, each) for each in columns)
            row = f"{host:>15.1f} {graphed_host:>11.1f} {latency:>19.1f} {graphed_latency:>11.1f}"
            print(f"{batch:>5} {row}")
    return 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m graphcache", description=__doc__)
    parser.add_argument("command", choices=["doctor", "demo", "bench"])
    return {"doctor": doctor, "demo": demo, "bench": bench}[parser.parse_args().command]()


if __name__ == "__main__":
    sys.exit(main())
