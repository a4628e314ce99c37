"""``latteflow serve``."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latteflow.cli.model import (
    DEFAULT_MODEL,
    CompileOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantizeOption,
    asked_weights,
    fastest_dtype,
    load_pipeline,
)
from latteflow.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from latteflow.serve.api.keys import ApiKeys

_KEYS_VARIABLE = "LATTEFLOW_API_KEYS"


def serve(
    model: ModelOption = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"Keys, one a line; more in the variable {_KEYS_VARIABLE}.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that clients call this server by; * for any. Can be repeated.")
    ] = None,
    allow_image_domain: Annotated[
        list[str] | None, typer.Option(help="A host that pictures are fetched from. Can be repeated.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Pictures that share a forward, at most.")] = 16,
    max_active: Annotated[int, typer.Option(help="Pictures under way, at most.")] = 32,
    queue: Annotated[int, typer.Option(help="Work that may wait, in pictures of 40 guided steps.")] = 64,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for what runs to finish after SIGTERM.")] = 30.0,
    drain_delay: Annotated[float, typer.Option(min=0, help="Seconds before that in which only /readyz says no.")] = 0.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked into the log.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen on any address without a key.")] = False,
    page: Annotated[bool, typer.Option(help="Show the web page at the server's address.")] = True,
    compiled: CompileOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients ask."""
    from latteflow.serve.api.app import create_app
    from latteflow.serve.api.logs import log_as_json
    from latteflow.serve.api.metrics import Metrics
    from latteflow.serve.api.server import serve as run
    from latteflow.serve.api.settings import ServerSettings
    from latteflow.serve.engine.engine import Engine
    from latteflow.serve.engine.settings import EngineSettings

    dtype = dtype or (None if quantize else fastest_dtype(model, device))
    keys = _keys(host, api_key_file, insecure=insecure)
    bounds = EngineSettings(max_batch=max_batch, max_active=max_active, max_queued_pictures=queue)
    settings = ServerSettings(
        model=Path(model).resolve().name if Path(model).exists() else model,
        weights=asked_weights(dtype, quantize),
        keys=keys,
        hosts=frozenset([*(allow_host or ()), host]),
        image_domains=frozenset(domain.lower() for domain in allow_image_domain or ()),
        log_prompts=log_prompts,
    )
    pipe = load_pipeline(model, device, dtype, quantize, compiled=compiled)
    metrics = Metrics()
    app = create_app(Engine(pipe, bounds, observer=metrics), settings, metrics)
    if page:
        _show_page(app, keys)
    log_as_json()
    if not run(app, host, port, drain=drain, notice=drain_delay, announce=lambda url: print(url, flush=True)):
        raise typer.Exit(1)


def _keys(host: str, file: Path | None, *, insecure: bool) -> ApiKeys:
    from latteflow.serve.api.keys import ApiKeys

    keys = ApiKeys.read(file, os.environ.get(_KEYS_VARIABLE))
    if not (keys or insecure or _is_loopback(host)):
        raise UserError(
            f"--host {host} can be reached by others: give --api-key-file or {_KEYS_VARIABLE}, or --insecure to let "
            "everybody in"
        )
    return keys


def _show_page(app: FastAPI, keys: ApiKeys) -> None:
    from latteflow.serve.page.page import mount_page

    mount_page(app, keys.accepts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
