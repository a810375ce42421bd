"""One online run, on one process or on two: started by torchrun as a worker, and imported by the test.

Answers come from a table, so that ranks and a single process have the same; each rank asks for its own prompts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
from accelerate.utils import extract_model_from_parallel, gather_object
from datasets import Dataset

from dpo_trainer import OnlineDPOConfig, OnlineDPOTrainer
from dpo_trainer.online import FeedbackUnavailable
from dpo_trainer.online.samples import Completion

ROWS, HELD_OUT = 12, 5  # the last evaluation batch of two ranks is filled up


class Table:
    """The k-th answer to a prompt has k + 1 tokens, made of the prompt's last token."""

    def __call__(self, model: Any, prompts: list[list[int]], count: int, **how: Any) -> list[list[Completion]]:
        return [
            [
                Completion(ids=[10 + (ids[-1] + k) % 200] * (k + 1) + [tiny.END], text="x" * (k + 1), finished=True)
                for k in range(count)
            ]
            for ids in prompts
        ]


class Reward:
    """Longer is better; all answers to the first four prompts are equal, so that the first step of a rank may be all ties.

    `down`: nobody answers the rank that is asked for this prompt.
    """

    name, counts = "table", {}

    def __init__(self, down: int | None):
        self.down = down

    def __call__(self, samples: list[Any]) -> list[list[float]]:
        if any(sampled.example_id == self.down for sampled in samples):
            raise FeedbackUnavailable("Down for good.")
        return [
            [0.0 if sampled.example_id < 4 else float(len(answer.text)) for answer in sampled.completions]
            for sampled in samples
        ]


def run(folder: Path, ranks: int, *, down: int | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    args = OnlineDPOConfig(
        output_dir=str(folder / f"of {ranks}{'' if down is None else ' down'}"),
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        max_steps=3,
        max_new_tokens=4,
        max_length=64,
        num_generations=3,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="no" if down is not None else "steps",
        eval_steps=3,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    prompts = [{"prompt": f"{'why ' * (i % 3)}{i}?"} for i in range(ROWS)]
    trainer = OnlineDPOTrainer(
        tiny.llama(),
        judge=Reward(down),
        args=args,
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:HELD_OUT]),
        processing_class=tiny.tokenizer(),
        generator=Table(),
    )
    said = ""
    try:
        trainer.train()
    except FeedbackUnavailable as error:
        said = str(error)
    weights = {
        name: p.detach().flatten()[:50].tolist()
        for name, p in extract_model_from_parallel(trainer.model).named_parameters()
    }
    return {"lines": trainer.state.log_history, "weights": weights, "said": said}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    found = [{"plain": run(place, 2), "down": run(place, 2, down=7)}]
    both = gather_object(found)
    if torch.distributed.get_rank() == 0:
        (place / "results.json").write_text(json.dumps(both))
    torch.distributed.destroy_process_group()
