"""The page: one HTML file that loads nothing else. The template engine escapes everything that comes from data."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..printable import printable
from ..storage.folders import write_text
from .chapters import chapters
from .findings import findings
from .plots import plots
from .result import Inspection
from .show import CUT, READ, SCORED, Gap

TEMPLATE = "page.html"


def write_page(found: Inspection, path: Path) -> None:
    write_text(path, page(found))


def page(found: Inspection) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `printable` also takes out what HTML cannot hold (lone surrogates) or would obey (direction marks).
    environment.filters["printable"] = printable
    environment.tests["gap"] = lambda token: isinstance(token, Gap)
    return environment.get_template(TEMPLATE).render(
        found=found,
        findings=findings(found),
        chapters=chapters(found),
        plots=plots(found),
        states={SCORED: "scored", READ: "read, not scored", CUT: "cut away"},
    )
