"""What the README says to type works and prints what it shows: the Python example, then the command line on its output.

The `make` targets and the commands with models of the hub are parsed only, in `test_docs.py`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from markdown_blocks import ROOT, assert_prints, blocks, commands, enter_checkout, run_python

README = ROOT / "README.md"


@pytest.fixture
def checkout(tmp_path, tmp_path_factory, monkeypatch):
    return enter_checkout(tmp_path, tmp_path_factory.getbasetemp(), monkeypatch)


def shown_commands():
    """The blocks of commands whose output the README shows."""
    return [block for block in blocks(README) if block.info == "sh" and block.output is not None]


def test_example_then_command_line(checkout):
    ran = run_python(README, checkout)
    assert len(ran) == 1
    example, printed = ran[0]
    assert len(example.text.splitlines()) <= 24, "the README promises about 20 lines"
    assert_prints(example, printed)

    # The README's commands, word by word, with this interpreter, on what the example has saved.
    shown = shown_commands()
    assert [shlex.split(commands(block)[0])[1] for block in shown] == ["scripts/inspect_data.py", "scripts/dpo.py"]
    for block in shown:
        (command,) = commands(block)
        python, *words = shlex.split(command)
        assert python == "python"
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], env=one_thread, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert_prints(block, done.stdout)
    assert (checkout / "out" / "look" / "index.html").is_file()
    assert (checkout / "out" / "second" / "model.safetensors").is_file()


def test_readme_names_the_test_command_and_the_demo():
    lines = [command for block in blocks(README) if block.info == "sh" for command in commands(block)]
    assert {"make demo", "make test"} <= {line.split("#")[0].strip() for line in lines}
