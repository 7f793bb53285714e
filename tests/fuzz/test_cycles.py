"""Nothing is left of captured and dropped modules; `tests.fuzz.cycles` runs many more."""

import pytest
import torch

from graphcache import default_pool
from tests.fuzz import cycles
from tests.helpers import RUNTIMES

KEPT = []


@pytest.fixture(params=RUNTIMES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


def test_cycles_leave_nothing_behind(device: torch.device) -> None:
    record = cycles.run(48, device)
    # 48 cycles are too few for the host's figures: other tests' memory comes and goes meanwhile.
    assert set(record["leaks"]) <= {"host_rss", "device_used"}


def test_objects_left_behind_are_reported(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = cycles.cycle

    def leaks(number: int, device: torch.device) -> None:
        cycle(number, device)
        KEPT.append([number, default_pool(device).lane()])
        KEPT.extend([number] for _ in range(10))

    monkeypatch.setattr(cycles, "cycle", leaks)
    try:
        assert "objects" in cycles.run(12, device)["leaks"]
    finally:
        KEPT.clear()
