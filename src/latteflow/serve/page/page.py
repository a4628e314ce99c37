"""The page itself: its tabs, its looks, and its place at ``/`` of the API's application."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.datastructures import Headers
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from latteflow.errors import UserError
from latteflow.serve.api.errors import ApiError
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
_ADDRESSES = frozenset(
    {"/", "/config", "/theme.css", "/favicon.ico"}
    | {f"/gradio_api/{name}" for name in ("upload", "upload_progress", "cancel", "reset", "startup-events")}
)
_FOLDERS = ("/assets/", "/static/") + tuple(f"/gradio_api/{name}" for name in ("file=", "heartbeat/", "queue/", "run/"))
_SILENT: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


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
        app_kwargs={"telemetry": _SILENT},
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
    # What Gradio mounted would answer every address; this one answers the page's own.
    mounted = app.router.routes.pop()
    if not isinstance(mounted, Mount):
        raise RuntimeError("Gradio did not mount the page as the last route")
    app.router.routes.append(_Page("/", PageGate(mounted.app, accepts)))


class _Page(Mount):
    """A route that takes the page's own addresses and leaves all others to whoever has them, or to nobody."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope.get("path", "")
        if path in _ADDRESSES or path.startswith(_FOLDERS):
            return super().matches(scope)
        return Match.NONE, {}


class PageGate:
    """What stands before Gradio: the key, where the server has one.

    Args:
        app: Gradio's.
        accepts: whether an ``Authorization: Bearer`` header lets its sender in.
    """

    def __init__(self, app: ASGIApp, accepts: Callable[[str | None], bool]) -> None:
        self.app, self.accepts = app, accepts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on what comes with a key; have a browser ask for one otherwise."""
        key = bearer(Headers(scope=scope).get("authorization"))
        if self.accepts(f"Bearer {key}" if key else None):
            await self.app(scope, receive, send)
            return
        ask = {"WWW-Authenticate": 'Basic realm="latteflow", charset="UTF-8"'}
        message = "give the API key as the password; the name may be anything"
        await ApiError(401, "invalid_api_key", message, headers=ask).response()(scope, receive, send)
