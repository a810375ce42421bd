"""Compute reference log-probs ahead of training, on a machine of their own; look after the cache that they are kept in.

    python scripts/cache_reference.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl
    python scripts/cache_reference.py scripts/configs/lora.yaml --dataset_name pairs.jsonl
    python scripts/cache_reference.py --stats
    python scripts/cache_reference.py --prune --older_than_days 30
    python scripts/cache_reference.py --prune_reference 3f2a91

The first two take the file and the options of a training run. They end with a line such as "Reference log-probs of train:
3,992 completions, 0 found in the cache, 3,992 computed"; the run itself, with --precompute_ref_log_probs true, then finds
all of them and holds no second model. A second call computes nothing. docs/references.md says what is kept, and where.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from dpo_trainer.cli.caching import main
from dpo_trainer.cli.errors import OneMessage

if __name__ == "__main__":
    with OneMessage("cache_reference.py"):
        main()
