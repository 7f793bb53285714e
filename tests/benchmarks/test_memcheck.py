"""The tests and the examples under a memory checker."""

from pathlib import Path

import pytest

from benchmarks.programs import memcheck
from benchmarks.report import tables


@pytest.mark.parametrize("part", memcheck.PARTS)
def test_each_part_of_memcheck_has_a_table(part: str) -> None:
    counts = {"cuda": {"passed": 1200, "failed": 1}}
    figures = {"part": part, "errors": 0, "errors_of_a_faulty_script": 3, "counts": counts}
    table = tables.memcheck({**figures, "failed": ["test_one"]})
    assert "| passed, failed | 1,200, 1 |" in table
    assert "failed: `test_one`" in table


def test_memcheck_knows_the_examples() -> None:
    assert "generate" in {path.stem for path in memcheck.EXAMPLES}


def test_memcheck_runs_the_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here in place of it: a shell that says what it would."""
    says = "echo '==== ERROR SUMMARY: 1 error'; case \"$*\" in *two_models*) exit 1;; esac"
    monkeypatch.setattr(memcheck, "SANITIZER", ("sh", "-c", says, "sh"))
    found = memcheck.run("examples", tmp_path, [], jobs=4)
    assert found["errors"] == len(memcheck.EXAMPLES)
    assert found["counts"]["cuda"] == {"passed": len(memcheck.EXAMPLES) - 1, "failed": 1}
    assert found["status"] == 1


def test_memcheck_runs_the_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All are run, in processes of a few each."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # warnings of theirs are errors
    says = "\"$@\"; echo '==== ERROR SUMMARY: 0 errors'"
    monkeypatch.setattr(memcheck, "SANITIZER", ("sh", "-c", says, "sh"))
    monkeypatch.setattr(memcheck, "TESTS", ("-k", "does_not_own"))
    monkeypatch.setattr(memcheck, "GROUP", 1)
    monkeypatch.setattr(memcheck.record_all, "SUITE", ("tests/unit/native/test_tensors.py",))
    found = memcheck.run("tests", tmp_path, ["-p", "no:cacheprovider"], jobs=2)
    assert found["counts"]["cuda"]["passed"] == len([*tmp_path.iterdir()]) >= 2
    assert found["failed"] == []


def test_a_log_of_the_sanitizer_that_breaks_off_is_no_clean_one() -> None:
    assert memcheck.errors("========= ERROR SUMMARY: 0 errors\n") == 0
    assert memcheck.errors("==== ERROR SUMMARY: 2 errors\n...\n==== ERROR SUMMARY: 1 error\n") == 3
    with pytest.raises(ValueError, match="without a summary"):
        memcheck.errors("........ [100%]\n")
