"""Data flows one way: a module imports only from what stands to its left."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dpo_trainer"

# Left to right; what shares a place does not import from each other. Imports for types alone count too.
ORDER: list[set[str]] = [
    {"types", "registry", "user_module", "printable", "moved", "versions"},
    {"storage"},
    {"distributed"},
    {"data"},
    {"losses", "models"},
    {"metrics"},
    {"checkpointing"},
    {"scoring"},
    {"reference"},
    {"options"},
    {"config"},
    {"training"},
    {"trainer"},
    {"online"},
    {"cli", "demo"},
    {"inspection"},
    {"scripts"},
]
PLACE = {part: place for place, parts in enumerate(ORDER) for part in parts}

# The same inside the largest folder.
DATA = [
    {"errors", "processor"},
    {"caching"},
    {"images"},
    {"rows"},
    {"files", "report"},
    {"tokens", "content"},
    {"options"},
    {"mapping"},
    {"stream"},
    {"batches", "prepare"},
    {"__init__"},
]

# Stand to the left, and still none of their business: a loss sees two `PairLogps` and nothing else.
FORBIDDEN = {
    "losses": {"data"},
    "metrics": {"data", "models"},
    "reference": {"training"},
    "inspection": {"trainer", "demo"},
}


def sources() -> dict[str, str]:
    """{dotted module: text} of the package and of the scripts."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts)] = path.read_text()
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text()
    return found


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(module: str, text: str) -> set[str]:
    """Dotted modules of this package that `module` imports, relative imports resolved.

    `from .losses import Objective` is an import of `dpo_trainer.losses`; `from . import layout` of `dpo_trainer.layout`.
    """
    package = module.split(".")[:-1]  # `a.b.__init__` lies in package a.b, as does `a.b.c`
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = {f"{target}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if exists(name)}
            found |= submodules | ({target} if submodules != names else set())
    return {name for name in found if name == "dpo_trainer" or name.startswith("dpo_trainer.")}


def part_of(module: str) -> str:
    """The part of the layout: `dpo_trainer.losses.margin` -> losses, `scripts.dpo` -> scripts."""
    head, _, rest = module.partition(".")
    return rest.split(".")[0] if head == "dpo_trainer" else head


def arrows(module: str, text: str) -> set[tuple[str, str]]:
    """(from, to) between parts, for every import of `module` that leaves its own part."""
    here = part_of(module)
    there = {part_of(name) for name in imported(module, text)}
    return {(here, part) for part in there if part and part != here and part in PLACE}


def runs_the_wrong_way(arrow: tuple[str, str]) -> bool:
    here, there = arrow
    return PLACE[there] >= PLACE[here] or there in FORBIDDEN.get(here, set())


def test_every_part_has_a_place():
    """A new module must be put into the order, or this test would look past it."""
    parts = {part_of(module) for module in sources()} - {"__init__", "__main__"}
    assert parts - set(PLACE) == set()
    assert {"trainer", "losses", "data", "reference", "scripts"} <= parts


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("dpo_trainer.losses.margin", "from ..config import DPOConfig", {("losses", "config")}),
        ("dpo_trainer.types", "from .data.rows.schema import x", {("types", "data")}),
        ("dpo_trainer.data.__init__", "from ..trainer import x", {("data", "trainer")}),
        ("dpo_trainer.metrics", "def f():\n    from . import trainer", {("metrics", "trainer")}),
        ("dpo_trainer.registry", "import dpo_trainer.types", {("registry", "types")}),
        ("dpo_trainer.scoring.head", "if TYPE_CHECKING:\n    from ..trainer import x", {("scoring", "trainer")}),
        ("dpo_trainer.losses.margin", "from .shaping import x\nimport torch", set()),
    ],
)
def test_the_reader_sees_wrong_arrows(module, text, found):
    assert arrows(module, text) == found
    assert all(runs_the_wrong_way(arrow) for arrow in found)


def test_no_import_runs_the_wrong_way():
    wrong, seen = [], set()
    for module, text in sources().items():
        if module in ("dpo_trainer.__init__", "dpo_trainer.__main__"):
            continue  # the list of public names, and the command
        found = arrows(module, text)
        seen |= found
        wrong += [f"{module} imports from {there}" for here, there in found if runs_the_wrong_way((here, there))]
    assert wrong == []
    # Arrows that the flow consists of: had the reader lost them, the line above would prove nothing.
    assert {("trainer", "losses"), ("training", "reference"), ("training", "scoring"), ("config", "losses")} <= seen


def test_no_import_within_the_data_runs_the_wrong_way():
    """From files over rows and tokens to batches."""
    place = {part: place for place, parts in enumerate(DATA) for part in parts}

    def stage(module: str) -> str | None:
        head, _, rest = module.partition("dpo_trainer.data.")
        return None if head else rest.split(".")[0]

    wrong, seen = [], set()
    for module, text in sources().items():
        here = stage(module)
        if here is None:
            continue
        there = {stage(name) for name in imported(module, text)} - {None, here}
        seen |= {(here, other) for other in there}
        wrong += [f"{module} imports from {other}" for other in there if place[other] >= place[here]]
    assert wrong == []
    assert {("tokens", "rows"), ("batches", "images"), ("prepare", "mapping")} <= seen


def test_no_circle_within_a_part():
    """Inside a part any direction goes, but not in a circle."""
    texts = sources()
    graph = {
        module.removesuffix(".__init__"): {name for name in imported(module, text) if part_of(name) == part_of(module)}
        for module, text in texts.items()
        if module != "dpo_trainer.__init__"
    }
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path, module])}"
        if module not in finished:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())
    assert "dpo_trainer.losses.shaping" in finished
