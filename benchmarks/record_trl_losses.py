"""Record what TRL's DPOTrainer computes, step by step, for `tests/test_against_trl.py`.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt -r benchmarks/requirements-trl.txt
    .venv-trl/bin/python benchmarks/record_trl_losses.py

Every case of `tests/fixtures/trl_setup.py` is trained with TRL's own trainer, collator, shuffling and optimizer; the log
lines of all steps go to `tests/fixtures/trl_1_16.json`. One line per case is printed: first and last loss. About a
minute on one core. `--float64` records nothing and prints how far float32 is from double precision: the noise that any
comparison at these settings has to live with.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import accelerate
import peft
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))
import trl_setup as setup

KEPT = [
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
]


def train(case: str, dtype: torch.dtype = torch.float32) -> tuple[list[dict[str, float]], str]:
    """The log line of every optimizer step, and the checksum of the weights that training started from."""
    policy, reference = setup.model().to(dtype), None
    if not setup.uses_lora(case):
        reference = setup.model().to(dtype)  # TRL would reload it by name, and this model has none
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=policy,
            ref_model=reference,
            args=trl.DPOConfig(output_dir=folder, **setup.case_arguments(case)),
            train_dataset=Dataset.from_list(setup.rows()),
            processing_class=setup.tokenizer(),
            peft_config=peft.LoraConfig(**setup.LORA) if setup.uses_lora(case) else None,
        )
        trainer.remove_callback(PrinterCallback)
        setup.fill_lora(trainer.model)
        checksum = setup.weights_checksum(trainer.model)
        trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    if len(steps) != trainer.state.global_step:
        raise RuntimeError(f"{case}: {len(steps)} log lines for {trainer.state.global_step} steps.")
    return [{key: line[key] for key in KEPT} for line in steps], checksum


def versions() -> dict[str, str]:
    packages = {"trl": trl, "torch": torch, "transformers": transformers, "accelerate": accelerate, "peft": peft}
    return {name: package.__version__ for name, package in packages.items()}


def as_columns(steps: list[dict[str, float]]) -> dict[str, list[float]]:
    """Nine significant digits: all that float32 holds."""
    return {key: [float(f"{line[key]:.9g}") for line in steps] for key in KEPT}


def write(recorded: dict[str, dict]) -> None:
    """One line of JSON per metric, so that a change shows in a diff."""
    head = {
        "made_by": ".venv-trl/bin/python benchmarks/record_trl_losses.py",
        "versions": versions(),
        "rows_sha256": setup.rows_checksum(),
        "model_sha256": setup.weights_checksum(setup.model()),
    }
    body = []
    for case, record in recorded.items():
        steps = ",\n".join(f"   {json.dumps(key)}: {json.dumps(values)}" for key, values in record["steps"].items())
        start = json.dumps(record["start_sha256"])
        arguments = json.dumps(setup.CASES[case])
        body.append(
            f'  {json.dumps(case)}: {{"arguments": {arguments},\n   "start_sha256": {start}, "steps": {{\n{steps}}}}}'
        )
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    setup.FIXTURE.write_text("{\n" + lines + ',\n "cases": {\n' + ",\n".join(body) + "\n }\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--float64", action="store_true", help="print the distance to double precision, write nothing")
    parser.add_argument("--case", choices=list(setup.CASES), action="append", help="only these; needs --float64")
    options = parser.parse_args()
    if options.case and not options.float64:
        parser.error("--case would write an incomplete fixture: combine it with --float64, or leave it out.")
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)

    recorded = {}
    for case in options.case or setup.CASES:
        steps, checksum = train(case)
        recorded[case] = {"start_sha256": checksum, "steps": as_columns(steps)}
        line = f"{case:24s} {len(steps):3d} steps, loss {steps[0]['loss']:.6f} -> {steps[-1]['loss']:.6f}"
        if options.float64:
            exact, _ = train(case, torch.float64)
            line += f", float32 is off by {max(abs(a['loss'] - b['loss']) for a, b in zip(steps, exact)):.1e}"
        print(line, flush=True)
    if not options.float64:
        write(recorded)
        print(f"wrote {setup.FIXTURE.name}")


if __name__ == "__main__":
    main()
