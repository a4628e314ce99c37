"""Groups on Ray: placed, stopped, replaced and merged, to the bits of one run of all groups."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from latteflow.errors import UserError
from latteflow.train import on_ray
from latteflow.train.build import build_stage
from latteflow.train.checkpoint import checkpoint_folders
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import train
from latteflow.train.on_ray import train_on_ray
from latteflow.train.recipe import Recipe, resolved
from toys import toy_recipe

HERE = Path(__file__).parent


@pytest.fixture
def recipe(tmp_path, toy_set, parts):
    """A recipe whose groups share no weight; returns the function that makes it."""

    def made(name="run", steps=200, generator=(), **settings):
        settings = {"log_every": 5, "preview_every": 999, "checkpoint_every": 20, "keep_checkpoints": 99, **settings}
        values = toy_recipe("generator", tmp_path / name, toy_set, parts=parts, steps=steps, **settings)
        values["generator"] |= {"num_groups": 2, "shared_io": False, **dict(generator)}
        return TypeAdapter(Recipe).validate_python(values)

    return made


def weights(folder):
    return {
        f"{part}/{name}": tensor
        for part in ("model", "ema")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }


def runs_on_ray(folder, *recipes):
    """Run ``ray_runs.py``; return what it prints, by run."""
    files = [folder / f"recipe-{number}.json" for number in range(len(recipes))]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(json.dumps(resolved(recipe)))
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE), str(HERE.parent)]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as place:  # sockets have short names
        done = subprocess.run(
            [sys.executable, HERE / "ray_runs.py", *files],
            env={**environment, "RAY_TMPDIR": place},
            capture_output=True,
            text=True,
            timeout=1800,  # on a busy machine, workers take a minute to start
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["run"]: line for line in lines}


@pytest.mark.slow
def test_groups_on_ray_leave_the_bits_of_one_run(recipe, tmp_path):
    """No room; a run that is stopped; the same again, with a worker killed in it; one of which a group diverges."""
    pytest.importorskip("ray")
    blown_up = recipe("diverging", generator={"groups": (1,)}, learning_rate=1e30, warmup_steps=0, checkpoint_every=1)
    blown_up = blown_up.model_copy(update={"output": f"{blown_up.output}/group-1"})
    with pytest.raises(TrainingDiverged):
        train(blown_up, build_stage(blown_up))
    found = runs_on_ray(tmp_path, recipe(), recipe("diverging", steps=20))

    assert found["no room"]["end"] == (
        "UserError: a group takes CPU=99, and no machine of Ray's has that (at most CPU=2): ask for less with "
        "--per-group"
    )
    assert found["stopped"]["end"] == "Stopped: stopped; start it again to go on from each group's last checkpoint"
    assert sorted(found["stopped"]["resumed"]) == [[0, 0], [1, 0]]
    assert found["killed"]["end"] == str(tmp_path / "run" / "final")
    assert (tmp_path / "run" / "group-1" / "killed").exists()
    assert sorted(step for group, step in found["killed"]["resumed"] if group == 1) == [40, 160]

    joint = recipe("joint")
    train(joint, build_stage(joint))
    for file in (tmp_path / "joint" / "final").rglob("*"):
        if file.is_file() and file.name != "recipe.json":
            twin = tmp_path / "run" / "final" / file.relative_to(tmp_path / "joint" / "final")
            assert twin.read_bytes() == file.read_bytes(), file
    expected = weights(checkpoint_folders(tmp_path / "joint")[-1])
    apart = [weights(checkpoint_folders(tmp_path / "run" / f"group-{group}")[-1]) for group in (0, 1)]
    assert not apart[0].keys() & apart[1].keys()
    assert apart[0].keys() | apart[1].keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in (apart[0] | apart[1]).items())

    assert found["diverging"]["end"].startswith("TrainingDiverged: group 1: step 2: the loss of group-1 is ")
    assert "group 0" not in found["diverging"]["end"]
    assert (tmp_path / "diverging" / "group-0" / "final").is_dir()
    assert not (tmp_path / "diverging" / "final").exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"group-0", "group-1", "final"}
    assert not (tmp_path / ".ray").exists()  # its secret is in no file


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The outputs that were trained, in place of training; ``trained.mistake`` is raised by it."""

    class Trained(list):
        mistake = None

    seen = Trained()

    def pretend(recipe, stage, watch):
        seen.append(recipe.output)
        watch("progress")
        if seen.mistake is not None:
            raise seen.mistake
        final = Path(recipe.output) / "final"
        final.mkdir(parents=True, exist_ok=True)
        (final / "recipe.json").write_text(json.dumps(resolved(recipe)))

    monkeypatch.setattr(on_ray, "train", pretend)
    monkeypatch.setattr(on_ray, "build_stage", lambda recipe: None)
    monkeypatch.chdir(tmp_path)
    return seen


def test_a_group_that_is_trained_is_not_trained_again_unless_the_recipe_has_changed(recipe, trained, tmp_path):
    told = []
    assert on_ray._train(recipe(), str(tmp_path), told.append) is None
    assert on_ray._train(recipe(), str(tmp_path), told.append) is None
    assert trained == [recipe().output]
    assert told == ["progress"]
    on_ray._train(recipe(steps=300), str(tmp_path), told.append)
    assert len(trained) == 2


@pytest.mark.parametrize("mistake", [UserError("no data"), TrainingDiverged("step 3"), OSError("full")])
def test_what_would_go_wrong_again_is_handed_back(recipe, trained, tmp_path, mistake):
    trained.mistake = mistake
    assert on_ray._train(recipe(), str(tmp_path), lambda now: None) is mistake
    missing = on_ray._train(recipe(), str(tmp_path / "elsewhere"), lambda now: None)
    assert "elsewhere" in str(missing)
    trained.mistake = RuntimeError("a worker's own")
    with pytest.raises(RuntimeError):
        on_ray._train(recipe(), str(tmp_path), lambda now: None)


def test_a_groups_recipe_is_the_whole_one_with_its_own_output(recipe):
    whole = recipe()
    apart = on_ray._apart(whole)
    assert [alone.output for alone in apart] == [f"{whole.output}/group-0", f"{whole.output}/group-1"]
    assert [alone.generator.groups for alone in apart] == [(0,), (1,)]
    for alone in apart:
        assert alone.model_copy(update={"output": whole.output, "generator": whole.generator}) == whole
        assert TypeAdapter(Recipe).validate_python(resolved(alone)) == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_io": True}, r"only where they share no weight: set generator\.shared_io=false"),
        ({"groups": [1]}, r"leave generator\.groups out"),
        ({"lora": {"rank": 2}}, r"adapters .* are not merged: train each group's without Ray, with generator\.groups="),
    ],
)
def test_what_cannot_be_trained_apart_is_refused(recipe, changes, message):
    with pytest.raises(UserError, match=message):
        train_on_ray(recipe(generator=changes))


def test_other_stages_are_refused(tmp_path, toy_set):
    recipe = TypeAdapter(Recipe).validate_python(toy_recipe("autoencoder", tmp_path, toy_set))
    with pytest.raises(UserError, match="only a generator's groups are trained apart: this is stage autoencoder"):
        train_on_ray(recipe)


def test_a_group_has_to_fit_on_one_machine(monkeypatch):
    ray = pytest.importorskip("ray")
    machines = [{"CPU": 8, "GPU": 2}, {"CPU": 3, "GPU": 4}, {"CPU": 64}]
    nodes = [{"Alive": True, "Resources": has} for has in machines]
    nodes.append({"Alive": False, "Resources": {"CPU": 999, "GPU": 99}})
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert on_ray._room({"CPU": 1, "GPU": 1}) == 5
    assert on_ray._room({"CPU": 4, "GPU": 1}) == 2
    assert on_ray._room({"CPU": 4}) == 18
    assert on_ray._room({"GPU": 0.5}) == 12
    with pytest.raises(UserError, match=r"takes CPU=9,GPU=1, and no machine .* \(at most CPU=64,GPU=4\): ask for less"):
        on_ray._room({"CPU": 9, "GPU": 1})
    with pytest.raises(UserError, match=r"\(at most cpu=0\)"):
        on_ray._room({"cpu": 1})
