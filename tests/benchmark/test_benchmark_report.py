"""Pages from fixed numbers, the folder of results, and the command's mistakes."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from toy_cases import CPU, case_of

from latteflow.benchmark import curves, emoji, paper, plots, report, run, startup, whole
from latteflow.benchmark.curves import Curve
from latteflow.benchmark.limits import Limits, limits_page
from latteflow.benchmark.measure import Timing
from latteflow.benchmark.paper import Row
from latteflow.benchmark.report import Page, Settings, large, seconds, spread, table
from latteflow.benchmark.whole import Whole
from latteflow.errors import UserError
from latteflow.models.compilation import compile_groups, runs_compiled
from toys import toy_pipeline

SETTINGS = Settings(CPU, torch.bfloat16, 2)
LIMITS = Limits(matrix_rate=1e9, copy_bandwidth=2e9, read_bandwidth=1e9)


def rows_of(markdown, title):
    """The cells of the table under a heading, by its first column."""
    section = markdown.split(f"## {title}\n\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines()]
    return {row[0]: row[1:] for row in cells[2:]}


def test_numbers_are_written_with_the_figures_that_count():
    assert [seconds(value) for value in (0.000123, 0.0456, 0.5, 1.234, 45.67, 123.4, 0.0)] == [
        "0.000123",
        "0.0456",
        "0.500",
        "1.23",
        "45.67",
        "123",
        "0.000",
    ]
    assert [large(value) for value in (12, 1234, 8.47e10, 3.99e15)] == ["12", "1.23k", "84.7G", "3.99P"]
    assert spread(Timing((1.0, 2.0, 3.0))) == "1.00 to 3.00 (3)"
    assert table(("a", "b"), [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |"


@pytest.fixture
def page():
    """The paper's page of three models with times that were not measured."""
    whole_janus, whole_ours = Whole(9, 1.0, 50.0, 9.0, 4 * 10**9), Whole(9, 2.0, 4.0, 4.0, 8 * 10**9)
    times = {"k4": 0.1, "k1": 0.4, "janus": 0.2, "bagel": 0.5}
    wholes = {"k4": whole_ours, "k1": "not run", "janus": whole_janus, "bagel": "too large"}
    rows = {
        name: Row(case_of(name), {"eager": 0.1, "compiled": float("inf")}, Timing((value,) * 12), wholes[name])
        for name, value in times.items()
    }
    return rows, paper.body(rows, {"k4": Timing((0.08,))}, LIMITS, SETTINGS)


def test_ratios_are_of_denoising_and_of_whole_pictures(page):
    ratios = rows_of(page[1], "Ratios")
    # 10 steps of 0.1 s; Janus 16 tokens of 0.2 s; BAGEL 45.5 steps of 4 times 0.5 s
    assert ratios["denoising, LaTtE-Flow, K = 1 (Vanilla, LMFusion-shaped) over K = 4"] == ["4.00x"]
    assert ratios["denoising, Janus-Pro-1B over K = 4"] == ["3.20x"]
    assert ratios["denoising, BAGEL-7B-shaped over K = 4"] == ["91.00x"]
    assert ratios["whole picture of Janus-Pro-1B over denoising, K = 4"] == ["60.00x"]
    assert ratios["whole picture of Janus-Pro-1B over that of K = 4"] == ["6.00x"]
    assert ratios["a step over its bare matrix products, LaTtE-Flow, K = 2"] == ["1.250x"]


def test_rows_hold_seconds_tokens_steps_passes_and_resolution(page):
    speeds = rows_of(page[1], "Denoising")
    janus = ["32x32", "16", "16", "2", "0.200", "0.200 to 0.200 (12)", "all", "3.20", "0.200", "eager 0.100"]
    assert speeds["Janus-Pro-1B"] == janus
    assert speeds["BAGEL-7B-shaped"][:5] == ["256x256", "16", "50", "2", "0.500"]
    assert speeds["BAGEL-7B-shaped"][6:9] == ["1 / 4", "91.00", "5.69"]


def test_costs_are_held_against_the_limits(page):
    rows, text = page
    case, cells = rows["bagel"].case, rows_of(text, "Operations, bytes and the limits")["BAGEL-7B-shaped"]
    assert cells[2] == large(case.step_flops)
    assert cells[5] == f"{large(case.step_flops / 2)}FLOP/s ({case.step_flops / 2 / 1e9:.0%})"
    assert cells[6] == f"{large(case.weight_bytes / 2)}B/s ({case.weight_bytes / 2 / 1e9:.0%})"
    assert "Limits measured beside: matrix products 1GFLOP/s, copies 2GB/s" in text


def test_whole_pictures_or_why_there_is_none(page):
    wholes = rows_of(page[1], "One whole picture")
    assert wholes["Janus-Pro-1B"] == ["60.00", "1.00", "50.00", "9.00", "4GB"]
    assert wholes["BAGEL-7B-shaped"][0] == "too large"


def test_a_page_says_its_conditions():
    text = Page("x", "Title", "How.", "Body.").text(SETTINGS, load=0.25, seconds=61)
    assert text.startswith("# Title\n\n`latteflow benchmark x --steps 40 --threads 2 --dtype bfloat16 --device cpu`\n")
    assert f"torch {torch.__version__}" in text
    assert "2 threads. Load average before the run: 0.2 " in text
    assert "the page took 61 s" in text
    assert "--quick" not in text
    text = Page("x", "Title", "How.", "Body.", torch.float32).text(SETTINGS, load=0.25, seconds=61)
    assert "--threads 2 --dtype float32 --device cpu" in text
    quick = Page("x", "Title", "How.", "Body.").text(Settings(CPU, torch.float32, 1, quick=True), load=0, seconds=1)
    assert "for a look, not figures to quote" in quick


@pytest.fixture
def watched(monkeypatch):
    """Every benchmark replaced by its name."""
    seen = []

    def page(name):
        def measure(settings, watch=None):
            seen.append(name)
            made = Page(name, f"Title of {name}", f"How {name} was made.", "Body.")
            return (made, []) if name == "curves" else made

        return measure

    for name in run.NAMES:
        monkeypatch.setattr(run, f"{name}_page", page(name))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return seen


@pytest.mark.parametrize("quick", [False, True])
def test_all_are_run_where_none_is_named_and_a_readme_lists_them(watched, tmp_path, quick):
    settings = Settings(CPU, torch.float32, 1, quick=quick)
    files = run.run_benchmarks((), settings, tmp_path, plots=False, watch=lambda message: None)
    assert watched == list(run.NAMES)
    assert [file.name for file in files] == [*(f"{name}.md" for name in run.NAMES), "README.md"]
    text = (tmp_path / "README.md").read_text()
    for name in run.NAMES:
        assert f"| [{name}.md]({name}.md) | Title of {name} | How {name} was made. |" in text


def test_pages_of_earlier_runs_stay_in_the_readme(watched, tmp_path):
    run.run_benchmarks(["paper"], SETTINGS, tmp_path, plots=True, watch=lambda message: None)
    run.run_benchmarks(["limits"], SETTINGS, tmp_path, plots=True, watch=lambda message: None)
    assert watched == ["paper", "limits"]
    assert "[paper.md]" in (tmp_path / "README.md").read_text()


def test_curves_need_matplotlib_before_anything_is_measured(watched, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'latteflow\[plots\]', or give --no-plots"):
        run.run_benchmarks((), SETTINGS, tmp_path, plots=True, watch=lambda message: None)
    assert watched == []
    run.run_benchmarks(["curves"], SETTINGS, tmp_path, plots=False, watch=lambda message: None)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the extra is not installed")
def test_curves_are_drawn(tmp_path):
    lines = {"K = 4": {1: Timing((0.1,)), 2: Timing((0.2, 0.3))}}
    plots.plot_curves([Curve("batch", "Title", lines)] * 2, tmp_path / "x.png", "note")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_curves_measure_every_point_in_turns(monkeypatch):
    asked = []

    def interleaved(turns, **settings):
        asked.append(list(turns))
        return {name: Timing((1.0,)) for name in turns}

    small = type("Preset", (), {"num_layers": 28, "picture_size": 256})
    monkeypatch.setattr(curves, "preset", lambda name: small)
    monkeypatch.setattr(curves.ours, "build_vanilla", lambda *given: "vanilla")
    monkeypatch.setattr(curves.ours, "regrouped", lambda vanilla, groups: groups)
    monkeypatch.setattr(curves, "_case", lambda *given, **settings: case_of("bagel"))
    monkeypatch.setattr(curves, "interleaved", interleaved)
    page, measured = curves.curves_page(SETTINGS, lambda message: None)
    groups, batches, sizes, steps = asked
    assert groups == [f"one picture|{k}" for k in (1, 2, 4, 7, 14, 28)]
    assert batches[:7] == [f"K = 4|{batch}" for batch in (1, 2, 4, 8, 16, 32, 64)]
    assert sizes[-3:] == [f"K = 1 (Vanilla)|{size}" for size in (256, 512, 1024)]
    assert len(steps) == 2 * len(curves.STEPS)
    assert [curve.axis for curve in measured] == ["K", "batch", "pixels a side", "steps"]
    assert "| K = 4 | 64 | 1.00 | 1.00 to 1.00 (1) |" in page.body


def test_limits_and_fresh_processes(monkeypatch):
    quick = Settings(CPU, torch.float32, 1, steps=2, quick=True)
    assert "FLOP/s, weights at" in limits_page(quick).body
    monkeypatch.setattr(startup, "run_once", lambda command: float(len(command)))
    monkeypatch.setattr(startup, "_OPTIONAL", ("torch", "no-such-package"))
    page = startup.startup_page(quick, lambda message: None)
    assert "| fresh process to PNG beyond `import torch, diffusers, transformers` | 6.00 |" in page.body
    assert f"torch {torch.__version__}, no-such-package (not installed)." in page.made


class TestEmoji:
    QUICK = Settings(CPU, torch.bfloat16, 1, steps=2, quick=True)

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(emoji, "BATCHES", (1, 2))
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def page(self, monkeypatch, backend):
        monkeypatch.setattr(emoji, "compile_groups", lambda replica: compile_groups(replica, backend=backend))
        return emoji.emoji_page(self.QUICK, lambda message: None)

    def test_cases_take_turns_compiled_and_as_they_are_over_the_same_products(self, monkeypatch):
        page = self.page(monkeypatch, "eager")
        for case in ("K = 4, batch 1", "K = 4, compiled, batch 1", "K = 1 (Vanilla), batch 2", emoji.BARE):
            assert f"| {case} |" in page.body
        assert "| the same, compiled |" in page.body
        assert "Compiled is after `pipe.compile()`" in page.made
        assert "--dtype float32 " in page.text(self.QUICK, load=0.0, seconds=1.0)

    def test_without_a_compiler_there_is_no_such_case(self, monkeypatch):
        def broken(*_):
            raise RuntimeError("no compiler")

        page = self.page(monkeypatch, broken)
        assert "compiled" not in page.body
        assert "There is no compiler on this machine." in page.made

    def test_the_twin_holds_the_same_weights_and_leaves_the_model_as_it_is(self, monkeypatch):
        monkeypatch.setattr(emoji, "compile_groups", lambda replica: compile_groups(replica, backend="eager"))
        replica = toy_pipeline(2).transformer
        twin = emoji.compiled_twin_of(replica)
        assert runs_compiled(twin)
        assert not runs_compiled(replica)
        assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in replica.parameters()]

    def test_ratios_are_of_medians_and_of_the_shortest(self):
        times = {
            "K = 4, batch 1": Timing((1.0, 2.0, 4.0)),
            "K = 4, compiled, batch 1": Timing((1.0, 1.0, 1.0)),
            "K = 1 (Vanilla), batch 1": Timing((8.0, 8.0, 8.0)),
            "K = 4, batch 16": Timing((16.0, 32.0, 64.0)),
            emoji.BARE: Timing((0.5, 1.0, 4.0)),
        }
        text = emoji.body(times, "K = 4")
        assert "| K = 4, batch 16 | 32.00 | 16.00 to 64.00 (3) | 16.00 | 2.00 |" in text
        assert "| one picture over its own bare matrix products | 2.00x | 2.00x |" in text
        assert "| the same, compiled | 1.00x | 2.00x |" in text
        assert "| Vanilla (K = 1) over one expert a step, one picture | 4.00x | 8.00x |" in text


def test_a_failed_process_is_one_line():
    with pytest.raises(UserError, match="failed: ValueError: no"):
        startup.run_once([sys.executable, "-c", "raise ValueError('no')"])


def test_a_whole_picture_comes_back_from_its_process(monkeypatch, tmp_path):
    def process(command, **settings):
        monkeypatch.setattr(paper, "BUILDERS", {"bagel": lambda settings, whole: case_of("bagel")})
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        exec(command[2])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(whole.subprocess, "run", process)
    taken = whole.whole_in_process("bagel", SETTINGS, compiled=False)
    assert taken.denoise > 0
    assert taken.peak_bytes > 10**7


def test_a_process_that_fails_says_why(monkeypatch):
    done = type("Done", (), {"returncode": -9, "stderr": ""})
    monkeypatch.setattr(whole.subprocess, "run", lambda *given, **settings: done)
    with pytest.raises(UserError, match=r"whole picture of k4 did not succeed \(exit code -9\): no memory"):
        whole.whole_in_process("k4", SETTINGS, compiled=False)


def test_report_needs_no_name_of_a_processor():
    assert report.processor_name()
    assert json.dumps(report.conditions(SETTINGS))
