"""A share of the fuzzer's sequences, and a check that the fuzzer finds a broken library."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from graphcache.dispatch import store
from graphcache.guards.guards import Guards
from tests.fuzz import runner
from tests.fuzz.edges import KINDS
from tests.fuzz.machine import Fuzz, Mismatch, Stats
from tests.helpers import RUNTIMES

# By kind, since what hypothesis draws under a seed depends on what else is imported.
OF_EACH_KIND = 4

# Calls of these are eager; now and then a sequence has others beside them.
HARDLY_REPLAYED = (
    *("in place", "remembers", "replaces in an object"),
    *("table grows", "memo by size", "notes the batch", "notes the largest", "tallies"),
    *("lists batches", "flag in except"),
)

ENOUGH_TO_FIND = 200  # sequences, of which each of the bugs below takes a tenth


@pytest.fixture(params=RUNTIMES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny, and threads of an operation would only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_graphed_modules_do_what_their_twins_do(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stats = Stats()
    monkeypatch.setattr(Fuzz, "stats", stats)
    runner.run(OF_EACH_KIND, 20250 + list(KINDS).index(kind), device, kind=kind)
    assert stats.kinds[kind] >= OF_EACH_KIND
    assert stats.replays > 0 or kind in HARDLY_REPLAYED  # graphs did serve


def _forget_what_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guards, "find", lambda *_: Guards())


def _pad_what_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "why_not_padded", lambda *_: None)


@pytest.mark.parametrize(
    ("breaks", "kind"), [(_forget_what_is_reached, "mlp"), (_pad_what_draws, "dropout")]
)
def test_a_broken_library_is_found_out(breaks, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fuzz, "stats", Stats())
    breaks(monkeypatch)
    before = Mismatch.count
    with suppress(Exception):  # hypothesis has errors of its own for what fails now and then
        runner.run(ENOUGH_TO_FIND, 1, torch.device("cpu"), kind=kind, shrink=False)
    assert Mismatch.count > before
