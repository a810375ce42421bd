"""Rows dealt into packs of at most so many tokens, rows of like length together.

The tokens of a pack are those that the model computes: in the flat layout those of the row, in the padded layout rows x
longest, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ...types import TokenizedPair

COLUMNS = ["example_id", "prompt_ids", "chosen_ids", "rejected_ids", "more_ids", "length"]


def packs(rows: Sequence[TokenizedPair], max_tokens: int, *, padded: bool) -> Iterator[list[TokenizedPair]]:
    """The longest first (what does not fit into memory shows at once), each pack within `max_tokens`, padding included. A
    row that is longer goes by itself."""
    for places in packed_places(rows, max_tokens, padded=padded):
        yield [rows[place] for place in places]


def packed_places(
    rows: Sequence[TokenizedPair], max_tokens: int, *, padded: bool, multiple: int | None = None
) -> Iterator[list[int]]:
    """The same as places in `rows`, those of a pack from the longest row to the shortest. `multiple` rounds lengths up."""
    size = padded_size if padded else flat_size
    pack: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: size([rows[place]]), reverse=True):
        if pack and size([*(rows[other] for other in pack), rows[place]], multiple) > max_tokens:
            yield pack
            pack = []
        pack.append(place)
    if pack:
        yield pack


def even_places(rows: Sequence[TokenizedPair], max_tokens: int, multiple: int | None = None) -> list[list[int]]:
    """The same for flat rows, and of like size, since a step needs memory for the largest pack: each row, from the longest to
    the shortest, goes to the pack that has fewest tokens."""
    lengths = [flat_size([row]) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
    one_by_one = list(packed_places(rows, max_tokens, padded=False, multiple=multiple))
    for count in range(-(-sum(lengths) // max_tokens), len(one_by_one) + 1):
        dealt: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for place in order:
            emptiest = tokens.index(min(tokens))
            dealt[emptiest].append(place)
            tokens[emptiest] += lengths[place]
        if rounded_up(max(tokens), multiple) <= max_tokens:
            return dealt
    return one_by_one


def flat_size(rows: Sequence[TokenizedPair], multiple: int | None = None) -> int:
    return rounded_up(sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in rows), multiple)


def padded_size(rows: Sequence[TokenizedPair], multiple: int | None = None) -> int:
    longest = max(len(row.prompt_ids) + max(map(len, row.completions)) for row in rows)
    return rounded_up(longest, multiple) * sum(len(row.completions) for row in rows)


def rounded_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def check_fits(example_id: int, tokens: int, max_tokens: int, *, where: str = "") -> None:
    """Refuse a row that no pack can hold: its completions share a prompt, and are computed together."""
    if tokens > max_tokens:
        raise ValueError(
            f"The row with example_id {example_id}{where} has {tokens:,} tokens (its prompt and all its completions, with "
            f"padding where the layout pads), more than --max_tokens_per_micro_batch {max_tokens}. Raise that to {tokens} at "
            "least, cut rows with a lower --max_length, or drop the row."
        )


def check_rows_fit(rows: Dataset, name: str, max_tokens: int, *, padded: bool, multiple: int | None) -> None:
    """Refuse a prepared table whose largest row is above `max_tokens`."""
    largest = (0, 0)  # tokens, example id
    for table in rows.select_columns(COLUMNS).with_format("arrow").iter(batch_size=1000):
        tokens = _padded_lengths(table, multiple) if padded else table["length"].to_numpy()
        place = int(tokens.argmax())
        largest = max(largest, (rounded_up(int(tokens[place]), multiple), table["example_id"][place].as_py()))
    check_fits(largest[1], largest[0], max_tokens, where=f" of the {name} data")


def _padded_lengths(table: pa.Table, multiple: int | None) -> np.ndarray:
    """[rows] tokens of each row in the padded layout, when it stands there alone."""
    prompt, chosen, rejected = (_lengths(table[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    more = _array(table["more_ids"])
    longest = np.maximum(chosen, rejected)
    np.maximum.at(longest, pc.list_parent_indices(more).to_numpy(), _lengths(pc.list_flatten(more)))
    width = prompt + longest
    return (width if multiple is None else -(-width // multiple) * multiple) * (2 + _lengths(more))


def _array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def _lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Of lists; a missing list has no elements."""
    return pc.fill_null(pc.list_value_length(_array(column)), 0).to_numpy(zero_copy_only=False).astype(np.int64)
