"""A real HTTP server on loopback that speaks chat completions, well or badly, as a function of each request says.

with ChatServer(lambda asked: said("A")) as server:
    judge = LLMJudge(model="m", base_url=server.base_url)
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request; `number` counts from 0 over all that the server gets."""

    number: int
    body: dict[str, Any]
    headers: Mapping[str, str]  # names in lower case

    @property
    def text(self) -> str:
        """What the user says."""
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    announced: int | None = None  # Content-Length, where it is not the truth
    hang: bool = False  # say nothing, until the client or the test has gone
    drip: bool = False  # a byte of white space now and then, for ever


def said(text: Any, *, finish: str = "stop", usage: Any = None) -> Answer:
    """A chat completion with this reply."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Answer(json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode())


def failed(status: int, message: str = "no") -> Answer:
    """An error; the client is told to try again soon, where it does so at all."""
    return Answer(json.dumps({"error": {"message": message}}).encode(), status, {"retry-after-ms": "1"})


def answers_of(text: str) -> tuple[str, str]:
    """(first, second) in the judge's own prompt, as one reads it who trusts the code in its second line, and no other."""
    marker = re.fullmatch(r"Each marker below has the code ([0-9a-f]{16})\. .*", text.split("\n")[1])
    assert marker is not None
    first, second = (
        text.split(f"\n[Answer {name} {marker[1]}]\n")[1].split(f"\n[End of answer {name} {marker[1]}]\n")[0]
        for name in "AB"
    )
    return first, second


def longer_is_better(asked: Asked) -> Answer:
    first, second = answers_of(asked.text)
    return said("TIE" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


def unused_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ChatServer:
    """Answers `POST <base_url>/chat/completions` with `behave(asked)`; `asked` holds every request, `busiest` how many there
    were at once at most."""

    def __init__(self, behave: Callable[[Asked], Answer], port: int = 0):
        self.behave = behave
        self.asked: list[Asked] = []
        self.busiest = 0
        self._busy = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._http = _Quiet(("127.0.0.1", port), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = self.path == "/v1/chat/completions"
                with server._lock:
                    asked = Asked(
                        len(server.asked), body, {name.lower(): value for name, value in self.headers.items()}
                    )
                    server.asked.append(asked)
                    server._busy += 1
                    server.busiest = max(server.busiest, server._busy)
                try:
                    answer = server.behave(asked) if known else failed(404)
                finally:
                    with server._lock:
                        server._busy -= 1
                with contextlib.suppress(OSError):  # the client has given up
                    self._send(answer)

            def _send(self, answer: Answer) -> None:
                if answer.hang:
                    server._over.wait(30)
                    return
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                length = len(answer.body) if answer.announced is None else answer.announced
                self.send_header("Content-Length", str(length))
                self.end_headers()
                while answer.drip and not server._over.is_set():
                    self.wfile.write(b" ")
                    time.sleep(0.02)
                self.wfile.write(answer.body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""
