"""The numbers of an inspection, each against one that was worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_trainer.inspection.measure import (
    RowSizes,
    batch_tokens,
    difference_histogram,
    histogram,
    length_bias,
    lengths,
)
from dpo_trainer.inspection.similar import NEAR, Keys, content_key, repeats, similar, similarity


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# --- lengths ---


def test_lengths_by_hand():
    """0 ... 100: percentile p lies at p. Of 1, 2, 3, 4 the median is 2.5, and 5 % of the way from first to last is 1.15."""
    got = lengths(np.arange(101))
    assert (got.count, got.mean, got.p5, got.p50, got.p95, got.p99, got.max) == (101, 50, 5, 50, 95, 99, 100)
    got = lengths(array(4, 1, 3, 2))
    assert (got.mean, got.p50, got.max) == (2.5, 2.5, 4)
    assert got.p5 == pytest.approx(1.15)
    assert lengths(array()) is None


def test_histogram_by_hand():
    """Two bins up to the 99th percentile of 1, 2, 3, 4 (3.97), so 2 wide; 4 lies beyond the last edge and counts there."""
    got = histogram({"prompt": array(1, 2), "chosen": array(3, 4)}, bins=2)
    assert got.edges == [0, 2, 4]
    assert got.counts == {"prompt": [1, 1], "chosen": [0, 2]}
    assert histogram({"prompt": array()}) is None


def test_a_giant_does_not_squeeze_the_histogram():
    got = histogram({"prompt": np.append(np.full(999, 10), 1_000_000)}, bins=5)
    assert got.edges == [0, 2, 4, 6, 8, 10]
    assert sum(got.counts["prompt"]) == 1000


def test_difference_histogram_by_hand():
    """The 99th percentile of the sizes 3, 1, 0, 2 is 2.97, two bins on each side: 2 wide. -3 goes to the first, 2 to the last."""
    got = difference_histogram(array(-3, -1, 0, 2), bins=4)
    assert got.edges == [-4, -2, 0, 2, 4]
    assert got.counts["difference"] == [1, 1, 1, 1]
    assert difference_histogram(array()) is None


# --- length and preference ---


def test_length_bias_by_hand():
    """Differences 3, -1, 0. Centred lengths 1.5, -0.5, 0 (chosen) and -1.5, 0.5, 0 (rejected).

    Their ranks: -1.5 -> 1, -0.5 -> 2, 0 and 0 -> 3.5 each, 0.5 -> 5, 1.5 -> 6. Those of chosen: 6 + 2 + 3.5 = 11.5 of 21.
    Preference has the ranks 5 (chosen) and 2 (rejected). Both have the mean 3.5, so the covariance sum is
    1.5 * (11.5 - 9.5) = 3; the sums of squares are 17 (2.5^2 + 1.5^2 + 0 + 0 + 1.5^2 + 2.5^2) and 6 * 1.5^2 = 13.5.
    """
    got = length_bias(array(10, 4, 5), array(7, 5, 5))
    assert (got.pairs, got.chosen_longer, got.equal, got.rejected_longer) == (3, 1, 1, 1)
    assert (got.mean_difference, got.median_difference) == (pytest.approx(2 / 3), 0)
    assert got.rank_correlation == pytest.approx(3 / math.sqrt(17 * 13.5))


def test_both_completions_of_a_pair_are_equally_far_from_its_mean():
    """Differences 4 and -3: centred 2, -1.5 (chosen) and -2, 1.5, with the ranks 4, 2 and 1, 3. 2 / sqrt(5 * 4)."""
    assert length_bias(array(9, 5), array(5, 8)).rank_correlation == pytest.approx(2 / math.sqrt(20))


@pytest.mark.parametrize(("sign", "want"), [(1, 1.0), (-1, -1.0)], ids=["longer", "shorter"])
def test_length_that_decides_everything(sign, want):
    """Always 5 tokens longer: two lengths, two preferences, and one follows from the other."""
    rejected = array(10, 200, 3000)
    assert length_bias(rejected + 5 * sign, rejected).rank_correlation == pytest.approx(want)


def test_length_bias_is_within_the_pair():
    """Long prompts have long answers: that says nothing. Without centring, the ranks of 1,000 tokens would drown the rest."""
    base = np.arange(100) * 1000
    bias = length_bias(base + 7, base)
    assert bias.rank_correlation == pytest.approx(1.0)
    together = length_bias(np.append(base + 7, base), np.append(base, base + 7))
    assert together.rank_correlation == pytest.approx(0.0, abs=1e-12)


def test_length_bias_of_nothing():
    assert length_bias(array(), array()) is None
    assert length_bias(array(3, 4), array(3, 4)).rank_correlation is None


# --- tokens of the layouts ---


def pairs(*rows: tuple[int, ...]) -> RowSizes:
    """Rows (prompt, completion, completion ...)."""
    return RowSizes(
        prompt=array(*(row[0] for row in rows)),
        completions=array(*(sum(row[1:]) for row in rows)),
        longest=array(*(max(row[1:]) for row in rows)),
        count=array(*(len(row) - 1 for row in rows)),
    )


def test_batch_tokens_by_hand():
    """One batch of (10, 2, 4) and (1, 3, 3). Flat 16 + 7. The longest sequence is 14, so padded 4 * 14.

    Unshared 2 * 10 + 6 and 2 * 1 + 6.
    """
    got = batch_tokens(pairs((10, 2, 4), (1, 3, 3)), 2, seed=0)
    assert (got.flat, got.padded, got.unshared) == (23, 56, 34)
    assert got.ratio == pytest.approx(56 / 23)
    assert got.padding_factor == pytest.approx(56 / 34)
    assert got.sharing_factor == pytest.approx(34 / 23)
    assert got.ratio == pytest.approx(got.padding_factor * got.sharing_factor)
    assert (got.largest_flat, got.largest_padded, got.largest_scored) == (23, 56, 12)


def test_batches_of_one_row_have_no_padding_but_within_the_pair():
    """2 * (10 + 4) and 2 * (1 + 3)."""
    got = batch_tokens(pairs((10, 2, 4), (1, 3, 3)), 1, seed=0)
    assert (got.padded, got.largest_padded, got.largest_flat) == (28 + 8, 28, 16)


def test_rows_of_several_completions_have_a_padded_row_each():
    """(5, 1, 2, 3): flat 11, padded three rows of 8, unshared 15 + 6."""
    got = batch_tokens(pairs((5, 1, 2, 3)), 8, seed=0)
    assert (got.flat, got.padded, got.unshared) == (11, 24, 21)


def test_padding_to_a_multiple():
    """Rows of 14 become 16."""
    assert batch_tokens(pairs((10, 2, 4)), 1, seed=0, pad_to_multiple_of=8).padded == 32


def test_a_short_last_batch_counts():
    got = batch_tokens(pairs(*[(1, 1, 1)] * 5), 2, seed=0)
    assert (got.flat, got.padded) == (15, 20)
    assert batch_tokens(pairs(), 2, seed=0) is None


def test_batches_are_those_of_the_collator():
    """The count is what the collator computes, for a batch that it is given whole."""
    from dpo_trainer.data import DataCollatorForPreference

    rows = [
        {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
        for p, c, r in [(10, 2, 4), (1, 3, 3), (6, 9, 1)]
    ]
    got = batch_tokens(pairs((10, 2, 4), (1, 3, 3), (6, 9, 1)), 3, seed=0, pad_to_multiple_of=4)
    padded = DataCollatorForPreference(pad_token_id=0, layout="padded", pad_to_multiple_of=4)(rows)
    flat = DataCollatorForPreference(pad_token_id=0, layout="flat")(rows)
    assert got.padded == padded["input_ids"].numel()
    assert got.flat == flat["num_tokens"]
    assert got.largest_scored == len(flat["score_at"])


# --- rows against each other ---


def test_similarity_by_hand():
    """Twenty tokens, one exchanged: 19 in common, 2 * 19 / 40 = 0.95. Two exchanged: 0.9, below the threshold and so 0."""
    text = list(range(20))
    assert similarity(text, text) == 1
    assert similarity(text, [*text[:10], 99, *text[11:]]) == pytest.approx(0.95)
    assert similarity(text, [*text[:10], 99, 98, *text[12:]]) == 0
    assert similarity(text, [*text, 99]) == pytest.approx(40 / 41)
    assert similarity(text, text[::-1]) == 0


def test_similar_counts_identical_and_near_apart():
    got = similar([(0, 1.0), (1, NEAR), (2, 0.0), (3, 0.99)])
    assert (got.pairs, got.identical, got.near) == (4, 1, 2)
    assert (got.first_identical, got.first_near) == ([0], [1, 3])


def test_equal_content_equal_key():
    assert content_key("a") == content_key("a") != content_key("b")
    assert content_key({"role": "user", "content": "a"}) == content_key({"content": "a", "role": "user"})
    assert content_key("[1]") != content_key([1]), "a text is not the list that it describes"
    assert content_key("\ud800") != content_key("\ud801"), "half a character has a key too"


PAIR = ((0, 1),)


def test_repeats_and_conflicts_by_hand():
    """Prompts 1 and 2; completions 10, 11, 12.

    Row 1 repeats row 0, row 2 prefers the other way than both, row 3 has the prompt with another completion, row 4
    has another prompt.
    """
    got = repeats(
        [
            Keys(0, 1, (10, 11), PAIR),
            Keys(1, 1, (10, 11), PAIR),
            Keys(2, 1, (11, 10), PAIR),
            Keys(3, 1, (10, 12), PAIR),
            Keys(4, 2, (11, 10), PAIR),
        ]
    )
    assert (got.duplicate_rows, got.first_duplicate_rows) == (1, [[1, 0]])
    assert (got.distinct_prompts, got.repeated_prompts) == (2, 3)
    assert (got.conflicting_rows, got.first_conflicting_rows) == (3, [[0, 2], [1, 2], [2, 0]])


def test_a_ranked_row_can_contradict_a_pair():
    """10 before 11 before 12, and somewhere 12 before 10. Identical completions contradict nothing."""
    ranked = Keys(0, 1, (10, 11, 12), ((0, 1), (0, 2), (1, 2)))
    got = repeats([ranked, Keys(1, 1, (12, 10), PAIR), Keys(2, 1, (11, 11), PAIR)])
    assert got.first_conflicting_rows == [[0, 1], [1, 0]]


def test_the_same_pairs_in_another_prompt_do_not_conflict():
    assert repeats([Keys(0, 1, (10, 11), PAIR), Keys(1, 2, (11, 10), PAIR)]).conflicting_rows == 0
