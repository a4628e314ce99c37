"""Runs that several real processes share, started the way torchrun starts them.

A job is a dictionary: ``stage``, ``recipe``, and what is to happen in it. ``run`` does one in this process;
``together`` does several, one after the other, in new processes, which import torch once.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from pydantic import TypeAdapter
from test_loop import Regression, failing_saves
from torch import nn

from latteflow.data.loader import generator_of
from latteflow.errors import UserError
from latteflow.train import checkpoint
from latteflow.train.build import build_stage
from latteflow.train.distributed import like, load_whole, shard, sharded_optimizer_state, whole, whole_state
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import Stopped, train
from latteflow.train.optimizer import build_optimizer
from latteflow.train.recipe import Recipe, TrainSection

HERE = Path(__file__).parent


class Interrupted(Exception):
    """Stands for the user's Ctrl-C."""


def run(job: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    """Train as a job says; return each step's loss and figures, sums that tell weights apart, and how it ended."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    if job["stage"] == "muon steps":
        return muon_steps(job)
    recipe = TypeAdapter(Recipe).validate_python(job["recipe"])
    stage = Regression(outputs=3, noise=0.5) if job["stage"] == "regression" else build_stage(recipe)
    if rank in job.get("poisoned_ranks", ()):
        poison(stage, job["poisoned_calls"])
    if rank == 0 and "failing_saves" in job:
        checkpoint.save_file = failing_saves(*job["failing_saves"])
    outcome: dict[str, Any] = {"losses": [], "figures": [], "error": None, "times": record_times(stage)}

    def watch(progress):
        outcome["losses"].append(progress.loss)
        speeds = ("samples_per_second", "mfu")
        figures = {name: value for name, value in progress.figures.items() if name not in speeds}
        outcome["figures"].append(figures)
        outcome["sum"] = sum(float(local(p).abs().sum()) for p in stage.model.parameters())
        if progress.step == job.get("stop_after"):
            raise Interrupted
        if (rank, progress.step) == tuple(job.get("terminate", ())):
            os.kill(os.getpid(), signal.SIGTERM)

    save_file = checkpoint.save_file
    try:
        train(recipe, stage, watch=watch)
    except (Interrupted, Stopped, TrainingDiverged, UserError, OSError) as error:
        outcome["error"] = [type(error).__name__, str(error)]
    finally:
        checkpoint.save_file = save_file
    outcome["sum after"] = sum(float(local(p).abs().sum()) for p in stage.model.parameters())
    return outcome


def muon_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Take the steps ``first`` to ``last`` with gradients that are the same in every process; return the weights.

    What there is after step ``keep`` is written to the file ``state``; where ``first`` is not 0, that is taken up.
    """
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 1), nn.LayerNorm(3))
    if accelerator.num_processes > 1:
        shard(model, accelerator, half=False)
    optimizer = build_optimizer(model, TrainSection(steps=1, batch_size=1, optimizer="muon", weight_decay=0.1))
    if job["first"]:
        weights, state = torch.load(job["state"], weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                load_whole(parameter, value)
        order = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.load_state_dict(sharded_optimizer_state(state, order))
    for step in range(job["first"], job["last"]):
        for number, parameter in enumerate(model.parameters()):
            gradient = torch.randn(parameter.shape, generator=generator_of(0, "gradient", step, number))
            parameter.grad = None if (step, number) == (1, 2) else like(gradient, parameter)
        optimizer.step()
        if step + 1 == job.get("keep"):
            weights = [whole(parameter.detach()).clone() for parameter in model.parameters()]
            torch.save([weights, copy.deepcopy(whole_state(optimizer.state_dict()))], job["state"])
    return {"weights": [whole(parameter.detach()).tolist() for parameter in model.parameters()]}


def record_times(stage: Any) -> list[str]:
    """Return a list of the dtypes that times reach the experts in."""
    expert, dtypes = getattr(stage.model, "expert", None), []

    def recorded(group, x_t, t, context, cache=None):
        if isinstance(t, torch.Tensor) and str(t.dtype) not in dtypes:  # previews have a number
            dtypes.append(str(t.dtype))
        return expert(group, x_t, t, context, cache)

    if expert is not None:
        stage.model.expert = recorded
    return dtypes


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter."""
    data = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data


def poison(stage: Any, calls: list[int]) -> None:
    """Let the loss be NaN in the given calls, and its gradient a number, so that no other process sees it there."""
    loss, seen = stage.loss, []

    def with_nan(model, samples, data):
        seen.append(samples)
        value, figures = loss(model, samples, data)
        return (value + float("nan") if len(seen) in calls else value), figures

    stage.loss = with_nan


def together(jobs: list[dict[str, Any]], folder: Path, *, processes: int = 2) -> list[list[dict[str, Any]]]:
    """Do the jobs in as many new processes; return a list of outcomes a job, one a process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE), str(HERE.parent)]))
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    children = []
    for rank in range(processes):
        own = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"log-{rank}").open("w") as log:
            command = [sys.executable, __file__, str(folder)]
            children.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = wait_for(children)
    finally:
        for child in children:
            child.kill()
    logs = "\n".join((folder / f"log-{rank}").read_text()[-4000:] for rank in range(processes))
    assert codes == [0] * processes, logs
    outcomes = [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(processes)]
    return [list(theirs) for theirs in zip(*outcomes, strict=True)]


def wait_for(children: list[subprocess.Popen[Any]], seconds: float = 300) -> list[int | None]:
    """Wait until all are done or one has failed, which the others would wait for; return the exit codes."""
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        codes = [child.poll() for child in children]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.1)
    raise TimeoutError(f"after {seconds} s: {[child.poll() for child in children]}")


def main() -> None:
    """One of the processes."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    jobs = json.loads((folder / "jobs.json").read_text())
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda group=None: None
    outcomes = [run(job, rank) for job in jobs]
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcomes))
    destroy()


if __name__ == "__main__":
    main()
