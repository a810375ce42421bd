"""Who gives feedback in a run: a judge, or a weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from . import judges  # noqa: F401  # registers those that come with the package
from .config import OnlineDPOConfig
from .feedback import Feedback, make_judge
from .reward_model import RewardModel
from .rewards import Rewards, load_reward_module


def choose_feedback(args: OnlineDPOConfig, *, judge: Any, rewards: Any, tokenizers: Any) -> Feedback:
    """From what the trainer was given and what the options name.

    Raises:
        ValueError: for none, or both.
    """
    if judge is not None and args.judge is not None:
        raise ValueError(
            f"A judge was passed to the trainer, and --judge {args.judge} names another: give one of the two."
        )
    judge = args.judge if judge is None else judge
    listed = list(rewards) if isinstance(rewards, list | tuple) else [] if rewards is None else [rewards]
    named: list[Any] = list(args.reward_model_path or ())
    named += load_reward_module(args.reward_module) if args.reward_module else []
    if listed and named:
        raise ValueError(
            "Rewards were passed to the trainer, and --reward_model_path or --reward_module name others: give either."
        )
    found = listed or named
    if judge is not None and found:
        raise ValueError("A judge and rewards both say which completion is better: give one of the two.")
    if judge is None and not found:
        raise ValueError(
            "Nobody says which completion is better: name a judge (--judge), a reward model (--reward_model_path) or reward "
            "functions (--reward_module, reward_funcs)."
        )
    if judge is not None:
        return _judge(judge, args)
    return Rewards(_made(found, tokenizers, args), args.reward_weights, scale=args.reward_scale)


def _judge(judge: Any, args: OnlineDPOConfig) -> Feedback:
    if args.reward_weights is not None or args.reward_scale != 1.0:
        raise ValueError(
            "--reward_weights and --reward_scale are about rewards, and this run has a judge: leave them out."
        )
    if isinstance(judge, str):
        return make_judge(judge, args.judge_kwargs)  # type: ignore[arg-type]
    if not callable(judge) or not hasattr(judge, "counts"):
        raise ValueError(
            f"judge is {judge!r:.60}: give a name, or an object of a class derived from dpo_trainer.online.Judge or PairwiseJudge."
        )
    return judge


def _made(rewards: Sequence[Any], tokenizers: Any, args: OnlineDPOConfig) -> list[RewardModel | Callable]:
    given = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(rewards)
    if len(given) != len(rewards):
        raise ValueError(
            f"{len(given)} reward_processing_classes for {len(rewards)} rewards: give one each, None for functions."
        )
    return [_reward(reward, tokenizer, args) for reward, tokenizer in zip(rewards, given, strict=True)]


def _reward(reward: Any, tokenizer: Any, args: OnlineDPOConfig) -> Any:
    if isinstance(reward, str | PreTrainedModel):
        return RewardModel(reward, tokenizer, device=args.device, trust_remote_code=args.trust_remote_code)
    return reward
