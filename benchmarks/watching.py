"""What is watched while a trainer of either side runs: time, tokens, batches, the log-probs computed ahead."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers


class Clock(transformers.TrainerCallback):
    """CPU time of all threads and wall time: when training begins and at the end of each step, evaluation taken out."""

    def __init__(self, device: str = "cpu", also: Callable[[], tuple[int, ...]] = tuple):
        self.device, self.also = device, also
        self.at: list[tuple[float, float]] = []
        self.counts: list[tuple[int, ...]] = []
        self.accuracy: list[tuple[float, float, float]] = []
        self.paused = self.stopped = (0.0, 0.0)

    def now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() - self.paused[0], time.perf_counter() - self.paused[1]

    def stamp(self) -> None:
        self.at.append(self.now())
        self.counts.append(self.also())

    def on_train_begin(self, args, state, control, **kwargs):
        self.stamp()

    def on_step_end(self, args, state, control, **kwargs):
        self.stamp()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Since the last stamp, nothing but evaluation has run."""
        (cpu, wall), (cpu_0, wall_0) = self.now(), self.at[-1]
        self.paused = self.paused[0] + cpu - cpu_0, self.paused[1] + wall - wall_0
        self.accuracy.append((cpu_0, wall_0, metrics["eval_rewards/accuracies"]))

    def cost(self, warm_up: int = 1) -> tuple[float, float]:
        """CPU and wall seconds of all steps after the first `warm_up`."""
        (cpu_0, wall_0), (cpu_1, wall_1) = self.at[warm_up], self.at[-1]
        return cpu_1 - cpu_0, wall_1 - wall_0


class Tokens:
    """Tokens that went through the embedding: of the policy (with gradient), of the reference (without)."""

    def __init__(self):
        self.policy = self.reference = 0
        embed = torch.nn.Embedding.forward

        def counted(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                self.policy += ids.numel()
            else:
                self.reference += ids.numel()
            return embed(module, ids)

        torch.nn.Embedding.forward = counted  # type: ignore[method-assign, assignment]

    def so_far(self) -> tuple[int, int]:
        return self.policy, self.reference


class Batches:
    """A collator that notes what it was given: how many pairs, how many tokens without a repeat, which completions."""

    def __init__(self, collate: Callable, max_length: int):
        self.collate, self.max_length = collate, max_length
        self.seen: list[dict[str, Any]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.seen.append(content(rows, self.max_length))
        return self.collate(rows)


def content(rows: list[dict[str, Any]], max_length: int) -> dict[str, Any]:
    """Every completion counts once, and a prompt once where its completions are. The digest names the set of them.

    Completions are cut at `max_length`: our rows are already, TRL's are not before they are collated.
    """
    tokens: dict[tuple, int] = {}
    pairs = 0
    for row in rows:
        prompt = tuple(row["prompt_ids"])
        pairs += len(row.get("pairs") or [()])
        for completion in (row["chosen_ids"], row["rejected_ids"], *(row.get("more_ids") or [])):
            kept = tuple(completion[: max_length - len(prompt)])
            tokens[prompt, kept] = len(kept)
    prompts = {prompt for prompt, _ in tokens}
    return {
        "pairs": pairs,
        "prompt": sum(map(len, prompts)),
        "completion": sum(tokens.values()),
        "digest": hashlib.sha256(repr(sorted(tokens)).encode()).hexdigest()[:16],
    }


class Cost:
    """CPU and wall seconds of all that was `counted`."""

    cpu_s = wall_s = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu_s += time.process_time() - cpu
        self.wall_s += time.perf_counter() - wall


class Precompute(Cost):
    """What a trainer spends on log-probs of the reference before it trains."""

    def watch(self, trainer: type, method: str) -> None:
        compute = getattr(trainer, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.counted():
                return compute(*args, **kwargs)

        setattr(trainer, method, counted)
