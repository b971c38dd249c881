from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest


class Server(NamedTuple):
    """A web server on this machine, the folder that it serves, and the paths that it was asked for."""

    url: str
    folder: Path
    asked: list[str]


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield Server(f"http://127.0.0.1:{running.server_port}", folder, asked)
        running.shutdown()
        thread.join()


@pytest.fixture
def closed_port(monkeypatch) -> str:
    """An address on this machine where nobody answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as closed:
        port = closed.server_port
    return f"http://127.0.0.1:{port}"
