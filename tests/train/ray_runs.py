"""Runs on a Ray of this process alone, run by ``test_on_ray.py``; Ray leaves much behind, so they have a process.

python ray_runs.py RECIPE.json DIVERGING.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
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
"""Steps of group 1, both with a checkpoint."""


def taking_share(step, happens):
    """Return a worker's work in which something happens when group 1 has got to a step."""

    def take_share(config):
        train_group = on_ray._train

        def train_and_happen(recipe, folder, watch):
            def watch_and_happen(now):
                watch(now)
                if recipe.generator.groups == (1,) and now.step == step:
                    happens(Path(recipe.output))

            return train_group(recipe, folder, watch_and_happen)

        on_ray._train = train_and_happen
        on_ray._take_share(config)  # the module's own: this is another process

    return take_share


def wait_to_be_stopped(output):
    time.sleep(600)  # steps are so short that the group would be done before the signal has got through


def be_killed_once(output):
    killed = output / "killed"
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)


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
        take_share = on_ray._take_share
        on_ray._take_share = taking_share(STOPPED_AT, wait_to_be_stopped)
        attempt("stopped", recipe, stop)
        on_ray._take_share = taking_share(KILLED_AT, be_killed_once)
        attempt("killed", recipe)
        on_ray._take_share = take_share
        attempt("diverging", diverging, resources={"CPU": 0.5}, retries=0)
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert before[0] == signal.getsignal(signal.SIGINT)


if __name__ == "__main__":
    main()
