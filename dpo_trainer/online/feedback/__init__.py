"""Feedback: sampled answers come in, scores or verdicts of rewards and judges go out."""

from .protocol import (
    JUDGES,
    Comparison,
    Feedback,
    FeedbackUnavailable,
    Judge,
    PairwiseJudge,
    Scores,
    checked,
    make_judge,
    parse_options,
    register_judge,
)

__all__ = [
    "JUDGES",
    "Comparison",
    "Feedback",
    "FeedbackUnavailable",
    "Judge",
    "PairwiseJudge",
    "Scores",
    "checked",
    "make_judge",
    "parse_options",
    "register_judge",
]
