"""An online run over the parts of tiny.py, and the two stubs that most tests of it need: answers and scores that are known.

trainer = online_tiny.trainer(tmp_path)       samples from a Llama, and prefers what a hash prefers
trainer = online_tiny.trainer(tmp_path, generator=Known(answers), judge=Told(scores))
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
from datasets import Dataset
from transformers import TrainerCallback

from dpo_trainer.online.config import OnlineDPOConfig
from dpo_trainer.online.feedback.protocol import Judge
from dpo_trainer.online.samples import Completion
from dpo_trainer.online.trainer import OnlineDPOTrainer

TOKENIZER = tiny.tokenizer()
TIMES = re.compile(r"runtime|^sampling|_per_second|_time$|train_loss|total_flos")
"""What a log line says about the clock, or about one call of `train` alone."""


def rows(n: int = 22) -> list[dict[str, str]]:
    """`n` different prompts, of 1 to 4 words and a number."""
    return [{"prompt": f"{row['prompt']} {number}"} for number, row in enumerate(tiny.rows(n))]


def dataset(n: int = 22) -> Dataset:
    return Dataset.from_list(rows(n))


def ids_of(text: str, *, finished: bool = True) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False) + [tiny.END] * finished


def completion(text: str, *, finished: bool = True) -> Completion:
    return Completion(ids=ids_of(text, finished=finished), text=text, finished=finished)


class Known:
    """A generator that samples nothing: answer `number` to a prompt is `answer(text of the prompt, number, model)`, a string
    or a completion. `calls`: (model, prompts, count) as they were asked for."""

    def __init__(self, answer: Callable[[str, int, Any], str | Completion]):
        self.answer = answer
        self.calls: list[tuple[Any, list[str], int]] = []

    def __call__(self, model, prompts, count, *, decoding, seed):
        texts = [TOKENIZER.decode(ids) for ids in prompts]
        self.calls.append((model, texts, count))
        answers = [[self.answer(text, number, model) for number in range(count)] for text in texts]
        return [[completion(a) if isinstance(a, str) else a for a in row] for row in answers]


class Told(Judge):
    """Scores by `score(prompt, number, completion)`."""

    name = "told"

    def __init__(self, score: Callable[[str, int, Completion], float | None]):
        super().__init__()
        self.score = score
        self.calls = 0

    def scores(self, samples):
        self.calls += 1
        return [[self.score(s.prompt, number, c) for number, c in enumerate(s.completions)] for s in samples]


def by_chance(*of: Any) -> float:
    """In [0, 1), and the same for the same arguments."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=4).digest(), "little") / 2**32


def preferring() -> Told:
    """A judge with an opinion on every answer, which does not change."""
    return Told(lambda prompt, number, answer: by_chance(prompt, answer.ids))


def wordy() -> Known:
    """Four different answers to each prompt, of 1 to 4 words; not all of them end."""

    def answer(prompt: str, number: int, model: Any) -> Completion:
        words = [
            tiny.WORDS[int(by_chance(prompt, number, place) * 11)] for place in range(1 + (number + len(prompt)) % 4)
        ]
        return completion(f" {number} " + " ".join(words), finished=by_chance(prompt, number) > 0.3)

    return Known(answer)


class Recording:
    """A generator that asks another and notes what came back: (prompt, ids of each answer) of each call."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.sampled: list[dict[tuple[int, ...], list[list[int]]]] = []

    def __call__(self, model, prompts, count, **how):
        answers = self.inner(model, prompts, count, **how)
        self.sampled.append({tuple(p): [a.ids for a in row] for p, row in zip(prompts, answers, strict=True)})
        return answers


def config(folder: Path | str, **options: Any) -> OnlineDPOConfig:
    """As `tiny.config`: 4 steps of plain gradient descent on batches of 4, float32. Answers of at most 6 tokens."""
    return tiny.config(folder, kind=OnlineDPOConfig, **{"max_new_tokens": 6, **options})


def trainer(
    folder: Path | str,
    *,
    model: Any = None,
    train: Any = None,
    judge: Any = None,
    generator: Any = None,
    parts: Mapping[str, Any] | None = None,
    **options: Any,
) -> OnlineDPOTrainer:
    """`parts` are arguments of OnlineDPOTrainer, `options` of its config. Without rewards `judge` is `preferring()`."""
    given: dict[str, Any] = {
        "model": tiny.llama() if model is None else model,
        "args": config(folder, **options),
        "train_dataset": dataset() if train is None else train,
        "processing_class": tiny.tokenizer(),
        "generator": generator,
        "judge": judge,
    }
    given |= parts or {}
    has_feedback = {"reward_funcs", "reward_model"} & set(given) or options.get("judge") is not None
    if given["judge"] is None and not has_feedback and not options.get("reward_module"):
        given["judge"] = preferring()
    return OnlineDPOTrainer(**given)


def lines(made: OnlineDPOTrainer) -> list[dict[str, float]]:
    """The log lines of training; one without a pair to train on has no loss."""
    return [line for line in made.state.log_history if "staleness" in line]


def without_times(line: Mapping[str, float]) -> dict[str, float]:
    """What a log line says of anything but the clock."""
    return {name: value for name, value in line.items() if not TIMES.search(name)}


class Steps(TrainerCallback):
    """Calls `look(state)` at the end of each optimizer step."""

    def __init__(self, look: Callable[[Any], None]):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look(state)


def judged(made: OnlineDPOTrainer) -> list[tuple[str, Sequence[float | None]]]:
    """(prompt, scores) of the latest samples."""
    return [(sampled.prompt, scores) for sampled, scores in made.last_samples]
