"""Memory of a long stream: a million made-up rows through tokenization, peak resident memory printed as it goes.

    python benchmarks/stream_memory.py --rows 1000000

Nothing is kept: expect the peak to stop growing after the first few thousand rows, well below 2 GB. Rows are ranked
conversations of three answers. Writes `benchmarks/results/stream_memory.json`. A few minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from datasets import IterableDataset

from dpo_trainer.data import DataOptions, prepare_dataset
from dpo_trainer.demo.world import build_tokenizer

NAMES, FOOD = ["ravin", "alice", "chen", "olga", "noor"], ["pizza", "sushi", "soup", "rice", "cake", "bread"]


def rows(count: int) -> Iterator[dict]:
    """Row `i` asks about a name and a food that `i` picks; every hundredth pair is useless."""
    for i in range(count):
        name, good, bad = NAMES[i % 5], FOOD[i % 6], FOOD[(i // 6 + i % 100 // 99) % 6]
        question, answers = f"what does {name} like? " * (1 + i % 7), [f"{name} likes {food}." for food in (good, bad)]
        yield {
            "prompt": [{"role": "user", "content": question}],
            "completions": [[{"role": "assistant", "content": answer}] for answer in (*answers, f"{name} likes tea.")],
            "scores": [1.0, 0.5, 0.2 if i % 3 else 0.5],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    stream = IterableDataset.from_generator(rows, gen_kwargs={"count": options.rows})
    prepared, report = prepare_dataset(stream, build_tokenizer(), DataOptions(max_length=256))
    began, points = time.perf_counter(), []
    for number, _ in enumerate(prepared, start=1):
        if number % (options.rows // 10) == 0:
            points.append({"rows": number, "peak_gb": peak_gb(), "seconds": time.perf_counter() - began})
            print(points[-1], flush=True)
    print(report.table())
    result = {"rows": report.rows, "kept": report.kept, "points": points, "peak_gb": peak_gb()}
    folder = Path(__file__).resolve().parent / "results"
    (folder / "stream_memory.json").write_text(json.dumps(result, indent=2) + "\n")


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 3)


if __name__ == "__main__":
    main()
