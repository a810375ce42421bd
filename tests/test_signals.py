"""A run that is told to stop ends after its step, and the resumed run is the one that was not stopped."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from transformers import EarlyStoppingCallback, TrainerCallback

from dpo_trainer import DPOTrainer
from dpo_trainer.checkpointing import broken_file
from dpo_trainer.checkpointing.lasting_output import LastingStream, lasting_output
from dpo_trainer.checkpointing.signals import (
    HEEDED,
    INTERRUPTED,
    STOPPED_BY_SIGNAL,
    command_that_goes_on,
    telling_command,
)

TIMES = re.compile(r"runtime|_per_second|train_loss|total_flos")


class Signal(TrainerCallback):
    """The signal, in this process, at the beginning of a step (1, 2, ...)."""

    def __init__(self, step: int, *numbers: int):
        self.step, self.numbers = step, numbers or (signal.SIGTERM,)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


class SaveNow(TrainerCallback):
    """Has a say in every step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 3
        control.should_evaluate = state.global_step % 2 == 0


def evaluating(folder: Path, *callbacks: TrainerCallback, **options: Any) -> DPOTrainer:
    """Two shuffled epochs of 4 steps over 16 rows; the loss falls and rises again."""
    how = {
        "train": tiny.dataset(16),
        "max_steps": -1,
        "num_train_epochs": 2,
        "learning_rate": 0.7,
        "lr_scheduler_type": "linear",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,
        "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": True,
    }
    parts = {"eval_dataset": tiny.dataset(6, seed=4), "callbacks": list(callbacks)}
    return tiny.trainer(folder, parts=parts, **{**how, **options})


def left_by(made: DPOTrainer) -> dict[str, Any]:
    """All that the run chose and logged. The line of its end says what one call of `train` did.

    The line of an epoch follows an evaluation by steps, and precedes one that is made up: lines of a step are put in one order.
    """
    state = made.state
    lines = [{k: v for k, v in line.items() if not TIMES.search(k)} for line in state.log_history]
    return {
        "log": sorted(lines[:-1], key=lambda line: (line["step"], "eval_loss" in line)),
        "steps": state.global_step,
        "best": (state.best_metric, state.best_global_step, Path(state.best_model_checkpoint or "none").name),
        "scheduler": made.lr_scheduler.state_dict(),
    }


def assert_resumed_is_uninterrupted(folder: Path, at: int, whole: DPOTrainer, build: Any) -> DPOTrainer:
    stopped = build(folder, Signal(at))
    stopped.train()
    assert stopped.stopped_by_signal
    assert stopped.state.global_step == at
    assert (folder / f"checkpoint-{at}").is_dir(), "whatever the limit, and whichever is the best"
    assert not any("eval_loss" in line for line in stopped.state.log_history if line["step"] == at)
    resumed = build(folder)
    resumed.train(resume_from_checkpoint="auto")
    assert not resumed.stopped_by_signal
    want = left_by(whole)
    for name, value in left_by(resumed).items():
        assert value == want[name], name
    tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))
    return resumed


KINDS: dict[str, dict[str, Any]] = {
    "best of the checkpoints": {"save_total_limit": 2},
    "one checkpoint": {"save_total_limit": 1},
    "the best step is not saved": {"eval_steps": 1, "save_steps": 4, "learning_rate": 1.0},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    "logged by the epoch": {"logging_strategy": "epoch"},
    "the best alone": {"save_strategy": "best", "eval_steps": 1},
    "a rate that waits for progress": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "eval_steps": 1,
    },
    "nothing saved": {"save_strategy": "no", "load_best_model_at_end": False},
    "cut off within an epoch": {
        "max_steps": 6,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluation_that_was_left_out_is_made_up(kind, tmp_path):
    """Stopped at any step, first and last ones among them: the log, the best metric, the best checkpoint, the rate and the weights
    are those of the run that was not stopped."""
    options = KINDS[kind]
    whole = evaluating(tmp_path / "whole", **options)
    whole.train()
    evaluations = [line["eval_loss"] for line in whole.state.log_history if "eval_loss" in line]
    assert len(set(evaluations)) > 1
    last, best = whole.state.global_step, whole.state.best_global_step
    for at in sorted({2, 4, best or 5, last}):
        assert_resumed_is_uninterrupted(
            tmp_path / str(at), at, whole, lambda folder, *callbacks: evaluating(folder, *callbacks, **options)
        )


def test_an_evaluation_that_is_made_up_may_end_the_run(tmp_path):
    def build(folder: Path, *callbacks: TrainerCallback) -> DPOTrainer:
        return evaluating(folder, EarlyStoppingCallback(1), *callbacks, eval_steps=1, save_steps=1)

    whole = build(tmp_path / "whole")
    whole.train()
    last = whole.state.global_step
    assert 2 < last < 8
    assert_resumed_is_uninterrupted(tmp_path / "stopped", last, whole, build)


def test_callbacks_have_their_say_and_the_run_is_saved(tmp_path):
    def build(folder: Path, *callbacks: TrainerCallback) -> DPOTrainer:
        return evaluating(
            folder, *callbacks, SaveNow(), eval_strategy="steps", eval_steps=100, load_best_model_at_end=False
        )

    whole = build(tmp_path / "whole")
    whole.train()
    assert_resumed_is_uninterrupted(tmp_path / "stopped", 4, whole, build)


# --- which signals, and what they give ---


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], STOPPED_BY_SIGNAL),
        ([signal.SIGHUP], STOPPED_BY_SIGNAL),
        ([signal.SIGINT], INTERRUPTED),
        ([signal.SIGTERM, signal.SIGINT], INTERRUPTED),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGHUP], STOPPED_BY_SIGNAL),
    ],
    ids=str,
)
def test_each_signal_finishes_the_step_and_saves(numbers, code, tmp_path, caplog):
    before = [signal.getsignal(number) for number in HEEDED]
    made = tiny.trained(tmp_path, parts={"callbacks": [Signal(2, *numbers)]})
    assert (made.stopped_by_signal, made.exit_code, made.state.global_step) == (True, code, 2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [signal.getsignal(number) for number in HEEDED] == before, "put back"
    name = "Ctrl-C" if code == INTERRUPTED else signal.Signals(numbers[0]).name
    assert f"Told to stop ({name}): saving after step 2." in caplog.messages
    assert 'trainer.train(resume_from_checkpoint="auto")' in caplog.text
    made.train(resume_from_checkpoint="auto")
    assert (made.stopped_by_signal, made.exit_code, made.state.global_step) == (False, None, 4)


def test_ctrl_c_twice_ends_at_once(tmp_path, capfd):
    made = tiny.trainer(tmp_path, parts={"callbacks": [Signal(2, signal.SIGINT, signal.SIGINT)]})
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.state.global_step == 1
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "put back"
    assert capfd.readouterr().err.count("Press Ctrl-C again to end at once, without saving.") == 1


def test_a_program_may_stop_a_run_too(tmp_path):
    made = tiny.trainer(tmp_path)
    made.add_callback(SimpleStop(made))
    made.train()
    assert (made.exit_code, made.state.global_step) == (STOPPED_BY_SIGNAL, 2)


class SimpleStop(TrainerCallback):
    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.stop_asked = state.global_step == 1


def test_save_only_model_leaves_nothing_to_resume_and_says_so(tmp_path, caplog):
    tiny.trained(tmp_path, save_only_model=True, parts={"callbacks": [Signal(2)]})
    assert "--save_only_model: there is nothing to resume from" in caplog.text
    assert "auto" not in caplog.text


class HandlersSeen(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.seen = [signal.getsignal(number) for number in HEEDED]


@pytest.fixture
def handlers() -> Iterator[Callable[[], list[Any]]]:
    before = [signal.getsignal(number) for number in HEEDED]
    yield lambda: [signal.getsignal(number) for number in HEEDED]
    for number, handler in zip(HEEDED, before, strict=True):
        signal.signal(number, handler)


def test_what_the_process_ignores_stays_ignored(tmp_path, handlers):
    """nohup, and jobs in the background of a script."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    made = tiny.trained(tmp_path, parts={"callbacks": [Signal(2, signal.SIGHUP, signal.SIGINT)]})
    assert (made.stopped_by_signal, made.state.global_step) == (False, 4)
    assert handlers()[1:] == [signal.SIG_IGN, signal.SIG_IGN]


def test_in_a_notebook_signals_are_left_alone(tmp_path, monkeypatch, handlers):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    before, seen = handlers(), HandlersSeen()
    made = tiny.trainer(tmp_path, max_steps=1, parts={"callbacks": [seen]})
    made.train()
    assert seen.seen == before
    del shell.kernel  # IPython in a terminal
    made.train()
    assert seen.seen != before


def test_in_a_thread_signals_are_left_alone(tmp_path, handlers):
    before, seen = handlers(), HandlersSeen()
    made = tiny.trainer(tmp_path, max_steps=1, parts={"callbacks": [seen]})
    thread = threading.Thread(target=made.train)
    thread.start()
    thread.join()
    assert made.state.global_step == 1
    assert seen.seen == before


# --- the command that goes on ---


def test_the_command_is_quoted_and_resumes(monkeypatch):
    argv = [
        "my runs/a.yaml",
        "--output_dir",
        "it's here",
        "--resume-from-checkpoint=out/checkpoint-3",
        "--beta",
        "0.2",
    ]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "scripts/dpo.py", *argv])
    monkeypatch.setattr(sys, "argv", ["scripts/dpo.py", *argv])
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    command = command_that_goes_on(None, "dpo.py")
    words = ["my runs/a.yaml", "--output_dir", "it's here", "--beta", "0.2", "--resume_from_checkpoint", "auto"]
    assert shlex.split(command) == ["python", "-u", "scripts/dpo.py", *words]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert command_that_goes_on(None, "dpo.py").startswith(
        "the launcher of this run (torchrun, accelerate launch) with scripts/dpo.py"
    )
    monkeypatch.delenv("LOCAL_RANK")
    given = ["--resume_from_checkpoint", "out/checkpoint-3", "--beta", "0.2", "--resume_from_checkpoint", "auto"]
    assert command_that_goes_on(given, "dpo.py") == "python dpo.py --beta 0.2 --resume_from_checkpoint auto"


def test_ctrl_c_outside_of_training_is_no_traceback(capfd):
    with pytest.raises(SystemExit) as ended, telling_command(["--beta", "0.2"], "dpo.py"):
        raise KeyboardInterrupt
    assert ended.value.code == INTERRUPTED
    said = capfd.readouterr().err
    assert "dpo.py: ended by Ctrl-C." in said
    assert "--beta 0.2 --resume_from_checkpoint auto" in said


# --- output without a reader ---


def broken_pipe() -> Any:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


def test_a_closed_pipe_is_no_error_for_a_run_that_stops():
    with broken_pipe() as pipe:
        stream = LastingStream(pipe, lambda: True)
        assert stream.write("lost\n") == 5
        stream.write("more\n")
        stream.flush()
        assert stream.encoding == pipe.encoding, "otherwise as it was"


def test_a_closed_pipe_is_an_error_for_a_run_that_goes_on():
    pipe = broken_pipe()
    with pytest.raises(BrokenPipeError):
        LastingStream(pipe, lambda: False).write("lost\n")
    LastingStream(pipe, lambda: True).flush()
    pipe.close()


def test_files_are_left_as_they_are(tmp_path, monkeypatch):
    with (tmp_path / "log.txt").open("w") as log, broken_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", log)
        monkeypatch.setattr(sys, "stderr", pipe)
        with lasting_output(lambda: True):
            assert sys.stdout is log
            assert isinstance(sys.stderr, LastingStream)
            print("lost", file=sys.stderr)
        assert (sys.stdout, sys.stderr) == (log, pipe)


# --- real signals to real scripts ---

SCRIPT = Path(__file__).parents[1] / "scripts" / "dpo.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
STEPS = 400  # seconds: a signal arrives long before the last


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("script")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny.rows(22))))
    options = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "pairs.jsonl",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    return [
        sys.executable,
        str(SCRIPT),
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]


def wait_for(text: str, read: Callable[[], str]) -> None:
    deadline = time.monotonic() + 120
    while text not in read():
        assert time.monotonic() < deadline, read()[-4000:]
        time.sleep(0.01)


def saved_step(out: Path) -> int:
    (checkpoint,) = out.glob("checkpoint-*")
    assert broken_file(checkpoint) is None
    return int(checkpoint.name.removeprefix("checkpoint-"))


@pytest.mark.slow
def test_ctrl_c_into_a_pipe_saves_and_names_the_command(command, tmp_path):
    """As a terminal sends it: to the script, to the worker that loads its data, and to the program behind the pipe, which ends."""
    out, said, errors = tmp_path / "it's out", tmp_path / "said.txt", tmp_path / "errors.txt"
    line = f"{shlex.join([*command, '--output_dir', str(out)])} 2> {errors} | cat > {said}; exit ${{PIPESTATUS[0]}}"
    # bash itself waits for both, and would end with them.
    process = subprocess.Popen(["bash", "-c", f"trap : INT; {line}"], env=ENVIRONMENT, start_new_session=True)
    wait_for("rewards/margins", lambda: said.read_text() if said.exists() else "")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == INTERRUPTED, errors.read_text()[-4000:]
    assert 1 <= saved_step(out) < STEPS
    *_, asked, again = errors.read_text().rstrip().splitlines()
    assert asked.endswith("To go on:")
    assert "Traceback" not in errors.read_text()
    assert errors.read_text().count("Press Ctrl-C again") == 1, "by the worker too"

    done = subprocess.run(
        f"{again} --max_steps {saved_step(out) + 1}", shell=True, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Resuming from {out}" in done.stderr


@pytest.mark.slow
def test_ctrl_c_twice_ends_a_script_without_a_traceback(command, tmp_path):
    errors = tmp_path / "errors.txt"
    with errors.open("w") as log:
        words = [*command, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log)
        wait_for("rewards/margins", errors.read_text)
        process.send_signal(signal.SIGSTOP)  # so that both find the same step
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        wait_for("Press Ctrl-C again", errors.read_text)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=120)
    assert code == INTERRUPTED, errors.read_text()[-4000:]
    assert "Traceback" not in errors.read_text()


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_a_checkpoint(command, tmp_path):
    """SIGHUP, and nothing can be written any more."""
    out = tmp_path / "out"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], [*command, "--output_dir", str(out)], ENVIRONMENT)
    said = bytearray()

    def read() -> str:
        said.extend(os.read(terminal, 4096))
        return said.decode(errors="replace")

    wait_for("rewards/margins", read)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED_BY_SIGNAL
    assert 1 <= saved_step(out) < STEPS
