"""A LoRA adapter as a vLLM server loads it: whether it can, what it is called, and how it is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ...models.adapters import weights_beside_adapter
from ...models.lora_settings import BASE_UNTOUCHED
from ...reference.hashing import digests, plain

OTHERWISE = "or sample with --generator transformers."
# Settings of LoraConfig that vLLM has not, or that some of its versions pass over without a word (the patterns).
NOT_IN_VLLM = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "monteclora_config"),
    *("rank_pattern", "alpha_pattern"),
)


def check_policy(policy: nn.Module) -> None:
    """Can a vLLM server be sent what is trained of this model?

    Raises:
        ValueError: for anything but one LoRA adapter, of a kind that vLLM has, on the base model as it was loaded.
    """
    model: Any = extract_model_from_parallel(policy)
    config = model.peft_config.get(model.active_adapter) if isinstance(model, PeftModel) else None
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        got = type(model).__name__ if config is None else f"an adapter of the kind {config.peft_type.value}"
        raise ValueError(
            f"--generator vllm_... hands vLLM a LoRA adapter, and this model has none ({got}): train one (--use_peft "
            f"true) without a reference model of another kind, {OTHERWISE} Full fine-tuning would need vLLM's transfer of weights "
            "over NCCL, which is not here."
        )
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"--generator vllm_... hands vLLM one adapter, and {model.active_adapters} are active: name one with "
            f"--model_adapter_name, {OTHERWISE}"
        )
    unfit = {name: getattr(config, name, None) for name in NOT_IN_VLLM if getattr(config, name, None)}
    if config.bias != "none":
        unfit["bias"] = config.bias
    if config.init_lora_weights not in BASE_UNTOUCHED:  # the server's base is that from before
        unfit["init_lora_weights"] = config.init_lora_weights
    if unfit:
        name, value = next(iter(unfit.items()))
        raise ValueError(f"--generator vllm_...: vLLM has no LoRA with {name} {value!r}. Leave it out, {OTHERWISE}")
    if beside := weights_beside_adapter(model):
        raise ValueError(
            f"--generator vllm_... hands vLLM the adapter alone, and {next(iter(beside))} is trained besides: freeze it, {OTHERWISE}"
        )


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The active adapter's, by the names that a file has. Parts of them, where an engine cuts weights between ranks."""
    # Parameters, not the state dict: ZeRO-3 shows nothing of its own there.
    return get_peft_model_state_dict(
        model,
        state_dict=dict(model.named_parameters()),
        adapter_name=model.active_adapter,
        save_embedding_layers=False,
    )


def fingerprint(weights: dict[str, Tensor], config: LoraConfig) -> str:
    """16 hexadecimal digits: the same on every rank, others for another number or setting. Collective for cut weights."""
    settings = plain(config.to_dict(), without=frozenset({"inference_mode"}))
    said = json.dumps([settings, digests(weights)], sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def write_adapter(folder: Path, weights: dict[str, Tensor], config: LoraConfig) -> None:
    """As PEFT saves it, in a folder that gets its name when it is whole. What has the name is replaced."""
    aside = folder.with_name(f"{folder.name}.part")
    for there in (folder, aside):
        if there.exists():
            shutil.rmtree(there)
    aside.mkdir()
    save_file(weights, aside / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(aside))
    aside.rename(folder)
