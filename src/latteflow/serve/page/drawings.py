"""What a drawing was asked with, in every form the page shows it: fields, a PNG's record, and commands to copy."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from latteflow.errors import UserError

_LONGEST_RECORD = 100_000
_MOST_BYTES = 16_000_000
_LARGEST_SEED = 2**53 - 1
"""What a browser's numbers hold exactly."""


@dataclass(frozen=True)
class Settings:
    """A drawing's settings: the same draw the same picture."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 40
    guidance: float = 4.0
    size: str = "auto"
    """"WxH" in pixels, or "auto" for the model's own."""

    def body(self, model: str) -> dict[str, Any]:
        """Return the body of a request to ``/v1/images/generations``."""
        fields: dict[str, Any] = {"model": model, "prompt": self.prompt, "size": self.size, "seed": self.seed}
        fields |= {"steps": self.steps, "guidance": self.guidance}
        return fields | ({"negative_prompt": self.negative_prompt} if self.negative_prompt else {})

    def rows(self) -> list[list[str]]:
        """Return name and value of each setting, for a table."""
        return [[name.replace("_", " "), str(value)] for name, value in asdict(self).items() if value != ""]


def settings_of_picture(file: Path, default: Settings) -> Settings:
    """Return the settings that a PNG of ours carries; where it says nothing of one, the default's.

    Raises:
        UserError: it is no PNG, or carries no settings that make sense.
    """
    refusal = UserError("this picture carries no settings: give a PNG that latteflow drew")
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise refusal
        with Image.open(BytesIO(file.read_bytes()), formats=("PNG",)) as picture:
            picture.load()  # text chunks may follow the pixels
            chunks: dict[str, str] = getattr(picture, "text", {})
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise refusal from error
    record = _record(chunks)
    if not isinstance(record.get("prompt"), str):
        raise refusal
    return _from_record(record, default)


def _record(chunks: dict[str, str]) -> dict[str, Any]:
    """Return what the server writes as one chunk of JSON, and the command line as a chunk a setting."""
    if "latteflow" not in chunks:
        numbers = {name: _number(chunks.get(name, "")) for name in ("seed", "steps", "guidance")}
        return {**chunks, **numbers} if chunks.get("software", "").startswith("latteflow ") else {}
    try:
        record = json.loads(chunks["latteflow"]) if len(chunks["latteflow"]) <= _LONGEST_RECORD else None
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(text: str) -> Any:
    """Return a number that was written as text, or None."""
    if re.fullmatch(r"[0-9]{1,20}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,20}", text) else None


def _from_record(record: dict[str, Any], default: Settings) -> Settings:
    """Return what of a record is of the right kind: whoever made the file may have written anything into it."""
    found: dict[str, Any] = {"prompt": record["prompt"][:_LONGEST_RECORD]}
    if isinstance(record.get("negative_prompt"), str):
        found["negative_prompt"] = record["negative_prompt"]
    seed, steps, guidance = record.get("seed"), record.get("steps"), record.get("guidance")
    if type(seed) is int and 0 <= seed <= _LARGEST_SEED:
        found["seed"] = seed
    if type(steps) is int and 1 <= steps <= 1000:
        found["steps"] = steps
    if isinstance(guidance, int | float) and not isinstance(guidance, bool) and 0 <= guidance <= 100:
        found["guidance"] = float(guidance)
    if isinstance(record.get("size"), str):
        found["size"] = record["size"][:20]
    return replace(default, **found)


def command_line(settings: Settings, model: str, weights: Mapping[str, str]) -> str:
    """Return the command that draws the picture again; ``weights`` are the server's ``dtype`` and ``quantize``."""
    words = ["--model", model, "--seed", str(settings.seed)]
    words += [word for name, value in weights.items() for word in (f"--{name}", value)]
    words += ["--steps", str(settings.steps), "--guidance", f"{settings.guidance:g}"]
    if settings.negative_prompt:
        words += ["--negative", settings.negative_prompt]
    if settings.size != "auto":
        width, height = settings.size.split("x")
        words += ["--width", width, "--height", height]
    words += ["--out", "picture.png"]
    prompt = settings.prompt
    return shlex.join(["latteflow", "generate", *([*words, "--", prompt] if prompt[:1] == "-" else [prompt, *words])])


def curl(settings: Settings, model: str, address: str, *, keyed: bool) -> str:
    """Return the request to a server that draws it again, for a shell."""
    header = ' \\\n  -H "Authorization: Bearer $LATTEFLOW_API_KEY"' if keyed else ""
    body = shlex.quote(json.dumps(settings.body(model), ensure_ascii=False))
    return (
        f"curl {shlex.quote(f'{address}/v1/images/generations')} \\\n  -H 'Content-Type: application/json'{header} \\\n"
        f"  -d {body} |\n  python -c 'import base64, json, sys; "
        'sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\' > picture.png'
    )


def python(settings: Settings, model: str, address: str, *, keyed: bool) -> str:
    """Return a program that has a server draw it again, through OpenAI's package."""
    body = settings.body(model)
    own = {name: body.pop(name) for name in list(body) if name not in ("model", "prompt", "size")}
    key = 'os.environ["LATTEFLOW_API_KEY"]' if keyed else '"none"'
    lines = ["import base64", *(["import os"] if keyed else []), "from pathlib import Path", ""]
    lines += ["from openai import OpenAI", "", f'client = OpenAI(base_url="{address}/v1", api_key={key})']
    lines += ["drawn = client.images.generate(", *(f"    {name}={value!r}," for name, value in body.items())]
    lines += ['    response_format="b64_json",', f"    extra_body={own!r},", ")"]
    lines += ['Path("picture.png").write_bytes(base64.b64decode(drawn.data[0].b64_json))', ""]
    return "\n".join(lines)
