"""Shards on Ray: the same work in a pool of actors, on this machine or a cluster.

Every actor loads its model once and does whole shards, so that no tensor travels: folders and data have to be where
every machine finds them under the same path.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from latteflow.errors import UserError

_OURS = ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def run_on_ray(work: Any, items: Sequence[Any], *, workers: int, device: str) -> Generator[dict[str, Any], None, None]:
    """Yield the entries of shards as they are done, in any order; inside ``having_ray``.

    Args:
        work: loaded by ``load()`` and called with an item; returns JSON values.
        items: JSON values.
        workers: how many actors; 0 for one a GPU, or one where there is none.
        device: ``auto``, ``cpu`` or ``cuda``: with a GPU, each actor has its own.

    Raises:
        UserError: an item's work raised it, or there are fewer GPUs than workers.
        OSError: an item's work raised it.
    """
    import ray
    import ray.data

    gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    wanted = max(workers, 1) if gpus or (device != "auto" and device != "cpu") else 0
    if wanted > gpus:
        raise UserError(f"{wanted} workers need a GPU each: Ray has {gpus}; take fewer, or encode.device=cpu")
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"item": json.dumps(item)} for item in items]
    done = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000)).map_batches(
        _Actor,
        fn_constructor_args=(work,),
        batch_size=1,
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=min(workers or gpus or 1, len(rows))),
    )
    for row in done.iter_rows():
        outcome = json.loads(row["outcome"])
        if "mistake" in outcome:
            raise UserError(outcome["mistake"])
        if "failure" in outcome:
            raise OSError(outcome["failure"])
        yield outcome["entry"]


class _Actor:
    """One model in memory, one shard after the other."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self._mistake = ""
        try:
            work.load()
        except UserError as error:  # of a constructor Ray tells little
            self._mistake = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"outcome": [json.dumps(self._outcome(json.loads(item))) for item in batch["item"]]}

    def _outcome(self, item: Any) -> dict[str, Any]:
        try:
            return {"mistake": self._mistake} if self._mistake else {"entry": self.work(item)}
        except UserError as error:
            return {"mistake": str(error)}
        except OSError as error:
            return {"failure": str(error)}


@contextmanager
def having_ray(workers: int, address: str | None = None) -> Iterator[None]:
    """Have Ray for a while: the one that runs, a cluster, or one of this process alone.

    Args:
        workers: how many actors it has to have room for.
        address: of the cluster; left out, the one that RAY_ADDRESS names, if it names one.

    Raises:
        UserError: there is no such cluster, or it asks for another token.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    before = {name: os.environ.get(name) for name in _OURS}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        if cluster := address or os.environ.get("RAY_ADDRESS"):
            _join(cluster)
        else:
            # Its ports are open to the network whatever address it is given: a secret, which a Ray of one process
            # asks for unless RAY_AUTH_MODE says otherwise, keeps everybody else out. Given here, it is in no file.
            os.environ["RAY_AUTH_TOKEN"] = _token()
            ray.init(
                address="local",
                num_cpus=max(workers, 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(
            f"there is no cluster of Ray at {address}: start one with ray start --head, and give its RAY_AUTH_TOKEN"
        ) from error


@cache
def _token() -> str:
    """One a process: Ray reads it once."""
    return secrets.token_hex(32)
