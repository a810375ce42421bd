"""The engines of accelerate on two processes without a GPU: what a launcher would set, and what the config says.

FSDP2 and DeepSpeed know no CPU of their own accord. FSDP2 takes one when accelerate's state is there before the trainer
asks for it; DeepSpeed when it is told that the accelerator is the CPU, and kept from compiling its own collectives.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


class Engine(NamedTuple):
    """What a wrong launch would not have: it exits with 0 as well."""

    distributed_type: str
    wrapper: str


ENGINES = {
    "ddp": Engine("MULTI_CPU", "DistributedDataParallel"),
    "fsdp2": Engine("FSDP", "FSDPLlamaForCausalLM"),
    "zero1": Engine("DEEPSPEED", "DeepSpeedEngine"),
    "zero2": Engine("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": Engine("DEEPSPEED", "DeepSpeedEngine"),
}


def start(engine: str) -> dict[str, Any]:
    """Make this process a rank of `engine`, before each run. Returns what the run has to say in its config."""
    if engine == "fsdp2":
        return _fsdp2()
    if engine.startswith("zero"):
        return _deepspeed(int(engine.removeprefix("zero")))
    return {}


def _fsdp2() -> dict[str, Any]:
    os.environ |= FSDP2
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()  # a run may have another precision than the one before
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_GPU  # accelerate shards for nothing less
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}


def _deepspeed(stage: int) -> dict[str, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes
    return {
        "deepspeed": {
            "zero_optimization": {
                "stage": stage,
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 100,  # matrices are cut, norms stay whole
            },
            "bf16": {"enabled": "auto"},
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    }
