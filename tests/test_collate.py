"""Both layouts list the same scored tokens; where each token sits is checked against a construction token by token."""

from __future__ import annotations

import dataclasses

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_trainer import DataCollatorForPreference
from dpo_trainer.batch import PairBatch, TokenizedPair
from dpo_trainer.data.collate import as_padded, flat_inputs, padded_inputs, pairs_of

PAD = 0
tokens = st.lists(st.integers(0, 50), min_size=1, max_size=6)  # the padding token may well be a token of the text
weights = st.sampled_from([1.0, 0.0, 0.5])
batches = st.lists(
    st.builds(
        TokenizedPair,
        example_id=st.integers(0, 2**40),
        prompt_ids=tokens,
        chosen_ids=tokens,
        rejected_ids=tokens,
        weight=weights,
    ),
    min_size=1,
    max_size=5,
)
multiples = st.sampled_from([None, 1, 8])
quick = settings(deadline=None, max_examples=60)


def flat(pairs: list[TokenizedPair], multiple: int | None = None) -> PairBatch:
    return PairBatch.from_inputs(flat_inputs(pairs, PAD, multiple))


def padded(pairs: list[TokenizedPair], multiple: int | None = None) -> PairBatch:
    return PairBatch.from_inputs(padded_inputs(pairs, PAD, multiple))


def scored(batch: PairBatch) -> dict[tuple[int, str], list[tuple[int, int, int]]]:
    """(pair, side) -> (position, token that predicts, token predicted) of each scored token, read off the batch."""
    width = batch.input_ids.shape[1]
    sides = {c: (i, "chosen") for i, c in enumerate(batch.chosen.tolist())}
    sides |= {c: (i, "rejected") for i, c in enumerate(batch.rejected.tolist())}
    found: dict[tuple[int, str], list[tuple[int, int, int]]] = {side: [] for side in sides.values()}
    for at, target, completion, place in zip(
        batch.score_at.tolist(),
        batch.target_ids.tolist(),
        batch.completion.tolist(),
        batch.completion_position.tolist(),
        strict=True,
    ):
        positions = torch.arange(width)[None] if batch.position_ids is None else batch.position_ids
        row, column = divmod(at, width)
        listed = found[sides[completion]]
        assert place == len(listed), "0, 1, 2 ... within the completion"
        listed.append((positions[row % len(positions), column].item(), batch.input_ids[row, column].item(), target))
    return found


def expected(pairs: list[TokenizedPair]) -> dict[tuple[int, str], list[tuple[int, int, int]]]:
    """The same from the pairs: in prompt + completion, token n + 1 is predicted at position n, where token n stands."""
    found = {}
    for i, pair in enumerate(pairs):
        for side, completion in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            row = [*pair.prompt_ids, *completion]
            found[i, side] = [(n, row[n], row[n + 1]) for n in range(len(pair.prompt_ids) - 1, len(row) - 1)]
    return found


# --- properties of any batch ---


@given(batches, multiples)
@quick
def test_both_layouts_list_exactly_the_completion_tokens(pairs, multiple):
    assert scored(flat(pairs, multiple)) == scored(padded(pairs, multiple)) == expected(pairs)


@given(batches, multiples)
@quick
def test_flat_row_token_by_token(pairs, multiple):
    """prompt | chosen | rejected, each completion's positions going on from the prompt's."""
    ids: list[int] = []
    positions: list[int] = []
    for pair in pairs:
        for completion, start in ((pair.prompt_ids, 0), (pair.chosen_ids, None), (pair.rejected_ids, None)):
            first = len(pair.prompt_ids) if start is None else start
            for n, token in enumerate(completion):
                ids.append(token)
                positions.append(first + n)
    batch = flat(pairs, multiple)
    n = len(ids)
    assert batch.input_ids[0, :n].tolist() == ids
    assert batch.position_ids[0, :n].tolist() == positions
    assert batch.num_tokens == n
    assert batch.input_ids.shape == batch.position_ids.shape
    assert batch.input_ids[0, n:].tolist() == [PAD] * (batch.input_ids.shape[1] - n)


@given(batches, multiples)
@quick
def test_segments_say_who_sees_whom(pairs, multiple):
    """Expanded to a [T, T] mask, the segments are the mask decided token by token; padding sees padding only."""
    batch = flat(pairs, multiple)
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
    assert torch.equal(mask[:used, :used], oracles.visible(pairs))
    assert not mask[:used, used:].any()
    assert not mask[used:, :used].any()
    assert mask.any(dim=1).all(), "a token that sees nothing is NaN"


@given(batches, multiples)
@quick
def test_padded_rows_token_by_token(pairs, multiple):
    """Chosen rows, then rejected rows, right-padded; the masks mark what they say."""
    inputs = padded_inputs(pairs, PAD, multiple)
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    width = inputs["input_ids"].shape[1]
    for r, (prompt, completion) in enumerate(rows):
        empty = width - len(prompt) - len(completion)
        assert inputs["input_ids"][r].tolist() == [*prompt, *completion, *[PAD] * empty]
        assert inputs["attention_mask"][r].tolist() == [1] * (width - empty) + [0] * empty
        assert inputs["completion_mask"][r].tolist() == [0] * len(prompt) + [1] * len(completion) + [0] * empty
    assert inputs["num_tokens"] == sum(len(p) + len(c) for p, c in rows)


@given(batches, st.sampled_from([1, 3, 8]))
@quick
def test_rows_are_rounded_up_and_no_further(pairs, multiple):
    for collate in (flat_inputs, padded_inputs):
        plain = collate(pairs, PAD)["input_ids"].shape[1]
        rounded = collate(pairs, PAD, multiple)["input_ids"].shape[1]
        assert rounded % multiple == 0
        assert 0 <= rounded - plain < multiple


@given(batches, multiples)
@quick
def test_pairs_come_back_out_of_a_batch(pairs, multiple):
    assert pairs_of(flat(pairs, multiple)) == pairs
    assert pairs_of(padded(pairs, multiple)) == pairs


def assert_same_batch(got: PairBatch, want: PairBatch) -> None:
    for field in dataclasses.fields(PairBatch):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@given(batches, multiples)
@quick
def test_a_flat_batch_can_be_taken_apart_into_padded_rows(pairs, multiple):
    assert_same_batch(as_padded(flat(pairs, multiple), PAD), padded(pairs))


def test_a_padded_batch_stays_as_it_is():
    batch = padded(oracles.random_pairs([(3, 2, 4)]))
    assert as_padded(batch, PAD) is batch


@given(batches, multiples)
@quick
def test_our_padded_batch_read_by_its_masks_alone(pairs, multiple):
    """What another library reads from our collator's keys is what we read: the keys mean what they mean elsewhere."""
    inputs = padded_inputs(pairs, PAD, multiple)
    names = ("input_ids", "attention_mask", "completion_mask", "example_ids", "weight")
    foreign = PairBatch.from_completion_mask({name: inputs[name] for name in names})
    assert_same_batch(foreign, PairBatch.from_inputs(inputs))


@given(batches)
@quick
def test_sizes_of_the_two_layouts(pairs):
    """p + c + r tokens a pair, against 2 N times the longest row: the reason for the flat layout."""
    total = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    assert flat(pairs).input_ids.shape == (1, total)
    assert padded(pairs).input_ids.shape == (2 * len(pairs), longest)


# --- the collator ---

ROW = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_first_tensor_has_one_entry_per_pair(layout):
    """accelerate and Trainer take the batch size from the first tensor of the dict."""
    inputs = DataCollatorForPreference(PAD, layout=layout)([ROW] * 3)
    first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    assert first.shape == (3,)
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


def test_example_ids_and_weights_are_taken_from_the_rows():
    rows = [{**ROW, "example_id": 7, "weight": 0.25}, {**ROW, "example_id": 2**40}, ROW]
    inputs = DataCollatorForPreference(PAD)(rows)
    assert inputs["example_ids"].tolist() == [7, 2**40, 2]  # without an id: the place in the batch
    assert inputs["weight"].tolist() == [0.25, 1.0, 1.0]


def test_rows_of_tensors_and_other_columns_are_read_too():
    tensors = {name: torch.tensor(ids) for name, ids in ROW.items()} | {"length": 5}
    for layout in ("flat", "padded"):
        got = DataCollatorForPreference(PAD, layout=layout)([tensors])
        want = DataCollatorForPreference(PAD, layout=layout)([ROW])
        assert all(torch.equal(got[k], v) for k, v in want.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids", "rejected_ids"])
@pytest.mark.parametrize("how", ["empty", "missing"])
def test_a_row_without_tokens_is_named(name, how):
    bad = {**ROW, "example_id": 41, name: []} if how == "empty" else {k: v for k, v in ROW.items() if k != name}
    row = 41 if how == "empty" else 1
    with pytest.raises(ValueError, match=f"Row {row} of the batch has no {name}"):
        DataCollatorForPreference(PAD)([ROW, bad])


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="must be 'flat' or 'padded', got 'packed'"):
        DataCollatorForPreference(PAD, layout="packed")
