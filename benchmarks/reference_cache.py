"""Reference log-probs ahead of training: this package's cache beside TRL's precompute, on the same real rows, in turns.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt -r benchmarks/requirements-trl.txt
    python benchmarks/reference_cache.py --data-dir <folder>

For each dataset, with the model of the suite, each run in a process of its own, median of `--repeats`:

* computing all log-probs, and the same run once more. A time holds the hash of the weights, look-ups, forwards and writes;
* what runs with other options or rows find in the cache that the first run left, and whether what they find is true:
  of the 8 rows with the longest answers under another max_length, beside the numbers of an empty cache;
* the rate of precompute, for several sizes of its packs, beside forwards alone over batches of 8 in the order of the rows;
* training with the reference online and from the cache.

CPU seconds count: other work on the machine disturbs them least. Expect log-probs that agree with TRL's to 1e-3 nats, a rate
of at least 90 % of the forwards alone, a second run in well under a second, and no stale number here; where one of these
fails, the command says so and exits with 1. About 20 minutes of one core.

Writes `benchmarks/results/reference_cache.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import bench_data
from cases import MODEL
from jobs import machine
from one_run import build_model
from watching import Clock, Cost

HERE = Path(__file__).resolve().parent
BATCH = 8
MAX_LENGTH = 1024
FEW = 8  # rows whose truncation is changed
# Larger is slower on a CPU: glibc gives every array above 32 MiB back at once, and the kernel clears its pages anew each
# time. With the model's 1536 features that begins at 5,461 tokens, and costs 10 to 20 % of the time.
PACKS = (2048, 4096, 8192, 16384, 32768)
DEFAULT_PACK = 2048  # of --precompute_ref_max_tokens on a CPU (dpo_trainer/reference/precompute.py)
LEAST_RATE = 0.9
TOLERANCE = 1e-3  # nats; float32 sums of up to about 10,000 nats
MODES = ("keep_start", "keep_end")
MANY = 100_000  # completions of the cache whose size and look-ups are measured
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "learning rate": {"learning_rate": 1e-6},
    "rows shuffled": {"rows": "shuffled"},
    "10 % more rows": {"rows": "more"},
}
ARGUMENTS = {
    "precompute_ref_log_probs": True,
    "per_device_train_batch_size": BATCH,
    "max_length": MAX_LENGTH,
    "learning_rate": 5e-5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


# --- the command ---


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(bench_data.FILES), nargs="+", default=list(bench_data.FILES))
    parser.add_argument("--data-dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="interpreter of TRL's environment")
    parser.add_argument("--tokens", type=int, default=10_000, help="of each dataset, each prompt counted once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="counted optimizer steps of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("out/benchmarks"), help="tokenizers")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "JOB", "RESULT"), help="used by the command itself")
    options = parser.parse_args()
    if options.measure:
        kind, job, result = options.measure
        Path(result).write_text(json.dumps(MEASURES[kind](json.loads(Path(job).read_text()))))
        return 0
    record = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": options.threads,
        "repeats": options.repeats,
        "store": Bench(options, Path(tempfile.gettempdir()), {"threads": 1}).run("store", tokens=100),
        "data": {name: compare(name, options) for name in options.data},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "reference_cache.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "reference_cache.md").write_text(as_markdown(record))
    print(as_markdown(record))
    return verdict(record)


class Bench:
    """Runs measurements of one dataset, each in a process of its own."""

    def __init__(self, options: argparse.Namespace, folder: Path, job: dict[str, Any]):
        self.options, self.folder, self.job = options, folder, job

    def run(self, kind: str, **more: Any) -> dict[str, Any]:
        python = self.options.trl_python if kind.startswith("trl") else sys.executable
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.options.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if not kind.startswith("trl"):
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        with tempfile.TemporaryDirectory() as folder:
            job, result, log = Path(folder, "job.json"), Path(folder, "result.json"), Path(folder, "log.txt")
            job.write_text(json.dumps(self.job | more))
            command = [python, __file__, "--measure", kind, str(job), str(result)]
            with log.open("w") as output:
                code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
            if code:
                raise SystemExit(f"{kind} failed with exit code {code}:\n{log.read_text()[-3000:]}")
            figures = json.loads(result.read_text()) | {"load": round(os.getloadavg()[0], 1)}
        shown = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        print(kind, *(f"{name} {value:.4g}" for name, value in shown.items()), flush=True)
        return figures


def compare(data: str, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements on one dataset."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder), prepare(data, options, Path(folder)))
        timed: dict[str, list[dict]] = {"trl cold": [], "trl again": [], "ours cold": [], "ours again": []}
        rates: list[dict] = []
        training: dict[str, list[dict]] = {"online": [], "cached": []}
        for number in range(options.repeats):
            for side in ("trl", "ours"):
                cache = fresh_cache(bench.folder, f"{side}-{number}")
                for state in ("cold", "again"):
                    timed[f"{side} {state}"].append(bench.run(side, cache=cache))
            rates.append(bench.run("ours_rates", turn=number))
            for way, runs in training.items():
                cache = str(bench.folder / f"ours-{number}")
                runs.append(bench.run("ours_training", cache=cache, cached=way == "cached", steps=options.steps))
        changed = {
            side: bench.run(f"{side}_changed", cache=str(bench.folder / f"{side}-0")) for side in ("trl", "ours")
        }
        truncated = {side: bench.run(f"{side}_truncated", cache=str(bench.folder / f"{side}-cut")) for side in changed}
    numbers = [run.pop("logps") for runs in timed.values() for run in runs]
    return {
        "pairs": bench.job["pairs"],
        "tokens_per_pair": bench.job["tokens_per_pair"],
        "timed": timed,
        "logp_difference": max(difference(numbers[0], other) for other in numbers[1:]),
        "largest_logp": max(abs(value) for row in numbers[0] for value in row),
        "rates": rates,
        "training": training,
        "changed": changed,
        "truncated": truncated,
    }


def prepare(data: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows on disk (all, with 10 % more, and the 8 longest), and what every run of both trainers shares."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    options.cache.mkdir(parents=True, exist_ok=True)
    rows = bench_data.load_rows(data, options.data_dir)
    tokenizer = bench_data.tokenizer_for(data, rows, options.cache)
    sample = bench_data.sample_rows(rows, tokenizer, min(256, len(rows) // 2), MAX_LENGTH, options.seed)
    per_pair = sum(bench_data.token_counts(sample, tokenizer, MAX_LENGTH).values())
    pairs = max(2, round(options.tokens / per_pair / BATCH)) * BATCH
    more = bench_data.sample_rows(rows, tokenizer, pairs + round(pairs / 10), MAX_LENGTH, options.seed)

    def longest_answer(row: dict[str, str]) -> int:
        return max(len(row["chosen"]), len(row["rejected"]))

    few = sorted(more[:pairs], key=longest_answer)[-FEW:]
    for name, part in {"rows": more[:pairs], "more": more, "few": few}.items():
        Dataset.from_list(part).save_to_disk(str(folder / "data" / name))
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in few]
    return {
        "pairs": pairs,
        "tokens_per_pair": bench_data.token_counts(more[:pairs], tokenizer, MAX_LENGTH),
        "data": str(folder / "data"),
        "tokenizer": str((options.cache / f"tokenizer-{data}").resolve()),
        "model": {**MODEL, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        "seed": options.seed,
        "threads": options.threads,
        "shorter": max(prompts) + 16,  # cuts the answers, and leaves no row without one
    }


def fresh_cache(folder: Path, name: str) -> str:
    """A folder for one cache. TRL's lies beside the rows, so each has rows of its own."""
    shutil.copytree(folder / "data", folder / name / "data")
    return str(folder / name)


def difference(these: list[list[float]], those: list[list[float]]) -> float:
    """Largest over all completions, in nats."""
    return max(abs(a - b) for x, y in zip(these, those, strict=True) for a, b in zip(x, y, strict=True))


# --- measurements, each in a process of its own ---


def start(job: dict[str, Any], rows: str = "rows") -> dict[str, Any]:
    """What a trainer of either side is built of. `rows`: a folder of the job's data, or "shuffled"."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
    data = Path(job.get("cache", job["data"]), "data" if "cache" in job else "")
    dataset = datasets.load_from_disk(str(data / ("rows" if rows == "shuffled" else rows)))
    return {
        "model": build_model(job["model"], len(tokenizer), job["seed"]),
        "train_dataset": dataset.shuffle(seed=1) if rows == "shuffled" else dataset,
        "processing_class": tokenizer,
    }


def trl_precompute(
    job: dict[str, Any], *, pretend: bool = False, rows: str = "rows", **changes: Any
) -> dict[str, Any]:
    """TRL computes while it builds its trainer. `pretend`: only see whether it would, with zeros for log-probs."""
    import torch
    import trl
    import trl.trainer.dpo_trainer as module

    cost, computed, hash_module = Cost(), [0], module.hash_module

    class Counted(trl.DPOTrainer):
        def _precompute_ref_logps(self, *args: Any) -> Any:
            with cost.counted():
                return super()._precompute_ref_logps(*args)

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            pairs = len(inputs["input_ids"]) // 2
            computed[0] += pairs
            return (torch.zeros(pairs),) * 2 if pretend else super().compute_ref_log_probs(model, inputs)

    def counted_hash(model: Any) -> str:
        with cost.counted():
            return hash_module(model)

    module.hash_module = counted_hash
    arguments = {**ARGUMENTS, "precompute_ref_batch_size": BATCH, "seed": job["seed"], **changes}
    try:
        trainer = Counted(args=trl.DPOConfig(output_dir=f"{job['cache']}/out", **arguments), **start(job, rows))
    finally:
        module.hash_module = hash_module
    table = trainer.train_dataset
    return {
        "version": trl.__version__,
        "cpu_s": cost.cpu_s,
        "wall_s": cost.wall_s,
        "hit_rate": 1 - computed[0] / len(table),
        "logps": [list(pair) for pair in zip(table["ref_chosen_logps"], table["ref_rejected_logps"], strict=True)],
    }


def our_trainer(job: dict[str, Any], rows: str = "rows", **changes: Any) -> Any:
    import dpo_trainer

    arguments = {
        **ARGUMENTS,
        "layout": "flat",
        "ref_cache_dir": f"{job['cache']}/cache",
        "seed": job["seed"],
        **changes,
    }
    config = dpo_trainer.DPOConfig(output_dir=f"{job['cache']}/out", **arguments)
    return dpo_trainer.DPOTrainer(args=config, **start(job, rows))


def settle(trainer: Any) -> None:
    """The check of the layout comes before the clock: with or without a cache, the first batch of a run begins with it."""
    first = whole_batch(trainer, [trainer.train_dataset[place] for place in range(2)])
    trainer.layout.settle(trainer.model, first)


def whole_batch(trainer: Any, rows: list[dict]) -> Any:
    """Not in the parts that a step on a CPU takes."""
    from dpo_trainer.types import PairBatch

    return PairBatch.from_inputs(replace(trainer.data_collator, max_tokens=None, pack_tokens=None)(rows))


def fill(trainer: Any, folder: str) -> tuple[Any, Cost]:
    """What precomputing for the training rows found and did. Its cost includes the hash of the weights."""
    from dpo_trainer.reference import UntrainedPolicy, cached

    cost = Cost()
    with cost.counted():
        trainer.reference = cached(
            UntrainedPolicy(trainer.scorer),
            trainer.model,
            folder=folder,
            quota_gb=1.0,
            precision="float32",
            tokens=False,
            remake=None,
        )
        (filled,) = trainer.precompute_reference()
    return filled, cost


def our_precompute(job: dict[str, Any], *, rows: str = "rows", **changes: Any) -> dict[str, Any]:
    from dpo_trainer.data.batches.collate import read_row
    from dpo_trainer.data.content import completion_keys

    trainer = our_trainer(job, rows, **changes)
    settle(trainer)
    filled, cost = fill(trainer, trainer.args.ref_cache_dir)
    keys = [completion_keys(read_row(row, place)) for place, row in enumerate(trainer.train_dataset)]
    return {
        "cpu_s": cost.cpu_s,
        "wall_s": cost.wall_s,
        "hit_rate": filled.found / (filled.found + filled.computed),
        "tokens": filled.tokens,
        "logps": [[record.logp for record in trainer.reference.store.get(pair)] for pair in keys],
        "lookup_ms": lookup_ms(trainer),
    }


def lookup_ms(trainer: Any) -> float:
    """The reference of a batch, as a training step asks for it; median over the batches of the dataset."""
    times = []
    for rows in batches(trainer):
        batch = whole_batch(trainer, rows)
        began = time.perf_counter()
        trainer.reference.logps(trainer.model, batch)
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def batches(trainer: Any) -> list[list[dict]]:
    rows = list(trainer.train_dataset)
    return [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]


def hit_rates(precompute: Callable[..., dict], job: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What runs find in the cache that another process filled, each with one change."""
    return {name: precompute(job, **changes, **more)["hit_rate"] for name, changes in CHANGES.items()}


def truncations(precompute: Callable[..., dict], job: dict[str, Any]) -> dict[str, Any]:
    """A few rows at two lengths with one cache, and at the second with an empty one: does the cache tell them apart?"""
    found = {}
    for mode in MODES:
        runs = {}
        for name, length, folder in (
            ("long", MAX_LENGTH, "shared"),
            ("long again", MAX_LENGTH, "shared"),
            ("short", job["shorter"], "shared"),
            ("true", job["shorter"], "empty"),
        ):
            cache = Path(job["cache"], mode, folder)
            if not cache.exists():
                shutil.copytree(job["data"], cache / "data")
            own = job | {"cache": str(cache)}
            runs[name] = precompute(own, rows="few", max_length=length, truncation_mode=mode)
        found[mode] = {
            "again": runs["long again"]["hit_rate"],
            "hit_rate": runs["short"]["hit_rate"],
            "error": difference(runs["short"]["logps"], runs["true"]["logps"]),
            "long_from_short": difference(runs["long"]["logps"], runs["true"]["logps"]),
        }
    return found


def our_rates(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per CPU second: forwards alone over batches that are collated already, and precompute with packs of each
    size into an empty cache. The order turns from run to run."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(job["data"], Path(folder, "data"))
        trainer = our_trainer(job | {"cache": folder})
        settle(trainer)

        def pack(size: int) -> float:
            trainer.args.precompute_ref_max_tokens = size
            filled, cost = fill(trainer, f"{folder}/{size}")
            return filled.tokens / cost.cpu_s

        kinds: list[int | None] = [None, *PACKS]
        turn = 2 * job["turn"] % len(kinds)
        order = kinds[turn:] + kinds[:turn]
        forward_rate(trainer, batches(trainer)[:1])  # warms up
        rates = {kind: forward_rate(trainer, batches(trainer)) if kind is None else pack(kind) for kind in order}
    return {"forward": rates[None], **{str(size): rates[size] for size in PACKS}}


def forward_rate(trainer: Any, rows: list[list[dict]]) -> float:
    import torch

    from dpo_trainer.models.unwrap import evaluation_mode

    collated, cost = [whole_batch(trainer, part) for part in rows], Cost()
    with cost.counted(), torch.no_grad(), evaluation_mode(trainer.model):
        for batch in collated:
            trainer.scorer(trainer.model, batch, extras=False)
    return sum(batch.num_tokens for batch in collated) / cost.cpu_s


def our_training(job: dict[str, Any]) -> dict[str, Any]:
    """A few steps: the first is not counted."""
    changes: dict[str, Any] = {"max_steps": job["steps"] + 1, "dataloader_drop_last": True}
    if not job["cached"]:
        changes |= {"precompute_ref_log_probs": False, "ref_cache_dir": None}
    trainer, clock = our_trainer(job, **changes), Clock()
    trainer.add_callback(clock)
    trainer.train()
    cpu_s, wall_s = clock.cost()
    return {
        "pairs_per_cpu_s": job["steps"] * BATCH / cpu_s,
        "pairs_per_wall_s": job["steps"] * BATCH / wall_s,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def store(job: dict[str, Any]) -> dict[str, Any]:
    """A cache of many completions: bytes of each, and the look-up of a batch. `tokens` of each where those are kept."""
    import numpy as np

    from dpo_trainer.reference import Record
    from dpo_trainer.reference.cache import Store

    draw, found = random.Random(0), {}
    keys = [draw.randbytes(16) for _ in range(MANY)]
    for name, per_token in {"sums": None, "per_token": np.full(job["tokens"], -1.0, dtype=np.float32)}.items():
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder), "0", {}) as many:
            many.put({key: Record(-100.0, job["tokens"], per_token) for key in keys})
            times = []
            for _ in range(200):
                batch = draw.sample(keys, 2 * BATCH)
                began = time.perf_counter()
                many.get(batch, tokens=per_token is not None)
                times.append(time.perf_counter() - began)
            found[f"{name}_bytes"] = many.path.stat().st_size / MANY
            found[f"{name}_lookup_ms"] = 1e3 * median(times)
    return {**found, "tokens": job["tokens"]}


MEASURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "trl": trl_precompute,
    "trl_changed": lambda job: hit_rates(trl_precompute, job, pretend=True),
    "trl_truncated": lambda job: truncations(trl_precompute, job),
    "ours": our_precompute,
    "ours_changed": lambda job: hit_rates(our_precompute, job),
    "ours_truncated": lambda job: truncations(our_precompute, job),
    "ours_rates": our_rates,
    "ours_training": our_training,
    "store": store,
}


# --- what it shows ---


def as_markdown(record: dict[str, Any]) -> str:
    about = record["machine"]
    lines = [
        f"{record['date']}, {about['cpu']} ({about['cores']} cores), {record['threads']} thread(s), Python {about['python']}, "
        f"float32, max_length {MAX_LENGTH}, median of {record['repeats']} runs. {_load(record)}",
    ]
    for name, found in record["data"].items():
        lines += ["", f"# {name}, {found['pairs']} pairs", "", f"Mean tokens of a pair: {found['tokens_per_pair']}."]
        for part in (_timed, _changed, _truncated, _rates, _training):
            lines += ["", *part(found)]
    many = record["store"]
    lines += [
        "",
        f"A cache of {MANY:,} completions: {many['sums_bytes']:.0f} bytes each, a batch of {BATCH} pairs is found in "
        f"{many['sums_lookup_ms']:.2f} ms; with {many['tokens']} log-probs per token, {many['per_token_bytes']:.0f} bytes "
        f"and {many['per_token_lookup_ms']:.2f} ms.",
    ]
    return "\n".join([*lines, ""])


def _load(record: dict[str, Any]) -> str:
    runs = [run for found in record["data"].values() for part in found["timed"].values() for run in part]
    loads = [run["load"] for run in runs]
    return f"Load average of the machine, with other work: {min(loads)} to {max(loads)}."


def _median(runs: list[dict], key: str) -> float:
    return median(run[key] for run in runs)


def _timed(found: dict[str, Any]) -> list[str]:
    version = found["timed"]["trl cold"][0]["version"]
    names = {
        "trl cold": f"TRL {version}, batches of {BATCH}",
        "trl again": "TRL, the same run again",
        "ours cold": "here",
        "ours again": "here, the same run again",
    }
    lines = ["| precompute | CPU s | s | found |", "|---|---|---|---|"]
    for key, name in names.items():
        cpu, wall, hits = (_median(found["timed"][key], figure) for figure in ("cpu_s", "wall_s", "hit_rate"))
        lines.append(f"| {name} | {cpu:.2f} | {wall:.2f} | {hits:.0%} |")
    return [
        *lines,
        "",
        f"Largest difference of a log-prob between all these runs: {found['logp_difference']:.1e} nats, of up to "
        f"{found['largest_logp']:.0f}.",
    ]


def _changed(found: dict[str, Any]) -> list[str]:
    lines = ["| found after a change of | TRL | here |", "|---|---|---|"]
    sides = found["changed"]
    return lines + [f"| {name} | {sides['trl'][name]:.0%} | {sides['ours'][name]:.0%} |" for name in CHANGES]


def _truncated(found: dict[str, Any]) -> list[str]:
    lines = [
        f"| {FEW} rows with the longest answers, cut shorter | | found | off by, nats | cutting changes, nats |",
        "|---|---|---|---|---|",
    ]
    for side, name in {"trl": "TRL", "ours": "here"}.items():
        for mode in MODES:
            run = found["truncated"][side][mode]
            lines.append(
                f"| {name} | {mode} | {run['hit_rate']:.0%} | {run['error']:.1e} | {run['long_from_short']:.0f} |"
            )
    return lines


def _rates(found: dict[str, Any]) -> list[str]:
    lines = ["| tokens per CPU second | | of forwards alone |", "|---|---|---|"]
    lines.append(f"| forwards alone, batches of {BATCH} | {_median(found['rates'], 'forward'):.0f} | |")
    for size in PACKS:
        rate = _median(found["rates"], str(size))
        default = " (the default)" if size == DEFAULT_PACK else ""
        lines.append(f"| precompute, packs of {size}{default} | {rate:.0f} | {relative_rate(found, size):.0%} |")
    return lines


def relative_rate(found: dict[str, Any], size: int) -> float:
    """Of precompute to the forwards of the same process, median."""
    return median(run[str(size)] / run["forward"] for run in found["rates"])


def _training(found: dict[str, Any]) -> list[str]:
    lines = ["| training with the reference | pairs / CPU s | peak RSS, GB |", "|---|---|---|"]
    for way, runs in found["training"].items():
        cells = (_median(runs, key) for key in ("pairs_per_cpu_s", "peak_rss_gb"))
        lines.append(f"| {way} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    lookup = _median(found["timed"]["ours again"], "lookup_ms")
    return [
        *lines,
        "",
        f"Largest difference of a step's loss: {loss_difference(found):.1e} nats. The reference of a batch takes {lookup:.2f} "
        "ms from the cache.",
    ]


def loss_difference(found: dict[str, Any]) -> float:
    losses = [run["losses"] for runs in found["training"].values() for run in runs]
    return max(max(step) - min(step) for step in zip(*losses, strict=True))


def verdict(record: dict[str, Any]) -> int:
    """0 if all that the documentation says holds."""
    met = {}
    for name, found in record["data"].items():
        rate, ours = relative_rate(found, DEFAULT_PACK), [found["truncated"]["ours"][mode] for mode in MODES]
        stale = max(run["error"] for run in ours)
        met[f"{name}: {rate:.0%} of the rate of forwards alone, at least {LEAST_RATE:.0%}"] = rate >= LEAST_RATE
        met[f"{name}: log-probs agree to {found['logp_difference']:.1e} nats"] = found["logp_difference"] <= TOLERANCE
        met[f"{name}: nothing stale, {stale:.1e} nats"] = stale <= TOLERANCE < min(r["long_from_short"] for r in ours)
        met[f"{name}: losses agree to {loss_difference(found):.1e}"] = loss_difference(found) <= 1e-5
    for name, reached in met.items():
        print("reached:" if reached else "NOT reached:", name)
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
