"""docs/training.md's table of promises: every test that it names is there, and every promise is in it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # behind tests/, which has a families.py too
import pages
import promises

ROOT = Path(__file__).parents[1]


def test_every_test_of_a_promise_is_there():
    tests = [test for promise in promises.PROMISES for test in promise.ids()]
    assert len(tests) == len(set(tests))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", ""]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, *tests], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    for test in tests:
        assert any(promises._is_case_of(line, test) for line in found.stdout.splitlines()), test


def test_the_page_lists_every_promise_and_nothing_else():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    inside = text.split("<!-- promises: begin -->")[1].split("<!-- promises: end -->")[0]
    header, rule, *rows = [line for line in inside.splitlines() if line.startswith("|")]
    assert [header, rule] == pages.table(promises.COLUMNS, [])
    listed = [row.strip("| ").split(" | ") for row in rows]
    assert [cells[:2] for cells in listed] == [promise.cells() for promise in promises.PROMISES]
    assert all(cells[2][0].isdigit() for cells in listed)
    for said in ("tests passed on 20", "Python 3.", "torch 2.", "CPU, with"):
        assert said in inside


@pytest.fixture
def promise():
    return promises.Promise("It holds", {"a.py": ("test_one", "test_two[x-1]"), "b.py": ("TestIt::test_three",)})


def test_a_promise_names_its_tests(promise):
    assert promise.ids() == ["tests/a.py::test_one", "tests/a.py::test_two[x-1]", "tests/b.py::TestIt::test_three"]
    assert promise.cells() == ["It holds", "`a.py`: `test_one`, `test_two[x-1]`; `b.py`: `TestIt::test_three`"]


def test_results_are_of_a_promises_own_cases(promise):
    tally = promises.Tally()

    def ended(case, when, outcome):
        tally.pytest_runtest_logreport(SimpleNamespace(nodeid=f"tests/{case}", when=when, outcome=outcome))

    for case in ("a.py::test_one[p]", "a.py::test_one[q]", "a.py::test_two[x-1]", "a.py::test_one_more"):
        for when in ("setup", "call", "teardown"):
            ended(case, when, "passed")
    assert tally.result(promise) == "3 of 3"
    ended("b.py::TestIt::test_three", "setup", "skipped")
    assert tally.result(promise) == "3 of 4, 1 skipped"
    ended("a.py::test_one[q]", "teardown", "failed")
    assert tally.result(promise) == "2 of 4, 1 failed, 1 skipped"
    ended("a.py::test_two[x-2]", "call", "failed")
    assert tally.result(promise) == "2 of 4, 1 failed, 1 skipped"
    ended("a.py::test_two[x-1]", "call", "failed")
    ended("a.py::test_two[x-1]", "teardown", "passed")
    assert tally.result(promise) == "1 of 4, 2 failed, 1 skipped"


def test_a_table_is_put_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\n<!-- y: begin -->\n<!-- y: end -->\n")
    for _ in range(2):  # the second time changes nothing
        pages.write_between(page, "x", pages.table(("a", "b"), [("1", "2")]))
        assert page.read_text() == (
            "before\n<!-- x: begin -->\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n<!-- x: end -->\n"
            "<!-- y: begin -->\n<!-- y: end -->\n"
        )
