"""The branch of GPUs on a CPU: the variable-length kernel, played by its documentation, against the calls per segment.

It is the same mathematics in another order. float32: rounding alone. bfloat16 keeps 8 bits: the kernel rounds its output once,
torch's attention on a CPU sums in float32 as well; a token that sees one key too many changes gradients by 0.1 and more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import tiny
import torch
import varlen_stand_in
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from dpo_trainer.data.batches.collate import inputs_of
from dpo_trainer.scoring import attention
from dpo_trainer.scoring.attention import shared_prompt_attention
from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.types import PairBatch, Preferred, Segments, TokenizedPair

# Relative, of gradients.
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
MODULE = nn.Module()

asked: list[torch.dtype] = []
"""Of the queries for which a kernel was looked for."""


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[list[Any]]]:
    """with played() as calls: flat rows take the kernel where a GPU would take it; `calls` lists the shapes of queries."""

    def kernel(query: Tensor, value: Tensor, segments: Segments, dropout: float, softcap: Any, s_aux: Any) -> Any:
        asked.append(query.dtype)
        plain = dropout == 0 and softcap is None and s_aux is None and not segments.mutual
        return varlen_stand_in.KERNEL if plain else None

    @contextlib.contextmanager
    def on() -> Iterator[list[Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_kernel_for", kernel)
            varlen_stand_in.calls.clear()
            asked.clear()
            yield varlen_stand_in.calls

    return on


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def segments_of(completions: int) -> Segments:
    """Three prompts (one of a single token) with as many completions each."""
    length, start, prefix = [], [], []
    row = 0
    for prompt, words in ((5, 3), (1, 1), (9, 4)):
        first = row
        for number in range(completions):
            own = words + number
            length.append(own if number else prompt + own)
            start.append(first)
            prefix.append(prompt if number else 0)
            row += length[-1]
    return Segments(length=tuple(length), prefix_start=tuple(start), prefix_length=tuple(prefix))


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("window", [None, 2, 3, 8, 64])
@pytest.mark.parametrize("heads_per_key", [1, 2, 4])
@pytest.mark.parametrize("completions", [1, 2, 3, 4])
def test_attention(played, completions, heads_per_key, window, dtype):
    """Output, and gradients of queries, keys and values."""
    segments = segments_of(completions)
    total, numbers = sum(segments.length), torch.Generator().manual_seed(0)
    heads = (4, 4 // heads_per_key, 4 // heads_per_key)
    leaves = [torch.randn(1, h, total, 8, generator=numbers).to(dtype).requires_grad_() for h in heads]
    direction = torch.randn(1, total, 4, 8, generator=numbers).to(dtype)

    def answer() -> list[Tensor]:
        out, _ = shared_prompt_attention(MODULE, *leaves, None, segments=segments, sliding_window=window)
        return [out.detach(), *torch.autograd.grad(out, leaves, direction)]

    want = answer()
    with played() as calls:
        got = answer()
    assert len(calls) == 1
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= LIMIT[dtype]


def pairs(completions: int) -> list[TokenizedPair]:
    numbers = torch.Generator().manual_seed(completions)

    def ids(n: int) -> list[int]:
        return torch.randint(1, 200, (n,), generator=numbers).tolist()

    return [
        TokenizedPair(
            example_id=i,
            prompt_ids=ids(p),
            chosen_ids=ids(c),
            rejected_ids=ids(r),
            more_ids=[ids(4 + 3 * more) for more in range(completions - 2)],
            pairs=tuple(Preferred(0, other) for other in range(1, completions)),
        )
        for i, (p, c, r) in enumerate([(20, 13, 25), (1, 1, 1), (30, 9, 4)])
    ]


def model(window: int | None = None, heads_per_key: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "sliding_window": window, "num_key_value_heads": 4 // heads_per_key}
    return MistralForCausalLM(MistralConfig(**sizes)).train()


def measure(made: Any, batch: list[TokenizedPair], layout: str = "flat", autocast: bool = False) -> list[Tensor]:
    """Log-prob sums [2N], and the gradient of a mix of them in all parameters, as one vector."""
    made.zero_grad()
    scorer = Scorer(made)
    with scorer.step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = scorer(made, PairBatch.from_inputs(inputs_of(batch, layout, 0)))
        sums = torch.cat([logps.chosen, logps.rejected])
        oracles.mix(sums).backward()
    return [sums.detach(), torch.cat([p.grad.double().flatten() for p in made.parameters()])]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize(("completions", "heads_per_key", "window"), [(2, 2, None), (3, 1, 8), (4, 4, 8)])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_step(played, completions, heads_per_key, window, checkpointing, dtype):
    """The kernel runs once per layer, and once more where layers are computed again."""
    made = model(window, heads_per_key).to(dtype)
    if checkpointing is not None:
        tiny.checkpoint_layers(made, checkpointing)
    want = measure(made, pairs(completions))
    with played() as calls:
        got = measure(made, pairs(completions))
    assert len(calls) == (2 if checkpointing is None else 4)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= LIMIT[dtype]


@pytest.mark.parametrize("window", [None, 8])
def test_autocast_against_padded_rows(played, window):
    """The precision of a default run: weights in float32, products in bfloat16. Both layouts round in other places."""
    made = model(window)
    want = measure(made, pairs(3), "padded", autocast=True)
    with played() as calls:
        got = measure(made, pairs(3), autocast=True)
    assert len(calls) == 2
    assert relative(got[0], want[0]) < 1e-3
    assert relative(got[1], want[1]) < 3e-2
    wrong = measure(made, pairs(2), "padded", autocast=True)
    assert relative(got[1], wrong[1]) > 0.3, "another batch is farther away"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_check_of_the_first_batch_takes_the_path_of_training(played, tmp_path: Path, dropout):
    """Autocast is on in both, and the run stays flat. Only dropout in attention takes training, and no check, off the kernel."""
    trainer = tiny.trainer(
        tmp_path, model=tiny.llama(attention_dropout=dropout), bf16=True, max_steps=1, disable_dropout=False
    )
    with played() as calls:
        trainer.train()
    assert trainer.layout.name == "flat"
    assert set(asked) == {torch.bfloat16}
    assert len(calls) == len(asked) - (0 if dropout == 0 else 4)  # of two layers, computed again in backward
