"""The table of traps agrees with the tests."""

import ast

from tests.footguns import table


def test_traps_page_is_up_to_date() -> None:
    assert table.PAGE.read_text() == table.page()


def test_each_section_has_a_file() -> None:
    files = {path.stem.removeprefix("test_") for path in table.FOLDER.glob("test_*.py")}
    assert files == {*table.SECTIONS, "table"}


def test_each_trap_has_a_docstring() -> None:
    for section in table.SECTIONS:
        for test in table.traps(section):
            assert ast.get_docstring(test), test.name


def test_outcome_is_read_from_assertions() -> None:
    tests = {
        "assert info(model).hits == 0": "as eager, without graphs",
        "assert info(model).hits == 3": "as eager, from graphs",
        "survives(net, change, x)": "as eager, from graphs until the change",
        "same_as_eager(net, x)": "as eager",
        "with pytest.warns(Warning, match='it'): f()": "as eager; warns",
    }
    for body, expected in tests.items():
        (test,) = ast.parse(f"def test():\n {body}").body
        assert isinstance(test, ast.FunctionDef)
        assert table.here(test) == expected
