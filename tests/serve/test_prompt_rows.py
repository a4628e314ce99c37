"""Prompts from files: what is a row, what is a bad one, and what is no such file."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from latteflow.errors import UserError
from latteflow.serve.deploy.prompt_rows import BadRow, PromptRow, read_rows

GOOD = [PromptRow(0, "a red circle", 10), PromptRow(1, "blue, green", 5), PromptRow(2, "grün", 12)]


def test_a_table_with_a_head(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text('name,prompt,seed\nx,a red circle,\ny,"blue, green",5\nz,grün,\n', encoding="utf-8-sig")
    assert read_rows(file, 10) == (GOOD, [])


def test_lines_of_json(tmp_path):
    file = tmp_path / "prompts.JSONL"
    file.write_text('{"prompt": "a red circle"}\n{"prompt": "blue, green", "seed": 5}\n{"prompt": "grün", "x": []}\n')
    assert read_rows(file, 10) == (GOOD, [])


def test_parquet(tmp_path):
    file = tmp_path / "prompts.parquet"
    rows = [{"prompt": row.prompt, "seed": 5 if row.row == 1 else None, "other": b"x"} for row in GOOD]
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    assert read_rows(file, 10) == (GOOD, [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("\ud800".encode("utf-8", "surrogatepass"), "no JSON"),
        ("3", "no object with a prompt"),
        ("{}", "no prompt"),
        ('{"prompt": " "}', "no prompt"),
        ('{"prompt": 3}', "no prompt"),
        (json.dumps({"prompt": "x" * 8001}), "a prompt of more than 8000 characters"),
        ('{"prompt": "x", "seed": -1}', "a seed that is not 0 to 2**63 - 1"),
        ('{"prompt": "x", "seed": 9223372036854775808}', "a seed that is not 0 to 2**63 - 1"),
        ('{"prompt": "x", "seed": true}', "a seed that is not 0 to 2**63 - 1"),
        ('{"prompt": "x", "seed": 1.5}', "a seed that is not 0 to 2**63 - 1"),
        ('{"prompt": "x", "seed": "one"}', "a seed that is not 0 to 2**63 - 1"),
    ],
)
def test_a_bad_row_is_told_apart(tmp_path, line, reason):
    file = tmp_path / "prompts.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    rows, bad = read_rows(file, 0)
    assert rows == [PromptRow(0, "a", 0), PromptRow(2, "c", 2)]
    assert bad == [BadRow(1, reason)]


def test_cells_that_do_not_fit_the_head(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,seed\na\nb,1,2\nc,3\n")
    assert read_rows(file, 0) == (
        [PromptRow(2, "c", 3)],
        [BadRow(0, "more or fewer cells than the head"), BadRow(1, "more or fewer cells than the head")],
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a", r"a.txt is of no kind that is read: give .csv, .jsonl, .parquet"),
        ("a.csv", b"words\na\n", "a.csv has no column 'prompt': it has words"),
        ("a.csv", b"", "a.csv has no column 'prompt': it has none"),
        ("a.csv", b"prompt\n\xff\n", r"a.csv cannot be read \(UnicodeDecodeError\)"),
        ("a.parquet", b"PAR1", r"a.parquet cannot be read \(ArrowInvalid\)"),
        ("a.jsonl", None, r"a.jsonl cannot be read \(FileNotFoundError\)"),
    ],
)
def test_what_is_no_such_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name, 0)
