"""Lists of rejected and ranked lists: which pairs they make, by which margins, and what of them is left after the limits."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, byte_bpe

from dpo_trainer.data import DataOptions, Limits, prepare_dataset
from dpo_trainer.data.rows.ranking import against_each, is_number, ranked
from dpo_trainer.data.rows.schema import pair_from_row
from dpo_trainer.types import Flag, PairIds, Preferred

TOKENIZER = byte_bpe(chat_template=CHAT)


def prepare(*rows, **options):
    return prepare_dataset(Dataset.from_list(list(rows)), TOKENIZER, DataOptions(disable_tqdm=True, **options))


def texts(row):
    return [TOKENIZER.decode(ids) for ids in (row["chosen_ids"], row["rejected_ids"], *row["more_ids"])]


def scores_of(*scores, **more):
    return {
        "prompt": "q:",
        "completions": [f"c{number}" for number in range(len(scores))],
        "scores": [*scores],
        **more,
    }


# --- scores -> pairs ---


@pytest.mark.parametrize(
    ("scores", "order", "pairs"),
    [
        ([2.0, 1.0], [0, 1], [(0, 1, 1.0)]),
        ([1, 2], [1, 0], [(0, 1, 1.0)]),
        ([1.0, 3.0, 2.5], [1, 2, 0], [(0, 1, 0.5), (0, 2, 2.0), (1, 2, 1.5)]),
        ([1, 2, 1], [1, 0, 2], [(0, 1, 1.0), (0, 2, 1.0)]),  # the two ones are no pair, and stay in their order
        ([3, 3, 1], [0, 1, 2], [(0, 2, 2.0), (1, 2, 2.0)]),
        ([-1.5, -0.5], [1, 0], [(0, 1, 1.0)]),
        ([0, 0.0, -0.0], [0, 1, 2], []),
        ([7, 7], [0, 1], []),
    ],
)
def test_scores_by_hand(scores, order, pairs):
    assert ranked(scores_of(*scores), "Row 0") == (order, tuple(Preferred(*pair) for pair in pairs))


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6))
def test_every_difference_of_scores_is_a_pair_once(scores):
    order, pairs = ranked(scores_of(*scores), "Row 0")
    assert order == sorted(order, key=lambda number: (-scores[number], number))
    found = Counter((order[pair.chosen], order[pair.rejected], pair.margin) for pair in pairs)
    everywhere = range(len(scores))
    assert found == Counter(
        (i, j, scores[i] - scores[j]) for i in everywhere for j in everywhere if scores[i] > scores[j]
    )


def test_completions_come_in_the_order_of_their_scores():
    pair = pair_from_row(scores_of(1.0, 3.0, 2.0, 0.0), "Row 0")
    assert pair.completions == ("c1", "c2", "c0", "c3")
    assert (pair.chosen, pair.rejected, pair.more) == ("c1", "c2", ("c0", "c3"))
    assert [pair.pairs[0], pair.pairs[-1]] == [Preferred(0, 1, 1.0), Preferred(2, 3, 1.0)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (scores_of(1, 2) | {"scores": None}, ["'scores'", "None for 2 completions"]),
        (scores_of(1, 2) | {"scores": 3}, ["'scores'", "3 for 2 completions"]),
        (scores_of(1, 2) | {"scores": [1]}, ["'scores'", "1 of them for 2 completions"]),
        (scores_of(1, 2) | {"scores": [1, 2, 3]}, ["'scores'", "3 of them for 2 completions"]),
        (scores_of(1, "2"), ["'scores'", "'2' at 1", "higher is better"]),
        (scores_of(True, 0), ["'scores'", "True at 0"]),
        (scores_of(1, None), ["'scores'", "None at 1"]),
        (scores_of(1, math.nan), ["'scores'", "nan at 1"]),
        (scores_of(-math.inf, 1), ["'scores'", "-inf at 0"]),
        (scores_of(1, 10**400), ["'scores'", "holds 1000"]),
        (scores_of(1, -1.1e38), ["'scores'", "-1.1e+38 at 1"]),  # what is trained on is float32
        (scores_of(1, 2, margin=1.0), ["'margin'", "'scores' say it already"]),
        (scores_of(1, 2) | {"completions": ["a", 3]}, ["'completions[1]'", "type int"]),
        (scores_of(1, 2) | {"completions": ["a", None]}, ["'completions[1]'", "is None"]),
    ],
)
def test_bad_rankings_are_refused(row, said):
    with pytest.raises(ValueError) as error:
        pair_from_row(row, "Row 7 of train")
    message = str(error.value)
    assert all(part in message for part in ["Row 7 of train, column", *said]), message


def test_a_ranked_row_may_stand_beside_an_empty_margin():
    assert pair_from_row(scores_of(1, 2, margin=None), "Row 0") == pair_from_row(scores_of(1, 2), "Row 0")


# --- one chosen, several rejected ---


@pytest.mark.parametrize(
    ("margin", "count", "want"),
    [
        (None, 2, [None, None]),
        ([], 2, [None, None]),
        (1.5, 1, [1.5]),
        (2, 3, [2.0, 2.0, 2.0]),
        ([1, 2.5], 2, [1.0, 2.5]),
        ([0.0], 1, [0.0]),
        (-1.0, 1, [-1.0]),
    ],
)
def test_the_chosen_one_is_better_than_each(margin, count, want):
    pairs = against_each({"margin": margin}, count, "Row 0")
    assert pairs == tuple(Preferred(0, number + 1, value) for number, value in enumerate(want))
    assert all(value is None or type(value) is float for _, _, value in pairs)


@pytest.mark.parametrize(
    ("margin", "said"),
    [
        ([1.0], "has 1 entries for 2 pairs"),
        ([1.0, 2.0, 3.0], "has 3 entries for 2 pairs"),
        ([1.0, None], "is None"),
        ([1.0, "2"], "is '2'"),
        ("1", "is '1'"),
        (True, "is True"),
        (math.nan, "is nan"),
        (math.inf, "is inf"),
    ],
)
def test_bad_margins_are_refused(margin, said):
    with pytest.raises(ValueError) as error:
        against_each({"margin": margin}, 2, "Row 7 of train")
    assert "Row 7 of train, column 'margin': " + said in str(error.value)


def test_what_counts_as_a_number():
    assert all(map(is_number, [0, -1, 2.5, 10**37, -1e38, -0.0]))
    assert not any(map(is_number, [True, "1", None, [1], math.nan, math.inf, -math.inf, 1.1e38, -(10**400), 1j]))


def test_the_largest_difference_is_a_number_in_float32():
    (pair,) = pair_from_row(scores_of(1e38, -1e38), "Row 0").pairs
    assert math.isfinite(torch.tensor(pair.margin, dtype=torch.float32))


# --- the limits, by hand ---

CUT_P, CUT_C, CUT_R = Flag.TRUNCATED_PROMPT, Flag.TRUNCATED_CHOSEN, Flag.TRUNCATED_REJECTED
RANKS = (Preferred(0, 1, 2.0), Preferred(0, 2, 3.0), Preferred(1, 2, 1.0))
EACH = (Preferred(0, 1), Preferred(0, 2))


def limits(max_length=None, completion=None, mode="keep_start", **how):
    return Limits(
        max_length=max_length,
        max_prompt_length=None,
        max_completion_length=completion,
        truncation_mode=mode,
        **how,
    )


@pytest.mark.parametrize(
    ("given", "prompt", "completions", "flags"),
    [
        (limits(7), [1, 2, 3], [[4, 5, 6, 7], [8, 9], [10]], 0),
        (limits(5), [1, 2, 3], [[4, 5], [8, 9], [10]], CUT_C),
        (limits(4), [1, 2, 3], [[4], [8], [10]], CUT_C | CUT_R),
        (limits(3), [1, 2, 3], [[4, 5, 6, 7], [8, 9], [10]], Flag.NO_ROOM),
        (limits(5, mode="keep_end"), [3], [[4, 5, 6, 7], [8, 9], [10]], CUT_P),
        (limits(6, mode="keep_end"), [2, 3], [[4, 5, 6, 7], [8, 9], [10]], CUT_P),
        (limits(3, mode="keep_end"), [3], [[4, 5], [8, 9], [10]], CUT_P | CUT_C),
        (limits(2, mode="keep_end"), [3], [[4], [8], [10]], CUT_P | CUT_C | CUT_R),
        (limits(1, mode="keep_end"), [1, 2, 3], [[4, 5, 6, 7], [8, 9], [10]], Flag.NO_ROOM),
        (limits(completion=3), [1, 2, 3], [[4, 5, 6], [8, 9], [10]], CUT_C),
        (limits(4, too_long="drop"), [1, 2, 3], [[4, 5, 6, 7], [8, 9], [10]], Flag.TOO_LONG),
    ],
)
def test_a_ranked_row_is_cut_as_one(given, prompt, completions, flags):
    """One prompt for all; where it is cut (keep_end), the longest completion says how far. No pair is lost by it."""
    row = PairIds([1, 2, 3], [[4, 5, 6, 7], [8, 9], [10]], RANKS)
    assert given.apply(row) == PairIds(prompt, completions, RANKS, flags=flags)


def test_pairs_that_a_cut_makes_identical_are_left_out():
    row = PairIds([1], [[4, 5], [4, 6], [7]], RANKS)
    cut = limits(completion=1).apply(row)
    assert cut == PairIds([1], [[4], [4], [7]], (Preferred(0, 2, 3.0), Preferred(1, 2, 1.0)), (), CUT_C | CUT_R, 1)
    # Here nobody needs completion 1 any more, so completion 2 takes its number, in `unscored` as well.
    row = PairIds([1], [[4, 5], [4, 6], [7, 8]], EACH, ((0, 1, 2), (2, 1, 2)))
    cut = limits(completion=1).apply(row)
    assert cut == PairIds([1], [[4], [7]], (Preferred(0, 1),), (), CUT_C | CUT_R, 1)
    row = PairIds([1], [[4], [4], [7, 8]], EACH, ((2, 1, 2),))
    assert limits().apply(row) == PairIds([1], [[4], [7, 8]], (Preferred(0, 1),), ((1, 1, 2),), 0, 1)


def test_a_row_of_identical_pairs_only_is_dropped():
    assert limits().apply(PairIds([1], [[4], [4], [4]], RANKS)).flags == Flag.IDENTICAL


@pytest.mark.parametrize(
    ("most", "pairs", "completions"),
    [
        (1, [(0, 1, 3.0)], [[4], [6]]),  # 0 against 2, by 3.0; completion 1 goes
        (2, [(0, 1, 2.0), (0, 2, 3.0)], [[4], [5], [6]]),
        (3, list(RANKS), [[4], [5], [6]]),
        (9, list(RANKS), [[4], [5], [6]]),
        (None, list(RANKS), [[4], [5], [6]]),
    ],
)
def test_the_clearest_pairs_stay(most, pairs, completions):
    """In the order of the row; how many are left out is counted, and is no flag."""
    row = PairIds([1], [[4], [5], [6]], RANKS)
    want = PairIds([1], completions, tuple(Preferred(*pair) for pair in pairs), (), 0, 3 - len(pairs))
    assert limits(max_pairs=most).apply(row) == want


@pytest.mark.parametrize("margin", [None, 1.0], ids=["unknown", "equal"])
def test_of_equal_pairs_the_first_stay(margin):
    pairs = tuple(Preferred(0, number, margin) for number in (1, 2, 3))
    cut = limits(max_pairs=2).apply(PairIds([1], [[4], [5], [6], [7]], pairs))
    assert (cut.pairs, cut.completions, cut.left_out) == (pairs[:2], [[4], [5], [6]], 1)


def test_a_useless_pair_takes_no_place_among_the_clearest():
    """The clearest of the three is identical after the cut; so the next one stays."""
    row = PairIds([1], [[4, 5], [6, 5], [4, 7]], RANKS)
    cut = limits(completion=1, max_pairs=1).apply(row)
    assert cut == PairIds([1], [[4], [6]], (Preferred(0, 1, 2.0),), (), CUT_C | CUT_R, 2)


def test_a_completion_that_a_cut_leaves_unscored_is_left_out_of_a_ranked_row():
    row = PairIds([1], [[4, 5], [6, 7], [8, 9]], RANKS, ((2, 0, 1),))
    cut = limits(completion=1).apply(row)
    assert cut == PairIds([1], [[4], [6]], (Preferred(0, 1, 2.0),), (), CUT_C | CUT_R, 2)


lists = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@given(
    st.lists(st.tuples(lists, st.integers(0, 2)), min_size=2, max_size=5).map(
        lambda c: sorted(c, key=lambda x: -x[1])
    ),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 4),
)
def test_what_is_left_of_a_ranked_row_is_what_it_says(completions, n_completion, most):
    """Each pair left is one of the row's, with its margin and its cut completions; each one missing has a reason."""
    scores = [score for _, score in completions]
    _, pairs = ranked(scores_of(*scores), "Row 0")
    if not pairs:
        return
    before = PairIds([9], [ids for ids, _ in completions], pairs)
    cut = limits(completion=n_completion, max_pairs=most).apply(before)

    def told(row, pair):
        return tuple(row.completions[pair.chosen][:n_completion]), tuple(row.completions[pair.rejected][:n_completion])

    useful = [(*told(before, pair), pair.margin) for pair in pairs if told(before, pair)[0] != told(before, pair)[1]]
    if not useful:
        assert cut.flags & Flag.IDENTICAL
        return
    got = [(*told(cut, pair), pair.margin) for pair in cut.pairs]
    assert Counter(got) <= Counter(useful)
    assert len(got) == min(len(useful), most or len(useful))
    assert sorted(m for *_, m in got) == sorted(m for *_, m in useful)[-len(got) :]
    assert cut.left_out == len(pairs) - len(got)
    assert {n for pair in cut.pairs for n in pair[:2]} == set(range(len(cut.completions)))


# --- through the pipeline ---


def test_useless_pairs_of_a_ranked_row_are_left_out_and_the_row_stays():
    """hey 4 | hey 3 | blank 2 | you 1: of six pairs, one is identical and three have the blank one."""
    row = {"prompt": "q:", "completions": ["you", "hey", "\n", "hey"], "scores": [1.0, 4.0, 2.0, 3.0]}
    (kept,), report = prepare(row)
    assert texts(kept) == ["hey<eos>", "hey<eos>", "you<eos>"]
    assert kept["pairs"] == [[0, 2], [1, 2]]
    assert kept["margin"] == [3.0, 2.0]
    assert kept["length"] == 2 + 4 + 4 + 4
    assert (report.rows, report.kept, report.pairs, report.pairs_left_out, report.dropped) == (1, 1, 2, 4, 0)
    assert "pairs of ranked rows left out" in report.table()


def test_a_completion_that_is_left_out_moves_no_boundary():
    with_blank = {"prompt": "q:", "completions": ["hey", "you", " "], "scores": [3.0, 2.0, 1.0]}
    (kept,), report = prepare(with_blank)
    assert (TOKENIZER.decode(kept["prompt_ids"]), texts(kept)) == ("q:", ["hey<eos>", "you<eos>"])
    assert report.counts["merged_boundary"] == 0


def test_rows_without_a_useful_pair_are_dropped_and_counted_once():
    rows = [
        {"prompt": "q:", "completions": ["hey", "hey", " "], "scores": [3.0, 2.0, 1.0]},
        {"prompt": "q:", "completions": ["hey", "", " "], "scores": [3.0, 2.0, 1.0]},
        {"prompt": "q:", "completions": ["hey", "you", "ho"], "scores": [2.0, 2.0, 2.0]},
        {"prompt": "q:", "completions": ["hey", "you", "ho"], "scores": [2.0, 2.0, 1.0]},
    ]
    kept, report = prepare(*rows)
    dropped = {kind: rows for kind, rows in report.first_rows.items() if rows}
    assert dropped == {"identical": [0], "empty_completion": [1], "tied": [2]}
    assert {kind: count for kind, count in report.counts.items() if count} == dict.fromkeys(dropped, 1)
    assert (report.kept, report.dropped, report.pairs, report.pairs_left_out) == (1, 3, 2, 0)
    assert kept["example_id"][:] == [3]
    assert texts(kept[0]) == ["hey<eos>", "you<eos>", "ho<eos>"]
    with pytest.raises(ValueError, match=r"teach nothing.*all scores are equal: 1 \(row 2\)"):
        prepare(*rows, useless_pairs="error")


def test_a_list_of_rejected_with_margins_and_without():
    rows = [
        {"prompt": "q:", "chosen": "a", "rejected": ["x", "y"], "margin": [1.0, 2.0]},
        {"prompt": "q:", "chosen": "a", "rejected": ["x", "a"], "margin": [1.0, 2.0]},  # the second is the chosen one
        {"prompt": "q:", "chosen": "a", "rejected": ["x"], "margin": None},
        {"prompt": "q:", "chosen": "a", "rejected": ["\n", "y", "x"], "margin": [1.0, 2.0, 3.0]},
    ]
    kept, report = prepare(*rows)
    assert kept["margin"][:] == [[1.0, 2.0], [1.0], [], [2.0, 3.0]]
    assert kept["pairs"][:] == [[[0, 1], [0, 2]], [[0, 1]], [[0, 1]], [[0, 1], [0, 2]]]
    assert [texts(row) for row in kept][3] == ["a<eos>", "y<eos>", "x<eos>"]
    assert (report.pairs, report.pairs_left_out) == (6, 2)


def test_max_pairs_per_prompt():
    row = {"prompt": "q:", "completions": ["a", "b", "c", "d"], "scores": [1.0, 8.0, 2.0, 4.0]}
    for most, pairs, margin, left in (
        (1, [[0, 1]], [7.0], ["b<eos>", "a<eos>"]),
        (2, [[0, 1], [0, 2]], [6.0, 7.0], ["b<eos>", "c<eos>", "a<eos>"]),
        (6, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], [4.0, 6.0, 7.0, 2.0, 3.0, 1.0], None),
    ):
        (kept,), report = prepare(row, max_pairs_per_prompt=most)
        assert kept["pairs"] == pairs
        assert kept["margin"] == margin
        assert left is None or texts(kept) == left
        assert (report.pairs, report.pairs_left_out) == (len(pairs), 6 - len(pairs))


def test_weights_are_of_each_pair_and_lengths_of_the_whole_row():
    (kept,), _ = prepare({"prompt": "q:", "completions": ["a", "b", "c"], "scores": [3, 2, 1], "weight": 0.5})
    assert (kept["weight"], kept["length"], len(kept["pairs"])) == (0.5, 2 + 3 * 2, 3)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_ranked_row_has_one_prompt_after_truncation(mode):
    """wxyz: | heyhey EOS | yo EOS | a EOS within 8: room for 3, or a prompt of one token beside 7."""
    row = {"prompt": "wxyz:", "completions": ["a", "heyhey", "yo"], "scores": [1.0, 3.0, 2.0]}
    (kept,), report = prepare(row, max_length=8, truncation_mode=mode)
    want = (
        ("wxyz:", ["hey", "yo<eos>", "a<eos>"])
        if mode == "keep_start"
        else (":", ["heyhey<eos>", "yo<eos>", "a<eos>"])
    )
    assert (TOKENIZER.decode(kept["prompt_ids"]), texts(kept)) == want
    assert report.counts["truncated_prompts"] == (mode == "keep_end")
    assert report.counts["truncated_chosen"] == (mode == "keep_start")


def test_preparing_a_ranked_row_again_changes_nothing():
    rows = [
        {"prompt": "wxyz:", "completions": ["a", "heyhey", "yo", "yo"], "scores": [1.0, 3.0, 2.0, 2.5]},
        {"prompt": "q:", "completions": ["a", "b", "c", ""], "scores": [1.0, 1.0, 0.0, 3.0]},
    ]
    how = {"max_length": 8, "max_pairs_per_prompt": 3}
    once, report = prepare(*rows, **how)
    again, report_again = prepare_dataset(once, None, DataOptions(disable_tqdm=True, **how))
    assert again.to_list() == once.to_list()
    assert (report_again.pairs, report_again.pairs_left_out, report_again.dropped) == (report.pairs, 0, 0)
    assert report.pairs_left_out == (1 + 2) + 3  # identical, beyond 3 | blank
