"""Win rates: counts by hand, the interval against numbers in print and against the test that it inverts."""

from __future__ import annotations

import json
import math

import pytest

from dpo_trainer.online.feedback.protocol import FeedbackUnavailable, Judge
from dpo_trainer.online.feedback.win_rate import WinRate, compare_answers


class Longer(Judge):
    """The longer answer wins; nobody can tell about an empty one."""

    name = "longer"

    def scores(self, samples):
        self.seen = list(samples)
        return [[len(c.text) or None for c in sampled.completions] for sampled in samples]


# --- the numbers ---


def test_ties_are_half_wins_and_failures_do_not_count():
    found = WinRate(wins=5, ties=2, losses=1, failed=100)
    assert (found.judged, found.rate) == (8, 0.75)
    assert found.interval() == WinRate(6, 0, 2).interval()
    assert WinRate(0, 4, 0).rate == 0.5


@pytest.mark.parametrize(
    ("wins", "losses", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction), 4 digits.
        (81, 263 - 81, 0.2553, 0.3662),
        (15, 148 - 15, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29 - 1, 0.0061, 0.1718),
    ],
)
def test_interval_as_in_print(wins, losses, low, high):
    assert WinRate(wins, 0, losses).interval(0.95) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("counts", [(7, 0, 3), (2, 5, 9), (40, 1, 23)])
def test_ends_are_where_the_score_test_turns(counts, level):
    """At an end q of the interval the rate lies z standard deviations of q away: (p - q)^2 = z^2 q (1 - q) / n."""
    z = {0.5: 0.6744897502, 0.9: 1.6448536270, 0.95: 1.9599639845, 0.999: 3.2905267315}[level]
    found = WinRate(*counts)
    for end in found.interval(level):
        # Ten digits of z are given.
        assert (found.rate - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / found.judged, rel=1e-8)


def test_interval_holds_the_rate_and_stays_within_bounds():
    for n in range(1, 40):
        for wins in range(n + 1):
            found = WinRate(wins, 0, n - wins)
            low, high = found.interval()
            assert 0 <= low <= found.rate <= high <= 1
            assert high - low > found.interval(0.5)[1] - found.interval(0.5)[0]
            mirrored = WinRate(n - wins, 0, wins).interval()
            assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


def test_nothing_judged():
    found = WinRate(0, 0, 0, failed=3)
    assert math.isnan(found.rate)
    assert found.interval() == (0.0, 1.0)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["win_rate"] is None
    assert str(found) == "no win rate: no comparison was judged (0 wins, 0 ties, 0 losses, 3 failed)"


def test_written_out():
    found = WinRate(81, 0, 182, 2)
    assert str(found) == "win rate 30.8%, 95 % interval 25.5% to 36.6% (81 wins, 0 ties, 182 losses, 2 failed)"
    assert "90 % interval 26.3% to 35.7%" in found.describe(0.9)  # by the formula with z = 1.6449
    low, high = found.interval(0.9)
    assert found.to_dict(0.9) == {
        "win_rate": 81 / 263,
        "low": low,
        "high": high,
        "level": 0.9,
        "wins": 81,
        "ties": 0,
        "losses": 182,
        "failed": 2,
    }


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, math.nan])
def test_level_out_of_range(level):
    with pytest.raises(ValueError, match=r"level is .*between 0 and 1"):
        WinRate(1, 0, 1).interval(level)


@pytest.mark.parametrize("counts", [(-1, 0, 0), (1.5, 0, 0), (0, 0, 0, -2)])
def test_counts_are_counts(counts):
    with pytest.raises(ValueError, match="Give a count"):
        WinRate(*counts)


# --- the comparison ---


def test_who_wins():
    prompts = ["p", [{"role": "user", "content": "q"}], "r", "s", "t"]
    found = compare_answers(Longer(), prompts, ["long", "ab", "x", "", "long"], ["x", "cd", "long", "y", ""])
    assert found == WinRate(wins=1, ties=1, losses=1, failed=2)


def test_what_feedback_gets():
    judge = Longer()
    compare_answers(judge, ["é", "q"], ["aß", "b"], ["c", "d"], columns=[{"answer": 1}, {"answer": 2}], ids=[7, 9])
    first, second = judge.seen
    assert (first.example_id, second.example_id) == (7, 9)
    assert (first.prompt, first.columns) == ("é", {"answer": 1})
    assert first.prompt_ids == []
    assert [(c.text, c.ids, c.finished) for c in first.completions] == [("aß", [], True), ("c", [], True)]
    compare_answers(judge, ["p", "q"], ["a", "b"], ["c", "d"])
    assert [(s.example_id, s.columns) for s in judge.seen] == [(0, {}), (1, {})]


def test_feedback_may_be_any_function_and_is_checked():
    assert compare_answers(lambda samples: [[1, 0]] * len(samples), ["p"], ["a"], ["b"]) == WinRate(1, 0, 0)
    with pytest.raises(ValueError, match="example_id 4"):
        compare_answers(lambda samples: [[1.0, math.nan]], ["p"], ["a"], ["b"], ids=[4])
    with pytest.raises(ValueError, match="shape"):
        compare_answers(lambda samples: [[1.0]], ["p"], ["a"], ["b"])


def test_no_prompts_ask_nobody():
    assert compare_answers(lambda samples: 1 / 0, [], [], []) == WinRate(0, 0, 0)


@pytest.mark.parametrize(
    "wrong", [{"answers_a": ["a"]}, {"answers_b": ["a", "b", "c"]}, {"columns": [{}]}, {"ids": [1, 2, 3]}]
)
def test_lists_of_different_lengths(wrong):
    given = {"prompts": ["p", "q"], "answers_a": ["a", "b"], "answers_b": ["c", "d"]}
    (name, values), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"2 prompts.*{len(values)} {name}"):
        compare_answers(Longer(), **given | wrong)


def test_unavailable_feedback_is_the_callers_to_handle():
    def down(samples):
        raise FeedbackUnavailable("down")

    with pytest.raises(FeedbackUnavailable):
        compare_answers(down, ["p"], ["a"], ["b"])
