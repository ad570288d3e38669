"""Puts the page on the server's application: Gradio below ``/page``, with nothing of it that the page does not need."""

import os
from pathlib import Path

from fastapi import FastAPI
from starlette.routing import Mount

from mergekit_bio.serve.page import login
from mergekit_bio.serve.page.uploads import Uploads
from mergekit_bio.serve.settings import PAGE, ServeSettings

#: Questions of all visitors that are answered at once, and that wait.
_AT_ONCE, _WAITING = 16, 64
#: All visitors' recordings together may be so many times the largest one.
_UPLOADS_HELD = 64
#: Conversations that are kept; the one that was used longest ago goes first.
_MOST_CONVERSATIONS = 100


def attach_page(app: FastAPI, settings: ServeSettings) -> None:
    """Put the page on the server's application.

    Args:
        app: vLLM's.
        settings: Of the server; ``page`` is where uploads are kept.
    """
    assert settings.page is not None
    # Gradio reads these when it is imported: nothing leaves this machine, and uploads lie in a folder of their own.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": settings.page}
    import gradio

    from mergekit_bio.serve.page.layout import CSS, Page

    setattr(app.state, login.VISITORS, login.Visitors())
    app.router.routes.extend(login.ROUTES)
    blocks = Page(app, settings).blocks
    blocks.queue(max_size=_WAITING, default_concurrency_limit=_AT_ONCE, api_open=False)
    blocks.state_session_capacity = _MOST_CONVERSATIONS
    gradio.mount_gradio_app(
        app,
        blocks,
        PAGE,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=settings.max_audio_bytes,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=gradio.themes.Default(
            primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
        head='<link rel="icon" href="data:,">',
    )
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount)
    most = _UPLOADS_HELD * settings.max_audio_bytes
    mounted.app = Uploads(mounted.app, Path(settings.page), most_bytes=most)
