"""The named cases of the suite: which data, which options, which sides stand beside each other.

    hh-b8  ultrafeedback-b4-lora-gc  sharegpt-b1-cached  hh-b8-best      data, batch, LoRA, gradient checkpointing, reference
    length-2048  vocab-152k  ranked-8                                    growth, on synthetic rows
    quality-hh                                                           accuracy against time
    gpu-0.5b-hh-b8  gpu-7b-ultrafeedback-b8                              the same on a GPU, in bfloat16

`cached`: the reference's log-probs are computed before the first step (cold), or were by an earlier run (warm). `best`: TRL
with rows grouped by length and the reference precomputed; its batches are then others than ours, and so are its losses.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

# 32 to 33 million parameters (with the vocabulary that the data yields), proportioned like the small Qwen2 models.
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
HALF_B = MODEL | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
}
SEVEN_B = HALF_B | {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
DATA = ("hh", "ultrafeedback", "sharegpt")
BATCHES = (1, 4, 8, 16)
COUNTED_PAIRS = {
    "hh": 32,
    "ultrafeedback": 16,
    "sharegpt": 16,
}  # TRL takes 3 and 11 CPU seconds for one of the first two
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = {"16k": 16_384, "152k": 151_936}
RANKED = (2, 4, 8)
LORA_RANK = 16
GROUPED_STEPS = 16
"""transformers sorts within a quarter of the rows, at most 50 batches: with fewer than 8 steps it would sort single batches, and group nothing."""
# Else transformers takes the column of lengths away before it orders the rows by it.
GROUPED = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
PRECOMPUTED = {"precompute_ref_log_probs": True}


@dataclass(frozen=True)
class Side:
    """One way to do the work of a case.

    trainer: "ours" or "trl".
    arguments: of its config, beyond those that all sides share.
    beside: the side whose rate ours is divided by.
    warm: the reference is read from the cache that the run before left.
    pairwise: a ranked list as one row for each of its pairs.
    """

    trainer: str
    arguments: dict[str, Any] = field(default_factory=dict)
    beside: str | None = None
    warm: bool = False
    pairwise: bool = False

    @property
    def cached(self) -> bool:
        return "precompute_ref_log_probs" in self.arguments


@dataclass(frozen=True)
class Case:
    """`lengths`: tokens of prompt and of each completion of synthetic rows. `completions`: of one prompt, best first.
    `warm_up`: steps that are not counted. `compared`: steps whose losses must agree, None: all. `evaluate_every`: steps."""

    name: str
    data: str
    sides: dict[str, Side]
    batch: int = 8
    steps: int = 4
    max_length: int = 1024
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    vocab_size: int | None = None
    lora: bool = False
    checkpointing: bool = False
    lengths: tuple[int, int] | None = None
    completions: int = 2
    warm_up: int = 1
    compared: int | None = None
    evaluate_every: int | None = None
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def tolerance(self) -> float:
        """Of a step's loss, nats. float32: sums of about 2,000 nats times beta 0.1, averaged over a batch; two orders of
        summation differ by 1e-5 in the worst step seen. bfloat16: 8 bits; not measured yet."""
        return 5e-2 if self.device == "cuda" else 1e-4


ONLINE = {"ours": Side("ours", beside="trl"), "trl": Side("trl")}
CACHED = {
    "ours": Side("ours"),
    "ours cold": Side("ours", PRECOMPUTED, beside="trl cold"),
    "ours warm": Side("ours", PRECOMPUTED, beside="trl warm", warm=True),
    "trl cold": Side("trl", PRECOMPUTED),
    "trl warm": Side("trl", PRECOMPUTED, warm=True),
}
BEST = {
    "ours": Side("ours", beside="trl grouped"),
    "ours cold": Side("ours", PRECOMPUTED, beside="trl grouped cold"),
    "ours warm": Side("ours", PRECOMPUTED, beside="trl grouped warm", warm=True),
    "trl grouped": Side("trl", GROUPED),
    "trl grouped cold": Side("trl", GROUPED | PRECOMPUTED),
    "trl grouped warm": Side("trl", GROUPED | PRECOMPUTED, warm=True),
}
WAYS = {"": ONLINE, "-cached": CACHED, "-best": BEST}


def _grid() -> list[Case]:
    cases = []
    for data, batch, lora, checkpointing, way in product(DATA, BATCHES, (False, True), (False, True), WAYS):
        cases.append(
            Case(
                name=f"{data}-b{batch}{'-lora' * lora}{'-gc' * checkpointing}{way}",
                data=data,
                sides=WAYS[way],
                batch=batch,
                steps=max(GROUPED_STEPS if way == "-best" else 1, COUNTED_PAIRS[data] // batch),
                lora=lora,
                checkpointing=checkpointing,
                warm_up=0 if way == "-best" else 1,  # grouping puts the longest rows into the first batch
            )
        )
    return cases


def _growth() -> list[Case]:
    longest = MODEL | {"max_position_embeddings": max(LENGTHS)}
    lengths = [
        Case(f"length-{n}", "synthetic", ONLINE, 1, 2, max_length=n, lengths=(n // 2, n // 2), model=longest)
        for n in LENGTHS
    ]
    vocabularies = [
        Case(f"vocab-{name}", "synthetic", ONLINE, 2, 2, lengths=(256, 128), vocab_size=size)
        for name, size in VOCABULARIES.items()
    ]
    return [*lengths, *vocabularies, *map(_ranked, RANKED)]


def _ranked(completions: int) -> Case:
    """The rows in their order, so that both sides take the same pairs at each step; within a memory budget, which 28 rows
    of a prompt of 1,024 tokens need."""
    options = {"train_sampling_strategy": "sequential", "max_tokens_per_micro_batch": 8192}
    sides = {"ours": Side("ours", options, beside="pairwise"), "pairwise": Side("ours", options, pairwise=True)}
    return Case(
        f"ranked-{completions}",
        "synthetic",
        sides,
        batch=1,
        steps=1,
        max_length=2048,
        lengths=(1024, 128),
        completions=completions,
    )


def _quality() -> list[Case]:
    """The losses of later steps amplify the rounding of earlier ones: the first five must agree."""
    steps = {"hh": 48, "ultrafeedback": 24}
    return [
        Case(f"quality-{data}", data, ONLINE, steps=count, warm_up=0, compared=5, evaluate_every=count // 6)
        for data, count in steps.items()
    ]


def _gpu() -> list[Case]:
    """Never run yet: no figure of them is claimed anywhere."""
    return [
        Case(f"gpu-{size}-{data}-b8", data, ONLINE, steps=16, model=model, vocab_size=151_936, device="cuda")
        for size, model in {"0.5b": HALF_B, "7b": SEVEN_B}.items()
        for data in ("hh", "ultrafeedback")
    ]


CASES = {case.name: case for case in [*_grid(), *_growth(), *_quality(), *_gpu()]}
HEADLINE = ["hh-b8", "hh-b8-gc", "ultrafeedback-b8", "hh-b8-cached", "ultrafeedback-b8-cached", "ranked-8"]


def select(patterns: list[str]) -> list[Case]:
    """Cases by name or glob, in the order of the patterns.

    Raises:
        ValueError: for a pattern that names none.
    """
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        found = {name: case for name, case in CASES.items() if fnmatchcase(name, pattern)}
        if not found:
            close = difflib.get_close_matches(pattern, CASES, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"No case is called {pattern!r}.{hint} `--list` shows all {len(CASES)}.")
        chosen |= found
    return list(chosen.values())
