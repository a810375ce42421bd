"""Look at preference data before training on it: what is cut, dropped, repeated, contradicted or mis-templated.

    python scripts/inspect_data.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl
    python scripts/inspect_data.py scripts/configs/lora.yaml --dataset_name pairs.jsonl --output_dir out/look

Takes the file and the options of a training run, and loads no weights; --model_name_or_path may be a folder with a tokenizer
alone. Prints what it found, and writes index.html and inspection.json to --output_dir (out/inspection). --show 3 rows
are shown token by token; --max_rows reads a part. Exit code 1: some rows cannot be read, and would stop training.
docs/inspecting.md says how to read the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from dpo_trainer.cli.errors import OneMessage
from dpo_trainer.inspection import parse, run


def main(argv: list[str] | None = None) -> int:
    with OneMessage("inspect_data.py", argv):
        return run(*parse(argv))


if __name__ == "__main__":
    sys.exit(main())
