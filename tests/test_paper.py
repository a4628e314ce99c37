"""docs/paper.md: every file and every test that it names is there, and every row says what evidence there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper.md"
COLUMNS = ["element", "where", "tests", "decision", "evidence"]
EVIDENCE = re.compile(
    r"\([a-f]\)(, \([a-f]\))*(: .+)?|the tests|not tried yet|(speed )?measured on a CPU: \[paper\.md\]\(\S+\)"
)


def tables(text):
    """The rows of every table, headings left out."""
    rows = []
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            assert len(cells) == len(COLUMNS), line
            if cells != COLUMNS and set(cells) != {"---"}:
                rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


TEXT = PAGE.read_text(encoding="utf-8")
ROWS = tables(TEXT)


def missing_files(text, folder):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links
    return [link for link in links if not (folder / link).is_file()]


def test_every_file_is_there():
    assert missing_files(TEXT, PAGE.parent) == []
    assert missing_files("[x](paper.md) [y](no.md) [z](https://a.b)", PAGE.parent) == ["no.md"]


def test_links_to_sources_say_where_they_lead():
    for said, link in re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", TEXT):
        assert link.endswith(said), (said, link)


def test_every_test_is_collected():
    found = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row["tests"])}
    assert len(found) > 40
    assert all(re.fullmatch(r"[\w/]+\.py::[\w:]+", name) for name in found)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", ""]
    done = subprocess.run(
        [*command, *sorted(f"tests/{name}" for name in found)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = {line.split("[")[0] for line in done.stdout.splitlines()}
    assert {f"tests/{name}" for name in found} <= collected


def test_every_row_says_where_it_is_and_what_evidence_there_is():
    assert len(ROWS) > 30
    for row in ROWS:
        assert row["element"], row
        assert EVIDENCE.fullmatch(row["evidence"]), row
        assert row["evidence"] != "the tests" or row["tests"], row
        if row["tests"]:
            assert "](" in row["where"], row


def test_every_experiment_is_the_evidence_of_something():
    named = set(re.findall(r"\(([a-f])\)", " ".join(row["evidence"] for row in ROWS)))
    assert named == set("abcdef")


def test_all_sources_of_the_papers_three_ideas_are_named():
    for file in ("flow/intervals.py", "models/transformer.py", "nn/residual_attention.py"):
        assert any(f"`{file}`" in row["where"] for row in ROWS)
