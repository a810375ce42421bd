"""A chat model behind any server that speaks OpenAI's protocol, asked many things at once and patiently."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from ...printable import printable
from ..endpoint import REPEATED, api_key, checked_number, checked_url, client_of, no_connection, run_now, without_key
from .protocol import FeedbackUnavailable

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
LARGEST_BODY = 4_000_000  # bytes of a reply, with all that the server says beside it
LONGEST_PROBLEM = 1000  # characters of what a server says is wrong
LONGEST_RETRY_AFTER = 120.0  # seconds; the client waits no longer between two tries, whatever a server asks for
TOO_LARGE = f"the body has more than {LARGEST_BODY // 1_000_000} MB"

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """What came of one request. Nothing in it holds a part of the key, nor `problem` a control character, whatever the server
    says."""

    text: str = ""
    problem: str = ""  # why there is no whole reply
    cut: bool = False  # at max_tokens
    silent: bool = False  # no answer came, after all retries
    fatal: bool = False  # no other request would fare better
    tokens: tuple[int, int] = (0, 0)  # in, out


class Chat:
    """A model at a server, asked many things at once. The arguments are those of `LLMJudge`."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str | None,
        api_key_env: str,
        temperature: float | None,
        max_tokens: int,
        timeout: float,
        max_retries: int,
        concurrency: int,
        wait_minutes: float,
    ):
        if not isinstance(model, str) or not model.strip():
            raise ValueError(f"model is {model!r}: give the name that the server knows, see its /v1/models.")
        self.model = model
        self.base_url = checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
        self.api_key_env = api_key_env
        self._api_key()
        self.temperature = None if temperature is None else checked_number("temperature", temperature)
        self.max_tokens = int(checked_number("max_tokens", max_tokens, whole=True))
        self.timeout = checked_number("timeout", timeout)
        self.max_retries = int(checked_number("max_retries", max_retries, whole=True))
        self.concurrency = int(checked_number("concurrency", concurrency, whole=True))
        self.wait_minutes = checked_number("wait_minutes", wait_minutes)

    def ask(self, requests: Sequence[Turns], seen: Callable[[int, Reply], Awaitable[None]]) -> list[Reply]:
        """One reply each, in order; `seen(number, reply)` is told of each as it comes.

        Raises:
            ValueError: for a key or a model that the server refuses.
            FeedbackUnavailable: where nothing was answered for `wait_minutes`.
        """
        return run_now(self._ask_patiently(requests, seen)) if requests else []

    async def _ask_patiently(self, requests: Sequence[Turns], seen: Callable[..., Awaitable[None]]) -> list[Reply]:
        """Where the server falls silent: pause, and go on with what was not asked yet, or with all if it never answered."""
        replies: dict[int, Reply] = {}
        waiting, pause, deadline = list(range(len(requests))), FIRST_PAUSE, self._deadline()
        async with self._client() as client:
            while waiting:
                heard = await self._round(client, requests, waiting, seen)
                replies |= heard
                if not all(reply.silent for reply in heard.values()):
                    pause, deadline = FIRST_PAUSE, self._deadline()
                waiting = [number for number in waiting if number not in heard]
                silence = all(reply.silent for reply in replies.values())
                waiting += list(heard) if silence else []  # last, lest the same ones are always asked first
                left = deadline - time.monotonic()
                if not waiting or left <= 0:
                    break
                why = next(reply.problem for reply in heard.values() if reply.silent)
                logger.warning(
                    "Judge 'llm': %s does not answer (%s). It is asked again in %.3g s, for %.3g s more.",
                    *(self.base_url, why, min(pause, left), left),
                )
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)
        if silence:
            raise FeedbackUnavailable(
                f"Judge 'llm': {self.base_url} has answered nothing in {self.wait_minutes:g} minutes ({replies[0].problem}). "
                "Start the server, or look at base_url; raise timeout or wait_minutes if it is only slow. Then resume from the "
                "checkpoint: answers that came before are in the cache."
            )
        return [replies.get(number) or Reply(problem="the server fell silent") for number in range(len(requests))]

    async def _round(
        self,
        client: AsyncOpenAI,
        requests: Sequence[Turns],
        numbers: Sequence[int],
        seen: Callable[..., Awaitable[None]],
    ) -> dict[int, Reply]:
        """Ask these. A worker without an answer stops while no other one was answered: all would wait as long in vain."""
        waiting, heard, answered = deque(numbers), dict[int, Reply](), 0

        async def work() -> None:
            nonlocal answered
            while waiting:
                number, before = waiting.popleft(), answered
                reply = await self._ask(client, requests[number])
                if reply.fatal:
                    raise ValueError(reply.problem)
                heard[number] = reply
                await seen(number, reply)
                if reply.silent and answered == before:
                    return
                answered += not reply.silent

        await asyncio.gather(*(work() for _ in range(min(self.concurrency, len(numbers)))))
        return heard

    async def _ask(self, client: AsyncOpenAI, turns: Turns) -> Reply:
        import openai

        # OpenAI's reasoning models know the new name alone, and some other servers the old one.
        limit = "max_completion_tokens" if urlsplit(self.base_url).hostname == "api.openai.com" else "max_tokens"
        options: dict[str, Any] = {limit: self.max_tokens}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        create = client.chat.completions.with_raw_response.create
        # The client's own limit starts anew with each byte, and a server may drip for ever.
        longest = (self.max_retries + 1) * (self.timeout + LONGEST_RETRY_AFTER)
        try:
            raw = await asyncio.wait_for(create(model=self.model, messages=cast("Any", turns), **options), longest)
            reply = _read(raw.content) if len(raw.content) < LARGEST_BODY else Reply(problem=TOO_LARGE)
        except asyncio.TimeoutError:
            reply = Reply(problem=f"no whole answer in {longest:.3g} s", silent=True)
        except openai.APIConnectionError as error:
            reply = Reply(problem=no_connection(error), silent=True)
        except openai.APIStatusError as error:
            reply = self._refusal(error.status_code, error.message)
        key = client.api_key
        problem = printable(without_key(reply.problem[: 2 * LONGEST_PROBLEM], key))[:LONGEST_PROBLEM]
        return replace(reply, text=without_key(reply.text, key), problem=problem)

    def _refusal(self, status: int, message: str) -> Reply:
        if status in (401, 403):  # without the server's words, which may show a part of the key
            way_out = (
                f"Set ${self.api_key_env} to a key that this server takes, and that may use the model {self.model!r}."
            )
            return Reply(problem=f"Judge 'llm': {self.base_url} refuses the key ({status}). {way_out}", fatal=True)
        if status == 404:
            way_out = "Look at model, see its /models, and at base_url, which mostly ends in /v1."
            problem = f"Judge 'llm': {self.base_url} has no model {self.model!r}, or no chat at this address (404). {way_out}"
            return Reply(problem=problem, fatal=True)
        return Reply(problem=message, silent=status in REPEATED or status >= 500)

    def _client(self) -> AsyncOpenAI:
        return client_of(
            self.base_url, self._api_key(), timeout=self.timeout, max_retries=self.max_retries, largest=LARGEST_BODY
        )

    def _api_key(self) -> str:
        return api_key(self.api_key_env, self.base_url, needed=True)

    def _deadline(self) -> float:
        return time.monotonic() + 60 * self.wait_minutes


def _read(body: bytes) -> Reply:
    """A chat completion, of which nothing is taken for granted."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Reply(problem="the body is no chat completion")
    if not isinstance(content, str | None):
        return Reply(problem="the message of the body is no text")
    usage = data.get("usage")
    counts = [usage.get(f"{side}_tokens") if isinstance(usage, dict) else 0 for side in ("prompt", "completion")]
    tokens_in, tokens_out = (n if type(n) is int and 0 <= n < 1e9 else 0 for n in counts)
    return Reply(text=content or "", cut=finish == "length", tokens=(tokens_in, tokens_out))


def sendable(text: str) -> str:
    return text.encode(errors="replace").decode()  # half of a surrogate pair is in no UTF-8
