"""Every kind of row under every template: what the package makes of it, judged by the oracle.

python -m tests.templates.table [FILE]      from the project's root; FILE takes the list of cells that are not right
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_trainer.data.mapping import PairMapper
from dpo_trainer.data.options import DataOptions
from dpo_trainer.data.report import Flag

from .oracle import Template, Texts, check, keepable, readings
from .rows import KINDS, Kind
from .sources import Template as Source
from .sources import templates
from .tokenizer import tokenizer_for

OUTCOMES = ("ok", "flagged", "refused", "wrong", "crash")
ROW = 7
WHERE = f"Row {ROW} of train"

SAY_NOTHING = Flag["TRUNCATED_PROMPT"] | Flag["TRUNCATED_CHOSEN"] | Flag["TRUNCATED_REJECTED"] | Flag["MERGED_BOUNDARY"]
SAY_NOTHING |= Flag["EMPTY_PROMPT"] | Flag["IDENTICAL"] | Flag["NO_ROOM"] | Flag["EMPTY_COMPLETION"] | Flag["TOO_LONG"]
SAY_NOTHING |= Flag["TIED"] | Flag["DUPLICATE"] | Flag["CONTROL_TEXT"]
"""Flags that do not speak of a template."""

NEVER = ("prompt scored", "answer not scored", "runs", "end", "quoted")
"""No flag excuses these: such a row must be refused."""


class Cell(NamedTuple):
    template: str
    kind: str
    outcome: str
    reasons: tuple[str, ...] = ()
    keepable: bool = False  # of what is refused: the template could have kept the promise


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
    flagged = bool(flags & ~SAY_NOTHING) and not any(problem.kind in NEVER for problem in problems)
    return Cell(key, kind.name, "flagged" if flagged else "wrong", reasons)


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
    could = keepable(kind, template)
    reason = error.removeprefix(WHERE)
    if not error.startswith(WHERE) or not re.search(r"[.:] [A-Z][^.]+\.$", error):
        return Cell(key, kind.name, "wrong", (f"refusal: without row or way out: {error}",), could)
    if kind.field and kind.field not in error and _other_spelling_works(kind, template):
        return Cell(key, kind.name, "wrong", (f"refusal: does not name {kind.field!r}: {reason}",), could)
    return Cell(key, kind.name, "refused", (f"refused: {reason}",), could)


def _other_spelling_works(kind: Kind, template: Template) -> bool:
    plain, *others = [
        all(template.whole(kind, reading.prompt + completion) is not None for completion in reading.completions)
        for reading in readings(kind)
    ]
    return not plain and any(others)


def counts(cells: Iterable[Cell]) -> str:
    """One line per kind of row."""
    by_kind: dict[str, Counter] = defaultdict(Counter)
    for cell in cells:
        by_kind[cell.kind][cell.outcome] += 1
        by_kind[cell.kind]["could be ok"] += cell.outcome == "refused" and cell.keepable
    columns = (*OUTCOMES, "could be ok")
    lines = [f"{'kind of row':42}" + "".join(f"{name:>9}" for name in columns[:-1]) + "  refused, could be ok"]
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


def right(cells: Iterable[Cell]) -> dict[str, list[str]]:
    """Of each template, the kinds of rows that are ok."""
    out: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        if cell.outcome == "ok":
            out[cell.template].append(cell.kind)
    return dict(out)


if __name__ == "__main__":
    found = table(templates())
    print(counts(found))
    text = listed(found, ("crash", "wrong", "flagged", "refused"))
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(text + "\n")
    else:
        print(listed(found))
