"""Train a few optimizer steps with one of two trainers and say what they cost. Started by `beside_trl.py`.

    python benchmarks/one_run.py ours out/benchmarks/job.json out/benchmarks/result.json

The job file (see `beside_trl.py`) names rows, tokenizer, model and arguments, which are the same for both trainers. Runs
with our interpreter or with TRL's: only the chosen trainer is imported. The first step warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset, disable_progress_bars


class Clock(transformers.TrainerCallback):
    """CPU time of all threads, and wall time, from the end of the warm-up step to the end of the last one."""

    def __init__(self):
        self.at: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.at.append((time.process_time(), time.perf_counter()))

    def cost(self) -> tuple[float, float]:
        (cpu_0, wall_0), (cpu_1, wall_1) = self.at[0], self.at[-1]
        return cpu_1 - cpu_0, wall_1 - wall_0


def build_model(shape: dict, vocab_size: int, seed: int) -> transformers.PreTrainedModel:
    """The same random weights in both environments (same torch); equal first losses prove it."""
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=vocab_size, **shape)).float()


def build_trainer(name: str, job: dict, folder: str, clock: Clock):
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
    parts = {
        "model": build_model(job["model"], len(tokenizer), job["seed"]),
        "train_dataset": Dataset.from_list(job["rows"]),
        "processing_class": tokenizer,
        "callbacks": [clock],
    }
    if name == "trl":
        import trl

        # TRL makes its reference by loading the policy again by name, and a model made here has none.
        parts["ref_model"] = build_model(job["model"], len(tokenizer), job["seed"])
        return trl.DPOTrainer(args=trl.DPOConfig(output_dir=folder, **job["arguments"]), **parts), trl.__version__

    import dpo_trainer

    arguments = {**job["arguments"], **job["only_ours"]}
    trainer = dpo_trainer.DPOTrainer(args=dpo_trainer.DPOConfig(output_dir=folder, **arguments), **parts)
    return trainer, getattr(dpo_trainer, "__version__", "checkout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=["ours", "trl"])
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()

    job, clock = json.loads(options.job.read_text()), Clock()
    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer, version = build_trainer(options.trainer, job, folder, clock)
        before_training_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    cpu_s, wall_s = clock.cost()
    pairs = (len(clock.at) - 1) * job["arguments"]["per_device_train_batch_size"]
    options.result.write_text(
        json.dumps(
            {
                "trainer": options.trainer,
                "version": version,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "pairs": pairs,
                "cpu_s": cpu_s,
                "wall_s": wall_s,
                "pairs_per_cpu_s": pairs / cpu_s,
                "pairs_per_wall_s": pairs / wall_s,
                "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "peak_rss_before_training_gb": before_training_kib * 1024 / 1e9,
                "losses": losses,
            }
        )
    )


if __name__ == "__main__":
    main()
