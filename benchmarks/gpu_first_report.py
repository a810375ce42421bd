"""The table of `gpu_first.py`: one line per question, from its record as far as that goes."""

from __future__ import annotations

import math
from typing import Any

TOLERANCE = 5e-2
"""Between the losses of a step, nats: bfloat16 has 8 bits, and a loss is a difference of sums of some hundred log-probs."""


def as_markdown(record: dict[str, Any]) -> str:
    parts = record["parts"]
    machine = parts.get("machine", {})
    lines = [
        f"# First run on {machine.get('device', 'a device that did not answer')}",
        "",
        f"{record['date']}, torch {machine.get('torch', '?')}, transformers {machine.get('transformers', '?')}, shapes of Qwen2-0.5B, batch 8, "
        "float32 weights under bfloat16 autocast, gradient checkpointing."
        + (" **A dry run: tiny shapes on a CPU, float32. Its figures mean nothing.**" if record["dry_run"] else ""),
        "",
        "| question | answer |",
        "| --- | --- |",
        *(f"| {question} | {answer} |" for question, answer in answers(parts)),
        "",
    ]
    for part, figures in parts.items():
        if "failed" in figures:
            lines += [
                f"## {part} failed after {figures['seconds']:.0f} s",
                "",
                "```text",
                figures["failed"],
                "```",
                "",
            ]
    return "\n".join(lines)


def answers(parts: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(question, answer) of the parts that are there."""
    found: list[tuple[str, str]] = []
    there = {name: figures for name, figures in parts.items() if "failed" not in figures}
    if "machine" in there:
        found.append(("attention kernels for flat rows, in order", "; ".join(there["machine"]["kernels"]) or "none"))
        found.append(("rate of large bfloat16 products", f"{there['machine']['rate'] / 1e12:.1f} TFLOP/s"))
    if "tests" in parts and "tests" in parts["tests"]:
        tests = parts["tests"]
        found.append(("tests/gpu", f"{tests['passed']} of {tests['tests']} passed, {tests['skipped']} skipped"))
    for name, title in (("steps", "here"), ("padded", "here, padded rows"), ("trl", "TRL")):
        if name in there:
            found.append((title, _speed(there[name], there.get("machine", {}).get("rate"))))
    found += [
        (f"losses here beside {title}", _agreement(there["steps"]["losses"], there[name]["losses"]))
        for name, title in (("padded", "padded rows"), ("trl", "TRL"))
        if {"steps", name} <= there.keys()
    ]
    if "waits" in there:
        places = "; ".join(f"{place} ({count})" for place, count in there["waits"]["places"].items())
        found.append(
            ("waits for the device per optimizer step", f"{there['waits']['per_step']:g}: {places or 'none'}")
        )
    if "trace" in there:
        calls = there["trace"]["attention_calls_per_step"]
        found.append(("attention calls per step", "; ".join(f"{k} {v:g}" for k, v in calls.items()) or "none"))
        longest = "; ".join(f"{name} {share:.0%}" for name, _, share in there["trace"]["longest"][:5])
        found.append(("longest operations", longest))
    return found


def _speed(run: dict[str, Any], large: float | None) -> str:
    share = f"{run['share_of_floor']:.0%} of the rate of products of its own shapes"
    if large:
        share += f", {run['useful_flops'] / run['wall_s'] / large:.0%} of that of large ones"
    return (
        f"{run['pairs_per_wall_s']:.2f} pairs/s, {run['useful_tokens'] / run['wall_s']:,.0f} tokens/s, {share}; peak "
        f"{run['peak_rss_gb']:.2f} GB; first step {run['first_step_s']:.1f} s"
    )


def _agreement(ours: list[float], theirs: list[float]) -> str:
    if len(ours) != len(theirs) or not all(map(math.isfinite, [*ours, *theirs])):
        return f"**differ**: {len(ours)} and {len(theirs)} steps, or a loss that is no number"
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return f"{'agree' if largest <= TOLERANCE else '**differ**'}, by at most {largest:.1e} nats in {len(ours)} steps"
