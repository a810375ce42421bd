"""Every test runs offline, on the CPU, in one thread, and from the same random state.

`DPO_TRAINER_TEST_GPU=1` (make test-gpu) leaves the GPU in sight, for the tests in gpu/.
"""

from __future__ import annotations

import gc
import os
import signal
import tempfile

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dpo-trainer-tests-")  # nothing from an earlier run
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not os.environ.get("DPO_TRAINER_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import set_seed

for launched in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(launched, None)

# Whatever the parent of this process ignores (nohup, a job in the background of a script): tests send signals.
for number in filter(None, (getattr(signal, name, None) for name in ("SIGINT", "SIGHUP"))):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# How fast examples come says how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Matrices of 32 columns gain nothing from threads, and sums come out in one order on every machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_state():
    set_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _less_garbage_to_look_through():
    """accelerate collects garbage whenever training begins; all that was imported by now is no garbage."""
    gc.freeze()
    yield
    gc.unfreeze()
