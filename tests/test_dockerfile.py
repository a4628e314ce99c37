"""The Dockerfile and what it builds from, read: no engine to build it is needed, and none was at hand."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions(text):
    """(name, the rest) of each instruction; comments and continued lines are put right."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
ALL = instructions(TEXT)
STARTS = [i for i, (name, _) in enumerate(ALL) if name == "FROM"]
BUILD, RUNTIME = ALL[STARTS[0] : STARTS[1]], ALL[STARTS[1] :]


def of(stage, name):
    return [rest for named, rest in stage if named == name]


def test_instructions_are_read():
    assert instructions("# x\nRUN a \\\n  # no\n    b\n\nUSER 1\n") == [("RUN", "a b"), ("USER", "1")]


def test_what_was_built_is_copied_into_a_stage_without_the_source():
    assert len(STARTS) == 2
    assert of(RUNTIME, "COPY") == ["--from=build /opt/latteflow /opt/latteflow"]
    assert all(re.search(r":.*\d|\$\{PYTHON\}-slim", base) for base in of(ALL, "FROM"))


def test_torch_is_chosen_by_one_argument_and_versions_are_ours():
    assert "TORCH_INDEX=" in of(BUILD, "ARG")
    installs = [command for run in of(BUILD, "RUN") for command in re.findall(r"pip install [^;]*", run)]
    assert len(installs) == 2
    assert '--index-url "$TORCH_INDEX"' in installs[0]
    assert all("--constraint constraints.txt" in command for command in installs)


def test_it_runs_as_a_numbered_user_other_than_root():
    assert [int(user) > 0 for user in of(RUNTIME, "USER")] == [True]
    assert any(f"--uid {of(RUNTIME, 'USER')[0]}" in run for run in of(RUNTIME, "RUN"))


def test_it_serves_and_says_whether_it_lives():
    assert json.loads(of(RUNTIME, "ENTRYPOINT")[0]) == ["latteflow", "serve", "--host", "0.0.0.0", "--port", "8000"]
    assert of(RUNTIME, "EXPOSE") == ["8000"]
    (check,) = of(RUNTIME, "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    compile(command[2], "healthcheck", "exec")
    assert "http://127.0.0.1:8000/livez" in command[2]


def test_no_secret_is_built_in():
    named = " ".join(of(ALL, "ENV") + of(ALL, "ARG")).upper()
    assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)\w*=", named)
    assert "ADD" not in {name for name, _ in ALL}


def reaches_the_builder(path, rules):
    """Whether Docker hands a path to the builder: the last rule that fits says."""
    kept = True
    for rule in rules:
        pattern = rule.lstrip("!")
        fits = (
            any(fnmatch(part, pattern.removeprefix("**/")) for part in path.split("/"))
            if "**/" in pattern
            else (fnmatch(path.split("/")[0], pattern))
        )
        if fits:
            kept = rule.startswith("!")
    return kept


def test_the_builder_gets_what_is_copied_and_nothing_else():
    text = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    rules = [line for line in text.splitlines() if line and not line.startswith("#")]
    copied = {path for rest in of(BUILD, "COPY") for path in rest.split()[:-1]}
    assert all((ROOT / path).exists() for path in copied)
    assert {path for path in copied if reaches_the_builder(path, rules)} == copied
    given = {path.name for path in ROOT.iterdir() if reaches_the_builder(path.name, rules)}
    assert given == copied
    assert not reaches_the_builder("src/latteflow/__pycache__/errors.pyc", rules)
