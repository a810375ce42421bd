"""What is built around a model before it trains: adapters and dropout settled, its scorer, its reference, its layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers.utils import logging

from ..checkpointing.save_checks import check_wrapping
from ..config import DPOConfig
from ..data import DataOptions
from ..data.images.inputs import ImageInputs
from ..data.images.text import ImageText
from ..distributed.engine_checks import check_placement
from ..distributed.engines import shards_weights
from ..losses import Objective
from ..models.adapter_types import refuse_adapter_kind
from ..models.adapters import (
    apply_peft,
    compute_as_in_training,
    let_gradients_through,
    refuse_untrainable,
    weights_beside_adapter,
)
from ..models.continued_adapter import continue_adapter
from ..models.dropout import disable_dropout
from ..models.load import load_model
from ..models.unwrap import base_model
from ..models.vision import (
    on_language_alone,
    refuse_without_processor,
    settle_vision_tower,
    sight_of,
    trains_vision,
    vision_tower,
)
from ..reference import DisabledAdapter, FrozenModel, NamedAdapter, OnCopy, Reference, cached, choose_reference
from ..scoring.layout import Layout
from ..scoring.logprobs import METRIC_STATS, Scorer, router_loss_weight
from ..storage.folders import cache_folder

logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class ModelInputs:
    """The arguments of the trainer that concern models; hyperparameter search assembles a new model from them for each trial."""

    args: DPOConfig
    model: str | None = None  # where the policy is loaded from
    ref_model: str | nn.Module | None = None
    peft_config: PeftConfig | None = None
    quantization_config: Any = None

    def load(self, name_or_path: str) -> nn.Module:
        return load_model(
            name_or_path,
            model_init_kwargs=self.args.model_init_kwargs,  # type: ignore[arg-type]  # JSON is parsed by now
            trust_remote_code=self.args.trust_remote_code,
            quantization_config=self.quantization_config,
        )

    def policy(self, model: str | nn.Module) -> nn.Module:
        """The model to train, as it was passed."""
        if isinstance(model, str):
            return self.load(model)
        if self.args.model_init_kwargs or self.quantization_config is not None:
            raise ValueError(
                "model_init_kwargs and quantization_config are for a model given by name; this one is loaded already: "
                "pass them to its from_pretrained."
            )
        return model

    def reference(self) -> nn.Module | None:
        return self.load(self.ref_model) if isinstance(self.ref_model, str) else self.ref_model

    @property
    def precision(self) -> str:
        """What a forward computes in, where that is less than the weights are held in."""
        return "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"

    def remake_reference(self) -> Callable[[], FrozenModel] | None:
        """How to load the reference again after it was freed: None if its source is not known."""
        source = self.ref_model if self.ref_model is not None else self.model
        if source is None:
            return None

        def remake() -> FrozenModel:
            model = self.load(source) if isinstance(source, str) else source
            return FrozenModel(model, Scorer(model), "the reference, made again")

        return remake


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A model ready to train, and what reads it."""

    model: nn.Module
    scorer: Scorer
    reference: Reference
    layout: Layout


def check_models(args: DPOConfig, *models: str | nn.Module | None) -> None:
    """Refuse a model that is wrapped already, or placed where the engine cannot use it. Names of models are not checked."""
    for model in models:
        if isinstance(model, nn.Module):
            check_wrapping(model)
            check_placement(model, args)


def assemble(
    model: nn.Module, inputs: ModelInputs, objective: Objective, pad_token_id: int, processing_class: Any = None
) -> Assembly:
    """Make `model` the policy. The reference is what the model is *now*, so nothing may train before this.

    Sets `objective.router_weight`, which only the model can tell.
    """
    args, ref_model = inputs.args, inputs.reference()
    model, fresh_adapter = _with_adapter(model, inputs)
    _find_unused_parameters(args, model)
    settle_vision_tower(model, freeze=args.freeze_vision_tower)
    refuse_untrainable(model)
    images = _images(model, args, processing_class)
    if args.disable_dropout:
        disable_dropout(model, lora=args.disable_lora_dropout)
        if ref_model is not None:
            disable_dropout(ref_model, lora=True)
    if ref_model is not None:
        compute_as_in_training(ref_model)

    objective.router_weight = router_loss_weight(base_model(model), args.router_aux_loss_coef)
    if objective.router_weight and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "The load-balancing loss (router_aux_loss_coef) gets no gradient out of reentrant checkpoints: leave "
            "use_reentrant out of --gradient_checkpointing_kwargs, or switch the loss off with --router_aux_loss_coef 0."
        )
    scorer = Scorer(model, stats=METRIC_STATS | objective.token_stats, router_loss=objective.router_weight > 0)
    reference = _reference(model, ref_model, scorer, inputs, objective, fresh_adapter)
    logger.warning(f"Reference: {reference.description}.")
    for _, own in reference.own:
        _say_other_dtype(base_model(own).dtype, base_model(model).dtype)
    layout = Layout(
        args.layout,
        [(scorer, model), *reference.own],
        pad_token_id,
        autocast=getattr(torch, inputs.precision) if inputs.precision != "float32" else None,
        reason="the noise of --neftune_noise_alpha depends on the length of a row"
        if args.neftune_noise_alpha
        else None,
        counted=None if args.max_tokens_per_micro_batch is None else "--max_tokens_per_micro_batch",
        images=images,
    )
    return Assembly(model=model, scorer=scorer, reference=reference, layout=layout)


def _find_unused_parameters(args: DPOConfig, model: nn.Module) -> None:
    """Set for an adapter what transformers sets for its own models: DDP's search and reentrant checkpointing exclude each other."""
    if isinstance(model, PeftModel) and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = not args.gradient_checkpointing


def _images(model: nn.Module, args: DPOConfig, processing_class: Any) -> ImageInputs | None:
    """What makes the inputs of images, where the model sees and has its processor."""
    text = ImageText.of(processing_class, DataOptions.from_config(args).image_access)
    if text is None:
        refuse_without_processor(model)
        return None
    if vision_tower(model) is None:
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}, which makes inputs of images, and "
            f"{type(base_model(model)).__name__} reads text alone: pass the tokenizer (processor.tokenizer)."
        )
    cache = str(cache_folder(None, "images")) if args.cache_processed_images else None
    several = args.world_size > 1 and (trains_vision(model) or shards_weights(args))
    return ImageInputs(text, sight_of(model), cache=cache, always=several)


def _reference(
    model: nn.Module,
    ref_model: nn.Module | None,
    scorer: Scorer,
    inputs: ModelInputs,
    objective: Objective,
    fresh_adapter: bool,
) -> Reference:
    args = inputs.args
    if args.precompute_ref_log_probs and not objective.needs_reference:
        why = "--reference_free asks for none" if args.reference_free else "none of the losses in --loss_type has one"
        raise ValueError(f"--precompute_ref_log_probs is about a reference, but {why}: leave it off.")
    sharded = shards_weights(args)
    reference = choose_reference(
        model,
        ref_model,
        scorer,
        needed=objective.needs_reference,
        reference_free=args.reference_free,
        fresh_adapter=fresh_adapter,
        ref_adapter_name=args.ref_adapter_name,
        separate_adapter=args.use_separate_reference_adapter,
        moving=args.sync_ref_model,
        copy_policy=sharded or not args.precompute_ref_log_probs,
        sharded=sharded,
    )
    if not args.precompute_ref_log_probs:
        return reference
    if sharded and isinstance(reference, DisabledAdapter | NamedAdapter):
        reference = OnCopy(reference, model)
    return cached(
        reference,
        model,
        folder=args.ref_cache_dir,
        quota_gb=args.ref_cache_quota,
        precision=inputs.precision,
        tokens=objective.needs_reference_tokens,
        remake=inputs.remake_reference(),
    )


def _with_adapter(model: nn.Module, inputs: ModelInputs) -> tuple[nn.Module, bool]:
    """The model with the adapter that shall train, if any; and whether that was added just now."""
    args = inputs.args
    checkpointing = bool(args.gradient_checkpointing)
    if isinstance(inputs.peft_config, PeftConfig):
        fresh = not isinstance(model, PeftModel)
        refuse_adapter_kind(inputs.peft_config, fresh=fresh, gradient_checkpointing=checkpointing)
    if isinstance(model, PeftModel):
        let_gradients_through(base_model(model), gradient_checkpointing=checkpointing)
    fresh_adapter = inputs.peft_config is not None and not isinstance(model, PeftModel)
    if args.merge_lora_configs and (inputs.peft_config is None or fresh_adapter):
        raise ValueError(
            "--merge_lora_configs is about two sets of LoRA settings, those of a model that is an adapter already and those of "
            "--use_peft (peft_config): here is at most one. Leave it out."
        )
    if fresh_adapter:
        model = apply_peft(
            model,
            inputs.peft_config if args.freeze_vision_tower is False else on_language_alone(inputs.peft_config, model),
            quantized=bool(getattr(model, "is_quantized", False)),
            gradient_checkpointing=checkpointing,
        )
    if args.model_adapter_name is not None:
        _activate_adapter(model, args.model_adapter_name)
    if isinstance(model, PeftModel) and not fresh_adapter:
        for name in model.active_adapters:
            refuse_adapter_kind(model.peft_config[name], fresh=False, gradient_checkpointing=checkpointing)
    if inputs.peft_config is not None and not fresh_adapter:
        model = continue_adapter(model, inputs.peft_config, merge_lora_configs=args.merge_lora_configs)
    if beside := list(weights_beside_adapter(model)):
        logger.warning(
            f"{len(beside)} weights are trained beside the adapter ({', '.join(beside[:3])} ...). They are in checkpoints, but "
            "not in the adapter that is saved at the end: name their modules in modules_to_save (--lora_modules_to_save)."
        )
    return model, fresh_adapter


def _say_other_dtype(reference: torch.dtype, policy: torch.dtype) -> None:
    if reference != policy:
        logger.warning(
            f"The reference is held in {reference}, the model in {policy}: log-probs differ by rounding alone, and the first loss "
            "need not be ln 2. Load both in one dtype to be rid of that."
        )


def _activate_adapter(model: Any, name: str) -> None:
    adapters = list(getattr(model, "peft_config", {}))
    if name not in adapters:
        has = f"which has {', '.join(adapters)}" if adapters else "which has none: pass a PeftModel or a peft_config"
        raise ValueError(f"--model_adapter_name {name!r} is not an adapter of the model, {has}.")
    model.set_adapter(name)
