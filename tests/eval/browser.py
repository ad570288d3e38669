"""The report's page in a chromium without a window."""

import http.server
import queue
import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


def chromium(profile: Path, *arguments: str) -> list[str]:
    """A command line for a browser that shows nothing, keeps to itself and may play sound without being clicked."""
    return [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={profile}", *arguments,
    ]  # fmt: skip


def told_by_page(pages: Mapping[str, bytes], profile: Path) -> tuple[str, bytes]:
    """What a script of the page at ``/`` posts first: the address, and the body."""
    told: queue.Queue[tuple[str, bytes]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in pages else 404)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def do_POST(self):
            told.put((self.path, self.rfile.read(int(self.headers.get("content-length", 0)))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = chromium(profile, "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/")
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return told.get(timeout=60)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
