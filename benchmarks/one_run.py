"""Train a few optimizer steps with one of two trainers and say what they cost. Started by `jobs.py`.

    python benchmarks/one_run.py JOB RESULT

The job file (JSON, see `jobs.job_of`) names trainer, rows, tokenizer, model and arguments. Runs with our interpreter or with TRL's: only the chosen
trainer is imported. The rate of this machine's matrix products is measured first, in the same process.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars, load_from_disk
from floor import Weights, matmul_rate, useful_flops
from watching import Batches, Clock, Precompute, Tokens


def build_model(shape: dict, vocab_size: int, seed: int) -> transformers.PreTrainedModel:
    """The same random weights in both environments (same torch); equal first losses prove it."""
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**shape, "vocab_size": vocab_size})).float()


def build_parts(job: dict, clock: Clock) -> dict[str, Any]:
    """What a trainer of either side is built of."""
    parts = {
        "model": model_of(job),
        "train_dataset": dataset_of(job),
        "processing_class": transformers.AutoTokenizer.from_pretrained(job["tokenizer"]),
        "callbacks": [clock],
    }
    if job["eval_rows"]:
        parts["eval_dataset"] = Dataset.from_list(job["eval_rows"])
    if job["lora_rank"]:
        from peft import LoraConfig

        rank = job["lora_rank"]
        parts["peft_config"] = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])
    return parts


def model_of(job: dict) -> transformers.PreTrainedModel:
    return build_model(job["model"], job["model"]["vocab_size"], job["seed"]).to(getattr(torch, job["dtype"]))


def dataset_of(job: dict) -> Dataset:
    """In memory, or on disk where TRL keeps what it precomputes."""
    if job["rows_dir"] is None:
        return Dataset.from_list(job["rows"])
    if not Path(job["rows_dir"]).exists():
        Dataset.from_list(job["rows"]).save_to_disk(job["rows_dir"])
    return load_from_disk(job["rows_dir"])


def build_trainer(job: dict, folder: str, clock: Clock, precompute: Precompute) -> tuple[Any, str]:
    parts = build_parts(job, clock)
    if job["trainer"] == "trl":
        import trl

        precompute.watch(trl.DPOTrainer, "_precompute_ref_logps")
        if not job["lora_rank"]:
            # TRL makes its reference by loading the policy again by name, and a model made here has none.
            parts["ref_model"] = model_of(job)
        return trl.DPOTrainer(args=trl.DPOConfig(output_dir=folder, **job["arguments"]), **parts), trl.__version__

    import dpo_trainer

    precompute.watch(dpo_trainer.DPOTrainer, "precompute_reference")
    trainer = dpo_trainer.DPOTrainer(args=dpo_trainer.DPOConfig(output_dir=folder, **job["arguments"]), **parts)
    return trainer, getattr(dpo_trainer, "__version__", "checkout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--memory-gb", type=float, help="allocations beyond it fail, before the machine runs out")
    options = parser.parse_args()
    if options.memory_gb:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory_gb * 1e9),) * 2)
    job = json.loads(options.job.read_text())
    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    options.result.write_text(json.dumps(measure(job)))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    on_gpu = job["device"] == "cuda"
    used = time.perf_counter if on_gpu else time.process_time
    multiplied = getattr(torch, job.get("multiplied", job["dtype"]))  # under autocast not the dtype of the weights
    rate = matmul_rate(job["matmul_shapes"], multiplied, job["device"], used)
    gc.collect()
    tokens, precompute = Tokens(), Precompute()
    clock = Clock(job["device"], tokens.so_far)
    with tempfile.TemporaryDirectory() as folder:
        trainer, version = build_trainer(job, folder, clock, precompute)
        batches = trainer.data_collator = Batches(trainer.data_collator, job["arguments"]["max_length"])
        parameters = sum(p.numel() for p in trainer.model.parameters())
        before_training_gb = peak_rss_gb()
        trainer.train()
    steps = batches.seen[: job["arguments"]["max_steps"]]  # the loader reads one ahead
    return {
        "trainer": job["trainer"],
        "version": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": parameters,
        "matmul_rate": rate,
        "peak_rss_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else peak_rss_gb(),
        "peak_rss_before_training_gb": before_training_gb,
        "first_step_s": clock.at[1][1] - clock.at[0][1],
        "order": hashlib.sha256("".join(step["digest"] for step in steps).encode()).hexdigest()[:16],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "accuracy": [(cpu - clock.at[0][0], wall - clock.at[0][1], value) for cpu, wall, value in clock.accuracy],
        **costs(job, clock, precompute, steps, rate),
    }


def costs(job: dict, clock: Clock, precompute: Precompute, steps: list[dict], rate: float) -> dict[str, Any]:
    """Of the counted steps; of precomputing, the share of the counted pairs."""
    warm_up, counted = job["warm_up"], steps[job["warm_up"] :]
    total = {name: sum(step[name] for step in counted) for name in ("pairs", "prompt", "completion")}
    share = total["pairs"] / sum(step["pairs"] for step in steps)
    cpu_s, wall_s = (a + share * b for a, b in zip(clock.cost(warm_up), (precompute.cpu_s, precompute.wall_s)))
    (policy_0, reference_0), (policy_1, reference_1) = clock.counts[warm_up], clock.counts[-1]
    flops = useful_flops(
        Weights(**job["weights"]),
        total["prompt"],
        total["completion"],
        checkpointing=job["arguments"]["gradient_checkpointing"],
        reference=not job["warm"],
    )
    return {
        "pairs": total["pairs"],
        "useful_tokens": total["prompt"] + total["completion"],
        "policy_tokens": policy_1 - policy_0,
        "reference_tokens": reference_1 - reference_0,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "precompute_cpu_s": precompute.cpu_s,
        "pairs_per_cpu_s": total["pairs"] / cpu_s,
        "pairs_per_wall_s": total["pairs"] / wall_s,
        "useful_flops": flops,
        "share_of_floor": flops / (wall_s if job["device"] == "cuda" else cpu_s) / rate,
    }


def peak_rss_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
