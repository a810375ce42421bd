"""The files of accelerate_configs/ as accelerate's own launcher reads them, and the memory table of docs/scaling.md."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers.integrations import is_deepspeed_available
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dpo_trainer.cli import parse_args

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "accelerate_configs"
TYPES = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero1": DistributedType.DEEPSPEED,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "zero3_offload": DistributedType.DEEPSPEED,
}
ZERO = [name for name, kind in TYPES.items() if kind == DistributedType.DEEPSPEED]


def load_table():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks" / "memory_table.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


memory_table = load_table()


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def command_of(name: str) -> list[str]:
    """The command at the head of the file."""
    return shlex.split(re.search(r"^#   (accelerate launch .*)$", path_of(name).read_text(), re.MULTILINE)[1])


def launched(words: list[str]) -> Namespace:
    """What `accelerate launch` makes of its words and the file they name."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""
    return args


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables through which the launcher tells workers about their engine."""

    def enter(name: str) -> Namespace:
        args = launched(command_of(name)[2:])
        told = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
        for variable, value in told.items():
            if variable.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(variable, value)
        return args

    return enter


# --- every file ---


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(path_of(name)))
    assert config.distributed_type == TYPES[name]
    assert config.mixed_precision == "no"  # else it would win over a script that was told nothing
    assert (config.num_processes > 1) == (name != "single")


@pytest.mark.parametrize("name", TYPES)
def test_settings_of_the_engine_are_options_of_the_launcher(name):
    """The loader takes whatever stands below `fsdp_config` and `deepspeed_config`: a misspelt name would do nothing."""
    options = vars(launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load(path_of(name).read_text())
    named = {key for part in ("fsdp_config", "deepspeed_config") for key in content.get(part, {})}
    assert named <= set(options)
    assert bool(named) == (TYPES[name] in (DistributedType.FSDP, DistributedType.DEEPSPEED))


@pytest.mark.parametrize("name", TYPES)
def test_the_command_at_its_head_parses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command_of(name)
    assert words[:4] == ["accelerate", "launch", "--config_file", f"accelerate_configs/{name}.yaml"]
    args = launched(words[2:])
    assert args.training_script == "scripts/dpo.py"
    parse_args(args.training_script_args)
    engines = (args.use_fsdp, args.use_deepspeed, args.multi_gpu)
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MULTI_GPU)
    assert engines == tuple(TYPES[name] == kind for kind in kinds)


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("single", "ddp")])
def test_its_head_says_what_memory_it_takes(name):
    head = path_of(name).read_text().split("\ncompute_environment")[0]
    assert "Per billion trained parameters" in head


# --- FSDP2 ---


def test_fsdp2_shards_by_block_and_saves_whole(environment):
    args = environment("fsdp2")
    assert args.num_processes == 8
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
    plugin.set_auto_wrap_policy(tiny.llama())
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {LlamaDecoderLayer}


def test_what_fsdp2_would_be_without_the_file(monkeypatch):
    """Else the assertions above would hold for any file."""
    for variable in [name for name in os.environ if name.startswith("FSDP_")]:
        monkeypatch.delenv(variable)
    args = launched(["--use_fsdp", "--num_processes", "8", "--num_machines", "1", "script.py"])
    assert args.fsdp_version == "1"
    assert args.fsdp_cpu_ram_efficient_loading == "true"
    assert FullyShardedDataParallelPlugin(fsdp_version=2).state_dict_type == StateDictType.SHARDED_STATE_DICT


# --- DeepSpeed ---


@pytest.mark.parametrize("name", ZERO)
def test_zero_takes_its_numbers_from_the_script(name, environment):
    environment(name)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == int(name[4])
    config = plugin.deepspeed_config
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        assert config[key] == "auto", key
    place = "cpu" if name == "zero3_offload" else "none"
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == place
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (plugin.zero_stage == 3)
    assert plugin.zero3_init_flag is (plugin.zero_stage == 3)


@pytest.mark.skipif(not is_deepspeed_available(), reason="needs DeepSpeed")
@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_transformers_fills_in_what_is_auto(clipping, environment, tmp_path):
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    environment("zero2")
    config = HfTrainerDeepSpeedConfig(DeepSpeedPlugin().deepspeed_config)
    args = SimpleNamespace(
        **{**vars(tiny.config(tmp_path)), "max_grad_norm": clipping, "gradient_accumulation_steps": 4, "world_size": 2}
    )
    config.trainer_config_process(args)
    assert config.get_value("gradient_clipping") == clipping
    assert config.get_value("gradient_accumulation_steps") == 4


# --- several machines ---


def test_machines_meet_where_the_command_says(environment):
    """In accelerate 1.15 `rdzv_backend` and `same_network` of a file lose against the launcher's defaults."""
    args = environment("multi_node")
    assert (args.nnodes, args.nproc_per_node) == ("2", "8")
    assert (args.rdzv_backend, args.rdzv_endpoint, args.max_restarts) == ("c10d", "NODE0:29500", 3)


def stand_in(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def stand_in_environment(folder: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}


ARGUMENTS = ["scripts/configs/full.yaml", "--output_dir", "out/a folder"]


def test_torchrun_script(tmp_path, monkeypatch):
    stand_in(tmp_path / "bin", "torchrun", 'printf "%s\\n" "$@"')
    env = stand_in_environment(tmp_path / "bin", NODES="2", GPUS="4", HEAD="node0:29501")
    script = ["bash", str(FOLDER / "torchrun.sh"), *ARGUMENTS]
    words = subprocess.run(script, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    args = torchrun_parser().parse_args(words)
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", "4", 3)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "node0:29501")
    assert args.training_script_args == [*ARGUMENTS, "--resume_from_checkpoint", "auto"]
    monkeypatch.chdir(ROOT)
    parse_args(args.training_script_args)


def slurm(folder: Path, srun: str, **variables: str) -> subprocess.Popen:
    """slurm.sh with programs that stand in for Slurm's; what they were told lies in `folder`."""
    programs = folder / "bin"
    stand_in(programs, "scontrol", f'echo "$@" >> "{folder}/scontrol"; echo node7')
    stand_in(programs, "srun", f'printf "%s\\n" "$@" > "{folder}/srun"\n{srun}')
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42"}
    env = stand_in_environment(programs, **job, **variables)
    return subprocess.Popen(["bash", str(FOLDER / "slurm.sh"), *ARGUMENTS], env=env, cwd=ROOT)


def test_slurm_script_starts_the_launcher(tmp_path):
    assert slurm(tmp_path, "exit 3", CONFIG="accelerate_configs/fsdp2.yaml").wait(20) == 3
    words = (tmp_path / "srun").read_text().splitlines()
    args = launched(words[words.index("launch") + 1 :])
    assert args.use_fsdp
    assert (args.num_machines, args.num_processes, args.max_restarts) == (2, 16, 3)
    assert (args.rdzv_backend, args.main_process_ip, args.main_process_port) == ("c10d", "node7", 29500)
    assert args.training_script_args == [*ARGUMENTS, "--resume_from_checkpoint", "auto"]
    assert "requeue" not in (tmp_path / "scontrol").read_text()  # a run that failed is not started again


def test_slurm_script_stops_and_queues_again(tmp_path):
    """USR1 reaches the run as TERM; the job is queued again after the run has saved, not before."""
    saved = tmp_path / "saved"
    # bash waits for its child before it heeds a trap, unless it waits by `wait`.
    srun = f'trap "sleep 0.5; touch {saved}; exit 1" TERM; touch {tmp_path}/ready; sleep 5 & wait $!'
    stand_in(tmp_path / "bin", "scontrol", "")
    job = slurm(tmp_path, srun)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.wait(20)
    assert saved.exists()
    assert "requeue 42" in (tmp_path / "scontrol").read_text()


# --- the memory table ---


def round_parts(p: float = 1e9):
    """P parameters, all trained, in float32; no batch, nothing gathered; a reference copy."""
    return memory_table.Parts(
        weights=4 * p, reference=4 * p, gradients=4 * p, optimizer=8 * p, casts=2 * p, batch=0, gathered=0
    )


@pytest.mark.parametrize(
    ("engine", "want"),
    [
        ("ddp", 4 + 4 + 4 + 8 + 2 + 4),  # weights, gradients, buckets, Adam, copies, reference
        ("zero1", 2 + 2 + (4 + 8 + 4) / 8 + 2 + 1),  # the last: a bucket of 1 GB
        ("zero2", 2 + (2 + 4 + 8 + 4) / 8 + 2 + 1),
        ("fsdp2", (4 + 4 + 8 + 4) / 8),
        ("zero3", (2 + 2 + 4 + 8 + 4 + 2) / 8 + 1 + 2),  # and 1 billion gathered parameters
        ("zero3_offload", 1 + 2),
    ],
)
def test_bytes_per_parameter_by_hand(engine, want):
    """GB for a billion parameters on each of 8 cards: what the heads of the files say."""
    got = memory_table.ENGINES[engine].of(round_parts(), memory_table.FULL_TRAINING, 8)
    assert got == pytest.approx(want * 1e9)


def test_one_process_holds_what_the_table_says(tmp_path):
    """Weights, gradients and Adam of a step that was really made: 16 bytes per parameter.

    Adam's step counters are one number per tensor.
    """
    trainer = tiny.trainer(tmp_path, max_steps=1, optim="adamw_torch")
    gradients = []
    trainer.create_optimizer()
    step = trainer.optimizer.step

    def counted(*args, **kwargs):
        gradients.append(sum(w.grad.nbytes for w in trainer.model.parameters() if w.grad is not None))
        return step(*args, **kwargs)

    trainer.optimizer.step = counted
    trainer.train()
    parameters = sum(w.numel() for w in trainer.model.parameters())
    numbers = [v for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    weights = sum(w.nbytes for w in trainer.model.parameters())
    want = memory_table.ddp(
        memory_table.replace(round_parts(parameters), casts=0, reference=0), memory_table.FULL_TRAINING, 1
    )
    assert weights + gradients[0] + sum(v.nbytes for v in numbers) == want == 16 * parameters


def test_sharing_never_costs_memory():
    """More cards, less on each; only DDP shares nothing."""
    for name, engine in memory_table.ENGINES.items():
        taken = [engine.of(round_parts(), memory_table.FULL_TRAINING, cards) for cards in (2, 4, 8, 64)]
        assert taken == sorted(taken, reverse=True), name
        assert (taken[0] > taken[-1]) == (name not in ("ddp", "zero3_offload")), name


def test_the_tables_of_the_page_are_fresh():
    page = memory_table.PAGE.read_text()
    assert memory_table.filled(page) == page, "run python benchmarks/memory_table.py --write"
    assert page.count("| 70 B |") == 2 * len(memory_table.TABLES)
