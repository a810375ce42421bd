"""Which completions are compared: by hand, and what must hold for any scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer.data.batches.collate import read_row
from dpo_trainer.online.pairing import Outcome, paired
from dpo_trainer.online.samples import Completion, Sampled

A, B, C, D = [11], [12, 1], [13, 13], [14, 1]


def sampled(*answers: list[int], weight: float = 1.0) -> Sampled:
    completions = [Completion(ids=ids, text=str(ids), finished=True) for ids in answers]
    return Sampled(example_id=7, prompt="p", prompt_ids=[5, 6], completions=completions, weight=weight)


def row(chosen, rejected, *more, pairs, margin, weight=1.0):
    return {
        "example_id": 7,
        "prompt_ids": [5, 6],
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "more_ids": list(more),
        "pairs": pairs,
        "margin": margin,
        "weight": weight,
    }


@pytest.mark.parametrize(
    ("scores", "chosen", "rejected", "margin"),
    [
        ([1, 3, 2, 0], B, D, 3),
        ([-5, -7, -6, -5.5], A, B, 2),
        ([2, 2, 1, 1], A, D, 1),  # the first of the best, the last of the worst
        ([None, 3, 2, None], B, C, 1),
        ([0.5, None, None, 1], D, A, 0.5),
    ],
)
def test_best_against_worst(scores, chosen, rejected, margin):
    want = row(chosen, rejected, pairs=[[0, 1]], margin=[margin])
    assert paired(sampled(A, B, C, D), scores, every_pair=False) == (want, Outcome.PAIRED)


@pytest.mark.parametrize(
    ("scores", "ranked", "pairs", "margins"),
    [
        ([1, 3, 2, 0], [B, C, A, D], [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], [1, 2, 3, 1, 2, 1]),
        ([1, 3, 1, 1], [B, A, C, D], [[0, 1], [0, 2], [0, 3]], [2, 2, 2]),  # not one against its equal
        ([2, 2, 0, 0], [A, B, C, D], [[0, 2], [0, 3], [1, 2], [1, 3]], [2, 2, 2, 2]),
        ([1, None, 2, None], [C, A], [[0, 1]], [1]),
    ],
)
def test_each_against_every_worse_one(scores, ranked, pairs, margins):
    want = row(*ranked, pairs=pairs, margin=margins)
    assert paired(sampled(A, B, C, D), scores, every_pair=True) == (want, Outcome.PAIRED)


@pytest.mark.parametrize("every", [False, True], ids=["best_worst", "all"])
@pytest.mark.parametrize(
    ("scores", "outcome"),
    [
        ([1, 1, 1], Outcome.TIED),
        ([1, None, 1], Outcome.TIED),
        ([1, None, None], Outcome.FAILED),
        ([None, None, None], Outcome.FAILED),
    ],
)
def test_nothing_to_prefer(scores, outcome, every):
    """The row stays, so that all ranks have as many, and weighs nothing."""
    idle = row(A, B, pairs=[[0, 1]], margin=[1.0], weight=0.0)
    assert paired(sampled(A, B, C), scores, every_pair=every) == (idle, outcome)


@pytest.mark.parametrize("every", [False, True], ids=["best_worst", "all"])
def test_the_same_answer_twice_is_one_answer(every):
    """Whatever the judge says of the two: what it said first counts."""
    assert paired(sampled(A, A), [0.2, 0.8], every_pair=every)[1] is Outcome.TIED
    assert paired(sampled(A, A, A), [0.2, None, 0.8], every_pair=every)[1] is Outcome.TIED
    assert paired(sampled(A, A), [None, 0.8], every_pair=every)[1] is Outcome.FAILED
    got, outcome = paired(sampled(A, A, B), [0, 5, 1], every_pair=every)
    assert (got, outcome) == (row(B, A, pairs=[[0, 1]], margin=[1]), Outcome.PAIRED)
    got, _ = paired(sampled(A, B, A), [None, 1, 5], every_pair=every)
    assert (got["chosen_ids"], got["rejected_ids"], got["margin"]) == (A, B, [4])


def test_a_row_that_fills_a_batch_weighs_nothing():
    assert paired(sampled(A, B, weight=0.0), [0, 1], every_pair=False)[0]["weight"] == 0.0


@given(
    answers=st.lists(st.tuples(st.integers(10, 14), st.none() | st.integers(-2, 2)), min_size=2, max_size=6),
    every=st.booleans(),
)
def test_pairs_for_any_scores(answers, every):
    ids, scores = [[token] for token, _ in answers], [score for _, score in answers]
    first: dict[int, int] = {}
    for token, score in answers:
        if score is not None:
            first.setdefault(token, score)
    better = {(a, b): first[a] - first[b] for a in first for b in first if first[a] > first[b]}
    got, outcome = paired(sampled(*ids), scores, every_pair=every)
    read = read_row(got, 0)  # as the collator checks it
    pairs = {
        (read.completions[pair.chosen][0], read.completions[pair.rejected][0]): pair.margin for pair in read.pairs
    }
    if not better:
        known = sum(score is not None for score in scores)
        assert (outcome, read.weight) == (Outcome.TIED if known > 1 else Outcome.FAILED, 0.0)
    elif every:
        assert (outcome, pairs) == (Outcome.PAIRED, better)
    else:
        ((pair, margin),) = pairs.items()
        assert better[pair] == margin == max(better.values())
