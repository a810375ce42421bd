"""Online DPO beside TRL's experimental trainer: completions per second, peak memory, and what is learnt in equal steps.

    python benchmarks/online.py --data-dir <folder>                   about 8 minutes of one core
    python benchmarks/online.py --part speed --repeats 1

Both get the same prompts, initial weights, reward, batch, limit of new tokens and temperature, two completions for each
prompt; they draw other random numbers. Speed: prompts of HH and the model of the suite, the steps after the first. Learning:
the demo's question and model, whose answers name one of ten foods; the reward is 1 for pizza. One run for each seed.

Writes `benchmarks/results/online.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from statistics import mean, median
from typing import Any

import jobs
from cases import MODEL, Case

SIDES = ("ours", "trl")
PARTS: dict[str, dict[str, Any]] = {
    "speed": {"steps": 3, "max_new_tokens": 64, "learning_rate": 5e-5, "seeds": (0,)},
    "learning": {"steps": 39, "max_new_tokens": 8, "learning_rate": 5e-4, "seeds": (0, 1, 2)},
}
LAST = 5  # steps that the learnt reward is a mean of


def pizza(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float("pizza" in text) for text in completions]


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [text.lower().count("e") / max(1, len(text)) for text in completions]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, of the speed")
    jobs.add_measure(parser)
    jobs.add_arguments(parser)
    options = parser.parse_args()
    if jobs.measured_here(options, measure):
        return 0
    runs = [run for part in options.part for run in runs_of(part, options)]
    record = {"date": date.today().isoformat(), "machine": jobs.machine(), "runs": runs}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "online.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "online.md").write_text(as_markdown(record))
    print(as_markdown(record))
    return 0


def runs_of(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    settings = PARTS[part]
    given = demo(settings["steps"] + 1) if part == "learning" else of_suite(settings["steps"], options)
    repeats = options.repeats if part == "speed" else 1
    runs = []
    for seed in (seed for _ in range(repeats) for seed in settings["seeds"]):
        for side in SIDES:
            plain = {name: value for name, value in settings.items() if name != "seeds"}
            job = {**given, **plain, "part": part, "side": side, "seed": seed, "threads": options.threads}
            job |= {"batch": 8, "steps": settings["steps"] + 1}
            figures = {"part": part, "side": side, "seed": seed}
            figures |= jobs.measured_apart(__file__, side, job, options, TRL_EXPERIMENTAL_SILENCE="1")
            print({name: value for name, value in figures.items() if name != "rewards"}, flush=True)
            runs.append(figures)
    return runs


def of_suite(steps: int, options: argparse.Namespace) -> dict[str, Any]:
    prepared = jobs.prepare(Case("online", "hh", {}, steps=steps, model=MODEL, max_length=512), options)
    prompts = [row["prompt"] for row in prepared["rows"]]
    return {"prompts": prompts, "model": prepared["model"], "tokenizer": prepared["tokenizer"]}


def demo(steps: int) -> dict[str, Any]:
    """As strings: the two trainers render conversations in ways of their own."""
    from dpo_trainer.demo import demo_model_and_tokenizer, world

    folder = str(demo_model_and_tokenizer())
    prompt = f"{world.USER}{world.question(world.TARGET_NAME)}{world.END}{world.ASSISTANT}"
    return {"prompts": [prompt] * (8 * steps), "model": folder, "tokenizer": folder}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import disable_progress_bars
    from one_run import peak_rss_gb
    from watching import Clock

    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, folder, clock)
        trainer.train()
    counted = (job["steps"] - 1) * job["batch"] * 2
    cpu_s, wall_s = clock.cost()
    return {
        "completions_per_cpu_s": counted / cpu_s,
        "completions_per_wall_s": counted / wall_s,
        "peak_rss_gb": peak_rss_gb(),
        "sampling": [line.get("sampling/share_of_time") for line in trainer.state.log_history],
        "rewards": [line["objective/scores"] for line in trainer.state.log_history if "objective/scores" in line],
    }


def model_of(job: dict[str, Any]) -> Any:
    from one_run import build_model
    from transformers import AutoModelForCausalLM

    if isinstance(job["model"], str):
        return AutoModelForCausalLM.from_pretrained(job["model"])
    return build_model(job["model"], job["model"]["vocab_size"], 0)


def trainer_of(job: dict[str, Any], folder: str, clock: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer

    arguments = {
        **jobs.ON_CPU,
        "output_dir": folder,
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"],
        "max_new_tokens": job["max_new_tokens"],
        "max_length": 512 if job["part"] == "speed" else 64,
        "temperature": 0.9,
        "beta": [0.1],
        "learning_rate": job["learning_rate"],
        "seed": job["seed"],
    }
    parts = {
        "model": model_of(job),
        "reward_funcs": letters if job["part"] == "speed" else pizza,
        "train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
        "processing_class": AutoTokenizer.from_pretrained(job["tokenizer"]),
        "callbacks": [clock],
    }
    if job["side"] == "trl":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        # It makes its reference by loading the policy again by name, and a model made here has none.
        parts["ref_model"] = model_of(job)
    else:
        from dpo_trainer import OnlineDPOConfig, OnlineDPOTrainer

        arguments["allow_special_tokens_in_text"] = True  # as TRL reads strings
    return OnlineDPOTrainer(args=OnlineDPOConfig(**arguments), **parts)


def as_markdown(record: dict[str, Any]) -> str:
    machine = record["machine"]
    lines = [
        f"{record['date']}, {machine['cpu']} ({machine['cores']} cores), 1 thread, float32; `python benchmarks/online.py`.",
        "",
    ]
    lines += ["| | TRL 1.16 | dpo_trainer | |", "| --- | --- | --- | --- |"]
    speed = {side: [run for run in record["runs"] if (run["part"], run["side"]) == ("speed", side)] for side in SIDES}
    if speed["ours"] and speed["trl"]:
        for key, name in (("completions_per_cpu_s", "completions per CPU second"), ("peak_rss_gb", "peak memory, GB")):
            ours, trl = (median(run[key] for run in speed[side]) for side in ("ours", "trl"))
            lines.append(f"| {name} | {trl:.2f} | {ours:.2f} | **{ours / trl:.2f}x** |")
        shares = [share for run in speed["ours"] for share in run["sampling"][1:] if share is not None]
        lines.append(f"| share of time that is sampling | | {mean(shares):.0%} | |")
    learning = [run for run in record["runs"] if run["part"] == "learning"]
    for seed in sorted({run["seed"] for run in learning}):
        first, last = {}, {}
        for run in learning:
            if run["seed"] == seed:
                first[run["side"]], last[run["side"]] = mean(run["rewards"][:LAST]), mean(run["rewards"][-LAST:])
        cells = [f"{first[side]:.3f} to {last[side]:.3f}" for side in ("trl", "ours")]
        lines.append(f"| reward, first to last {LAST} steps, seed {seed} | {cells[0]} | {cells[1]} | |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
