"""Two processes are one: in losses, weights, averages and state; what stops one of them stops both."""

import copy
import itertools
import json
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from test_loop import recipe as regression_recipe

from latteflow.train.checkpoint import checkpoint_folders
from toys import toy_recipe

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "fsdp2")
BY_ONE_FIRST = ("stopped at one, resumed by two", "muon")
SAME = (
    "regression",
    "mixed groups",
    "groups accumulated",
    "groups without samples",
    "one group",
    "stopped at two, resumed by one",
    *BY_ONE_FIRST,
)


def regression(output, **train):
    settings = {"steps": 8, "batch_size": 6, "checkpoint_every": 4, "preview_every": 8, **train}
    recipe = regression_recipe(output, **settings)
    return {"stage": "regression", "recipe": recipe.model_dump(mode="json")}


def jobs_of(output, strategy, toy_set, parts):
    """What two processes are to do, by name."""

    def generator(name, train=None, /, **settings):
        own = {"steps": 4, "learning_rate": 3e-4, "log_every": 1, "preview_every": 4, "checkpoint_every": 4}
        own |= {"strategy": strategy, **(train or {})}
        recipe = toy_recipe("generator", output / name, toy_set, parts=parts, **own)
        recipe["generator"] |= settings
        return {"stage": "generator", "recipe": recipe}

    def plain(name, **train):
        return regression(output / name, strategy=strategy, **train)

    apart = {"num_groups": 4, "shared_io": False}
    return {
        "regression": plain("regression"),
        # Two samples a process: each has none of two of the groups. A preview comes between two steps.
        "mixed groups": generator("mixed", {"batch_size": 4, "preview_every": 2}, num_groups=4),
        "groups accumulated": generator("accumulated", {"batch_size": 6, "gradient_accumulation_steps": 2}, **apart),
        "groups without samples": generator("few", {"batch_size": 2}, **apart),
        "one group": generator("one", {"batch_size": 6}, **apart, groups=[2]),
        "half precision": generator("half", {"mixed_precision": "bf16"}, num_groups=4),
        "stopped at two, resumed by one": {
            **generator("first", {"checkpoint_every": 2}, num_groups=4),
            "stop_after": 2,
        },
        "stopped at one, resumed by two": generator("second", {"checkpoint_every": 2}, num_groups=4),
        "muon": generator("muon", {"checkpoint_every": 2, "optimizer": "muon", "weight_decay": 0.1}, num_groups=4),
        "nan": {**plain("nan"), "poisoned_ranks": [1], "poisoned_calls": [4]},
        "nan left out": {**plain("left-out", nonfinite="skip"), "poisoned_ranks": [1], "poisoned_calls": [4]},
        "terminated": {**plain("terminated"), "terminate": [1, 2]},
        "odd": plain("odd", batch_size=5),
        "full disk": {**plain("full"), "failing_saves": [1, 2]},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy_set, parts):
    """Everything is run once: (jobs, outcomes of two processes, outcomes of one), by (strategy, name)."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        (strategy, name): job
        for strategy in STRATEGIES
        for name, job in jobs_of(folder / strategy, strategy, toy_set, parts).items()
    }
    for strategy, name in itertools.product(STRATEGIES, BY_ONE_FIRST):
        assert processes.run({**jobs[strategy, name], "stop_after": 2})["error"][0] == "Interrupted"
    steps = {"stage": "muon steps", "state": str(folder / "muon.pt"), "keep": 2, "last": 4}
    one = {"muon steps": processes.run({**steps, "first": 0})}
    steps.pop("keep")
    jobs |= {("muon steps", first): {**steps, "first": first} for first in (0, 2)}
    two = dict(zip(jobs, processes.together(list(jobs.values()), folder / "logs"), strict=True))
    for name in (*SAME, "half precision"):
        job = copy.deepcopy(jobs["ddp", name])
        job.pop("stop_after", None)
        job["recipe"]["output"] += "-by-one"
        one[name] = processes.run(job)
        jobs["one", name] = job
    return jobs, two, one


def state(job):
    """Weights, averages and optimizer of the newest checkpoint."""
    folder = checkpoint_folders(Path(job["recipe"]["output"]))[-1]
    assert folder.name.endswith(f"{job['recipe']['train']['steps']}")
    found = {f"model/{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    found |= {f"ema/{name}": tensor for name, tensor in load_file(folder / "ema.safetensors").items()}
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]
    for number, part in enumerate(optimizer.get("parts", [optimizer])):
        entries = [(key, n, tensor) for n, each in part["state"].items() for key, tensor in each.items()]
        found |= {f"{key}/{n}" + (f"/{number}" if number else ""): tensor for key, n, tensor in entries}
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SAME)
def test_two_processes_are_one(runs, strategy, name):
    jobs, two, one = runs
    theirs, mine = two[strategy, name], one[name]
    if name == "stopped at two, resumed by one":
        assert [outcome["error"][0] for outcome in theirs] == ["Interrupted"] * 2
        again = processes.run({k: v for k, v in jobs[strategy, name].items() if k != "stop_after"})
        assert again["error"] is None
        losses = theirs[0]["losses"] + again["losses"]
    else:
        assert [outcome["error"] for outcome in theirs] == [None] * 2
        assert theirs[0]["losses"] == theirs[1]["losses"]
        losses = theirs[0]["losses"]
    expected = mine["losses"][2:] if name in BY_ONE_FIRST else mine["losses"]
    # Muon rounds gradients to bfloat16 and makes small parts of them large: a last bit may show. See its own test.
    near = 1e-4 if name == "muon" else 1e-6
    assert losses == pytest.approx(expected, rel=near, abs=near)
    found, expected = state(jobs[strategy, name]), state(jobs["one", name])
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=near, atol=near, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("first", [0, 2])
def test_muon_takes_the_same_steps_with_sharded_matrices(runs, first):
    """Of given gradients; from the start, and going on with what one process has left."""
    _, two, one = runs
    for process in two["muon steps", first]:
        for found, expected in zip(process["weights"], one["muon steps"]["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_figures_are_of_all_processes(runs, strategy):
    """Each process has two of the four groups' samples."""
    _, two, one = runs
    for theirs, mine in zip(two[strategy, "mixed groups"][0]["figures"], one["mixed groups"]["figures"], strict=True):
        assert {f"loss/group-{group}" for group in range(4)} < theirs.keys()
        assert theirs == pytest.approx(mine, rel=1e-5)


def test_what_two_processes_export_is_whole(runs):
    jobs, _, _ = runs
    finals = [Path(jobs[by, "mixed groups"]["recipe"]["output"]) / "final" for by in ("one", *STRATEGIES)]
    expected, *found = [load_file(final / "transformer" / "diffusion_pytorch_model.safetensors") for final in finals]
    for weights in found:
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_times_are_not_rounded_with_the_weights(runs, strategy):
    _, two, one = runs
    theirs = two[strategy, "half precision"]
    assert [outcome["times"] for outcome in theirs] == [["torch.float32"]] * 2
    assert theirs[0]["losses"] == pytest.approx(one["half precision"]["losses"], rel=1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_no_number_in_one_process_stops_both_before_the_update(runs, strategy):
    jobs, two, _ = runs
    theirs = two[strategy, "nan"]
    assert [outcome["error"][0] for outcome in theirs] == ["TrainingDiverged"] * 2
    assert all(outcome["error"][1].startswith("step 4: the loss is ") for outcome in theirs)
    assert "the loss is nan" in theirs[1]["error"][1]
    assert all(len(outcome["losses"]) == 3 and outcome["sum"] == outcome["sum after"] for outcome in theirs)
    folder = Path(jobs[strategy, "nan"]["recipe"]["output"])
    assert sorted(file.name for file in (folder / "nonfinite").iterdir()) == [
        f"step-00000004-all-process-{rank}.json" for rank in (0, 1)
    ]
    told = [json.loads(file.read_text()) for file in sorted((folder / "nonfinite").iterdir())]
    samples = [i for each in told for part in each["parts"] for i in part["places"]]
    assert samples == list(range(6))
    assert not checkpoint_folders(folder)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_no_number_in_one_process_is_left_out_by_both(runs, strategy):
    jobs, two, _ = runs
    theirs = two[strategy, "nan left out"]
    assert [outcome["error"] for outcome in theirs] == [None] * 2
    steps = {int(tensor) for key, tensor in state(jobs[strategy, "nan left out"]).items() if key.startswith("step/")}
    assert steps == {7}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sigterm_to_one_process_makes_both_save_and_stop(runs, strategy):
    jobs, two, _ = runs
    assert [outcome["error"] for outcome in two[strategy, "terminated"]] == [
        ["Stopped", "stopped after step 3 of 8, saved; start it again to go on"]
    ] * 2
    job = jobs[strategy, "terminated"]
    assert [folder.name for folder in checkpoint_folders(Path(job["recipe"]["output"]))] == ["step-00000003"]
    assert processes.run(job)["error"] is None
    found, expected = state(job), state(jobs["one", "regression"])
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_full_disk_of_the_first_process_is_everyones(runs, strategy):
    """The save of step 4 fails and training goes on; the last one fails and nobody waits for it."""
    jobs, two, _ = runs
    first, second = two[strategy, "full disk"]
    assert first["error"][0] == second["error"][0] == "OSError"
    assert "step-00000008 cannot be written: no space left" in first["error"][1]
    assert second["error"][1] == "the first process cannot save step 8"
    assert len(first["losses"]) == 7
    assert not checkpoint_folders(Path(jobs[strategy, "full disk"]["recipe"]["output"]))


def test_a_batch_that_does_not_divide_is_refused(runs):
    jobs, two, _ = runs
    for strategy in STRATEGIES:
        refused = ["UserError", "batch_size 5 does not divide among 2 processes"]
        assert [outcome["error"] for outcome in two[strategy, "odd"]] == [refused] * 2
        assert not Path(jobs[strategy, "odd"]["recipe"]["output"]).exists()
