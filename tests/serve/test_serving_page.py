"""docs/serving.md: its examples run, and its tables are what the code says."""

import re
from pathlib import Path

import pytest
import typer
from live import live

import toys
from latteflow.cli.main import app
from latteflow.serve.api.metrics import Metrics
from latteflow.serve.api.schemas import MOST_PICTURES, MOST_STEPS, ChatBody, ImageBody
from latteflow.serve.api.settings import MIB, PictureLimits, ServerSettings
from latteflow.serve.engine.engine import Engine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)


def rows(header):
    """Cells of all tables with that header."""
    tables = [rest.partition("\n\n")[0].splitlines()[2:] for rest in PAGE.split(header)[1:]]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for table in tables for line in table]


@pytest.fixture(scope="module")
def served():
    metrics = Metrics()
    with live(Engine(toys.toy_pipeline(), observer=metrics), ServerSettings(), metrics) as server:
        yield server


def test_the_examples_run_one_after_the_other(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(EXAMPLES)
    assert code.count("http://127.0.0.1:8000") == 1
    exec(compile(code.replace("http://127.0.0.1:8000", served.url), "serving.md", "exec"), {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["heart-0.png", "heart-1.png"]
    assert capsys.readouterr().out


def test_the_options_are_those_of_the_command():
    command = typer.main.get_command(app).commands["serve"]
    explained = {
        option: cells[2] for cells in rows("| option |") for option in re.findall(r"`(--[a-z-]+)[` ]", cells[0])
    }
    others = {"--model", "--device", "--dtype", "--quantize", "--compile", "--help", "--ray"}
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    assert set(explained) == {option for option in known if option[:2] == "--"} - others
    for param in command.params:
        told = explained.get(param.opts[0])
        if told is None or param.opts[0] in ("--host", "--port"):
            continue
        default = param.default() if callable(param.default) else param.default
        if default is None:
            assert told in ("none", "", "1", "off", "CPU=1")  # Ray's are settled later
        elif isinstance(default, bool):
            assert told == ("on" if default else "off")
        else:
            assert told == (default if isinstance(default, str) else f"{default:g}")


def test_the_fields_are_those_that_are_taken():
    told = {name for cells in rows("| field |") for name in re.findall(r"`([a-z_]+)`", cells[0])}
    ignored = {name for name, field in ImageBody.model_fields.items() if (field.description or "").startswith("Taken")}
    assert told == set(ImageBody.model_fields) - ignored - {"model"}
    for name in re.findall(r"`([a-z_]+)`", PAGE.partition("`stream`, `stream_options")[2].partition("do what they")[0]):
        assert name in ChatBody.model_fields
    for words in (f"1 to {MOST_PICTURES}; picture", f"1 to {MOST_STEPS:,}; 40"):
        assert words in PAGE


def test_the_bounds_are_those_that_hold():
    limits, settings = PictureLimits(), ServerSettings()
    megapixels = limits.total_pixels // 10**6
    assert f"at most {limits.count} a request, {limits.total_bytes // MIB} MiB and {megapixels} megapixels" in PAGE
    assert f"a body has at most {settings.max_body_bytes // MIB} MiB" in PAGE
    assert f"not come around its loop for {settings.max_silence:g} seconds" in " ".join(PAGE.split())


def test_the_codes_are_those_that_are_sent():
    source = "".join(file.read_text() for file in (ROOT / "src/latteflow/serve/api").glob("*.py"))
    for cells in rows("| status |"):
        for code in re.findall(r"`([a-z_]+)`", cells[1]):
            assert f'"{code}"' in source or code.startswith("engine_")


def test_the_metrics_are_those_that_are_counted(served):
    with served.http() as http:
        http.post("/v1/images/generations", json={"prompt": "x", "steps": 2})
        counted = set(re.findall(r"^# TYPE (\w+)", http.get("/metrics").text, re.MULTILINE))
    named = {name for cells in rows("| name |") for name in re.findall(r"`(latteflow_[a-z_]+)", cells[0])}
    assert named - {"latteflow_process_"} == {
        name for name in counted if not name.startswith("latteflow_process_") and not name.endswith("_created")
    }
