"""The parts of `gpu_first.py` that run in a process of their own: python benchmarks/gpu_first_parts.py JOB RESULT"""

from __future__ import annotations

import inspect
import json
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from one_run import build_trainer
from watching import Clock, Precompute

from dpo_trainer.scoring.varlen import kernels

SETTLED = 2
"""Optimizer steps before anything is watched: the first checks layout and reference."""

WATCHED = {"waits": 3, "trace": 1}
"""Optimizer steps that are."""

ATTENTION = ("varlen", "flash", "scaled_dot_product", "efficient_attention")


def main() -> None:
    job_file, result = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    result.write_text(json.dumps(PARTS[job["part"]](job)))


# --- the machine ---


def machine(job: dict[str, Any]) -> dict[str, Any]:
    facts = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"variable_length": variable_length(), "kernels": [k.name for k in kernels()], "rate": rate(job)}
    if job["device"] == "cpu":
        return {"device": "cpu", **facts}
    card = torch.cuda.get_device_properties(0)
    own = {"device": card.name, "capability": f"{card.major}.{card.minor}", "memory_gb": card.total_memory / 1e9}
    return {**own, "cuda": torch.version.cuda, **facts}


def variable_length() -> str:
    """torch's variable-length kernel, by its signature."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "none"
    return str(inspect.signature(varlen_attn))


def rate(job: dict[str, Any], seconds: float = 2.0) -> float:
    """FLOP per second of a large square product, the best of many."""
    on_gpu = job["device"] == "cuda"
    n, wait = (8192, torch.cuda.synchronize) if on_gpu else (256, lambda: None)
    a, b = (torch.randn(n, n, device=job["device"], dtype=getattr(torch, job["multiplied"])) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + (seconds if on_gpu else 0.1)
    while time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        wait()
        best = min(best, (time.perf_counter() - began) / 4)
    return 2 * n**3 / best


# --- the steps, watched ---


class AfterSteps(transformers.TrainerCallback):
    """Calls `act(steps made)` after each optimizer step."""

    def __init__(self, act: Callable[[int], None]):
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act(state.global_step)


def train(job: dict[str, Any], act: Callable[[int], None]) -> None:
    """A few steps of the job, without a log line among those that are watched."""
    job["arguments"] |= {"max_steps": SETTLED + WATCHED[job["part"]], "logging_steps": 1000}
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = build_trainer(job, folder, Clock(), Precompute())
        trainer.add_callback(AfterSteps(act))
        trainer.train()


def waits(job: dict[str, Any]) -> dict[str, Any]:
    """Where the host waits for the device in the watched steps, as torch's synchronisation debug mode sees it."""
    places: Counter[str] = Counter()
    on_gpu, before = job["device"] == "cuda", warnings.showwarning

    def note(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            frames = [f for f in frames if not f.filename.endswith("warnings.py")]
            places[
                "/".join(Path(frames[-1].filename).parts[-2:]) + f", {frames[-1].name}, line {frames[-1].lineno}"
            ] += 1

    def act(step: int) -> None:
        if on_gpu and step == SETTLED:
            torch.cuda.set_sync_debug_mode("warn")
        elif on_gpu and step == SETTLED + WATCHED[job["part"]]:
            torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            train(job, act)
        finally:
            warnings.showwarning = before
    return {"places": dict(places), "per_step": sum(places.values()) / WATCHED["waits"]}


def trace(job: dict[str, Any]) -> dict[str, Any]:
    """A trace of the watched steps, and what took their time."""
    on_gpu = job["device"] == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    profiler = torch.profiler.profile(activities=activities)

    def act(step: int) -> None:
        if step == SETTLED:
            profiler.start()
        elif step == SETTLED + WATCHED[job["part"]]:
            if on_gpu:
                torch.cuda.synchronize()
            profiler.stop()

    train(job, act)
    profiler.export_chrome_trace(job["trace_file"])
    events = profiler.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = sum(getattr(event, key) for event in events) or 1
    longest = sorted(events, key=lambda event: -getattr(event, key))[:20]
    return {
        "attention_calls_per_step": {
            event.key: event.count / WATCHED["trace"]
            for event in events
            if any(name in event.key for name in ATTENTION) and "::" in event.key and len(event.key) < 100
        },
        "longest": [
            [event.key[:100], event.count / WATCHED["trace"], getattr(event, key) / total] for event in longest
        ],
        "device_s": total / 1e6,
    }


PARTS = {"machine": machine, "waits": waits, "trace": trace}

if __name__ == "__main__":
    main()
