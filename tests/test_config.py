"""Every option works or refuses, and a refusal names the flag, the value and the way out."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from dpo_trainer import DPOConfig
from dpo_trainer.data import DataOptions, options
from dpo_trainer.losses import LOSSES
from dpo_trainer.options import run as config_checks

ROOT = Path(__file__).parents[1]
OWN = {f.name for f in dataclasses.fields(DPOConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}


def make(**options) -> DPOConfig:
    return DPOConfig(**{"output_dir": "out", "use_cpu": True, "report_to": [], **options})


# --- defaults ---


def test_defaults_are_those_that_the_readme_promises():
    args = make()
    assert (args.beta, args.loss_type, args.loss_weights, args.label_smoothing) == (0.1, ["sigmoid"], None, 0.0)
    assert (args.learning_rate, args.logging_steps, args.max_length) == (1e-6, 10, 1024)
    assert (args.layout, args.truncation_mode, args.rpo_alpha) == ("auto", "keep_start", None)
    assert args.disable_dropout
    assert not args.disable_lora_dropout
    assert not args.trust_remote_code
    assert not args.logging_nan_inf_filter
    assert args.accelerator_config.dispatch_batches is False


def test_loss_type_takes_a_string():
    assert make(loss_type="ipo").loss_type == ["ipo"]
    assert make(loss_type=["ipo", "sft"]).loss_type == ["ipo", "sft"]


def test_two_configs_share_no_list():
    make().loss_type.append("sft")
    assert make().loss_type == ["sigmoid"]


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({}, True),
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": False}, False),
    ],
    ids=str,
)
def test_gradient_checkpointing_in_both_spellings(options, on):
    """The name that users know, and the one that transformers is moving to; each one alone decides."""
    if "activation_checkpointing" in options and not hasattr(TrainingArguments, "activation_checkpointing"):
        pytest.skip("this transformers knows one spelling")
    args = make(**options)
    assert args.gradient_checkpointing is on
    assert getattr(args, "activation_checkpointing", on) is on


def test_gradient_checkpointing_kwargs_reach_the_trainer():
    args = make(gradient_checkpointing_kwargs={"use_reentrant": True})
    read_by_trainer = (
        "activation_checkpointing_kwargs"
        if hasattr(TrainingArguments, "activation_checkpointing_kwargs")
        else "gradient_checkpointing_kwargs"
    )
    assert getattr(args, read_by_trainer) == {"use_reentrant": True}


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_defaults_to_what_the_cpu_really_computes(supported, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert make().bf16 is supported
    assert make(bf16=False).bf16 is False
    assert make(bf16=True).bf16 is True


def test_cpu_is_chosen_by_itself_where_bf16_would_need_a_gpu(monkeypatch):
    """transformers refuses --bf16 on a machine without a GPU unless --use_cpu is there as well."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    args = DPOConfig(output_dir="out", report_to=[])
    assert args.bf16
    assert args.device.type == "cpu"


def test_bf16_asks_the_gpu_and_not_for_an_emulation(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    config_checks._computes_in_bfloat16(False)
    assert asked == [False]


def test_model_init_kwargs_come_as_json_or_dict():
    assert make(model_init_kwargs='{"dtype": "bfloat16"}').model_init_kwargs == {"dtype": "bfloat16"}
    assert make(model_init_kwargs={"dtype": "bfloat16"}).model_init_kwargs == {"dtype": "bfloat16"}


def test_a_moving_reference_has_the_defaults_of_the_docs():
    off, on, by_epochs = make(), make(sync_ref_model=True), make(sync_ref_model=True, ref_model_sync_epochs=2)
    assert (off.ref_model_mixup_alpha, off.ref_model_sync_steps, off.ref_model_sync_epochs) == (None, None, None)
    assert (on.ref_model_mixup_alpha, on.ref_model_sync_steps, on.ref_model_sync_epochs) == (0.6, 512, None)
    assert (by_epochs.ref_model_sync_steps, by_epochs.ref_model_sync_epochs) == (None, 2)
    assert make(sync_ref_model=True, ref_model_mixup_alpha=1).ref_model_mixup_alpha == 1


# --- refusals: (options, the flag and the value as the message has them, the way out) ---

REFUSALS = [
    ({"beta": 0}, "--beta must be above 0, got 0", "reference_free"),
    ({"beta": -0.1}, "--beta must be above 0, got -0.1", "0.01 to 0.5"),
    ({"beta": float("nan")}, "--beta must be above 0, got nan", "0.01 to 0.5"),
    ({"beta": float("inf")}, "--beta must be above 0, got inf", "0.01 to 0.5"),
    ({"beta": "1e-3"}, "--beta must be a number, got the text '1e-3'", "1.0e-3"),
    ({"loss_type": "sigmod"}, "--loss_type: Unknown loss 'sigmod'", "Did you mean 'sigmoid'"),
    ({"loss_type": "sigmod"}, "--loss_type", "--loss_module"),
    ({"loss_type": []}, "--loss_type is empty", "sigmoid"),
    ({"loss_type": ["sft", "sft"]}, "--loss_type names 'sft' twice", "--loss_weights"),
    ({"loss_weights": [1.0, 2.0]}, "--loss_weights has 2 values for 1 losses", "one weight each"),
    ({"loss_weights": [float("nan")]}, "--loss_weights must be finite numbers, got nan", "--loss_weights"),
    ({"loss_module": "no_such.py"}, "--loss_module no_such.py", "Give the path"),
    ({"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below 0.5, got 0.5", "pure noise"),
    ({"label_smoothing": -0.1}, "--label_smoothing must be at least 0 and below 0.5, got -0.1", "flipped"),
    (
        {"label_smoothing": 0.1, "loss_type": "ipo"},
        "--label_smoothing 0.1 would be ignored by --loss_type ipo",
        "used by",
    ),
    ({"loss_type": "exo_pair"}, "--loss_type exo_pair needs --label_smoothing above 0, got 0", "1e-3"),
    ({"rpo_alpha": -1.0}, "--rpo_alpha must be at least 0, got -1.0", "0 switches"),
    ({"rpo_normalization": "words"}, "--rpo_normalization 'words' is not one of sequence, token", "sequence"),
    ({"rpo_normalization": "token"}, "--rpo_normalization token would be ignored", "--rpo_alpha"),
    ({"wpo_clamp": True}, "--wpo_clamp", "--use_weighting"),
    ({"ld_alpha": 1.5}, "--ld_alpha must be between 0 and 1, got 1.5", "1 changes nothing"),
    ({"ld_alpha": 0.5, "loss_type": "sft"}, "--ld_alpha", "Leave --ld_alpha out"),
    ({"f_divergence_type": "reverse"}, "--f_divergence_type 'reverse' is not one of", "Did you mean 'reverse_kl'"),
    ({"f_divergence_type": "js_divergence", "loss_type": "ipo"}, "--f_divergence_type js_divergence", "reverse_kl"),
    ({"f_alpha_divergence_coef": 0.3}, "--f_alpha_divergence_coef 0.3 would be ignored", "alpha_divergence"),
    (
        {"f_alpha_divergence_coef": 1.0, "f_divergence_type": "alpha_divergence"},
        "--f_alpha_divergence_coef must be above 0 and below 1, got 1.0",
        "reverse_kl",
    ),
    ({"discopop_tau": 0.0, "loss_type": "discopop"}, "--discopop_tau must be above 0, got 0.0", "0.05"),
    ({"discopop_tau": 0.1}, "--discopop_tau 0.1 would be ignored by --loss_type sigmoid", "discopop"),
    ({"simpo_gamma": -1.0, "loss_type": "simpo"}, "--simpo_gamma must be at least 0, got -1.0", "0 asks"),
    ({"ipo_normalization": "word"}, "--ipo_normalization 'word' is not one of token, sequence", "token"),
    ({"cpo_alpha": -1.0, "loss_type": "cpo"}, "--cpo_alpha must be at least 0, got -1.0", "switches"),
    ({"odpo_alpha": -1.0, "loss_type": "odpo"}, "--odpo_alpha must be at least 0, got -1.0", "plain DPO"),
    (
        {"odpo_alpha": 0.5},
        "--odpo_alpha 0.5 would be ignored by --loss_type sigmoid: it is used by odpo",
        "Leave it out",
    ),
    ({"odpo_offset": "sqrt", "loss_type": "odpo"}, "--odpo_offset 'sqrt' is not one of log, linear", "log"),
    ({"dpop_lambda": -1.0, "loss_type": "dpop"}, "--dpop_lambda must be at least 0, got -1.0", "plain DPO"),
    ({"chi_po_reward_bound": 0.0, "loss_type": "chi_po"}, "--chi_po_reward_bound must be above 0, got 0.0", "no clip"),
    ({"ref_cache_dir": "x"}, "--ref_cache_dir x would be ignored", "--precompute_ref_log_probs"),
    (
        {"precompute_ref_max_tokens": 99},
        "--precompute_ref_max_tokens 99 would be ignored",
        "--precompute_ref_log_probs",
    ),
    (
        {"precompute_ref_log_probs": True, "precompute_ref_max_tokens": 0},
        "--precompute_ref_max_tokens must be an integer of at least 1",
        "got 0",
    ),
    ({"ref_cache_quota": 0}, "--ref_cache_quota must be a number of gigabytes above 0", "got 0"),
    ({"ref_cache_quota": float("inf")}, "--ref_cache_quota must be a number of gigabytes above 0", "got inf"),
    ({"nonfinite": "ignore"}, "--nonfinite 'ignore' is not one of stop, skip", "stop"),
    ({"nonfinite": "skip", "deepspeed": {"stage": 1}}, "--nonfinite skip cannot keep DeepSpeed", "--nonfinite stop"),
    (
        {"nonfinite": "skip", "max_skipped_steps": 0},
        "--max_skipped_steps must be a whole number of at least 1",
        "got 0",
    ),
    ({"max_skipped_steps": 3}, "--max_skipped_steps 3 would be ignored", "--nonfinite skip"),
    ({"length_column_name": "size"}, "--length_column_name size", "Leave it off"),
    ({"enable_jit_checkpoint": True}, "--enable_jit_checkpoint is not needed", "Leave it off"),
    ({"ref_model_mixup_alpha": 0.5}, "--ref_model_mixup_alpha 0.5 would be ignored", "--sync_ref_model"),
    ({"ref_model_sync_steps": 5}, "--ref_model_sync_steps 5 would be ignored", "--sync_ref_model"),
    ({"ref_model_sync_epochs": 1}, "--ref_model_sync_epochs 1 would be ignored", "--sync_ref_model"),
    (
        {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0},
        "--ref_model_mixup_alpha must be a number above 0 and at most 1, got 0.0",
        "leave --sync_ref_model off",
    ),
    (
        {"sync_ref_model": True, "ref_model_mixup_alpha": 1.1},
        "--ref_model_mixup_alpha must be a number above 0 and at most 1, got 1.1",
        "1 replaces",
    ),
    (
        {"sync_ref_model": True, "ref_model_mixup_alpha": float("nan")},
        "--ref_model_mixup_alpha must be a number above 0 and at most 1, got nan",
        "0.6",
    ),
    ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "--ref_model_sync_steps must be an integer of", "got 0"),
    ({"sync_ref_model": True, "ref_model_sync_epochs": 0.5}, "--ref_model_sync_epochs must be an integer", "got 0.5"),
    (
        {"sync_ref_model": True, "ref_model_sync_steps": 9, "ref_model_sync_epochs": 1},
        "--ref_model_sync_steps 9 and --ref_model_sync_epochs 1 both set",
        "give one of them",
    ),
    (
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
        "--sync_ref_model excludes --precompute_ref_log_probs",
        "Leave one of the two out",
    ),
    (
        {"sync_ref_model": True, "ref_adapter_name": "theirs"},
        "--sync_ref_model excludes --ref_adapter_name",
        "a copy of the trained adapter moves",
    ),
    (
        {"sync_ref_model": True, "use_separate_reference_adapter": False},
        "--sync_ref_model excludes --use_separate_reference_adapter false",
        "Leave one of the two out",
    ),
    ({"max_length": 1}, "--max_length must be an integer of at least 2, or None, got 1", "None"),
    ({"max_length": "12"}, "--max_length must be an integer of at least 2, or None, got '12'", "None"),
    ({"max_prompt_length": 0}, "--max_prompt_length must be an integer of at least 1, or None, got 0", "None"),
    ({"max_completion_length": 0}, "--max_completion_length must be an integer of at least 1, or None, got 0", "None"),
    ({"dataset_num_proc": 0}, "--dataset_num_proc must be an integer of at least 1, or None, got 0", "None"),
    ({"pad_to_multiple_of": True}, "--pad_to_multiple_of must be an integer of at least 1, or None, got True", "None"),
    ({"pad_to_multiple_of": 0}, "--pad_to_multiple_of must be an integer of at least 1, or None, got 0", "None"),
    (
        {"max_tokens_per_micro_batch": 0},
        "--max_tokens_per_micro_batch must be an integer of at least 1, or None, got 0",
        "None",
    ),
    (
        {"max_tokens_per_micro_batch": 99, "include_for_metrics": ["inputs"]},
        "--max_tokens_per_micro_batch 99 computes a batch in parts",
        "--include_for_metrics",
    ),
    (
        {"gradient_accumulation_steps": 0},
        "--gradient_accumulation_steps must be a whole number of at least 1",
        "got 0",
    ),
    ({"gradient_accumulation_steps": 1.5}, "--gradient_accumulation_steps must be a whole number", "got 1.5"),
    (
        {"per_device_train_batch_size": 0},
        "--per_device_train_batch_size must be a whole number of at least 1",
        "got 0",
    ),
    (
        {"per_device_eval_batch_size": -1},
        "--per_device_eval_batch_size must be a whole number of at least 1",
        "got -1",
    ),
    ({"eval_accumulation_steps": 0}, "--eval_accumulation_steps must be a whole number of at least 1", "None (all"),
    ({"save_total_limit": 0}, "--save_total_limit must be a whole number of at least 1, or None (keep all)", "got 0"),
    ({"max_steps": 0}, "--max_steps must be a whole number of at least 1, or -1", "got 0"),
    ({"num_train_epochs": 0}, "--num_train_epochs must be a number above 0", "got 0"),
    ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be a whole number of at least 0", "got -1"),
    ({"learning_rate": -1.0}, "--learning_rate must be a number of at least 0", "got -1.0"),
    ({"learning_rate": float("nan")}, "--learning_rate must be a number of at least 0", "got nan"),
    ({"weight_decay": -0.1}, "--weight_decay must be a number of at least 0", "got -0.1"),
    ({"max_grad_norm": -1.0}, "--max_grad_norm must be a number of at least 0", "got -1.0"),
    ({"adam_beta1": 1.0}, "--adam_beta1 must be a number of at least 0 and below 1", "got 1.0"),
    ({"logging_steps": -1}, "--logging_steps must be a number above 0, got -1", "--logging_strategy no"),
    ({"save_steps": 0}, "--save_steps must be a number above 0, got 0", "--save_strategy no"),
    (
        {"eval_steps": -1, "eval_strategy": "steps"},
        "--eval_steps must be a number of at least 0",
        "--eval_strategy no",
    ),
    ({"neftune_noise_alpha": -1.0}, "--neftune_noise_alpha must be a number of at least 0, or None", "no noise"),
    ({"fp16": True}, "--fp16 true needs a GPU", "--bf16 true"),
    ({"bf16_full_eval": True}, "--bf16_full_eval", "--bf16 true"),
    ({"label_names": ["mine"]}, "--label_names ['mine'] would be ignored", "compute_metrics"),
    ({"max_length": 9, "max_prompt_length": 9}, "--max_prompt_length 9 leaves no room", "raise --max_length"),
    ({"truncation_mode": "keep_middle"}, "--truncation_mode 'keep_middle' is not one of keep_start, keep_end", "keep"),
    ({"too_long": "cut"}, "--too_long 'cut' is not one of truncate, drop, error", "drop"),
    ({"max_pairs_per_prompt": 0}, "--max_pairs_per_prompt must be an integer of at least 1, or None, got 0", "None"),
    ({"useless_pairs": "keep"}, "--useless_pairs 'keep' is not one of drop, error", "drop"),
    ({"layout": None}, "--layout None is not one of auto, flat, padded", "auto"),
    ({"layout": "falt"}, "--layout 'falt' is not one of auto, flat, padded", "Did you mean 'flat'"),
    ({"router_aux_loss_coef": -0.1}, "--router_aux_loss_coef must be a number of at least 0, got -0.1", "at least 0"),
    (
        {"router_aux_loss_coef": "1e-3"},
        "--router_aux_loss_coef must be a number of at least 0, got '1e-3'",
        "at least 0",
    ),
    ({"activation_offloading": True}, "--activation_offloading", "leave it off"),
    ({"use_liger_kernel": True}, "--use_liger_kernel needs a GPU", "leave it off"),
    ({"torch_compile": True}, "--torch_compile is not available", "Leave it off"),
    ({"logging_nan_inf_filter": True}, "--logging_nan_inf_filter", "leave it off"),
    ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1", "--label_smoothing"),
    ({"accelerator_config": {"split_batches": True}}, "--accelerator_config split_batches=True", "leave it off"),
    ({"accelerator_config": {"dispatch_batches": True}}, "--accelerator_config dispatch_batches=True", "leave it off"),
]


@pytest.mark.parametrize(("options", "what", "way_out"), REFUSALS, ids=lambda value: str(value)[:60])
def test_refusal_names_flag_value_and_way_out(options, what, way_out):
    with pytest.raises(ValueError) as error:
        make(**options)
    assert what in str(error.value)
    assert way_out in str(error.value)


def test_several_gpus_in_one_process_are_refused(monkeypatch):
    """`nn.DataParallel` would scatter the flat row."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 GPUs are visible .*accelerate launch"):
        make()


def test_what_is_refused_alone_is_allowed_where_it_is_used():
    """The refusals above would also pass if everything were refused."""
    make(label_smoothing=0.1)
    make(loss_type="exo_pair", label_smoothing=1e-3)
    make(loss_type="discopop", discopop_tau=0.1)
    make(rpo_alpha=1.0, rpo_normalization="token")
    make(use_weighting=True, wpo_clamp=True)
    make(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
    make(max_length=9, max_prompt_length=8)
    make(max_steps=-1, num_train_epochs=0.5, logging_steps=0.1, weight_decay=0, max_grad_norm=0, adam_beta1=0)
    make(save_strategy="no", save_steps=0, logging_strategy="epoch", logging_steps=0, max_steps=3, num_train_epochs=0)
    make(eval_strategy="steps", eval_steps=0, save_total_limit=1, eval_accumulation_steps=1)
    make(max_length=None, max_prompt_length=4000)
    make(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1)
    make(sync_ref_model=True, use_separate_reference_adapter=True)
    make(ref_adapter_name="theirs")
    make(precompute_ref_log_probs=True, ref_cache_dir="x", ref_cache_quota=1, precompute_ref_max_tokens=99)


def test_every_bounded_option_is_refused_somewhere_above():
    bounded = {f.name for f in dataclasses.fields(DPOConfig) if f.name in OWN and f.metadata.get("choices")}
    assert {"layout", "truncation_mode"} <= bounded
    tested = {name for options, *_ in REFUSALS for name in options}
    assert bounded <= tested
    # Not `field.type`: HfArgumentParser replaces the annotations there, for whoever comes after it.
    kinds = {name: kind for own in DPOConfig.__mro__ for name, kind in getattr(own, "__annotations__", {}).items()}
    numbers = {name for name in OWN if kinds[name] in NUMBER_TYPES}
    assert {"beta", "max_length", "rpo_alpha"} <= numbers
    assert numbers <= tested


NUMBER_TYPES = {"float", "float | None", "int", "int | None"}


# --- every field is read ---

# Read where it is checked: the module is imported there, before the names in --loss_type are looked up.
DONE_IN_CONFIG = {"loss_module"}
RECEIVERS = {"args", "config"}


def attributes_read(text: str) -> set[str]:
    """Names read as `args.name`, `self.args.name`, `config.name`: not any attribute of that name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            receiver = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found |= {node.attr} if receiver in RECEIVERS else set()
    return found


def names_read() -> set[str]:
    """Every option that code in the package reads, checks aside: as an attribute, or as the argument of a loss."""
    checks = {"config.py", "options/run.py", "check.py"}
    read = {
        name
        for path in (ROOT / "dpo_trainer").rglob("*.py")
        if path.name not in checks and "cli" not in path.parts
        for name in attributes_read(path.read_text())
    }
    return read | {argument for name in LOSSES if LOSSES[name].builtin for argument in LOSSES[name].arguments}


def test_the_reader_tells_an_option_from_a_namesake():
    assert attributes_read("self.args.beta; args.layout.name") == {"beta", "layout"}
    assert attributes_read("self.layout; scorer.beta; args.gamma = 1") == set()


def test_no_field_is_read_by_nobody():
    assert {"beta", "layout", "loss_type"} <= OWN
    of_data = {option.name for option in dataclasses.fields(DataOptions)}  # DataOptions.from_config takes them all
    unread = OWN - names_read() - of_data - DONE_IN_CONFIG
    assert unread == set(), "these options would be silently ignored"


def test_no_data_option_is_read_by_nobody():
    text = "".join(path.read_text() for path in Path(options.__file__).parent.glob("*.py"))
    assert {"too_long", "deduplicate"} <= {option.name for option in dataclasses.fields(DataOptions)}
    for option in dataclasses.fields(DataOptions):
        assert re.search(rf"\b(self|options)\.{option.name}\b", text), option.name


def test_loss_module_is_imported(tmp_path):
    own = tmp_path / "my_losses.py"
    own.write_text(
        "from dpo_trainer import register_loss\n"
        "@register_loss('of_test_config')\n"
        "def of_test_config(policy, reference, *, beta):\n"
        "    return -beta * policy.margin()\n"
    )
    assert make(loss_module=str(own), loss_type="of_test_config").loss_type == ["of_test_config"]


# --- the command line ---

# A value other than the default for every own field, with what else it takes to be allowed.
ROUND_TRIP = {
    "image_root": "pictures",
    "template_date": "2026-11-30",
    "allow_image_urls": True,
    "allow_private_image_urls": (True, {"allow_image_urls": True}),
    "cache_processed_images": True,
    "freeze_vision_tower": True,
    "beta": 0.3,
    "loss_type": ["ipo", "sft"],
    "loss_weights": [0.7],
    "loss_module": "dpo_trainer.losses.margin",
    "label_smoothing": 0.1,
    "rpo_alpha": 0.5,
    "rpo_normalization": ("token", {"rpo_alpha": 1.0}),
    "use_weighting": True,
    "wpo_clamp": (True, {"use_weighting": True}),
    "ld_alpha": 0.5,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": (0.3, {"f_divergence_type": "alpha_divergence"}),
    "discopop_tau": (0.1, {"loss_type": "discopop"}),
    "simpo_gamma": (1.5, {"loss_type": "simpo"}),
    "ipo_normalization": ("sequence", {"loss_type": "ipo"}),
    "odpo_alpha": (0.5, {"loss_type": "odpo"}),
    "odpo_offset": ("linear", {"loss_type": "odpo"}),
    "cpo_alpha": (0.5, {"loss_type": "cpo"}),
    "dpop_lambda": (5.0, {"loss_type": "dpop"}),
    "chi_po_reward_bound": (2.0, {"loss_type": "chi_po"}),
    "reference_free": True,
    "model_adapter_name": "mine",
    "ref_adapter_name": "theirs",
    "precompute_ref_log_probs": True,
    "precompute_ref_max_tokens": (99, {"precompute_ref_log_probs": True}),
    "ref_cache_dir": ("cache", {"precompute_ref_log_probs": True}),
    "ref_cache_quota": (2.5, {"precompute_ref_log_probs": True}),
    "merge_lora_configs": True,
    "nonfinite": "skip",
    "max_skipped_steps": (3, {"nonfinite": "skip"}),
    "force_resume": True,
    "force_output_dir": True,
    "use_separate_reference_adapter": False,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": (0.25, {"sync_ref_model": True}),
    "ref_model_sync_steps": (7, {"sync_ref_model": True}),
    "ref_model_sync_epochs": (2, {"sync_ref_model": True}),
    "max_length": 77,
    "max_prompt_length": 33,
    "max_completion_length": 44,
    "truncation_mode": "keep_end",
    "too_long": "drop",
    "useless_pairs": "error",
    "deduplicate": True,
    "max_pairs_per_prompt": 4,
    "allow_special_tokens_in_text": True,
    "dataset_num_proc": 2,
    "layout": "padded",
    "pad_to_multiple_of": 8,
    "max_tokens_per_micro_batch": 512,
    "disable_dropout": False,
    "disable_lora_dropout": True,
    "router_aux_loss_coef": 0.01,
    "model_init_kwargs": {"dtype": "bfloat16"},
    "trust_remote_code": True,
}
NOT_ON_A_CPU = {"activation_offloading"}


def flags(options: dict) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, values)]
    return words


def parse(*words: str) -> DPOConfig:
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *words])
    return args


def test_round_trip_covers_every_field():
    assert set(ROUND_TRIP) == OWN - NOT_ON_A_CPU


@pytest.mark.parametrize("name", ROUND_TRIP)
def test_every_field_round_trips_through_the_argument_parser(name):
    value, others = ROUND_TRIP[name] if isinstance(ROUND_TRIP[name], tuple) else (ROUND_TRIP[name], {})
    default = getattr(make(), name)
    assert value != default  # else nothing is shown
    args = parse(*flags({**others, name: value}))
    assert getattr(args, name) == value
    assert type(getattr(args, name)) is type(value)
    assert getattr(parse(), name) == default


@pytest.mark.parametrize("name", ["gradient_checkpointing", "bf16", "disable_dropout", "reference_free"])
def test_switches_take_a_value_or_stand_alone(name):
    assert getattr(parse(f"--{name}", "false"), name) is False
    assert getattr(parse(f"--{name}", "true"), name) is True
    assert getattr(parse(f"--{name}"), name) is True


def test_every_field_has_help():
    for option in dataclasses.fields(DPOConfig):
        if option.name in OWN:
            assert len(option.metadata.get("help", "")) > 15, option.name


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, True),
        ({"even_batches": True}, True),
        ('{"non_blocking": false}', False),
        ({"non_blocking": False}, False),
    ],
)
def test_batches_are_not_waited_for_unless_asked(given, want, monkeypatch):
    """With a GPU, as far as the config can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = SimpleNamespace(accelerator_config=given, dataloader_pin_memory=True, use_cpu=False)
    config_checks.resolve_transfers(config)  # type: ignore[arg-type]
    taken = config.accelerator_config
    assert (json.loads(taken) if isinstance(taken, str) else taken)["non_blocking"] is want
    config = SimpleNamespace(accelerator_config=given, dataloader_pin_memory=False, use_cpu=False)
    config_checks.resolve_transfers(config)  # type: ignore[arg-type]
    assert config.accelerator_config == given, "memory that is not pinned is left to accelerate"
