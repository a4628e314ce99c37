"""The ``latteflow`` command."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from latteflow.cli.ask import ask
from latteflow.cli.batch import batch
from latteflow.cli.benchmark import benchmark
from latteflow.cli.chat import chat
from latteflow.cli.data import data
from latteflow.cli.encode import encode
from latteflow.cli.evaluate import evaluate
from latteflow.cli.generate import generate
from latteflow.cli.info import info
from latteflow.cli.merge import merge
from latteflow.cli.serve import serve
from latteflow.cli.train import train
from latteflow.errors import UserError

_EXTRAS = {
    "accelerate": "train",
    "peft": "train",
    "tensorboard": "train",
    "pyarrow": "data",
    "datasets": "data",
    "resvg_py": "data",
    "ray": "ray",
    "matplotlib": "plots",
    "torchao": "quantize",
    "fastapi": "serve",
    "httpx": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
}
"""Which extra brings a module that only some verbs need."""

_HARMLESS = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass ",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
"""How messages of some loggers begin that concern nobody here.

transformers and diffusers import torchao wherever it is installed, asked for or not; while that happens, torchao misses
kernels for GPUs of another kind, torch dislikes how torchao registers an enum, and diffusers misses classes that old
pickles need. What latteflow takes of torchao is written in plain torch, and it loads no pickles.
"""

app = typer.Typer(
    name="latteflow",
    help="One model that understands pictures and makes them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _verb in (generate, batch, ask, chat, info, data, encode, train, merge, evaluate, benchmark, serve):
    app.command()(_verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        from latteflow import __version__

        print(f"latteflow {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """One model that understands pictures and makes them."""


def _matters(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_HARMLESS[record.name])


def main() -> None:
    """Run the command; a user's mistake, or an extra that is not installed, becomes one line and exit code 2."""
    for name in _HARMLESS:
        logging.getLogger(name).addFilter(_matters)  # once, however often this runs
    try:
        app()
    except UserError as error:
        print(f"latteflow: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"latteflow: this needs {error.name}: install it with pip install 'latteflow[{extra}]'", file=sys.stderr)
        sys.exit(2)
