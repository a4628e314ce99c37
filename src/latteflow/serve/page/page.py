"""The page itself: its tabs, its looks, and its place at ``/`` of the API's application."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from latteflow.errors import UserError
from latteflow.serve.page import shown, strip
from latteflow.serve.page.chat_tab import ChatTab
from latteflow.serve.page.draw_tab import DrawTab
from latteflow.serve.page.visitor import bearer, client_of

_CACHE = (600, 3 * 3600)
"""Seconds between two looks for uploaded files that are too old, and how old that is."""
_LARGEST_UPLOAD = "16mb"
_AT_ONCE = 64
_STYLE = """
.gradio-container {width: 100%; max-width: 72rem !important; margin: auto;}
.gradio-container > .main {width: 100%;}
footer {display: none !important;}
#title h1 {font-size: 1.5rem; font-weight: 700; margin: 0;}
#title small {font-size: 0.9rem; font-weight: 400; color: var(--body-text-color-subdued); margin-left: 0.6rem;}
@media (max-width: 640px) {
  #examples .gallery {flex-wrap: nowrap; overflow-x: auto;}
  #examples .gallery button {flex: none;}
}
"""
# Gradio's text fields know Shift+Enter alone.
_SCRIPT = """
() => document.addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && event.target.closest('#prompt')) {
    event.preventDefault();
    document.querySelector('#generate').click();
  }
})
"""
# What the page's own scripts ask for; Gradio has more, such as a proxy and a description of all functions.
_OPEN = (
    "/assets/",
    "/static/",
    "/gradio_api/file=",
    "/gradio_api/heartbeat/",
    "/gradio_api/queue/",
    "/gradio_api/run/",
)
_OPEN_EXACTLY = frozenset(
    {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"}
    | {
        f"/gradio_api/{name}"
        for name in ("upload", "upload_progress", "heartbeat", "cancel", "reset", "startup-events")
    }
)


def build_page() -> gr.Blocks:
    """Return the page, which asks the server that it is mounted on."""
    with gr.Blocks(title="latteflow", analytics_enabled=False, delete_cache=_CACHE) as page:
        title = gr.HTML("<h1>latteflow</h1>", elem_id="title", apply_default_css=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Draw", id="draw"):
                draw = DrawTab()
            with gr.Tab("Chat", id="chat"):
                chat = ChatTab()
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(_title, None, title, **quiet)
        draw.ask.click(
            lambda drawings, chosen: {tabs: gr.Tabs(selected="chat"), **chat.about(drawings, chosen)},
            [draw.drawings, draw.chosen],
            [tabs, chat.message],
            **quiet,
        )
        chat.draw.click(
            lambda said: (gr.Tabs(selected="draw"), chat.last_answer(said)), chat.said, [tabs, draw.prompt], **quiet
        )
    return page.queue(default_concurrency_limit=_AT_ONCE, max_size=4 * _AT_ONCE)


async def _title(request: gr.Request) -> str:
    """Return the page's heading, with what is served where the server says so."""
    try:
        model = await client_of(request).model()
    except UserError:
        return "<h1>latteflow</h1>"
    about = f"{model.name}, {model.size} pixels, {len(model.edges) - 1} experts"
    return f"<h1>latteflow<small>{escape(about)}</small></h1>"


def mount_page(app: FastAPI, accepts: Callable[[str | None], bool]) -> None:
    """Show the page at ``/`` of the API's application; what else the application answers stays as it is.

    Args:
        app: with all its routes.
        accepts: whether an ``Authorization: Bearer`` header lets its sender in.
    """
    gr.mount_gradio_app(
        app,
        build_page(),
        path="/",
        allowed_paths=[],
        show_error=False,
        max_file_size=_LARGEST_UPLOAD,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        favicon_path=str(Path(__file__).parent / "favicon.png"),
        theme=gr.themes.Default(
            primary_hue="rose",
            neutral_hue="stone",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css=_STYLE + shown.STYLE + strip.STYLE,
        js=_SCRIPT,
    )
    mounted = app.routes[-1]
    if not isinstance(mounted, Mount):
        raise RuntimeError("Gradio did not mount the page as the last route")
    mounted.app = PageGate(mounted.app, accepts)


class PageGate:
    """What stands before Gradio: the key, where the server has one, and a list of the addresses that the page needs.

    Args:
        app: Gradio's.
        accepts: whether an ``Authorization: Bearer`` header lets its sender in.
    """

    def __init__(self, app: ASGIApp, accepts: Callable[[str | None], bool]) -> None:
        self.app, self.accepts = app, accepts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        key = bearer(Headers(scope=scope).get("authorization"))
        if not self.accepts(f"Bearer {key}" if key else None):
            refusal = _error(401, "invalid_api_key", "give the API key as the password; the name may be anything")
            refusal.headers["WWW-Authenticate"] = 'Basic realm="latteflow", charset="UTF-8"'
            await refusal(scope, receive, send)
        elif scope["path"] not in _OPEN_EXACTLY and not scope["path"].startswith(_OPEN):
            await _error(404, "not_found", "there is nothing at this address")(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _error(status: int, code: str, message: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)
