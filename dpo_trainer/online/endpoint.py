"""A server that speaks OpenAI's protocol: its address, the key for it, the client, and what every request has to check."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import math
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from openai import APIConnectionError, AsyncOpenAI

T = TypeVar("T")

LEAST = {"max_tokens": 2, "timeout": 0.001, "concurrency": 1}  # 2: a word, and its end. All other numbers: 0
REPEATED = {408, 409, 429}  # statuses that the client has asked again for, as for 5xx
NO_KEY = "none-needed"
PART_OF_KEY = 4
"""Characters: as many of a key in a row are not shown."""


def client_of(base_url: str, key: str, *, timeout: float, max_retries: int, largest: int) -> AsyncOpenAI:
    """A client that reads `largest` bytes of a body, whatever its status, and leaves the rest with the server."""
    import openai

    return openai.AsyncOpenAI(
        api_key=key,
        base_url=base_url,
        timeout=timeout,
        max_retries=max_retries,
        # A proxy from the environment would look for this machine's server on its own.
        http_client=openai.DefaultAsyncHttpxClient(
            trust_env=not is_loopback(base_url),
            headers={"Accept-Encoding": "identity"},  # a small body may unpack to a large one
            event_hooks={"response": [_reading_at_most(largest)]},
        ),
    )


def _reading_at_most(largest: int) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """What is done with a response before its body is read. A body that is cut is no JSON, and so no answer."""
    import openai

    # The HTTP library that the client is built on: httpx, or httpx2 of newer releases.
    kinds = [kind.__module__.partition(".")[0] for kind in openai.DefaultAsyncHttpxClient.__mro__]
    http: Any = importlib.import_module(next(name for name in kinds if name.startswith("httpx")))

    class Capped(http.AsyncByteStream):
        def __init__(self, stream: Any):
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = largest
            async for chunk in self.stream:
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def cap(response: Any) -> None:
        response.headers.pop("Content-Encoding", None)
        response.stream = Capped(response.stream)

    return cap


def without_key(text: str, key: str) -> str:
    """The text with *** for every part of the key: servers show its end, or its beginning, to say which one they refuse."""
    if key == NO_KEY:
        return text
    parts = {key[start : start + PART_OF_KEY] for start in range(max(1, len(key) - PART_OF_KEY + 1))}
    shown, end = [], 0
    for start in range(len(text)):
        length = PART_OF_KEY if text[start : start + PART_OF_KEY] in parts else len(key) * text.startswith(key, start)
        if length:
            shown += ["***"] if start >= end else []
            end = max(end, start + length)
        elif start >= end:
            shown.append(text[start])
    return "".join(shown)


def api_key(name: str, base_url: str, *, needed: bool) -> str:
    """What the environment has under `name`: read each time, so that no attribute holds it. Where it has none, a filler, unless
    one is `needed`, as anywhere but on this machine.

    Raises:
        ValueError: for a name or a key that is none, without showing it.
    """
    if not isinstance(name, str) or not re.fullmatch("[A-Z][A-Z0-9_]*", name):
        # Not shown: it may be the key itself.
        raise ValueError("api_key_env is no name of a variable (A-Z, 0-9, _): give the name, never the key.")
    key = os.environ.get(name, "")
    if not key and needed and not is_loopback(base_url):
        raise ValueError(f"api_key_env: ${name} is not set, and {base_url} is not on this machine: put the key there.")
    if not key:
        return NO_KEY
    if not re.fullmatch(r"[!#-&(-\[\]-~]+", key):  # the HTTP library would show it in an error
        raise ValueError(
            f"api_key_env: ${name} has white space, quotes, or characters beyond ASCII: correct its value."
        )
    return key


def no_connection(error: APIConnectionError) -> str:
    """The error in a few words, with its cause."""
    cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
    return f"{error.message.rstrip('.')}{cause}"


def run_now(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run_here = True
    else:
        run_here = False  # a notebook has a loop that runs, and a thread has but one
    if run_here:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_url(given: Any) -> str:
    if not isinstance(given, str) or "@" in given or "?" in given:  # not shown: a password may be in it
        raise ValueError(
            "base_url must be a text without user, password or query: the key goes where api_key_env says."
        )
    with contextlib.suppress(ValueError):  # of an address or a port that is none
        parts = urlsplit(given)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return given.rstrip("/")
    raise ValueError(f"base_url {given!r} is no address: give one such as http://localhost:8000/v1.")


def checked_number(name: str, value: Any, *, whole: bool = False) -> float:
    kind, least = int if whole else int | float, LEAST.get(name, 0)
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < math.inf:
        raise ValueError(f"{name} is {value!r}: give a {'whole ' if whole else ''}number of at least {least}.")
    return float(value)
