"""Optimizer steps of a run, and how much memory it takes, from the model's config alone.

T tokens of a batch   D hidden size   V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .shape import ModelShape

CHUNK = 2**27
"""Entries of one chunk of logits on an accelerator (head.py: 512 MB in float32)."""

LOGIT_COPIES = 4
"""float32 copies of a chunk that live at once: logits, softmax, and what metrics or backward make of them [measured]."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Of one process (world size 1): divide the micro-batches by the number of processes."""

    rows: int
    epochs: float
    micro_batches_per_epoch: int
    per_epoch: int
    total: int
    rows_per_step: int


def optimizer_steps(
    rows: int,
    *,
    batch_size: int,
    accumulation: int,
    epochs: float,
    max_steps: int = -1,
    drop_last: bool = False,
) -> Steps | None:
    """As `transformers.Trainer` counts: a last, short accumulation is a step too, and `max_steps` overrides the epochs."""
    micro_batches = rows // batch_size if drop_last else math.ceil(rows / batch_size)
    if not micro_batches:
        return None
    per_epoch = math.ceil(micro_batches / accumulation)
    total = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    return Steps(
        rows=rows,
        epochs=total / per_epoch if max_steps > 0 else epochs,
        micro_batches_per_epoch=micro_batches,
        per_epoch=per_epoch,
        total=total,
        rows_per_step=batch_size * accumulation,
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """An item of the memory, and how it was estimated."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated peak of one process, without sharding, and what it consists of."""

    parameters: int
    trainable: int
    tokens: int  # of the largest batch, in the layout of the run
    gradient_checkpointing: bool
    fixed: tuple[Part, ...]
    activations: Part
    activations_checkpointed: Part

    @property
    def total(self) -> int:
        """With the setting of the run."""
        return self.total_checkpointed if self.gradient_checkpointing else self.total_plain

    @property
    def total_plain(self) -> int:
        return self._fixed + self.activations.bytes

    @property
    def total_checkpointed(self) -> int:
        return self._fixed + self.activations_checkpointed.bytes

    @property
    def _fixed(self) -> int:
        return sum(part.bytes for part in self.fixed)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What of a run decides its memory."""

    tokens: int  # of the largest batch
    scored: int
    mixed_precision: bool  # computes in two bytes over float32 weights
    gradient_checkpointing: bool
    reference_copy: bool  # a second full model
    optimizer_bytes: float  # per trainable parameter


def estimate_memory(shape: ModelShape, run: Run) -> Memory:
    """Weights + reference + gradients + optimizer + activations + one chunk of logits."""
    weights = Part(name="weights", bytes=shape.weight_bytes, formula=shape.weight_formula)
    reference = Part(
        name="reference",
        bytes=shape.weight_bytes if run.reference_copy else 0,
        formula="a copy of the weights" if run.reference_copy else "none of its own",
    )
    trainable = shape.trainable
    gradients = Part(
        name="gradients",
        bytes=trainable * shape.trainable_size,
        formula=f"{trainable:,} trainable x {shape.trainable_size} bytes",
    )
    optimizer = Part(
        name="optimizer",
        bytes=round(trainable * run.optimizer_bytes),
        formula=f"{trainable:,} trainable x {run.optimizer_bytes:g} bytes",
    )
    chunk = min(run.scored, max(64, CHUNK // shape.vocabulary)) * shape.vocabulary
    logits = Part(
        name="logits",
        bytes=LOGIT_COPIES * 4 * chunk,
        formula=f"{LOGIT_COPIES} float32 copies of one chunk, {chunk:,} logits",
    )
    fixed = [weights, reference, gradients, optimizer, logits]
    if run.mixed_precision:
        casts = trainable if run.gradient_checkpointing else shape.parameters
        fixed.append(
            Part(
                name="half-precision copies",
                bytes=2 * casts,
                formula=f"{casts:,} weights x 2 bytes, for mixed precision",
            )
        )
    plain, checkpointed = _activations(shape, run)
    return Memory(
        parameters=shape.parameters,
        trainable=trainable,
        tokens=run.tokens,
        gradient_checkpointing=run.gradient_checkpointing,
        fixed=tuple(fixed),
        activations=plain,
        activations_checkpointed=checkpointed,
    )


def _activations(shape: ModelShape, run: Run) -> tuple[Part, Part]:
    """What the layers keep for backward, without and with gradient checkpointing."""
    computed = 2 if run.mixed_precision else shape.compute_size
    kept_by_layer = shape.kept_per_token(computed)
    residual = shape.hidden * shape.compute_size
    plain = Part(
        name="activations",
        bytes=run.tokens * shape.layers * kept_by_layer,
        formula=f"{run.tokens:,} tokens x {shape.layers} layers x {kept_by_layer:,} bytes",
    )
    checkpointed = Part(
        name="activations with gradient checkpointing",
        bytes=run.tokens * (shape.layers * residual + kept_by_layer),
        formula=f"{run.tokens:,} tokens x ({shape.layers} layers x {residual:,} + one layer x {kept_by_layer:,} bytes)",
    )
    return plain, checkpointed
