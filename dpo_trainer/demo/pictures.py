"""The vision demo's world: pictures of one coloured shape each, drawn by code, and pairs of which one answer is true.

No two pictures are alike: the shape has some place, size and shade, and lies on noise of some brightness. In training pictures a
shape in one quarter lies on three of four grounds, in held-out ones on the fourth: each of these meetings is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..types import Message

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 30),
    "pink": (250, 120, 190),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUARTERS = 4  # of a picture, by rows
GROUNDS = (25, 50, 75, 100)  # the least brightness of each; the lightest is below 130
SIDE = 32  # pixels
FINER = 4  # drawn so many times larger, then made smaller: smooth edges

QUESTION = "what is this?"


@dataclass(frozen=True, slots=True)
class Thing:
    """What a picture shows, and what an answer says."""

    colour: str
    shape: str

    @property
    def answer(self) -> str:
        return f"a {self.colour} {self.shape}."


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)

DIFFERENCES = ("colour", "shape", "both")
"""In what the wrong answer of a pair differs from the right one: a third of the pairs each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A picture, the thing on it, and one that is not."""

    picture: Image.Image
    shown: Thing
    other: Thing
    difference: str

    def row(self) -> dict[str, Any]:
        """As the trainer takes it."""

        def turn(thing: Thing) -> list[Message]:
            return [{"role": "assistant", "content": thing.answer}]

        return {"prompt": prompt(), "chosen": turn(self.shown), "rejected": turn(self.other), "images": [self.picture]}


def prompt() -> list[Message]:
    """The question, behind its picture, as a conversation that waits for its answer."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


def draw(thing: Thing, quarter: int, ground: int, random: np.random.Generator) -> Image.Image:
    """A new picture [SIDE, SIDE] of the thing."""
    side = SIDE * FINER
    brightness = GROUNDS[ground] + random.uniform(0, 20)
    noise = random.normal(brightness, 8, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise).resize((side, side), Image.Resampling.BILINEAR)
    x, y = [(0.25 + 0.5 * half + random.uniform(-0.02, 0.02)) * side for half in (quarter % 2, quarter // 2)]
    reach = random.uniform(0.21, 0.25) * side
    shade = (random.uniform(0.8, 1.05) * np.array(COLOURS[thing.colour])).clip(0, 255).astype(int)
    _fill(ImageDraw.Draw(image), thing.shape, x, y, reach, (*shade.tolist(),))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _fill(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, reach: float, colour: tuple[int, ...]) -> None:
    """`reach`: from the centre [x, y] to the sides, in pixels."""
    whole = (x - reach, y - reach, x + reach, y + reach)
    if shape == "circle":
        pen.ellipse(whole, colour)
    elif shape == "square":
        pen.rectangle(whole, colour)
    elif shape == "triangle":
        pen.polygon([(x, y - reach), (x - reach, y + reach), (x + reach, y + reach)], colour)
    else:
        arm = reach / 3
        pen.rectangle((x - reach, y - arm, x + reach, y + arm), colour)
        pen.rectangle((x - arm, y - reach, x + arm, y + reach), colour)


def examples(count: int, *, held_out: bool, seed: int) -> list[Example]:
    """Every thing and every difference equally often, in random order."""
    random = np.random.default_rng([seed, held_out])
    kinds = list(islice(cycle((thing, kind) for kind in DIFFERENCES for thing in THINGS), count))
    return [_example(*kinds[number], held_out=held_out, random=random) for number in random.permutation(count)]


def _example(shown: Thing, difference: str, *, held_out: bool, random: np.random.Generator) -> Example:
    quarter = int(random.integers(QUARTERS))
    ground = quarter if held_out else (quarter + int(random.integers(1, len(GROUNDS)))) % len(GROUNDS)
    others = [thing for thing in THINGS if differ(shown, thing) == difference]
    return Example(
        picture=draw(shown, quarter, ground, random),
        shown=shown,
        other=others[random.integers(len(others))],
        difference=difference,
    )


def differ(one: Thing, other: Thing) -> str:
    """In what: one of `DIFFERENCES`, empty in nothing."""
    colour, shape = one.colour != other.colour, one.shape != other.shape
    return "both" if colour and shape else "colour" * colour + "shape" * shape


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same questions and answers, each with the picture of another."""
    order = np.random.default_rng(seed).permutation(len(examples))
    out = list(examples)
    for one, other in zip(order, np.roll(order, 1), strict=True):  # a cycle: none keeps its own
        out[one] = replace(examples[one], picture=examples[other].picture)
    return out
