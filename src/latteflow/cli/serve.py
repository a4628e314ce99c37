"""``latteflow serve``."""

from __future__ import annotations

import functools
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latteflow.cli.model import (
    DEFAULT_MODEL,
    CompileOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantizeOption,
)
from latteflow.cli.serve_ray import (
    AutoscaleOption,
    PerReplicaOption,
    PerStageOption,
    RayAddressOption,
    RayOption,
    ReplicasOption,
    Spread,
)
from latteflow.errors import UserError

if TYPE_CHECKING:
    from latteflow.serve.api.keys import ApiKeys
    from latteflow.serve.deploy.settings import ServeSettings

KeyFileOption = Annotated[Path | None, typer.Option(help="Keys, one a line; more in the variable LATTEFLOW_API_KEYS.")]
PlacementOption = Annotated[
    Literal["local", "pipeline", "auto"],
    typer.Option(help="Steps in this process, in one process a group, or where they cost less."),
]
StageDeviceOption = Annotated[
    list[str] | None, typer.Option(help="Of the pipeline's stages: one for all, or one each, repeated.")
]


def serve(
    model: ModelOption = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key_file: KeyFileOption = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that clients call this server by; * for any. Can be repeated.")
    ] = None,
    allow_image_domain: Annotated[
        list[str] | None, typer.Option(help="A host that pictures are fetched from. Can be repeated.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Pictures that share a forward, at most.")] = 16,
    max_active: Annotated[int, typer.Option(help="Pictures under way, at most.")] = 32,
    queue: Annotated[int, typer.Option(help="Work that may wait, in pictures of 40 guided steps.")] = 64,
    placement: PlacementOption = "local",
    stage_device: StageDeviceOption = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for what runs to finish after SIGTERM.")] = 30.0,
    drain_delay: Annotated[float, typer.Option(min=0, help="Seconds before that in which only /readyz says no.")] = 0.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked into the log.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen on any address without a key.")] = False,
    page: Annotated[bool, typer.Option(help="Show the web page at the server's address.")] = True,
    ray: RayOption = False,
    replicas: ReplicasOption = None,
    autoscale: AutoscaleOption = None,
    per_replica: PerReplicaOption = None,
    per_stage: PerStageOption = None,
    ray_address: RayAddressOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the CPU for a forward; left out, 1 for embedded models, else all.")
    ] = None,
    compiled: CompileOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients ask."""
    from latteflow.serve.deploy.settings import ServeSettings

    spread = Spread(ray, replicas, autoscale, per_replica, per_stage, ray_address)
    keys = _keys(api_key_file, host, insecure)
    hosts, domains = (*(allow_host or ()), host), tuple(allow_image_domain or ())
    weights = {"model": model, "device": device, "dtype": dtype, "quantize": quantize, "compiled": compiled}
    weights |= {"threads": threads}
    bounds = {"max_batch": max_batch, "max_active": max_active, "queue": queue, "drain": drain}
    places = {"placement": placement, "stage_devices": tuple(stage_device or ())}
    doors = {"api_key_file": api_key_file, "insecure": not keys, "allow_host": hosts, "allow_image_domain": domains}
    settings = ServeSettings(**weights, **bounds, **places, **doors, log_prompts=log_prompts)
    if ray:
        whole = spread.serve(settings, host, port)
    else:
        whole = _serve_here(settings, keys, host, port, drain_delay, page=page)
    if not whole:
        raise typer.Exit(1)


def _keys(file: Path | None, host: str, insecure: bool) -> ApiKeys:
    """Return who may ask; nobody in particular, only if nobody else can or that is meant."""
    from latteflow.serve.api.keys import KEYS_VARIABLE, ApiKeys

    keys = ApiKeys.read(file, os.environ.get(KEYS_VARIABLE))
    if not (keys or insecure or _is_loopback(host)):
        raise UserError(
            f"--host {host} can be reached by others: give --api-key-file or {KEYS_VARIABLE}, or --insecure to let "
            "everybody in"
        )
    return keys


def _serve_here(
    settings: ServeSettings, keys: ApiKeys, host: str, port: int, drain_delay: float, *, page: bool
) -> bool:
    """Serve from this process until a signal; return whether the engine got warm and did not break down."""
    from latteflow.serve.api.logs import log_as_json
    from latteflow.serve.api.server import serve as run
    from latteflow.serve.deploy.served import served_app

    app = served_app(settings, keys)
    if page:
        from latteflow.serve.page.page import mount_page

        mount_page(app, keys.accepts)
    log_as_json()
    announce = functools.partial(print, flush=True)
    return run(app, host, port, drain=settings.drain, notice=drain_delay, announce=announce)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
