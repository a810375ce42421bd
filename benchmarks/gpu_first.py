"""The first minutes on a GPU: does everything that only a card can tell, and writes down what it says.

    make gpu-first                                              with TRL in an environment of its own
    python benchmarks/gpu_first.py                              with the interpreter at hand
    python benchmarks/gpu_first.py --only machine steps trace
    python benchmarks/gpu_first.py --dry_run                    tiny shapes on a CPU: that the script itself works

At most 12 minutes of one H200. Parts, each in a process of its own, with a time limit of its own:

    machine  the card, its libraries, how fast it multiplies bfloat16 matrices
    tests    tests/gpu: the attention kernel against written-out masks, its calls, waits
    steps    ten steps of the shapes of Qwen2-0.5B in the default precision (float32 weights, bfloat16 autocast)
    padded   the same in the padded layout: the losses must agree
    trl      the same by TRL: the losses must agree
    waits    where the host waits for the device, step by step
    trace    a trace file (chrome://tracing), which attention kernels ran, what took the time

A part that fails or takes too long costs no other. After each, `gpu-first-DEVICE.json` and `.md` are written anew into
`benchmarks/results/`. Rows are those of HH where `--data-dir` has them, else random words of like lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import bench_data
import jobs
from cases import HALF_B, Case, Side
from floor import matmul_shapes, weights_of
from gpu_first_report import as_markdown

LIMITS = {"machine": 45, "tests": 145, "steps": 110, "padded": 80, "trl": 130, "waits": 70, "trace": 80}
"""Seconds of each part, 11 minutes in all."""

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS, WARM_UP = 10, 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART")
    jobs.add_arguments(parser)
    options = parser.parse_args(argv)
    options.trl_python = str(Path(options.trl_python).absolute())
    job = job_of(options)
    record: dict[str, Any] = {"date": date.today().isoformat(), "dry_run": options.dry_run, "parts": {}}
    for part in options.only:
        began = time.perf_counter()
        try:
            figures = run(part, job, options)
        except Exception as error:  # whatever it is, the other parts are worth their time
            figures = {"failed": f"{type(error).__name__}: {error}"[-4000:]}
        record["parts"][part] = {"seconds": round(time.perf_counter() - began, 1), **figures}
        write(record, options)
        print(f"{part}: {figures.get('failed') or 'done'}", flush=True)
    failed = [part for part, figures in record["parts"].items() if "failed" in figures]
    print(as_markdown(record))
    return 1 if failed else 0


def job_of(options: argparse.Namespace) -> dict[str, Any]:
    """One job for all parts, see `jobs.job_of`: the same rows, weights and arguments."""
    device = "cpu" if options.dry_run else "cuda"
    model, steps = (HALF_B | TINY, 3) if options.dry_run else (HALF_B, STEPS)
    case = Case("gpu-first", "hh", {}, batch=8, steps=steps, model=model, warm_up=WARM_UP, device=device)
    options.cache.mkdir(parents=True, exist_ok=True)
    name, rows = rows_of(options, device)
    tokenizer = bench_data.tokenizer_for(name, rows, options.cache)
    rows = bench_data.sample_rows(rows, tokenizer, (steps + WARM_UP) * case.batch, case.max_length, options.seed)
    vocab_size = len(tokenizer) if options.dry_run else 151_936
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    prepared = {
        "rows": rows,
        "eval_rows": [],
        "lengths": [],
        "tokenizer": str((options.cache / f"tokenizer-{name}").resolve()),
        "model": {**model, "vocab_size": vocab_size, **special},
        "weights": vars(weights_of(model, vocab_size)),
        "matmul_shapes": matmul_shapes(model, vocab_size),
        "lora_rank": 0,
        "seed": options.seed,
        "threads": options.threads,
        "device": device,
        "dtype": "float32",
        "multiplied": "float32" if options.dry_run else "bfloat16",
        "warm_up": WARM_UP,
    }
    precision = {"bf16": not options.dry_run, "gradient_checkpointing": True}
    return jobs.job_of(case, Side("ours", precision), prepared)


def rows_of(options: argparse.Namespace, device: str) -> tuple[str, list[dict[str, str]]]:
    """HH, or random words with lengths like its: a dozen to a few hundred tokens."""
    if device == "cuda" and (options.data_dir / bench_data.FILES["hh"]).is_file():
        return "hh", bench_data.load_rows("hh", options.data_dir)
    draw = random.Random(options.seed)
    words = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(2, 7))) for _ in range(2000)]

    def text(mean: float) -> str:
        return " ".join(draw.choices(words, k=max(3, min(400, round(draw.lognormvariate(0, 0.7) * mean)))))

    shorter = 0.1 if options.dry_run else 1.0
    return f"gpu-first-{device}", [
        {"prompt": f"{text(60 * shorter)}:", "chosen": f" {text(30 * shorter)}", "rejected": f" {text(30 * shorter)}"}
        for _ in range(500)
    ]


def run(part: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one part.

    Raises:
        RuntimeError: for a part that failed or took too long, with the end of its log.
    """
    side = "trl" if part == "trl" else "ours"
    if side == "trl" and not Path(options.trl_python).is_file():
        raise RuntimeError(f"{options.trl_python} is not there: TRL was not measured. See make gpu-first.")
    own = {"layout": "padded"} if part == "padded" else {}
    job = {**job, "part": part, "trainer": side, "arguments": {**job["arguments"], **own}}
    with tempfile.TemporaryDirectory() as folder:
        given, result, log = (Path(folder, name) for name in ("job.json", "result.json", "log.txt"))
        job["trace_file"] = str(Path(folder, "trace.json.gz"))
        given.write_text(json.dumps(job))
        command = command_of(part, given, result, jobs.python_of(side, options))
        with log.open("w") as output:
            problem = ended_within(LIMITS[part], command, output, jobs.environment_of(side, options))
        if part == "tests":
            return verdicts(result, log.read_text(), problem)
        if problem:
            raise RuntimeError(f"{problem}: {log.read_text()[-3000:]}")
        if Path(job["trace_file"]).is_file():
            options.results.mkdir(parents=True, exist_ok=True)
            kept = options.results / f"{name_of(options)}.trace.json.gz"
            kept.write_bytes(Path(job["trace_file"]).read_bytes())
        return json.loads(result.read_text())


def command_of(part: str, given: Path, result: Path, python: str) -> list[str]:
    if part == "tests":
        tests = [str(jobs.ROOT / "tests" / "gpu"), "-q", "-p", "no:cacheprovider", f"--junitxml={result}"]
        return [python, "-m", "pytest", *tests]
    script = "one_run.py" if part in ("steps", "padded", "trl") else "gpu_first_parts.py"
    return [python, str(jobs.HERE / script), str(given), str(result)]


def ended_within(limit: float, command: list[str], output: Any, environment: dict[str, str]) -> str | None:
    """Why the process did not end well, if it did not."""
    environment = environment | {"DPO_TRAINER_TEST_GPU": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        ended = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=limit, cwd=jobs.ROOT
        )
    except subprocess.TimeoutExpired:
        return f"ended after {limit:g} seconds"
    return f"exit code {ended.returncode}" if ended.returncode else None


def verdicts(result: Path, log: str, problem: str | None) -> dict[str, Any]:
    """Of pytest's report: how many tests passed, failed and were skipped."""
    if not result.is_file():
        raise RuntimeError(f"{problem}: {log[-3000:]}")
    found = re.search(r'errors="(\d+)" failures="(\d+)" skipped="(\d+)" tests="(\d+)"', result.read_text())
    assert found is not None
    errors, failures, skipped, tests = map(int, found.groups())
    figures: dict[str, Any] = {"tests": tests, "skipped": skipped, "passed": tests - skipped - errors - failures}
    return figures | ({"failed": log[-6000:]} if problem else {})


def name_of(options: argparse.Namespace) -> str:
    """Of the files with the results: by the device."""
    return f"gpu-first-{'dry-run' if options.dry_run else device_name()}"


def device_name() -> str:
    """As nvidia-smi says it: this process leaves the card to those of the parts."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return re.sub(r"[^a-z0-9]+", "-", (said.splitlines() or ["unknown"])[0].lower()).strip("-") or "unknown"


def write(record: dict[str, Any], options: argparse.Namespace) -> None:
    options.results.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(record, indent=1) + "\n"), ("md", as_markdown(record))):
        file = options.results / f"{name_of(options)}.{suffix}"
        aside = file.with_suffix(".tmp")
        aside.write_text(text)
        os.replace(aside, file)


if __name__ == "__main__":
    sys.exit(main())
