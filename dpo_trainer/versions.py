"""Which versions of other libraries are installed, which were tested, and which installed ones do not fit together.

    python -m dpo_trainer.versions

It imports none of the libraries that it names but `rich`, so it also answers where one of them cannot be imported.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

PACKAGE = "dpo_trainer"
LOCK = "constraints.txt"


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Releases that pip installs side by side, and that fail together."""

    versions: dict[str, str]  # {package: the releases that take part}
    fails: str
    way_out: str
    error: str  # regular expression: what is raised then

    def applies(self) -> bool:
        return all(_is_within(installed(package), releases) for package, releases in self.versions.items())

    def __str__(self) -> str:
        pair = " and ".join(f"{package} {installed(package)}" for package in self.versions)
        return f"{pair} do not fit together: {self.fails}. {self.way_out}."


CONFLICTS = (
    Conflict(
        versions={"transformers": ">=5.24", "peft": "<0.22"},
        fails="the adapter methods of a transformers model (add_adapter, load_adapter, disable_adapters ...) refuse this peft",
        way_out="Use peft's own: get_peft_model(model, config) and PeftModel.from_pretrained(model, folder); or install "
        "transformers<5.24 or, once it is released, peft>=0.22",
        error=r"version of PEFT you are using is not compatible",
    ),
    Conflict(
        versions={"torch": "==2.13.0+cpu", "torchvision": ">=0"},
        fails="torchvision is built against the CUDA build of torch, and image processors of transformers import it",
        way_out="Uninstall torchvision (the processors then use pillow), or install torch with CUDA",
        error=r"torchvision::nms|Could not import module '\w*(Processor|torchvision)\w*'",
    ),
)
"""Seen to fail. What pip refuses by itself, or `pyproject.toml` excludes, is not here."""


@cache
def installed(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def conflicts() -> list[Conflict]:
    """Those among the installed packages."""
    return [conflict for conflict in CONFLICTS if conflict.applies()]


def note_on(package: str) -> str:
    """What an error about a package adds: the conflicts of the installed one, each a sentence; mostly none."""
    return "".join(f" {conflict}" for conflict in conflicts() if package in conflict.versions)


def raise_conflict_behind(error: BaseException, what_failed: str) -> None:
    """Where an error comes from a conflict among the installed packages, by its words and those of its causes: say so.

    Raises:
        ValueError: names the versions and the way out; nothing is raised for any other error.
    """
    words = " ".join(str(cause) for cause in _causes(error))
    for conflict in conflicts():
        if re.search(conflict.error, words):
            raise ValueError(f"{what_failed}: {conflict}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_within(version: Version | None, releases: str) -> bool:
    return version is not None and SpecifierSet(releases).contains(version, prereleases=True)


def tested() -> dict[str, Version]:
    """{package: version} of the lock, as it applies to this Python and platform. Empty where no lock is at hand."""
    pins = [Requirement(line) for line in lock_lines()]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in here}


def lock_lines() -> list[str]:
    """The pins of the lock: of the checkout, or the copy that a wheel carries."""
    here = Path(__file__).parent
    lock = next((path for path in (here.parent / LOCK, here / LOCK) if path.is_file()), None)
    lines = lock.read_text(encoding="utf-8").splitlines() if lock else []
    return [line for line in lines if line and not line.startswith("#")]


def required() -> list[str]:
    """The packages that the installed `dpo_trainer` names, core first, each once."""
    needs = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    core_first = sorted(needs, key=lambda need: "extra" in str(need.marker))
    names = dict.fromkeys(canonicalize_name(need.name) for need in core_first)
    return [name for name in names if name != canonicalize_name(PACKAGE)]


def version_table() -> Table:
    """Installed and tested version of every package that this one names."""
    lock = tested()
    table = Table("", "installed", "tested", box=None, pad_edge=False)
    table.add_row("python", platform.python_version(), "3.11")
    for name in required():
        table.add_row(name, str(installed(name) or "-"), str(lock.get(name, "-")))
    return table


def main() -> None:
    console = Console(highlight=False)
    console.print(version_table())
    for conflict in conflicts():
        console.print(f"\n{conflict}", markup=False)
    if not conflicts():
        console.print("\nNo known conflict applies to the installed versions.")


if __name__ == "__main__":
    main()
