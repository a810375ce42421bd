"""Completions with their scores, as they are shown: a table in the console, a file of lines, and the trackers of a run.

Texts are a model's and untrusted: no markup, no control characters reach a terminal or a page.
"""

from __future__ import annotations

import json
import logging
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText
from transformers.integrations import TensorBoardCallback

from ..data.errors import clean
from .pairing import Outcome, paired
from .samples import Sampled

logger = logging.getLogger(__name__)

FILE = "completions.jsonl"
SHOWN = ("prompt", "completion", "score", "outcome")


def rows_of(step: int, sampled: Sampled, scores: Sequence[float | None]) -> list[dict[str, Any]]:
    """One per completion."""
    row, outcome = paired(sampled, scores, every_pair=False)
    outcomes: list[str | None] = [None] * len(scores)
    if outcome is Outcome.TIED:
        outcomes = [None if score is None else "tie" for score in scores]
    elif outcome is Outcome.PAIRED:
        ids = [completion.ids if score is not None else None for completion, score in zip(sampled.completions, scores)]
        outcomes[ids.index(row["chosen_ids"])], outcomes[ids.index(row["rejected_ids"])] = "chosen", "rejected"
    return [
        {
            "step": step,
            "example_id": sampled.example_id,
            "prompt": sampled.prompt,
            "question": sampled.question(),
            "completion": completion.text,
            "score": score,
            "outcome": outcome,
        }
        for completion, score, outcome in zip(sampled.completions, scores, outcomes, strict=True)
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The columns `SHOWN`, as text that is not escaped yet."""
    score = "-" if row["score"] is None else f"{row['score']:.4g}"
    return [row["question"], row["completion"], score, row["outcome"] or "-"]


def print_completions(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """A table: long text cut, control characters as escapes, and no markup, whatever the text holds."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    table = Table(title=f"Completions of step {rows[0]['step']}", show_lines=True)
    for column in SHOWN:
        table.add_column(column, overflow="fold", justify="right" if column == "score" else "left")
    for row in rows:
        table.add_row(*(RichText(clean(cell)) for cell in _cells(row)))
    console.print(table)


def append(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    written = [{key: value for key, value in row.items() if key != "question"} for row in rows]
    lines = [json.dumps(row, default=str) + "\n" for row in written]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:  # a full disk shall not end the run for a file that is only looked at
        logger.warning("Completions were not written to %s: %s.", path, error)


def cut_back(path: Path, step: int) -> None:
    """Keep what was written up to `step`: later lines are of steps that are made again; a kill may have cut the last."""
    if not path.exists():
        return
    kept = path.with_name(f"{path.name}.part")
    with path.open(encoding="utf-8", errors="replace") as old, kept.open("w", encoding="utf-8") as new:
        new.writelines(line for line in old if line.endswith("\n") and _step_of(line) <= step)
    os.replace(kept, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def as_markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is: every sign that could mean something as a character reference."""
    return "".join(f"&#{ord(char)};" if char in string.punctuation else char for char in clean(text))


def _to_wandb(rows: Sequence[Mapping[str, Any]], step: int, trainer: Any) -> None:
    import wandb

    if wandb.run is None:
        logger.warning("Completions were not logged to wandb: no run has begun there.")
        return
    table = wandb.Table(columns=["step", *SHOWN], data=[[step, *_cells(row)] for row in rows])
    wandb.log({"completions": table, "train/global_step": step})  # as transformers numbers its own lines


def _to_trackio(rows: Sequence[Mapping[str, Any]], step: int, trainer: Any) -> None:
    import trackio

    # It takes strings for Markdown.
    data = [[step, *map(as_markdown, _cells(row))] for row in rows]
    table = trackio.Table(columns=["step", *SHOWN], data=data)
    trackio.log({"completions": table, "train/global_step": step})


def _to_tensorboard(rows: Sequence[Mapping[str, Any]], step: int, trainer: Any) -> None:
    header = [SHOWN, ["---"] * len(SHOWN)]
    lines = [" | ".join(cells) for cells in [*header, *(map(as_markdown, _cells(row)) for row in rows)]]
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("completions", "\n".join(f"| {line} |" for line in lines), step)


TRACKERS = {"wandb": _to_wandb, "trackio": _to_trackio, "tensorboard": _to_tensorboard}
