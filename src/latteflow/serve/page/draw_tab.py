"""The tab that draws: a form, the picture as it comes, which expert runs, and what was drawn since the page opened."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from latteflow.errors import UserError
from latteflow.serve.page import shown
from latteflow.serve.page.client import Drawn, Model, Preview, Queued
from latteflow.serve.page.drawings import Settings, command_line, curl, python, settings_of_picture
from latteflow.serve.page.shown import Drawing
from latteflow.serve.page.stopping import StopButton, Stopped, until
from latteflow.serve.page.strip import Step, strip
from latteflow.serve.page.visitor import client_of, is_keyed, public_address

EXAMPLES = (
    "a red apple, fluent 3d style",
    "grinning face, noto style",
    "umbrella, fluent 3d style",
    "evergreen tree, fluent 3d style",
    "cat face, noto style",
    "automobile, fluent 3d style",
)
_MOST_KEPT = 48
_LONGEST_PROMPT = 8000
_PAUSE = 0.1
"""Seconds between two tellings of the browser, pictures aside."""
_SIZE = re.compile(r"auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")
Update = dict[Any, Any]
"""New values of components."""


class DrawTab:
    """The tab's components, and what they do. It is made inside a ``gr.Tab``."""

    def __init__(self) -> None:
        self.drawings = gr.State((), time_to_live=6 * 3600)
        self.chosen = gr.State(None)
        """The place of the drawing that is shown, or None."""
        self.stop_button = StopButton()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._form()
            with gr.Column(scale=3, min_width=300):
                self._result()
        self._listen()

    def _form(self) -> None:
        self.prompt = gr.Textbox(
            label="Prompt",
            value="",
            placeholder="What to draw",
            lines=2,
            max_length=_LONGEST_PROMPT,
            autofocus=True,
            elem_id="prompt",
        )
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=100)
        with gr.Accordion("Advanced settings", open=False):
            self.negative = gr.Textbox(label="Negative prompt", value="", placeholder="What to steer away from")
            self.seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=2**53 - 1)
            self.by_chance = gr.Checkbox(label="A new seed every time", value=True)
            self.steps = gr.Slider(label="Steps", minimum=1, maximum=100, value=40, step=1)
            self.guidance = gr.Slider(label="Guidance", minimum=0, maximum=15, value=4, step=0.1)
            self.size = gr.Textbox(label="Size: WIDTHxHEIGHT in pixels, or auto", value="auto")
            self.upload = gr.UploadButton("Settings from a picture", file_types=[".png"], size="sm", elem_id="upload")
        gr.Examples(list(EXAMPLES), self.prompt, label="Examples", elem_id="examples", api_visibility="private")
        self.fields = [self.prompt, self.negative, self.seed, self.steps, self.guidance, self.size]

    def _result(self) -> None:
        self.picture = gr.HTML("Ctrl+Enter draws.", elem_id="picture", **_PLAIN)
        self.status = gr.HTML(elem_id="status", **_PLAIN)
        self.strip = gr.HTML(elem_id="strip", **_PLAIN)
        with gr.Row():
            self.ask = gr.Button("Ask about this picture", interactive=False, size="sm", elem_id="ask")
        self.gallery = gr.HTML(elem_id="gallery", **_PLAIN, js_on_load=shown.GALLERY_SCRIPT)
        with gr.Accordion("Settings, and the same again elsewhere", open=False, visible=False) as self.again:
            self.details = gr.HTML(elem_id="details", **_PLAIN)
            self.as_command = gr.Code(label="Command line", language="shell", **_CODE, elem_id="as-command")
            self.as_curl = gr.Code(label="curl", language="shell", **_CODE, elem_id="as-curl")
            self.as_python = gr.Code(label="Python", language="python", **_CODE, elem_id="as-python")

    def _listen(self) -> None:
        about = [self.details, self.as_command, self.as_curl, self.as_python, self.again]
        shows = [self.picture, self.status, self.strip, self.gallery, self.drawings, self.chosen, self.ask, *about]
        buttons = [self.generate, self.stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.generate.click(
            self._draw,
            [*self.fields, self.by_chance, self.drawings],
            [*shows, *buttons, self.seed],
            concurrency_limit=None,
            **quiet,
        )
        self.stop.click(self._press, queue=False, **quiet)
        self.gallery.select(self._choose, self.drawings, [*shows, *self.fields, self.by_chance], **quiet)
        self.upload.upload(self._restore, self.upload, [self.status, *self.fields, self.by_chance], **quiet)

    async def _draw(
        self,
        prompt: str,
        negative: str,
        seed: float | None,
        steps: float,
        guidance: float,
        size: str,
        by_chance: bool,
        drawings: tuple[Drawing, ...],
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        """Draw, telling the browser of it; Gradio closes this when the page goes away."""
        try:
            number = secrets.randbelow(2**32) if by_chance or seed is None else int(seed)
            settings = Settings(prompt.strip(), negative.strip(), number, int(steps), float(guidance), size.strip())
            _check(settings)
            with self.stop_button.watched(request.session_hash or "") as pressed:
                yield self._begun(settings)
                client = client_of(request)
                model = await client.model()
                made: list[Step] = []
                told, started = 0.0, time.monotonic()
                async with aclosing(until(pressed, client.draw(settings, model.name))) as events:
                    async for event in events:
                        match event:
                            case Drawn():
                                drawings = (*drawings, Drawing(settings, event.image))[-_MOST_KEPT:]
                                seconds = time.monotonic() - started
                                yield {
                                    **self._show(drawings, len(drawings) - 1, model, request),
                                    self.status: shown.status(f"Done in {seconds:.2f} s, seed {settings.seed}."),
                                    self.strip: strip(made, model.edges),
                                    **self._idle(),
                                }
                            case Preview():
                                yield {self.picture: shown.picture(event.image, settings, finished=False)}
                            case Queued():
                                yield {self.status: shown.status(f"Waiting for its turn: {event.ahead} before it.")}
                            case Step():
                                made.append(event)
                                if time.monotonic() - told > _PAUSE:
                                    told = time.monotonic()
                                    yield {
                                        self.strip: strip(made, model.edges),
                                        self.status: shown.status(f"Step {event.step} of {event.steps}."),
                                    }
        except Stopped:
            yield {self.status: shown.status("Stopped."), **self._idle()}
        except UserError as error:
            yield {self.status: shown.trouble(f"{str(error)[:1].upper()}{str(error)[1:]}."), **self._idle()}

    def _begun(self, settings: Settings) -> Update:
        return {
            self.status: shown.status("Waiting for its turn."),
            self.strip: "",
            self.seed: settings.seed,
            self.generate: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
        }

    def _idle(self) -> Update:
        return {self.generate: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}

    def _press(self, request: gr.Request) -> None:
        self.stop_button.press(request.session_hash or "")

    def _show(self, drawings: tuple[Drawing, ...], chosen: int, model: Model, request: gr.Request) -> Update:
        settings = drawings[chosen].settings
        server, keyed = public_address(request), is_keyed(request)
        return {
            self.picture: shown.picture(drawings[chosen].image, settings, finished=True),
            self.gallery: shown.gallery(drawings, chosen),
            self.drawings: drawings,
            self.chosen: chosen,
            self.ask: gr.Button(interactive=True),
            self.details: shown.details(settings),
            self.as_command: command_line(settings, model.name, model.weights),
            self.as_curl: curl(settings, model.name, server, keyed=keyed),
            self.as_python: python(settings, model.name, server, keyed=keyed),
            self.again: gr.Accordion(visible=True),
        }

    async def _choose(self, drawings: tuple[Drawing, ...], event: gr.SelectData, request: gr.Request) -> Update:
        """Show a drawing of the gallery again, with its settings in the form."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(drawings):
            return {self.status: shown.trouble("That drawing is gone.")}
        try:
            model = await client_of(request).model()
        except UserError as error:
            return {self.status: shown.trouble(str(error))}
        return {
            **self._show(drawings, event.index, model, request),
            **self._filled(drawings[event.index].settings),
            self.status: shown.status("Its settings are in the form."),
            self.strip: "",
        }

    def _restore(self, file: str | None) -> Update:
        """Fill the form with what a picture says of itself."""
        if file is None:
            return {self.status: ""}
        try:
            settings = settings_of_picture(Path(file), Settings(""))
        except UserError as error:
            return {self.status: shown.trouble(f"{str(error)[:1].upper()}{str(error)[1:]}.")}
        return {**self._filled(settings), self.status: shown.status("The picture's settings are in the form.")}

    def _filled(self, settings: Settings) -> Update:
        return {
            self.prompt: settings.prompt,
            self.negative: settings.negative_prompt,
            self.seed: settings.seed,
            self.steps: settings.steps,
            self.guidance: settings.guidance,
            self.size: settings.size,
            self.by_chance: False,
        }


_PLAIN: dict[str, Any] = {"apply_default_css": False}
_CODE: dict[str, Any] = {"lines": 1, "interactive": False, "wrap_lines": True, "show_line_numbers": False}


def _check(settings: Settings) -> None:
    """Refuse what needs no server to refuse."""
    if not settings.prompt:
        raise UserError("the prompt is empty: say what to draw")
    if not _SIZE.fullmatch(settings.size):
        raise UserError(f"the size {settings.size[:20]!r} is not WIDTHxHEIGHT in pixels, such as 64x64, or auto")
