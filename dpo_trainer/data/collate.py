"""TokenizedPair -> PairBatch: the two layouts. Both list the scored tokens; they differ only in where tokens sit.

flat      one row [1, T]:     prompt | chosen | rejected | prompt | chosen | rejected ...     no padding
padded    rows [2N, L]:       prompt chosen padding ... (N chosen rows, then N rejected rows)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..batch import PairBatch, Segments, TokenizedPair


@dataclass
class DataCollatorForPreference:
    """Rows with `prompt_ids`, `chosen_ids`, `rejected_ids` (optionally `example_id`, `weight`) -> the inputs of a step.

    The result is a dict for the Trainer to move; `PairBatch.from_inputs` reads it. In the padded layout it has the keys
    that other libraries use: `input_ids`, `attention_mask`, `completion_mask` [2N, L], chosen rows first.

    Args:
        pad_token_id: fills the padded layout (and the tail of a flat row under `pad_to_multiple_of`).
        layout: "flat" or "padded".
        pad_to_multiple_of: row lengths are rounded up to a multiple of this.
    """

    pad_token_id: int
    layout: str = "flat"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if self.layout not in ("flat", "padded"):
            raise ValueError(f"layout must be 'flat' or 'padded', got {self.layout!r}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [_read(row, index) for index, row in enumerate(rows)]
        if self.layout == "flat":
            return flat_inputs(pairs, self.pad_token_id, self.pad_to_multiple_of)
        return padded_inputs(pairs, self.pad_token_id, self.pad_to_multiple_of)


def _read(row: Mapping[str, Any], index: int) -> TokenizedPair:
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if row.get(name) is None or not len(row[name]):
            raise ValueError(
                f"Row {row.get('example_id', index)} of the batch has no {name}: a pair needs at least one token of prompt, "
                "chosen and rejected. Tokenize with DPOTrainer, or drop such rows."
            )
    return TokenizedPair(
        example_id=int(row.get("example_id", index)),
        prompt_ids=list(row["prompt_ids"]),
        chosen_ids=list(row["chosen_ids"]),
        rejected_ids=list(row["rejected_ids"]),
        weight=float(row.get("weight", 1.0)),
    )


def _rounded_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _offsets(lengths: Sequence[int]) -> list[int]:
    """Where each of several stretches begins when they follow each other."""
    return [0, *accumulate(lengths)][:-1]


def _per_pair(pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
    # A [N] tensor comes first: accelerate and Trainer take the batch size from the first tensor of a batch.
    return {
        "example_ids": torch.tensor([p.example_id for p in pairs], dtype=torch.int64),
        "weight": torch.tensor([p.weight for p in pairs], dtype=torch.float32),
    }


def _scored(completions: Sequence[Sequence[int]], predicted_from: Sequence[Tensor]) -> dict[str, Tensor]:
    """The scored tokens of C completions; `predicted_from[c]` are the positions of the states that predict them."""
    lengths = torch.tensor([len(ids) for ids in completions])
    return {
        "score_at": torch.cat(list(predicted_from)),
        "target_ids": torch.tensor([token for ids in completions for token in ids]),
        "completion": torch.repeat_interleave(torch.arange(len(completions)), lengths),
        "completion_position": torch.cat([torch.arange(len(ids)) for ids in completions]),
        "lengths": lengths,
    }


def flat_inputs(pairs: Sequence[TokenizedPair], pad_token_id: int, multiple: int | None = None) -> dict[str, Any]:
    """All pairs in one row. Completions 2i and 2i + 1 are chosen and rejected of pair i."""
    tokens: list[int] = []
    positions, predicted_from = [], []
    segments: list[tuple[int, int, int]] = []  # length, prefix start, prefix length
    for pair in pairs:
        start, p, c, r = len(tokens), len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        tokens += [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids]
        positions += [torch.arange(p + c), torch.arange(p, p + r)]
        segments += [(p + c, 0, 0), (r, start, p)]
        # The first token of either completion is predicted at the end of the prompt that they share.
        last = torch.tensor([start + p - 1])
        rejected = torch.cat([last, torch.arange(start + p + c, start + p + c + r - 1)])
        predicted_from += [torch.arange(start + p - 1, start + p + c - 1), rejected]
    num_tokens = len(tokens)
    if padding := _rounded_up(num_tokens, multiple) - num_tokens:
        tokens += [pad_token_id] * padding
        positions.append(torch.arange(padding))
        segments.append((padding, 0, 0))
    lengths, prefix_start, prefix_length = zip(*segments, strict=True)
    first = torch.arange(0, 2 * len(pairs), 2)
    return {
        **_per_pair(pairs),
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.cat(positions)[None],
        **_scored([ids for p in pairs for ids in (p.chosen_ids, p.rejected_ids)], predicted_from),
        "chosen": first,
        "rejected": first + 1,
        "num_tokens": num_tokens,
        "segments": Segments(length=lengths, prefix_start=prefix_start, prefix_length=prefix_length),
    }


def padded_inputs(pairs: Sequence[TokenizedPair], pad_token_id: int, multiple: int | None = None) -> dict[str, Any]:
    """One right-padded row per completion: N chosen rows, then N rejected rows."""
    prompts = [pair.prompt_ids for pair in pairs] * 2
    completions = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    used = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    width = _rounded_up(max(used), multiple)
    input_ids = torch.full((len(used), width), pad_token_id)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    predicted_from = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        p, end = len(prompt), used[row]
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        completion_mask[row, p:end] = 1
        predicted_from.append(torch.arange(p - 1, end - 1) + row * width)
    n = torch.arange(len(pairs))
    return {
        **_per_pair(pairs),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        **_scored(completions, predicted_from),
        "chosen": n,
        "rejected": n + len(pairs),
        "num_tokens": sum(used),
    }


def as_padded(batch: PairBatch, pad_token_id: int) -> PairBatch:
    """The same pairs in the padded layout, on the same device, for a model that turned out not to allow flat rows."""
    if not batch.is_flat:
        return batch
    device = batch.input_ids.device
    inputs = padded_inputs(pairs_of(batch), pad_token_id)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return dataclasses.replace(PairBatch.from_inputs(moved), weight=batch.weight)


def pairs_of(batch: PairBatch) -> list[TokenizedPair]:
    """The pairs that a batch was made of. Waits for the device: for the check of the first batch, not for steps."""
    width = batch.input_ids.shape[1]
    tokens, ends = batch.input_ids.flatten().tolist(), [at + 1 for at in batch.score_at.tolist()]
    lengths = batch.lengths.tolist()
    first = _offsets(lengths)
    completions = [batch.target_ids[f : f + n].tolist() for f, n in zip(first, lengths, strict=True)]
    pairs = []
    for i, (c, r) in enumerate(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)):
        end = ends[first[c]]  # the state that predicts a completion's first token stands at the end of its prompt
        start = end - batch.segments.prefix_length[2 * i + 1] if batch.segments else (end - 1) // width * width
        pairs.append(
            TokenizedPair(
                example_id=int(batch.example_ids[i]),
                prompt_ids=tokens[start:end],
                chosen_ids=completions[c],
                rejected_ids=completions[r],
                weight=float(batch.weight[i]),
            )
        )
    return pairs
