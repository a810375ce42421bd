"""Win rate against model size, from the files of judge_win_rate.py.

    python scripts/plot_scaling.py small.json large.json --output scaling.png --title "against the chosen answers"

Sizes are on a logarithmic axis, bars are the intervals of the files, and a line stands at 50 %: a bar that crosses it says
that it is not known yet which one is better. Files with a field "series" (--series of judge_win_rate.py) make a line for each series.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from dpo_trainer.cli.errors import FLAG, OneMessage
from dpo_trainer.data.errors import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = ("parameters", "win_rate", "low", "high", "level")
UNITS = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "K"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", nargs="+", help="What judge_win_rate.py wrote, one file for each model.")
    parser.add_argument(
        "--output", default="scaling.png", help="The picture: .png, .svg or .pdf. Default: scaling.png."
    )
    parser.add_argument("--title", default="", help="Stands above it.")
    parser.add_argument(FLAG, nargs="?", help="Show where an error came from.")
    args = parser.parse_args(argv)
    with OneMessage("plot_scaling.py", argv):
        if Path(args.output).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--output {args.output!r} must end in .png, .svg or .pdf.")
        figure = draw([read(file) for file in args.files], args.title)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output, dpi=150)
    print(f"Written: {clean(args.output)}")


def read(file: str) -> dict[str, Any]:
    """The result in a file, checked."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {clean(error)}. Give files of judge_win_rate.py.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} holds a {type(found).__name__}. Give files of judge_win_rate.py, one object in each."
        )
    for name in NUMBERS:
        value = found.get(name)
        if value is None:
            remedy = "Add it (--model_size)" if name == "parameters" else "Judge anew"
            raise ValueError(f"{file} has no {name!r}, or null. {remedy}, or leave the file out.")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{file}: {name!r} is {clean(repr(value))}. It must be a number.")
    if not found["parameters"] > 0:
        raise ValueError(f"{file}: 'parameters' is {found['parameters']}. It must be above 0.")
    if not 0 <= found["low"] <= found["win_rate"] <= found["high"] <= 1:
        raise ValueError(f"{file}: 'win_rate' must lie between 'low' and 'high', and all three between 0 and 1.")
    if not isinstance(found.get("series") or "", str):
        raise ValueError(f"{file}: 'series' is {clean(repr(found['series']))}. It must be a name.")
    return found


def draw(results: list[dict[str, Any]], title: str = "") -> Figure:
    """One line per series, its points in order of size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and no display needed
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(0.5, color="0.5", linewidth=1, linestyle="--")
    series: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["parameters"]):
        series.setdefault(result.get("series") or "", []).append(result)
    bars = [_line(axes, points) for points in series.values()]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_in_words(size)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("parameters")
    levels = " or ".join(f"{100 * level:g} %" for level in sorted({result["level"] for result in results}))
    axes.set_ylabel(f"win rate ({levels} interval)")
    axes.set_title(clean(title), parse_math=False)
    axes.grid(alpha=0.3)
    if any(series):
        names = [clean(name) or "no series" for name in series]
        legend = axes.legend(bars, [f"{number}" for number in range(len(names))])
        for text, name in zip(
            legend.get_texts(), names, strict=True
        ):  # afterwards: a name may begin with "_" or hold a "$"
            text.set_parse_math(False)
            text.set_text(name)
    return figure


def _line(axes: Any, points: list[dict[str, Any]]) -> Any:
    rates = [point["win_rate"] for point in points]
    below = [point["win_rate"] - point["low"] for point in points]
    above = [point["high"] - point["win_rate"] for point in points]
    sizes = [point["parameters"] for point in points]
    return axes.errorbar(sizes, rates, yerr=[below, above], marker="o", capsize=4, linewidth=1.5)


def size_in_words(parameters: float) -> str:
    """7e9 -> "7B"."""
    for unit, name in UNITS.items():
        if parameters >= unit:
            return f"{parameters / unit:g}{name}"
    return f"{parameters:g}"


if __name__ == "__main__":
    main()
