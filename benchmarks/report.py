"""Tables and plots of what the suite has measured: from its records alone, nothing runs.

    python benchmarks/report.py            write benchmarks/results/suite.md, its plots, and the records of the README's table
    python benchmarks/report.py --check    change nothing; exit with 1 where a table is stale

Then `python docs/generate.py` puts the README's table into the README.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cases import CASES
from targets import Record, Records, growth, rate, table, target_table

RESULTS = Path(__file__).resolve().parent / "results"
README = {"hh": "hh-b8", "hh-checkpointing": "hh-b8-gc", "ultrafeedback": "ultrafeedback-b8"}
"""Records that the README's table shows, by the name of their copies."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    old = stale(options.results)
    for path, text in old.items():
        if not options.check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.name} {'is stale: run python benchmarks/report.py' if options.check else 'written'}")
    if options.check:
        return 1 if old else 0
    from plots import draw

    for path in draw(read(options.results), options.results):
        print(f"{path.name} written")
    return 0


def read(results: Path) -> Records:
    """Records by case, in the order of `cases.py`.

    Raises:
        ValueError: for a record of a case that is not there any more.
    """
    found = {path.stem: json.loads(path.read_text()) for path in (results / "suite").glob("*.json")}
    if unknown := sorted(set(found) - set(CASES)):
        raise ValueError(
            f"results/suite/{unknown[0]}.json is of no case in cases.py: delete it, or name the case again."
        )
    return {name: found[name] for name in CASES if name in found}


def stale(results: Path) -> dict[Path, str]:
    """Files that differ from what the records say, each with the text that it should have."""
    records = read(results)
    new = {results / "suite.md": as_markdown(records)}
    for copy, name in README.items():
        if name in records and shows_both(records[name]):
            new[results / f"{copy}.json"] = json.dumps(records[name], indent=1) + "\n"
    return {path: text for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text}


def shows_both(record: Record) -> bool:
    return not record["void"] and "ratio" in record["summary"]


# --- tables ---


def as_markdown(records: Records) -> str:
    lines = [
        "# The suite",
        "",
        "What `python benchmarks/suite.py` has measured; made by `python benchmarks/report.py`.",
    ]
    lines += ["", "## Targets", "", *target_table(records), "", "## Cases", "", *case_table(records)]
    lines += ["", *legend()]
    plots = [
        f"![Pairs per CPU second and peak memory by {what}]({plot}.svg)" for plot, (what, _) in growth(records).items()
    ]
    lines += ["", "## Growth", "", *plots] if plots else []
    lines += ["", "## Where and how", ""]
    lines += [f"* {where(record)}" for record in records.values()]
    return "\n".join([*lines, ""])


def case_table(records: Records) -> list[str]:
    head = ["case", "side", "pairs / CPU s", "lowest to highest", "ratio", "peak GB", "of the floor", "tokens / pair"]
    rows = [row for record in records.values() for row in case_rows(record)]
    return table([*head, "first step, s", "losses differ by"], rows)


def case_rows(record: Record) -> list[list[str]]:
    """One row per side; a case that is void shows why, and no figure."""
    name, sides = record["case"], record["summary"]
    if record["void"]:
        return [[name, f"**{record['void']}**", *[""] * 8]]
    rows = []
    for side in [*(side for side in sides if side != "ratio"), *record["failed"]]:
        if side in record["failed"]:
            rows.append([name, side, f"**{record['failed'][side]}**", *[""] * 7])
            continue
        own = sides[side]
        rows.append(
            [
                name,
                side,
                f"{own[rate(record)]:.3f}",
                f"{own['lowest']:.3f} to {own['highest']:.3f}" if own["repeats"] > 1 else "one run",
                ratio_to(record, side),
                f"{own['peak_rss_gb']:.2f}",
                f"{own['share_of_floor']:.0%}",
                f"{own['policy_tokens'] / pairs_of(record, side):,.0f}",
                f"{own['first_step_s']:.1f}",
                difference(record) if side == next(iter(sides)) else "",
            ]
        )
    return rows


def ratio_to(record: Record, side: str) -> str:
    other = record["beside"].get(side)
    if other is None or other not in record["summary"]:
        return ""
    return f"**{record['summary'][side][rate(record)] / record['summary'][other][rate(record)]:.2f}x** {other}"


def pairs_of(record: Record, side: str) -> int:
    return next(run["pairs"] for run in record["runs"] if run["side"] == side)


def difference(record: Record) -> str:
    return "" if record["loss_difference"] is None else f"{record['loss_difference']:.0e}"


def legend() -> list[str]:
    return [
        "Medians of the repeats. Pairs per CPU second of the process (on a GPU: per second), the steps after the first. Of the floor: "
        "matrix products that the mathematics needs, every token once, over time and over the rate at which the same process multiplied "
        "matrices right before. Tokens: through the policy, as computed, with padding and repeats. Peak: of the process (on a GPU: "
        "allocated). Losses: largest difference of a step between sides that were given the same batches, nats."
    ]


def where(record: Record) -> str:
    run: Record = next(iter(record["runs"]), {})
    settings, machine = record["settings"], record["machine"]
    what = "LoRA" if settings["lora"] else "full fine-tuning"
    rates = [run["matmul_rate"] / 1e9 for run in record["runs"]]
    products = f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s, " if rates else ""
    versions = ", ".join(f"{key} {run[key]}" for key in ("torch", "transformers") if key in run)
    return (
        f"{record['case']}: {record['date']}, {machine['cpu']} ({machine['cores']} cores), {settings['threads']} thread(s), {products}"
        f"{settings['dtype']}, {what}, {run.get('parameters', 0) / 1e6:.1f} M parameters, {run.get('pairs', 0)} counted pairs, "
        f"{versions}; `{record['command']}`"
    )


if __name__ == "__main__":
    sys.exit(main())
