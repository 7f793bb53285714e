"""Switches in the environment."""

import pytest

import graphcache
from graphcache import OptionError


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)]
)
def test_switches(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("GRAPHCACHE_DISABLE", value)
    assert graphcache.config._switch("GRAPHCACHE_DISABLE") is expected


def test_a_bad_switch_names_the_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHCACHE_EMULATE", "maybe")
    with pytest.raises(OptionError, match="GRAPHCACHE_EMULATE is 'maybe'; set it to one of 1, true"):
        graphcache.config._switch("GRAPHCACHE_EMULATE")
