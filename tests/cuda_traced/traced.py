"""What runs among fake tensors (fake_cuda.py): models of many kinds, trained in many ways, and one step of each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fake_cuda import Kernel, Watch, fake_batch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dpo_trainer import DPOConfig
from dpo_trainer.losses import LOSSES, Objective
from dpo_trainer.metrics import METRICS, MetricInputs, MetricSums
from dpo_trainer.reference.cache import Record
from dpo_trainer.reference.cached import _as_logps
from dpo_trainer.reference.strategies import DisabledAdapter, FrozenModel, Reference
from dpo_trainer.scoring import varlen
from dpo_trainer.scoring.logprobs import METRIC_STATS, Scorer
from dpo_trainer.training.micro_batches import step_loss
from dpo_trainer.types import ImageBatch, PairBatch, PairLogps, Preferred, TokenizedPair, TokenLogps

LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 64, "sliding_window": 16},  # soft-capped scores
    "gpt_oss": {"head_dim": 64, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LENGTHS = [(40, 30, 50), (1, 1, 1), (3, 70, 64)]
IMAGE_TOKEN, TOKENS_OF_IMAGE = 9, 4


def pairs(lengths: Sequence[Sequence[int]] = tuple(LENGTHS), image: bool = False) -> list[TokenizedPair]:
    """Of prompts and completions of these lengths, the first one better than each of the others. With `image`, each prompt
    begins with one."""
    return [
        TokenizedPair(
            example_id=i,
            prompt_ids=[IMAGE_TOKEN] * TOKENS_OF_IMAGE * image + [3] * p,
            chosen_ids=[4] * c,
            rejected_ids=[5] * r,
            more_ids=[[6] * m for m in more],
            pairs=tuple(Preferred(0, other, 1.0) for other in range(1, 2 + len(more))),
        )
        for i, (p, c, r, *more) in enumerate(lengths)
    ]


def model_of(kind: str, dtype: torch.dtype, **config: Any) -> Any:
    """A model in training mode, its parameters of `dtype`, on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            if kind == "llava":
                return AutoModelForImageTextToText.from_config(_llava()).train()
            sizes = {**SIZES, **KINDS[kind], **config}
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).train()
    finally:
        torch.set_default_dtype(before)


def _llava() -> Any:
    """CLIP, whose pictures of 32 x 32 become 4 tokens, and Llama."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "projection_dim": 32}
    text = {"model_type": "llama", **SIZES}
    return AutoConfig.for_model(
        "llava", text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, image_seq_length=4
    )


def trained_as(model: Any, how: str) -> Any:
    """`full`, `lora`, or `qlora`: LoRA on a model whose norms, embeddings and head were put into float32, as peft prepares
    quantised ones."""
    if how == "full":
        return model
    if how == "qlora":
        for module in model.modules():
            if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
                module.to(torch.float32)
        model.get_output_embeddings().to(torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@dataclass(frozen=True)
class Trace:
    """What a `Watch` saw, as plain data."""

    kernels: list[Kernel] = field(repr=False)
    waits: list[str]
    casts: dict[str, int]  # of the first forward
    kept: int  # bytes, when the first forward is over
    kept_in_attention: int  # bytes, likewise
    remembered: list[int]  # what batches still hold after their step, one number each

    def count(self, name: str) -> int:
        return sum(kernel.name == name for kernel in self.kernels)


def step(
    kind: str = "qwen2",
    *,
    dtype: str = "float32",
    autocast: str | None = "bfloat16",
    checkpointing: bool | None = None,
    layout: str = "flat",
    how: str = "full",
    reference: str = "none",
    lengths: Sequence[Sequence[int]] = tuple(LENGTHS),
    micro_batches: int = 1,
    config: dict[str, Any] | None = None,
    kernel: bool = True,
) -> Trace:
    """One optimizer step of a run, without the optimizer. `checkpointing`: None off, else whether it is the reentrant one;
    `kernel` False: no variable-length kernel is installed."""
    installed = varlen.kernels
    varlen.kernels = installed if kernel else list  # type: ignore[assignment]
    try:
        return _step(
            kind, dtype, autocast, checkpointing, layout, how, reference, lengths, micro_batches, config or {}
        )
    finally:
        varlen.kernels = installed


def _step(
    kind: str,
    dtype: str,
    autocast: str | None,
    checkpointing: bool | None,
    layout: str,
    how: str,
    reference: str,
    lengths: Sequence[Sequence[int]],
    micro_batches: int,
    config: dict[str, Any],
) -> Trace:
    model = _prepared(kind, dtype, autocast, how, **config)
    if checkpointing is not None:
        switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        switch({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    objective = _objective("sigmoid")
    scorer = Scorer(model, stats=METRIC_STATS | objective.token_stats)
    source = _reference(reference, model, scorer, lambda: _prepared(kind, dtype, autocast, "full", **config))
    batches = [_batch(kind, layout, lengths, dtype) for _ in range(micro_batches)]
    metrics = MetricSums(METRICS, aux_loss=False)
    forward: tuple[dict[str, int], int, int] | None = None
    with Watch() as watch:
        for batch in batches:
            with scorer.step():
                policy = scorer(model, batch)
                forward = forward or (dict(watch.casts), watch.kept.bytes, watch.kept_in_attention.bytes)
                losses = objective(
                    policy, source(model, batch), training=True, weight=batch.weight, margin=batch.margin
                ).total
                metrics.add(
                    MetricInputs(batch=batch, policy=policy, reference=None, losses=losses, beta=objective.beta)
                )
                step_loss(losses, batch.weight, None, 1).backward()
    held = [len(batch.segments._memo) for batch in batches if batch.segments]
    assert forward is not None
    return Trace(watch.kernels, watch.waits, *forward, held)


def _objective(loss: str) -> Objective:
    with unset_fake_temporarily():
        options = {"label_smoothing": 1e-3} if loss == "exo_pair" else {}
        args = DPOConfig(tempfile.gettempdir(), bf16=False, report_to=[], loss_type=[loss], **options)
    return Objective.from_config(args)


def losses() -> dict[str, list[str]]:
    """{every loss: the waits of the objective and its backward, on log-probs of a policy and a reference}."""
    batch = replace(fake_batch(pairs(), "flat"), margin=torch.ones(len(LENGTHS), device="cuda"))
    found = {}
    for name in LOSSES:
        objective = _objective(name)
        _loss(objective, batch)  # the first batch may move what the objective holds
        with Watch() as watch:
            _loss(objective, batch).backward()
        found[name] = watch.waits
    return found


def _loss(objective: Objective, batch: PairBatch) -> Tensor:
    policy, reference = _logps(batch), _logps(batch)
    total = objective(policy, reference, training=True, weight=batch.weight, margin=batch.margin).total
    assert (total.device.type, total.dtype) == ("cuda", torch.float32)
    return step_loss(total, batch.weight, None, 1)


def _logps(batch: PairBatch) -> PairLogps:
    tokens = torch.zeros(batch.target_ids.shape, device="cuda", requires_grad=True)
    return PairLogps.from_tokens(
        TokenLogps(
            logps=tokens,
            completion=batch.completion,
            position=batch.completion_position,
            chosen=batch.chosen,
            rejected=batch.rejected,
            lengths=batch.lengths,
        )
    )


def _prepared(kind: str, dtype: str, autocast: str | None, how: str, **config: Any) -> Any:
    model = trained_as(model_of(kind, getattr(torch, dtype), **config), how)
    if autocast:  # as accelerate does it
        model.forward = torch.autocast("cuda", getattr(torch, autocast))(model.forward)
    return model


def _batch(kind: str, layout: str, lengths: Sequence[Sequence[int]], dtype: str) -> PairBatch:
    seeing = kind == "llava"
    batch = fake_batch(pairs(lengths, image=seeing), layout)
    if not seeing:
        return batch
    number = len(lengths) if layout == "flat" else 2 * len(lengths)
    pixels = torch.zeros(number, 3, 32, 32, device="cuda", dtype=getattr(torch, dtype))
    images = ImageBatch(inputs={"pixel_values": pixels}, axis={}, extent=(), digests=(), count=())
    return replace(batch, images=images)


def _reference(kind: str, model: Any, scorer: Scorer, make: Any) -> Any:
    """(policy, batch) -> what the reference says: `none`, a `copy`, the policy with its `adapter` off, or a `cache`."""
    if kind == "none":
        return lambda *_: None
    if kind == "cache":
        return lambda policy, batch: _as_logps([Record(-1.0, 1)] * len(batch.lengths), batch)  # all of it is found
    source: Reference = DisabledAdapter(scorer) if kind == "adapter" else _copy(make())
    return source.logps


def _copy(model: Any) -> FrozenModel:
    return FrozenModel(model, Scorer(model), "a copy")
