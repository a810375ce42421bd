"""Train on answers of the model itself, compared by a judge or by rewards: online DPO (arXiv:2402.04792).

    python scripts/dpo_online.py                              # the embedded demo: a tiny model and a rule, nothing to download
    python scripts/dpo_online.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \\
        --reward_model_path my-reward-model --output_dir out
    python scripts/dpo_online.py scripts/configs/online.yaml --judge llm --judge_kwargs '{"model": "gpt-4o-mini"}'
    accelerate launch --config_file accelerate_configs/ddp.yaml scripts/dpo_online.py scripts/configs/online.yaml

The dataset needs a column `prompt`, a string or messages; other columns go to the rewards. Of the log, watch
objective/scores (should rise), objective/kl (should stay small), tie_rate (near 1 nothing is learnt) and
val/contain_eos_token. `--help` lists every option; docs/online.md explains them.

If the judge is down for good the run is saved and stops: the same command with --resume_from_checkpoint auto goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from dpo_trainer.cli import run_script
from dpo_trainer.online.config import OnlineDPOConfig


def demo(config, given):
    from dpo_trainer.demo.online import run_online_demo

    run_online_demo(config, given)


def train(script, model, config):
    from dpo_trainer.cli.build import build_online_trainer, train_and_save

    train_and_save(build_online_trainer(script, model, config))


def main(argv: list[str] | None = None) -> None:
    run_script("dpo_online.py", argv, demo, train, OnlineDPOConfig)


if __name__ == "__main__":
    main()
