"""The slowest and plainest way to the core's numbers: one sequence at a time, a model that nobody touched, all of its
logits, float64, gradients by autograd. Nothing here imports what it is compared with, except the type that holds a pair.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_trainer.types import Preferred, TokenizedPair

# What the layouts promise in float32: log-probs to 5e-5 nats, gradients to 1e-3 of their size.
NATS = 5e-5
GRADIENT = 1e-3


def random_pairs(lengths: Iterable[tuple[int, ...]], vocabulary: int = 97, seed: int = 1) -> list[TokenizedPair]:
    """Rows of random tokens with these lengths of prompt, chosen, rejected and further completions, if any, every one of
    them compared with all that follow it. Token 0 is left for padding."""
    numbers = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(1, vocabulary, (n,), generator=numbers).tolist()

    return [
        TokenizedPair(
            example_id=10 + i,
            prompt_ids=ids(p),
            chosen_ids=ids(c),
            rejected_ids=ids(r),
            more_ids=tuple(map(ids, more)),
            pairs=tuple(Preferred(a, b) for a, b in itertools.combinations(range(2 + len(more)), 2)),
        )
        for i, (p, c, r, *more) in enumerate(lengths)
    ]


def apart(rows: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Every pair as a row of two completions, its prompt repeated: what a ranked row must be worth."""
    separate = []
    for row in rows:
        for chosen, rejected, margin in row.pairs:
            renumbered = {chosen: 0, rejected: 1}
            separate.append(
                TokenizedPair(
                    example_id=row.example_id,
                    prompt_ids=row.prompt_ids,
                    chosen_ids=row.completions[chosen],
                    rejected_ids=row.completions[rejected],
                    pairs=(Preferred(0, 1, margin),),
                    unscored=tuple((renumbered[n], a, b) for n, a, b in row.unscored if n in renumbered),
                    weight=row.weight,
                )
            )
    return separate


def sequences(pairs: Sequence[TokenizedPair]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of chosen 0, rejected 0, chosen 1, rejected 1 ..."""
    return [(p.prompt_ids, completion) for p in apart(pairs) for completion in (p.chosen_ids, p.rejected_ids)]


def scored(pairs: Sequence[TokenizedPair]) -> list[list[int]]:
    """Which tokens of each completion of `sequences` are scored, decided token by token."""
    return [
        [t for t in range(len(p.completions[side])) if not any(n == side and a <= t < b for n, a, b in p.unscored)]
        for p in apart(pairs)
        for side in (0, 1)
    ]


def in_double(model: nn.Module) -> nn.Module:
    """A copy in float64, in evaluation mode. (What a model casts to float32 itself, such as norms, stays there.)"""
    exact = copy.deepcopy(model).double().eval()
    exact.set_experts_implementation("eager")  # one expert after the other; the fused product has no float64
    return exact


def completion_logits(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """[completion tokens, V]: the logits that predict each token of the completion. Virtual tokens stand in front."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits[-len(completion) - 1 : -1]


def completion_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """[completion tokens] nats."""
    all_logps = completion_logits(model, prompt, completion).log_softmax(-1)
    return torch.stack([all_logps[i, token] for i, token in enumerate(completion)])


def mix(sums: Sequence[Tensor] | Tensor) -> Tensor:
    """One number of the log-prob sums of `sequences`, with weights that let no two errors cancel: chosen up, rejected down."""
    return sum(((-1) ** i * (1 + 0.3 * i) * s for i, s in enumerate(sums)), torch.zeros(()))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter by name, of those that take part."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


@dataclass(frozen=True)
class Answer:
    """What the oracle found, in the order of `sequences`."""

    tokens: list[Tensor]  # [scored tokens] each
    gradients: dict[str, Tensor]  # of `mix` of the sums

    @property
    def sums(self) -> Tensor:
        """[2N] float64 (a model that returns float32 logits, whatever it computes in, costs 1e-6 nats)."""
        return torch.stack([t.double().sum() for t in self.tokens])


def answer(model: nn.Module, pairs: Sequence[TokenizedPair]) -> Answer:
    """Log-probs of all completions, and the gradient of their mix, from a float64 copy of `model`."""
    exact = in_double(model)
    tokens = [completion_logps(exact, *s)[places] for s, places in zip(sequences(pairs), scored(pairs), strict=True)]
    grads = gradients(exact, mix([t.sum() for t in tokens]))
    return Answer([t.detach() for t in tokens], grads)


@torch.no_grad()
def sums(model: nn.Module, pairs: Sequence[TokenizedPair]) -> Tensor:
    """[2N] log-prob sums without gradients."""
    exact = in_double(model)
    each = zip(sequences(pairs), scored(pairs), strict=True)
    return torch.stack([completion_logps(exact, *s)[places].double().sum() for s, places in each])


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = GRADIENT) -> None:
    """Each parameter's gradient within `rtol` of its own size.

    The floor is for gradients that are zero in exact arithmetic (a bias on keys shifts all scores alike): there both
    sides hold nothing but rounding errors, of 1e-6 of the largest gradient.
    """
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    size = max(g.norm().item() for g in want.values())
    assert size > 0.01, "the oracle's gradients vanish: nothing is compared"
    off = {n: (got[n].double() - want[n].double()).norm().item() - rtol * want[n].norm().item() for n in want}
    worst = max(off, key=off.__getitem__)
    assert off[worst] <= 1e-5 * size, f"gradient of {worst} is off by {off[worst]:.1e} more than {rtol} of its size"


# --- attention, with its mask written out ---


def visible(pairs: Sequence[TokenizedPair], window: int | None = None) -> Tensor:
    """[T, T] who sees whom in prompt | completion 0 | completion 1 | ... | prompt ..., decided token by token."""
    tokens: list[tuple[int, int | str, int]] = []  # row, part, position
    for i, pair in enumerate(pairs):
        p = len(pair.prompt_ids)
        tokens += [(i, "prompt", n) for n in range(p)]
        tokens += [(i, part, p + n) for part, ids in enumerate(pair.completions) for n in range(len(ids))]

    def sees(me: tuple[int, int | str, int], other: tuple[int, int | str, int]) -> bool:
        family = me[0] == other[0] and other[1] in ("prompt", me[1])
        distance = me[2] - other[2]
        return family and distance >= 0 and (window is None or distance < window)

    return torch.tensor([[sees(me, other) for other in tokens] for me in tokens])


def attention(
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, K, T, d]
    value: Tensor,  # [1, K, T, dv]
    seen: Tensor,  # [T, T]
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [H]
) -> Tensor:
    """[1, T, H, dv], head by head."""
    group, heads = query.shape[1] // key.shape[1], []
    for h in range(query.shape[1]):
        q, k, v = query[0, h], key[0, h // group], value[0, h // group]
        scores = q @ k.T * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp() * seen
        total = weights.sum(1, keepdim=True)
        if sinks is not None:
            total = total + sinks[h].exp()
        heads.append(weights / total @ v)
    return torch.stack(heads, dim=1)[None]
