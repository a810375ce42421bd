"""Memory per card, by model size, engine and number of cards: the tables of docs/scaling.md, from formulas alone.

    python benchmarks/memory_table.py            prints them
    python benchmarks/memory_table.py --write    puts them into docs/scaling.md

No weights are made and no GPU is needed. What one process takes is that of `dpo_trainer.inspection.estimate`; an engine says which
share of each part a card holds, and what it needs for itself. Expect 7 B with all weights to fit on four 80 GB cards
under FSDP2 and on eight under ZeRO-2 with a reference copy. About ten seconds.

P parameters   N cards   GB are 10^9 bytes
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from peft import LoraConfig
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from dpo_trainer.inspection.estimate import Run, estimate_memory
from dpo_trainer.inspection.shape import ModelShape, shape_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
TOKENS, SCORED = 8192, 4096
"""Of one micro-batch on one card, in the flat layout; about 12 pairs of UltraFeedback."""

USABLE = 72e9
"""Of a card with 80 GB: the rest is for the context, NCCL and fragmentation."""

CARDS = (1, 2, 4, 8, 16, 32, 64)
HALF, FULL = 2, 4  # bytes of a number in bfloat16 and float32
ADAM = 2 * FULL


# --- models: sizes of published configs ---


def qwen(hidden: int, mlp: int, layers: int, heads: int, key_value: int, *, tied: bool = False) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value,
        vocab_size=151936 if tied else 152064,
        tie_word_embeddings=tied,
    )


MODELS: dict[str, PretrainedConfig] = {
    "0.5 B": qwen(896, 4864, 24, 14, 2, tied=True),
    "1.5 B": qwen(1536, 8960, 28, 12, 2, tied=True),
    "7 B": qwen(3584, 18944, 28, 28, 4),
    "14 B": qwen(5120, 13824, 48, 40, 8),
    "32 B": qwen(5120, 27648, 64, 40, 8),
    "70 B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
"""Qwen 2.5, and Llama 3 for 70 B."""

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Kind:
    """A way to train: how the weights are held (scripts/configs/), and whether all of them are trained."""

    name: str
    dtype: str
    adapter: bool = False
    bits: int | None = None


FULL_TRAINING = Kind("all weights", "float32")
LORA_TRAINING = Kind("LoRA, bfloat16 base", "bfloat16", adapter=True)
QLORA_TRAINING = Kind("QLoRA, 4-bit base", "bfloat16", adapter=True, bits=4)


@cache
def shape(model: str, kind: Kind) -> ModelShape:
    return shape_of(MODELS[model], dtype=kind.dtype, peft_config=LORA if kind.adapter else None, bits=kind.bits)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes of one process that shares nothing, and what engines ask about the model."""

    weights: float
    reference: float
    gradients: float
    optimizer: float
    casts: float  # bfloat16 copies of trained weights, which autocast keeps during a step
    batch: float  # activations, and one chunk of logits
    gathered: float  # what FSDP2 holds whole at a time: see `gathered_by_fsdp2`

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer


def parts(model: str, kind: Kind, *, reference_copy: bool) -> Parts:
    sizes = shape(model, kind)
    run = Run(
        tokens=TOKENS,
        scored=SCORED,
        mixed_precision=sizes.compute_size == FULL,
        gradient_checkpointing=True,
        reference_copy=reference_copy,
        optimizer_bytes=ADAM,
    )
    memory = estimate_memory(sizes, run)
    fixed = {part.name: part.bytes for part in memory.fixed}
    return Parts(
        weights=fixed["weights"],
        reference=fixed["reference"],
        gradients=fixed["gradients"],
        optimizer=fixed["optimizer"],
        casts=fixed.get("half-precision copies", 0),
        batch=fixed["logits"] + memory.activations_checkpointed.bytes,
        gathered=gathered_by_fsdp2(sizes, tied=MODELS[model].tie_word_embeddings, trained=not kind.adapter),
    )


def gathered_by_fsdp2(sizes: ModelShape, *, tied: bool, trained: bool) -> float:
    """Two blocks (one computes, the next is on its way) and the embeddings in bfloat16; where they are trained, the gradients
    of one block and of the embeddings too."""
    embeddings = sizes.vocabulary * sizes.hidden * (1 if tied else 2)
    block = (sizes.parameters - embeddings) / sizes.layers
    return HALF * (2 * block + embeddings) + (HALF * (block + embeddings) if trained else 0)


def in_deepspeed(whole: Parts, kind: Kind) -> Parts:
    """DeepSpeed with bf16 holds weights and gradients in bfloat16, and float32 weights beside Adam's numbers."""
    if kind.adapter:
        return replace(whole, casts=0)
    parameters = whole.weights / FULL
    return replace(
        whole,
        weights=HALF * parameters,
        gradients=HALF * parameters,
        optimizer=(FULL + ADAM) * parameters,
        reference=HALF * whole.reference / FULL,
        casts=0,
    )


# --- engines: bytes on each of N cards ---

BUCKET = HALF * 5e8  # DeepSpeed's reduce_bucket_size
LIVE = HALF * 1e9  # stage3_max_live_parameters
GROUP = FULL * 1e9  # the float32 gradient of one sub_group_size


def ddp(p: Parts, kind: Kind, cards: int) -> float:
    """Everything on every card; with several, gradients a second time, in the buckets that are sent."""
    return p.states + p.casts + p.reference + p.batch + (p.gradients if cards > 1 else 0)


def zero1(p: Parts, kind: Kind, cards: int) -> float:
    d = in_deepspeed(p, kind)
    return d.weights + d.gradients + (d.optimizer + step_gradient(d)) / cards + d.reference + d.batch + BUCKET


def zero2(p: Parts, kind: Kind, cards: int) -> float:
    d = in_deepspeed(p, kind)
    return d.weights + (d.gradients + d.optimizer + step_gradient(d)) / cards + d.reference + d.batch + BUCKET


def zero3(p: Parts, kind: Kind, cards: int) -> float:
    d = in_deepspeed(p, kind)
    gathered = min(LIVE, d.weights)
    return (d.states + d.reference + min(GROUP, step_gradient(d))) / cards + d.batch + BUCKET + gathered


def zero3_offload(p: Parts, kind: Kind, cards: int) -> float:
    d = in_deepspeed(p, kind)
    return d.batch + BUCKET + min(LIVE, d.weights)


def fsdp2(p: Parts, kind: Kind, cards: int) -> float:
    return (p.states + p.reference) / cards + p.gathered + p.batch


def step_gradient(d: Parts) -> float:
    """The gradient in float32, as the optimizer takes it: one number for three of its own (weight and Adam's two)."""
    return d.optimizer / 3


@dataclass(frozen=True)
class Engine:
    """`of(parts, kind, N)`: bytes on each card."""

    of: Callable[[Parts, Kind, int], float]
    least: int = 2  # cards


ENGINES = {
    "ddp": Engine(ddp, least=1),
    "zero1": Engine(zero1),
    "zero2": Engine(zero2),
    "fsdp2": Engine(fsdp2),
    "zero3": Engine(zero3),
    "zero3_offload": Engine(zero3_offload, least=1),
}


# --- tables ---


def fewest(model: str, kind: Kind, engine: Engine, *, reference_copy: bool) -> tuple[int, float] | None:
    """(cards, bytes on each) of the smallest number of cards that hold it; None if 64 do not."""
    whole = parts(model, kind, reference_copy=reference_copy)
    for cards in CARDS:
        taken = engine.of(whole, kind, cards)
        if cards >= engine.least and taken <= USABLE:
            return cards, taken
    return None


def cell(model: str, kind: Kind, engine: Engine, *, reference_copy: bool) -> str:
    found = fewest(model, kind, engine, reference_copy=reference_copy)
    return "-" if found is None else f"{found[0]} x {found[1] / 1e9:.0f}"


def table(kind: Kind, engines: list[str]) -> str:
    """One row per model without and with a reference copy: `cards x GB on each`."""
    lines = [["model", "reference copy", *(f"`{name}`" for name in engines)]]
    lines.append(["---"] * len(lines[0]))
    for model in MODELS:
        for copied in (False, True):
            row = [cell(model, kind, ENGINES[name], reference_copy=copied) for name in engines]
            lines.append([model, "yes" if copied else "no", *row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {
    "full": (FULL_TRAINING, list(ENGINES)),
    "lora": (LORA_TRAINING, ["ddp", "zero2", "fsdp2", "zero3", "zero3_offload"]),
    "qlora": (QLORA_TRAINING, ["ddp"]),
}


def filled(page: str) -> str:
    """The page, with every table between `<!-- memory table: NAME -->` and `<!-- end of table -->` computed anew."""
    for name, (kind, engines) in TABLES.items():
        region = re.compile(rf"(<!-- memory table: {name} -->\n).*?(<!-- end of table -->)", re.DOTALL)
        if len(region.findall(page)) != 1:
            raise SystemExit(f"{PAGE.name} needs one `<!-- memory table: {name} -->` ... `<!-- end of table -->`.")
        page = region.sub(rf"\g<1>\n{table(kind, engines)}\n\n\g<2>", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{PAGE.name} written")
        return
    for kind, engines in TABLES.values():
        print(f"\n{kind.name}\n\n{table(kind, engines)}")


if __name__ == "__main__":
    main()
