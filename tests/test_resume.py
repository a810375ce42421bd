"""A resumed run is the run that was interrupted, to the bit; a checkpoint of another run is refused."""

from __future__ import annotations

import copy
import errno
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from dpo_trainer import DPOTrainer, register_loss
from dpo_trainer.checkpointing import ASIDE, MANIFEST, CheckpointError, broken_file
from dpo_trainer.checkpointing.run_state import STATE_FILE, TENSORS_FILE
from dpo_trainer.types import PairLogps

TIMES = re.compile(r"runtime|_per_second|train_loss|total_flos")
"""What a log line says about the clock, or about one call of `train` alone; `total_flos` is compared by itself."""


# --- runs: 22 rows in micro-batches of 2, two to a step, make epochs of 6 steps; the last has one micro-batch ---


def small(**how: Any) -> LlamaForCausalLM:
    return tiny.llama(**{"num_hidden_layers": 1, **how})


def build(folder: Path, **how: Any) -> DPOTrainer:
    """A new trainer of a new model. Saved after steps 2, 4 and 6, logged after 3 and 6: a checkpoint of step 2 or 4 lies
    within an epoch and within a logging window."""
    defaults: dict[str, Any] = {
        "model": small(),
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "max_steps": 6,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    return tiny.trainer(folder, **{**defaults, **how})


class SaveAt(TrainerCallback):
    def __init__(self, steps: list[int]):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


class StepsMade(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@dataclass(repr=False)
class Outcome:
    """All that a run leaves behind."""

    steps: list[int]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """Of the optimizer and of the reference."""
    plain: dict[str, Any]
    """Scheduler, objective, counters, log lines, and the state of three random number generators."""


def outcome(trainer: DPOTrainer, steps: list[int]) -> Outcome:
    groups = trainer.optimizer.state_dict()
    state = trainer.state
    kind, numbers, *rest = np.random.get_state(legacy=True)
    return Outcome(
        steps=steps,
        weights=tiny.weights(trainer.model),
        tensors={
            **{f"optimizer {at} {key}": v.clone() for at, own in groups["state"].items() for key, v in own.items()},
            **{f"reference {name}": v.clone() for name, v in trainer.reference.state().items()},
            "rng torch": torch.get_rng_state(),
            "rng numpy": torch.from_numpy(np.asarray(numbers, dtype=np.int64)),
        },
        plain={
            "groups": groups["param_groups"],
            "scheduler": trainer.lr_scheduler.state_dict(),
            "objective": trainer.loss_objective.state_dict(),
            "num_tokens": trainer.num_tokens,
            "skipped": trainer.skipped_steps,
            "progress": (state.global_step, state.epoch, state.best_metric, state.best_global_step),
            "flos": state.total_flos,
            "log": [{k: v for k, v in line.items() if not TIMES.search(k)} for line in state.log_history],
            "rng": (kind, *rest, random.getstate()),
        },
    )


def run(trainer: DPOTrainer, resume: str | Path | bool | None = None) -> Outcome:
    made = StepsMade()
    trainer.add_callback(made)
    # A resumed process has drawn other numbers before it trains than the first one had.
    for _ in range(3 if resume else 0):
        torch.rand(5), random.random(), np.random.rand()
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return outcome(trainer, made.steps)


def assert_same(got: Outcome, want: Outcome) -> None:
    """To the bit."""
    tiny.assert_same_weights(got.weights, want.weights)
    assert got.tensors.keys() == want.tensors.keys()
    assert [name for name in want.tensors if not torch.equal(got.tensors[name], want.tensors[name])] == []
    for name, value in want.plain.items():
        assert got.plain[name] == value, name


@dataclass
class Cell:
    """A kind of run, and the steps whose checkpoints it is resumed from."""

    how: Callable[[Path], dict[str, Any]]
    resume_at: list[int] = field(default_factory=lambda: [2])
    random_matters: bool = False
    """Whether the steps draw random numbers."""


def options(**how: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: how


def fresh_lora(**config: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"parts": {"peft_config": tiny.lora(**config)}}


def trained_adapter(name: str = "default", **config: Any) -> PeftModel:
    """A model with an adapter that is far from zero."""
    model = get_peft_model(small(), tiny.lora(**config), adapter_name=name)
    tiny.fill_adapters(model)
    return model


def with_trained_embedding() -> PeftModel:
    """An adapter, and beside it a weight of the model itself that is trained."""
    model = trained_adapter()
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def both(*made: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {key: value for one in made for key, value in one(folder).items()}


def stream(n: int) -> Iterator[dict[str, str]]:
    yield from tiny.rows(n)


def streaming(n: int) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"train": IterableDataset.from_generator(stream, gen_kwargs={"n": n})}


def evaluating(folder: Path) -> dict[str, Any]:
    return {"eval_strategy": "steps", "eval_steps": 1, "parts": {"eval_dataset": tiny.dataset(5, seed=5)}}


def explicit_reference(folder: Path) -> dict[str, Any]:
    return {"parts": {"ref_model": small(seed=7)}}


def one_cache(folder: Path) -> dict[str, Any]:
    """The same for the run and the resumed one."""
    return {"precompute_ref_log_probs": True, "ref_cache_dir": str(folder.parent / "cache")}


def own_cache(folder: Path) -> dict[str, Any]:
    """The resumed run finds nothing in its cache, and has to compute everything again."""
    return {"precompute_ref_log_probs": True, "ref_cache_dir": str(folder / "cache")}


@register_loss("nan_for_a_long_chosen")
def nan_for_a_long_chosen(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """NaN for the pair whose chosen completion has more than 30 tokens."""
    margin = policy.margin() - reference.margin()
    return -beta * margin + torch.where(policy.chosen_lengths > 30, math.nan, 0.0)


def with_a_bad_row(folder: Path) -> dict[str, Any]:
    """Its first step is left out: row 1 is in it."""
    rows = tiny.rows(22)
    rows[1]["chosen"] = " " + "a" * 40
    return {
        "train": Dataset.from_list(rows),
        "train_sampling_strategy": "sequential",
        "loss_type": ["bco_pair", "nan_for_a_long_chosen"],
        "nonfinite": "skip",
    }


short = options(train=tiny.dataset(10), max_steps=-1, num_train_epochs=2, logging_steps=4)
"""Two shuffled epochs of 3 steps; the last step of each has one micro-batch."""
moving = options(sync_ref_model=True, ref_model_mixup_alpha=0.3)
KINDS = {
    "full": options(),
    "lora with dropout": fresh_lora(lora_dropout=0.1),
    "continued lora": lambda folder: {"model": trained_adapter()},
}

CELLS: dict[str, Cell] = {
    **{
        f"{kind}, {layout}": Cell(
            both(how, options(layout=layout)), [2, 4] if layout == "flat" else [2], kind == "lora with dropout"
        )
        for layout in ("flat", "padded")
        for kind, how in KINDS.items()
    },
    "epochs": Cell(short, [3, 5]),  # behind the first, within the second
    "epochs, saved by epochs": Cell(both(short, options(save_strategy="epoch")), [3]),
    "epochs, group_by_length": Cell(both(short, options(train_sampling_strategy="group_by_length")), [2, 5]),
    "checkpointing": Cell(
        both(fresh_lora(lora_dropout=0.1), options(gradient_checkpointing=True)), random_matters=True
    ),
    "model dropout": Cell(
        lambda folder: {"model": small(attention_dropout=0.2), "disable_dropout": False}, random_matters=True
    ),
    "neftune": Cell(options(neftune_noise_alpha=5.0), random_matters=True),
    "bco_pair": Cell(options(loss_type="bco_pair")),
    "precompute": Cell(one_cache),
    "precompute, another cache": Cell(own_cache),
    "precompute, lora": Cell(both(fresh_lora(), one_cache)),
    "precompute, continued lora": Cell(lambda folder: {"model": trained_adapter(), **own_cache(folder)}),
    "explicit reference": Cell(explicit_reference),
    "explicit reference, lora": Cell(
        lambda folder: {"parts": {"peft_config": tiny.lora(), "ref_model": small(seed=7)}}
    ),
    "adapter of another name": Cell(lambda folder: {"model": trained_adapter("style")}),
    "moving at each step": Cell(both(moving, options(ref_model_sync_steps=1))),
    "moving": Cell(both(moving, options(ref_model_sync_steps=3)), [2, 4]),  # before its first move, and after
    "moving at each step, lora": Cell(both(fresh_lora(), moving, options(ref_model_sync_steps=1))),
    "moving, lora": Cell(both(fresh_lora(), moving, options(ref_model_sync_steps=3)), [2, 4]),
    "moving by epochs": Cell(both(short, moving, options(ref_model_sync_epochs=1)), [2, 3, 4]),
    "stream": Cell(streaming(40)),
    "stream, second pass": Cell(streaming(16), [5]),  # a pass is 4 steps
    "modules_to_save": Cell(fresh_lora(modules_to_save=["lm_head"])),
    "weights beside the adapter": Cell(lambda folder: {"model": with_trained_embedding()}),
    "tied weights": Cell(lambda folder: {"model": small(tie_word_embeddings=True)}),
    "a step left out": Cell(with_a_bad_row),
    "evaluation": Cell(evaluating),
    "best model": Cell(
        both(evaluating, options(load_best_model_at_end=True, save_strategy="steps", eval_steps=2, save_total_limit=2))
    ),
    "workers": Cell(options(dataloader_num_workers=1)),
}


class Runs:
    """Each uninterrupted run is made once, and saves what it is resumed from."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[str, Outcome] = {}

    def whole(self, name: str) -> tuple[Path, Outcome]:
        folder, cell = self.root / re.sub(r"\W+", "_", name) / "whole", CELLS[name]
        if name not in self.made:
            trainer = build(folder, **{"save_strategy": "no", **cell.how(folder)})
            if trainer.args.save_strategy == "no":
                trainer.add_callback(SaveAt(cell.resume_at))
            self.made[name] = run(trainer)
        return folder, self.made[name]

    def resumed(self, name: str, folder: Path, checkpoint: Path, **how: Any) -> Outcome:
        return run(build(folder, **{"save_strategy": "no", **CELLS[name].how(folder), **how}), resume=checkpoint)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def kept(folder: Path, step: int) -> Path:
    """A checkpoint of a whole run."""
    checkpoint = folder / f"checkpoint-{step}"
    assert broken_file(checkpoint) is None
    return checkpoint


@pytest.mark.parametrize(("name", "step"), [(name, at) for name, cell in CELLS.items() for at in cell.resume_at])
def test_resumed_equals_uninterrupted(name, step, runs):
    folder, want = runs.whole(name)
    assert want.steps == [1, 2, 3, 4, 5, 6]
    got = runs.resumed(name, folder.parent / f"from{step}", kept(folder, step))
    assert got.steps == want.steps[step:], "it went on, neither from the start nor from the end"
    assert_same(got, want)


@pytest.mark.parametrize("name", ["full, flat", "lora with dropout, flat"])
def test_a_run_that_saves_is_the_run_that_does_not(name, runs, tmp_path):
    """So that an uninterrupted run may be one that saved on its way."""
    _, want = runs.whole(name)
    assert_same(run(build(tmp_path, **{**CELLS[name].how(tmp_path), "save_strategy": "no"})), want)


# --- the comparison sees what it should ---


def without(checkpoint: Path, folder: Path, *names: str) -> Path:
    """A copy that lacks some files."""
    shutil.copytree(checkpoint, folder)
    for name in names:
        (folder / name).unlink()
    return folder


def far(one: Outcome, other: Outcome) -> bool:
    return tiny.moved(one.weights, other.weights) > 1e-5


@pytest.mark.parametrize(
    "name", [name for name, cell in CELLS.items() if cell.random_matters and "padded" not in name]
)
def test_random_state_matters_where_steps_draw_numbers(name, runs, tmp_path):
    folder, want = runs.whole(name)
    checkpoint = without(kept(folder, 2), tmp_path / "checkpoint-2", "rng_state.pth")
    assert far(runs.resumed(name, tmp_path / "run", checkpoint, force_resume=True), want)


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "delta of bco_pair": ("bco_pair", lambda state: state["objective"]["delta"].update(mean=0.0, count=0.0)),
    "num_tokens": ("full, flat", lambda state: state.update(num_tokens=0)),
    "since_last_log": ("full, flat", lambda state: state["since_last_log"].update(names=[], rows=[[0, 0]])),
    "skipped_steps": ("a step left out", lambda state: state.update(skipped_steps=0)),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_state_matters(part, runs, tmp_path):
    """A checkpoint whose state is wrong in one place resumes to another outcome."""
    name, spoil = PARTS[part]
    folder, want = runs.whole(name)
    checkpoint = without(kept(folder, 2), tmp_path / "checkpoint-2")
    content = json.loads((checkpoint / STATE_FILE).read_text())
    if part == "num_tokens":
        assert content["state"]["num_tokens"] == 0, "nothing was logged yet: the tokens are in since_last_log"
        checkpoint = without(kept(folder, 4), tmp_path / "checkpoint-4")
        content = json.loads((checkpoint / STATE_FILE).read_text())
    spoil(content["state"])
    (checkpoint / STATE_FILE).write_text(json.dumps(content))
    got = runs.resumed(name, tmp_path / "run", checkpoint, force_resume=True)
    with pytest.raises(AssertionError):
        assert_same(got, want)


@pytest.mark.parametrize("name", ["moving", "moving, lora"])
def test_the_moved_reference_matters(name, runs, tmp_path):
    folder, want = runs.whole(name)
    at_2, at_4 = (load_file(kept(folder, step) / TENSORS_FILE) for step in (2, 4))
    assert tiny.moved(at_2, at_4) > 1e-3, "it moved at step 3"
    checkpoint = without(kept(folder, 4), tmp_path / "checkpoint-4")
    shutil.copy(kept(folder, 2) / TENSORS_FILE, checkpoint)
    assert far(runs.resumed(name, tmp_path / "run", checkpoint, force_resume=True), want)


def test_the_step_left_out_lies_before_the_save(runs):
    folder, want = runs.whole("a step left out")
    assert want.plain["skipped"] == 1
    assert json.loads((kept(folder, 2) / STATE_FILE).read_text())["state"]["skipped_steps"] == 1


def test_the_best_checkpoint_is_named_as_it_is_called(runs):
    folder, want = runs.whole("best model")
    state = json.loads((kept(folder, 6) / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best == folder / f"checkpoint-{state['best_global_step']}"
    assert broken_file(best) is None
    tiny.assert_same_weights(want.weights, load_file(best / "model.safetensors"))


# --- ends of a run ---


def test_auto_keeps_going_in_one_folder_and_keeps_one_checkpoint(runs, tmp_path):
    """Killed twice, once before anything was saved: three processes, one command, one run."""
    _, want = runs.whole("full, flat")
    for step, there in ((2, []), (4, ["checkpoint-2"])):
        trainer = build(tmp_path, save_total_limit=1, parts={"callbacks": [tiny.KillAt(step)]})
        with pytest.raises(tiny.Killed):
            trainer.train(resume_from_checkpoint="auto")
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == there
    got = run(build(tmp_path, save_total_limit=1), "auto")
    assert got.steps == [3, 4, 5, 6]
    assert_same(got, want)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / ASIDE).exists()


@pytest.mark.parametrize("max_steps", [4, 6], ids=["within an epoch", "at its end"])
def test_a_finished_run_is_not_trained_further(max_steps, runs, tmp_path):
    """The same command once more, as a scheduler gives it that saw no exit code."""
    want = run(build(tmp_path, max_steps=max_steps))
    got = run(build(tmp_path, max_steps=max_steps), "auto")
    assert got.steps == []
    tiny.assert_same_weights(got.weights, want.weights)


@pytest.mark.parametrize("name", ["full, flat", "moving at each step"])
def test_the_same_trainer_resumes(name, runs, tmp_path):
    """In a notebook: interrupted, and asked to go on, without a new trainer."""
    _, want = runs.whole(name)
    trainer = build(tmp_path, **CELLS[name].how(tmp_path), parts={"callbacks": [tiny.KillAt(4)]})
    with pytest.raises(tiny.Killed):
        trainer.train()
    trainer.remove_callback(tiny.KillAt)
    got = run(trainer, kept(tmp_path, 2))
    got.plain["flos"] = want.plain["flos"]  # those of the killed step were computed, after all
    assert_same(got, want)


# --- what is saved ---

ALWAYS = {"trainer_state.json", "training_args.json", MANIFEST, "README.md"}
TO_RESUME = {"optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = {
    "full": {"model.safetensors", "config.json", "generation_config.json"},
    "adapter": {"adapter_model.safetensors", "adapter_config.json"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{(kind, whether the model alone): checkpoint of a run of 2 steps}"""
    root = tmp_path_factory.mktemp("saved")
    checkpoints = {}
    for kind in MODEL:
        for only in (False, True):
            parts = {"peft_config": tiny.lora()} if kind == "adapter" else {}
            build(root / f"{kind}-{only}", max_steps=2, save_only_model=only, parts=parts).train()
            checkpoints[kind, only] = kept(root / f"{kind}-{only}", 2)
    return checkpoints


@pytest.mark.parametrize("only", [False, True], ids=["with optimizer", "save_only_model"])
@pytest.mark.parametrize("kind", MODEL)
def test_what_a_checkpoint_holds(kind, only, saved):
    checkpoint = saved[kind, only]
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert files == ALWAYS | TOKENIZER | MODEL[kind] | (set() if only else TO_RESUME)
    for name in files & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}:
        with safe_globals():  # of NumPy's arrays, as transformers reads it
            assert torch.load(checkpoint / name, weights_only=True)
    assert json.loads((checkpoint / "training_args.json").read_text())["learning_rate"] == 1e-2


@pytest.mark.parametrize("only", [False, True], ids=["with optimizer", "save_only_model"])
@pytest.mark.parametrize("kind", MODEL)
def test_a_checkpoint_is_a_model_to_plain_libraries(kind, only, saved):
    checkpoint = saved[kind, only]
    if kind == "full":
        loaded, start = AutoModelForCausalLM.from_pretrained(checkpoint), small()
        want = load_file(checkpoint / "model.safetensors")
    else:
        loaded, start = PeftModel.from_pretrained(small(), checkpoint), get_peft_model(small(), tiny.lora())
        held = load_file(checkpoint / "adapter_model.safetensors")
        want = {name.replace(".weight", ".default.weight"): weight for name, weight in held.items()}
    got = tiny.weights(loaded)
    tiny.assert_same_weights({name: got[name] for name in want}, want)
    assert tiny.moved(tiny.weights(start), got) > 1e-3, "trained"


@pytest.mark.parametrize(
    "secret",
    [{"hub_token": "very-secret"}, {"model_init_kwargs": {"token": "very-secret"}}],
    ids=["hub_token", "model_init_kwargs"],
)
def test_secrets_are_not_saved(secret, tmp_path):
    small().save_pretrained(tmp_path / "base")
    build(tmp_path / "run", model=str(tmp_path / "base"), max_steps=2, **secret).train()
    kept(tmp_path / "run", 2)
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"very-secret" in p.read_bytes()] == []


def test_arguments_that_json_cannot_hold_do_not_end_the_run(tmp_path):
    """A function is legal there, and the first save would be a late moment to find out."""
    how = {"use_reentrant": False, "context_fn": noop_context_fn}
    build(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=how, max_steps=2).train()
    json.loads((kept(tmp_path, 2) / "training_args.json").read_text())


@pytest.mark.parametrize("word", ["true", "path"])
def test_save_only_model_does_not_resume(word, saved):
    checkpoint = saved["full", True]
    where = str(checkpoint) if word == "path" else word
    with pytest.raises(ValueError, match=r"has no dpo_state\.json: it was written with --save_only_model"):
        build(checkpoint.parent).train(resume_from_checkpoint=where)


# --- another run ---


def refused(folder: Path, checkpoint: Path, **how: Any) -> str:
    """The message. Nothing was trained, nothing was saved."""
    trainer = build(folder, **how)
    made = StepsMade()
    trainer.add_callback(made)
    with pytest.raises(ValueError) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert made.steps == []
    assert list(folder.glob("checkpoint-*")) == []
    return str(caught.value)


def over(name: str, folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """`how`, over what the run `name` was made with; nothing that a trainer may change is shared between two."""
    own = CELLS[name].how(folder)
    return copy.deepcopy({**own, **how, "parts": {**own.get("parts", {}), **how.get("parts", {})}})


def one_row_changed() -> Dataset:
    rows = tiny.rows(22)
    rows[14]["rejected"] += "!"  # of step 5
    return Dataset.from_list(rows)


FULL, LORA, LORA_AND_MODEL = "full, flat", "lora with dropout, flat", "explicit reference, lora"
ANOTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "one row": (FULL, {"train": one_row_changed()}, "the training data"),
    "order of rows": (FULL, {"train": tiny.dataset().select(range(21, -1, -1))}, "the training data"),
    "a row less": (FULL, {"train": tiny.dataset().select(range(21))}, "the training data"),
    "max_length": (FULL, {"max_length": 20}, "the training data"),
    "beta": (FULL, {"beta": 0.2}, "beta: 0.1 there, 0.2 here"),
    "label_smoothing": (
        FULL,
        {"label_smoothing": 0.1},
        r"label_smoothing': 0\.0.* there, .*label_smoothing': 0\.1.* here",
    ),
    "loss_type": (FULL, {"loss_type": "ipo"}, r"sigmoid.* there, .*ipo.* here"),
    "rpo_alpha": (FULL, {"rpo_alpha": 0.5}, r"rpo_alpha: None there, 0\.5 here"),
    "reference": (FULL, {"parts": {"ref_model": small(seed=7)}}, "the reference model"),
    "base of an adapter": (LORA, {"model": small(seed=9)}, "the reference model"),
    "base beside a reference": (LORA_AND_MODEL, {"model": small(seed=9)}, "the weights below the adapter"),
}


@pytest.mark.parametrize("what", ANOTHER)
def test_another_run_is_refused_unless_forced(what, runs, tmp_path, caplog):
    name, how, said = ANOTHER[what]
    folder, want = runs.whole(name)
    checkpoint = kept(folder, CELLS[name].resume_at[-1])
    message = refused(tmp_path / "refused", checkpoint, **over(name, tmp_path, how))
    assert str(checkpoint) in message
    assert re.search(said, message)
    assert "--force_resume true" in message
    if what not in ("one row", "beta", "reference"):
        return  # what is forced does not depend on the option
    caplog.clear()
    got = run(build(tmp_path / "forced", force_resume=True, **over(name, tmp_path, how)), checkpoint)
    assert got.steps == [5, 6]
    warned = [text for text in caplog.messages if "--force_resume: going on" in text]
    assert len(warned) == 1
    assert re.search(said, warned[0])
    assert far(got, want), "it was another run indeed"


OTHER_MODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden size": (FULL, {"model": small(hidden_size=64)}),
    "layers": (FULL, {"model": small(num_hidden_layers=2)}),
    "rank": (LORA, {"parts": {"peft_config": tiny.lora(r=8, lora_dropout=0.1)}}),
    "targets": (LORA, {"parts": {"peft_config": tiny.lora(target_modules=["q_proj"], lora_dropout=0.1)}}),
    "name of the adapter": ("continued lora, flat", {"model": trained_adapter("style")}),
    "full for lora": (LORA, {"parts": {"peft_config": None}}),
    "lora for full": (FULL, {"parts": {"peft_config": tiny.lora()}}),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", OTHER_MODEL)
def test_another_model_is_never_resumed(what, force, runs, tmp_path):
    name, how = OTHER_MODEL[what]
    folder, _ = runs.whole(name)
    message = refused(tmp_path, kept(folder, 4), force_resume=force, **over(name, tmp_path, how))
    assert "the model (class, names and shapes of its weights)" in message
    assert "--force_resume" not in message, "it would not help"


@pytest.mark.parametrize("scale", [{"lora_alpha": 64}, {"use_rslora": True}], ids=str)
def test_another_scale_of_the_adapter_is_another_run(scale, runs, tmp_path):
    """The same weights, and another function: rewards would jump where the run goes on."""
    folder, _ = runs.whole(LORA)
    refused(tmp_path, kept(folder, 4), parts={"peft_config": tiny.lora(lora_dropout=0.1, **scale)})


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", MODEL)
def test_a_moving_reference_needs_a_checkpoint_with_one(kind, force, saved, tmp_path):
    parts = {"peft_config": tiny.lora()} if kind == "adapter" else {}
    how = {"sync_ref_model": True, "ref_model_sync_steps": 1, "force_resume": force, "parts": parts}
    assert re.search("moving reference|the reference model", refused(tmp_path, saved[kind, False], **how))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["moving at each step", "moving at each step, lora"])
def test_a_checkpoint_with_a_moving_reference_needs_one(name, force, runs, tmp_path):
    folder, _ = runs.whole(name)
    parts = CELLS[name].how(folder).get("parts", {})
    message = refused(tmp_path, kept(folder, 2), parts=parts, force_resume=force)
    assert re.search("resume with --sync_ref_model|the reference model", message)


def test_a_loss_with_other_state_is_refused_even_if_forced(runs, tmp_path):
    folder, _ = runs.whole(FULL)
    message = refused(tmp_path, kept(folder, 2), loss_type="bco_pair", force_resume=True)
    assert "another --loss_type" in message


def test_another_optimizer_says_so(runs, tmp_path):
    folder, _ = runs.whole(FULL)
    assert "--optim" in refused(tmp_path, kept(folder, 2), optim="sgd")


# --- the same run, with other options ---


def test_what_does_not_touch_the_weights_may_change(runs, tmp_path):
    folder, want = runs.whole(FULL)
    how = {"logging_first_step": True, "save_strategy": "epoch", "eval_strategy": "epoch", "run_name": "again"}
    got = run(build(tmp_path, **how, parts={"eval_dataset": tiny.dataset(4, seed=5)}), kept(folder, 2))
    tiny.assert_same_weights(got.weights, want.weights)
    assert any("eval_loss" in line for line in got.plain["log"])


def test_another_evaluation_set_is_the_same_run(runs, tmp_path):
    folder, want = runs.whole("evaluation")
    how = {**evaluating(tmp_path), "parts": {"eval_dataset": tiny.dataset(3)}}
    got = run(build(tmp_path, **how), kept(folder, 2))
    tiny.assert_same_weights(got.weights, want.weights)
    assert got.plain["log"] != want.plain["log"]


def test_a_run_goes_on_beyond_the_steps_it_was_planned_for(tmp_path):
    """At a constant rate, 2 of 2 steps and then 4 of 6 are 6 steps."""
    constant = {"lr_scheduler_type": "constant"}
    want = run(build(tmp_path / "whole", **constant))
    run(build(tmp_path / "short", max_steps=2, **constant))
    assert_same(run(build(tmp_path / "long", **constant), kept(tmp_path / "short", 2)), want)


def test_another_learning_rate_is_taken(runs, tmp_path):
    """The cosine of the new rate, where step 3 and step 6 of 6 stand on it: (1 + cos(2 pi / 6)) / 2 and (1 + cos(5 pi / 6)) / 2."""
    folder, _ = runs.whole(FULL)
    trainer = build(tmp_path, learning_rate=1e-3)
    run(trainer, kept(folder, 2))
    rates = [line["learning_rate"] for line in tiny.log_lines(trainer)]
    assert rates == pytest.approx([0.75e-3, 0.066987298e-3], rel=1e-6)  # as many digits as are written here


def test_another_weight_decay_is_taken(runs, tmp_path):
    folder, want = runs.whole(FULL)
    assert far(run(build(tmp_path, weight_decay=50.0), kept(folder, 2)), want)


def test_other_steps_of_logging_saving_and_evaluation_are_taken(runs, tmp_path):
    folder, _ = runs.whole(FULL)
    how = {"logging_steps": 1, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    trainer = build(tmp_path, **how, parts={"eval_dataset": tiny.dataset(4, seed=5)})
    run(trainer, kept(folder, 2))
    assert [line["step"] for line in tiny.log_lines(trainer)] == [3, 4, 5, 6]
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [4, 6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    "how",
    [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 1}, {"seed": 7}, {"data_seed": 7}],
    ids=lambda how: next(iter(how)),
)
def test_rows_are_not_taken_twice_nor_left_out_without_a_word(how, runs, tmp_path, caplog):
    """A step is so many rows of one order: with other steps or another order, the rows already seen are others."""
    folder, _ = runs.whole(FULL)
    try:
        run(build(tmp_path, max_steps=3, **how), kept(folder, 2))
    except ValueError as error:
        said = str(error)
    else:
        said = "\n".join(caplog.messages)
    assert next(iter(how)) in said


# --- which checkpoint ---


def test_auto_begins_where_there_is_none(runs, tmp_path):
    _, want = runs.whole(FULL)
    got = run(build(tmp_path / "new"), "auto")
    assert got.steps == want.steps
    tiny.assert_same_weights(got.weights, want.weights)


@pytest.mark.parametrize("word", [True, "true"])
def test_true_wants_one(word, tmp_path):
    with pytest.raises(
        ValueError, match=r"--resume_from_checkpoint true: there is no complete checkpoint in .*Say auto"
    ):
        build(tmp_path).train(resume_from_checkpoint=word)


def with_two_checkpoints(runs: Runs, folder: Path) -> Path:
    for step in (2, 4):
        shutil.copytree(kept(runs.whole(FULL)[0], step), folder / f"checkpoint-{step}")
    return folder


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "optimizer.pt": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "rng_state.pth": Path.unlink,
    STATE_FILE: lambda file: file.write_text("{}"),
    MANIFEST: lambda file: file.write_text("["),
}


@pytest.mark.parametrize(("name", "word"), [("model.safetensors", "auto"), (MANIFEST, True)])
def test_a_broken_checkpoint_is_skipped_with_a_warning(name, word, runs, tmp_path, caplog):
    _, want = runs.whole(FULL)
    folder = with_two_checkpoints(runs, tmp_path)
    DAMAGE[name](folder / "checkpoint-4" / name)
    got = run(build(folder), word)
    assert any("checkpoint-4 is skipped" in text and name in text for text in caplog.messages)
    assert got.steps == [3, 4, 5, 6]
    assert_same(got, want)
    kept(folder, 4)  # written anew


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_checkpoint_that_was_named_is_refused(name, runs, tmp_path):
    folder = with_two_checkpoints(runs, tmp_path / "run")
    DAMAGE[name](folder / "checkpoint-4" / name)
    message = refused(tmp_path / "new", folder / "checkpoint-4")
    assert str(folder / "checkpoint-4") in message
    assert name in message
    assert f"Complete ones: {folder / 'checkpoint-2'}" in message


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "it is not a folder" in refused(tmp_path / "a", tmp_path / "file")
    assert "it does not exist" in refused(tmp_path / "b", tmp_path / "nowhere")
    assert f"it has no {MANIFEST}" in refused(tmp_path / "c", tmp_path / "empty")


@pytest.mark.parametrize("force", [False, True])
def test_a_checkpoint_of_plain_transformers(force, runs, tmp_path):
    checkpoint = without(kept(runs.whole(FULL)[0], 2), tmp_path / "checkpoint-2", MANIFEST, STATE_FILE)
    message = refused(tmp_path / "new", checkpoint, force_resume=force)
    assert str(checkpoint) in message
    assert "not by DPOTrainer" in message or "not written by DPOTrainer" in message


@pytest.mark.parametrize("name", [STATE_FILE, "optimizer.pt", "model.safetensors"])
def test_a_forced_checkpoint_that_cannot_be_read_is_named(name, runs, tmp_path):
    checkpoint = without(kept(runs.whole(FULL)[0], 2), tmp_path / "checkpoint-2")
    (checkpoint / name).write_text("{")
    message = refused(tmp_path / "new", checkpoint, force_resume=True)
    assert name in message
    assert str(checkpoint) in message


MOVING_STATE = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", TENSORS_FILE]


@pytest.mark.parametrize("name", MOVING_STATE)
@pytest.mark.parametrize("content", [b"", b"{", bytes(100)], ids=["empty", "a bracket", "zeros"])
def test_every_file_of_the_state_is_named_where_it_cannot_be_read(name, content, runs, tmp_path):
    checkpoint = without(kept(runs.whole("moving")[0], 2), tmp_path / "checkpoint-2")
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        runs.resumed("moving", tmp_path / "new", checkpoint, force_resume=True)
    assert name in str(error.value)
    assert str(checkpoint) in str(error.value)
    assert not (name == "scheduler.pt" and "optimizer.pt" in str(error.value)), "that one is whole"


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", TENSORS_FILE])
def test_a_forced_checkpoint_without_a_file_of_the_state_is_refused(name, runs, tmp_path):
    """Without scheduler.pt `Trainer` began anew: at a learning rate of 0, with a warmup."""
    checkpoint = without(kept(runs.whole("moving")[0], 2), tmp_path / "checkpoint-2", name)
    with pytest.raises(ValueError) as error:
        runs.resumed("moving", tmp_path / "new", checkpoint, force_resume=True)
    assert name in str(error.value)
    assert str(checkpoint) in str(error.value)


def test_a_state_without_an_entry_is_named(runs, tmp_path):
    checkpoint = without(kept(runs.whole(FULL)[0], 2), tmp_path / "checkpoint-2")
    content = json.loads((checkpoint / STATE_FILE).read_text())
    del content["state"]["skipped_steps"]
    (checkpoint / STATE_FILE).write_text(json.dumps(content))
    message = refused(tmp_path / "new", checkpoint, force_resume=True)
    assert STATE_FILE in message
    assert str(checkpoint) in message


def test_random_numbers_that_are_not_there_are_told(runs, tmp_path, caplog):
    checkpoint = without(kept(runs.whole(FULL)[0], 2), tmp_path / "checkpoint-2", "rng_state.pth")
    runs.resumed(FULL, tmp_path / "run", checkpoint, force_resume=True)
    assert [text for text in caplog.messages if f"{checkpoint} has no rng_state.pth" in text] != []


# --- a full disk ---


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class FillDisk(TrainerCallback):
    """After the first checkpoint."""

    def __init__(self, patch: Callable[[], None]):
        self.patch = patch

    def on_save(self, args, state, control, **kwargs):
        self.patch()


WRITERS = {
    "model": "transformers.modeling_utils.safe_save_file",
    "optimizer": "torch.save",
    "state": "dpo_trainer.checkpointing.atomic.write_state",
    "manifest": "dpo_trainer.checkpointing.atomic.seal",
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_leaves_the_checkpoint_before(what, runs, tmp_path, monkeypatch):
    _, want = runs.whole(FULL)
    fill = FillDisk(lambda: monkeypatch.setattr(WRITERS[what], full_disk))
    with pytest.raises(CheckpointError) as caught:
        build(tmp_path, parts={"callbacks": [fill]}).train()
    monkeypatch.undo()
    said = str(caught.value)
    assert f"The checkpoint {tmp_path / 'checkpoint-4'} could not be written: No space left" in said
    assert "--save_total_limit" in said
    assert f"the last one is {tmp_path / 'checkpoint-2'}" in said
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / ASIDE).exists()
    kept(tmp_path, 2)
    if what != "optimizer":
        return  # what is left is the same
    got = run(build(tmp_path), "auto")
    assert got.steps == [3, 4, 5, 6]
    assert_same(got, want)
