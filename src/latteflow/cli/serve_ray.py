"""``latteflow serve --ray``: its options, and what they ask for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latteflow.cli.resources import read_resources
from latteflow.errors import UserError

if TYPE_CHECKING:
    from latteflow.serve.deploy.settings import ServeSettings

RayOption = Annotated[bool, typer.Option("--ray", help="Serve from replicas on Ray, each with an engine of its own.")]
ReplicasOption = Annotated[int | None, typer.Option(min=1, help="With --ray: how many; left out, 1.")]
AutoscaleOption = Annotated[
    str | None, typer.Option(metavar="MIN:MAX", help="With --ray: as many replicas as requests need, in these bounds.")
]
PerReplicaOption = Annotated[
    str | None, typer.Option(help="With --ray: what a replica takes, such as CPU=4,GPU=1; left out, CPU=1.")
]
PerStageOption = Annotated[
    str | None,
    typer.Option(help="With --ray and a pipeline: a group is an actor of its own, on any machine, and takes this."),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(help="With --ray: a cluster to join, such as auto; left out, RAY_ADDRESS, or a Ray of its own."),
]


@dataclass(frozen=True)
class Spread:
    """How a server is spread over replicas, as it was typed.

    Raises:
        UserError: it cannot be so.
    """

    ray: bool
    replicas: int | None
    autoscale: str | None
    per_replica: str | None
    per_stage: str | None
    address: str | None

    def __post_init__(self) -> None:
        given = {
            "--replicas": self.replicas,
            "--autoscale": self.autoscale,
            "--per-replica": self.per_replica,
            "--per-stage": self.per_stage,
            "--ray-address": self.address,
        }
        for option, value in given.items():
            if value is not None and not self.ray:
                raise UserError(f"{option} is for replicas on Ray: give --ray too, or leave it out")
        if self.replicas is not None and self.autoscale is not None:
            raise UserError("--replicas and --autoscale exclude each other: give one of them")

    def serve(self, settings: ServeSettings, host: str, port: int) -> bool:
        """Serve from replicas until a signal; return whether everything was finished that had begun."""
        from latteflow.serve.deploy.cluster import serve_on_ray

        asked: dict[str, Any] = {"replicas": self.replicas or 1}
        if self.autoscale is not None:
            asked["autoscale"] = _bounds(self.autoscale)
        if self.per_replica is not None:
            asked["per_replica"] = read_resources(self.per_replica, "--per-replica")
        if self.per_stage is not None:
            if settings.placement == "local":
                raise UserError("--per-stage is for a group pipeline: give --placement pipeline, or auto")
            asked["per_stage"] = read_resources(self.per_stage, "--per-stage")
        announce = functools.partial(print, flush=True)
        return serve_on_ray(settings.model_copy(update=asked), host, port, address=self.address, announce=announce)


def _bounds(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(":")
    if not (fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most)):
        raise UserError(f"--autoscale {text} is not of the form MIN:MAX, such as 1:4")
    return int(fewest), int(most)
