"""Fill the marked regions of the documentation from the code: losses, metrics, options, the measured table.

    python docs/generate.py            rewrite the pages that are stale, and name them
    python docs/generate.py --check    change nothing; exit with 1 and name them

A region stands between `<!-- generated: NAME -->` and `<!-- end -->`. The generator overwrites hand-written text inside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

from transformers import TrainingArguments  # noqa: E402

from dpo_trainer.cli import ModelArguments, ScriptArguments  # noqa: E402
from dpo_trainer.config import DPOConfig  # noqa: E402
from dpo_trainer.losses import LOSSES  # noqa: E402
from dpo_trainer.losses.registry import SUPPLIED  # noqa: E402
from dpo_trainer.metrics import METRICS  # noqa: E402
from dpo_trainer.online.config import OnlineDPOConfig  # noqa: E402
from dpo_trainer.online.feedback import judges as _  # noqa: E402, F401  # registers them
from dpo_trainer.online.feedback.protocol import JUDGES  # noqa: E402
from dpo_trainer.online.metrics import ONLINE_METRICS, TALLIED  # noqa: E402
from dpo_trainer.versions import CONFLICTS  # noqa: E402

REGION = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)

METRIC_MEANINGS = {
    "loss": "the objective with all its terms, mean over pairs (weighted by the column `weight`, if the data has it)",
    "rewards/chosen": "`beta` times (policy log-prob minus reference log-prob) of the chosen completion",
    "rewards/rejected": "the same for the rejected completion",
    "rewards/accuracies": "share of pairs whose chosen reward is above the rejected one",
    "rewards/margins": "chosen reward minus rejected reward",
    "logps/chosen": "log-prob of the chosen completion, nats, summed over its tokens",
    "logps/rejected": "the same for the rejected completion",
    "logits/chosen": "mean logit over the vocabulary, at the scored tokens of chosen completions",
    "logits/rejected": "the same at the scored tokens of rejected completions",
    "entropy": "entropy of the predicted distribution, nats, mean over all completion tokens",
    "mean_token_accuracy": "share of chosen completion tokens that the model ranks first",
    "nll_loss": "negative log-likelihood of the chosen completion, nats per token, mean over completions",
    "aux_loss": "load-balancing loss of a mixture-of-experts model; only where it is part of the objective",
    "num_tokens": "tokens computed since the start of the run, over all ranks; a resumed run continues the count",
    "tokens_per_second": "tokens computed per second of training since the last log line, without evaluation",
}
"""Meaning of each logged metric: those of `METRICS`, and the two that `DPOTrainer.log` adds."""

ONLINE_MEANINGS = {
    "objective/kl": "log-prob under the policy minus log-prob under the reference, nats per completion: an estimate of the KL divergence",
    "objective/entropy": "entropy of the policy at each completion token, nats",
    "objective/scores": "score of a completion, after `--missing_eos_penalty`, mean over all sampled completions",
    "objective/scores_margin": "best minus worst score of a prompt",
    "val/contain_eos_token": "share of completions that ended with an end token",
    "completions/length": "mean number of tokens of a completion",
    "tie_rate": "share of prompts whose completions all have the same score: they do not train the model",
    "failed_rate": "share of prompts with fewer than two judged completions: not trained on",
    "staleness": "optimizer steps between sampling and training (`--generate_every`)",
    "win_rate": "evaluation: how often a sampled answer beats the answer of the reference; a tie counts half",
    "scores/reference": "evaluation: score of the reference's answers",
    "objective/non_score_reward": "minus `beta` times objective/kl",
    "objective/rlhf_reward": "objective/scores plus objective/non_score_reward: the quantity that RLHF maximises",
    "scores/NAME": "score of one reward, before its weight is applied",
    "JUDGE/NAME": "counts of the judge or rewards since the start of the run: calls, failures, cost",
    "beta": "the beta of the current epoch",
    "sampling/tokens_per_second": "tokens sampled per second on this process",
    "sampling/share_of_time": "share of the time since the last log line that generation took",
}
"""Meaning of the metrics that online DPO adds."""


# --- the regions ---


def losses() -> str:
    rows = []
    for name in builtin_losses():
        loss = LOSSES[name]
        alias = "".join(f" (`{other}`)" for other in loss.aliases)
        paper = f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})" if loss.paper else ""
        rows.append(
            [f"`{name}`{alias}", code(loss.equation), paper, yes(loss.needs_reference), yes(not loss.separable)]
        )
    return table(["`--loss_type`", "equation", "paper", "needs a reference", "couples a batch"], rows)


def loss_notes() -> str:
    notes = []
    for name in builtin_losses():
        loss = LOSSES[name]
        own = [f"`--{argument}`" for argument in loss.arguments if argument not in ("beta", *SUPPLIED)]
        options = f" Takes {', '.join(own)}." if own else ""
        notes.append(f"* **`{name}`** {loss.summary}{options} Source: {loss.source}")
    return "\n".join(notes)


def metrics() -> str:
    logged = [*METRICS, "num_tokens", "tokens_per_second"]
    if set(logged) != set(METRIC_MEANINGS):
        raise SystemExit(
            f"METRIC_MEANINGS in {__file__} must describe the metrics that are logged, and differs in "
            f"{sorted(set(logged) ^ set(METRIC_MEANINGS))}: add or remove their lines."
        )
    return table(["metric", "meaning"], [[f"`{name}`", METRIC_MEANINGS[name]] for name in logged])


def online_metrics() -> str:
    known = {*TALLIED, *(set(ONLINE_METRICS) - set(METRICS))}
    if known - set(ONLINE_MEANINGS):
        raise SystemExit(
            f"ONLINE_MEANINGS in {__file__} lacks {sorted(known - set(ONLINE_MEANINGS))}: add their lines."
        )
    return table(["metric", "meaning"], [[f"`{name}`", meaning] for name, meaning in ONLINE_MEANINGS.items()])


def config() -> str:
    return options_by_section(DPOConfig)


def online_config() -> str:
    return options_by_section(OnlineDPOConfig)


def judges() -> str:
    rows = []
    for name in JUDGES:
        judge = JUDGES[name]
        if not judge.__module__.startswith("dpo_trainer."):
            continue  # registered by a user's module in this process
        options = ", ".join(f"`{option}`" for option in inspect.signature(judge).parameters)
        rows.append([f"`{name}`", cell(inspect.getdoc(judge).split("\n\n")[0].replace("\n", " ")), options])
    return table(["`--judge`", "what it does", "options (`--judge_kwargs`)"], rows)


def script_options() -> str:
    parts = {"Data": ScriptArguments, "Model": ModelArguments}
    return "\n\n".join(f"### {title}\n\n{option_table(dataclasses.fields(kind))}" for title, kind in parts.items())


def speed() -> str:
    """The measured comparison as a table, one row per record that `benchmarks/beside_trl.py` wrote."""
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    records = [record for record in records if {"summary", "settings", "loss_difference"} <= set(record)]
    if not records:
        return "No figures are recorded here yet: `python benchmarks/beside_trl.py --data hh` makes them."
    rows = []
    for record in records:
        sides = record["summary"]
        checkpointing = record["settings"]["arguments"]["gradient_checkpointing"]
        rows.append(
            [
                {"hh": "HH harmless", "ultrafeedback": "UltraFeedback"}.get(record["data"], record["data"]),
                "on" if checkpointing else "off",
                *(f"{sides[side]['pairs_per_cpu_s']:.2f}" for side in ("trl", "ours")),
                f"**{sides['ratio']['pairs_per_cpu_s']:.1f}x**",
                *(f"{sides[side]['peak_rss_gb']:.1f}" for side in ("trl", "ours")),
                f"**{sides['ratio']['peak_rss_gb']:.2f}x**",
                f"{record['loss_difference']:.0e}",
            ]
        )
    first = records[0]
    trl = next(f"TRL {run['version']}" for run in first["runs"] if run["trainer"] == "trl")
    head = [
        "data",
        "gradient checkpointing",
        f"{trl}, pairs/s",
        "here, pairs/s",
        "",
        f"{trl}, peak GB",
        "here, peak GB",
    ]
    settings = first["settings"]
    caption = (
        f"Pairs per CPU second and peak memory of the process, compared with TRL in one run on the same rows: {first['date']}, "
        f"{first['machine']['cpu']}, {settings['threads']} thread, float32, batch "
        f"{settings['arguments']['per_device_train_batch_size']}, `max_length` {settings['arguments']['max_length']}, "
        f"a Qwen2 of {next(run['parameters'] for run in first['runs']) / 1e6:.0f} M parameters. The last column is the "
        "largest difference between the two losses of a step, nats."
    )
    return table([*head, "", "loss differs by"], rows) + "\n\n" + caption


def measured_by(name: str) -> str:
    """The table that `benchmarks/NAME.py` wrote."""
    measured = ROOT / "benchmarks" / "results" / f"{name}.md"
    return measured.read_text().strip() if measured.exists() else f"`python benchmarks/{name}.py` measures it."


def version_ranges() -> str:
    """What `make test-oldest` and `make test-newest` found the last time."""
    record = json.loads((ROOT / "docs" / "versions.json").read_text())
    names = list(dict.fromkeys(name for found in record.values() for name in found["versions"]))
    rows = [
        ("date", *(found["date"] for found in record.values())),
        ("Python", *(found["python"] for found in record.values())),
        *((name, *(found["versions"].get(name, "-") for found in record.values())) for name in names),
        *((kind, *(str(found[kind]) for found in record.values())) for kind in ("passed", "skipped")),
        ("failed", *(", ".join(map(code, found["failed"])) or "none" for found in record.values())),
    ]
    return table(("", *(f"`make test-{target}`" for target in record)), rows)


def version_conflicts() -> str:
    rows = []
    for conflict in CONFLICTS:
        pair = " with ".join(f"{package} {releases}" for package, releases in conflict.versions.items())
        rows.append((pair, f"{conflict.fails}.", f"{conflict.way_out}."))
    return table(("releases", "what fails", "way out"), rows)


REGIONS: dict[str, Callable[[], str]] = {
    "version-ranges": version_ranges,
    "version-conflicts": version_conflicts,
    "losses": losses,
    "loss-notes": loss_notes,
    "metrics": metrics,
    "config": config,
    "online-config": online_config,
    "online-metrics": online_metrics,
    "judges": judges,
    "script-options": script_options,
    "speed": speed,
    "tokenization": partial(measured_by, "tokenization"),
    "vision": partial(measured_by, "vision"),
}


# --- formatting ---


def builtin_losses() -> list[str]:
    """Without those that a user's module has registered in this process."""
    return [name for name in LOSSES if LOSSES[name].builtin]


def options_by_section(kind: type) -> str:
    """A table per `# --- section ---` in the source of a dataclass, and of the classes of options that it puts together."""
    by_name = {option.name: option for option in dataclasses.fields(kind)}
    parts: list[tuple[str, list[Any]]] = []
    inherited = DPOConfig.__mro__ if kind is not DPOConfig else TrainingArguments.__mro__
    sources = [inspect.getsource(own) for own in kind.__mro__ if own not in inherited]
    for line in "\n".join(sources).splitlines():
        if section := re.match(r" {4}# --- (.+) ---$", line):
            parts.append((section[1], []))
        elif parts and (option := re.match(r" {4}(\w+): .*= field\(", line)):
            parts[-1][1].append(by_name[option[1]])
    return "\n\n".join(f"### {title[0].upper()}{title[1:]}\n\n{option_table(options)}" for title, options in parts)


def option_table(options: Iterable[Any]) -> str:
    """One row per dataclass field: name, default, help."""
    rows = []
    for option in options:
        allowed = option.metadata.get("choices")
        values = f" One of {', '.join(f'`{value}`' for value in allowed)}." if allowed else ""
        words = option.metadata["help"].replace("%%", "%")  # doubled for argparse
        rows.append([f"`{option.name}`", f"`{default_of(option)}`", cell(words) + values])
    return table(["option", "default", "meaning"], rows)


def default_of(option: Any) -> str:
    value = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def code(text: str) -> str:
    """Inline code in a table cell; runs of spaces between the parts of an equation become one break."""
    return f"`{cell(re.sub(r' {2,}', '; ', text).replace(',;', ';'))}`"


def cell(text: str) -> str:
    """A table cell ends at a bare `|`."""
    return text.replace("|", r"\|")


def yes(value: bool) -> str:
    return "yes" if value else "no"


# --- the pages ---


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str, page: str) -> str:
    """The page with all its regions written anew."""

    def fill(region: re.Match) -> str:
        if region["name"] not in REGIONS:
            raise SystemExit(f"{page} asks for the region {region['name']!r}; there are: {', '.join(REGIONS)}.")
        return f"{region[1]}\n{REGIONS[region['name']]()}\n\n{region[3]}"

    if text.count("<!-- generated:") != len(REGION.findall(text)):
        raise SystemExit(f"{page}: a `<!-- generated: NAME -->` has no `<!-- end -->` on a line of its own after it.")
    return REGION.sub(fill, text)


def stale(root: Path = ROOT) -> dict[Path, str]:
    """Pages whose regions differ from the code, each with the text that it should have."""
    new = {page: filled(page.read_text(encoding="utf-8"), page.name) for page in pages(root)}
    return {page: text for page, text in new.items() if text != page.read_text(encoding="utf-8")}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is stale")
    check = parser.parse_args(argv).check
    found = stale(root)
    for page, text in found.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        print(f"{page.relative_to(root)} {'is stale: the code has changed' if check else 'rewritten'}")
    if found and check:
        print("Run `python docs/generate.py` (or `make docs`), look at the difference, and commit it.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
