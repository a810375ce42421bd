"""Adapters (PEFT), and the quantised base that they can stand on."""

from __future__ import annotations

import copy
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from transformers import BitsAndBytesConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_quantization_config(
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    use_bnb_nested_quant: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> BitsAndBytesConfig | None:
    """How bitsandbytes shall hold the frozen base weights: 4 or 8 bits, or None for not at all."""
    if not load_in_4bit and not load_in_8bit:
        return None
    if load_in_4bit and load_in_8bit:
        raise ValueError("--load_in_4bit and --load_in_8bit exclude each other: choose one.")
    if bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ValueError(f"--bnb_4bit_quant_type {bnb_4bit_quant_type!r} is not one of nf4, fp4.")
    if importlib.util.find_spec("bitsandbytes") is None:
        flag = "--load_in_4bit" if load_in_4bit else "--load_in_8bit"
        raise ValueError(f"{flag} needs bitsandbytes: `pip install dpo_trainer[quantization]`, or leave it off.")
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def apply_peft(
    model: PreTrainedModel,
    peft_config: PeftConfig,
    *,
    quantized: bool,
    gradient_checkpointing: bool = True,
    adapter_name: str = "default",
) -> PeftModel:
    """The model with a fresh adapter, alone trainable and in float32 whatever the base is held in.

    Switching layer checkpointing on is left to the trainer; `gradient_checkpointing` only makes the base ready for it.
    """
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model already carries an adapter, and peft_config asks for another: leave peft_config (--use_peft) out "
            "to train the one it has, or pass model.merge_and_unload() to start a new one on top of it."
        )
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"peft_config must be a PeftConfig such as peft.LoraConfig, got {type(peft_config).__name__}."
        )
    if adapter_name == "train":
        raise ValueError("An adapter cannot be named 'train': PyTorch modules have a method of that name. Rename it.")
    prepare_base(model, quantized=quantized, gradient_checkpointing=gradient_checkpointing)
    peft_config = copy.copy(peft_config)
    peft_config.task_type = peft_config.task_type or "CAUSAL_LM"
    try:
        return get_peft_model(model, peft_config, adapter_name=adapter_name)
    except ImportError as error:  # some kinds and initialisations need a package
        raise ValueError(f"peft_config needs a package that is not here: {error}") from error


def prepare_base(model: PreTrainedModel, *, quantized: bool, gradient_checkpointing: bool) -> None:
    """Make a model ready to stand below an adapter, in place.

    A quantised one is frozen and its other weights (norms, embeddings) are raised to float32. Under layer checkpointing
    the embeddings' output must ask for a gradient: nothing else that enters the first layer is trainable, and a
    reentrant checkpoint would cut the adapter off.
    """
    if quantized:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    let_gradients_through(model, gradient_checkpointing=gradient_checkpointing)


def let_gradients_through(model: PreTrainedModel, *, gradient_checkpointing: bool) -> None:
    """What a base needs also when the user put the adapter on it."""
    compute_as_in_training(model)
    if gradient_checkpointing:
        model.enable_input_require_grads()


def compute_as_in_training(model: torch.nn.Module) -> None:
    """Keep quantised layers from other arithmetic in eval mode than in train mode, in place and for good.

    bitsandbytes (0.50) has two ways through a layer on a CPU. The reference is read in eval mode and the policy trains in
    train mode: they would be two models, and the first loss not ln 2.
    """
    module: Any
    for name, module in model.named_modules():
        _refuse_packed(name, module)
        # 4 bits, on CPUs with AVX512-BF16: the first pass in eval mode packs the layer for an inference kernel, for good. Its
        # numbers are off by about 1e-3 nats, and it has no backward: after one evaluation no gradient passes, without an error.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
        # 8 bits: the inference kernel rounds what enters the layer to int8 too, the one of training does not.
        state = getattr(module, "state", None)
        if hasattr(state, "is_training") and not isinstance(state, _AlwaysTraining):
            state.__class__ = type("AlwaysTraining", (_AlwaysTraining, type(state)), {})


def _refuse_packed(name: str, module: Any) -> None:
    """Refuse a 4-bit layer that was packed for inference, also if it was unpacked since (as saving does).

    Packing leaves `original_dtype` behind. It rounds the scales of the blocks to bfloat16, and without double quantisation
    unpacking does not even bring those back.
    """
    if hasattr(getattr(getattr(module, "weight", None), "quant_state", None), "original_dtype"):
        raise ValueError(
            f"The 4-bit layer {name} has computed in eval mode on this CPU, and bitsandbytes packed its weights for inference then: they "
            "are rounded, and gradients through them are wrong. Load the model again and build the trainer before anything is "
            "asked of it (generate, evaluation); from then on its layers are not packed."
        )


class _AlwaysTraining:
    """The state of an int8 layer, which sets `is_training` to its mode at each pass and then goes by it."""

    is_training = property(lambda self: True, lambda self, mode: None)


def refuse_untrainable(model: torch.nn.Module) -> None:
    """Raise ValueError if training would change nothing of the model."""
    if any(p.requires_grad for p in model.parameters()):
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            f"Nothing of the model can be trained: no weight of its adapter {model.active_adapter!r} requires a gradient, as PEFT "
            "loads adapters for inference. Load it with PeftModel.from_pretrained(..., is_trainable=True), give its folder as the "
            "model by name, or name it with --model_adapter_name."
        )
    raise ValueError(
        f"Nothing of the model can be trained: no weight of this {type(model).__name__} requires a gradient, as "
        "PEFT leaves a model after merge_and_unload(). Call requires_grad_(True) on what shall be trained, or train an adapter (peft_config, --use_peft)."
    )


def weights_beside_adapter(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What the user trains besides the adapter (unfrozen by hand), by name: PEFT saves nothing of it."""
    if not isinstance(model, PeftModel):
        return {}
    if model.active_peft_config.is_prompt_learning:
        return {n: p for n, p in model.base_model.named_parameters(prefix="base_model") if p.requires_grad}
    adapter = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    saved = {weight.data_ptr() for weight in adapter.values()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved}


def weights_of_soft_prompt(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What makes the vectors of soft prompts, a frozen copy's too, by name.

    PEFT saves the vectors, and loads them in the place of what they are made of: of p-tuning, without its encoder.
    """
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return {}
    return dict(model.prompt_encoder.named_parameters(prefix="prompt_encoder"))
