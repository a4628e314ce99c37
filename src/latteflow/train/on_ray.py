"""Expert groups on Ray: where groups share no weight, each is a run of its own, on any machine that has room.

Ray Train's workers are used without a process group: no gradient travels. Each takes its groups one after the other and
resumes them from their own checkpoints; what they leave is merged. Data, frozen parts and the output have to be where
every machine finds them under the same path.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latteflow.errors import UserError
from latteflow.train.build import build_stage
from latteflow.train.encode_ray import having_ray
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import Progress, Stopped, train
from latteflow.train.merge import merge_runs
from latteflow.train.recipe import GeneratorRecipe, StageRecipe, resolved

Watch = Callable[[int, Progress], None]


def train_on_ray(
    recipe: StageRecipe,
    *,
    resources: Mapping[str, float] | None = None,
    retries: int = 3,
    watch: Watch = lambda group, progress: None,
) -> Path:
    """Train every group by itself on Ray, and merge them; run again after an interruption to resume.

    Args:
        recipe: of a generator whose groups share no weight. Group k's run is in ``<output>/group-k``.
        resources: what one group takes, such as ``{"CPU": 4, "GPU": 1}``; left out, a CPU, and a GPU if there are any.
        retries: how often lost workers are replaced. When one is lost, all groups go on from their checkpoints.
        watch: called in a thread of this process with a group and what its run reports.

    Returns:
        The folder ``<output>/final`` with the merged pipeline.

    Raises:
        UserError: the recipe's groups cannot be trained apart, no machine has room for one, or a group's run raised it.
        TrainingDiverged: a group's loss is not finite; the others are trained all the same.
        OSError: a group's weights cannot be written, or workers were lost too often.
        Stopped: by SIGTERM or Ctrl-C; what came after each group's last checkpoint is lost.
    """
    runs = _apart(recipe)
    import ray

    mistakes: dict[int, Exception] = {}
    with having_ray(os.cpu_count() or 1):
        needs = dict(resources or ({"CPU": 1, "GPU": 1} if ray.cluster_resources().get("GPU") else {"CPU": 1}))
        workers = min(_room(needs), len(runs))
        with _heard(watch, mistakes) as news:
            _fit(runs, news, workers, needs, retries, Path(recipe.output))
    if mistakes:
        told = "; ".join(f"group {group}: {mistake}" for group, mistake in sorted(mistakes.items()))
        raise type(next(iter(mistakes.values())))(told)
    final = Path(recipe.output) / "final"
    shutil.rmtree(final, ignore_errors=True)
    return merge_runs([Path(run.output) for run in runs], final)


def _apart(recipe: StageRecipe) -> list[GeneratorRecipe]:
    """Return the recipe of each group's own run."""
    if not isinstance(recipe, GeneratorRecipe):
        raise UserError(f"only a generator's groups are trained apart: this is stage {recipe.stage}")
    settings = recipe.generator
    if settings.shared_io:
        raise UserError(
            "groups are trained apart only where they share no weight: set generator.shared_io=false, or train them "
            "together without Ray"
        )
    if settings.groups is not None:
        raise UserError("on Ray all groups are trained: leave generator.groups out")
    if settings.lora is not None:
        raise UserError(
            "adapters (generator.lora) are not merged: train each group's without Ray, with generator.groups=[k]"
        )
    return [
        recipe.model_copy(
            update={
                "output": f"{recipe.output}/group-{group}",
                "generator": settings.model_copy(update={"groups": (group,)}),
            }
        )
        for group in range(settings.num_groups)
    ]


def _room(needs: Mapping[str, float]) -> int:
    """Return for how many groups at once there is room; one has to fit on a machine as a whole."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(has.get(name, 0) // need) for name, need in needs.items()) for has in machines)
    if room < 1:
        largest = {name: max(has.get(name, 0) for has in machines) for name in needs}
        raise UserError(
            f"a group takes {_listed(needs)}, and no machine of Ray's has that (at most {_listed(largest)}): ask for "
            "less with --per-group"
        )
    return room


def _listed(resources: Mapping[str, float]) -> str:
    return ",".join(f"{name}={amount:g}" for name, amount in resources.items())


@contextmanager
def _heard(watch: Watch, mistakes: dict[int, Exception]) -> Iterator[Any]:
    """Yield the queue in which workers say how their groups are doing, and hand on what comes."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # a lost machine does not take it along

    def listen() -> None:
        for group, said in iter(news.get, None):
            if isinstance(said, Progress):
                watch(group, said)
            elif said is not None:
                mistakes[group] = said
            else:
                mistakes.pop(group, None)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield news
    finally:
        news.put(None)
        listener.join()


def _fit(
    runs: Sequence[GeneratorRecipe], news: Any, workers: int, needs: Mapping[str, float], retries: int, output: Path
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = DataParallelTrainer(
        _take_share,
        # Paths are relative to the folder, and Ray starts workers elsewhere.
        train_loop_config={"runs": runs, "news": news, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in needs, resources_per_worker=dict(needs)),
        run_config=RunConfig(
            storage_path=str(output.absolute() / "ray"), failure_config=FailureConfig(max_failures=retries)
        ),
    )
    try:
        with _stoppable():
            trainer.fit()
    except TrainingFailedError as error:
        raise OSError(f"Ray gave up: {str(error).strip().splitlines()[-1]}") from error
    finally:
        shutil.rmtree(output / "ray", ignore_errors=True)  # where Ray looks whether all machines see one folder


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the run the way Ctrl-C does, and put back what Ray does to signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    except SystemExit as leaving:  # what Ray makes of Ctrl-C
        raise Stopped("stopped; start it again to go on from each group's last checkpoint") from leaving
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _take_share(config: dict[str, Any]) -> None:
    """Train a worker's groups, one after the other."""
    import ray.train

    context, news = ray.train.get_context(), config["news"]
    groups = range(len(config["runs"]))[context.get_world_rank() :: context.get_world_size()]
    for group in groups:
        mistake = _train(config["runs"][group], config["folder"], lambda now, group=group: news.put((group, now)))
        news.put((group, mistake))


def _train(recipe: GeneratorRecipe, folder: str, watch: Callable[[Progress], None]) -> Exception | None:
    """Train one group, unless that is done; return what went wrong that would go wrong again."""
    try:
        os.chdir(folder)
        finished = Path(recipe.output) / "final" / "recipe.json"
        if not (finished.is_file() and json.loads(finished.read_text()) == resolved(recipe)):
            train(recipe, build_stage(recipe), watch=watch)
    except (UserError, TrainingDiverged, OSError) as error:  # not raised: Ray would start all groups anew
        return error
    return None
