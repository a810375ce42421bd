"""Two ranks, of which one has images in its batch and the other has none: the gradients of one process, and no rank that
waits for another, or for weights that only images reach. This file is also what each rank runs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import torch
import vision_rows
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor
from two_processes import torchrun

from dpo_trainer import DPOTrainer

pytestmark = pytest.mark.distributed

STEPS = 2
# float32: the sums of two ranks are added in another order. Worst seen 6e-8 in a loss and 8e-8 in a weight.
ATOL = 1e-5

# Checkpointed layers, the default, forbid DDP to look for parameters without a gradient: one would stop the run.
STRICT = {"ddp_find_unused_parameters": False}
CELLS: dict[str, dict[str, Any]] = {
    "full": {"gradient_checkpointing": True},
    "full, padded": {"gradient_checkpointing": False, "layout": "padded", **STRICT},
    "full, attention both ways": {"family": "gemma3", "gradient_checkpointing": False, **STRICT},
    "full, a layer without a part": {"family": "llava", "gradient_checkpointing": True},
    "adapters, vision too": {"gradient_checkpointing": True, "freeze_vision_tower": False, "learning_rate": 1.0},
    "adapters": {"gradient_checkpointing": True, "learning_rate": 1.0},
}


def lopsided() -> list[vision_rows.Row]:
    """In batches of 2 rows for each of 2 ranks, step after step: images for the first alone, then for the second alone."""
    one, two, none, ranked = vision_rows.rows()
    other = {**none, "completions": ["maybe", "so so"]}
    return [one, two, none, other, other, none, ranked, one]


def run(name: str, folder: Path, ranks: int) -> DPOTrainer:
    how = dict(CELLS[name])
    parts = {"peft_config": tiny.lora()} if name.startswith("adapters") else {}
    made = vision_rows.trainer(
        folder,
        how.pop("family", "qwen3_vl"),
        train=vision_rows.dataset(lopsided()),
        per_device_train_batch_size=4 // ranks,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        parts=parts,
        **how,
    )
    made.train()
    return made


def file_of(name: str, folder: Path) -> Path:
    return folder / f"{name}.safetensors"


def main(folder: Path) -> None:
    """Rank 0 writes the losses and the weights; both must get here."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    seen: dict[str, Any] = {}
    for name in CELLS:
        images: list[int] = []
        made = run(name, folder, 2)
        table: Any = made.train_dataset
        for step in range(STEPS):
            rows = [table[4 * step + 2 * rank + place] for place in range(2)]
            inputs = made.data_collator(rows)
            images.append(sum(inputs["images"].count) if "images" in inputs else 0)
        every: list[Any] = [None, None]
        torch.distributed.all_gather_object(every, [images, made.layout.name])
        seen[name] = {"losses": tiny.losses(made), "ranks": every}
        if rank == 0:
            weights = {n: w.contiguous() for n, w in tiny.weights(made.model, trainable=True).items()}
            save_file(weights, file_of(name, folder))
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(Path(__file__), folder, timeout=300)
    return json.loads((folder / "seen.json").read_text()), folder


@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_equal_one_process(name, together, tmp_path):
    seen, folder = together
    want = run(name, tmp_path, 1)
    assert want.layout.name == ("padded" if "padded" in name else "flat")
    assert [rank[1] for rank in seen[name]["ranks"]] == [want.layout.name] * 2
    assert seen[name]["losses"] == pytest.approx(tiny.losses(want), rel=0, abs=ATOL)
    weights: dict[str, Tensor] = tiny.weights(want.model, trainable=True)
    tiny.assert_same_weights(load_file(file_of(name, folder)), weights, ATOL)
    tower = vision_rows.names_of(want.model, vision_rows.tower_of(want.model)) & weights.keys()
    if name.startswith("full"):
        began, _ = zoo.ZOO[CELLS[name].get("family", "qwen3_vl")]()
        assert tiny.moved({own: began.get_parameter(own) for own in tower}, weights) > 1e-3
    else:  # whose B matrices begin at zero
        moved = [own for own in tower if "lora_B" in own and weights[own].any()]
        assert bool(moved) == (name == "adapters, vision too")


def test_some_batches_had_no_image_on_one_rank(together):
    """And got one that no pair sees, where weights train that only images reach: a batch of one then."""
    seen, _ = together
    for name in CELLS:
        first, second = (images for images, _ in seen[name]["ranks"])
        if name == "adapters":
            assert (first, second) == ([3, 0], [0, 2])
        else:
            padded = "padded" in name
            assert first == [6 if padded else 3, 1]
            assert second == [1, 5 if padded else 2]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(250, exit=True)  # ranks that wait for each other say where
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # native threads outlive the interpreter, and at times abort it
