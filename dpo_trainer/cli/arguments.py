"""Which data, which model: the arguments of a script beside those of `DPOConfig`, and what refuses to go together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..config import DPOConfig

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class ScriptArguments:
    """Where the preference pairs come from."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Preference pairs: a dataset of the hub, or a local .json, .jsonl, .csv or .parquet file (also .gz), a "
            "folder of such files, or one saved by save_to_disk."
        },
    )
    datasets: list[dict[str, Any] | str] | str | None = field(
        default=None,
        metadata={
            "help": "A mixture, instead of --dataset_name: a list (as a flag: its JSON) of {name, config, split, test_split, "
            "fraction, columns}, all but the name optional. fraction in (0, 1] is the share of the rows that is used."
        },
    )
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the columns in the dataset, ours=theirs: prompt=question,chosen=best. A name with nothing behind it "
            "leaves that column out: system=,question=. In YAML also a mapping. For the rows to evaluate on too; in a mixture "
            "each dataset has its own."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Which configuration of a dataset of the hub that has several."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "The split to train on. A single file is the split 'train'."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "The split to evaluate on. Default: 'test' where there is one, else none."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Take evaluation rows from the training split (of each dataset): a share below 1, or a count. From a stream: "
            "a count."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "A second dataset to evaluate on, in any form that --dataset_name takes."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read rows while training instead of before it. Needs --max_steps."}
    )
    traceback: bool = field(
        default=False,
        metadata={"help": "Show where an error came from. Off, an error of options, data or models is one message."},
    )

    def __post_init__(self):
        if self.columns is None and self.datasets is None:
            return
        from ..data.files.mixture import parse_mixture
        from ..data.files.renaming import parse_columns  # with all that loads models: slow to import

        if self.columns is not None:
            parse_columns(self.columns)
        if self.datasets is not None:
            parse_mixture(self.datasets)
            for option in ("dataset_name", "dataset_config", "columns"):
                if getattr(self, option) is not None:
                    raise ValueError(
                        f"--datasets and --{option} exclude each other: every entry of --datasets says that for itself "
                        "(name, config, columns)."
                    )


@dataclass
class ModelArguments:
    """Which model, in which precision, with or without an adapter."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model to train: hub id or folder, of a full model or of a PEFT adapter."}
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Another model as the reference. Default: the model itself, as it is before training."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the hub. Default: main."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "What the weights are held in: float32 (with --bf16 computing in bfloat16), bfloat16, float16, or auto "
            "(as saved). bfloat16 suits the frozen base of an adapter; trained weights lose small updates in it."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The attention of the padded layout: sdpa, eager, flash_attention_2 ..."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices, at least 1."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA: its output is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA matrices, in [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Module names that get LoRA, or all-linear. Default: PEFT's choice for the architecture."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Module names to train and save in full beside LoRA, such as lm_head."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale LoRA by alpha / sqrt(r) (rsLoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitude and direction apart (DoRA)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Hold the frozen base in 4 bits (QLoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Hold the frozen base in 8 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit number format: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the 4-bit scales as well."})

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other: choose one.")
        if self.lora_r < 1:
            raise ValueError(f"--lora_r must be at least 1, got {self.lora_r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        known = ("float32", "bfloat16", "float16", "auto")
        if self.dtype not in known:
            raise ValueError(f"--dtype {self.dtype!r} is not one of {', '.join(known)}.")


WITHOUT_EFFECT_ALONE = {
    "use_peft": (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
    ),
    "load_in_4bit": ("bnb_4bit_quant_type", "use_bnb_nested_quant"),
}
"""{switch: options that do nothing while it is off}"""

ALSO_IN_MODEL_INIT_KWARGS = {
    "dtype": ("dtype", "torch_dtype"),
    "attn_implementation": ("attn_implementation",),
    "model_revision": ("revision",),
}
"""{option: its names in model_init_kwargs}"""


def check_together(script: ScriptArguments, model: ModelArguments, config: DPOConfig, given: set[str]) -> None:
    """Refuse what contradicts each other, or would be ignored. `given`: the options that the user set."""
    _check_model_and_data(script, model, given)
    for switch, options in WITHOUT_EFFECT_ALONE.items():
        idle = [f"--{name}" for name in options if name in given]
        if idle and not getattr(model, switch):
            raise ValueError(
                f"{', '.join(idle)} without --{switch} would do nothing: add --{switch}, or leave it out."
            )
    for option, names in ALSO_IN_MODEL_INIT_KWARGS.items():
        twice = [name for name in names if name in (config.model_init_kwargs or ())]
        if option in given and twice:
            raise ValueError(f"--{option} and --model_init_kwargs {twice[0]!r} set the same thing: choose one.")


def _check_model_and_data(script: ScriptArguments, model: ModelArguments, given: set[str]) -> None:
    data = "dataset_name" if script.dataset_name else "datasets" if script.datasets else None
    if data and not model.model_name_or_path:
        raise ValueError(f"--{data} without --model_name_or_path: which model shall be trained?")
    if model.model_name_or_path and not data:
        raise ValueError(
            "--model_name_or_path without --dataset_name (or --datasets): on which preference pairs shall it be trained?"
        )
    if not model.model_name_or_path:
        idle = sorted(given & {option.name for kind in (ScriptArguments, ModelArguments) for option in fields(kind)})
        if idle:
            raise ValueError(
                f"--{idle[0]} needs --model_name_or_path and --dataset_name. Without the two the embedded demo runs, which "
                "has a model and data of its own."
            )


def merged_init_kwargs(model: ModelArguments, config: DPOConfig) -> dict[str, Any]:
    """What `from_pretrained` gets: --model_init_kwargs, and the options of `ModelArguments` that belong there."""
    if isinstance(config.model_init_kwargs, str):  # a JSON object is a dict by now
        raise ValueError(f"--model_init_kwargs must be a JSON object, got {config.model_init_kwargs!r}.")
    kwargs = dict(config.model_init_kwargs or {})
    if not {"dtype", "torch_dtype"} & set(kwargs):
        kwargs["dtype"] = model.dtype
    if model.attn_implementation is not None:
        kwargs["attn_implementation"] = model.attn_implementation
    if model.model_revision is not None:
        kwargs["revision"] = model.model_revision
    return kwargs


def make_peft_config(model: ModelArguments) -> LoraConfig | None:
    """The LoRA adapter that --use_peft asks for, or None."""
    if not model.use_peft:
        return None
    from peft import LoraConfig  # seconds to import, and only some runs need it

    targets = model.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
    )
