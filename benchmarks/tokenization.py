"""Tokenizing preference rows: this package, TRL and the bare fast tokenizer, on the same real rows, in turns.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt -r benchmarks/requirements-trl.txt
    python benchmarks/tokenization.py --data-dir <folder>

Rows are UltraFeedback's (prompt, chosen, rejected), from a saved dataset to one of token ids. `bare` is one call of the
tokenizer on the three texts that every pair needs (prompt, prompt + chosen, prompt + rejected), and nothing else.
`cached` is a second run of ours with another learning rate. Each run has a process of its own; the median is shown.
Rows per CPU second counts all threads and processes. Expect ours to reach at least 90 % of `bare` and 1.7 times TRL per
CPU second, 3 times by the clock on two cores, and `cached` in under a second.

Writes `benchmarks/results/tokenization.md` and `.json`. About a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import bench_data

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 1024
KINDS = {
    "bare tokenizer": "bare",
    "TRL": "trl",
    "here": "ours",
    "here, 2 processes": "ours2",
    "here, cached": "cached",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter of TRL's environment")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "FOLDER", "RESULT"), help="used by the command itself")
    options = parser.parse_args()
    if options.measure:
        kind, folder, result = options.measure
        Path(result).write_text(json.dumps(measure(kind, Path(folder))))
        return
    results = compare(options)
    table = as_markdown(results)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "tokenization.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results" / "tokenization.md").write_text(table)
    print(table)


def compare(options: argparse.Namespace) -> dict:
    from datasets import Dataset

    rows = bench_data.load_rows("ultrafeedback", options.data_dir)
    options.cache.mkdir(parents=True, exist_ok=True)
    bench_data.tokenizer_for("ultrafeedback", rows, options.cache)
    runs: dict[str, list[dict]] = {name: [] for name in KINDS}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            Dataset.from_list(rows).save_to_disk(str(Path(folder, "rows")))
            Path(folder, "tokenizer").symlink_to((options.cache / "tokenizer-ultrafeedback").resolve())
            for name, kind in KINDS.items():
                if kind in ("ours2", "trl"):  # their own copies, so that nobody reads another's cache
                    Dataset.from_list(rows).save_to_disk(str(Path(folder, f"rows-{kind}")))
                result = Path(folder, "result.json")
                python = options.trl_python if kind == "trl" else sys.executable
                subprocess.run(
                    [python, __file__, "--measure", kind, folder, str(result)],
                    check=True,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
                runs[name].append(json.loads(result.read_text()))
    return {
        "rows": len(rows),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "runs": runs,
    }


def measure(kind: str, folder: Path) -> dict[str, float]:
    """CPU and wall seconds of one kind of run, in this process and its children."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    own = folder / f"rows-{kind}"
    rows = datasets.load_from_disk(str(own if own.exists() else folder / "rows"))
    run = PREPARED[kind](rows, AutoTokenizer.from_pretrained(folder / "tokenizer"))
    before, wall = os.times(), time.perf_counter()
    run()
    after = os.times()
    return {"cpu_s": sum(after[:4]) - sum(before[:4]), "wall_s": time.perf_counter() - wall}


def bare(rows, tokenizer) -> Callable[[], object]:
    texts = [t for r in rows for t in (r["prompt"], r["prompt"] + r["chosen"], r["prompt"] + r["rejected"])]
    return lambda: tokenizer(texts)


def ours(rows, tokenizer, processes: int | None = None) -> Callable[[], object]:
    from dpo_trainer.data import DataOptions, prepare_dataset

    options = DataOptions(max_length=MAX_LENGTH, dataset_num_proc=processes)
    return lambda: prepare_dataset(rows, tokenizer, options)


def trl(rows, tokenizer) -> Callable[[], object]:
    """What TRL's trainer does to its dataset, without building the trainer around it."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=tempfile.mkdtemp(), max_length=MAX_LENGTH, use_cpu=True, bf16=False)
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    return lambda: trainer._prepare_dataset(rows, tokenizer, args, "train")


PREPARED: dict[str, Callable] = {
    "bare": bare,
    "trl": trl,
    "ours": ours,
    "ours2": lambda rows, tokenizer: ours(rows, tokenizer, 2),
    "cached": ours,
}


def as_markdown(results: dict) -> str:
    lines = ["| | rows per CPU second | rows per second | seconds |", "| --- | --- | --- | --- |"]
    for name, runs in results["runs"].items():
        cpu, wall = (median(run[key] for run in runs) for key in ("cpu_s", "wall_s"))
        rates = f"{results['rows'] / cpu:.0f} | {results['rows'] / wall:.0f}"
        lines.append(f"| {name} | {'' if 'cached' in name else rates.split(' | ')[0]} | {rates.split(' | ')[1]} | {wall:.2f} |")
    where = f"{results['rows']} UltraFeedback rows, {results['machine']}, {results['date']}, median of {len(runs)} runs."
    return "\n".join([*lines, "", where, ""])


if __name__ == "__main__":
    main()
