"""Completions from a vLLM engine in the training process, on the same GPU, which reads the policy's LoRA adapter whenever that has changed.

Written against the documentation of vLLM's `LLM` class (0.10 and later); not run with vLLM itself. The engine holds the base model
a second time, and a share of the GPU for its keys and values.

P prompts   K completions of each
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..samples import Completion
from .generate import Decoding
from .vllm_adapter import adapter_weights, check_policy, fingerprint, write_adapter
from .vllm_sampling import asked_for, completion_of, sampling_options, seed_of

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


class VLLMColocatedGenerator:
    """A `Generator` on one process.

    Each version of the adapter is a new one to the engine, named after a hash of its numbers, so that its cache of prefixes
    never mixes two of them. The reference "policy with its adapter off" is the engine's base model.

    Args:
        tokenizer: decodes.
        policy: the model in training, whose base the engine loads by name.
        adapter_dir: where adapters are written for the engine.
        end_ids: tokens that end a completion, the tokenizer's EOS first.
        gpu_memory: share of the GPU's memory for the engine, in (0, 1).
        max_model_len: most tokens of prompt + completion; None: the model's window.

    Raises:
        ValueError: without the package vllm, for a policy that is no LoRA adapter on a base with a name, or of a rank that vLLM
            does not take.
    """

    def __init__(
        self,
        tokenizer: Any,
        policy: nn.Module,
        *,
        adapter_dir: str | Path,
        end_ids: Sequence[int],
        gpu_memory: float,
        max_model_len: int | None,
    ):
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "--generator vllm_colocated needs the package vllm, which is not installed: pip install 'dpo_trainer[vllm]', or "
                "sample with --generator transformers."
            )
        check_policy(policy)
        model: Any = extract_model_from_parallel(policy)
        base, rank = model.get_base_model().name_or_path, model.peft_config[model.active_adapter].r
        if not base:
            raise ValueError(
                "--generator vllm_colocated loads the base model by its name, and this one was built in memory: save it."
            )
        if rank > RANKS[-1]:
            raise ValueError(
                f"--lora_r {rank} is more than vLLM takes ({RANKS[-1]}): lower it, or sample by transformers."
            )
        from vllm import LLM

        self.tokenizer, self.end_ids = tokenizer, list(dict.fromkeys(end_ids))
        self.adapter_dir = Path(adapter_dir).expanduser().resolve()
        self.adapter_dir.mkdir(parents=True, exist_ok=True)
        self.engine = LLM(
            model=base,
            dtype=str(model.get_base_model().dtype).removeprefix("torch."),
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(known for known in RANKS if known >= rank),
            gpu_memory_utilization=gpu_memory,
            max_model_len=max_model_len,
            generation_config="vllm",  # else the model's own defaults creep in
        )
        self._loaded: tuple[str, int] = ("", 0)  # name of the adapter in use, and its number

    def __call__(
        self, model: nn.Module, prompts: Sequence[list[int]], count: int, *, decoding: Decoding, seed: int
    ) -> list[list[Completion]]:
        from vllm import SamplingParams

        request = self._request(extract_model_from_parallel(model))
        asked = asked_for(decoding, count)
        options = sampling_options(decoding, self.end_ids) | {"n": asked, "detokenize": False}
        replies = self.engine.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            [SamplingParams(**options, seed=seed_of(seed, place)) for place in range(len(prompts))],
            lora_request=request,
            use_tqdm=False,
        )
        sampled = [[self._completion(choice) for choice in reply.outputs] for reply in replies]
        return [answers * (count // asked) for answers in sampled]

    def _completion(self, choice: Any) -> Completion:
        return completion_of(
            list(choice.token_ids), choice.finish_reason, choice.stop_reason, self.end_ids, self.tokenizer
        )

    def _request(self, model: Any) -> Any:
        """The adapter as it is now; None where it is off."""
        from vllm.lora.request import LoRARequest

        check_policy(model)
        if model.get_model_status().enabled is False:
            return None
        weights, config = adapter_weights(model), model.peft_config[model.active_adapter]
        name, number = fingerprint(weights, config), self._loaded[1]
        if name != self._loaded[0]:
            write_adapter(self.adapter_dir / name, {key: w.detach().cpu() for key, w in weights.items()}, config)
            if self._loaded[0]:
                shutil.rmtree(self.adapter_dir / self._loaded[0], ignore_errors=True)
            number += 1
            self._loaded = (name, number)
        return LoRARequest(name, number, str(self.adapter_dir / name))
