"""The demo's learning curves: every logged number as CSV, the four that matter as a picture with a guide to read it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from .pairs import EVAL_SPLITS

Log = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    title: str
    metrics: tuple[str, ...]  # keys of the log, without the prefix of a split
    look_for: str


PLOTS = (
    Plot(
        title="loss",
        metrics=("loss",),
        look_for="Look for a fall that levels off. Sigmoid starts at ln 2 = 0.693, plus rpo_alpha times the NLL of the base "
        "(0.46 nats per token); the others' ties stay there.",
    ),
    Plot(
        title="reward accuracy",
        metrics=("rewards/accuracies",),
        look_for="Look for ravin's pairs at 1 and the others' at 0.5: their ties stand in both orders, and of two opposite "
        "orders a model gets one right. At step 0 nothing is preferred yet, and that counts as 0.",
    ),
    Plot(
        title="reward margin",
        metrics=("rewards/margins",),
        look_for="Look for ravin's growing ever slower and the others' at 0. Growth alone proves little: the margin also "
        "grows while both answers become unlikely.",
    ),
    Plot(
        title="log-probs of chosen (solid) and rejected (dotted)",
        metrics=("logps/chosen", "logps/rejected"),
        look_for="Look for ravin's chosen rising to 0 and the others' staying at -ln 10 = -2.3. If chosen falls with "
        "rejected, the good answers are being unlearned, as with --rpo_alpha 0.",
    ),
)
SPLITS = {"train": "", **{f"eval {name}": f"eval_{name}_" for name in EVAL_SPLITS}}
"""Label -> what stands before the name of a metric in the log."""


def write_csv(log: Log, path: Path) -> None:
    """One row per log line; training and evaluation of the same step stand in one row."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in log:
        by_step.setdefault(line["step"], {}).update(line)
    names = sorted({name for row in by_step.values() for name in row} - {"step", "epoch"})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "epoch", *names])
        writer.writeheader()
        writer.writerows(by_step[step] for step in sorted(by_step))


def write_png(log: Log, path: Path) -> None:
    """The plots in one picture, each headed by what to look for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and no display needed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, plot in zip(figure.subplots(2, 2).flat, PLOTS, strict=True):
        for (label, prefix), colour in zip(SPLITS.items(), ("0.7", "C3", "C0"), strict=True):
            for metric, style in zip(plot.metrics, ("-", ":")):
                line_label = label if style == "-" else None
                axes.plot(*_series(log, prefix + metric), style, color=colour, marker=".", label=line_label)
        guide = fill(plot.look_for, 84)
        axes.set_title(plot.title, loc="left", weight="bold", pad=10 + 13 * len(guide.splitlines()))
        axes.text(0, 1.02, guide, transform=axes.transAxes, fontsize=9, va="bottom")
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def _series(log: Log, metric: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[metric]) for line in log if metric in line]
    return [step for step, _ in points], [value for _, value in points]
