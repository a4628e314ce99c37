"""The tab that answers: questions about pictures that were uploaded or drawn, words as they come."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from latteflow.errors import UserError
from latteflow.serve.page import shown
from latteflow.serve.page.draw_tab import Update
from latteflow.serve.page.shown import Drawing
from latteflow.serve.page.stopping import StopButton, Stopped, until
from latteflow.serve.page.visitor import client_of

_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
"""How the files of formats begin that the server reads."""
_FILES = [".png", ".jpg", ".jpeg", ".webp"]
_PAUSE = 0.05
"""Seconds between two tellings of the browser."""


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: str
    """user or assistant."""
    words: str
    files: tuple[str, ...] = ()
    """Paths of pictures in Gradio's folder of uploads."""

    def message(self) -> dict[str, Any]:
        """Return the turn as the API takes it.

        Raises:
            UserError: a file is no picture, or has been deleted since.
        """
        if self.role == "assistant":
            return {"role": self.role, "content": self.words}
        return {"role": self.role, "content": [*map(_picture_part, self.files), {"type": "text", "text": self.words}]}

    def on_screen(self) -> dict[str, str]:
        """Return the turn as Gradio shows it, which takes words for HTML."""
        pictures = [f'<img src="gradio_api/file={quote(file)}" alt="a picture that was sent">' for file in self.files]
        return {"role": self.role, "content": "".join([*pictures, f"<div>{escape(self.words, quote=False)}</div>"])}


class ChatTab:
    """The tab's components, and what they do. It is made inside a ``gr.Tab``."""

    def __init__(self) -> None:
        self.said = gr.State((), time_to_live=6 * 3600)
        """The conversation: a tuple of ``Turn``."""
        self.stop_button = StopButton()
        self.shown = gr.Chatbot(
            label="Conversation",
            height="55vh",
            render_markdown=False,
            feedback_options=None,
            buttons=["copy"],
            placeholder="Add a picture and ask about it, such as: What is this?",
            elem_id="conversation",
        )
        self.status = gr.HTML(elem_id="chat-status", apply_default_css=False)
        self.message = gr.MultimodalTextbox(
            label="Message",
            placeholder="Ask, and add a picture",
            file_types=_FILES,
            sources=["upload"],
            stop_btn=True,
            elem_id="message",
        )
        with gr.Row():
            self.draw = gr.Button("Draw the last answer", size="sm", elem_id="draw-answer")
            self.anew = gr.Button("New conversation", size="sm", elem_id="anew")
        self._listen()

    def _listen(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        parts = [self.message, self.shown, self.said, self.status]
        self.message.submit(self._answer, [self.message, self.said], parts, concurrency_limit=None, **quiet)
        self.message.stop(self._press, queue=False, **quiet)
        for anew in (self.anew.click, self.shown.clear):
            anew(self._press, queue=False, **quiet).then(self._begin, None, parts, queue=False, **quiet)

    async def _answer(
        self, message: dict[str, Any], said: tuple[Turn, ...], request: gr.Request
    ) -> AsyncIterator[Update]:
        """Answer, telling the browser of it; Gradio closes this when the page goes away."""
        asked = Turn("user", (message.get("text") or "").strip(), tuple(message.get("files") or ()))
        # A turn that was stopped before its answer began has none: it makes way.
        before = said[:-1] if said and said[-1].role == "user" else said
        try:
            if not asked.words:
                raise UserError("the message is empty: ask something, for a picture alone is no question")
            messages = [turn.message() for turn in (*before, asked)]
            yield {
                **self._show((*before, asked)),
                self.message: gr.MultimodalTextbox({"text": "", "files": []}, interactive=False),
                self.status: shown.status("Waiting for the answer."),
            }
            with self.stop_button.watched(request.session_hash or "") as pressed:
                async with aclosing(until(pressed, self._answers(messages, request))) as answers:
                    async for answer in answers:
                        yield {**self._show((*before, asked, Turn("assistant", answer))), self.status: ""}
            yield {self.message: gr.MultimodalTextbox(interactive=True)}
        except Stopped:
            yield {self.message: gr.MultimodalTextbox(interactive=True), self.status: shown.status("Stopped.")}
        except UserError as error:
            yield {
                **self._show(before),
                self.message: gr.MultimodalTextbox(message, interactive=True),
                self.status: shown.trouble(f"{str(error)[:1].upper()}{str(error)[1:]}."),
            }

    async def _answers(self, messages: Sequence[dict[str, Any]], request: gr.Request) -> AsyncGenerator[str, None]:
        """Yield the answer as it grows, not too often, and whole at the end."""
        client = client_of(request)
        model = await client.model()
        answer, told = "", 0.0
        async with aclosing(client.ask(messages, model.name)) as pieces:
            async for words in pieces:
                answer += words
                if time.monotonic() - told > _PAUSE:
                    told = time.monotonic()
                    yield answer
        yield answer or "(no words)"

    def _show(self, said: tuple[Turn, ...]) -> Update:
        return {self.said: said, self.shown: [turn.on_screen() for turn in said]}

    def _press(self, request: gr.Request) -> None:
        self.stop_button.press(request.session_hash or "")

    def _begin(self) -> Update:
        return {
            self.message: gr.MultimodalTextbox({"text": "", "files": []}, interactive=True),
            self.status: "",
            **self._show(()),
        }

    def about(self, drawings: tuple[Drawing, ...], chosen: int | None) -> Update:
        """Return the message box with a drawing in it, and a question to send along."""
        if chosen is None:
            return {}
        file = save_bytes_to_cache(drawings[chosen].image, "drawing.png", self.message.GRADIO_CACHE)
        return {self.message: gr.MultimodalTextbox({"text": "What is this?", "files": [file]}, interactive=True)}

    @staticmethod
    def last_answer(said: tuple[Turn, ...]) -> str:
        """Return what was answered last, or nothing."""
        return next((turn.words for turn in reversed(said) if turn.role == "assistant"), "")


def _picture_part(file: str) -> dict[str, Any]:
    """Return an uploaded file as the API takes pictures.

    Raises:
        UserError: it does not begin as a picture does, or is gone.
    """
    try:
        data = Path(file).read_bytes()
    except FileNotFoundError as error:
        raise UserError("a picture of this conversation is gone from the server: begin a new one") from error
    kind = next((kind for start, kind in _KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise UserError("this is no PNG, JPEG or WebP picture: give one")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}
