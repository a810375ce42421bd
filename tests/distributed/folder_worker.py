"""One of two ranks: `torchrun --nproc_per_node 2 folder_worker.py <folder>` trains in a folder, or says why it was refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import tiny
import torch
import torch.distributed as dist

torch.set_num_threads(1)


def trained(folder: Path) -> str:
    trainer = tiny.trainer(folder, max_steps=2, save_strategy="steps", save_steps=2)
    try:
        trainer.train(resume_from_checkpoint="auto")
    except ValueError as error:
        return str(error)
    return trainer.folder.record.run


if __name__ == "__main__":
    dist.init_process_group("gloo")
    root = Path(sys.argv[1])
    said = {name: trained(root / name) for name in ("held", "free")}
    (root / f"rank {dist.get_rank()}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()
