"""What a vLLM server with `--enable-lora --max-cpu-loras 1` does with the requests of our generator, on loopback, with a model
small enough for a CPU. It loads adapters from files and adds them to the weights by hand: W + alpha / r * B A.

with VLLMStandIn(tiny.llama()) as server:
    generator = VLLMServerGenerator(tokenizer, base_url=server.base_url, ...)

What it refuses, and in which words and statuses, is after the sources of vLLM 0.33.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

Answer = tuple[int, Any]  # status, body: JSON, or text as it is
BASE = "org/base"


class VLLMStandIn:
    """`asked` holds (path, body) of every request, `busiest` how many completions there were at once at most.

    Args:
        model: the base model; `eos` ends its answers.
        key: asked for under /v1.
        updating: VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        changed: what to answer instead of its own answer, given path, body, and that.
        pause: seconds that a completion takes at least.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos: int = 1,
        key: str | None = None,
        updating: bool = True,
        max_model_len: int = 256,
        max_lora_rank: int = 16,
        changed: Callable[[str, Any, Answer], Answer] = lambda path, body, answer: answer,
        pause: float = 0.0,
        port: int = 0,
    ):
        self.model = copy.deepcopy(model).eval()
        self.eos, self.key, self.updating, self.changed, self.pause = eos, key, updating, changed, pause
        self.max_model_len, self.max_lora_rank = max_model_len, max_lora_rank
        self.adapters: dict[str, str] = {}  # name -> path
        self.held: tuple[str, nn.Module] | None = None  # room for one: the adapter used last
        self.asked: list[tuple[str, Any]] = []
        self.authorizations: list[str] = []
        self.busiest = self._busy = 0
        self._counting, self._computing = threading.Lock(), threading.Lock()
        self._http = _Quiet(("127.0.0.1", port), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> VLLMStandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def answer(self, path: str, body: Any) -> Answer:
        with self._computing:
            if path == "/health":
                return 200, ""
            if path == "/v1/models":
                base = {"id": BASE, "root": "/models/base", "parent": None, "max_model_len": self.max_model_len}
                cards = [{"id": name, "root": there, "parent": BASE} for name, there in self.adapters.items()]
                return 200, {"object": "list", "data": [base, *cards]}
            if path == "/v1/load_lora_adapter" and self.updating:
                return self._load(body)
            if path == "/v1/unload_lora_adapter" and self.updating:
                return self._unload(body["lora_name"])
            if path == "/v1/completions":
                return self._complete(body)
        return 404, {"detail": "Not Found"}

    # --- adapters ---

    def _load(self, body: dict[str, Any]) -> Answer:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters and not body.get("load_inplace"):
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(path, "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads(Path(path, "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self.adapters[name] = path
        self._adapted(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> Answer:
        if name not in self.adapters:
            return error(404, f"The lora adapter '{name}' cannot be found.")
        if self.held is None or self.held[0] != name:
            return error(500, f"Failed to remove lora adapter '{name}' from the engine.")
        del self.adapters[name]
        self.held = None
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _adapted(self, name: str) -> nn.Module:
        """The model with this adapter, which is read again if another was in use since."""
        if self.held is None or self.held[0] != name:
            self.held = name, with_adapter(self.model, Path(self.adapters[name]))
        return self.held[1]

    # --- completions ---

    def _complete(self, body: dict[str, Any]) -> Answer:
        prompt, new, n = body["prompt"], body["max_tokens"], body["n"]
        if body["model"] != BASE and body["model"] not in self.adapters:
            return error(404, f"The model `{body['model']}` does not exist.")
        if body["temperature"] == 0 and n > 1:
            return error(400, f"n must be 1 when using greedy sampling, got {n}.")
        if len(prompt) + new > self.max_model_len:
            said = f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {new} output"
            return error(400, f"{said} tokens and your prompt contains at least {len(prompt)} input tokens.")
        model = self.model if body["model"] == BASE else self._adapted(body["model"])
        choices = [self._choice(model, body, index) for index in range(n)]
        return 200, {"object": "text_completion", "model": body["model"], "choices": choices}

    @torch.no_grad()
    def _choice(self, model: nn.Module, body: dict[str, Any], index: int) -> dict[str, Any]:
        numbers = torch.Generator().manual_seed(body["seed"] + index)
        ids: list[int] = []
        finish: tuple[str, Any] = ("length", None)
        while len(ids) < body["max_tokens"]:
            logits = model(input_ids=torch.tensor([[*body["prompt"], *ids]]), use_cache=False).logits[0, -1]
            if body["temperature"] == 0:
                ids.append(int(logits.argmax()))
            else:
                chances = (logits / body["temperature"]).softmax(-1)
                ids.append(int(chances.multinomial(1, generator=numbers)))
            if ids[-1] == self.eos or ids[-1] in body["stop_token_ids"]:
                finish = "stop", None if ids[-1] == self.eos else ids[-1]
                break
        return {
            "index": index,
            "text": "text of the server's own",
            "finish_reason": finish[0],
            "stop_reason": finish[1],
            "token_ids": ids if body.get("return_token_ids") else None,
        }

    # --- HTTP ---

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._serve(None)

            def do_POST(self) -> None:
                self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _serve(self, body: Any) -> None:
                completing = self.path == "/v1/completions"
                with server._counting:
                    server.asked.append((self.path, body))
                    server.authorizations.append(self.headers.get("Authorization", ""))
                    server._busy += completing
                    server.busiest = max(server.busiest, server._busy)
                try:
                    time.sleep(server.pause * completing)
                    allowed = server.key is None or self.headers.get("Authorization") == f"Bearer {server.key}"
                    if self.path.startswith("/v1") and not allowed:
                        answer: Answer = 401, {"error": "Unauthorized"}
                    else:
                        answer = server.answer(self.path, body)
                    status, said = server.changed(self.path, body, answer)
                finally:
                    with server._counting:
                        server._busy -= completing
                with contextlib.suppress(OSError):  # the client has given up
                    self._send(status, said)

            def _send(self, status: int, said: Any) -> None:
                text = said if isinstance(said, str) else json.dumps(said)
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(said, str) else "application/json")
                self.send_header("Content-Length", str(len(text.encode())))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def error(status: int, message: str) -> Answer:
    return status, {"error": {"message": message, "type": "", "param": None, "code": status}}


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A copy with W + alpha / r * B A for each pair of matrices in the file. Anything else in it is an error."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    adapted = copy.deepcopy(model)
    for name in [name for name in weights if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = weights.pop(name), weights.pop(name.replace("lora_A", "lora_B"))
        with torch.no_grad():
            adapted.get_submodule(module).weight.add_(config["lora_alpha"] / config["r"] * b @ a)
    assert not weights, f"not of LoRA: {list(weights)}"
    return adapted


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""
