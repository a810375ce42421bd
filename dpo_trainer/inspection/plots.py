"""The histograms of the page, as SVG in `data:` addresses. Mid-grey lines on nothing: readable on white and on black."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from .measure import Histogram
from .result import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "#808080"
STYLE = {"prompt": ("#3b82c4", ":"), "chosen": ("#2e9e5b", "-"), "rejected": ("#d9682b", "--")}
"""Colour and line of each role: told apart without colour too."""

INCHES = (4.2, 2.5)
"""At 96 dots to the inch just wider than a phone: letters keep their size there."""


def plots(found: Inspection) -> dict[str, str]:
    """{name: address} of those that there is something to draw for."""
    drawn = {}
    if found.histogram is not None:
        drawn["lengths"] = _drawn(_lengths, found.histogram, found.options["max_length"])
    if found.difference is not None:
        drawn["difference"] = _drawn(_difference, found.difference)
    return drawn


def _lengths(axes: Axes, histogram: Histogram, max_length: int | None) -> None:
    for side, counts in histogram.counts.items():
        colour, line = STYLE[side]
        axes.stairs(counts, histogram.edges, color=colour, linestyle=line, linewidth=1.8, label=side)
    if max_length is not None and max_length < histogram.edges[-1]:
        axes.axvline(max_length, color=GREY, linewidth=1, label="max_length")
    axes.set_xlabel("tokens (the last bar: and more)")
    axes.legend(frameon=False, labelcolor=GREY, fontsize=8)


def _difference(axes: Axes, histogram: Histogram) -> None:
    axes.stairs(histogram.counts["difference"], histogram.edges, fill=True, color=STYLE["chosen"][0], alpha=0.7)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("tokens of chosen minus rejected")


def _drawn(draw: Any, *arguments: Any) -> str:
    import matplotlib  # a second to import
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    draw(axes, *arguments)
    axes.set_ylabel("count", color=GREY)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.xaxis.label.set_color(GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    file = io.BytesIO()
    # The same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "inspection", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")
