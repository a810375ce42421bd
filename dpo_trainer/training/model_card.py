"""The model card of a run: what was trained on what, with which loss, and what came out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..config import DPOConfig
from ..data import DataReport
from ..models.unwrap import base_model
from ..printable import printable
from ..reference import Reference
from ..scoring.layout import Layout

TEMPLATE = Path(__file__).with_name("model_card.md")


class DescribedRun(Protocol):
    """What a model card says of a run: `DPOTrainer` has it."""

    args: DPOConfig
    model: Any
    state: Any
    reference: Reference
    layout: Layout
    trained_on: str
    _tag_names: Any

    @property
    def data_reports(self) -> Mapping[str, DataReport]: ...


def write_model_card(
    trainer: DescribedRun,
    folder: Path,
    *,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tags: str | list[str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    dataset: str | list[str] | None = None,
) -> None:
    """README.md in `folder`, over the plain one that transformers or peft wrote there. Names as in `push_to_hub`."""
    args = trainer.args
    start = base_model(trainer.model).config._name_or_path
    name = printable(model_name or args.hub_model_id or folder.resolve().name)
    is_hub_id = bool(start) and not Path(start).exists()
    card = ModelCard.from_template(
        ModelCardData(
            base_model=finetuned_from or (start if is_hub_id else None),
            library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
            tags=[*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            language=language,
            license=license,
            datasets=dataset,
            model_name=name,
        ),
        template_path=str(TEMPLATE),
        title=in_cell(name),
        start=code(start) if start else "a model built in memory",
        trained_on=trainer.trained_on,
        losses=list(zip(map(code, args.loss_type), args.loss_weights or [1.0] * len(args.loss_type), strict=True)),
        args=args,
        reference=in_cell(trainer.reference.description),
        layout=trainer.layout.name,
        tables={printable(name): fenced(report.table()) for name, report in trainer.data_reports.items()},
        lines=_last_lines(trainer.state.log_history),
        version=__version__,
    )
    card.save(folder / "README.md")


def code(text: str) -> str:
    """Text from outside as a code span, which it cannot end: more backticks stand around it than it has in a row."""
    shown = printable(text).replace("|", "\\|")
    ticks = "`" * (_backticks(shown) + 1)
    space = " " if "`" in shown else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def fenced(text: str) -> str:
    """Lines as a block of code, likewise."""
    fence = "`" * max(3, _backticks(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def in_cell(text: str) -> str:
    """A sentence of ours with names from outside, as text of a table: no markup, no other cell."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", printable(text))


def _backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


OF_THE_RUN = re.compile("train_|total_flos$")
"""Numbers of the whole run, which the line that ends it has beside those of its last steps."""


def _last_lines(history: list[dict]) -> dict[str, dict[str, float]]:
    """The last line of training and the last of each evaluation, metrics only."""
    lines: dict[str, dict] = {
        "training": next((line for line in reversed(history) if "loss" in line), {}),
        "evaluation": next((line for line in reversed(history) if any(k.startswith("eval_") for k in line)), {}),
    }
    return {
        name: {k: v for k, v in line.items() if isinstance(v, int | float) and not OF_THE_RUN.match(k)}
        for name, line in lines.items()
        if line
    }
