"""Every architecture against itself, one prompt and completion at a time: the table of docs/vision.md.

    python tests/vision/table.py            prints it
    python tests/vision/table.py --write    puts it into docs/vision.md

Log-probs: the largest difference of a sum, in nats, from the model in float64 on what the processor makes of each text; of sums
up to some hundred nats. Gradients: of all weights, relative to their norm. Images: how often the vision tower gets an image of a pair.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

import oracles
import torch
import vision_rows
import zoo
from test_vision_models import batch_of, counted, distance

from dpo_trainer import DPOTrainer
from dpo_trainer.models.unwrap import base_model
from dpo_trainer.models.vision import vision_tower

PAGE = HERE.parents[1] / "docs" / "vision.md"
REGION = re.compile(r"(<!-- models -->\n).*?(<!-- end of models -->)", re.DOTALL)
HEADER = ["", "layout", "log-probs, flat", "padded", "gradients, flat", "padded", "images per pair, flat", "padded"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = [HEADER, ["---"] * len(HEADER), *map(row_of, zoo.ZOO)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    print(table)
    if options.write:
        PAGE.write_text(REGION.sub(rf"\1\n{table}\n\n\2", PAGE.read_text()))


def row_of(family: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        made = vision_rows.trainer(folder, family)
        want = vision_rows.answer(*zoo.ZOO[family](), vision_rows.rows())
        logps, gradients, images = zip(*(measured(made, layout, want) for layout in ("flat", "padded")), strict=True)
        made.train()
    name = type(base_model(made.model)).__name__.removesuffix("ForConditionalGeneration")
    return [name, made.layout.name, *(f"{x:.0e}" for x in (*logps, *gradients)), *map(str, images)]


def measured(made: DPOTrainer, layout: str, want: vision_rows.Answer) -> tuple[float, float, int]:
    batch = batch_of(made, layout)
    with made.scorer.step():
        got = made.scorer(made.model, batch)
        gradients = oracles.gradients(made.model, vision_rows.mix(got.chosen, got.rejected))
    difference = torch.cat([(gradients[name] - g).flatten() for name, g in want.gradients.items()]).norm()
    size = torch.cat([g.flatten() for g in want.gradients.values()]).norm()
    return distance(got, want), (difference / size).item(), images_per_pair(made, layout)


def images_per_pair(made: DPOTrainer, layout: str) -> int:
    """Of the first row, which has one image, and two completions: how often the tower gets that."""

    def given(batch_layout: str) -> int:
        with counted(vision_tower(made.model)) as policy, torch.no_grad(), made.scorer.step():
            made.scorer(made.model, batch_of(made, batch_layout, [0]))
        return sum(policy)

    return given(layout) // given("flat")


if __name__ == "__main__":
    main()
