"""The page of the vision demo: pictures, the answers of their pairs, rewards, and what the model says. One file, and a PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A pair and its picture. Rewards are in nats."""

    picture: Image.Image
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float
    before: str
    after: str

    @property
    def png(self) -> str:
        """As an address that holds the picture."""
        file = io.BytesIO()
        self.picture.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def write_page(folder: Path, pairs: Sequence[Shown]) -> Path:
    """`pictures.html` and `pictures.png` in the folder; the path of the first."""
    path = folder / "pictures.html"
    path.write_text(page(pairs), encoding="utf-8")
    sheet(pairs).savefig(folder / "pictures.png", dpi=120)
    return path


def page(pairs: Sequence[Shown]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("vision.html").render(pairs=pairs)


def sheet(pairs: Sequence[Shown]) -> Figure:
    columns = 6
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(2 * columns, 2.4 * lines), layout="constrained")
    for axes, pair in zip(figure.subplots(lines, columns, squeeze=False).flat, pairs, strict=False):
        axes.imshow(pair.picture)
        axes.set_title(
            f"says: {pair.after}\n+ {pair.chosen} {pair.chosen_reward:+.1f}\n- {pair.rejected} {pair.rejected_reward:+.1f}",
            fontsize=6,
            parse_math=False,
        )
    for axes in figure.axes:
        axes.set_axis_off()
    return figure
