"""TokenizedPair -> PairBatch: the two layouts. Both list the scored tokens; they differ only in where tokens sit.

flat      one row [1, T]:   prompt | completion 0 | completion 1 | ... | prompt | completion 0 ...     no padding
padded    rows [C, L]:      prompt completion padding ... (completion 0 of every row, then completion 1 of every row ...)

Nearly every row has two completions, chosen and rejected: padded rows are then N chosen ones, then N rejected ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import MICRO_BATCHES, ImageBatch, Segments, TokenizedPair
from ..content import completion_keys
from ..errors import row_name
from ..images.inputs import ImageInputs
from ..images.source import images_of
from ..rows.column_names import PREPARED, TOKENIZED
from ..rows.schema import weight_from_row
from ..rows.tokenized import example_id_from_row, ids_from_row
from .packs import check_fits, even_places, flat_size, packed_places, padded_size, rounded_up


@dataclass
class DataCollatorForPreference:
    """Rows with `prompt_ids`, `chosen_ids`, `rejected_ids` -> the inputs of a step.

    A row may also have `example_id`, `weight` (of each of its pairs), `more_ids` (further completions), `pairs`
    ([chosen, rejected] numbers of completions; [[0, 1]] when not given), `margin` (one per pair) and `unscored`
    ([completion, start, end]: tokens that are read, not scored).

    The result is a dict for the Trainer to move; `PairBatch.from_inputs` reads it. Its `row` says which row of the batch
    a pair belongs to. In the padded layout it has the keys that other libraries use: `input_ids`, `attention_mask`,
    `completion_mask`, with rows of two completions [2N, L], chosen rows first.

    With `max_tokens` it is {"example_ids": those of all pairs, "micro_batches": a list of such dicts}: each within the
    budget, and their `row` counts in the whole batch.

    Args:
        pad_token_id: fills the padded layout (and the tail of a flat row under `pad_to_multiple_of`).
        layout: "flat" or "padded".
        pad_to_multiple_of: row lengths are rounded up to a multiple of this.
        keyed: name every completion by its content, for a cache of reference log-probs.
        max_tokens: of one forward pass (flat: of the row; padded: rows x longest). None: the batch stays whole.
        pack_tokens: the same as an aim and not a ceiling, where there is no `max_tokens`: beside a longer row parts are as
            large as that, and a batch that is not larger stays whole.
        images: makes what a vision-language model takes of the images of rows; None for a model that reads text alone.

    Raises:
        ValueError: for a row that has more than `max_tokens` by itself.
    """

    pad_token_id: int
    layout: str = "flat"
    pad_to_multiple_of: int | None = None
    keyed: bool = False
    max_tokens: int | None = None
    pack_tokens: int | None = None
    images: ImageInputs | None = None

    def __post_init__(self):
        if self.layout not in ("flat", "padded"):
            raise ValueError(f"layout must be 'flat' or 'padded', got {self.layout!r}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        read = [read_row(row, place) for place, row in enumerate(rows)]
        if self.max_tokens is not None:
            for row in read:
                check_fits(row.example_id, self._size([row]), self.max_tokens)
            return self._split(read, self.max_tokens)
        if self.pack_tokens is not None:
            # The longest row needs its memory in any case: smaller parts beside it would save none.
            aim = max(self.pack_tokens, *(self._size([row]) for row in read))
            if self._size(read) > aim:
                return self._split(read, aim)
        return self._inputs(read)

    def _size(self, rows: Sequence[TokenizedPair]) -> int:
        return (padded_size if self.layout == "padded" else flat_size)(rows, self.pad_to_multiple_of)

    def _inputs(self, rows: Sequence[TokenizedPair]) -> dict[str, Any]:
        multiple = self.pad_to_multiple_of
        return inputs_of(rows, self.layout, self.pad_token_id, multiple, keyed=self.keyed, images=self.images)

    def _split(self, rows: Sequence[TokenizedPair], max_tokens: int) -> dict[str, Any]:
        """In parts, also where one is enough: ranks that go in step add to them."""
        if self.layout == "flat":
            dealt = even_places(rows, max_tokens, self.pad_to_multiple_of)
        else:  # rows of like length together
            dealt = list(packed_places(rows, max_tokens, padded=True, multiple=self.pad_to_multiple_of))
        parts = []
        for places in map(sorted, dealt):
            part = self._inputs([rows[place] for place in places])
            parts.append(part | {"row": torch.tensor(places)[part["row"]]})
        # First, and of all pairs: accelerate and Trainer take the batch size from the first tensor that they find.
        example_ids = torch.tensor([row.example_id for row in rows for _ in row.pairs], dtype=torch.int64)
        return {"example_ids": example_ids, MICRO_BATCHES: parts}


def inputs_of(
    rows: Sequence[TokenizedPair],
    layout: str,
    pad_token_id: int,
    multiple: int | None = None,
    *,
    keyed: bool = False,
    images: ImageInputs | None = None,
) -> dict[str, Any]:
    """The inputs of a step, in one of the layouts."""
    if images is not None:
        rows = [images.load(row) for row in rows]
    make = flat_inputs if layout == "flat" else padded_inputs
    inputs = make(rows, pad_token_id, multiple, images)
    if keyed:
        keys = [completion_keys(row) for row in rows]
        order = flat_order(rows) if layout == "flat" else padded_order(rows)
        inputs["keys"] = tuple(keys[i][number] for i, number in order)
    return inputs


class Scored(NamedTuple):
    """The scored tokens of one completion."""

    at: Tensor  # where the states stand that predict them
    target: Tensor  # the tokens


def read_row(row: Mapping[str, Any], place: int) -> TokenizedPair:
    """Checked like rows of token ids that are yet to be prepared: they may come from anywhere."""
    plain = {name: _plain(row.get(name)) for name in (*TOKENIZED, *PREPARED, "margin", "weight")}
    own_id = plain["example_id"]
    where = row_name(place if own_id is None else own_id, "the batch")
    own_id = example_id_from_row(plain, where)
    ids = ids_from_row(plain, where)
    chosen, rejected, *more = ids.completions
    return TokenizedPair(
        example_id=place if own_id is None else own_id,
        prompt_ids=ids.prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        more_ids=more,
        pairs=ids.pairs,
        unscored=ids.unscored,
        weight=weight_from_row(plain, where),
        images=images_of(row, where),
    )


def _plain(value: Any) -> Any:
    """Lists for tensors and arrays, which a dataset gives under `set_format`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple) and value and hasattr(value[0], "tolist"):
        return [_plain(item) for item in value]
    return value


def scored_places(row: TokenizedPair) -> list[Tensor]:
    """For each completion, which of its tokens are scored: ascending places in it."""
    scored = [torch.ones(len(ids), dtype=torch.bool) for ids in row.completions]
    for number, start, end in row.unscored:
        scored[number][start:end] = False
    return [mask.nonzero().flatten() for mask in scored]


def _per_pair(rows: Sequence[TokenizedPair], order: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return what each pair has, [N], and the rows. `order` lists (row, completion of it) as the batch numbers its completions."""
    number = {place: c for c, place in enumerate(order)}
    listed = [(i, row, pair) for i, row in enumerate(rows) for pair in row.pairs]
    inputs: dict[str, Any] = {
        # A [N] tensor comes first: accelerate and Trainer take the batch size from the first tensor of a batch.
        "example_ids": torch.tensor([row.example_id for _, row, _ in listed], dtype=torch.int64),
        "weight": torch.tensor([row.weight for _, row, _ in listed], dtype=torch.float32),
        "row": torch.tensor([i for i, _, _ in listed], dtype=torch.int64),
        "chosen": torch.tensor([number[i, pair.chosen] for i, _, pair in listed]),
        "rejected": torch.tensor([number[i, pair.rejected] for i, _, pair in listed]),
        # For scoring/layout.py, which may need the other layout. Images, which are large, stay in `images`.
        "tokenized_rows": [replace(row, images=()) if row.images else row for row in rows],
    }
    margins = [pair.margin for _, _, pair in listed]
    if any(margin is not None for margin in margins):
        inputs["margin"] = torch.tensor([math.nan if m is None else m for m in margins], dtype=torch.float32)
    return inputs


def _per_token(completions: Sequence[Scored]) -> dict[str, Tensor]:
    """The scored tokens of all C completions, in their order."""
    lengths = torch.tensor([len(scored.at) for scored in completions])
    return {
        "score_at": torch.cat([scored.at for scored in completions]),
        "target_ids": torch.cat([scored.target for scored in completions]),
        "completion": torch.repeat_interleave(torch.arange(len(completions)), lengths),
        "completion_position": torch.cat([torch.arange(len(scored.at)) for scored in completions]),
        "lengths": lengths,
    }


def flat_inputs(
    rows: Sequence[TokenizedPair], pad_token_id: int, multiple: int | None = None, images: ImageInputs | None = None
) -> dict[str, Any]:
    """All rows in one. Completions are numbered as they stand there: those of the first row, those of the second ..."""
    tokens: list[int] = []
    positions: list[Tensor] = []
    completions: list[Scored] = []
    segments: list[tuple[int, int, int]] = []  # length, prefix start, prefix length
    mutual: list[tuple[int, int]] = []
    for row in rows:
        start, p = len(tokens), len(row.prompt_ids)
        tokens += row.prompt_ids
        positions += _positions(row, images)
        mutual += [(start + a, start + b) for a, b in images.mutual(row.prompt_ids)] if images else []
        for number, (ids, places) in enumerate(zip(row.completions, scored_places(row), strict=True)):
            begin, n = len(tokens), len(ids)
            tokens += ids
            # The prompt is in the segment of the first completion, and the prefix of the others.
            segments.append((n, start, p) if number else (p + n, 0, 0))
            before = torch.arange(begin - 1, begin + n - 1)
            before[0] = start + p - 1  # the end of the prompt that they share
            completions.append(Scored(before[places], torch.tensor(ids)[places]))
    num_tokens = len(tokens)
    shown, unseen = _images_of_batch(rows, images)
    if unseen or rounded_up(num_tokens, multiple) > num_tokens:
        tokens += unseen
        tokens += [pad_token_id] * (rounded_up(len(tokens), multiple) - len(tokens))
        tail = len(tokens) - num_tokens
        positions.append(torch.arange(tail).expand(*positions[0].shape[:-1], tail))
        segments.append((tail, 0, 0))
    lengths, prefix_start, prefix_length = zip(*segments, strict=True)
    return {
        **_per_pair(rows, flat_order(rows)),
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.cat(positions, dim=-1).unsqueeze(-2),
        **_per_token(completions),
        "num_tokens": num_tokens,
        "segments": Segments(
            length=lengths, prefix_start=prefix_start, prefix_length=prefix_length, mutual=tuple(mutual)
        ),
        **({} if shown is None else {"images": shown}),
    }


def _positions(row: TokenizedPair, images: ImageInputs | None) -> list[Tensor]:
    """[tokens], or [3, tokens] where a model has them so: of the prompt with the first completion, then of each other."""
    own = None if images is None else images.positions(row)
    if own is not None:
        return own
    p = len(row.prompt_ids)
    return [torch.arange(p if number else 0, p + len(ids)) for number, ids in enumerate(row.completions)]


def _images_of_batch(rows: Sequence[TokenizedPair], images: ImageInputs | None) -> tuple[ImageBatch | None, list[int]]:
    """The images of rows, in order; and token ids that stand for one that no row has, where there must be one."""
    if images is None:
        return None, []
    shown = images.joined([row.images for row in rows])
    if shown is not None or not images.always:
        return shown, []
    ids, blank = images.blank
    return images.joined([*([()] * len(rows)), [blank]]), ids


def flat_order(rows: Sequence[TokenizedPair]) -> list[tuple[int, int]]:
    """(row, completion of it), as they stand in the flat row."""
    return [(i, number) for i, row in enumerate(rows) for number in range(len(row.completions))]


def padded_order(rows: Sequence[TokenizedPair]) -> list[tuple[int, int]]:
    """(row, completion of it) of each padded row: the first completion of every row, then the second of every row ..."""
    most = max(len(row.completions) for row in rows)
    return [(i, number) for number in range(most) for i, row in enumerate(rows) if number < len(row.completions)]


def padded_inputs(
    rows: Sequence[TokenizedPair], pad_token_id: int, multiple: int | None = None, images: ImageInputs | None = None
) -> dict[str, Any]:
    """One right-padded row per completion, in `padded_order`; after them, one for an image that no row has."""
    order, places = padded_order(rows), [scored_places(row) for row in rows]
    texts = [(rows[i].prompt_ids, rows[i].completions[number]) for i, number in order]
    shown, unseen = _images_of_batch([rows[i] for i, _ in order], images)
    texts += [(unseen, [])] if unseen else []
    used = [len(prompt) + len(ids) for prompt, ids in texts]
    width = rounded_up(max(used), multiple)
    input_ids = torch.full((len(used), width), pad_token_id)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for c, (prompt, ids) in enumerate(texts):
        input_ids[c, : used[c]] = torch.tensor([*prompt, *ids])
        attention_mask[c, : used[c]] = 1
    completions = []
    for c, (i, number) in enumerate(order):
        scored_at = len(rows[i].prompt_ids) + places[i][number]
        completion_mask[c, scored_at] = 1
        completions.append(Scored(c * width + scored_at - 1, input_ids[c, scored_at]))
    return {
        **_per_pair(rows, order),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        **_per_token(completions),
        "num_tokens": sum(used[: len(order)]),
        **({} if shown is None else {"images": shown}),
        **({} if images is None else images.token_types(texts, width)),
    }
