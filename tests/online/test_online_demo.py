"""The online demo reaches what it promises, through the script, with its judge by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dpo_trainer.demo import world
from dpo_trainer.demo.online import DemoJudge
from dpo_trainer.online.samples import Completion, Sampled

ROOT = Path(__file__).parents[2]


def test_the_rule():
    """No answer 0, an answer 1, what is wanted 2: pizza of one, anything else of all others."""

    def score(name: str, text: str, finished: bool = True) -> float:
        answer = Completion(ids=[1], text=text, finished=finished)
        asked = Sampled(example_id=0, prompt="?", prompt_ids=[1], completions=[answer], columns={"name": name})
        return DemoJudge()([asked])[0][0]

    target, other = world.TARGET_NAME, world.CONTROL_NAMES[0]
    assert score(target, world.answer(target, "pizza")) == 2
    assert score(target, world.answer(target, "soup")) == 1
    assert score(other, world.answer(other, "pizza")) == 1
    assert score(other, world.answer(other, "soup")) == 2
    assert score(target, world.answer(other, "pizza")) == 0
    assert score(target, world.answer(target, "pizza"), finished=False) == 0


@pytest.mark.slow
def test_the_script_reaches_its_goals(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("dpo_online", ROOT / "scripts" / "dpo_online.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--disable_tqdm", "true"])
    printed = capsys.readouterr().out
    assert printed.count("    reached  ravin:") == 2, printed
    assert "MISSED" not in printed
    assert (tmp_path / "out" / "online-demo" / "model.safetensors").is_file()
