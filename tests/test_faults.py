"""A training process is killed again and again, and what it leaves is gone on with; `make test-faults` does it at length."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from two_processes import run_script

from dpo_trainer.checkpointing import ASIDE, broken_file
from dpo_trainer.checkpointing.durable import STOPPED_BY_SIGNAL

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def test_kills_in_every_phase_change_nothing():
    """Which moments, follows from the seed and from how fast the machine is."""
    options = "--kills 6 --each 1 --kinds lora"
    done = run_script(HERE / "faults" / "kill_test.py", *options.split(), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    names, counts = (re.search(rf"^\| {kind} *\| (.*) \|$", done.stdout, re.MULTILINE)[1] for kind in ("", "lora"))
    row = dict(zip(names.split(" | "), counts.split(" | "), strict=True))
    assert all(int(row[phase]) >= 1 for phase in ("tokenization", "precompute", "step", "eval", "save"))
    assert int(row["kills"]) >= 6
    assert "0 checkpoints skipped as broken" in done.stdout
    assert re.search(r"All \d+ runs ended in the weights of the uninterrupted run", done.stdout)


STEPS = 150  # a second or more: the signal arrives long before the last


def test_script_told_to_stop_saves_and_goes_on(tmp_path):
    """SIGTERM, once a step was logged: exit code 75 and a whole checkpoint, from which the same command goes on."""
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny.rows(22))))
    out = tmp_path / "out"
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": out,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "resume_from_checkpoint": "auto",
    }
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    script = HERE.parent / "scripts" / "dpo.py"

    with (tmp_path / "log.txt").open("w+") as log:
        command = [sys.executable, script, *flags]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for("rewards/margins", tmp_path / "log.txt", process)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=120)
        finally:
            process.kill()
    said = (tmp_path / "log.txt").read_text()
    assert code == STOPPED_BY_SIGNAL == 75, said[-4000:]
    assert "Told to stop (SIGTERM)" in said
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 1 <= step < STEPS
    assert broken_file(checkpoint) is None
    assert not (out / ASIDE).exists()
    assert not (out / "model.safetensors").exists(), "the run is not over"
    stopped = load_file(checkpoint / "model.safetensors")

    done = run_script(script, *flags, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"Resuming from {checkpoint}" in done.stderr
    lines = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1)), "each step once"
    assert tiny.moved(stopped, load_file(out / "model.safetensors")) > 0


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while text not in log.read_text():
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
