"""benchmarks/claims.py: a plan of two tiny arms is run, skipped, shared among processes, reported from files."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # behind tests/, which has a families.py too
import claims

from latteflow.errors import UserError
from toys import toy_recipe

pytest.importorskip("matplotlib")
import claims_report


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def cheap_measures(self):
    return lambda pixels: {"frechet": float(pixels.float().std()), "accuracy": 0.5}


@pytest.fixture
def options(tmp_path, toy_set, parts, monkeypatch):
    """A plan of two arms and three seeds, of four steps each; drawings are looked at by nobody."""
    monkeypatch.setattr(claims.Case, "measures", property(cheap_measures))
    base = toy_recipe("generator", tmp_path, toy_set, parts=parts, steps=4, preview_every=2, checkpoint_every=2)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    plan = {
        "case": "toy",
        "title": "Toy",
        "base": "base.yaml",
        "judge": "nobody",
        "judge_figure": "accuracy",
        "drawings": {"number": 2, "steps": 4, "guidance_scale": 1.0, "real": 4},
        "arms": {
            "k2": {"label": "K = 2"},
            "k1": {"label": "K = 1", "overrides": ["generator.num_groups=1"], "flops_of": "k2"},
        },
        "claims": [{"line": "a", "says": "two beat one", "better": "k2", "than": "k1"}],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return Namespace(
        plans=[tmp_path / "plan.yaml"],
        overrides=[],
        only=None,
        threads=1,
        work=tmp_path / "work",
        results=tmp_path / "results" / "claims",
    )


def saved(options):
    return {file.stem: json.loads(file.read_text()) for file in sorted((options.results / "toy").glob("*-*.json"))}


def test_a_plan_is_run_skipped_and_reported(options, monkeypatch, capsys):
    options.only = ["k2"]
    with claims.taken(options.work / "toy" / "k2-1.lock") as mine:
        assert mine
        claims.run(options)  # another process has seed 1
    assert set(saved(options)) == {"k2-0", "k2-2"}
    options.only = None
    claims.run(options)
    runs = saved(options)
    assert set(runs) == {f"{arm}-{seed}" for arm in ("k2", "k1") for seed in range(3)}
    for seed in range(3):
        one, two = runs[f"k1-{seed}"], runs[f"k2-{seed}"]
        assert one["draws_sha256"] == two["draws_sha256"]
        # As many operations: K = 1 runs twice the layers, so half of the steps.
        assert (one["curve"][-1]["step"], two["curve"][-1]["step"]) == (2, 4)
        assert one["curve"][-1]["flops"] == pytest.approx(two["curve"][-1]["flops"], rel=0.1)
    assert not (options.work / "toy" / "k2-0" / "checkpoints").exists()
    assert runs["k2-0"]["made_with"]["threads"] == 1

    monkeypatch.setattr(claims, "run_trial", None)  # nothing is run again
    claims.run(options)

    readme = options.results.parent / "README.md"
    readme.write_text("before\n<!-- claims: begin -->\nold\n<!-- claims: end -->\nafter\n")
    claims_report.write_report(options.results, readme)
    page = (options.results.parent / "claims.md").read_text()
    for expected in ("### Seeds first: K = 2, 3 seeds", "(a) two beat one", "held-out loss", "**"):
        assert expected in page
    assert "old" not in readme.read_text()
    assert "two beat one" in readme.read_text()
    drawn = {file.name for file in options.results.parent.glob("*.png")}
    assert drawn == {f"claims-toy-{name}.png" for name in ("curves", "seeds", "gates")}
    assert "two beat one" in capsys.readouterr().out
    pages = [file for file in options.results.parent.iterdir() if file.suffix in (".md", ".png", ".svg")]
    written = {file.name: file.read_bytes() for file in pages}
    claims_report.write_report(options.results, readme)
    assert {file.name: file.read_bytes() for file in pages} == written


def test_overrides_may_be_of_one_case():
    given = ["train.steps=3", "toy:data.path=c:/x", "other:data.path=y", "data.path=a:b"]
    assert claims.overrides_of("toy", given) == ("train.steps=3", "data.path=c:/x", "data.path=a:b")


def test_mistakes_are_named(options, stored):
    options.only = ["k3"]
    with pytest.raises(UserError, match="no arm 'k3'; there is k2, k1"):
        claims.run(options)
    readme = stored.parent / "README.md"
    readme.write_text("nothing")
    with pytest.raises(UserError, match="has no line"):
        claims_report.write_report(stored, readme)


def run_of(arm, seed, loss, **changes):
    row = {"step": 4, "flops": 8.0, "processor_seconds": 1.0, "seen": loss, "loss": loss}
    end = {**row, **{f"loss/t-{k}": loss for k in range(8)}}
    return {
        "arm": arm,
        "seed": seed,
        "draws_sha256": f"{seed}",
        "curve": [{**end, "step": 2, "flops": 4.0}, end],
        "other_prompts": end,
        "gates": None,
        "drawings": {"frechet": 10 * loss, "accuracy": 1 - loss},
        "processor_seconds_of_measuring": 1.0,
        "recipe": {"train": {"steps": 4, "batch_size": 6, "learning_rate": 0.003}},
        "made_with": {"torch": "2", "processor": "x", "threads": 1, "date": "d", "commit": "c", "changed_since": False},
        **changes,
    }


@pytest.fixture
def stored(options):
    """Runs written by hand: K = 2 is better by about 0.1 in every seed."""
    folder = options.results / "toy"
    folder.mkdir(parents=True)
    plan = claims.load_plan(options.plans[0]).model_dump(mode="json", exclude={"base"})
    real = {"frechet": 1.0, "accuracy": 0.9}
    about = {"plan": plan, "pictures": {"train": 20, "heldout": 3}, "real": real, "through_autoencoder": real}
    claims.write_compact(folder / "case.json", {**about, "judge": {"heldout_accuracy": 0.91}})
    for seed in range(3):
        claims.write_compact(folder / f"k2-{seed}.json", run_of("k2", seed, 0.4 + 0.1 * seed))
        claims.write_compact(folder / f"k1-{seed}.json", run_of("k1", seed, 0.5 + 0.101 * seed))
    return options.results


def test_verdicts_are_of_the_saved_files_alone(stored):
    claims_report.write_report(stored, None)
    page = (stored.parent / "claims.md").read_text()
    assert "two beat one: **replicates** (-16.8% loss)" in page
    assert "0.101 (0.09852 to 0.1035)" in page
    assert "2 of 2 | 2 of 2" in page
    claims.write_compact(stored / "toy" / "k1-2.json", {"arm": "k1", "seed": 2, "diverged": "the loss is no number"})
    claims_report.write_report(stored, None)
    page = (stored.parent / "claims.md").read_text()
    assert "two beat one: not run" in page
    assert "Diverged: k1 seed 2: the loss is no number." in page


def test_runs_that_saw_other_samples_are_not_compared(stored):
    claims.write_compact(stored / "toy" / "k1-2.json", run_of("k1", 2, 0.5, draws_sha256="other"))
    with pytest.raises(UserError, match="runs of seed 2 did not see the same samples"):
        claims_report.write_report(stored, None)


def test_there_has_to_be_something_to_report(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        claims_report.write_report(tmp_path, None)
