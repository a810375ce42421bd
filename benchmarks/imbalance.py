"""Tokens per rank: what each way of ordering rows makes the slowest of 8 ranks wait for, on real preference rows.

    python benchmarks/imbalance.py --data-dir <folder>

8 ranks are simulated: each takes its share of the order through accelerate's own `BatchSamplerShard`, as in training. A
rank's tokens are those of its rows in the flat layout (prompt, chosen, rejected; truncated at 1,024 per side), rows that
accelerate repeats to fill the last step included.

    step         max over ranks of the tokens of a step / mean over ranks - 1: what DDP waits, once per optimizer step
    micro-batch  the same for each micro-batch, added up over the step: what FSDP and ZeRO-3 wait, at every forward

`random`, `group_by_length` and `batch_rebalance` are transformers'; `balanced` is dpo_trainer/data/batches/sampling.py. Expect
`balanced` below 1 % in the mean and `random` at 15 to 40 %.

Writes `benchmarks/results/imbalance.md` and `.json`. Half a minute.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import bench_data
import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, disable_progress_bars
from torch.utils.data import BatchSampler, RandomSampler, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from dpo_trainer.data import DataOptions, prepare_dataset
from dpo_trainer.data.batches.sampling import BalancedSampler

HERE = Path(__file__).resolve().parent
RANKS, BATCH_SIZE, MAX_LENGTH = 8, 8, 1024
ACCUMULATIONS = (1, 4)

Step = list[list[list[int]]]  # [ranks][micro-batches][rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cache", type=Path, default=Path("out/benchmarks"))
    options = parser.parse_args()
    disable_progress_bars()
    options.cache.mkdir(parents=True, exist_ok=True)
    lengths = {data: row_lengths(data, options) for data in bench_data.FILES}
    results = {
        "ranks": RANKS,
        "batch_size": BATCH_SIZE,
        "epochs": options.epochs,
        "date": date.today().isoformat(),
        "rows": {data: described(own) for data, own in lengths.items()},
        "cells": [
            {
                "data": data,
                "accumulation": accumulation,
                "order": name,
                **measure(name, own, accumulation, options.epochs),
            }
            for data, own in lengths.items()
            for accumulation in ACCUMULATIONS
            for name in ORDERS
        ],
    }
    table = as_markdown(results)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "imbalance.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results" / "imbalance.md").write_text(table)
    print(table)


def row_lengths(data: str, options: argparse.Namespace) -> list[int]:
    rows = bench_data.load_rows(data, options.data_dir)
    tokenizer = bench_data.tokenizer_for(data, rows, options.cache)
    prepared, _ = prepare_dataset(Dataset.from_list(rows), tokenizer, DataOptions(max_length=MAX_LENGTH))
    return list(prepared["length"])


def described(lengths: list[int]) -> dict[str, float]:
    return {"rows": len(lengths), "mean": round(float(np.mean(lengths)), 1), "longest": max(lengths)}


# --- the orders: for each epoch, what every rank gets, micro-batch by micro-batch ---


def dealt(sampler_of: Callable[[list[int], int, torch.Generator], Sampler]) -> Callable:
    """An order of rows, cut and dealt as torch and accelerate do."""

    def every_rank(lengths: list[int], accumulation: int, epoch: int) -> list[list[list[int]]]:
        def batches(rank: int) -> list[list[int]]:
            sampler = sampler_of(lengths, accumulation, torch.Generator().manual_seed(epoch))
            return list(BatchSamplerShard(BatchSampler(sampler, BATCH_SIZE, drop_last=False), RANKS, rank))

        return [batches(rank) for rank in range(RANKS)]

    return every_rank


def rebalanced(lengths: list[int], accumulation: int, epoch: int) -> list[list[list[int]]]:
    """Every rank computes its own batches."""

    def batches(rank: int) -> list[list[int]]:
        rows = RANKS * BATCH_SIZE * accumulation
        sampler = BatchRebalanceSampler(lengths, rows, RANKS, accumulation, seed=0, rank=rank, drop_last=False)
        sampler.set_epoch(epoch)
        return list(sampler)

    return [batches(rank) for rank in range(RANKS)]


ORDERS: dict[str, Callable[[list[int], int, int], list[list[list[int]]]]] = {
    "random": dealt(lambda lengths, accumulation, generator: RandomSampler(lengths, generator=generator)),
    "group_by_length": dealt(
        lambda lengths, accumulation, generator: LengthGroupedSampler(
            BATCH_SIZE * accumulation, lengths=lengths, generator=generator
        )
    ),
    "batch_rebalance": rebalanced,
    "balanced": dealt(
        lambda lengths, accumulation, generator: BalancedSampler(
            lengths, batch_size=BATCH_SIZE, ranks=RANKS, accumulation=accumulation, generator=generator
        )
    ),
}


# --- what the ranks wait for ---


def measure(name: str, lengths: list[int], accumulation: int, epochs: int) -> dict[str, float]:
    """Means and worst are over the whole steps of all epochs; the last, incomplete step of an epoch stands by itself."""
    whole: list[Step] = []
    last: list[Step] = []
    began = time.process_time()
    for epoch in range(epochs):
        *steps, incomplete = steps_of(ORDERS[name](lengths, accumulation, epoch), accumulation)
        whole += steps
        last.append(incomplete)
    seconds = time.process_time() - began
    by_step = [imbalance(tokens(step, lengths).sum(axis=1)) for step in whole]
    by_micro_batch = [waited(tokens(step, lengths)) for step in whole]
    sizes = [len(batch) for step in whole for rank in step for batch in rank]
    return {
        "step_mean": float(np.mean(by_step)),
        "step_worst": max(by_step),
        "micro_batch_mean": float(np.mean(by_micro_batch)),
        "micro_batch_worst": max(by_micro_batch),
        "last_step_mean": float(np.mean([imbalance(tokens(step, lengths).sum(axis=1)) for step in last])),
        "fewest_rows": min(sizes),
        "most_rows": max(sizes),
        "most_tokens": int(max(tokens(step, lengths).max() for step in whole)),
        "ms_per_step": 1000 * seconds / RANKS / (len(whole) + len(last)),
        "steps": len(whole),
    }


def steps_of(every_rank: list[list[list[int]]], accumulation: int) -> Iterator[Step]:
    """The last one is incomplete: neither number of rows is a multiple of a step's."""
    for start in range(0, len(every_rank[0]), accumulation):
        yield [batches[start : start + accumulation] for batches in every_rank]


def tokens(step: Step, lengths: list[int]) -> np.ndarray:
    """[ranks, micro-batches]"""
    return np.array([[sum(lengths[row] for row in batch) for batch in rank] for rank in step])


def imbalance(by_rank: np.ndarray) -> float:
    return float(by_rank.max() / by_rank.mean() - 1)


def waited(by_rank: np.ndarray) -> float:
    """Of tokens [ranks, micro-batches], each of which waits for its longest."""
    return float(by_rank.max(axis=0).sum() / by_rank.mean(axis=0).sum() - 1)


def as_markdown(results: dict) -> str:
    lines = [
        "| rows | accumulation | order | step: mean | worst | micro-batch: mean | worst | last step | rows of a "
        "micro-batch | most tokens of one | ms per step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in results["cells"]:
        shares = ("step_mean", "step_worst", "micro_batch_mean", "micro_batch_worst", "last_step_mean")
        fewest, most = cell["fewest_rows"], cell["most_rows"]
        columns = [
            cell["data"],
            str(cell["accumulation"]),
            cell["order"],
            *(f"{cell[share]:.2%}" for share in shares),
            str(most) if fewest == most else f"{fewest} to {most}",
            f"{cell['most_tokens']:,}",
            f"{cell['ms_per_step']:.2f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    rows = "; ".join(
        f"{data}: {own['rows']} rows of {own['mean']} tokens in the mean, {own['longest']} in the longest"
        for data, own in results["rows"].items()
    )
    how = f"{results['ranks']} ranks x {results['batch_size']} rows, {results['epochs']} epochs, {results['date']}."
    return "\n".join([*lines, "", f"{rows}. {how}", ""])


if __name__ == "__main__":
    main()
