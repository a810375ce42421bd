"""The targets of the suite, what its records say about them, and how figures grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from cases import BATCHES, LENGTHS, RANKED, VOCABULARIES

Record = dict[str, Any]
Records = dict[str, Record]

GROWTH: dict[str, tuple[str, dict[str, float]]] = {
    "growth-length": ("tokens of prompt + answer, batch 1", {f"length-{n}": n for n in LENGTHS}),
    "growth-batch": ("pairs of HH in a batch", {f"hh-b{n}": n for n in BATCHES}),
    "growth-ranked": ("completions of a prompt", {f"ranked-{n}": n for n in RANKED}),
    "growth-vocabulary": ("words of the vocabulary", {f"vocab-{n}": size for n, size in VOCABULARIES.items()}),
}
"""Plots: what grows, and the cases with its values."""


def valid(records: Records) -> Records:
    return {name: record for name, record in records.items() if not record["void"]}


def growth(records: Records) -> dict[str, tuple[str, dict[float, Record]]]:
    """Plots that at least two valid records fill: what grows, and the records by its values."""
    there = valid(records)
    filled = {
        plot: (label, {x: there[name] for name, x in points.items() if name in there})
        for plot, (label, points) in GROWTH.items()
    }
    return {plot: (label, points) for plot, (label, points) in filled.items() if len(points) > 1}


def rate(record: Record) -> str:
    return "pairs_per_wall_s" if record["settings"]["device"] == "cuda" else "pairs_per_cpu_s"


def gain(case: str, side: str = "ours", other: str = "trl") -> Callable[[Records], float | None]:
    """Rate of one side over another's."""
    return lambda records: _quotient(records, case, side, other, rate)


def memory(case: str) -> Callable[[Records], float | None]:
    """Peak, as a share of TRL's."""
    return lambda records: _quotient(records, case, "ours", "trl", lambda record: "peak_rss_gb")


def _quotient(records: Records, case: str, side: str, other: str, key: Callable[[Record], str]) -> float | None:
    record = records.get(case)
    if record is None or record["void"] or not {side, other} <= set(record["summary"]):
        return None
    sides, figure = record["summary"], key(record)
    return sides[side][figure] / sides[other][figure]


def share(case: str) -> Callable[[Records], float | None]:
    def measured(records: Records) -> float | None:
        record = records.get(case)
        return None if record is None or record["void"] else record["summary"]["ours"]["share_of_floor"]

    return measured


def needed(case: str) -> Callable[[Records], float | None]:
    """Share of the tokens through the policy that the mathematics needs: every prompt and every completion once."""

    def measured(records: Records) -> float | None:
        record = records.get(case)
        if record is None or record["void"]:
            return None
        return median(run["useful_tokens"] / run["policy_tokens"] for run in record["runs"] if run["side"] == "ours")

    return measured


TARGETS: list[tuple[str, float, bool, Callable[[Records], float | None]]] = [
    ("HH, batch 8, reference online, over TRL", 6.0, True, gain("hh-b8")),
    ("UltraFeedback, batch 8, over TRL", 3.5, True, gain("ultrafeedback-b8")),
    ("HH, warm cache over online", 1.3, True, gain("hh-b8-cached", "ours warm", "ours")),
    ("UltraFeedback, warm cache over online", 1.3, True, gain("ultrafeedback-b8-cached", "ours warm", "ours")),
    ("HH, batch 8, peak memory, of TRL's", 0.2, False, memory("hh-b8")),
    ("HH, batch 8, share of the floor", 0.7, True, share("hh-b8")),
    ("UltraFeedback, batch 8, share of the floor", 0.7, True, share("ultrafeedback-b8")),
    ("HH, batch 8, of the tokens computed those that are needed", 0.9, True, needed("hh-b8")),
    ("UltraFeedback, batch 8, the same", 0.9, True, needed("ultrafeedback-b8")),
    ("ranked list of 8 over pairwise rows", 4.0, True, gain("ranked-8", "ours", "pairwise")),
    ("GPU, Qwen2-0.5B, bfloat16, HH, over TRL", 4.0, True, gain("gpu-0.5b-hh-b8")),
    ("GPU, Qwen2-0.5B, bfloat16, UltraFeedback, over TRL", 2.5, True, gain("gpu-0.5b-ultrafeedback-b8")),
    ("GPU, Qwen2-7B, bfloat16, HH, over TRL", 4.0, True, gain("gpu-7b-hh-b8")),
    ("GPU, Qwen2-7B, bfloat16, UltraFeedback, over TRL", 2.5, True, gain("gpu-7b-ultrafeedback-b8")),
    ("GPU, Qwen2-7B, bfloat16, HH, share of the floor", 0.45, True, share("gpu-7b-hh-b8")),
    ("GPU, Qwen2-7B, bfloat16, HH, of the tokens computed those that are needed", 0.9, True, needed("gpu-7b-hh-b8")),
]
"""What is measured, the bound, whether it is a lower one, how to read it from the records."""


def target_table(records: Records) -> list[str]:
    rows = []
    for name, bound, at_least, measured in TARGETS:
        value = measured(records)
        reached = None if value is None else (value >= bound if at_least else value <= bound)
        said = {None: "not measured", True: "reached", False: "**not reached**"}[reached]
        rows.append([name, f"{'>=' if at_least else '<='} {bound:g}", "" if value is None else f"{value:.2f}", said])
    return table(["target", "bound", "measured", ""], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
