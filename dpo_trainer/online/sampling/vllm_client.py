"""What a vLLM server is asked over HTTP, many things at once, and what its replies come to.

Written against the documentation and sources of vLLM 0.33; not run against a real server.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...printable import printable
from ..endpoint import REPEATED, api_key, checked_number, checked_url, client_of, no_connection, run_now, without_key
from ..feedback.protocol import FeedbackUnavailable

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LARGEST_BODY = 256_000_000  # bytes: completions of many tokens, with what is said of each token
LONGEST_ERROR = 100_000  # characters of the body of an error

START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE_MODEL --enable-lora --max-lora-rank RANK "
    "--generation-config vllm"
)


@dataclass(frozen=True)
class Reply:
    """What came of one request. Where it failed, nothing in it holds a part of the key, whatever the server echoes."""

    status: int  # of HTTP; 0: no answer came, after all retries
    text: str

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> dict[str, Any]:
        """Empty where the body is no JSON object."""
        try:
            data = json.loads(self.text)
        except (ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def words(self) -> str:
        """The server's own, for an error, without control characters."""
        data = self.json()
        error = data.get("error")
        message = error.get("message") if isinstance(error, dict) else data.get("message") or data.get("detail")
        return printable(str(message or self.text)[:500])


class VLLMClient:
    """A vLLM server with one base model, and the adapters that it is told to load.

    `base` is the name of the base model there, `root` what it was loaded from, `max_model_len` the most tokens of a prompt with
    its completion, or None where the server does not say.

    Args:
        base_url: with or without /v1.
        api_key_env: name of the environment variable with the key; where it is not set, none is sent.
        timeout: seconds for one try.

    Raises:
        ValueError: for an option that cannot work, and for a server that is down, refuses the key, or is no vLLM server.
    """

    def __init__(self, base_url: str, *, api_key_env: str, concurrency: int, timeout: float, max_retries: int):
        if importlib.util.find_spec("openai") is None:
            raise ValueError("The generation server needs the openai package: `pip install 'dpo_trainer[judge]'`.")
        self.base_url = checked_url(base_url)
        if not self.base_url.endswith("/v1"):
            self.base_url += "/v1"
        self.api_key_env = api_key_env
        self.concurrency = int(checked_number("concurrency", concurrency, whole=True))
        self.timeout = checked_number("timeout", timeout)
        self.max_retries = int(checked_number("max_retries", max_retries, whole=True))
        self._api_key()
        self._look()

    @property
    def name(self) -> str:
        return f"The generation server {self.base_url}"

    def _look(self) -> None:
        """Is it there, and what does it serve?"""
        health = self._get(f"{self.base_url.removesuffix('/v1')}/health")
        if not health.ok:
            why = f"{health.status}: {health.words()}" if health.status else health.text
            raise ValueError(f"{self.name} is not up ({why}). Start it: {START}")
        try:
            bases = [card for card in self._cards() if card.get("parent") is None]
        except FeedbackUnavailable as error:
            raise ValueError(str(error)) from None
        if not bases:
            raise ValueError(
                f"{self.name} lists no base model at /models: it must be a vLLM server. Start one: {START}"
            )
        longest = bases[0].get("max_model_len")
        self.base, self.root = str(bases[0]["id"]), str(bases[0].get("root") or "")
        self.max_model_len = longest if isinstance(longest, int) else None

    # --- adapters ---

    def adapters(self) -> dict[str, str]:
        """{name: path} of those that the server has been told to load."""
        return {str(card["id"]): str(card.get("root")) for card in self._cards() if card.get("parent") is not None}

    def load(self, name: str, path: str, *, rank: int) -> None:
        """Load a new adapter from a folder.

        Raises:
            ValueError: where the server cannot.
            FeedbackUnavailable: where it does not answer.
        """
        reply = self._post("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        # The answer to an earlier try may have been lost on its way.
        if reply.ok or (reply.status == 400 and self.adapters().get(name) == path):
            return
        refused = reply.status in (400, 404, 405, 422, 500)  # 500: whatever the engine says of an adapter
        way_out = (
            f"Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-lora-rank {rank} or more, and "
            "give an adapter_dir (--vllm_adapter_dir) that the server sees under the same path."
        )
        raise self.failure(reply, f"to load the adapter in {path}", way_out, refused=refused)

    def unload(self, name: str) -> None:
        """Forget an adapter. The server says no where it has dropped its weights already, and that is as good."""
        reply = self._post("/unload_lora_adapter", {"lora_name": name}, max_retries=0)
        if not reply.status:
            raise self.failure(reply, f"to unload the adapter {name!r}")

    # --- requests ---

    def complete(self, bodies: Sequence[dict[str, Any]]) -> dict[int, Reply]:
        """Replies to POST /v1/completions by place. The first that fails ends it: what was not begun by then is missing."""
        return run_now(self._complete(bodies)) if bodies else {}

    async def _complete(self, bodies: Sequence[dict[str, Any]]) -> dict[int, Reply]:
        waiting, replies = deque(enumerate(bodies)), dict[int, Reply]()

        async def work(client: AsyncOpenAI) -> None:
            while waiting:
                place, body = waiting.popleft()
                replies[place] = await self._ask(client, "/completions", body)
                if not replies[place].ok:
                    waiting.clear()

        async with self._client(self.max_retries) as client:
            await asyncio.gather(*(work(client) for _ in range(min(self.concurrency, len(bodies)))))
        return replies

    def failure(self, reply: Reply, what: str, way_out: str = "", *, refused: bool | None = None) -> Exception:
        """The error for a reply that is none: ValueError where another try would fare no better."""
        again = f"Start it again ({START}), then resume from the checkpoint."
        if reply.status in (401, 403):  # without the server's words, which may show a part of the key
            said = f"{self.name} refuses the key ({reply.status}): set ${self.api_key_env} to that of `vllm serve --api-key`."
            return ValueError(said)
        if not reply.status:
            return FeedbackUnavailable(f"{self.name} did not answer when asked {what} ({reply.text}). {again}")
        said = f"{self.name} was asked {what}, and said no ({reply.status}: {reply.words()})."
        if refused is None:
            refused = reply.status < 500 and reply.status not in REPEATED
        return ValueError(f"{said} {way_out}".strip()) if refused else FeedbackUnavailable(f"{said} {again}")

    def _cards(self) -> list[dict[str, Any]]:
        reply = self._get("/models")
        if not reply.ok:
            raise self.failure(reply, "for its models", f"It must be a vLLM server: {START}")
        cards = reply.json().get("data")
        return [card for card in cards if isinstance(card, dict) and "id" in card] if isinstance(cards, list) else []

    def _get(self, path: str) -> Reply:
        return run_now(self._alone(path, None, self.max_retries))

    def _post(self, path: str, body: dict[str, Any], *, max_retries: int | None = None) -> Reply:
        return run_now(self._alone(path, body, self.max_retries if max_retries is None else max_retries))

    async def _alone(self, path: str, body: dict[str, Any] | None, max_retries: int) -> Reply:
        async with self._client(max_retries) as client:
            return await self._ask(client, path, body)

    async def _ask(self, client: AsyncOpenAI, path: str, body: dict[str, Any] | None) -> Reply:
        import openai

        try:
            if body is None:
                return Reply(200, await client.get(path, cast_to=str))
            return Reply(200, await client.post(path, cast_to=str, body=body))
        except openai.APIConnectionError as error:
            failed = Reply(0, no_connection(error))
        except openai.APIStatusError as error:
            failed = Reply(error.status_code, error.response.text)
        return Reply(failed.status, without_key(failed.text[:LONGEST_ERROR], client.api_key))

    def _client(self, max_retries: int) -> AsyncOpenAI:
        return client_of(
            self.base_url, self._api_key(), timeout=self.timeout, max_retries=max_retries, largest=LARGEST_BODY
        )

    def _api_key(self) -> str:
        return api_key(self.api_key_env, self.base_url, needed=False)
