"""What launchers, engines and their files cannot do is refused, with the way out; what they can do is let through."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate import ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations import is_deepspeed_available

from dpo_trainer import DPOConfig
from dpo_trainer.distributed import engine_checks
from dpo_trainer.distributed.engine_checks import (
    check_engine,
    check_engine_files,
    check_launcher,
    check_parallelism,
    check_placement,
)
from dpo_trainer.options import run as config_checks
from dpo_trainer.training import offloading

FILES = Path(__file__).parents[1] / "accelerate_configs"
ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
SPOKEN = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


@pytest.fixture(autouse=True)
def _no_launcher():
    """Nor what accelerate left behind in this process; all is put back afterwards."""
    before = {name: value for name, value in os.environ.items() if name.startswith(SPOKEN)}
    for name in before:
        del os.environ[name]
    yield
    for name in [name for name in os.environ if name.startswith(SPOKEN)]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def with_deepspeed(monkeypatch):
    monkeypatch.setattr(engine_checks, "is_deepspeed_available", lambda: True)


def launch(*words: str) -> None:
    """Tell this process what `accelerate launch` tells its workers."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
    args.deepspeed_fields_from_accelerate_config = ""
    told = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    os.environ.update({name: value for name, value in told.items() if name.startswith(SPOKEN)})


FSDP = ("--num_processes", "2", "--num_machines", "1", "--use_fsdp", "--fsdp_cpu_ram_efficient_loading", "false")


def files_of(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"deepspeed": None, "fsdp": None, "fsdp_config": None, **options})


def launched(world_size: int = 2, **options: Any) -> SimpleNamespace:
    """What `check_launcher` reads of a config."""
    return SimpleNamespace(
        **{"bf16": False, "fp16": False, "parallelism_config": None, "world_size": world_size, **options}
    )


# --- what is refused is let through where it is right ---


@pytest.mark.parametrize("name", sorted(path.stem for path in FILES.glob("*.yaml")))
def test_our_own_files_pass(name, with_deepspeed):
    launch("--config_file", str(FILES / f"{name}.yaml"), "--num_processes", "8" if name != "single" else "1")
    engine = {"fsdp2": "FSDP", "zero": "DEEPSPEED"}.get(name if name == "fsdp2" else name[:4])
    told = {kind for kind in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{kind}") == "true"}
    assert told == ({engine} if engine else set())  # else the launcher said nothing, and nothing was checked
    check_engine_files(files_of())
    check_launcher(launched(8))


def test_files_where_they_belong_pass(tmp_path, with_deepspeed):
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO2))
    (tmp_path / "fsdp.json").write_text('{"fsdp_version": 2, "reshard_after_forward": true}')
    for given_as in (ZERO2, json.dumps(ZERO2), str(tmp_path / "zero2.json")):
        check_engine_files(files_of(deepspeed=given_as))
    check_engine_files(files_of(fsdp=True, fsdp_config=str(tmp_path / "fsdp.json")))
    check_engine_files(files_of(fsdp=True))
    check_engine_files(files_of())


# --- files and packages ---


def refused(**options: Any) -> str:
    with pytest.raises(ValueError) as error:
        tiny.config("out", **options)
    return str(error.value)


@pytest.mark.parametrize("flag", ["deepspeed", "fsdp_config"])
@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_a_file_of_accelerate_is_for_its_launcher(flag, name):
    path = FILES / f"{name}.yaml"
    message = refused(**{flag: str(path)})
    assert f"--{flag} {path} is a configuration of accelerate" in message
    assert f"accelerate launch --config_file {path}" in message


def test_a_file_of_accelerate_in_json_too(tmp_path):
    (tmp_path / "mine.json").write_text('{"distributed_type": "DEEPSPEED", "num_processes": 8}')
    assert "accelerate launch --config_file" in refused(deepspeed=str(tmp_path / "mine.json"))


@pytest.mark.parametrize(
    ("options", "what", "way_out"),
    [
        ({"fsdp": True, "fsdp_config": ZERO2}, "settings of DeepSpeed (train_micro", "give it to --deepspeed"),
        ({"deepspeed": {"fsdp_version": 2}}, "settings of FSDP (fsdp_version)", "--fsdp_config, with --fsdp true"),
        ({"deepspeed": {"auto_wrap_policy": "x"}}, "settings of FSDP (auto_wrap_policy)", "--fsdp_config"),
        ({"deepspeed": ZERO2, "fsdp": True}, "--deepspeed {...} and --fsdp True are two engines", "leave one"),
        ({"fsdp_config": {"fsdp_version": 2}}, "--fsdp_config {...} would be ignored", "--fsdp true"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "--fsdp True with fsdp_version 1", "fsdp2.yaml"),
        ({"fsdp": "full_shard", "fsdp_config": {"fsdp_version": "1"}}, "with fsdp_version 1 is FSDP1", "fsdp2.yaml"),
        ({"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, "empty weights", "fsdp2.yaml"),
        (
            {"deepspeed": "no/such.json"},
            "--deepspeed no/such.json: this file does not exist",
            "Give the path of a JSON file",
        ),
        ({"fsdp": True, "fsdp_config": "nosuch"}, "--fsdp_config nosuch: this file does not exist", "or JSON text"),
        ({"deepspeed": "{'stage': 2}"}, "--deepspeed {...} is not JSON", "as JSON"),
    ],
    ids=str,
)
def test_wrong_files(options, what, way_out):
    message = refused(**options)
    assert what in message
    assert way_out in message


@pytest.mark.parametrize(
    ("content", "what"), [("stage: 2", "is not JSON"), ("[1, 2]", "is not a JSON object"), ("", "is not JSON")]
)
def test_files_that_are_no_settings(content, what, tmp_path):
    (tmp_path / "zero.json").write_text(content)
    message = refused(deepspeed=str(tmp_path / "zero.json"))
    assert f"--deepspeed {tmp_path / 'zero.json'} {what}" in message


@pytest.mark.parametrize("by", ["--deepspeed zero2.json", "distributed_type: DEEPSPEED of the launcher"])
def test_deepspeed_that_is_not_installed(by, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine_checks, "is_deepspeed_available", lambda: False)
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO2))
    options = {"deepspeed": "zero2.json"} if "zero2.json" in by else {}
    if not options:
        launch("--use_deepspeed", "--zero_stage", "2", "--num_processes", "2", "--num_machines", "1")
    message = refused(**options)
    assert f"{by} needs DeepSpeed, which is not installed: `pip install deepspeed`" in message
    assert "fsdp2.yaml" in message


@pytest.mark.skipif(is_deepspeed_available(), reason="DeepSpeed is installed")
def test_deepspeed_that_is_really_not_installed():
    assert "`pip install deepspeed`" in refused(deepspeed=ZERO2)


def test_fsdp1_of_the_launcher():
    launch(*FSDP)  # version 1 is what accelerate takes where nothing is said
    assert os.environ["FSDP_VERSION"] == "1"
    message = refused()
    assert "distributed_type: FSDP of the launcher with fsdp_version 1 is FSDP1" in message
    assert "accelerate_configs/fsdp2.yaml" in message


def test_empty_weights_of_the_launcher():
    launch(*FSDP[:-2], "--fsdp_version", "2")
    message = refused()
    assert "distributed_type: FSDP of the launcher with fsdp_cpu_ram_efficient_loading: true" in message
    assert "accelerate_configs/fsdp2.yaml" in message


def test_two_engines_of_which_the_launcher_has_one():
    launch(*FSDP, "--fsdp_version", "2")
    message = refused(deepspeed=ZERO2)
    assert "--deepspeed {...} and distributed_type: FSDP of the launcher are two engines" in message


# --- the launcher ---


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--dynamo_backend", "inductor"), "dynamo_backend: inductor of the launcher"),
        (("--mixed_precision", "bf16"), "mixed_precision: bf16 of the launcher"),
    ],
)
def test_what_the_launcher_must_not_say(words, what):
    launch("--num_processes", "2", "--num_machines", "1", "--multi_gpu", *words)
    message = refused()
    assert what in message
    assert "leave it out" in message or 'set it to "no" there' in message


def test_a_launcher_that_agrees_with_the_run():
    launch("--num_processes", "2", "--num_machines", "1", "--multi_gpu", "--mixed_precision", "bf16")
    check_launcher(launched(bf16=True))
    with pytest.raises(ValueError, match=r"mixed_precision: bf16 of the launcher .* precision of the run, fp16"):
        check_launcher(launched(fp16=True))


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "true", "distributed_type: MEGATRON_LM of the launcher"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision: fp8 of the launcher"),
    ],
)
def test_what_the_launcher_does_not_even_say_here(variable, value, what):
    """It wants packages for it."""
    os.environ[variable] = value
    assert what in refused()


KINDS = {"cp": "plain causal attention", "sp": "splits rows", "tp": "same pairs"}


@pytest.mark.parametrize("kind", KINDS)
def test_parallelism_that_cannot_work(kind):
    """Said by the launcher, in Python, and to accelerate alone."""
    if f"{kind}_size" not in inspect.signature(ParallelismConfig).parameters:
        pytest.skip("accelerate before 1.12 has no such option")
    message = f"--parallelism_config_{kind}_size 2 .*{KINDS[kind]}.*fsdp2.yaml"
    with pytest.raises(ValueError, match=message):
        tiny.config("out", parallelism_config=ParallelismConfig(**{f"{kind}_size": 2}))
    with pytest.raises(ValueError, match=message):
        check_engine(accelerator(parallelism_config=ParallelismConfig(**{f"{kind}_size": 2})))
    launch(*FSDP, "--fsdp_version", "2", "--use_parallelism_config", f"--parallelism_config_{kind}_size", "2")
    with pytest.raises(ValueError, match=message):
        tiny.config("out")


@given(replicas=st.integers(1, 6), shards=st.integers(1, 6), processes=st.integers(1, 36))
def test_sizes_make_up_the_processes(replicas, shards, processes):
    """Where nothing is said (1 x 1) accelerate fills in what there is."""
    sizes = SimpleNamespace(dp_replicate_size=replicas, dp_shard_size=shards, tp_size=1, cp_size=1, sp_size=1)
    if replicas * shards in (1, processes):
        check_parallelism(sizes, processes)
        return
    with pytest.raises(ValueError) as error:
        check_parallelism(sizes, processes)
    named = f"--parallelism_config_dp_replicate_size {replicas} x --parallelism_config_dp_shard_size {shards}"
    assert f"{named} (parallelism_config) make {replicas * shards} processes" in str(error.value)
    assert f"and {processes} were started" in str(error.value)


def test_replicas_of_shards_for_another_number_of_processes():
    launch(
        *FSDP, "--fsdp_version", "2", "--use_parallelism_config", "--parallelism_config_dp_replicate_size", "2",
        "--parallelism_config_dp_shard_size", "4",
    )  # fmt: skip
    check_launcher(launched(8))
    with pytest.raises(
        ValueError, match=r"_replicate_size 2 x .*_shard_size 4 .* make 8 processes, and 6 were started"
    ):
        check_launcher(launched(6))


# --- what accelerate made of it ---


def accelerator(**given: Any) -> SimpleNamespace:
    """What `check_engine` reads of an Accelerator."""
    state = SimpleNamespace(fsdp_plugin=given.pop("fsdp", None), deepspeed_plugin=given.pop("zero", None))
    return SimpleNamespace(
        **{"parallelism_config": None, "num_processes": 2, "distributed_type": "MULTI_GPU", "state": state, **given}
    )


def test_engines_that_pass():
    check_engine(accelerator())
    check_engine(accelerator(distributed_type="FSDP", fsdp=SimpleNamespace(fsdp_version=2)))
    check_engine(accelerator(distributed_type="DEEPSPEED", zero=SimpleNamespace(deepspeed_config=ZERO2)))
    check_engine(accelerator(parallelism_config=ParallelismConfig(dp_replicate_size=2)))


def test_engines_that_do_not():
    with pytest.raises(ValueError, match=r"distributed_type: FSDP with fsdp_version 1 is FSDP1.*fsdp2.yaml"):
        check_engine(accelerator(distributed_type="FSDP", fsdp=SimpleNamespace(fsdp_version=1)))
    cut = ZERO2 | {"tensor_parallel": {"autotp_size": 2}}
    with pytest.raises(ValueError, match=r"tensor_parallel\.autotp_size 2 in the settings of DeepSpeed"):
        check_engine(accelerator(zero=SimpleNamespace(deepspeed_config=cut)))


def test_every_trainer_is_checked(tmp_path, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr("dpo_trainer.trainer.check_engine", seen.append)
    made = tiny.trainer(tmp_path)
    assert seen == [made.accelerator]


# --- the model ---


def on(*devices: str, device_map: dict[str, Any] | None = None, **more: Any) -> Any:
    """A model with one weight on each device."""
    weights = [SimpleNamespace(device=torch.device(device)) for device in devices]
    return SimpleNamespace(parameters=lambda: weights, hf_device_map=device_map, **more)


def process(device: str, world_size: int = 2) -> Any:
    return SimpleNamespace(device=torch.device(device), world_size=world_size, process_index=1)


@pytest.mark.parametrize(
    "model",
    [
        on("cpu"),
        on("cuda:1"),
        on("cuda:0"),  # moved by hand, and moved on by transformers
        on("cuda:1", "meta"),
        on("cuda:1", device_map={"": 1}),
        on("cpu", device_map={"": "cpu"}),
    ],
)
def test_models_in_one_place_pass(model):
    check_placement(model, process("cuda:1"))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (on("cpu", "cuda:0"), "cpu, cuda:0"),
        (on("cuda:0", "cuda:1", device_map={"a": 0, "b": 1}), "0, 1"),
        (on("cuda:0", "meta", device_map={"a": 0, "b": "cpu"}), "0, cpu"),  # put off: weights are elsewhere until used
        (on("meta", device_map={"": "disk"}), "disk"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_models_in_several_places(model, named, world_size):
    with pytest.raises(ValueError, match=f"The model is spread over {named} .*load it without device_map"):
        check_placement(model, process("cuda:0", world_size))


def test_a_model_on_the_device_of_another_process():
    model = on("cuda:0", device_map={"": 0})
    with pytest.raises(
        ValueError, match=r"The model of process 1 lies on cuda:0 .*works on cuda:1.*without device_map"
    ):
        check_placement(model, process("cuda:1"))
    check_placement(model, process("cuda:1", world_size=1))


@pytest.mark.parametrize("how", [{"tp_size": 2}, {"tp_size": None, "is_distributed_loading_by_transformers": True}])
def test_a_model_that_was_cut_when_it_was_loaded(how):
    with pytest.raises(ValueError, match=r"sharded between processes when it was loaded .*fsdp2.yaml"):
        check_placement(on("cpu", **how), process("cpu"))


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_trainer_looks_at_both_models(which, tmp_path):
    spread = tiny.llama()
    spread.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="The model is spread over cpu, disk"):
        tiny.trainer(tmp_path, parts={which: spread})


# --- the order of a stream ---


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_a_stream_cannot_be_ordered_by_length(strategy, tmp_path):
    stream = tiny.dataset().to_iterable_dataset()
    with pytest.raises(ValueError, match=f"--train_sampling_strategy {strategy} .*without --streaming"):
        tiny.trainer(tmp_path, train=stream, train_sampling_strategy=strategy)


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_a_stream_in_its_own_order(strategy, tmp_path):
    stream = tiny.dataset().to_iterable_dataset()
    assert tiny.trained(tmp_path, train=stream, train_sampling_strategy=strategy).state.global_step == 4


# --- what needs a GPU ---


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_activations_on_the_host_change_nothing(layout, tmp_path, monkeypatch):
    """To the bit: they are copied away and back. (Here from the host to the host, for which the option is refused.)"""
    moved: list[torch.Size] = []
    stays = offloading.ActivationsOnHost._stays

    def counted(self, tensor):
        stay = stays(self, tensor)
        moved.extend([] if stay else [tensor.shape])
        return stay

    monkeypatch.setattr(offloading.ActivationsOnHost, "_stays", counted)
    monkeypatch.setattr(offloading, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(offloading, "SMALLEST", 0)
    plain = tiny.trained(tmp_path, layout=layout)
    assert moved == []
    args = tiny.config(tmp_path, layout=layout)
    args.activation_offloading = True
    offloaded = tiny.trained(tmp_path, parts={"args": args})
    assert len(moved) > 30
    tiny.assert_same_weights(tiny.weights(offloaded.model), tiny.weights(plain.model))


def test_liger_without_its_package(monkeypatch):
    """On a GPU, as far as the config can see."""
    monkeypatch.setattr(DPOConfig, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(config_checks, "is_liger_kernel_available", lambda: False)
    message = refused(use_liger_kernel=True)
    assert "--use_liger_kernel needs liger-kernel" in message
    assert "pip install liger-kernel" in message
    monkeypatch.setattr(config_checks, "is_liger_kernel_available", lambda: True)
    assert tiny.config("out", use_liger_kernel=True).use_liger_kernel
    assert tiny.config("out", activation_offloading=True).activation_offloading
