"""One run for each output folder: who may write there, whose checkpoints are resumed and retired, what earlier runs left."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import TrainerCallback

from dpo_trainer import DPOTrainer
from dpo_trainer.checkpointing import (
    ASIDE,
    MANIFEST,
    RECORD,
    broken_file,
    hold_folder,
    is_held_elsewhere,
    of_this_run,
    read_record,
    run_of,
    step_of,
    surplus,
)
from dpo_trainer.checkpointing.lock import HOLDER, LOCK
from dpo_trainer.checkpointing.run_state import STATE_FILE

HOLD = """
import json, os, sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire(timeout=0)
with open(sys.argv[2], "w") as file:
    json.dump({"pid": os.getpid(), "host": "somewhere", "started": "2026-11-30T10:00:00+00:00"}, file)
print("held", flush=True)
sys.stdin.read()
"""


def build(
    folder: Path, *callbacks: TrainerCallback, parts: dict[str, Any] | None = None, **options: Any
) -> DPOTrainer:
    """6 steps, a checkpoint at every second one."""
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    model = tiny.llama(num_hidden_layers=1)
    more = {"callbacks": list(callbacks), **(parts or {})}
    return tiny.trainer(folder, model=model, parts=more, **{**defaults, **options})


def run(folder: Path, resume: Any = None, *, until: int | None = None, **options: Any) -> DPOTrainer:
    trainer = build(folder, *([] if until is None else [tiny.KillAt(until)]), **options)
    if until is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(tiny.Killed):
            trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(folder: Path) -> list[int]:
    return sorted(map(step_of, folder.glob("checkpoint-*")))


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(caplog.messages)


# --- who may write there ---


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen]:
    """A process has the folder, until it is killed."""
    folder.mkdir(exist_ok=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / LOCK), str(folder / HOLDER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def test_a_folder_of_another_process_is_refused_until_that_is_killed(tmp_path, caplog):
    with held_by_another(tmp_path) as holder:
        trainer = build(tmp_path, max_steps=2)
        whom = f"process {holder.pid} on somewhere, started 2026-11-30T10:00:00+00:00"
        assert whom in said(caplog), "a warning before the data are prepared"
        with pytest.raises(ValueError, match=re.escape(whom)) as error:
            trainer.train(resume_from_checkpoint="auto")
        assert "--force_output_dir" in str(error.value)
        with pytest.raises(ValueError, match="Another run is using"):
            trainer.save_model()
        assert not steps(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
    trainer.train()  # killed by signal 9: nobody had to clean up
    assert steps(tmp_path) == [2]
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


def test_force_output_dir_goes_on_with_a_warning(tmp_path, caplog):
    with held_by_another(tmp_path):
        run(tmp_path, max_steps=2, force_output_dir=True)
    assert "--force_output_dir: going on" in said(caplog)
    assert steps(tmp_path) == [2]


class Someone:
    pass


TRY = """
import sys
from filelock import FileLock, Timeout
try:
    FileLock(sys.argv[1]).acquire(timeout=0)
    print("free")
except Timeout:
    print("held")
"""


def seen_from_outside(folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", TRY, str(folder / LOCK)], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_users_of_one_process_share_the_lock_until_the_last_is_gone(tmp_path):
    first, second = Someone(), Someone()
    hold_folder(tmp_path, first)
    hold_folder(tmp_path / ".." / tmp_path.name, second)
    assert is_held_elsewhere(tmp_path) is None
    del first
    gc.collect()
    assert seen_from_outside(tmp_path) == "held"
    del second
    gc.collect()
    assert seen_from_outside(tmp_path) == "free"


def test_a_trainer_holds_its_folder_after_training(tmp_path):
    trainer = run(tmp_path, max_steps=2)
    assert seen_from_outside(tmp_path) == "held"
    run(tmp_path, "auto", max_steps=4)  # this process' own
    assert steps(tmp_path) == [2, 4]
    del trainer


def test_a_damaged_note_of_the_holder_is_no_error_of_its_own(tmp_path):
    with held_by_another(tmp_path):
        (tmp_path / HOLDER).write_text("[")
        with pytest.raises(ValueError, match=f"a process that holds {re.escape(str(tmp_path / LOCK))}"):
            hold_folder(tmp_path, Someone())


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, caplog):
    (tmp_path / LOCK).mkdir()
    run(tmp_path, max_steps=2)
    assert "cannot be locked" in said(caplog)
    assert steps(tmp_path) == [2]


# --- which checkpoints are this run's ---


def test_auto_goes_on_with_the_run_that_began_last(tmp_path, caplog):
    """Yesterday's run ended at step 6; today's, with another rate, was killed in step 5 and ends as if it had the folder alone."""
    want = tiny.weights(run(tmp_path / "alone", learning_rate=0.2).model)
    folder = tmp_path / "out"
    run(folder, learning_rate=0.1)
    caplog.clear()
    run(folder, learning_rate=0.2, until=5)
    assert (
        "holds checkpoints of another run (checkpoint-2, checkpoint-4, checkpoint-6), and this run begins anew"
        in said(caplog)
    )
    got = run(folder, "auto", learning_rate=0.2)
    assert "checkpoint-6 is skipped: it belongs to an earlier run" in said(caplog)
    assert f"Resuming from {folder / 'checkpoint-4'}" in said(caplog)
    tiny.assert_same_weights(tiny.weights(got.model), want)


def test_auto_begins_anew_where_this_run_has_saved_nothing_yet(tmp_path, caplog):
    run(tmp_path, max_steps=4)
    run(tmp_path, until=2)
    trainer = build(tmp_path)
    with pytest.raises(ValueError, match=r"no complete checkpoint .*checkpoint-4: it belongs to an earlier run"):
        trainer.train(resume_from_checkpoint="true")
    caplog.clear()
    trainer.train(resume_from_checkpoint="auto")
    assert "None can be resumed: starting fresh." in caplog.messages
    assert len({run_of(path) for path in tmp_path.glob("checkpoint-*")}) == 1


def test_a_run_keeps_its_id_and_so_does_the_folder(tmp_path):
    run(tmp_path, until=4)
    (first,) = {run_of(path) for path in tmp_path.glob("checkpoint-*")}
    run(tmp_path, "auto")
    assert {run_of(path) for path in tmp_path.glob("checkpoint-*")} == {first}
    record = read_record(tmp_path)
    assert record is not None
    assert record.run == first
    assert not (tmp_path / ASIDE).exists()


def test_a_named_checkpoint_of_the_other_run_makes_the_folder_its_own(tmp_path):
    run(tmp_path, max_steps=4)
    kept = shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "kept")
    run(tmp_path, until=3)
    trainer = run(tmp_path, str(tmp_path / "checkpoint-4"), until=6)
    assert run_of(kept) == trainer.folder.record.run
    trainer = run(tmp_path, "auto")
    assert trainer.folder.record.run == run_of(kept)
    assert steps(tmp_path) == [2, 4, 6]


def test_a_run_that_is_taken_back_does_not_return_to_what_came_after(tmp_path, caplog):
    """From step 2 of a run that reached 6, with another rate, killed in step 5: auto goes on from the new step 4."""
    run(tmp_path, max_steps=6)
    options: dict[str, Any] = {"learning_rate": 0.3, "save_total_limit": 2}
    run(tmp_path, str(tmp_path / "checkpoint-2"), until=5, **options)
    assert steps(tmp_path) == [2, 4, 6]
    assert [step_of(path) for path in of_this_run(tmp_path)] == [4, 2]
    caplog.clear()
    run(tmp_path, "auto", **options)
    assert f"Resuming from {tmp_path / 'checkpoint-4'}" in said(caplog)
    assert [step_of(path) for path in of_this_run(tmp_path)] == [6, 4]


def test_taken_back_twice(tmp_path):
    run(tmp_path)
    run(tmp_path, str(tmp_path / "checkpoint-4"))  # writes 6
    run(tmp_path, str(tmp_path / "checkpoint-2"), until=3)  # knows of 4 no more
    assert [step_of(path) for path in of_this_run(tmp_path)] == [2]


def without_ids(folder: Path) -> None:
    """As releases wrote them that gave none."""
    (folder / RECORD).unlink()
    for path in folder.glob(f"checkpoint-*/{MANIFEST}"):
        manifest = json.loads(path.read_text())
        del manifest["run"]
        path.write_text(json.dumps(manifest))


def test_folders_of_earlier_releases_resume_as_before(tmp_path):
    run(tmp_path, until=5)
    without_ids(tmp_path)
    trainer = run(tmp_path, "auto", until=6)
    assert trainer.state.global_step == 5
    trainer = run(tmp_path, "auto", save_total_limit=2)
    assert steps(tmp_path) == [4, 6]


@pytest.mark.parametrize("content", ["[", "{}", '{"run": 3, "before": {}}', '{"run": "a", "before": []}'])
def test_a_damaged_record_is_none_with_a_warning(content, tmp_path, caplog):
    (tmp_path / RECORD).write_text(content)
    assert read_record(tmp_path) is None
    assert str(tmp_path / RECORD) in said(caplog)


# --- how many are kept ---


@pytest.mark.parametrize("limit", [1, 2])
def test_the_newest_are_kept_by_step_and_not_by_time(limit, tmp_path):
    """The clock was an hour ahead when the first ones were written, or they were copied since."""
    run(tmp_path, max_steps=2)
    for path in tmp_path.glob("checkpoint-*"):
        os.utime(path, (time.time() + 3600,) * 2)
    run(tmp_path, "auto", save_total_limit=limit)
    assert steps(tmp_path) == [6, 4][:limit][::-1]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_counts_this_run_alone(limit, tmp_path):
    run(tmp_path / "old", max_steps=10, save_steps=5)
    for path in (tmp_path / "old").glob("checkpoint-*"):
        shutil.copytree(path, tmp_path / "new" / path.name)
    run(tmp_path / "new", save_total_limit=limit)
    assert steps(tmp_path / "new") == sorted([5, 10, 4, 6] if limit == 2 else [5, 10, 6])


def test_the_best_one_is_left_of_this_run_alone(tmp_path):
    """At the end, where the limit is 1."""
    run(tmp_path / "old", max_steps=10, save_steps=5)
    for path in (tmp_path / "old").glob("checkpoint-*"):
        shutil.copytree(path, tmp_path / "new" / path.name)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    more = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the worst, of step 2
    trainer = run(tmp_path / "new", parts={"eval_dataset": tiny.dataset(4, seed=4)}, **best, **more)
    assert trainer.state.best_global_step == 2
    assert steps(tmp_path / "new") == sorted([5, 10, trainer.state.best_global_step])
    assert trainer.args.save_total_limit == 1


def test_which_are_too_many():
    paths = [Path(f"checkpoint-{step}") for step in (10, 8, 6, 4, 2)]

    def left(limit: int, step: int, best: int = 0) -> list[int]:
        gone = surplus(paths, limit, step, f"checkpoint-{best}")
        return [step_of(path) for path in paths if path not in gone]

    assert left(2, step=10) == [10, 8]
    assert left(2, step=10, best=4) == [10, 4]
    assert left(1, step=10, best=4) == [10, 4]  # as for `Trainer`, the newest is never the one to go
    assert left(2, step=6) == [6, 4], "those beyond are broken, or hold only a model"
    assert [step_of(path) for path in surplus(paths, 1, 6, None)] == [8, 10, 2, 4]


# --- those that hold only a model ---


def test_auto_skips_what_holds_only_a_model(tmp_path, caplog):
    run(tmp_path, max_steps=2)
    run(tmp_path, "auto", max_steps=4, save_only_model=True)
    caplog.clear()
    trainer = run(tmp_path, "auto")
    assert f"checkpoint-4 is skipped: it has no {STATE_FILE}: it was written with --save_only_model" in said(caplog)
    assert f"Resuming from {tmp_path / 'checkpoint-2'}" in said(caplog)
    assert trainer.state.global_step == 6
    assert all(broken_file(path) is None for path in tmp_path.glob("checkpoint-*"))


def test_a_run_that_saves_only_models_begins_anew_at_each_start(tmp_path):
    run(tmp_path, "auto", until=3, save_only_model=True)
    trainer = run(tmp_path, "auto", save_only_model=True, save_total_limit=1)
    assert trainer.state.global_step == 6
    assert steps(tmp_path) == [6], "its own checkpoint-2 took the place of the other"


# --- what earlier runs left besides ---


def finished(folder: Path, resume: Any = None, **options: Any) -> DPOTrainer:
    """As a script ends."""
    trainer = run(folder, resume, max_steps=2, **options)
    trainer.save_metrics("train", {"train_loss": 1.0})
    trainer.save_state()
    trainer.save_model()
    return trainer


def test_results_of_another_run_go_aside(tmp_path, caplog):
    trainer = finished(tmp_path)
    trainer.save_metrics("eval", {"eval_loss": 2.0})
    caplog.clear()
    finished(tmp_path)
    moved = {"all_results.json", "eval_results.json", "train_results.json", "trainer_state.json"}
    assert {path.name for path in (tmp_path / "earlier_run_1").iterdir()} == moved
    assert set(json.loads((tmp_path / "all_results.json").read_text())) == {"train_loss"}
    assert (
        f"eval_results.json, train_results.json, trainer_state.json of another run were moved from {tmp_path}"
        in said(caplog)
    )
    finished(tmp_path)
    assert (tmp_path / "earlier_run_2").is_dir()


def test_results_of_this_run_stay(tmp_path):
    """Those of an evaluation before training, and those of the run that is resumed."""
    trainer = build(tmp_path, max_steps=2)
    trainer.save_metrics("eval", {"eval_loss": 2.0})
    trainer.train()
    run(tmp_path, "auto", max_steps=4)
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 2.0}
    assert not list(tmp_path.glob("earlier_run_*"))


def test_parts_of_another_model_beside_the_saved_one_are_named(tmp_path, caplog):
    finished(tmp_path)
    finished(tmp_path, "auto")
    assert "beside it" not in said(caplog)
    (tmp_path / "added_tokens.json").write_text("{}")
    finished(tmp_path, "auto")
    assert f"{tmp_path} holds the model now, and beside it added_tokens.json of another run" in said(caplog)


def test_the_lock_is_not_uploaded():
    """`Trainer.push_to_hub` leaves out names that begin with an underscore."""
    assert LOCK.startswith("_")
    assert HOLDER.startswith("_")
