"""Online DPO: prompts -> sampled completions -> feedback -> pairs, and then `DPOTrainer` as it is.

prompts.py, sampling/ -> samples.py -> feedback/: rewards.py, reward_model.py; judges.py (rules, LLM, pair model)
rollout.py (pairing.py, metrics.py), rounds.py -> trainer.py    completions.py, win_rate.py -> callbacks.py
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded when first used, as in the package above.
_HOMES = {
    "Comparison": "feedback.protocol",
    "FeedbackUnavailable": "feedback.protocol",
    "Judge": "feedback.protocol",
    "LogCompletionsCallback": "callbacks",
    "OnlineDPOConfig": "config",
    "OnlineDPOTrainer": "trainer",
    "PairwiseJudge": "feedback.protocol",
    "RewardModel": "feedback.reward_model",
    "Rewards": "feedback.rewards",
    "WinRateCallback": "callbacks",
    "register_judge": "feedback.protocol",
}
__all__ = [
    "Comparison",
    "FeedbackUnavailable",
    "Judge",
    "LogCompletionsCallback",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PairwiseJudge",
    "RewardModel",
    "Rewards",
    "WinRateCallback",
    "register_judge",
]

if TYPE_CHECKING:
    from .callbacks import LogCompletionsCallback, WinRateCallback
    from .config import OnlineDPOConfig
    from .feedback.protocol import Comparison, FeedbackUnavailable, Judge, PairwiseJudge, register_judge
    from .feedback.reward_model import RewardModel
    from .feedback.rewards import Rewards
    from .trainer import OnlineDPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
