"""What starts two ranks for the other tests: that both have ended well is said of no other launch."""

from __future__ import annotations

import json
import time

import pytest
from two_processes import run_script, torchrun

pytestmark = pytest.mark.distributed

MEET = """
import json, os, sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
places = [None] * dist.get_world_size()
dist.all_gather_object(places, [os.getpid(), int(os.environ["LOCAL_RANK"]), torch.get_num_threads(), sys.argv[2]])
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(places))
dist.barrier()
"""


def test_ranks_meet(tmp_path):
    """Twice: a second launch finds nothing of the first."""
    (tmp_path / "meet.py").write_text(MEET)
    seen = []
    for ranks in (2, 3):
        torchrun(tmp_path / "meet.py", tmp_path / "places.json", "a b", ranks=ranks)
        seen.append(json.loads((tmp_path / "places.json").read_text()))
        assert [place[1:] for place in seen[-1]] == [[rank, 1, "a b"] for rank in range(ranks)]
    assert len({pid for places in seen for pid, *_ in places}) == 5


@pytest.mark.parametrize(
    "ending", ["sys.exit(3)", "os._exit(3)", "sys.exit('why')", "1 / 0", "os.kill(os.getpid(), 9)"]
)
def test_one_rank_that_fails_ends_the_other(ending, tmp_path):
    (tmp_path / "fail.py").write_text(
        f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(60)"
    )
    began = time.monotonic()
    with pytest.raises(AssertionError) as failed:
        torchrun(tmp_path / "fail.py")
    code = {"1 / 0": 1, "sys.exit('why')": 1, "os.kill(os.getpid(), 9)": -9}.get(ending, 3)
    assert str([-9, code]) in str(failed.value)
    if code == 1:
        assert ("ZeroDivisionError" if "/" in ending else "why") in str(failed.value)
    assert time.monotonic() - began < 50


def test_ranks_that_do_not_end_are_ended(tmp_path):
    (tmp_path / "wait.py").write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)")
    with pytest.raises(AssertionError, match=r"\[-9, -9\]\nwaiting"):
        torchrun(tmp_path / "wait.py", timeout=1.0)


def test_a_script_alone(tmp_path, monkeypatch):
    """Its folder, its environment, its exit code, and the two streams apart."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nprint(os.getcwd(), os.environ['X'], *sys.argv[1:])\nsys.stderr.write('aside')\nsys.exit(5)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("X", "x")
    done = run_script(script, 1, "b c")
    assert (done.returncode, done.stdout, done.stderr) == (5, f"{tmp_path} x 1 b c\n", "aside")
