"""OnlineDPOConfig: the options of sampling and feedback, on top of those of `DPOConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..config import DPOConfig
from ..losses.options import is_number
from ..registry import choices
from .feedback.protocol import parse_options
from .sampling.generate import Decoding

OFFLINE_ONLY = {
    "precompute_ref_log_probs": "what is sampled is not known before training",
    "deduplicate": "it is about preference rows",
    "max_pairs_per_prompt": "--num_generations and --pair_selection decide the pairs",
    "max_completion_length": "--max_new_tokens is the limit of completions",
    "truncation_mode": "completions are never cut, and a prompt that is too long loses its beginning",
    "useless_pairs": "answers that tie are left out of the loss and counted (`tie_rate`)",
    "auto_find_batch_size": "a restart would sample again: set --per_device_train_batch_size",
}
"""Options of `DPOConfig` that have nothing to do here, and why."""


@dataclass
class OnlineDPOConfig(DPOConfig):
    """Options of `OnlineDPOTrainer`: Guo et al. 2024, arXiv:2402.04792.

    Lengths count tokens. Everything about the loss, the reference, the layout and the run is inherited.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "judge_kwargs"]

    beta: list[float] = field(  # type: ignore[assignment]  # a float once it is read, see __post_init__
        default_factory=lambda: [0.1],
        metadata={
            "help": "Strength of the pull towards the reference, > 0; or a list with one for each epoch, the last for all that "
            "follow."
        },
    )

    # --- sampling ---
    generator: str = field(
        default="transformers",
        metadata=choices(
            "transformers",
            "continuous",
            "vllm_server",
            "vllm_colocated",
            help="Who samples: the model's generate, its generate_batch (continuous batching, for GPUs), a vLLM server that is sent "
            "the LoRA adapter, or vLLM in this process, likewise.",
        ),
    )
    vllm_server_url: str | None = field(
        default=None, metadata={"help": "Address of the server of --generator vllm_server, up to its /v1."}
    )
    vllm_adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where adapters are written for vLLM: a folder that this run and the server see under one path. Default: "
            "vllm_adapters in --output_dir."
        },
    )
    vllm_gpu_memory: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for --generator vllm_colocated, in (0, 1)."}
    )
    num_generations: int = field(
        default=2, metadata={"help": "Completions that are sampled for each prompt, at least 2."}
    )
    pair_selection: str = field(
        default="best_worst",
        metadata=choices(
            "best_worst",
            "all",
            help="Which completions of a prompt become pairs: the best against the worst, or each against every worse one.",
        ),
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Most tokens of a sampled completion."})
    temperature: float = field(
        default=0.9,
        metadata={"help": "Of sampling, > 0. 1 samples from the model as it is; lower ones repeat themselves."},
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens with this much probability, in (0, 1]."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from this many likeliest tokens; 0: from all."})
    min_p: float | None = field(
        default=None,
        metadata={"help": "Leave out tokens below this share of the likeliest one's probability, in [0, 1]."},
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Divides the logits of tokens that were there before, > 0; 1: none."}
    )
    stop_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Further tokens that end a completion, beside EOS: each one token of the tokenizer."},
    )
    generation_batch_size: int = field(
        default=64, metadata={"help": "Most completions that are sampled at once: memory for their keys and values."}
    )
    generate_every: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps whose completions are sampled together, at the first of them: fewer and larger "
            "generations, of a policy that is up to this many steps older (`staleness` in the log)."
        },
    )

    # --- feedback ---
    judge: str | None = field(
        default=None, metadata={"help": "Who compares completions: a judge by name. docs/online.md lists them."}
    )
    judge_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "JSON: the options of --judge."})
    reward_model_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models (sequence classification, one label): hub ids or folders; their weighted sum."
        },
    )
    reward_module: str | None = field(
        default=None,
        metadata={
            "help": "A Python file (or importable module) with reward functions f(prompts, completions, **columns) in a list "
            "REWARDS. It is executed: name only files that you trust."
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight per reward: models first, then functions. 1.0 each when not given."},
    )
    reward_scale: float = field(default=1.0, metadata={"help": "Multiplies the sum of rewards, > 0."})
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the score of a completion that did not end within --max_new_tokens, >= 0."},
    )

    def __post_init__(self):
        self._read_beta()
        if isinstance(self.judge_kwargs, str):
            self.judge_kwargs = parse_options(self.judge_kwargs)
        self._check_sampling()
        self._check_vllm()
        self._check_feedback()
        super().__post_init__()
        for option in fields(DPOConfig):
            name, why = option.name, OFFLINE_ONLY.get(option.name)
            if why and getattr(self, name) != option.default:
                raise ValueError(f"--{name} does not go with online DPO: {why}. Leave it out.")
        if self.max_length is not None and self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"--max_new_tokens {self.max_new_tokens} leaves no room for a prompt in --max_length {self.max_length}: lower "
                "one or raise the other."
            )

    def to_dict(self) -> dict[str, Any]:
        """As it was given: with all betas."""
        return super().to_dict() | {"beta": self.betas if len(self.betas) > 1 else self.betas[0]}

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def beta_of_epoch(self, epoch: float) -> float:
        """`epoch` counts from 0, as a fraction."""
        return self.betas[min(int(epoch), len(self.betas) - 1)]

    def _read_beta(self) -> None:
        """`beta` is that of the epoch at hand from here on, a number as everywhere; `betas` are all."""
        given = self.beta if isinstance(self.beta, list | tuple) else [self.beta]
        if not given or not all(is_number(b) and b > 0 for b in given):
            raise ValueError(
                f"--beta must be a number above 0, or a list of them, one for each epoch; got {self.beta!r}."
            )
        self.betas = [float(b) for b in given]
        self.beta = self.betas[0]  # type: ignore[assignment]

    def _check_sampling(self) -> None:
        least = {
            "num_generations": 2,
            "max_new_tokens": 1,
            "generate_every": 1,
            "generation_batch_size": 1,
            "top_k": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < bound:
                raise ValueError(f"--{name} must be an integer of at least {bound}, got {value!r}.")
        if self.generation_batch_size < self.num_generations:
            raise ValueError(
                f"--generation_batch_size {self.generation_batch_size} is less than --num_generations {self.num_generations}: the "
                "completions of a prompt are sampled together. Raise the one or lower the other."
            )
        for name in ("temperature", "repetition_penalty", "reward_scale"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ValueError(f"--{name} must be a number above 0, got {value!r}.")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"--top_p must be in (0, 1], got {self.top_p!r}.")
        if self.min_p is not None and not (is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"--min_p must be in [0, 1], got {self.min_p!r}.")

    def _check_vllm(self) -> None:
        users = {
            "vllm_server_url": ("vllm_server",),
            "vllm_adapter_dir": ("vllm_server", "vllm_colocated"),
            "vllm_gpu_memory": ("vllm_colocated",),
        }
        for name, kinds in users.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and self.generator not in kinds:
                wanted = " or ".join(f"--generator {kind}" for kind in kinds)
                raise ValueError(f"--{name} without {wanted} would do nothing: add that, or leave it out.")
        if not (is_number(self.vllm_gpu_memory) and 0 < self.vllm_gpu_memory < 1):
            raise ValueError(f"--vllm_gpu_memory must be in (0, 1), got {self.vllm_gpu_memory!r}.")
        if self.generator == "vllm_server" and self.vllm_server_url is None:
            raise ValueError("--generator vllm_server needs --vllm_server_url, such as http://localhost:8000/v1.")

    def _check_feedback(self) -> None:
        if self.judge_kwargs is not None and self.judge is None:
            raise ValueError("--judge_kwargs without --judge would do nothing: name a judge, or leave it out.")
        rewards = [name for name in ("reward_model_path", "reward_module") if getattr(self, name)]
        if self.judge is not None and rewards:
            raise ValueError(
                f"--judge {self.judge} and --{rewards[0]} both say which completion is better: choose one."
            )
        penalty = self.missing_eos_penalty
        if penalty is not None and not (is_number(penalty) and penalty >= 0):
            raise ValueError(f"--missing_eos_penalty must be a number of at least 0, got {penalty!r}.")
