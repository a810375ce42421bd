"""Who samples in a run, and who gives feedback: a judge, or a weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..distributed.engines import shards_weights
from ..models.soft_caps import caps_scores
from ..models.unwrap import base_model
from .config import OnlineDPOConfig
from .feedback import judges  # noqa: F401  # registers those that come with the package
from .feedback.protocol import Feedback, make_judge
from .feedback.reward_model import RewardModel
from .feedback.rewards import Rewards, load_reward_module
from .sampling.generate import ContinuousGenerator, Generator, TransformersGenerator, end_tokens
from .sampling.vllm_adapter import check_policy
from .sampling.vllm_colocated import VLLMColocatedGenerator
from .sampling.vllm_server import VLLMServerGenerator


def check_sampler(args: OnlineDPOConfig, ref_model: Any, generator: Any) -> None:
    """Known before a model is loaded.

    Raises:
        ValueError: where what samples would not have the whole policy, or not the reference.
    """
    if shards_weights(args) and generator is None:
        raise ValueError(
            "Sampling by transformers needs the whole model on every process, and FSDP and ZeRO-3 cut it: use DDP or ZeRO-1/2 "
            "(accelerate_configs/), or a generator of your own."
        )
    if generator is not None and args.generator != "transformers":
        raise ValueError(
            f"--generator {args.generator} would be ignored beside a generator object: leave one of them out."
        )
    if args.generator.startswith("vllm") and ref_model is not None:
        raise ValueError(
            f"--generator {args.generator} knows the policy's base model and its adapter, and no ref_model (--ref_model_name_or_path): "
            "leave that out, or sample by transformers."
        )


def choose_generator(
    args: OnlineDPOConfig,
    tokenizer: Any,
    policy: Any,
    *,
    pad_token_id: int,
    window: int | None,
    wait: Callable[[], Any],
) -> Generator:
    """As `--generator` says.

    Args:
        window: most tokens of prompt + completion; None: no limit.
        wait: returns when all processes have called it.

    Raises:
        ValueError: for a stop token that is none, and a policy or a server that do not fit.
    """
    ends = end_tokens(tokenizer, base_model(policy), args.stop_tokens)
    adapters = args.vllm_adapter_dir or Path(args.output_dir, "vllm_adapters")
    if args.generator == "vllm_server":
        check_policy(policy)
        assert args.vllm_server_url is not None  # OnlineDPOConfig refuses
        return VLLMServerGenerator(
            tokenizer,
            base_url=args.vllm_server_url,
            adapter_dir=adapters,
            end_ids=ends,
            is_main_process=args.process_index == 0,
            wait=wait,
        )
    if args.generator == "vllm_colocated":
        if args.world_size > 1:
            raise ValueError(
                "--generator vllm_colocated is for one process: start a server, and use --generator vllm_server."
            )
        return VLLMColocatedGenerator(
            tokenizer,
            policy,
            adapter_dir=adapters,
            end_ids=ends,
            gpu_memory=args.vllm_gpu_memory,
            max_model_len=window,
        )
    if args.generator == "continuous" and caps_scores(base_model(policy)):
        raise ValueError(
            f"--generator continuous: continuous batching of transformers (5.24) leaves out that {type(base_model(policy)).__name__} "
            "caps its attention scores, and would sample from another model. Use --generator transformers."
        )
    kind = ContinuousGenerator if args.generator == "continuous" else TransformersGenerator
    return kind(tokenizer, pad_token_id=pad_token_id, end_ids=ends, batch_size=args.generation_batch_size)


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
            "No judge or reward was given: name a judge (--judge), a reward model (--reward_model_path) or reward "
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
