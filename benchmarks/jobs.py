"""From a case to a file that says all that determines a run, and from there to its figures, in a process of its own."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_data
from cases import LORA_RANK, Case, Side
from floor import matmul_shapes, weights_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARED = {
    "learning_rate": 5e-5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
ON_CPU = {**SHARED, "gradient_checkpointing": False, "bf16": False, "use_cpu": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark that trains is told."""
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter of TRL's environment")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("out/benchmarks"), help="tokenizers")
    parser.add_argument("--results", type=Path, default=HERE / "results")


def prepare(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Rows and model of a case, the same for all its sides."""
    options.cache.mkdir(parents=True, exist_ok=True)
    words = "ultrafeedback" if case.data == "synthetic" else case.data
    known = bench_data.load_rows(words, options.data_dir)
    tokenizer = bench_data.tokenizer_for(words, known, options.cache)
    count = (case.steps + case.warm_up) * case.batch
    if case.lengths:
        rows = bench_data.rows_of_length(tokenizer, count, *case.lengths, options.seed, case.completions)
    else:
        rows = bench_data.sample_rows(known, tokenizer, count, case.max_length, options.seed)
    vocab_size = case.vocab_size or len(tokenizer)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {
        "rows": rows,
        "eval_rows": evaluation_rows(case, tokenizer, options),
        "lengths": [bench_data.longest(row, tokenizer, case.max_length) for row in bench_data.as_pairs(rows)],
        "tokenizer": str((options.cache / f"tokenizer-{words}").resolve()),
        "model": {**case.model, "vocab_size": vocab_size, **special},
        "weights": vars(weights_of(case.model, vocab_size, LORA_RANK * case.lora)),
        "matmul_shapes": matmul_shapes(case.model, vocab_size),
        "lora_rank": LORA_RANK * case.lora,
        "seed": options.seed,
        "threads": options.threads,
        "device": case.device,
        "dtype": case.dtype,
        "warm_up": case.warm_up,
    }


def evaluation_rows(case: Case, tokenizer: Any, options: argparse.Namespace, count: int = 96) -> list[dict[str, str]]:
    if not case.evaluate_every:
        return []
    held_out = bench_data.load_rows(case.data, options.data_dir, "eval")
    return bench_data.sample_rows(held_out, tokenizer, count, case.max_length, options.seed)


def job_of(case: Case, side: Side, prepared: dict[str, Any], cache: Path | None = None) -> dict[str, Any]:
    """All that determines one run. `cache`: a folder for the log-probs of the reference."""
    rows, batch = prepared["rows"], case.batch
    if side.pairwise:
        rows, batch = bench_data.as_pairs(rows), case.batch * (case.completions * (case.completions - 1) // 2)
    if side.arguments.get("train_sampling_strategy") == "group_by_length":
        rows = [{**row, "length": length} for row, length in zip(rows, prepared["lengths"], strict=True)]
    arguments = {
        **SHARED,
        "per_device_train_batch_size": batch,
        "max_steps": case.steps + case.warm_up,
        "max_length": case.max_length,
        "gradient_checkpointing": case.checkpointing,
        "bf16": False,  # the whole model is in `dtype`
        "use_cpu": case.device == "cpu",
        "seed": prepared["seed"],
        **side.arguments,
    }
    if case.evaluate_every:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": case.evaluate_every,
            "eval_on_start": True,
            "per_device_eval_batch_size": batch,
        }
    if side.cached and side.trainer == "ours":
        arguments["ref_cache_dir"] = str(cache)
    shared = {name: value for name, value in prepared.items() if name not in ("rows", "lengths")}
    # TRL keeps its log-probs beside the rows on disk.
    place = str(cache / "rows") if cache and side.cached else None
    own = {"rows": rows, "rows_dir": place, "trainer": side.trainer, "warm": side.warm, "arguments": arguments}
    return {**shared, **own}


def run(job: dict[str, Any], options: argparse.Namespace, *, memory_gb: float | None = None) -> dict[str, Any]:
    """Figures of one run in its own process. `memory_gb`: it may not take more.

    Raises:
        RuntimeError: for a run that failed, with the end of its log.
    """
    trainer = job["trainer"]
    threads = str(job["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str((options.cache / "datasets").resolve())
    if trainer == "ours":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    python = sys.executable if trainer == "ours" else options.trl_python
    with tempfile.TemporaryDirectory() as folder:
        job_file, result, log = (Path(folder, name) for name in ("job.json", "result.json", "log.txt"))
        job_file.write_text(json.dumps(job))
        command = [python, str(HERE / "one_run.py"), str(job_file), str(result)]
        if memory_gb:
            command += ["--memory-gb", str(memory_gb)]
        with log.open("w") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise RuntimeError(f"{trainer} failed with exit code {code}:\n{log.read_text()[-3000:]}")
        return json.loads(result.read_text()) | {"load": round(os.getloadavg()[0], 1)}


def environment_of(side: str, options: argparse.Namespace) -> dict[str, str]:
    """Of a process of `side`: ours takes the trainer from this tree, whatever is installed."""
    own = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT) if side == "ours" else ""}


def python_of(side: str, options: argparse.Namespace) -> str:
    return sys.executable if side == "ours" else options.trl_python


def measured_apart(
    script: str, side: str, job: dict[str, Any], options: argparse.Namespace, **environment: str
) -> dict[str, Any]:
    """What `script` measures of `job` in a process of its own: see `measured_here`. `environment`: variables for it."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "job.json"), Path(folder, "result.json")
        given.write_text(json.dumps(job))
        command = [python_of(side, options), script, "--measure", str(given), str(result)]
        subprocess.run(command, check=True, env=environment_of(side, options) | environment)
        return json.loads(result.read_text())


def add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("JOB", "RESULT"), help="used by the command itself")


def measured_here(options: argparse.Namespace, measure: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    """Whether this process is the one that `measured_apart` started; if so, it has measured."""
    if not options.measure:
        return False
    given, result = options.measure
    result.write_text(json.dumps(measure(json.loads(given.read_text()))))
    return True


def largest_difference(runs: list[dict[str, Any]], steps: int | None = None) -> float:
    """Of a step's loss, over the first `steps` and all pairs of runs, in nats. Infinite where a loss is no number."""
    losses = [run["losses"][:steps] for run in runs]
    if not all(math.isfinite(loss) for run in losses for loss in run):
        return math.inf
    return max(max(step) - min(step) for step in zip(*losses, strict=True))


def machine() -> dict[str, str | int | None]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def free_memory_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e9
