"""Run a quarter of the tests with the oldest releases that pyproject.toml allows, or with the newest there are.

    make test-oldest
    make test-newest

Each makes an environment of its own (.venv-oldest, .venv-newest; several GB, for torch comes with CUDA where a release has
no CPU build), runs `FILES` in it, and records the result in docs/versions.json, from which docs/versions.md is made.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "versions.json"
UV = str(ROOT / ".venv-uv" / "bin" / "uv")
PYTHON = {"oldest": "3.10", "newest": "3.13"}
SHOWN = "torch transformers accelerate datasets peft deepspeed bitsandbytes openai".split()

FILES = [
    "tests/online/test_generation.py",
    "tests/online/test_online_trainer.py",
    "tests/test_accelerate_configs.py",
    "tests/test_architectures.py",
    "tests/test_attention.py",
    "tests/test_checkpoints.py",
    "tests/test_cli.py",
    "tests/test_config.py",
    "tests/test_continued_adapter.py",
    "tests/test_encode.py",
    "tests/test_engine_checks.py",
    "tests/test_invariances.py",
    "tests/test_layout.py",
    "tests/test_loading.py",
    "tests/test_loading_datasets.py",
    "tests/test_logprobs.py",
    "tests/test_metrics.py",
    "tests/test_moving_reference.py",
    "tests/test_optimizer_checks.py",
    "tests/test_prepare.py",
    "tests/test_quantised.py",
    "tests/test_reference.py",
    "tests/test_reference_identity.py",
    "tests/test_render.py",
    "tests/test_resume.py",
    "tests/test_training.py",
    "tests/test_varlen.py",
    "tests/test_versions.py",
    "tests/vision",
]
"""Where the package meets other libraries."""


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def oldest_pins() -> Path:
    """Every package that pyproject.toml names for users at its lower bound; what tests need besides is the newest that fits."""
    pins = ROOT / ".venv-oldest" / "pins.txt"
    extras = [argument for extra in ("deepspeed", "quantization", "judge") for argument in ("--extra", extra)]
    how = [
        "--quiet",
        "--no-config",
        "--no-annotate",
        "--resolution",
        "lowest-direct",
        "--python-version",
        PYTHON["oldest"],
    ]
    run(UV, "pip", "compile", *how, *extras, "pyproject.toml", "-o", str(pins))
    return pins


def environment(target: str) -> str:
    """The Python of a fresh environment: of the version for this target where there is one, else of the one that runs this."""
    folder = ROOT / f".venv-{target}"
    found = subprocess.run(
        [UV, "python", "find", "--no-python-downloads", PYTHON[target]], capture_output=True, text=True
    )
    python = found.stdout.strip() if found.returncode == 0 else sys.executable
    run(UV, "venv", "--quiet", "--clear", "--seed", "--python", python, str(folder))
    inside = str(folder / "bin" / "python")
    pins = ["-c", str(oldest_pins())] if target == "oldest" else []
    run(inside, "-m", "pip", "install", "--quiet", "--upgrade", *pins, "-e", ".[test]")
    return inside


def result(target: str) -> dict:
    python = environment(target)
    report = ROOT / f".venv-{target}" / "junit.xml"
    options = ["-n", "auto", "--dist", "loadfile", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
    subprocess.run([python, "-m", "pytest", *options, *FILES], cwd=ROOT, check=False)
    suite = ElementTree.parse(report).getroot()[0]  # written by pytest, just now
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    cases = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
    versions = json.loads(run(python, "-c", VERSIONS, *SHOWN))
    return {
        "date": datetime.date.today().isoformat(),
        "python": versions.pop("python"),
        "versions": versions,
        "passed": counts["tests"] - failed - counts["skipped"],
        "skipped": counts["skipped"],
        "failed": [f"{case.attrib['classname']}::{case.attrib['name']}" for case in cases],
        "minutes": round(float(suite.attrib["time"]) / 60, 1),
    }


VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps({"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in sys.argv[1:]}}))
"""


def main(target: str) -> int:
    found = result(target)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(dict(sorted({**record, target: found}.items())), indent=2) + "\n")
    run(str(ROOT / ".venv" / "bin" / "python"), "docs/generate.py")
    print(
        f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped; docs/versions.md is written."
    )
    return len(found["failed"]) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
