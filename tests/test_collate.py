"""Both layouts list the same scored tokens; where each token sits is checked against a construction token by token."""

from __future__ import annotations

import dataclasses
import itertools
import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_trainer import DataCollatorForPreference
from dpo_trainer.data.batches.collate import flat_inputs, padded_inputs
from dpo_trainer.scoring.layout import as_padded
from dpo_trainer.types import PairBatch, Preferred, TokenizedPair

PAD = 0
tokens = st.lists(st.integers(0, 50), min_size=1, max_size=6)  # the padding token may well be a token of the text
weights = st.sampled_from([1.0, 0.0, 0.5])
margins = st.sampled_from([None, 0.0, -1.5, 0.25])  # float32 has them exactly
multiples = st.sampled_from([None, 1, 8])
quick = settings(deadline=None, max_examples=60)


@st.composite
def a_row(draw: st.DrawFn, most: int = 5) -> TokenizedPair:
    """2 to `most` completions, some of their pairs, in some order, and tokens that are not scored."""
    completions = draw(st.lists(tokens, min_size=2, max_size=most))
    compared = list(itertools.permutations(range(len(completions)), 2))
    pairs = draw(st.lists(st.sampled_from(compared), min_size=1, max_size=4, unique=True)) if most > 2 else [(0, 1)]
    unscored: list[tuple[int, int, int]] = []
    for number, ids in enumerate(completions):
        left_out = draw(st.sets(st.integers(0, len(ids) - 1), max_size=len(ids) - 1))
        for t in sorted(left_out):
            joins = unscored and unscored[-1][0] == number and unscored[-1][2] == t
            unscored += [(number, unscored.pop()[1] if joins else t, t + 1)]
    return TokenizedPair(
        example_id=draw(st.integers(0, 2**40)),
        prompt_ids=draw(tokens),
        chosen_ids=completions[0],
        rejected_ids=completions[1],
        more_ids=tuple(completions[2:]),
        pairs=tuple(Preferred(*pair, draw(margins)) for pair in pairs),
        unscored=tuple(unscored),
        weight=draw(weights),
    )


batches = st.lists(a_row(), min_size=1, max_size=5)
batches_of_two = st.lists(
    a_row(most=2), min_size=1, max_size=5
)  # two completions, one pair: what other libraries have


def flat(rows: list[TokenizedPair], multiple: int | None = None) -> PairBatch:
    return PairBatch.from_inputs(flat_inputs(rows, PAD, multiple))


def padded(rows: list[TokenizedPair], multiple: int | None = None) -> PairBatch:
    return PairBatch.from_inputs(padded_inputs(rows, PAD, multiple))


Token = tuple[int, int, int]  # position, token that predicts, token predicted


def scored(batch: PairBatch) -> list[tuple[list[Token], list[Token]]]:
    """The scored tokens of chosen and of rejected of each pair, read off the batch."""
    width = batch.input_ids.shape[1]
    found: list[list[Token]] = [[] for _ in batch.lengths]
    for at, target, completion, place in zip(
        batch.score_at.tolist(),
        batch.target_ids.tolist(),
        batch.completion.tolist(),
        batch.completion_position.tolist(),
        strict=True,
    ):
        positions = torch.arange(width)[None] if batch.position_ids is None else batch.position_ids
        row, column = divmod(at, width)
        assert place == len(found[completion]), "0, 1, 2 ... within the completion"
        found[completion].append(
            (positions[row % len(positions), column].item(), batch.input_ids[row, column].item(), target)
        )
    assert batch.lengths.tolist() == [len(listed) for listed in found]
    return [(found[c], found[r]) for c, r in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)]


def expected(rows: list[TokenizedPair]) -> list[tuple[list[Token], list[Token]]]:
    """The same from the rows: in prompt + completion, token n + 1 is predicted at position n, where token n stands."""
    found = []
    for (prompt, completion), places in zip(oracles.sequences(rows), oracles.scored(rows), strict=True):
        text = [*prompt, *completion]
        found.append([(n, text[n], text[n + 1]) for n in (len(prompt) + place - 1 for place in places)])
    return list(zip(found[0::2], found[1::2], strict=True))


# --- properties of any batch ---


@given(batches, multiples)
@quick
def test_both_layouts_list_exactly_the_scored_tokens(rows, multiple):
    assert scored(flat(rows, multiple)) == scored(padded(rows, multiple)) == expected(rows)


@given(batches, multiples)
@quick
def test_each_completion_is_there_once(rows, multiple):
    """However many pairs share it: C completions, and the tokens of all of them but the unscored ones."""
    count = sum(len(row.completions) for row in rows)
    tokens = sum(len(ids) for row in rows for ids in row.completions)
    left_out = sum(end - start for row in rows for _, start, end in row.unscored)
    for batch in (flat(rows, multiple), padded(rows, multiple)):
        assert len(batch.lengths) == count
        assert len(batch.score_at) == tokens - left_out


@given(batches, multiples)
@quick
def test_pairs_carry_what_their_row_says(rows, multiple):
    for collate in (flat_inputs, padded_inputs):
        inputs = collate(rows, PAD, multiple)
        listed = [(i, row, pair) for i, row in enumerate(rows) for pair in row.pairs]
        assert inputs["example_ids"].tolist() == [row.example_id for _, row, _ in listed]
        assert inputs["weight"].tolist() == [row.weight for _, row, _ in listed]
        assert inputs["row"].tolist() == [i for i, _, _ in listed]
        assert inputs["row"].dtype == inputs["example_ids"].dtype == torch.int64
        given_margins = [pair.margin for _, _, pair in listed]
        if set(given_margins) == {None}:
            assert "margin" not in inputs
        else:
            got = [None if math.isnan(m) else m for m in inputs["margin"].tolist()]
            assert got == given_margins
            assert inputs["margin"].dtype == torch.float32


@given(batches, multiples)
@quick
def test_flat_row_token_by_token(rows, multiple):
    """prompt | completion 0 | completion 1 | ..., each completion's positions going on from the prompt's."""
    ids: list[int] = []
    positions: list[int] = []
    for row in rows:
        for part, start in (
            (row.prompt_ids, 0),
            *((completion, len(row.prompt_ids)) for completion in row.completions),
        ):
            for n, token in enumerate(part):
                ids.append(token)
                positions.append(start + n)
    batch = flat(rows, multiple)
    n = len(ids)
    assert batch.input_ids[0, :n].tolist() == ids
    assert batch.position_ids[0, :n].tolist() == positions
    assert batch.num_tokens == n
    assert batch.input_ids.shape == batch.position_ids.shape
    assert batch.input_ids[0, n:].tolist() == [PAD] * (batch.input_ids.shape[1] - n)


@given(batches, multiples)
@quick
def test_segments_say_who_sees_whom(rows, multiple):
    """Expanded to a [T, T] mask, the segments are the mask decided token by token; padding sees padding only."""
    batch = flat(rows, multiple)
    length = batch.input_ids.shape[1]
    mask, start = torch.zeros(length, length, dtype=torch.bool), 0
    segments = zip(batch.segments.length, batch.segments.prefix_start, batch.segments.prefix_length, strict=True)
    for n, prefix, n_prefix in segments:
        for q in range(start, start + n):
            mask[q, prefix : prefix + n_prefix] = True
            mask[q, start : q + 1] = True
        start += n
    assert start == length, "segments fill the row"
    used = batch.num_tokens
    assert torch.equal(mask[:used, :used], oracles.visible(rows))
    assert not mask[:used, used:].any()
    assert not mask[used:, :used].any()
    assert mask.any(dim=1).all(), "a token that sees nothing is NaN"


@given(batches, multiples)
@quick
def test_padded_rows_token_by_token(rows, multiple):
    """The first completion of every row, then the second ...: right-padded; the masks mark what they say."""
    inputs = padded_inputs(rows, PAD, multiple)
    texts = [
        (row.prompt_ids, row.completions[k], [range(a, b) for n, a, b in row.unscored if n == k])
        for k in range(5)
        for row in rows
        if k < len(row.completions)
    ]
    width = inputs["input_ids"].shape[1]
    for r, (prompt, completion, left_out) in enumerate(texts):
        empty = width - len(prompt) - len(completion)
        scored = [int(not any(t in stretch for stretch in left_out)) for t in range(len(completion))]
        assert inputs["input_ids"][r].tolist() == [*prompt, *completion, *[PAD] * empty]
        assert inputs["attention_mask"][r].tolist() == [1] * (width - empty) + [0] * empty
        assert inputs["completion_mask"][r].tolist() == [0] * len(prompt) + scored + [0] * empty
    assert len(inputs["input_ids"]) == len(texts)
    assert inputs["num_tokens"] == sum(len(p) + len(c) for p, c, _ in texts)


@given(batches_of_two)
@quick
def test_rows_of_two_are_padded_as_every_library_does(rows):
    """N chosen rows, then N rejected rows."""
    inputs = padded_inputs(rows, PAD)
    n = len(rows)
    assert inputs["input_ids"].shape[0] == 2 * n
    assert inputs["chosen"].tolist() == list(range(n))
    assert inputs["rejected"].tolist() == list(range(n, 2 * n))


@given(batches, st.sampled_from([1, 3, 8]))
@quick
def test_rows_are_rounded_up_and_no_further(rows, multiple):
    for collate in (flat_inputs, padded_inputs):
        plain = collate(rows, PAD)["input_ids"].shape[1]
        rounded = collate(rows, PAD, multiple)["input_ids"].shape[1]
        assert rounded % multiple == 0
        assert 0 <= rounded - plain < multiple


@given(batches, multiples, st.sampled_from(["flat", "padded"]))
@quick
def test_a_batch_carries_its_rows(rows, multiple, layout):
    assert {"flat": flat, "padded": padded}[layout](rows, multiple).tokenized_rows == rows


@given(batches_of_two, multiples)
@quick
def test_rows_of_a_batch_that_has_masks_alone(rows, multiple):
    """One of another library: the tokens that its mask marks, behind all that stands before the first of them."""
    inputs = padded_inputs(rows, PAD, multiple)
    names = ("input_ids", "attention_mask", "completion_mask", "example_ids")
    got = PairBatch.from_completion_mask({name: inputs[name] for name in names}).tokenized_rows
    places = oracles.scored(rows)
    for i, (pair, whole) in enumerate(zip(got, rows, strict=True)):
        assert pair.example_id == whole.example_id
        assert pair.completions == [[ids[t] for t in places[2 * i + k]] for k, ids in enumerate(whole.completions)]
        assert pair.prompt_ids == (whole.prompt_ids + whole.chosen_ids)[: len(whole.prompt_ids) + places[2 * i][0]]


def assert_same_batch(got: PairBatch, want: PairBatch) -> None:
    for field in dataclasses.fields(PairBatch):
        if field.name == "tokenized_rows":  # what the other fields were made from
            continue
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)), field.name  # no margin is -7
        else:
            assert a == b, field.name


@given(batches, multiples)
@quick
def test_a_flat_batch_can_be_collated_again_in_padded_rows(rows, multiple):
    assert_same_batch(as_padded(flat(rows, multiple), PAD), padded(rows))


def test_weights_and_margins_set_after_collating_are_kept():
    batch = flat(oracles.random_pairs([(3, 2, 4), (2, 2, 2)]))
    changed = dataclasses.replace(batch, weight=torch.tensor([1.0, 0.0]), margin=torch.tensor([0.5, 2.0]))
    again = as_padded(changed, PAD)
    assert again.weight.tolist() == [1.0, 0.0]
    assert again.margin.tolist() == [0.5, 2.0]


def test_a_padded_batch_stays_as_it_is():
    batch = padded(oracles.random_pairs([(3, 2, 4)]))
    assert as_padded(batch, PAD) is batch


@given(batches_of_two, multiples)
@quick
def test_our_padded_batch_read_by_its_masks_alone(rows, multiple):
    """What another library reads from our collator's keys is what we read: the keys mean what they mean elsewhere."""
    inputs = padded_inputs(rows, PAD, multiple)
    names = ("input_ids", "attention_mask", "completion_mask", "example_ids", "weight", "margin")
    foreign = PairBatch.from_completion_mask({name: inputs[name] for name in names if name in inputs})
    assert_same_batch(foreign, PairBatch.from_inputs(inputs))


@given(batches)
@quick
def test_sizes_of_the_two_layouts(rows):
    """prompt + completions a row, against all completions times the longest: the reason for the flat layout."""
    total = sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in rows)
    longest = max(len(row.prompt_ids) + max(map(len, row.completions)) for row in rows)
    assert flat(rows).input_ids.shape == (1, total)
    assert padded(rows).input_ids.shape == (sum(len(row.completions) for row in rows), longest)


# --- the collator ---

ROW = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
# 1 > 2 by half a point, 0 > 2 by nobody knows how much; of the third completion, a tool wrote the 21 and the 22.
RANKED = {
    "example_id": 8,
    "prompt_ids": [6, 7],
    "chosen_ids": [8],
    "rejected_ids": [9, 10],
    "more_ids": [[20, 21, 22, 23]],
    "pairs": [[1, 2], [0, 2]],
    "margin": [0.5, None],
    "unscored": [[2, 1, 3]],
    "weight": 2.0,
}


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_first_tensor_has_one_entry_per_pair(layout):
    """accelerate and Trainer take the batch size from the first tensor of the dict."""
    inputs = DataCollatorForPreference(PAD, layout=layout)([ROW, RANKED, ROW])
    first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    assert first.shape == (4,)
    assert "labels" not in inputs  # would switch on another count of tokens in Trainer
    assert inputs["example_ids"].dtype == torch.int64
    assert inputs["weight"].dtype == torch.float32


def test_padded_has_the_keys_of_other_libraries():
    inputs = DataCollatorForPreference(9, layout="padded", pad_to_multiple_of=6)([ROW])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9], [1, 2, 4, 5, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert inputs["completion_mask"].tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_flat_by_hand():
    inputs = DataCollatorForPreference(9, pad_to_multiple_of=8)([ROW])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0, 1, 2]]
    assert inputs["score_at"].tolist() == [1, 1, 3]  # both completions begin at the end of the prompt
    assert inputs["target_ids"].tolist() == [3, 4, 5]
    assert inputs["num_tokens"] == 5


def test_ranked_row_by_hand():
    """Behind an ordinary row, flat: 1 2 3 4 5 | 6 7 8 | 9 10 | 20 21 22 23. The 23 is predicted by the 22 that nobody scores."""
    inputs = DataCollatorForPreference(PAD, pad_to_multiple_of=8)([ROW, RANKED])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 21, 22, 23, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 2, 3, 2, 3, 4, 5, 0, 1]]
    assert inputs["score_at"].tolist() == [1, 1, 3, 6, 6, 8, 6, 12]
    assert inputs["target_ids"].tolist() == [3, 4, 5, 8, 9, 10, 20, 23]
    assert inputs["completion"].tolist() == [0, 1, 1, 2, 3, 3, 4, 4]
    assert inputs["completion_position"].tolist() == [0, 0, 1, 0, 0, 1, 0, 1]
    assert inputs["lengths"].tolist() == [1, 2, 1, 2, 2]
    assert inputs["chosen"].tolist() == [0, 3, 2]
    assert inputs["rejected"].tolist() == [1, 4, 4]
    assert inputs["example_ids"].tolist() == [0, 8, 8]
    assert inputs["row"].tolist() == [0, 1, 1]
    assert inputs["weight"].tolist() == [1.0, 2.0, 2.0]
    assert str(inputs["margin"].tolist()) == "[nan, 0.5, nan]"
    assert inputs["num_tokens"] == 14
    assert inputs["segments"].length == (3, 2, 3, 2, 4, 2)
    assert inputs["segments"].prefix_start == (0, 0, 0, 5, 5, 0)
    assert inputs["segments"].prefix_length == (0, 2, 0, 2, 2, 0)


def test_ranked_row_in_padded_rows_by_hand():
    """Both first completions, both second ones, and the third of the one row that has it."""
    inputs = DataCollatorForPreference(PAD, layout="padded")([ROW, RANKED])
    assert inputs["input_ids"].tolist() == [
        [1, 2, 3, 0, 0, 0],
        [6, 7, 8, 0, 0, 0],
        [1, 2, 4, 5, 0, 0],
        [6, 7, 9, 10, 0, 0],
        [6, 7, 20, 21, 22, 23],
    ]
    assert inputs["completion_mask"][4].tolist() == [0, 0, 1, 0, 0, 1]
    assert inputs["attention_mask"][4].tolist() == [1] * 6
    assert inputs["score_at"].tolist() == [1, 7, 13, 14, 19, 20, 25, 28]
    assert inputs["chosen"].tolist() == [0, 3, 1]
    assert inputs["rejected"].tolist() == [2, 4, 4]
    assert inputs["num_tokens"] == 3 + 3 + 4 + 4 + 6


def test_columns_of_a_prepared_dataset_for_an_ordinary_row():
    """What preparation writes for rows that are not ranked changes nothing."""
    written = {
        "example_id": 0,
        "more_ids": [],
        "pairs": [[0, 1]],
        "margin": [],
        "unscored": [],
        "weight": 1.0,
        "length": 5,
    }
    for layout in ("flat", "padded"):
        collate = DataCollatorForPreference(PAD, layout=layout)
        got, want = collate([ROW | written]), collate([ROW])
        assert got.keys() == want.keys()
        assert "margin" not in got
        assert all(torch.equal(got[k], v) for k, v in want.items() if isinstance(v, torch.Tensor))
    nothing = dict.fromkeys(("example_id", "more_ids", "pairs", "margin", "unscored", "weight"))
    assert collate([ROW | nothing]).keys() == want.keys()


@pytest.mark.parametrize("margin", [1.5, [1.5], torch.tensor(1.5), torch.tensor([1.5])], ids=str)
def test_a_margin_may_be_a_number_or_a_list(margin):
    assert DataCollatorForPreference(PAD)([ROW | {"margin": margin}])["margin"].tolist() == [1.5]


def test_example_ids_and_weights_are_taken_from_the_rows():
    rows = [{**ROW, "example_id": 7, "weight": 0.25}, {**ROW, "example_id": 2**40}, ROW]
    inputs = DataCollatorForPreference(PAD)(rows)
    assert inputs["example_ids"].tolist() == [7, 2**40, 2]  # without an id: the place in the batch
    assert inputs["weight"].tolist() == [0.25, 1.0, 1.0]


def test_rows_of_tensors_and_other_columns_are_read_too():
    lists = RANKED | {"margin": [0.5, 0.25]}
    tensors = {name: torch.tensor(value) for name, value in lists.items()} | {"length": 5}
    tensors["more_ids"] = [torch.tensor(lists["more_ids"][0])]  # as `with_format("torch")` gives uneven lists
    for layout in ("flat", "padded"):
        got = DataCollatorForPreference(PAD, layout=layout)([tensors])
        want = DataCollatorForPreference(PAD, layout=layout)([lists])
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], v) for k, v in want.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids", "rejected_ids"])
@pytest.mark.parametrize("how", ["empty", "missing"])
def test_a_row_without_tokens_is_named(name, how):
    bad = {**ROW, "example_id": 41, name: []} if how == "empty" else {k: v for k, v in ROW.items() if k != name}
    row = 41 if how == "empty" else 1
    with pytest.raises(ValueError, match=f"Row {row} of the batch, column '{name}'.*Give at least one token"):
        DataCollatorForPreference(PAD)([ROW, bad])


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"pairs": [[0, 1], [0, 3]]}, r"column 'pairs': holds \[0, 3\] for 3 completions"),
        ({"pairs": [[0, 1], [0, -1]]}, r"column 'pairs': holds \[0, -1\] for 3 completions"),
        ({"pairs": [[1, 1], [0, 1]]}, r"column 'pairs': holds \[1, 1\]"),
        ({"pairs": [[0, 1, 2], [0, 1]]}, r"column 'pairs': holds \[0, 1, 2\]"),
        ({"margin": [1.0]}, r"column 'margin': is \[1.0\] for 2 pairs"),
        ({"margin": [1.0, math.inf]}, r"column 'margin': is \[1.0, inf\]"),
        ({"more_ids": [[]]}, r"column 'more_ids\[0\]': is \[\].*Give at least one token"),
        ({"unscored": [[3, 0, 1]]}, r"column 'unscored': holds \[3, 0, 1\]"),
        ({"unscored": [[2, 1, 5]]}, r"column 'unscored': holds \[2, 1, 5\]"),
        ({"unscored": [[2, 0, 4]]}, r"column 'unscored': leaves a completion without a scored token"),
        ({"weight": -1.0}, r"column 'weight': is -1.0"),
    ],
    ids=str,
)
def test_a_row_that_contradicts_itself_is_named(columns, what):
    with pytest.raises(ValueError, match=f"Row 8 of the batch, {what}"):
        DataCollatorForPreference(PAD)([ROW, RANKED | columns])


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="must be 'flat' or 'padded', got 'packed'"):
        DataCollatorForPreference(PAD, layout="packed")
