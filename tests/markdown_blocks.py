"""The code blocks of a Markdown page, run in order, and their output against what the page prints.

    ```python                 run; the blocks of a page share their names
    ```python file:NAME       written to the file NAME
    ```text output            what the block before it prints
    ```sh                     commands
Any other block is not run.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.05
"""Of a number with a decimal point, relative, or 0.02 where that is more: other machines sum in another order."""


def enter_checkout(folder: Path, session_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to an empty folder in which the relative paths of the checkout work. All pages share one demo base model."""
    for name in ("scripts", "accelerate_configs", "benchmarks", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(session_folder / "demo-cache"))
    return folder


@dataclass(frozen=True)
class Block:
    info: str
    text: str
    where: str  # page and line
    output: str | None  # what the page says that it prints


def blocks(page: Path) -> list[Block]:
    """All code blocks, an output attached to the block that it belongs to."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in FENCE.finditer(text):
        where = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"
        if match["info"] == "text output":
            last = found.pop()
            found.append(Block(last.info, last.text, last.where, match["text"]))
        else:
            found.append(Block(match["info"], match["text"], where, None))
    return found


def run_python(page: Path, folder: Path) -> list[tuple[Block, str]]:
    """Run the Python blocks of a page in the current folder, which is `folder`; each with what it printed."""
    names: dict = {"__name__": "__main__"}
    ran = []
    for block in blocks(page):
        if block.info.startswith("python file:"):
            (folder / block.info.removeprefix("python file:")).write_text(block.text)
        elif block.info == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.text, block.where, "exec"), names)
            ran.append((block, printed.getvalue()))
    return ran


def commands(block: Block) -> list[str]:
    """The commands of an `sh` block, one per line; `\\` at the end of a line joins it with the next."""
    return [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


def assert_prints(block: Block, printed: str) -> None:
    """Every line that the page shows is printed, in this order; ` ...` at its end stands for the rest of the line."""
    assert block.output is not None
    lines = iter(printed.splitlines())
    for wanted in block.output.splitlines():
        assert any(same_line(line, wanted) for line in lines), (
            f"{block.where} should print\n    {wanted}\nafter what came before it, and prints\n{printed}"
        )


def same_line(line: str, wanted: str) -> bool:
    parts, wanted_parts = split_at_numbers(line.strip()), split_at_numbers(wanted.strip().removesuffix(" ..."))
    if wanted.endswith(" ..."):
        parts = parts[: len(wanted_parts)]
        parts[-1] = parts[-1][: len(wanted_parts[-1])]
    return len(parts) == len(wanted_parts) and all(map(same_part, parts, wanted_parts))


def split_at_numbers(line: str) -> list[str]:
    """Text, number, text ... text; the first and the last may be empty."""
    return re.split(f"({NUMBER.pattern})", line)


def same_part(part: str, wanted: str) -> bool:
    if not NUMBER.fullmatch(wanted) or "." not in wanted:
        return part == wanted
    if not NUMBER.fullmatch(part):
        return False
    return abs(float(part) - float(wanted)) <= max(0.02, TOLERANCE * abs(float(wanted)))
