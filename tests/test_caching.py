"""The command `scripts/cache_reference.py`: fills the cache for a run, shows it, and makes room."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from two_processes import run_script

from dpo_trainer.cli import caching
from dpo_trainer.cli.build import build_trainer
from dpo_trainer.cli.parsing import parse_args
from dpo_trainer.reference.cache import summaries

ROOT = Path(__file__).parents[1]


@pytest.fixture
def options(tmp_path, monkeypatch) -> list[str]:
    """Of a training run, which are those of the command as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))
    tiny.llama().save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny.rows(20))))
    flags = "--use_cpu true --bf16 false --max_steps 2 --disable_tqdm true --report_to none --save_strategy no"
    return ["--model_name_or_path", "start", "--dataset_name", "pairs.jsonl", "--test_split_size", "4", *flags.split()]


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "reference"


def test_fills_for_training_and_evaluation_and_then_finds(options, tmp_path, capsys, caplog):
    caching.main(options)
    (there,) = summaries(cache(tmp_path))
    assert (there.entries, there.hits, there.computed) == (40, 0, 40)
    assert "LlamaForCausalLM" in there.about["model"]
    assert "Computed in float32" in capsys.readouterr().out
    assert not (tmp_path / "trainer_output").exists()
    # The run that it was filled for computes nothing.
    script, model, config, _ = parse_args([*options, "--precompute_ref_log_probs", "true", "--output_dir", "run"])
    trainer = build_trainer(script, model, config)
    trainer.train()
    (there,) = summaries(cache(tmp_path))
    assert (there.entries, there.hits, there.computed) == (40, 40, 40)
    assert trainer.reference.source is None


def test_the_script_end_to_end(options, tmp_path):
    """As a user starts it; with a file of options too."""
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: start\ndataset_name: pairs.jsonl\nbf16: false\nuse_cpu: true\n"
    )
    script = ROOT / "scripts" / "cache_reference.py"
    first = [sys.executable, script, "run.yaml", "--ref_cache_dir", "mine"]
    done = subprocess.run(first, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "40 completions, 0 found in the cache, 40 computed" in done.stderr
    done = run_script(script, "--stats", "--ref_cache_dir", "mine")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r": 1, \d+\.\d MB\.\n", done.stdout)
    done = run_script(script, "--prune")
    assert done.returncode == 1
    assert "cache_reference.py: --prune of what?" in done.stderr


def test_stats_shows_what_there_is(options, tmp_path, capsys):
    caching.main(["--stats"])
    assert ": 0, 0.0 MB." in capsys.readouterr().out
    caching.main(options)
    capsys.readouterr()
    caching.main(["--stats"])
    shown = capsys.readouterr().out
    (there,) = summaries(cache(tmp_path))
    assert there.reference[:12] in shown
    assert "40 log-probs" in shown
    assert "0 found, 40 computed" in shown
    assert str(cache(tmp_path))[:20] in shown


def test_prune_by_reference_and_by_age(options, tmp_path, capsys):
    caching.main(options)
    (there,) = summaries(cache(tmp_path))
    caching.main(["--prune", "--older_than_days", "1"])
    assert summaries(cache(tmp_path)), "used just now"
    with pytest.raises(ValueError, match="fits none"):
        caching.main(["--prune_reference", "ffffffffffff" if not there.reference.startswith("f") else "000000000000"])
    caching.main(["--prune_reference", there.reference[:6], "--stats"])
    assert summaries(cache(tmp_path)) == []
    caching.main(options)
    caching.main(["--prune", "--older_than_days", "0"])
    assert summaries(cache(tmp_path)) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prune"], "--prune of what"),
        (["--older_than_days", "3"], "needs --prune"),
        (["--prune", "--older_than_days", "-1"], "at least 0"),
        (["--stats", "--beta", "0.2"], "take --ref_cache_dir and nothing else, got --beta 0.2"),
        (["--dataset_name", "pairs.jsonl"], "--model_name_or_path"),
        ([], "Whose log-probs"),
        (["--sync_ref_model", "true"], "--sync_ref_model excludes --precompute_ref_log_probs"),
        (["--betta", "1"], "--betta"),
    ],
    ids=str,
)
def test_refusals(argv, words, options):
    with pytest.raises(ValueError, match=words):
        caching.main(argv)


def test_what_a_file_says_is_printed_as_it_is(tmp_path, capsys):
    from dpo_trainer.reference.cache import Store

    Store(tmp_path, "ab" * 16, {"model": "[red]x[/red]", "computed in": "bfloat16"}).close()
    caching.main(["--stats", "--ref_cache_dir", str(tmp_path)])
    assert f"{'ab' * 6}  [red]x[/red]; computed in bfloat16\n" in capsys.readouterr().out
