"""The options of every verb that loads a model."""

from __future__ import annotations

from typing import Annotated

import typer

from latteflow.serve.loading import DTYPES, asked_weights, load_pipeline, target_device

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "CompileOption",
    "DeviceOption",
    "DtypeOption",
    "ModelOption",
    "QuantizeOption",
    "asked_weights",
    "load_pipeline",
    "target_device",
]

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="An embedded model's name, a local folder, or a model of the hub.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, mps ...; left out: cuda where there is one, else cpu.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; left out, float32 on CPU and for embedded models."),
]
QuantizeOption = Annotated[
    str | None, typer.Option("--quantize", help="Hold matrices as int8 or fp8 (docs/memory.md).")
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="torch.compile for drawing: worth its minute for many pictures.")
]
DEFAULT_MODEL = "emoji-64"
