"""A ceiling on memory: peak memory and speed of `--max_tokens_per_micro_batch`, on real preference pairs.

    python benchmarks/micro_batches.py --data-dir <folder>

The model of the suite trains on batches of 16 pairs, whole, under several budgets and by default, each run in a process
of its own. The first step warms up; the following `--steps` are counted, by the CPU time of the
process. The peak is that of the process, training or not, and starts at what model, reference and optimizer take. Expect
the losses of all steps to agree (else the figures compare two computations: the command says so and exits with 1), and
a lower peak the smaller the budget is. About 15 minutes of one core.

Writes `benchmarks/results/micro_batches.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from typing import Any

import bench_data
import jobs
from cases import Case, Side

TOLERANCE = 2e-5  # nats; float32 sums of about 2,000 nats, times beta 0.1, averaged over a batch
BATCH = 16
WHOLE = 2**20  # more than any batch here; without a budget a CPU takes parts of about 1,024
BUDGETS = (WHOLE, 8192, 4096, 2048, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1, help="counted optimizer steps per run")
    jobs.add_arguments(parser)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": jobs.machine(),
        "batch": BATCH,
        "runs": {data: runs_on(data, options) for data in bench_data.FILES},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "micro_batches.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "micro_batches.md").write_text(as_markdown(record))
    print(as_markdown(record))
    same = max(map(difference, record["runs"].values())) <= TOLERANCE
    print("the same losses" if same else f"VOID: losses differ by more than {TOLERANCE:.0e}")
    return 0 if same else 1


def runs_on(data: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run for each budget, of the same rows."""
    case = Case(f"micro-batches-{data}", data, {}, BATCH, options.steps)
    prepared, runs = jobs.prepare(case, options), []
    for budget in BUDGETS:
        side = Side("ours", {"layout": "flat", "max_tokens_per_micro_batch": budget})
        runs.append({"budget": budget, **jobs.run(jobs.job_of(case, side, prepared), options)})
        print(data, budget, f"{runs[-1]['peak_rss_gb']:.2f} GB", flush=True)
    return runs


def difference(runs: list[dict[str, Any]]) -> float:
    """Largest of a step's loss between runs, in nats."""
    return jobs.largest_difference(runs)


def as_markdown(record: dict[str, Any]) -> str:
    lines = [
        f"{record['date']}, {record['machine']['cpu']}, 1 thread, float32, flat rows, batch {record['batch']}, max_length 1024, "
        f"no gradient checkpointing, Qwen2 of {record['runs']['hh'][0]['parameters'] / 1e6:.1f} M parameters.",
        "",
        "| data | budget, tokens | peak RSS, GB | before training, GB | pairs / CPU s |",
        "|---|---|---|---|---|",
    ]
    for data, runs in record["runs"].items():
        for run in runs:
            figures = (run["peak_rss_gb"], run["peak_rss_before_training_gb"], run["pairs_per_cpu_s"])
            budget = {WHOLE: "whole", None: "default"}.get(run["budget"]) or f"{run['budget']:,}"
            lines.append(f"| {data} | {budget} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    for data, runs in record["runs"].items():
        lines += ["", f"{data}: largest difference of a step's loss {difference(runs):.1e} nats."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
