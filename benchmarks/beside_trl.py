"""This trainer beside TRL's, on the same real data, in one go: pairs per second, peak memory, losses.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt -r benchmarks/requirements-trl.txt
    python benchmarks/beside_trl.py --data hh --data-dir <folder>
    python benchmarks/beside_trl.py --data ultrafeedback --data-dir <folder> --gradient-checkpointing

Both trainers get the same rows, tokenizer, initial weights, seed and arguments, and train in turns, each run in a
process of its own. The first step warms up; the following `--steps` are counted, by the CPU time of the process (which
other work on the machine disturbs least) and by the clock. Expect the losses of all steps to agree to 1e-4: if they do
not, the figures compare two different computations, and the command says so and exits with 1. Expect at least 4 times
TRL's pairs per second on HH, 2.5 times on UltraFeedback, and half its memory. About 10 and 20 minutes on one thread.

Writes `benchmarks/results/<data>[-checkpointing].md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median

import bench_data

HERE = Path(__file__).resolve().parent
TOLERANCE = 2e-5  # nats; float32 sums of about 2,000 nats, times beta 0.1, averaged over a batch
TARGETS = {"hh": 4.0, "ultrafeedback": 2.5}
MEMORY_TARGET = 0.5

# 32 to 33 million parameters (with the vocabulary that the data yields), proportioned like the small Qwen2 models.
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(bench_data.FILES), required=True)
    parser.add_argument("--data-dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter of TRL's environment")
    parser.add_argument("--steps", type=int, default=4, help="counted optimizer steps per run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each trainer, in turns")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--layout", default="auto", help="of this trainer: auto, flat or padded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("out/benchmarks"), help="tokenizers and job files")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", choices=["ours", "trl"], help="run one side and print its figures, write no result")
    return parser.parse_args()


def job_of(options: argparse.Namespace) -> dict:
    """All that determines the computation, for both trainers."""
    options.cache.mkdir(parents=True, exist_ok=True)
    rows = bench_data.load_rows(options.data, options.data_dir)
    tokenizer = bench_data.tokenizer_for(options.data, rows, options.cache)
    count = (options.steps + 1) * options.batch_size
    rows = bench_data.sample_rows(rows, tokenizer, count, options.max_length, options.seed)
    return {
        "rows": rows,
        "tokens_per_pair": bench_data.token_counts(rows, tokenizer, options.max_length),
        "tokenizer": str((options.cache / f"tokenizer-{options.data}").resolve()),
        "model": {**MODEL, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        "seed": options.seed,
        "threads": options.threads,
        "only_ours": {"layout": options.layout},
        "arguments": {
            "per_device_train_batch_size": options.batch_size,
            "max_steps": options.steps + 1,
            "max_length": options.max_length,
            "gradient_checkpointing": options.gradient_checkpointing,
            "learning_rate": 5e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "bf16": False,
            "use_cpu": True,
            "seed": options.seed,
            "disable_tqdm": True,
        },
    }


def run(trainer: str, job_file: Path, options: argparse.Namespace) -> dict:
    """One run in its own process; its log goes to a file beside the job."""
    python = sys.executable if trainer == "ours" else options.trl_python
    result, log = job_file.with_name(f"result-{trainer}.json"), job_file.with_name(f"log-{trainer}.txt")
    result.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    if trainer == "ours":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    command = [python, str(HERE / "one_run.py"), trainer, str(job_file), str(result)]
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise SystemExit(f"{trainer} failed with exit code {code}:\n{log.read_text()[-3000:]}")
    figures = json.loads(result.read_text())
    print(
        f"{trainer:5s} {figures['pairs_per_cpu_s']:.3f} pairs per CPU second, {figures['pairs_per_wall_s']:.3f} per "
        f"second, peak {figures['peak_rss_gb']:.2f} GB, losses {' '.join(f'{x:.6f}' for x in figures['losses'])}",
        flush=True,
    )
    return figures


def summary(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Median over the repeats of each trainer, and ours relative to TRL's."""
    keys = ("pairs_per_cpu_s", "pairs_per_wall_s", "peak_rss_gb")
    sides = {
        side: {key: median(r[key] for r in runs if r["trainer"] == side) for key in keys} for side in ("trl", "ours")
    }
    sides["ratio"] = {key: sides["ours"][key] / sides["trl"][key] for key in keys}
    return sides


def largest_difference(runs: list[dict]) -> float:
    """Over all steps and all pairs of runs, in nats."""
    return max(max(step) - min(step) for step in zip(*(r["losses"] for r in runs), strict=True))


def machine() -> dict[str, str | int | None]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def markdown(record: dict) -> str:
    sides, job, runs = record["summary"], record["settings"], record["runs"]
    one = {r["trainer"]: r for r in runs}
    lines = [
        f"# {record['data']}, gradient checkpointing {'on' if job['arguments']['gradient_checkpointing'] else 'off'}",
        "",
        f"{record['date']}, {record['machine']['cpu']} ({record['machine']['cores']} cores), {job['threads']} thread(s), "
        f"float32, batch {job['arguments']['per_device_train_batch_size']}, max_length {job['arguments']['max_length']}, "
        f"Qwen2 of {one['ours']['parameters'] / 1e6:.1f} M parameters, {one['ours']['pairs']} counted pairs per run, "
        f"median of {len(runs) // 2} run(s); mean tokens per pair {job['tokens_per_pair']}.",
        "",
        "| | pairs / CPU s | pairs / s | peak RSS, GB |",
        "|---|---|---|---|",
    ]
    names = {"trl": f"TRL {one['trl']['version']}", "ours": "dpo_trainer", "ratio": "ratio"}
    for side, name in names.items():
        cells = (sides[side][key] for key in ("pairs_per_cpu_s", "pairs_per_wall_s", "peak_rss_gb"))
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in cells) + " |")
    lines += ["", f"Largest difference of a step's loss: {record['loss_difference']:.1e} nats.", ""]
    lines += ["| step | TRL | dpo_trainer |", "|---|---|---|"]
    for step, (theirs, ours) in enumerate(zip(one["trl"]["losses"], one["ours"]["losses"]), 1):
        lines.append(f"| {step} | {theirs:.6f} | {ours:.6f} |")
    versions = ", ".join(f"{key} {one['ours'][key]}" for key in ("torch", "transformers"))
    return "\n".join([*lines, "", f"{versions}; Python {record['machine']['python']}.", ""])


def main() -> int:
    options = parse()
    job = job_of(options)
    job_file = options.cache / f"job-{options.data}.json"
    job_file.write_text(json.dumps(job))
    print(f"{len(job['rows'])} rows of {options.data}, mean tokens per pair {job['tokens_per_pair']}", flush=True)
    sides = [options.only] if options.only else ["trl", "ours"]
    runs = [run(side, job_file, options) for _ in range(options.repeats) for side in sides]
    if options.only:
        return 0

    record = {
        "data": options.data,
        "date": date.today().isoformat(),
        "machine": machine(),
        "settings": {key: value for key, value in job.items() if key not in ("rows", "tokenizer")},
        "summary": summary(runs),
        "loss_difference": largest_difference(runs),
        "runs": runs,
    }
    if record["loss_difference"] > TOLERANCE:
        print(
            f"VOID: losses differ by {record['loss_difference']:.1e}, more than {TOLERANCE:.0e}: not the same computation."
        )
        return 1
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.data + ("-checkpointing" if options.gradient_checkpointing else "")
    (options.results / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / f"{stem}.md").write_text(markdown(record))
    print(markdown(record))
    ratio = record["summary"]["ratio"]
    for name, met in {
        f"{ratio['pairs_per_cpu_s']:.2f}x pairs per CPU second, to reach {TARGETS[options.data]}x": ratio[
            "pairs_per_cpu_s"
        ]
        >= TARGETS[options.data],
        f"{ratio['peak_rss_gb']:.2f} of the peak memory, to stay below {MEMORY_TARGET}": ratio["peak_rss_gb"]
        <= MEMORY_TARGET,
    }.items():
        print("reached:" if met else "NOT reached:", name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
