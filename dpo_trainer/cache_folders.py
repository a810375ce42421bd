"""Where what is kept between runs lies."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(given: str | None, kind: str) -> Path:
    """`given`, else $DPO_TRAINER_CACHE/kind, else $HF_HOME/dpo_trainer/kind. The folder is not created.

    HF_HOME is ~/.cache/huggingface unless set.
    """
    if given:
        return Path(given).expanduser()
    if own := os.environ.get("DPO_TRAINER_CACHE"):
        return Path(own).expanduser() / kind
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(home).expanduser() / "dpo_trainer" / kind
