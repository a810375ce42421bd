"""Data that do not come out even between two ranks of two rows each. Imported by the ranks, and by the test that runs alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import tiny
from datasets import Dataset, IterableDataset

from dpo_trainer import DPOTrainer

GLOBAL_BATCH = 4  # pairs of one micro-batch over all ranks
SIZES = (1, 3, 5, 7)  # one row in all; one rank short; a last round of one rank; a last round with one rank short
MEANS = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")

Row = dict[str, Any]


def stream(rows: Iterable[Row]) -> IterableDataset:
    listed = list(rows)
    return IterableDataset.from_generator(lambda: iter(listed))


def half_useless(n: int) -> list[Row]:
    """2 `n` rows of which every third and fourth is dropped: in batches of 2 they would all be those of one rank."""
    useful = tiny.rows(n)
    useless = {"prompt": "a dog", "chosen": " eats", "rejected": " eats"}
    return [row for i in range(0, n, 2) for row in (*useful[i : i + 2], useless, useless)]


def lopsided(n: int) -> list[Row]:
    """Every third and fourth row has several times the tokens of the others: those of one rank."""
    rows = tiny.rows(n)
    long = " ".join(tiny.WORDS * 3)
    return [{**row, "prompt": f"{row['prompt']} {long}"} if i % 4 > 1 else row for i, row in enumerate(rows)]


def files(folder: Path, n: int) -> list[str]:
    """Three files of unequal length, the last of them without a row that can be used."""
    rows = tiny.rows(n)
    parts = [rows[: n // 3], rows[n // 3 :], [{"prompt": "a", "chosen": " b", "rejected": " b"}]]
    names = [folder / f"part {number}.jsonl" for number in range(3)]
    for name, part in zip(names, parts, strict=True):
        name.write_text("\n".join(map(json.dumps, part)))
    return [str(name) for name in names]


def stream_of_files(folder: Path) -> IterableDataset:
    names = [str(folder / f"part {number}.jsonl") for number in range(3)]
    return datasets.load_dataset("json", data_files=names, streaming=True, split="train")


# What is evaluated: how many pairs can be used, the rows, and options.
EVALUATED: dict[str, tuple[int, Callable[[Path], Any], dict[str, Any]]] = {
    **{f"table of {n}": (n, lambda folder, n=n: tiny.dataset(n), {}) for n in SIZES},
    **{f"stream of {n}": (n, lambda folder, n=n: stream(tiny.rows(n)), {}) for n in SIZES},
    "stream, dropped on one rank": (10, lambda folder: stream(half_useless(10)), {}),
    "table, dropped on one rank": (10, lambda folder: Dataset.from_list(half_useless(10)), {}),
    "stream of files": (10, stream_of_files, {}),
    "stream of files, two workers": (10, stream_of_files, {"dataloader_num_workers": 2}),
    "table, long on one rank": (7, lambda folder: Dataset.from_list(lopsided(7)), {}),
    "table, last dropped": (7, lambda folder: tiny.dataset(7), {"dataloader_drop_last": True}),
}

# What is trained on, with `max_steps`. Two of the steps of a table reach into a second epoch.
TRAINED: dict[str, tuple[int, Callable[[Path], Any]]] = {
    "table of 1": (2, lambda folder: tiny.dataset(1)),
    "table of 3": (2, lambda folder: tiny.dataset(3)),
    "table, long on one rank": (3, lambda folder: Dataset.from_list(lopsided(10))),
    "table, dropped on one rank": (3, lambda folder: Dataset.from_list(half_useless(10))),
    "stream of 1": (2, lambda folder: stream(tiny.rows(1))),
    "stream of 3": (3, lambda folder: stream(tiny.rows(3))),
    "stream, dropped on one rank": (3, lambda folder: stream(half_useless(10))),
    "stream of files": (3, stream_of_files),
}

REFUSED: dict[str, Callable[[Path], Any]] = {
    "empty stream": lambda folder: stream([]),
    "stream of useless rows": lambda folder: stream(half_useless(2)[2:]),
}


def evaluated(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Means over all pairs, ids as `compute_metrics` receives them, and which of them counted on this rank."""
    _, rows, options = EVALUATED[name]
    seen: list[Any] = []
    metrics = {"compute_metrics": lambda prediction: seen.append(prediction) or {}}
    # Another reference, so that the loss says which pairs it is the mean of: without one it is ln 2 for every pair.
    made = tiny.trainer(
        folder,
        parts={"ref_model": tiny.llama(seed=5), **metrics},
        per_device_eval_batch_size=GLOBAL_BATCH // ranks,
        **options,
    )
    counted = note_counted(made)
    means = made.evaluate(rows(folder))
    received = seen[0]
    return {
        "means": {mean: means[f"eval_{mean}"] for mean in MEANS},
        "received": dict(zip(received.label_ids.tolist(), received.predictions["logps/chosen"].tolist(), strict=True)),
        "how many": len(received.label_ids),
        "counted": counted,
    }


def trained(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Means of every line, and which pairs counted on this rank, in their order."""
    steps, rows = TRAINED[name]
    made = tiny.trainer(
        folder,
        train=rows(folder),
        parts={"ref_model": tiny.llama(seed=5)},
        per_device_train_batch_size=GLOBAL_BATCH // ranks,
        max_steps=steps,
        train_sampling_strategy="sequential",
    )
    counted = note_counted(made)
    made.train()
    lines = [{mean: line[mean] for mean in MEANS} for line in tiny.log_lines(made)]
    return {"lines": lines, "counted": counted}


def note_counted(made: DPOTrainer) -> list[int]:
    """Ids of the pairs whose losses enter the mean of this rank."""
    counted: list[int] = []
    plain = made.compute_loss

    def noting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        counted.extend(inputs["example_ids"][inputs["weight"] > 0].tolist())
        return plain(model, inputs, *args, **kwargs)

    made.compute_loss = noting  # type: ignore[method-assign]
    return counted


def refusal(ask: Callable[[], Any]) -> str:
    try:
        ask()
    except ValueError as error:
        return str(error)
    return "not refused"
