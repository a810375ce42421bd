"""The vision demo: a model that guesses comes to name what is on new pictures, and no longer does when they are exchanged."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_trainer import DPOConfig
from dpo_trainer.demo import vision
from dpo_trainer.demo.pictures import DIFFERENCES, THINGS, differ, examples, shuffled
from dpo_trainer.demo.vision_page import Shown, page, sheet


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, list[vision.Goal]]:
    """Its folder and its goals, after a run with its own options."""
    folder = tmp_path_factory.mktemp("vision")
    config = DPOConfig(output_dir=str(folder), disable_tqdm=True)
    return folder, vision.run_vision_demo(config, {"output_dir", "disable_tqdm"}) or []


def test_reaches_its_goals(demo):
    _, goals = demo
    assert [goal.limit for goal in goals] == [0.95, 0.95, 0.6]
    assert all(goal.reached for goal in goals), "\n".join(map(str, goals))


def test_begins_at_chance_and_well_formed(demo):
    """480 guesses are within 0.1 of a half unless something is wrong: four standard deviations."""
    folder, _ = demo
    before = vision.look(folder / "base", "base", examples(480, held_out=True, seed=42))
    assert 0.4 < before.prefers < 0.6
    assert before.says < 0.15
    assert before.well_formed > 0.95


def test_the_page_shows_pictures_and_answers(demo):
    folder, _ = demo
    text = (folder / "pictures.html").read_text()
    assert len(set(re.findall(r'src="(data:image/png;base64,[^"]+)"', text))) == 24
    assert "http" not in text.replace("http-equiv", "")  # it asks nobody for anything
    with Image.open(folder / "pictures.png") as picture:
        assert min(picture.size) > 400


def test_what_is_said_is_escaped():
    evil = Shown(
        picture=Image.new("RGB", (4, 4)),
        chosen="<script>alert(1)</script>",
        rejected="$x^2$",
        chosen_reward=1.0,
        rejected_reward=-1.0,
        before='"><img src=x>',
        after="&",
    )
    text = page([evil])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert '"><img src=x>' not in text
    sheet([evil])


# --- the pictures ---


def test_new_pictures_are_new():
    """No held-out picture is among those of training, and each thing comes in both."""
    seen = {example.picture.tobytes() for example in examples(480, held_out=False, seed=0)}
    new = examples(480, held_out=True, seed=0)
    assert not seen & {example.picture.tobytes() for example in new}
    assert {example.shown for example in new} == set(THINGS)


def test_the_wrong_answer_differs_as_it_says():
    made = examples(360, held_out=False, seed=1)
    assert all(differ(example.shown, example.other) == example.difference for example in made)
    assert [sum(example.difference == kind for example in made) for kind in DIFFERENCES] == [120, 120, 120]


def test_pictures_show_the_colour():
    """The mean of the brightest change against the ground leans to the colour that is named."""
    made = [example for example in examples(240, held_out=False, seed=2) if example.shown.colour in ("red", "blue")]
    for example in made:
        pixels = np.asarray(example.picture, dtype=float).reshape(-1, 3)
        strongest = pixels[np.argsort(pixels.max(1) - pixels.min(1))[-40:]].mean(0)
        assert (strongest[0] > strongest[2]) == (example.shown.colour == "red")


def test_shuffling_gives_everyone_the_picture_of_another():
    made = examples(100, held_out=True, seed=3)
    mixed = shuffled(made, 0)
    assert all(a.picture is not b.picture for a, b in zip(made, mixed, strict=True))
    assert [replace(a, picture=b.picture) for a, b in zip(made, mixed, strict=True)] == mixed
    assert {id(example.picture) for example in made} == {id(example.picture) for example in mixed}
