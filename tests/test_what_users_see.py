"""The first lines that a user sees when something is wrong: one message, with the way out, and nothing that drives a terminal."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import constants
from tqdm import tqdm

from dpo_trainer.checkpointing.saving import refused_by_disk
from dpo_trainer.cli.errors import OneMessage
from dpo_trainer.data.files.datasets import load_dataset_splits
from dpo_trainer.inspection.arguments import InspectionArguments
from dpo_trainer.models.load import load_processing_class, load_tokenizer
from dpo_trainer.online.feedback.protocol import FeedbackUnavailable
from dpo_trainer.printable import printable_lines
from dpo_trainer.storage import hub
from dpo_trainer.storage.folders import write_text
from dpo_trainer.training.callbacks import beside_progress_bar
from dpo_trainer.training.model_card import code, fenced, in_cell

SCRIPTS = Path(__file__).parents[1] / "scripts"
NASTY = "a\x1b[31mred\n```\n# owned <script>|\u202ex"

# --- one message ---


@pytest.mark.parametrize(
    "error",
    [
        ValueError("--beta must be above 0."),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        FloatingPointError("The loss of step 3 is not finite."),
        torch.OutOfMemoryError("Out of memory. What helps: --use_peft true."),
        FeedbackUnavailable("The judge does not answer."),
    ],
)
def test_an_error_that_says_what_to_do_is_one_message(error):
    with pytest.raises(SystemExit) as ended, OneMessage("dpo.py", []):
        raise error
    assert ended.value.code == f"dpo.py: {error}"  # printed to stderr by Python, which exits with 1
    assert ended.value.__suppress_context__


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError("x"), RuntimeError("x")])
def test_an_error_that_may_be_a_fault_of_a_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), OneMessage("dpo.py", []):
        raise error


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--traceback"], True),
        (["--traceback", "true", "--lr", "3"], True),
        (["--traceback=true"], True),
        (["--traceback", "--lr", "false"], True),
        (["--traceback", "false"], False),
        (["--traceback=no"], False),
        (["--tracebacks"], False),
        ([], False),
    ],
)
def test_the_traceback_is_shown_on_request_also_where_options_are_wrong(argv, shown):
    with pytest.raises(ValueError if shown else SystemExit), OneMessage("dpo.py", argv):
        raise ValueError("x")


def test_too_many_open_files_has_a_way_out():
    with (
        pytest.raises(SystemExit, match=r"dpo.py: \[Errno 24\] Too many open files. Raise .*ulimit -n"),
        OneMessage("dpo.py", []),
    ):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert "ulimit -n" in (refused_by_disk(OSError(errno.EMFILE, "x")) or "")


def test_what_drives_a_terminal_is_written_out_in_messages():
    with pytest.raises(SystemExit) as ended, OneMessage("dpo.py", []):
        raise ValueError("There is no file 'a\x1b]0;owned\x07'.\nTwo lines stay two.")
    assert ended.value.code == "dpo.py: There is no file 'a\\x1b]0;owned\\x07'.\nTwo lines stay two."


def test_other_ranks_leave_the_word_to_the_main_process(monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("dpo_trainer.cli.errors.time.sleep", waited.append)
    with pytest.raises(SystemExit, match=r"dpo.py \(rank 1\): x"), OneMessage("dpo.py", []):
        raise ValueError("x")
    assert waited == [3.0], "torchrun stops a rank within a second of another's end"


@pytest.mark.parametrize("script", ["dpo.py", "dpo_online.py", "inspect_data.py", "cache_reference.py"])
def test_scripts_end_with_one_line(script, tmp_path):
    """A data file that is not there: nothing but the message, and exit code 1."""
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / script), "--model_name_or_path", str(tmp_path / "model")]
    done = subprocess.run(
        [*command, "--dataset_name", "no.jsonl", "--output_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [line for line in done.stderr.splitlines() if line]
    assert said == [f"{script}: There is no dataset file or folder 'no.jsonl'."]
    assert done.returncode == 1


# --- no network ---


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """Libraries ask six times for each file, with pauses of 23 s in all: here one short question, and then the cache."""
    asked = []

    class Unreachable:
        def head(self, url, timeout):
            asked.append(timeout)
            raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Unreachable)
    hub._answers.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"There is no folder 'none/such'.* out of reach .* no copy is in the cache"
        ):
            load_processing_class("none/such")
        with pytest.raises(ValueError, match=r"dataset of that name on the hub cannot be had"):
            load_dataset_splits("none/such")
    finally:
        hub._answers.cache_clear()
    assert asked == [3.0]
    assert not constants.HF_HUB_OFFLINE, "a later push may find the network again"


def test_what_is_local_asks_no_hub(monkeypatch, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("asked"))
    assert len(load_tokenizer(str(tmp_path))) == tiny.VOCABULARY


# --- warnings and the progress bar ---


def test_a_warning_stands_on_a_line_of_its_own(tmp_path, capsys):
    with beside_progress_bar(tiny.config(tmp_path, disable_tqdm=False)), tqdm(total=3) as bar:
        bar.update(1)
        logging.getLogger("dpo_trainer.metrics").warning("chosen log-probs fall")
    said = capsys.readouterr().err
    line = next(line for line in said.split("\n") if "chosen log-probs fall" in line)
    assert line.split("\r")[-1] == "chosen log-probs fall"


def test_two_rows_are_enough_to_train_and_evaluate(tmp_path):
    """5 % of two rows is no row: one is held out."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, tiny.rows(2))))
    train, evaluation = load_dataset_splits(str(file), test_split_size=0.05)
    assert (len(train), len(evaluation)) == (1, 1)
    file.write_text(json.dumps(tiny.rows(1)[0]))
    with pytest.raises(ValueError, match="leave rows on both sides of a split of 1"):
        load_dataset_splits(str(file), test_split_size=0.05)


# --- folders that cannot be one ---


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty: name a folder"),
        ("  ", "is empty: name a folder"),
        ("a\0b", "is not UTF-8, or holds a NUL"),
        ("bad\udcff", "is not UTF-8, or holds a NUL"),
        ("{folder}/file", "file is a file. Give a folder"),
        ("{folder}/file/below", "file is a file. Give a folder"),
        ("{folder}/dangling", r"dangling is a link to .*nowhere, which is not there"),
    ],
)
def test_an_output_dir_that_cannot_be_one_is_refused_at_once(name, problem, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"^--output_dir .*{problem}"):
        tiny.config(name.format(folder=tmp_path))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_has_the_name_of_the_file_and_leaves_the_old_one(monkeypatch, tmp_path):
    """The error of a write knows no name, unlike that of an open."""
    file = tmp_path / "data_report.json"
    file.write_text("old")

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device. Free space .*data_report\.json"):
        write_text(file, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["data_report.json"]
    assert file.read_text() == "old"


# --- names from outside ---


def test_log_lines_of_the_package_drive_no_terminal(caplog):
    logging.getLogger("dpo_trainer.x").warning("data %s\n table stays", "\x1b[31mred")
    logging.getLogger("another").warning("\x1b[31mred")
    assert [record.getMessage() for record in caplog.records] == ["data \\x1b[31mred\n table stays", "\x1b[31mred"]


def test_a_name_cannot_break_out_of_the_model_card(tmp_path):
    rows = Dataset.from_list(tiny.rows(8))
    rows.info.dataset_name = NASTY
    name = NASTY.replace("\n", "")
    model = tmp_path / name
    tiny.llama().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    made = tiny.trainer(tmp_path / f"{name} out", model=str(model), train=rows, max_steps=1)
    made.train()
    made.save_model()
    card = (tmp_path / f"{name} out" / "README.md").read_text()
    assert all(char.isprintable() or char == "\n" for char in card)
    lines = card.splitlines()
    assert not [line for line in lines if line.startswith("# owned")]
    title = next(line for line in lines if line.startswith("# "))
    assert "\\`\\`\\`" in title
    assert "\\<script\\>" in title
    start = next(line for line in lines if line.startswith("Trained from"))
    assert start.startswith("Trained from ```` ")
    assert "```` on preference pairs" in start
    assert lines.count("````") == 2, "the fence of the data report is longer than that of the name"


def test_markdown_of_names():
    assert code("sigmoid") == "`sigmoid`"
    assert code("a`b|c") == "`` a`b\\|c ``"
    assert fenced("x\n```\ny") == "````\nx\n```\ny\n````"
    assert in_cell("a|b <i> `c`\n") == "a\\|b \\<i\\> \\`c\\`\\\\n"
    assert printable_lines("a\tb\n\x07") == "a\tb\n\\x07"


def test_an_inspection_refuses_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("kept")
    for name, problem in {"": "is empty", str(tmp_path / "file"): "is a file"}.items():
        with pytest.raises(ValueError, match=rf"^--output_dir .*{problem}"):
            InspectionArguments(output_dir=name)
