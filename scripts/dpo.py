"""Train on preference pairs with DPO, or a loss of its family.

    python scripts/dpo.py                                     # the embedded demo: a tiny model, nothing to download
    python scripts/dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir out
    python scripts/dpo.py scripts/configs/lora.yaml --beta 0.2 --output_dir out        # flags override the file
    accelerate launch --config_file accelerate_configs/ddp.yaml scripts/dpo.py scripts/configs/full.yaml --output_dir out

With the sigmoid loss the first log line must show a loss of about 0.693 (= ln 2) and rewards/margins near 0: policy and
reference are still the same model. (--logging_steps 1 shows the first step alone: 0.6931 and 0.) If not, stop: dropout is
on, or the two see different tokens. Later lines show the loss falling and rewards/accuracies rising above 0.5; a warning
appears if that is bought with falling log-probs of the chosen answers. The model is then in --output_dir, with
train_results.json and eval_results.json beside it. `--help` lists every option.

At Ctrl-C (exit code 130), SIGTERM and SIGHUP (75) the run finishes its step, saves, and prints the command that goes on; a second
Ctrl-C ends it at once. With --resume_from_checkpoint auto the same command begins, or goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from dpo_trainer.cli import run_script


def demo(config, given):
    from dpo_trainer.demo import run_demo

    run_demo(config, given)


def train(script, model, config):
    from dpo_trainer.cli.build import build_trainer, train_and_save

    train_and_save(build_trainer(script, model, config))


def main(argv: list[str] | None = None) -> None:
    run_script("dpo.py", argv, demo, train)


if __name__ == "__main__":
    main()
