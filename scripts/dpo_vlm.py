"""Train a vision-language model on preference pairs with images.

    python scripts/dpo_vlm.py                                  # the vision demo: pictures and a model from nothing
    python scripts/dpo_vlm.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name pairs.parquet \\
        --use_peft true --output_dir out/vlm

Rows are those of scripts/dpo.py with a column `images` (docs/vision.md). scripts/dpo.py trains such models as well; this one
refuses a model that reads text alone. Options, signs of a sound run and signals are those of scripts/dpo.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from dpo_trainer.cli import run_script


def demo(config, given):
    from dpo_trainer.demo.vision import run_vision_demo

    run_vision_demo(config, given)


def train(script, model, config):
    from dpo_trainer.cli.build import build_trainer, train_and_save

    trainer = build_trainer(script, model, config)
    if trainer.layout.images is None:
        raise SystemExit(
            f"dpo_vlm.py: {model.model_name_or_path} reads text alone, or has no processor beside it: train it with scripts/dpo.py."
        )
    train_and_save(trainer)


def main(argv: list[str] | None = None) -> None:
    run_script("dpo_vlm.py", argv, demo, train)


if __name__ == "__main__":
    main()
