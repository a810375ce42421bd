"""DPOConfig: every option of a run, with its help.

An option works or is refused at construction (config_checks.py), by an error that names the flag, the value and the
way out. Refusals that depend on the model or the data stand in the module that sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .distributed.engine_checks import check_engine_files, check_launcher
from .losses import check_loss_arguments, load_loss_module
from .options import checks
from .options.numbers import check_numbers
from .options.optimizers import check_optimizer


def choices(*allowed: str, help: str) -> dict[str, Any]:
    """Field metadata for an option with a fixed set of values, as argparse reads it."""
    return {"help": help, "choices": allowed}


@dataclass
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`, on top of `transformers.TrainingArguments`.

    Lengths count tokens; log-probs and rewards are in nats. `docs/config.md` lists every field below.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # --- the objective ---
    beta: float = field(
        default=0.1,
        metadata={
            "help": "Strength of the pull towards the reference, > 0. Usual range 0.01 to 0.5; higher stays closer. "
            "The tau of `ipo`, the lambda of `orpo`."
        },
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One loss, or several that are summed with --loss_weights. docs/losses.md lists them."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per --loss_type; 1.0 each when not given."}
    )
    loss_module: str | None = field(
        default=None,
        metadata={
            "help": "A Python file (or importable module) that registers losses of your own with @register_loss. "
            "It is executed: name only files that you trust."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a preference label is flipped, in [0, 0.5). `sigmoid` becomes cDPO; "
            "`exo_pair` needs it above 0 (1e-3 is its paper's choice)."
        },
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the negative log-likelihood of the chosen completion, added to any loss (RPO)."},
    )
    rpo_normalization: str = field(
        default="sequence",
        metadata=choices(
            "sequence",
            "token",
            help="How the NLL of --rpo_alpha and `sft` is averaged: per completion, then over pairs (the papers), "
            "or over all tokens of the micro-batch (TRL's `sft`).",
        ),
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight each pair by how likely the policy is to write it (WPO)."}
    )
    wpo_clamp: bool = field(default=False, metadata={"help": "Clamp the WPO weights of --use_weighting at 1."})
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "LD-DPO: weight in [0, 1] of the log-probs beyond the length that both completions of a pair share."
        },
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata=choices(
            "reverse_kl",
            "forward_kl",
            "js_divergence",
            "alpha_divergence",
            help="Divergence from the reference, for the losses of the margin.",
        ),
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "The alpha of --f_divergence_type alpha_divergence, in (0, 1)."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of `discopop`, > 0."})
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "Target reward margin of `simpo`, >= 0, in units of the reward."}
    )
    ipo_normalization: str = field(
        default="token",
        metadata=choices(
            "token",
            "sequence",
            help="`ipo` with log-probs per token (its authors' choice) or summed over the completion (its Eq. 17).",
        ),
    )
    odpo_alpha: float = field(
        default=1.0, metadata={"help": "Weight of the offset that `odpo` makes of a pair's margin, >= 0."}
    )
    odpo_offset: str = field(
        default="log",
        metadata=choices(
            "log",
            "linear",
            help="How `odpo` makes an offset of the column `margin`: its logarithm (margins above 0) or itself.",
        ),
    )
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the NLL term of `cpo`, >= 0."})
    dpop_lambda: float = field(
        default=50.0, metadata={"help": "Weight of `dpop`'s penalty on a falling chosen log-prob, >= 0."}
    )
    chi_po_reward_bound: float | None = field(
        default=None,
        metadata={"help": "R of `chi_po`, > 0: its scores, times beta, are clipped to [-2R, 2R]. None: no clip."},
    )

    # --- the reference ---
    reference_free: bool = field(
        default=False, metadata={"help": "Use no reference: its log-probs count as 0 (a uniform reference)."}
    )
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "The adapter to train, when the model has several. Default: its active one."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "The adapter that is the reference, when the model carries it."}
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the log-probs of the reference before training, and keep them on disk: no second model in memory "
            "while training, and no reference forward in later epochs and runs."
        },
    )
    precompute_ref_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward pass of --precompute_ref_log_probs. Default: 2,048 on a CPU, 16,384 on an "
            "accelerator."
        },
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where --precompute_ref_log_probs keeps log-probs. Default: $DPO_TRAINER_CACHE/reference, else "
            "$HF_HOME/dpo_trainer/reference."
        },
    )
    ref_cache_quota: float = field(
        default=50.0,
        metadata={
            "help": "Most gigabytes of --ref_cache_dir, > 0. Beyond it, references that were not used for longest are deleted."
        },
    )
    use_separate_reference_adapter: bool | None = field(
        default=None,
        metadata={
            "help": "What is the reference of an adapter: a frozen copy of it (true), or the model below it (false). "
            "Default: the copy for an adapter that was trained before, the model below for a new one.",
            "nargs": "?",
            "const": True,
        },
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Let the reference follow the policy (TR-DPO): mix the policy into it now and then."},
    )
    ref_model_mixup_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Share of the policy in each mix of --sync_ref_model, in (0, 1]; 1 replaces the reference. Default: 0.6."
        },
    )
    ref_model_sync_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two mixes of --sync_ref_model. Default: 512, unless by epochs."},
    )
    ref_model_sync_epochs: int | None = field(
        default=None, metadata={"help": "Epochs between two mixes of --sync_ref_model, instead of steps."}
    )

    # --- the data ---
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Most tokens of prompt + completion. Truncated pairs are counted and reported. None: no limit."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt; its beginning is cut (its end stays, next to the answer)."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a completion; its end is cut."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=choices(
            "keep_start",
            "keep_end",
            help="Where a pair over --max_length is cut: the end of its completions, or the beginning of its prompt "
            "(and only then the end of its completions).",
        ),
    )
    too_long: str = field(
        default="truncate",
        metadata=choices(
            "truncate",
            "drop",
            "error",
            help="What to do with rows over --max_length, --max_prompt_length or --max_completion_length: cut them, drop "
            "them with a count, or stop.",
        ),
    )
    useless_pairs: str = field(
        default="drop",
        metadata=choices(
            "drop",
            "error",
            help="What to do with pairs that cannot teach anything (chosen equals rejected, the prompt leaves no room for a "
            "completion, all scores equal): drop them with a count, or stop.",
        ),
    )
    deduplicate: bool = field(
        default=False, metadata={"help": "Drop rows with the prompt and the completions of an earlier row, counted."}
    )
    max_pairs_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Most pairs of one row with several rejected or ranked completions: those of the largest margin, or the "
            "first. None: all."
        },
    )
    allow_special_tokens_in_text: bool = field(
        default=False,
        metadata={
            "help": "Read the text of a special token inside a row (such as <|im_end|>) as that token. Off, it is text: a "
            "user cannot end a turn. On for files that are templated already."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={
            "help": "The date, YYYY-MM-DD, that chat templates write which ask for today's. Default: that of the checkpoint in the "
            "output folder, else of the reference cache, else today's; a run has one date from its first step to its last."
        },
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes for tokenization. The fast tokenizer already uses every core in one."},
    )

    # --- images ---
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that paths of images are relative to, and that none may lead out of. Default: the working directory, "
            "and paths lead anywhere."
        },
    )
    allow_image_urls: bool = field(
        default=False, metadata={"help": "Download images that are URLs (and keep them in the cache of datasets)."}
    )
    allow_private_image_urls: bool = field(
        default=False,
        metadata={
            "help": "With --allow_image_urls: also from servers on loopback, link-local, private and reserved addresses. A row can then "
            "make this machine ask any server that it reaches."
        },
    )
    cache_processed_images: bool = field(
        default=False,
        metadata={
            "help": "Keep processed images on disk ($DPO_TRAINER_CACHE/images, else $HF_HOME/dpo_trainer/images), for later "
            "epochs and runs. Faster where images are large, and takes more room than they do."
        },
    )
    freeze_vision_tower: bool | None = field(
        default=None,
        metadata={
            "help": "Leave what turns pixels into features as it is; with LoRA, adapters go on the language model alone. "
            "Default: true with LoRA, false without.",
            "nargs": "?",
            "const": True,
        },
    )

    # --- the batch and the model ---
    layout: str = field(
        default="auto",
        metadata=choices(
            "auto",
            "flat",
            "padded",
            help="How a batch meets the model: all pairs in one row, each prompt once, no padding (flat); one padded row "
            "per completion (padded); or flat where the model allows it, verified on the first batch (auto).",
        ),
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad the rows of a batch to a multiple of this many tokens."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward pass (flat: of the row; padded: rows times the longest). A batch with more is "
            "computed in parts, with the same gradients. None: whole; on a CPU in parts of about 512 or of "
            "its longest row, which are faster there."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch off all dropout of policy and reference, attention dropout too; LoRA's stays."},
    )
    disable_lora_dropout: bool = field(
        default=False, metadata={"help": "Switch off the dropout of LoRA layers as well."}
    )
    merge_lora_configs: bool = field(
        default=False,
        metadata={
            "help": "Where a new LoRA adapter (--use_peft) is asked for on a model that has one with other settings: go on with "
            "that one at the larger rank and on the modules of both, computing the same as before."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model; 0 switches it off. Default: the "
            "model's own, where its config has output_router_logits on."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON passed to from_pretrained when the model is given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with a model or a tokenizer. Off for a reason."}
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep the activations that backward needs in pinned host memory (GPU only)."}
    )

    # --- faults ---
    nonfinite: str = field(
        default="stop",
        metadata=choices(
            "stop",
            "skip",
            help="What to do at a non-finite loss or gradient: stop before the weights are touched, or leave that optimizer step "
            "out, with a count and the ids of the pairs.",
        ),
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "With --nonfinite skip: the most steps in a row that are left out; one more stops the run, for then the weights are "
            "at fault."
        },
    )
    force_resume: bool = field(
        default=False,
        metadata={
            "help": "Resume although the checkpoint was written with another loss, other data or another reference, or cannot "
            "be verified."
        },
    )

    force_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Train although another process trains or saves in --output_dir, which is an error otherwise: checkpoints can become a "
            "mix of both runs."
        },
    )

    # --- defaults that differ from transformers ---
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two log lines; below 1, a share of all."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in backward to save memory, at about 20%% of the speed. Default: on.",
            "nargs": "?",
            "const": True,
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 mixed precision. Default: on where the device computes in bfloat16, unless --fp16.",
            "nargs": "?",
            "const": True,
        },
    )
    use_cpu: bool = field(
        default=False,
        metadata={"help": "Compute on the CPU. Set by itself where there is nothing else to compute on."},
    )
    liger_kernel_config: dict[str, bool] | None = field(
        default_factory=lambda: {"cross_entropy": False, "fused_linear_cross_entropy": False},
        metadata={"help": "JSON: which kernels of --use_liger_kernel to take. Default: those of the layers alone."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Refused when set: a non-finite loss stops the run instead of being hidden."}
    )

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.loss_module is not None:
            load_loss_module(self.loss_module)
        checks.check_choices(self)
        checks.check_output_dir(self)
        check_loss_arguments(self)
        checks.check_bounds(self)
        check_numbers(self)
        checks.check_lengths(self)
        checks.check_images(self)
        checks.check_template_date(self)
        checks.check_moving_reference(self)
        checks.check_nonfinite(self)
        checks.check_cache(self)
        check_engine_files(self)
        check_optimizer(self)
        checks.resolve_moving_reference(self)
        checks.resolve_checkpointing(self)
        checks.resolve_precision(self)
        checks.resolve_transfers(self)
        super().__post_init__()
        checks.check_against_trainer(self)
        check_launcher(self)
        checks.check_micro_batches(self)
        checks.resolve_dispatch(self)
