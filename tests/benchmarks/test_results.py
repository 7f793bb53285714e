"""The pages of results agree with the records."""

import json

from benchmarks.report import tables


def test_results_page_is_made_from_the_records() -> None:
    assert tables.main(["--check"]) == 0


def test_every_record_says_where_it_comes_from() -> None:
    paths = list(tables.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        for key in ("device", "driver", "torch", "date", "commit"):
            assert record["environment"][key] not in ("", "unknown"), path
        assert record["figures"]["status"] == 0, path


def test_recorded_decodes_are_identical_to_eager_and_faster() -> None:
    for path in tables.RESULTS.glob("char_decode-*.json"):
        figures = json.loads(path.read_text())["figures"]
        assert figures["identical"] == figures["tokens"]
        rates = figures["tokens_per_second"]
        assert rates["graphed"] > rates["eager"]
