"""This trainer beside TRL's, on the same data, in one go: pairs per second, memory, share of the least possible work.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt -r benchmarks/requirements-trl.txt
    python benchmarks/suite.py --list
    python benchmarks/suite.py                                            the cases of the README: about an hour on one core
    python benchmarks/suite.py hh-b8 'length-*' --repeats 1 --data-dir <folder>
    python benchmarks/suite.py 'gpu-*'                                    on a CUDA device. Never run yet.

All sides of a case get the same rows, tokenizer, initial weights, seed and arguments, and take turns, each run in a process of
its own. The first step warms up. CPU seconds of the process count, on a GPU seconds. Where two runs were given the same
batches, their losses must agree, to 1e-4 nats in float32: if they do not, or if no two sides were given the same batches, the
case is void, its table says so, and the command exits with 1. A side that asks for more than 80 % of the free memory ends,
and is shown as out of memory.

Each case writes `benchmarks/results/suite/NAME.json`: run a part today and the rest tomorrow. `report.py` makes tables and
plots of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import jobs
from cases import CASES, HEADLINE, Case, Side, select

FIGURES = ("pairs_per_cpu_s", "pairs_per_wall_s", "peak_rss_gb", "first_step_s", "share_of_floor", "policy_tokens")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="NAME", help="names or globs")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, help="counted steps, instead of the default of each case")
    parser.add_argument(
        "--only", nargs="+", metavar="SIDE", help="run these sides, print their figures, write nothing"
    )
    jobs.add_arguments(parser)
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(CASES))
        return 0
    try:
        cases = select(options.cases or HEADLINE)
    except ValueError as error:
        parser.error(str(error))
    void = [case.name for case in cases if measured(case, options).get("void")]
    if void:
        print(f"VOID: {', '.join(void)}")
    return 1 if void else 0


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a case, on disk too."""
    if options.steps:
        case = replace(case, steps=options.steps)
    prepared = jobs.prepare(case, options)
    print(f"{case.name}: {len(prepared['rows'])} rows", flush=True)
    runs, failed = run_in_turns(case, prepared, options)
    record = record_of(case, runs, failed, options)
    if not options.only:
        folder = options.results / "suite"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{case.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{case.name}: {record['void'] or 'losses agree'}; {ratios(record)}", flush=True)
    return record


def run_in_turns(
    case: Case, prepared: dict[str, Any], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All runs, and why sides have none. A side that failed once is not asked again."""
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, side in case.sides.items():
                if name in failed or name not in (options.only or case.sides):
                    continue
                job = jobs.job_of(case, side, prepared, Path(folder, cache_of(side)))
                try:
                    figures = jobs.run(job, options, memory_gb=memory_limit_gb(case))
                except RuntimeError as error:
                    failed[name] = reason(error)
                    print(f"  {name}: {failed[name]}", flush=True)
                    continue
                runs.append({"side": name, **figures})
                print(f"  {name}: {shown(figures)}", flush=True)
    return runs, failed


def memory_limit_gb(case: Case) -> float | None:
    """None on a GPU: a CUDA process reserves far more addresses than it uses."""
    return 0.8 * jobs.free_memory_gb() if case.device == "cpu" else None


def cache_of(side: Side) -> str:
    """One folder for a cold run and the warm one that follows it."""
    return f"{side.trainer}-{side.arguments.get('train_sampling_strategy', 'random')}"


def reason(error: Exception) -> str:
    """Out of memory is a result; anything else is a mistake that somebody must see.

    Raises:
        RuntimeError: the error, unless memory was short.
    """
    text = str(error)
    if any(sign in text for sign in ("can't allocate memory", "out of memory", "MemoryError", "exit code -9")):
        return "out of memory"
    raise error


def shown(figures: dict[str, Any]) -> str:
    return (
        f"{figures['pairs_per_cpu_s']:.3f} pairs per CPU second, {figures['pairs_per_wall_s']:.3f} per second, "
        f"{figures['share_of_floor']:.0%} of the floor at {figures['matmul_rate'] / 1e9:.0f} GFLOP/s, peak "
        f"{figures['peak_rss_gb']:.2f} GB, losses {' '.join(f'{x:.6f}' for x in figures['losses'][:5])}"
    )


# --- the record of a case ---


def record_of(
    case: Case, runs: list[dict[str, Any]], failed: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    differences = loss_differences(case, runs)
    some = case.sides[next(iter(case.sides))]
    arguments = jobs.job_of(case, some, {"rows": [], "seed": options.seed, "lengths": []})["arguments"]
    return {
        "case": case.name,
        "data": case.data,
        "date": date.today().isoformat(),
        "command": f"python benchmarks/suite.py {case.name} --repeats {options.repeats}"
        + (f" --steps {options.steps}" if options.steps else ""),
        "machine": jobs.machine(),
        "settings": {
            "arguments": arguments,
            "threads": options.threads,
            "model": case.model,
            "vocab_size": case.vocab_size,
            "lora": case.lora,
            "lengths": case.lengths,
            "completions": case.completions,
            "steps": case.steps,
            "warm_up": case.warm_up,
            "device": case.device,
            "dtype": case.dtype,
        },
        "beside": {name: side.beside for name, side in case.sides.items() if side.beside},
        "failed": failed,
        "summary": summary(case, runs),
        "loss_difference": max(differences.values(), default=None),
        "void": void(case, runs, differences),
        "runs": runs,
    }


def summary(case: Case, runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the repeats of each side, lowest and highest rate, and the first side relative to the one beside it."""
    sides: dict[str, dict[str, float]] = {}
    for name in case.sides:
        own = [run for run in runs if run["side"] == name]
        if own:
            rates = [run[rate_of(case)] for run in own]
            sides[name] = {key: median(run[key] for run in own) for key in FIGURES}
            sides[name] |= {"lowest": min(rates), "highest": max(rates), "repeats": len(own)}
    first = next(iter(case.sides))
    other = case.sides[first].beside
    if first in sides and other in sides:
        keys = ("pairs_per_cpu_s", "pairs_per_wall_s", "peak_rss_gb")
        sides["ratio"] = {key: sides[first][key] / sides[other][key] for key in keys}
    return sides


def rate_of(case: Case) -> str:
    return "pairs_per_wall_s" if case.device == "cuda" else "pairs_per_cpu_s"


def loss_differences(case: Case, runs: list[dict[str, Any]]) -> dict[str, float]:
    """Largest of a step's loss between the runs of each order of batches that at least two sides share."""
    orders: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        orders.setdefault(run["order"], []).append(run)
    return {
        order: jobs.largest_difference(same, case.compared)
        for order, same in orders.items()
        if len({run["side"] for run in same}) > 1
    }


def void(case: Case, runs: list[dict[str, Any]], differences: dict[str, float]) -> str | None:
    """Why the figures compare two different computations, or None."""
    if len({run["side"] for run in runs}) > 1 and not differences:
        return "void: no two sides were given the same batches"
    largest = max(differences.values(), default=0.0)
    if largest > case.tolerance:
        return f"void: losses differ by {largest:.1e} nats, more than {case.tolerance:.0e}"
    return None


def ratios(record: dict[str, Any]) -> str:
    """Every side beside its counterpart, in pairs per CPU second."""
    sides, key = record["summary"], "pairs_per_wall_s" if record["settings"]["device"] == "cuda" else "pairs_per_cpu_s"
    both = {name: other for name, other in record["beside"].items() if {name, other} <= set(sides)}
    return ", ".join(f"{name} {sides[name][key] / sides[other][key]:.2f}x {other}" for name, other in both.items())


if __name__ == "__main__":
    sys.exit(main())
