"""One of two ranks: `torchrun --nproc_per_node 2 uneven_worker.py <folder>` runs all of uneven.py; rank 0 writes both's numbers."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import tiny
import torch
import torch.distributed as dist
import uneven
from datasets.distributed import split_dataset_by_node
from transformers import set_seed

torch.set_num_threads(1)


def refused(folder: Path, rank: int, ranks: int) -> dict[str, str]:
    def train(rows: Any) -> str:
        return uneven.refusal(lambda: tiny.trainer(folder, train=rows).train())

    def evaluate(rows: Any) -> str:
        return uneven.refusal(lambda: tiny.trainer(folder).evaluate(rows))

    def own(rows: Any) -> Any:
        return split_dataset_by_node(rows, rank=rank, world_size=ranks)

    return {
        **{f"{name}, trained on": train(rows(folder)) for name, rows in uneven.REFUSED.items()},
        **{f"{name}, evaluated": evaluate(rows(folder)) for name, rows in uneven.REFUSED.items()},
        "share of a stream": train(own(uneven.stream(tiny.rows(16)))),
        "share of a shuffled stream": train(own(uneven.stream(tiny.rows(16))).shuffle(seed=0, buffer_size=4)),
        "share of a table": train(own(tiny.dataset(16))),
        "share of a table, uneven": train(own(tiny.dataset(9))),
        "share of a table, evaluated": evaluate(own(tiny.dataset(9))),
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {"evaluated": {}, "trained": {}}
    for kind, run in {"evaluated": uneven.evaluated, "trained": uneven.trained}.items():
        for name in getattr(uneven, kind.upper()):
            set_seed(0)
            results[kind][name] = run(name, folder, ranks)
    results["refused"] = refused(folder, rank, ranks)
    both: list[Any] = [None] * ranks
    dist.all_gather_object(both, results)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(both))
    dist.barrier()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # ranks that wait for each other say where
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # native threads outlive the interpreter, and at times abort it
