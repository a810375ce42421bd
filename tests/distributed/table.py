"""Every run under every engine against one process: the largest differences, as the table of docs/scaling.md.

    python tests/distributed/table.py            prints it
    python tests/distributed/table.py --write    puts it into docs/scaling.md

A number is the largest difference of a metric in any log line (relative to 1 + its size) or of a trained weight. Five launches
of two processes and one process beside them; about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch
from cells import trained_weights
from engines import ENGINES
from launch import Alone, differences, farthest, together

PAGE = HERE.parents[1] / "docs" / "scaling.md"
REGION = re.compile(r"(<!-- equality table -->\n).*?(<!-- end of table -->)", re.DOTALL)

# Rows of the table, and the cells that each stands for.
ROWS = {
    "all weights, frozen copy, flat": ["full flat", "full flat accumulated", "full flat reentrant"],
    "the same, padded": ["full padded"],
    "the same, model given by name": ["named full"],
    "all weights, cached": ["cached full", "cached stream"],
    "the same, padded ": ["cached padded"],
    "all weights, moving": ["moving full"],
    "the same, padded  ": ["moving padded"],
    "LoRA, adapter off, flat": ["lora flat accumulated", "lora flat reentrant"],
    "the same, padded   ": ["lora padded"],
    "LoRA, copy of the adapter": ["lora continued"],
    "LoRA, cached": ["cached lora"],
    "LoRA, moving": ["moving lora"],
    "batches of unequal ranks, a stream": [
        "short last batch",
        "last batch of one rank",
        "short last batch accumulated",
        "stream",
        "balanced",
    ],
    "coupled pairs (`aot`, `aot_unpaired`, `bco_pair`)": ["aot", "aot_unpaired short", "bco_pair"],
    "`max_tokens_per_micro_batch`": ["budget", "budget accumulated", "budget lora", "budget padded"],
    "resumed": ["resumed", "resumed in the epoch", "resumed lora", "resumed moving"],
    "bfloat16": ["bf16", "weighted bf16"],
}


def measure(engines: list[str]) -> dict[str, dict[str, float]]:
    """{engine: {cell: largest difference}}"""
    names = [name for row in ROWS.values() for name in row]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        alone = Alone(Path(folder) / "one")
        for engine in engines:
            where = Path(folder) / engine
            where.mkdir()
            got = together(engine, where, names)["cells"]
            found[engine] = {
                name: max(
                    farthest(trained_weights(name, where), alone.weights(name)),
                    *(max(line.values()) for line in differences(got[name], alone.of(name))),
                )
                for name in names
            }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [["", *(f"`{engine}`" for engine in found)], ["---"] * (1 + len(found))]
    for row, names in ROWS.items():
        lines.append([row.strip(), *(f"{max(cells[name] for name in names):.0e}" for cells in found.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = table(measure(args.engines))
    print(made)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(REGION.sub(rf"\g<1>\n{made}\n\n\g<2>", page), encoding="utf-8")


if __name__ == "__main__":
    main()
