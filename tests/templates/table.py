"""Every kind of row under every template: what the package makes of it, judged by the oracle.

python -m tests.templates.table [FOLDER]      from the project's root
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, UndefinedError

from dpo_trainer.data.mapping import PairMapper
from dpo_trainer.data.options import DataOptions
from dpo_trainer.types import Flag

from .oracle import Problem, Texts, check, keepable
from .rendering import Template, readings
from .rows import KINDS, Kind
from .sources import Template as Source
from .sources import templates
from .tokenizer import tokenizer_for

OUTCOMES = ("ok", "flagged", "refused", "wrong", "crash")
ROW = 7
WHERE = f"Row {ROW} of train"

SAYS = {
    Flag.GENERATION_DIFFERS: {"start", "thought", "rewritten"},
    Flag.REASONING_LEFT_OUT: {"lost"},
    Flag.NO_END_OF_TURN: {"no end"},
}
"""Which problems each flag reports. A problem that none of the row's flags reports is wrong, and some are with any flag."""


class Cell(NamedTuple):
    template: str
    kind: str
    outcome: str
    reasons: tuple[str, ...] = ()
    refused_by: str = ""  # "template": it renders no spelling of the row; "ok": it could have kept the promise


def table(sources: Iterable[Source], kinds: Sequence[Kind] = KINDS) -> list[Cell]:
    """All cells, template by template."""
    cells = []
    for source in sources:
        tokenizer = tokenizer_for(source.text)
        template = Template(tokenizer)
        cells += [_cell(source.key, kind, tokenizer, template) for kind in kinds]
    return cells


def _cell(key: str, kind: Kind, tokenizer: Any, template: Template) -> Cell:
    try:
        texts, flags = _package(kind, tokenizer)
    except ValueError as error:
        return _refused(key, kind, str(error), template)
    except Exception as error:
        return Cell(key, kind.name, "crash", (f"{type(error).__name__}: {error}",))
    problems = check(kind, texts, template)
    reasons = tuple(dict.fromkeys(f"{problem.kind}: {problem.reason}" for problem in problems))
    if flags & Flag.IDENTICAL:
        return Cell(key, kind.name, "wrong", ("identical: rows that differ are dropped as identical", *reasons))
    if not problems:
        return Cell(key, kind.name, "ok")
    said = {name for flag, names in SAYS.items() if flags & flag for name in names}
    told = all(
        problem.kind in said or (problem.kind == "end" and _is_marked_short(problem, flags)) for problem in problems
    )
    return Cell(key, kind.name, "flagged" if told else "wrong", reasons)


def _is_marked_short(problem: Problem, flags: Flag) -> bool:
    """The author's own markers leave out the token that ends a call."""
    return bool(flags & Flag.GENERATION_DIFFERS) and problem.reason.startswith("ends before")


def _package(kind: Kind, tokenizer: Any) -> tuple[Texts, Flag]:
    limits = DataOptions().limits(tokenizer.bos_token_id)
    mapper = PairMapper(tokenizer=tokenizer, limits=limits, name="train", streaming=False)
    made = mapper({column: [value] for column, value in kind.row.items()}, [ROW])
    completions = []
    for number, column in enumerate(("chosen_ids", "rejected_ids")):
        ids, at, pieces = made[column][0], 0, []
        for of, start, end in sorted(made["unscored"][0]):
            if of == number:
                pieces += [(ids[at:start], True), (ids[start:end], False)]
                at = end
        pieces.append((ids[at:], True))
        completions.append([(tokenizer.decode(piece), is_scored) for piece, is_scored in pieces if piece])
    return Texts(tokenizer.decode(made["prompt_ids"][0]), completions), Flag(made["flags"][0])


def _refused(key: str, kind: Kind, error: str, template: Template) -> Cell:
    """A refusal names the row and the way out, and the field where another spelling of it works."""
    renders = [template.renders(kind, reading) for reading in readings(kind)]
    by = "ok" if keepable(kind, template) else "" if any(renders) else "template"
    reason = error.removeprefix(WHERE)
    if not error.startswith(WHERE) or not re.search(r"[.:] [A-Z][^.]+\.$", error):
        return Cell(key, kind.name, "wrong", (f"refusal: without row or way out: {error}",), by)
    cannot = re.search(r"does not write|not written", reason)  # in no spelling
    if any(renders) and not renders[0] and kind.fields and not cannot and not _names(kind.fields, error, template):
        return Cell(key, kind.name, "wrong", (f"refusal: does not name {kind.fields[0]!r}{reason}",), by)
    return Cell(key, kind.name, "refused", (f"refused{reason}",), by)


def _names(fields: Sequence[str], error: str, template: Template) -> bool:
    """In words of our own, or in those that the author of the template meant for the user."""
    for raised in template.errors:
        if not isinstance(raised, TemplateError) or isinstance(raised, UndefinedError):
            error = error.replace(str(raised), "")
    return any(field in error for field in fields)


def counts(cells: Iterable[Cell]) -> str:
    """One line per kind of row."""
    by_kind: dict[str, Counter] = defaultdict(Counter)
    for cell in cells:
        by_kind[cell.kind][cell.outcome] += 1
        by_kind[cell.kind][f"by {cell.refused_by}"] += cell.outcome == "refused"
    columns = (*OUTCOMES, "by template", "by ok")
    lines = [
        f"{'kind of row':42}"
        + "".join(f"{name:>9}" for name in OUTCOMES)
        + "   (of refused: by the template, could be ok)"
    ]
    total: Counter = Counter()
    for name, count in by_kind.items():
        total += count
        lines.append(f"{name:42}" + "".join(f"{count[column]:9}" for column in columns))
    lines.append(f"{'all':42}" + "".join(f"{total[column]:9}" for column in columns))
    return "\n".join(lines)


def listed(cells: Iterable[Cell], outcomes: Sequence[str] = ("wrong", "crash")) -> str:
    """The cells of some outcomes, grouped by kind of row and reason."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for cell in cells:
        if cell.outcome in outcomes:
            groups[cell.outcome, cell.kind, "; ".join(cell.reasons)].append(cell.template)
    return "\n".join(
        f"{outcome}, {kind}: {reason}\n    {len(names)}: {', '.join(names)}"
        for (outcome, kind, reason), names in sorted(groups.items(), key=lambda group: (group[0][:2], -len(group[1])))
    )


def record(cells: Iterable[Cell]) -> dict[str, Any]:
    """Which cells are right: the kinds of rows, and for each template a digit per kind."""
    by_template: dict[str, dict[str, bool]] = defaultdict(dict)
    for cell in cells:
        by_template[cell.template][cell.kind] = cell.outcome == "ok"
    kinds = list(next(iter(by_template.values())))
    digits = {name: "".join(str(int(of[kind])) for kind in kinds) for name, of in by_template.items()}
    return {"kinds": kinds, "templates": digits}


def recorded(record: dict[str, Any]) -> set[tuple[str, str]]:
    """The (template, kind of row) that a record calls right."""
    return {
        (name, kind)
        for name, digits in record["templates"].items()
        for kind, digit in zip(record["kinds"], digits, strict=True)
        if digit == "1"
    }


def main(folder: str = "") -> None:
    """Print the table; into a folder, if one is given, also every cell that is not ok, and the record of those that are."""
    cells = table(templates())
    print(counts(cells))
    if not folder:
        print(listed(cells))
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "cells.txt").write_text(listed(cells, ("crash", "wrong", "flagged", "refused")) + "\n")
    (Path(folder) / "right.json").write_text(json.dumps(record(cells), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
