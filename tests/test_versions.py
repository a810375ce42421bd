"""Versions of other libraries: the lock, what is known not to fit together, and what users are told of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import version_ranges
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoProcessor

from dpo_trainer import versions
from dpo_trainer.models.load import load_model, load_processing_class
from dpo_trainer.versions import CONFLICTS, conflicts, note_on, raise_conflict_behind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [Requirement(line) for line in versions.lock_lines()]
PLATFORMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

PEFT = next(conflict for conflict in CONFLICTS if "peft" in conflict.versions)
REFUSAL = "The version of PEFT you are using is not compatible, please use a version >= 0.22.0"


@pytest.fixture
def have(monkeypatch):
    """Pretend that these versions are installed, and nothing else."""

    def installed(**found: str) -> None:
        monkeypatch.setattr(
            versions, "installed", lambda package: Version(found[package]) if package in found else None
        )

    return installed


# --- the lock ---


def requirements() -> list[Requirement]:
    """Of the core and of every extra."""
    everything = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for group in everything for text in group]
    return [need for need in found if need.name != PROJECT["name"]]


def pinned(python: str, platform: dict[str, str]) -> Counter[tuple[str, str]]:
    around = {"python_version": python, "python_full_version": f"{python}.7", "extra": "", **platform}
    here = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(around)]
    return Counter((canonicalize_name(pin.name), str(pin.specifier)) for pin in here)


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: f"{p['sys_platform']}-{p['platform_machine']}")
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_agrees_with_pyproject(python, platform):
    """Each named package has one pin, within its range. If this fails: `make lock`."""
    pins = pinned(python, platform)
    assert len({name for name, _ in pins}) == len(pins), "a package has two versions at once"
    of = dict(pins.keys())
    around = {"python_version": python, "python_full_version": f"{python}.7", "extra": "", **platform}
    for need in requirements():
        if need.marker is not None and not need.marker.evaluate(around):
            continue
        pin = of.get(canonicalize_name(need.name))
        assert pin, f"{need.name} is not in the lock"
        assert need.specifier.contains(pin.removeprefix("==")), f"{need} is locked {pin}"


def test_every_line_of_the_lock_is_one_exact_version():
    for pin in PINS:
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), str(pin)
        assert (pin.url, pin.extras) == (None, set()), f"{pin}: pip takes neither in a constraints file"


def test_torch_of_the_lock_names_no_build():
    """`torch==2.13.0+cpu` would keep a GPU machine from its CUDA build."""
    assert [str(pin.specifier) for pin in PINS if pin.name == "torch"] == ["==2.13.0"]


def test_installs_use_the_lock():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    installs = [line for line in (makefile + readme).splitlines() if "pip install" in line and "#" not in line]
    assert len(installs) > 3
    assert [line for line in installs if "-c constraints.txt" not in line] == []


def test_locked_versions_are_tested_here():
    """The environment of `make test` is the lock's."""
    lock = versions.tested()
    if not (ROOT / ".venv" / "installed-dev").exists() or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not the environment of `make test`")
    differ = {name: versions.installed(name) for name in versions.required() if versions.installed(name)}
    assert {name: str(found) for name, found in differ.items() if found.public != str(lock[name])} == {}


# --- what does not fit together ---


@pytest.mark.parametrize(
    ("transformers", "peft", "fails"),
    [("5.24.0", "0.21.2", True), ("5.25.1", "0.19.0", True), ("5.23.0", "0.21.2", False), ("5.24.0", "0.22.0", False)],
)
def test_conflict_is_found_by_versions(have, transformers, peft, fails):
    have(transformers=transformers, peft=peft)
    assert (PEFT in conflicts()) == fails
    note = note_on("peft")
    assert bool(note) == fails
    if fails:
        assert f"transformers {transformers} and peft {peft}" in note
        assert "get_peft_model" in note


def test_conflict_is_found_where_a_package_is_missing(have):
    have(transformers="5.24.0")
    assert conflicts() == []


def test_error_is_explained_by_its_cause(have):
    have(transformers="5.24.0", peft="0.21.2")
    outer = RuntimeError("it failed")
    outer.__cause__ = ValueError(REFUSAL)
    with pytest.raises(
        ValueError, match=r"The model 'm' did not load: transformers 5\.24\.0 and peft 0\.21\.2 do not fit"
    ):
        raise_conflict_behind(outer, "The model 'm' did not load")
    raise_conflict_behind(ValueError("another error"), "The model 'm' did not load")
    have(transformers="5.24.0", peft="0.22.0")
    raise_conflict_behind(outer, "The model 'm' did not load")


def test_model_that_does_not_load_for_it(have, monkeypatch, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    have(transformers="5.24.0", peft="0.21.2")

    def refuse(*args, **kwargs):
        raise ValueError(REFUSAL)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"do not fit together.*PeftModel\.from_pretrained"):
        load_model(str(tmp_path))


def test_processor_that_does_not_load_for_it(have, monkeypatch, tmp_path):
    (tmp_path / "processor_config.json").write_text("{}")
    have(torch="2.13.0+cpu", torchvision="0.28.0")

    def refuse(*args, **kwargs):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="Uninstall torchvision"):
        load_processing_class(str(tmp_path))
    have(torch="2.14.1", torchvision="0.29.1")
    with pytest.raises(RuntimeError, match="operator"):
        load_processing_class(str(tmp_path))


# --- what is printed, and what is recorded ---


def test_report_names_every_package_and_imports_no_torch():
    code = "import sys; from dpo_trainer import versions; versions.main(); print({'torch', 'transformers'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = printed.splitlines()
    assert lines[-1] == "set()"
    rows = {line.split()[0]: line.split()[1:] for line in lines[1 : lines.index("")]}
    assert {canonicalize_name(need.name) for need in requirements()} <= set(rows)
    lock = versions.tested()
    assert rows["transformers"] == [str(versions.installed("transformers")), str(lock["transformers"])]


def test_version_ranges_run_tests_that_exist():
    assert [name for name in version_ranges.FILES if not (ROOT / name).exists()] == []
