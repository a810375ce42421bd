"""Direct Preference Optimization that computes each token once.

from dpo_trainer import DPOConfig, DPOTrainer, DataCollatorForPreference, register_loss
from dpo_trainer import OnlineDPOConfig, OnlineDPOTrainer, register_judge
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .moved import keep_old_names
from .printable import keep_logs_printable

__version__ = "0.1.0"

keep_logs_printable(__name__)
keep_old_names()
# accelerate and peft import bitsandbytes for every run, which then warns of a kernel that only 4-bit layers on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Loaded when first used: importing the package loads neither torch nor transformers.
_HOMES = {
    "DPOConfig": "config",
    "DPOTrainer": "trainer",
    "DataCollatorForPreference": "data.batches.collate",
    "Objective": "losses",
    "OnlineDPOConfig": "online.config",
    "OnlineDPOTrainer": "online.trainer",
    "register_judge": "online.feedback.protocol",
    "register_loss": "losses",
}
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForPreference",
    "Objective",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "__version__",
    "register_judge",
    "register_loss",
]

if TYPE_CHECKING:
    from .config import DPOConfig
    from .data.batches.collate import DataCollatorForPreference
    from .losses import Objective, register_loss
    from .online import OnlineDPOConfig, OnlineDPOTrainer, register_judge
    from .trainer import DPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
