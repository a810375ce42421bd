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

from dpo_trainer.cli import parse_args


def main(argv: list[str] | None = None) -> None:
    try:
        script, model, config, given = parse_args(argv)
    except ValueError as error:
        raise SystemExit(f"dpo_vlm.py: {error}") from None
    if model.model_name_or_path is None:
        from dpo_trainer.demo.looking import run_vision_demo

        run_vision_demo(config, given)
        return
    if "output_dir" not in given and config.process_index == 0:
        print(f"No --output_dir was given: writing to {config.output_dir}.")
    from dpo_trainer.cli.build import build_trainer, train_and_save  # slow to import, and --help does without

    trainer = build_trainer(script, model, config)
    if trainer.layout.images is None:
        raise SystemExit(
            f"dpo_vlm.py: {model.model_name_or_path} reads text alone, or has no processor beside it: train it with scripts/dpo.py."
        )
    train_and_save(trainer)


if __name__ == "__main__":
    main()
