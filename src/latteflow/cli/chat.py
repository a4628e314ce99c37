"""``latteflow chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latteflow.cli.model import (
    DEFAULT_MODEL,
    CompileOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    QuantizeOption,
    asked_weights,
    load_pipeline,
)
from latteflow.cli.pictures import read_picture, save_picture
from latteflow.errors import UserError

if TYPE_CHECKING:
    from latteflow.pipeline import LatteFlowPipeline

_HELP = "/draw WORDS  /image FILE  /new  /help  /quit  (anything else is said to the model)"


def chat(
    model: ModelOption = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures that are drawn.")] = Path(),
    seed: Annotated[int, typer.Option(help="Picture i of the conversation is drawn from seed + i.")] = 0,
    steps: Annotated[int, typer.Option(help="Calls of the network a picture.")] = 40,
    guidance: Annotated[float, typer.Option(help="1 is none; higher follows the words more closely.")] = 4.0,
    max_new_tokens: Annotated[int, typer.Option(help="Where a long answer is cut.")] = 512,
    compiled: CompileOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
) -> None:
    """Talk with a model, line by line: ask, show it pictures, have it draw, ask about what it drew."""
    if not out.is_dir():
        raise UserError(f"--out {out}: there is no such folder; make it first")
    if not 0 <= seed < 2**62:
        raise UserError(f"--seed has to be 0 to 2**62 - 1: got {seed}")
    if not 1 <= max_new_tokens <= 4096:
        raise UserError(f"--max-new-tokens has to be 1 to 4096: got {max_new_tokens}")
    record = {"steps": steps, "guidance": guidance, "model": model, **asked_weights(dtype, quantize)}
    talk = _Talk(load_pipeline(model, device, dtype, quantize, compiled=compiled), out, record, seed)
    if sys.stdin.isatty():
        print(_HELP)
    for line in _lines():
        if line == "/quit":
            return
        try:
            talk.turn(line, max_new_tokens)
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"latteflow: {error}", file=sys.stderr)  # somebody is there to try again


class _Talk:
    """The conversation so far, and what the next turn shows."""

    def __init__(self, pipe: LatteFlowPipeline, out: Path, record: dict[str, Any], seed: int) -> None:
        self.pipe, self.out, self.record, self.seed = pipe, out, record, seed
        self.messages: list[dict[str, Any]] = []
        self.shown: list[dict[str, Any]] = []
        self.drawn = 0

    def turn(self, line: str, max_new_tokens: int) -> None:
        """Do what a line says."""
        verb, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._say(line, max_new_tokens)
        elif verb == "/draw" and rest.strip():
            self._draw(rest.strip())
        elif verb == "/image" and rest.strip():
            self.shown.append({"type": "image", "image": read_picture(Path(rest.strip()))})
        elif line == "/new":
            self.messages, self.shown = [], []
        elif line == "/help":
            print(_HELP)
        else:
            raise UserError(f"{line!r} is not known: {_HELP}")

    def _say(self, words: str, max_new_tokens: int) -> None:
        from transformers import TextStreamer

        streamer = TextStreamer(self.pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        said = self._with(words)
        self.messages = [*said, self.pipe.chat(said, streamer=streamer, max_new_tokens=max_new_tokens)]

    def _draw(self, words: str) -> None:
        import torch

        said, seed = self._with(words), self.seed + self.drawn
        reply = self.pipe.chat(
            said,
            modalities=["image"],
            num_inference_steps=self.record["steps"],
            guidance_scale=self.record["guidance"],
            generator=torch.Generator().manual_seed(seed),
        )
        file = self.out / f"chat-{self.drawn}.png"
        save_picture(reply["content"][0]["image"], file, {"prompt": words, "seed": seed, **self.record})
        print(file)
        self.messages, self.drawn = [*said, reply], self.drawn + 1

    def _with(self, words: str) -> list[dict[str, Any]]:
        """Return the conversation with a user's turn at its end, of the pictures shown and words."""
        content, self.shown = [*self.shown, {"type": "text", "text": words}], []
        return [*self.messages, {"role": "user", "content": content}]


def _lines() -> Iterator[str]:
    """Yield what is typed, or piped in, until it ends; empty lines are passed over."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line
