"""What a user waits for around training: import, help, tokenizing, collating, the first step, evaluation, saving.

    python benchmarks/small.py --data-dir <folder>

Rows of HH, batches of 8, the model of the suite, both trainers in turns, each in a process of its own, the median of
`--repeats`. `scripts/dpo.py --help` has no counterpart. About 10 minutes of one core, most of it TRL's evaluation.

Writes `benchmarks/results/small.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import bench_data
import jobs
import tokenization
from cases import Case, Side

SIDES = ("ours", "trl")
EVALUATED, COLLATED = 32, 256  # pairs
IMPORTS = {"ours": "from dpo_trainer import DPOTrainer", "trl": "from trl import DPOTrainer"}
ROWS = {
    "import_s": "import of the trainer, s",
    "help_s": "`scripts/dpo.py --help`, s",
    "tokenized_per_cpu_s": "rows tokenized per CPU second",
    "collated_per_s": "pairs collated per second",
    "first_step_s": "from the start of the process to the end of the first step, s",
    "evaluated_per_cpu_s": "pairs evaluated per CPU second",
    "saved_s": "saving the model, s",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    jobs.add_measure(parser)
    jobs.add_arguments(parser)
    options = parser.parse_args()
    if jobs.measured_here(options, measure):
        return 0
    case = Case("small", "hh", {}, steps=0, evaluate_every=1)
    prepared = jobs.prepare(case, options)
    prepared["eval_rows"] = prepared["eval_rows"][:EVALUATED]
    runs = [
        {"side": side, **run(side, jobs.job_of(case, Side(side), prepared), options)}
        for _ in range(options.repeats)
        for side in SIDES
    ]
    record = {"date": date.today().isoformat(), "machine": jobs.machine(), "repeats": options.repeats, "runs": runs}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "small.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "small.md").write_text(as_markdown(record))
    print(as_markdown(record))
    return 0


def run(side: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """All figures of one side, the shorter ones in processes of their own."""
    python, environment = jobs.python_of(side, options), jobs.environment_of(side, options)
    figures = {"import_s": seconds([python, "-c", IMPORTS[side]], environment)}
    if side == "ours":
        figures["help_s"] = seconds([python, str(jobs.ROOT / "scripts" / "dpo.py"), "--help"], environment)
    figures["tokenized_per_cpu_s"] = tokenized(side, options)
    figures |= jobs.measured_apart(__file__, side, job | {"began": time.time()}, options)
    print(side, *(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    return figures


def seconds(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def tokenized(side: str, options: argparse.Namespace) -> float:
    rows = bench_data.load_rows("hh", options.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        bench_data.tokenizer_for("hh", rows, options.cache).save_pretrained(Path(folder, "tokenizer"))
        return len(rows) / tokenization.run(side, rows, Path(folder), options.trl_python)["cpu_s"]


def measure(job: dict[str, Any]) -> dict[str, float]:
    """In one process: a step, then the parts by themselves."""
    import torch
    from datasets import disable_progress_bars
    from one_run import build_trainer
    from watching import Clock, Precompute

    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        job["arguments"] |= {"eval_strategy": "no", "eval_on_start": False}
        trainer, _ = build_trainer(job, folder, Clock(), Precompute())
        trainer.train()
        figures = {"first_step_s": time.time() - job["began"]}
        began = time.process_time()
        trainer.evaluate()
        figures["evaluated_per_cpu_s"] = EVALUATED / (time.process_time() - began)
        rows = [trainer.train_dataset[place % len(trainer.train_dataset)] for place in range(COLLATED)]
        size = job["arguments"]["per_device_train_batch_size"]
        began = time.perf_counter()
        for at in range(0, COLLATED, size):
            trainer.data_collator(rows[at : at + size])
        figures["collated_per_s"] = COLLATED / (time.perf_counter() - began)
        began = time.perf_counter()
        trainer.save_model(f"{folder}/saved")
        figures["saved_s"] = time.perf_counter() - began
    return figures


def as_markdown(record: dict[str, Any]) -> str:
    version = f"{record['date']}, {record['machine']['cpu']} ({record['machine']['cores']} cores), 1 thread"
    lines = [f"{version}, median of {record['repeats']} run(s).", "", "| | TRL | dpo_trainer |", "| --- | --- | --- |"]
    for figure, name in ROWS.items():
        cells = (
            [run[figure] for run in record["runs"] if run["side"] == side and figure in run]
            for side in ("trl", "ours")
        )
        lines.append(f"| {name} | " + " | ".join(f"{median(runs):,.4g}" if runs else "" for runs in cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
