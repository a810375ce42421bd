"""Plots of the suite's records, as SVG: growth, and accuracy against time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "dpo_trainer"  # the same figures give the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402
from targets import Record, Records, growth, valid  # noqa: E402


def draw(records: Records, folder: Path) -> list[Path]:
    """Every plot that the records can fill."""
    paths = [
        save(growth_plot(points, label), folder / f"{plot}.svg") for plot, (label, points) in growth(records).items()
    ]
    curves = {name: record for name, record in valid(records).items() if name.startswith("quality-")}
    return paths + ([save(quality_plot(curves), folder / "quality.svg")] if curves else [])


def growth_plot(points: dict[float, Record], label: str) -> plt.Figure:
    """Rate and memory of every side, both axes logarithmic."""
    figure, (rate, memory) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    sides = dict.fromkeys(side for record in points.values() for side in record["summary"] if side != "ratio")
    for axis, key, title in ((rate, "pairs_per_cpu_s", "pairs per CPU second"), (memory, "peak_rss_gb", "peak GB")):
        for side in sides:
            line = {x: record["summary"][side][key] for x, record in points.items() if side in record["summary"]}
            axis.plot(list(line), list(line.values()), marker="o", label=named(side))
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel=title)
        axis.set_xticks(list(points), labels=[f"{x:,}" for x in points], minor=False)
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    rate.legend()
    return figure


def quality_plot(records: Records) -> plt.Figure:
    """Accuracy on held-out pairs against CPU minutes of training, evaluation not counted. The first run of each side."""
    figure, axes = plt.subplots(
        1, len(records), figsize=(4.5 * len(records), 3.5), layout="constrained", squeeze=False
    )
    for axis, (name, record) in zip(axes[0], records.items(), strict=True):
        for side in (side for side in record["summary"] if side != "ratio"):
            run = next(run for run in record["runs"] if run["side"] == side)
            axis.plot(*curve(run, lambda cpu, wall: cpu / 60), marker="o", label=named(side))
        axis.set(
            title=name.removeprefix("quality-"), xlabel="CPU minutes", ylabel="accuracy of rewards, held-out pairs"
        )
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def curve(run: dict[str, Any], time: Callable[[float, float], float]) -> tuple[list[float], list[float]]:
    return [time(cpu, wall) for cpu, wall, _ in run["accuracy"]], [accuracy for *_, accuracy in run["accuracy"]]


def named(side: str) -> str:
    return side.replace("ours", "dpo_trainer").replace("trl", "TRL")


def save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
