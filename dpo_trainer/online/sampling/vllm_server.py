"""Completions from a vLLM server, which is sent the policy's LoRA adapter whenever that has changed.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE_MODEL --enable-lora --max-lora-rank 64 --generation-config vllm

Written against the documentation and sources of vLLM 0.33; not run against a real server. `return_token_ids` came with
0.10.2, the rest is older. The server's numbers are its own: another precision and other kernels than training's.

P prompts   K completions of each
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig
from torch import Tensor, nn

from ...distributed.sharding import kept
from ..feedback.protocol import FeedbackUnavailable
from ..samples import Completion
from .generate import Decoding
from .vllm_adapter import adapter_weights, check_policy, fingerprint, write_adapter
from .vllm_client import Reply, VLLMClient
from .vllm_sampling import asked_for, completion_of, sampling_options, seed_of

logger = logging.getLogger(__name__)


class VLLMServerGenerator:
    """A `Generator`: a request for each prompt, several at once.

    An adapter is a new model at the server, named after a hash of its numbers and settings. They are few, so a hash costs
    milliseconds, and it sees every change, where the version counters of tensors miss those that engines make through
    `.data`; processes with the same weights come to the same name without a word. A name of its own also keeps the
    server's prefix cache apart: under one name, with `load_inplace`, vLLM has used cached keys and values of old weights
    (vllm-project/vllm#42125) and has read the adapter from disk at each step (#41482). Whatever carries `lora_name` and is no
    longer in use is unloaded and deleted, also that of an earlier run: runs that share a server need a `lora_name` each.

    The reference "policy with its adapter off" is the server's base model. Let the server hold that as training does: another
    quantisation or precision is another model, and its samples are not quite the policy's.

    Equal calls give equal samples as far as the server's arithmetic does: a batch of another size may round otherwise.

    Args:
        tokenizer: decodes.
        base_url: of the server, such as http://localhost:8000/v1.
        adapter_dir: a folder of its own that this process and the server see under one path.
        end_ids: tokens that end a completion, the tokenizer's EOS first.
        lora_name: what the names of adapters begin with.
        concurrency: requests under way at once, of this process.
        timeout: seconds for one try.
        max_retries: of a request, with growing pauses.
        api_key_env: name of the environment variable with the server's key, if it has one.
        is_main_process: whether this process is the one that sends adapters.
        wait: returns when all processes have called it. Called twice when the weights have changed.

    Raises:
        ValueError: for an option that cannot work, a server that is down, old or not set up for adapters, and when sampling for a
            model or a prompt that it cannot take.
        FeedbackUnavailable: when sampling, where the server has gone.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        base_url: str,
        adapter_dir: str | Path,
        end_ids: Sequence[int],
        lora_name: str = "policy",
        concurrency: int = 8,
        timeout: float = 300.0,
        max_retries: int = 3,
        api_key_env: str = "VLLM_API_KEY",
        is_main_process: bool = True,
        wait: Callable[[], Any] = lambda: None,
    ):
        if not re.fullmatch("[A-Za-z0-9_.-]+", lora_name):
            raise ValueError(f"lora_name is {lora_name!r}: use letters, digits, '_', '.' and '-'.")
        self.tokenizer = tokenizer
        self.adapter_dir = Path(adapter_dir).expanduser().resolve()
        self.end_ids = list(dict.fromkeys(end_ids))
        self.lora_name, self.is_main_process, self.wait = lora_name, is_main_process, wait
        if is_main_process:
            try:
                self.adapter_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"adapter_dir (--vllm_adapter_dir) cannot be made: {error}.") from error
        self.server = VLLMClient(
            base_url, api_key_env=api_key_env, concurrency=concurrency, timeout=timeout, max_retries=max_retries
        )
        self._loaded: dict[tuple[int, str], str] = {}  # by model and adapter: what the server has of it
        self._base_checked = False

    def __call__(
        self, model: nn.Module, prompts: Sequence[list[int]], count: int, *, decoding: Decoding, seed: int
    ) -> list[list[Completion]]:
        name = self._name_at_server(extract_model_from_parallel(model))
        asked = asked_for(decoding, count)
        options = sampling_options(decoding, self.end_ids) | {"model": name, "n": asked, "return_token_ids": True}
        bodies = [options | {"prompt": list(ids), "seed": seed_of(seed, place)} for place, ids in enumerate(prompts)]
        replies = self.server.complete(bodies)
        for place, reply in replies.items():
            if not reply.ok:
                raise self._no_completion(reply, len(prompts[place]), name, decoding)
        sampled = [self._completions(replies[place], asked) for place in range(len(prompts))]
        return [answers * (count // asked) for answers in sampled]

    # --- replies ---

    def _completions(self, reply: Reply, count: int) -> list[Completion]:
        """[K] in the order of the server's index."""
        choices = reply.json().get("choices")
        choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
        by_index = {str(choice.get("index")): choice for choice in choices}
        if by_index.keys() != {str(index) for index in range(count)}:
            raise ValueError(f"{self.server.name} returned {len(choices)} choices for n={count}: is it a vLLM server?")
        return [self._completion(by_index[str(index)]) for index in range(count)]

    def _completion(self, choice: dict[str, Any]) -> Completion:
        ids, finish, stop = (choice.get(key) for key in ("token_ids", "finish_reason", "stop_reason"))
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(
                f"{self.server.name} returned no token_ids: `return_token_ids` needs vLLM 0.10.2 or later. Update the server."
            )
        if finish not in ("stop", "length"):
            raise FeedbackUnavailable(
                f"{self.server.name} broke off a completion ({finish}). Start it again, and resume."
            )
        return completion_of(ids, finish, stop, self.end_ids, self.tokenizer)

    def _no_completion(self, reply: Reply, length: int, name: str, decoding: Decoding) -> Exception:
        new, longest = decoding.max_new_tokens, self.server.max_model_len
        what = f"for {new} tokens after a prompt of {length} tokens, by the model {name!r}"
        if reply.status == 404:
            # A server that came back has the base alone; a run that comes back sends the adapter again.
            return self.server.failure(reply, what, refused=False)
        room = f"The server takes {longest} tokens in all: " if longest is not None and length + new > longest else ""
        way_out = "lower --max_length or --max_new_tokens, or start the server with a larger --max-model-len."
        return self.server.failure(reply, what, f"{room}{way_out}" if room else f"If it is too long: {way_out}")

    # --- the model there ---

    def _name_at_server(self, model: Any) -> str:
        """Of the model as it is now, after sending its adapter where that is news. Collective when the weights have changed."""
        check_policy(model)
        if model.get_model_status().enabled is False:
            return self.server.base
        self._check_base(model)
        weights, config = adapter_weights(model), model.peft_config[model.active_adapter]
        name = f"{self.lora_name}-{fingerprint(weights, config)}"
        slot = (id(model), model.active_adapter)
        if self._loaded.get(slot) != name:
            self._hand_over(name, weights, config, slot)
        return name

    def _hand_over(self, name: str, weights: dict[str, Tensor], config: LoraConfig, slot: tuple[int, str]) -> None:
        others = {there for where, there in self._loaded.items() if where != slot}
        whole = kept(weights)
        self.wait()  # until no rank samples with the old one any more
        try:
            if self.is_main_process and name not in others:
                self._send(name, whole, config, others)
        finally:
            self.wait()
        if not self.is_main_process and name not in self.server.adapters():
            raise FeedbackUnavailable(
                f"{self.server.name} has not got the adapter of the main process, which says why."
            )
        self._loaded[slot] = name

    def _send(self, name: str, weights: dict[str, Tensor], config: LoraConfig, in_use: set[str]) -> None:
        """First unload, so that there is room for the new one; its folder is removed last, when no rank can request it any more."""
        for there in self.server.adapters():
            if self._is_ours(there) and there not in in_use:
                self.server.unload(there)
        write_adapter(self.adapter_dir / name, weights, config)
        self.server.load(name, str(self.adapter_dir / name), rank=config.r)
        for old in self.adapter_dir.iterdir():
            if self._is_ours(old.name.removesuffix(".part")) and old.name not in {name, *in_use}:
                shutil.rmtree(old, ignore_errors=True)

    def _is_ours(self, name: str) -> bool:
        return re.fullmatch(f"{re.escape(self.lora_name)}-[0-9a-f]{{16}}", name) is not None

    def _check_base(self, model: Any) -> None:
        own = getattr(model.get_base_model(), "name_or_path", "")
        served = {self.server.base, self.server.root}
        if self._base_checked or not own:
            return
        self._base_checked = True
        if own not in served and Path(own).resolve() not in {Path(there).resolve() for there in served if there}:
            logger.warning(
                "%s serves %s, and the policy's base is %s: if these are two models, the samples are not the policy's.",
                *(self.server.name, " from ".join(sorted(served - {""})), own),
            )
