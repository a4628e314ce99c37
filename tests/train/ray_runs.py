"""Runs on a Ray of this process alone, run by ``test_on_ray.py``; Ray leaves much behind, so they have a process.

python ray_runs.py RECIPE.json DIVERGING.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from pydantic import TypeAdapter

from latteflow.errors import UserError
from latteflow.train import on_ray
from latteflow.train.encode_ray import having_ray
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import Stopped
from latteflow.train.on_ray import train_on_ray
from latteflow.train.recipe import Recipe

STOPPED_AT, KILLED_AT = 40, 160
"""Steps of group 1. In between is time enough for the end to come."""


def take_share_and_be_killed(config):
    """A worker's work, in which the process ends when group 1 gets to a step for the first time."""
    train_group, killed = on_ray._train, Path(config["runs"][1].output) / "killed"

    def train_and_be_killed(recipe, folder, watch):
        def fatal(now):
            watch(now)
            if recipe.generator.groups == (1,) and now.step == KILLED_AT and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        return train_group(recipe, folder, fatal)

    on_ray._train = train_and_be_killed
    on_ray._take_share(config)  # the module's own: this is another process


def attempt(name, recipe, watch=lambda group, now: None, **settings):
    """Print how a run ended, as a line of JSON."""
    seen = []

    def watched(group, now):
        if (group, now.first) not in seen:
            seen.append((group, now.first))
        watch(group, now)

    try:
        end = str(train_on_ray(recipe, watch=watched, **settings))
    except (UserError, TrainingDiverged, Stopped) as error:
        end = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps({"run": name, "end": end, "resumed": seen}) + "\n")


def stop(group, now):
    if group == 1 and now.step == STOPPED_AT:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    recipe, diverging = (TypeAdapter(Recipe).validate_json(Path(file).read_text()) for file in sys.argv[1:])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with having_ray(2):  # once for all runs: it takes its time
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        attempt("no room", recipe, resources={"CPU": 99})
        attempt("stopped", recipe, stop)
        take_share, on_ray._take_share = on_ray._take_share, take_share_and_be_killed
        attempt("killed", recipe)
        on_ray._take_share = take_share
        attempt("diverging", diverging, resources={"CPU": 0.5}, retries=0)
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert before[0] == signal.getsignal(signal.SIGINT)


if __name__ == "__main__":
    main()
