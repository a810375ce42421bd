"""The same in the terminal. Data reaches it as `rich.text.Text` of printable characters: no markup, no escape sequences."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..printable import printable
from .chapters import Chapter, chapters
from .findings import GOOD, NOTICE, PROBLEM, findings
from .result import Inspection
from .show import CUT, READ, SCORED, Gap, ShownRow, Stretch, Token

LEVELS = {PROBLEM: "bold red", NOTICE: "yellow", GOOD: "green"}
ROLES = {"prompt": "blue", "chosen": "green", "rejected": "red", "between": "magenta"}
STATES = {SCORED: "underline", READ: "", CUT: "strike dim"}
LEGEND = "| ends a token; scored ones are underlined; [[control tokens]]; {{cut away}}; · space, ⏎ line break, ⇥ tab"


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    console = console or Console(highlight=False, markup=False, emoji=False)
    console.print(Text(printable(found.dataset), "bold"))
    for finding in findings(found):
        line = Text(f"{finding.level:8}", LEVELS[finding.level])
        console.print(line.append(printable(finding.text), "default"))
    for chapter in chapters(found):
        _print_chapter(chapter, console)
    if found.shown:
        console.print(Text("\nRows as the model sees them", "bold"))
        console.print(Text(LEGEND, "dim"))
    for row in found.shown:
        _print_row(row, console)


def _print_chapter(chapter: Chapter, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=any(chapter.columns))
    for column in chapter.columns:
        table.add_column(Text(column), overflow="fold")
    for row in chapter.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(Text(f"\n{chapter.title}", "bold"))
    console.print(table)
    if chapter.note:
        console.print(Text(printable(chapter.note), "dim"))


def _print_row(row: ShownRow, console: Console) -> None:
    console.print(Text(f"\nRow {row.number} ({printable(row.form)}): {printable(row.outcome)}", "bold"))
    for stretch in row.stretches:
        counts = ", ".join(f"{number} {state}" for state, number in stretch.counts.items())
        console.print(Text(f"{stretch.title}: {counts}", ROLES[stretch.role]))
        console.print(_tokens(stretch), soft_wrap=True)


def _tokens(stretch: Stretch) -> Text:
    """Without colours too: cut tokens stand in double braces, control tokens in double brackets."""
    text = Text(style=ROLES[stretch.role])
    cut = False
    for token in stretch.tokens:
        if isinstance(token, Gap):
            text.append(f" ... {token.hidden} tokens more ... ", "dim italic")
            continue
        if (token.state == CUT) != cut:
            text.append("{{" if not cut else "}}", "dim")
            cut = not cut
        _append(text, token)
    return text.append("}}" if cut else "", "dim")


def _append(text: Text, token: Token) -> None:
    style = f"{STATES[token.state]} {'reverse bold' if token.control else ''}".strip()
    shown = "\n".join(map(printable, token.text.split("\n")))  # the line breaks that show.py puts after its sign
    text.append(f"[[{shown}]]" if token.control else shown, style)
    text.append("|", "dim not underline not strike not reverse")
