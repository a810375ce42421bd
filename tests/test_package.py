"""What a user sees before anything runs: a light import, the public names, and modules that all import."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dpo_trainer
from dpo_trainer.moved import MOVED

ROOT = Path(__file__).parents[1]
MODULES = [module.name for module in pkgutil.walk_packages(dpo_trainer.__path__, "dpo_trainer.")]
PUBLIC = {"DPOConfig", "DPOTrainer", "DataCollatorForPreference", "register_loss"}


def in_fresh_interpreter(code: str) -> str:
    """What `code` prints. `-S`-free: the interpreter that users start."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_no_library():
    code = "import sys, dpo_trainer; print(sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    assert in_fresh_interpreter(code) == "[]"


def test_listing_names_loads_no_library():
    """Tab completion and `help` look at `dir`."""
    code = "import sys, dpo_trainer; print(' '.join(dir(dpo_trainer)), 'torch' in sys.modules)"
    *names, loaded = in_fresh_interpreter(code).split()
    assert loaded == "False"
    assert set(names) >= PUBLIC


def test_import_takes_less_than_300_ms():
    """Best of 3, so that a busy machine does not decide; torch alone would take seconds."""
    code = "import time; t = time.perf_counter(); import dpo_trainer; print(time.perf_counter() - t)"
    assert min(float(in_fresh_interpreter(code)) for _ in range(3)) < 0.3


def test_public_names_resolve():
    assert set(dpo_trainer.__all__) >= PUBLIC
    for name in dpo_trainer.__all__:
        assert getattr(dpo_trainer, name) is not None
    from dpo_trainer import DPOConfig, DPOTrainer

    assert DPOConfig.__module__ == "dpo_trainer.config"
    assert DPOTrainer.__module__ == "dpo_trainer.trainer"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'DPOTrianer'"):
        dpo_trainer.DPOTrianer  # noqa: B018


@pytest.mark.parametrize("old", MOVED)
def test_modules_that_were_documented_import_by_their_old_names(old):
    sys.modules.pop(f"dpo_trainer.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"dpo_trainer\.{old} is now dpo_trainer\.{MOVED[old][0]}"):
        module = importlib.import_module(f"dpo_trainer.{old}")
    for target in MOVED[old]:
        for name, value in vars(importlib.import_module(f"dpo_trainer.{target}")).items():
            if getattr(value, "__module__", None) == f"dpo_trainer.{target}":
                assert getattr(module, name) is value
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_there_are_modules_to_import():
    assert {"dpo_trainer.trainer", "dpo_trainer.losses.margin", "dpo_trainer.data.rows.schema"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
    if module.endswith("__main__"):
        pytest.skip("a command, not a module to import")
    began = time.perf_counter()
    importlib.import_module(module)
    assert time.perf_counter() - began < 60, "importing must not do work"
