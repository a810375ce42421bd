"""FSDP2 and DeepSpeed on two real processes equal one process without them: losses, metrics, weights, checkpoints.

The cells that differ most by engine; all of them with DPO_TRAINER_TEST_DISTRIBUTED=1 (`make test-distributed`). FSDP2 shards
on a CPU as it does on GPUs, except that its ways to and from a GPU are not taken.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

import tiny
from cells import CELLS, EVAL_ROWS, trained_weights
from engines import ENGINES
from launch import ATOL, MEANS, Alone, differences, farthest, together, tolerance

from dpo_trainer.checkpointing.run_state import refuse_another_run

pytestmark = pytest.mark.distributed

ALL = os.environ.get("DPO_TRAINER_TEST_DISTRIBUTED") == "1"

# DeepSpeed makes its step within backward, and takes no other model ahead of training.
NOT_DEEPSPEED = {"skipped step", "evaluated first"}

REDUCED = {
    "fsdp2": [
        "full flat accumulated",
        "lora padded",
        "short last batch",
        "evaluated first",
        "bf16",
        "cached full",
        "cached lora",
        "moving full",
        "moving lora",
        "budget accumulated",
        "resumed moving",
        "resumed lora",
    ],
    "zero1": ["full flat accumulated", "weighted bf16"],
    "zero2": ["full padded", "lora flat accumulated", "weighted bf16", "cached full", "budget", "resumed moving"],
    "zero3": [
        "full flat accumulated",
        "lora padded",
        "named full",
        "bf16",
        "cached full",
        "cached lora",
        "moving full",
        "budget lora",
        "resumed moving",
        "resumed lora",
    ],
}


def of(engine: str) -> list[str]:
    every = [name for name in CELLS if engine == "fsdp2" or name not in NOT_DEEPSPEED]
    return every if ALL else REDUCED[engine]


ENGINE_CELLS = [(engine, name) for engine in REDUCED for name in of(engine)]
RESUMED = [(engine, name) for engine, name in ENGINE_CELLS if name.startswith("resumed")]
CUT = ("fsdp2", "zero3")


class Runs:
    """Each engine is launched once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of = cache(self._run)
        self.on_one_rank = cache(self._resume_on_one_rank)

    def _run(self, engine: str) -> dict[str, Any]:
        (self.folder / engine).mkdir()
        return together(engine, self.folder / engine, of(engine))

    def _resume_on_one_rank(self, engine: str) -> dict[str, Any]:
        self.of(engine)
        names = [name for name in of(engine) if name.startswith("resumed")]
        return together(engine, self.folder / engine, names, ranks=1, write_checkpoint=False)

    def weights(self, engine: str, name: str) -> dict[str, Any]:
        return trained_weights(name, self.folder / engine)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Runs:
    pytest.importorskip("deepspeed")
    return Runs(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Alone:
    return Alone(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(("engine", "name"), ENGINE_CELLS)
def test_it_really_was_this_engine(engine, name, two):
    """A wrong launch exits with 0 as well, and FSDP2 on a CPU silently becomes DDP."""
    got, expected = two.of(engine)["engine"][name], ENGINES[engine]
    wrapper = "FSDPPeftModelForCausalLM" if engine == "fsdp2" and "lora" in name else expected.wrapper
    assert got == {
        "world_size": "2",
        "distributed_type": expected.distributed_type,
        "wrapper": wrapper,
        "stage": engine[4:] if engine.startswith("zero") else "none",
        "backend": "gloo",
    }
    share = two.of(engine)["share"][name]
    assert 0.45 < share < 0.6 if engine in CUT else share == 1.0  # a reference model counts as well


@pytest.mark.parametrize(("engine", "name"), ENGINE_CELLS)
def test_every_line_equals_one_process(engine, name, two, alone):
    want, got = alone.of(name), two.of(engine)["cells"][name]
    assert len(want["lines"]) == CELLS[name]["max_steps"] // CELLS[name].get("logging_steps", 1)
    for step, by_metric in enumerate(differences(got, want), start=1):
        assert "loss" in by_metric or name == "skipped step"
        assert max(by_metric.values(), default=0.0) <= tolerance(name), (step, by_metric)


@pytest.mark.parametrize(("engine", "name"), [case for case in ENGINE_CELLS if case[1] == "bf16"])
def test_policy_and_reference_round_alike(engine, name, two):
    """Both begin as the same model: ln 2, whatever the engine holds and computes them in."""
    assert two.of(engine)["cells"][name]["lines"][0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize(("engine", "name"), ENGINE_CELLS)
def test_trained_weights_equal_one_process(engine, name, two, alone):
    got, want = two.weights(engine, name), alone.weights(name)
    assert farthest(got, want) <= tolerance(name)
    if name.startswith("full"):
        assert tiny.moved(tiny.weights(tiny.llama()), want) > 100 * ATOL


@pytest.mark.parametrize(("engine", "name"), ENGINE_CELLS)
def test_evaluation_counts_every_pair_once(engine, name, two, alone):
    want, got = alone.of(name), two.of(engine)["cells"][name]
    means = [f"eval_{mean}" for mean in MEANS if f"eval_{mean}" in want["eval"]]
    limit = tolerance(name)
    assert {m: got["eval"][m] for m in means} == pytest.approx(
        {m: want["eval"][m] for m in means}, rel=limit, abs=limit
    )
    assert got["example_ids"] == list(range(EVAL_ROWS))


@pytest.mark.parametrize("engine", REDUCED)
def test_a_saved_model_loads_with_plain_transformers(engine, two):
    name = next(name for name in of(engine) if name.startswith("full"))
    saved = two.weights(engine, name)
    model = AutoModelForCausalLM.from_pretrained(two.folder / engine / name / "trained")
    assert farthest(dict(model.named_parameters()), saved) == 0
    assert tiny.moved(tiny.weights(tiny.llama()), saved) > 100 * ATOL


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_a_saved_adapter_loads_with_plain_peft(engine, two, alone):
    name = next(name for name in of(engine) if name.startswith("lora"))
    folder = two.folder / engine / name / "trained"
    model = PeftModel.from_pretrained(tiny.llama(), folder)
    loaded = [p for key, p in model.named_parameters() if "lora_B" in key]
    assert loaded
    assert all(p.abs().max() > 100 * ATOL for p in loaded)


@pytest.mark.parametrize(("engine", "name"), ENGINE_CELLS)
def test_a_run_is_known_by_the_same_numbers_under_every_engine(engine, name, two, alone):
    """The hash of the reference is over whole weights, although each rank holds a part of them."""
    got, want = two.of(engine)["cells"][name]["identity"], alone.of(name)["identity"]
    assert want["reference"] is not None
    # DeepSpeed rounds the weights themselves.
    rounded = {"reference": got["reference"]} if engine.startswith("zero") and "bf16" in name else {}
    assert got == want | rounded


@pytest.mark.parametrize("name", [name for engine, name in RESUMED if engine == "fsdp2"])
def test_two_processes_go_on_as_one(name, two, alone):
    """The checkpoint of two ranks, resumed by one that has the whole batch."""
    got = two.on_one_rank("fsdp2")
    assert got["engine"][name]["world_size"] == "1"
    for by_metric in differences(got["cells"][name], alone.of(name)):
        assert max(by_metric.values()) <= ATOL
    assert farthest(two.weights("fsdp2", name), alone.weights(name)) <= ATOL


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_goes_on_with_as_many_processes(engine, two):
    """Its checkpoints hold the optimizer in parts, one for each process. DeepSpeed itself would fail later, without a way out."""
    two.of(engine)
    checkpoint = two.folder / engine / "resumed moving" / "checkpoint-3"
    identity = json.loads((checkpoint / "dpo_state.json").read_text())["run"]
    refuse_another_run(str(checkpoint), identity, force=False)
    with pytest.raises(ValueError, match=r"the processes of DeepSpeed.*--num_processes: 2 there, 1 here"):
        refuse_another_run(str(checkpoint), identity | {"engine": {"--num_processes": 1}}, force=True)


@pytest.mark.parametrize("engine", REDUCED)
def test_nan_on_one_rank_stops_both(engine, two):
    here, there = two.of(engine)["nan"]
    assert "on another rank" in here
    assert "example_ids [2]" in there


@pytest.mark.parametrize("engine", REDUCED)
def test_a_signal_to_one_rank_stops_and_saves_on_both(engine, two):
    assert two.of(engine)["stopped"] == [[2, True, ["checkpoint-2"]]] * 2


@pytest.mark.parametrize(
    ("engine", "weights", "optimizer"),
    [("fsdp2", 4 / 2, 8 / 2), ("zero1", 2, (4 + 8) / 2), ("zero2", 2, (4 + 8) / 2), ("zero3", 2 / 2, (4 + 8) / 2)],
)
def test_ranks_hold_what_the_memory_table_says(engine, weights, optimizer, two):
    """Bytes per parameter, of the table in docs/scaling.md with N = 2: counted after a step of Adam in bfloat16."""
    held = two.of(engine)["held"]
    assert held == pytest.approx({"weights": weights, "optimizer": optimizer}, rel=0.01)  # parts are rounded up
