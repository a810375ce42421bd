"""Identifiers of the package use the words of the field: tests/banned_words.txt lists the words that they do not use."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dpo_trainer

LIST = Path(__file__).parent / "banned_words.txt"
PACKAGE = Path(dpo_trainer.__file__).parent
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def banned_words() -> dict[str, str]:
    """{word: what to say instead}"""
    lines = (line.removeprefix("word: ").partition(" = ") for line in entries("word"))
    return {word: instead for word, _, instead in lines}


def allowed() -> Counter[tuple[str, str]]:
    """{(folder, word): how many names of the folder may still have it}"""
    lines = (line.split() for line in entries("allow"))
    return Counter({(folder, word): int(count) for _, folder, word, count in lines})


def entries(kind: str) -> list[str]:
    return [line for line in LIST.read_text(encoding="utf-8").splitlines() if line.startswith(f"{kind}: ")]


def words_of(name: str) -> set[str]:
    """The words of an identifier: `_read_whole` and `ReadWhole` both have "read" and "whole"."""
    return {word.lower() for word in WORD.findall(name)}


def names_of(tree: ast.AST) -> Iterator[str]:
    """Every name that the code defines or assigns: functions, classes, arguments, variables, attributes, import aliases."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def found() -> dict[tuple[str, str], set[str]]:
    """{(folder, word): the names with a banned word, each with its module}"""
    banned, out = banned_words(), {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = file.relative_to(PACKAGE)
        folder = module.parts[0] if len(module.parts) > 1 else "."
        for name in {file.stem, *names_of(ast.parse(file.read_text(encoding="utf-8")))}:
            for word in words_of(name) & set(banned):
                out.setdefault((folder, word), set()).add(f"{module}: {name}")
    return out


def test_names_use_the_words_of_the_field():
    limits, banned = allowed(), banned_words()
    over = {
        f"{folder}: {word} (say: {banned[word]})": sorted(names)
        for (folder, word), names in found().items()
        if len(names) > limits[folder, word]
    }
    assert not over


def test_the_list_of_exceptions_only_shrinks():
    names = found()
    stale = {key: len(names.get(key, ())) for key, count in allowed().items() if len(names.get(key, ())) < count}
    assert not stale, "lower these counts in tests/banned_words.txt"


def test_words_of_a_name():
    assert words_of("_read_whole") == {"read", "whole"}
    assert words_of("ReadWHOLEPart2") >= {"read", "part", "2"}
