"""Tokenizing preference rows: this package, TRL and the bare fast tokenizer, on the same real rows, in turns.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt -r benchmarks/requirements-trl.txt
    python benchmarks/tokenization.py --data-dir <folder>

Rows are UltraFeedback's (prompt, chosen, rejected), as plain strings and as conversations under a chat template, from a
saved dataset to one of token ids. `bare tokenizer` is one call of it on the three texts that every pair needs (prompt,
prompt + chosen, prompt + rejected), templated beforehand, and nothing else.
`cached` is a second run of ours with another learning rate. Each run has a process of its own; the median is shown.
Rows per CPU second counts all threads and processes. Expect more than `bare tokenizer` reaches, 1.5 to 1.8 times TRL per CPU
second and about 2.5 times by the clock on two cores, and `cached` in well under a second.

Writes `benchmarks/results/tokenization.md` and `.json`. About a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import bench_data

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 1024
FORMS = ("strings", "conversations")
KINDS = {
    "bare tokenizer": "bare",
    "TRL": "trl",
    "here": "ours",
    "here, 2 processes": "ours2",
    "here, cached": "cached",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter of TRL's environment")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "ROWS", "RESULT"), help="used by the command itself")
    options = parser.parse_args()
    if options.measure:
        kind, rows, result = options.measure
        Path(result).write_text(json.dumps(measure(kind, Path(rows))))
        return
    results = compare(options)
    table = as_markdown(results)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "tokenization.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "results" / "tokenization.md").write_text(table)
    print(table)


def compare(options: argparse.Namespace) -> dict:
    rows = bench_data.load_rows("ultrafeedback", options.data_dir)
    options.cache.mkdir(parents=True, exist_ok=True)
    tokenizer = bench_data.tokenizer_for("ultrafeedback", rows, options.cache)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    runs: dict[str, dict[str, list]] = {form: {name: [] for name in KINDS} for form in FORMS}
    for _ in range(options.repeats):
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(Path(folder, "tokenizer"))
                for name, kind in KINDS.items():
                    runs[form][name].append(run(kind, as_form(rows, form), Path(folder), options.trl_python))
    return {
        "rows": len(rows),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "runs": runs,
    }


def as_form(rows: list[dict[str, str]], form: str) -> list[dict]:
    if form == "strings":
        return rows
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: [{"role": roles[name], "content": text}] for name, text in row.items()} for row in rows]


def run(kind: str, rows: list[dict], folder: Path, trl_python: str) -> dict[str, float]:
    """In a process of its own, on rows of its own where no cache may be met."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    own = folder / ("rows-ours" if kind == "cached" else f"rows-{kind}")
    if kind != "cached":
        Dataset.from_list(rows).save_to_disk(str(own))
    python, result = trl_python if kind == "trl" else sys.executable, folder / "result.json"
    command = [python, __file__, "--measure", kind, str(own), str(result)]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads(result.read_text())


def measure(kind: str, rows: Path) -> dict[str, float]:
    """CPU and wall seconds of one kind of run, in this process and its children."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    work = PREPARED[kind](datasets.load_from_disk(str(rows)), AutoTokenizer.from_pretrained(rows.parent / "tokenizer"))
    before, wall = os.times(), time.perf_counter()
    work()
    after = os.times()
    return {"cpu_s": sum(after[:4]) - sum(before[:4]), "wall_s": time.perf_counter() - wall}


def bare(rows, tokenizer) -> Callable[[], object]:
    if isinstance(rows[0]["prompt"], str):
        texts = [t for r in rows for t in (r["prompt"], r["prompt"] + r["chosen"], r["prompt"] + r["rejected"])]
        return lambda: tokenizer(texts)
    texts = []
    for row in rows:
        texts.append(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))
        wholes = (row["prompt"] + row[name] for name in ("chosen", "rejected"))
        texts += [tokenizer.apply_chat_template(whole, tokenize=False) for whole in wholes]
    return lambda: tokenizer(texts, add_special_tokens=False)


def ours(rows, tokenizer, processes: int | None = None) -> Callable[[], object]:
    from dpo_trainer.data import DataOptions, prepare_dataset

    options = DataOptions(max_length=MAX_LENGTH, dataset_num_proc=processes)
    return lambda: prepare_dataset(rows, tokenizer, options)


def trl(rows, tokenizer) -> Callable[[], object]:
    """What TRL's trainer does to its dataset, without building the trainer around it."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=tempfile.mkdtemp(), max_length=MAX_LENGTH, use_cpu=True, bf16=False)
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    return lambda: trainer._prepare_dataset(rows, tokenizer, args, "train")


PREPARED: dict[str, Callable] = {
    "bare": bare,
    "trl": trl,
    "ours": ours,
    "ours2": lambda rows, tokenizer: ours(rows, tokenizer, 2),
    "cached": ours,
}


def as_markdown(results: dict) -> str:
    lines = ["| rows as | | rows per CPU second | rows per second | seconds |", "| --- | --- | --- | --- | --- |"]
    for form, kinds in results["runs"].items():
        for name, runs in kinds.items():
            cpu, wall = (median(run[key] for run in runs) for key in ("cpu_s", "wall_s"))
            rates = f"{results['rows'] / cpu:.0f} | {results['rows'] / wall:.0f}" if "cached" not in name else "|"
            lines.append(f"| {form} | {name} | {rates} | {wall:.2f} |")
    where = (
        f"{results['rows']} UltraFeedback rows, {results['machine']}, {results['date']}, median of {len(runs)} runs."
    )
    return "\n".join([*lines, "", where, ""])


if __name__ == "__main__":
    main()
