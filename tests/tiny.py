"""What most tests need, small enough to build anew each time: a tokenizer, models, rows, a trainer over them.

trainer = tiny.trainer(tmp_path, loss_type="ipo")      everything else by default
trainer.train()
tiny.losses(trainer), tiny.weights(trainer.model)
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from dpo_trainer import DPOConfig, DPOTrainer

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
PAD, END = 0, 1
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(SPECIAL) + len(ALPHABET)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["cat", "dog", "owl", "eats", "sees", "likes", "milk", "figs", "hay", "now", "not"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of any text, `<|end|>` as EOS, another token to pad with, and a chat template."""
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*SPECIAL, *ALPHABET])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def rows(n: int = 22, seed: int = 0) -> list[dict[str, str]]:
    """`n` preference pairs; prompts and completions of 1 to 4 words, chosen never equal to rejected."""
    draw = random.Random(seed)

    def text(prefix: str = "") -> str:
        return prefix + " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))

    pairs: list[dict[str, str]] = []
    while len(pairs) < n:
        pair = {"prompt": text(), "chosen": text(" "), "rejected": text(" ")}
        if pair["chosen"] != pair["rejected"]:
            pairs.append(pair)
    return pairs


def chat_rows(n: int = 22, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """The same pairs as conversations."""
    role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {column: [{"role": role[column], "content": text.strip()}] for column, text in row.items()}
        for row in rows(n, seed)
    ]


def dataset(n: int = 22, seed: int = 0) -> Dataset:
    return Dataset.from_list(rows(n, seed))


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": END,
    "initializer_range": 0.1,  # unlike the usual 0.02, large enough for attention to differ between tokens
}


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **config}))


def mixtral(seed: int = 0, **config: Any) -> MixtralForCausalLM:
    """A mixture of 4 experts, 2 at work for each token."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **config}))


def lora(**options: Any) -> LoraConfig:
    """Adapters on every linear layer; their B matrices begin at zero, so that the model begins as its base."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **options})


def fill_adapters(model: nn.Module, seed: int = 1, scale: float = 0.05, adapter: str = "") -> None:
    """Random numbers for the trainable weights (of one adapter): an adapter that was trained before."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and adapter in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=numbers))


def checkpoint_layers(model: Any, use_reentrant: bool) -> None:
    """transformers 5.23 renamed the method."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": use_reentrant})


Config = TypeVar("Config", bound=DPOConfig)


def config(folder: Path | str, *, kind: type[Config] = DPOConfig, **options: Any) -> Config:
    """4 steps of plain gradient descent on batches of 4, float32: what differs between two runs stays as small as it is.

    (Adam divides by the size of a gradient, and so blows rounding errors up where a gradient is nearly zero.)
    """
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(**{**defaults, **options})


def trainer(
    folder: Path | str,
    *,
    model: PreTrainedModel | nn.Module | str | None = None,
    train: Any = None,
    parts: dict[str, Any] | None = None,
    **options: Any,
) -> DPOTrainer:
    """A trainer of `model` (a Llama) on `train` (22 pairs); `parts` are arguments of DPOTrainer, `options` of the config."""
    given: dict[str, Any] = {
        "model": model if model is not None or "model_init" in (parts or {}) else llama(),
        "args": config(folder, **options),
        "train_dataset": dataset() if train is None else train,
        "processing_class": tokenizer(),
    }
    return DPOTrainer(**{**given, **(parts or {})})


def trained(folder: Path | str, **how: Any) -> DPOTrainer:
    made = trainer(folder, **how)
    made.train()
    return made


def log_lines(made: DPOTrainer) -> list[dict[str, float]]:
    """The lines of training, one per logging step."""
    return [line for line in made.state.log_history if "loss" in line]


def losses(made: DPOTrainer) -> list[float]:
    return [line["loss"] for line in log_lines(made)]


def weights(model: nn.Module, *, trainable: bool = False) -> dict[str, Tensor]:
    """A copy of every parameter by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad or not trainable}


def assert_same_weights(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 0.0) -> None:
    """Equal names, and values within `atol` (0: to the bit)."""
    assert got.keys() == want.keys()
    far = {name: (got[name] - want[name]).abs().max().item() for name in want}
    name = max(far, key=far.__getitem__)
    assert far[name] <= atol, f"{name} differs by {far[name]:.2e}, more than {atol:.0e}"


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """How far the farthest weight went: what a comparison of trained weights must be small against."""
    return max((after[name] - before[name]).abs().max().item() for name in before)


class Killed(Exception):
    """Raised by `KillAt`."""


class KillAt(TrainerCallback):
    """Ends a run without notice, in the middle of a step (1, 2, ...)."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            raise Killed
