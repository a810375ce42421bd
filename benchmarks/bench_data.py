"""Rows and tokenizer of the benchmarks: preference pairs, real or of given lengths, in one form that both trainers read alike."""

from __future__ import annotations

import gzip
import json
import random
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

FILES = {"hh": "hh_harmless_train.jsonl.gz", "ultrafeedback": "ultrafeedback_train.jsonl.gz"}
SHAREGPT = "sharegpt_dpo.json"
TURN = "\n\nAssistant:"
VOCAB_SIZE = 16_384


def load_rows(data: str, folder: Path, split: str = "train") -> list[dict[str, str]]:
    """Explicit prompt, chosen, rejected. Prompts end in a colon and completions begin with a space.

    So no token of a byte-level BPE can merge across the boundary, and both trainers see the same ids. HH transcripts
    are split at their last assistant turn; the other two are put into the same dialogue form. `sharegpt` has no `eval` split.
    """
    file = SHAREGPT if data == "sharegpt" else FILES[data].replace("train", split)
    path = folder / file
    if not path.is_file():
        raise SystemExit(f"{path} is not there: name the folder that holds {file} with --data-dir.")
    if data == "sharegpt":
        rows = [_from_sharegpt(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    else:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            read = _split_transcripts if data == "hh" else _as_dialogue
            rows = [read(json.loads(line)) for line in lines]
    return [row for row in rows if row and row["chosen"] != row["rejected"] and row["chosen"].strip()]


def _split_transcripts(row: dict[str, str]) -> dict[str, str] | None:
    """None where the two transcripts differ before their last assistant turn."""
    prompt = row["chosen"][: row["chosen"].rfind(TURN) + len(TURN)]
    if not row["rejected"].startswith(prompt):
        return None
    return _pair(prompt, row["chosen"][len(prompt) :], row["rejected"][len(prompt) :])


def _as_dialogue(row: dict[str, str]) -> dict[str, str] | None:
    return _pair(f"\n\nHuman: {row['prompt']}{TURN}", row["chosen"], row["rejected"])


def _from_sharegpt(row: dict) -> dict[str, str] | None:
    speakers = {"human": "\n\nHuman:", "gpt": TURN}
    turns = (f"{speakers[turn['from']]} {turn['value']}" for turn in row["conversations"] if turn["from"] in speakers)
    return _pair("".join(turns) + TURN, row["chosen"]["value"], row["rejected"]["value"])


def _pair(prompt: str, chosen: str, rejected: str) -> dict[str, str] | None:
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        return None
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def tokenizer_for(data: str, rows: list[dict[str, str]], cache: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 16,384 tokens trained on all rows, kept in `cache` (seconds to build)."""
    folder = cache / f"tokenizer-{data}"
    if not folder.is_dir():
        core = ByteLevelBPETokenizer()
        special = ["<|end|>", "<|pad|>"]
        texts = (text for row in rows for text in row.values())
        core.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
        core.save(str(cache / f"{data}.json"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(cache / f"{data}.json"), eos_token=special[0], pad_token=special[1]
        )
        tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def sample_rows(rows: list[dict[str, str]], tokenizer, count: int, max_length: int, seed: int) -> list[dict[str, str]]:
    """`count` random rows whose prompt leaves room for 16 tokens of completion: both trainers keep every one of them."""
    picked = []
    for row in random.Random(seed).sample(rows, len(rows)):
        if len(tokenizer(row["prompt"])["input_ids"]) <= max_length - 16:
            picked.append(row)
        if len(picked) == count:
            return picked
    raise SystemExit(f"Only {len(picked)} rows fit --max-length {max_length}, {count} are needed: lower --steps.")


def rows_of_length(
    tokenizer, count: int, prompt: int, completion: int, seed: int, completions: int = 2
) -> list[dict[str, Any]]:
    """Random words. `prompt` tokens, and `completion` tokens each with the end token, best first; above two a ranked list."""
    words = [
        text for number in range(len(tokenizer)) if re.fullmatch(" [a-z]{3,}", text := tokenizer.decode([number]))
    ]
    draw = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(draw.choices(words, k=tokens))

    rows: list[dict[str, Any]] = []
    for _ in range(count):
        row: dict[str, Any] = {"prompt": text(prompt)}
        answers = [text(completion - 1) for _ in range(completions)]
        if completions > 2:
            row |= {"completions": answers, "scores": [float(completions - place) for place in range(completions)]}
        else:
            row |= {"chosen": answers[0], "rejected": answers[1]}
        rows.append(row)
    return rows


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Ranked lists as one row for each of their pairs, best first. Pairs stay as they are."""
    return [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse}
        for row in rows
        for better, worse in combinations(row.get("completions") or (row["chosen"], row["rejected"]), 2)
    ]


def longest(row: dict[str, str], tokenizer, max_length: int) -> int:
    """Tokens of the prompt with the longer completion, as a padded batch computes them."""
    prompt, *answers = (len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected"))
    return min(max_length, prompt + max(answers) + 1)


def token_counts(rows: list[dict[str, str]], tokenizer, max_length: int) -> dict[str, float]:
    """Mean tokens per pair, after truncation at `max_length`; completions with their end token."""
    prompt = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    means = {"prompt": sum(prompt) / len(rows)}
    for side in ("chosen", "rejected"):
        lengths = [len(tokenizer(row[side])["input_ids"]) + 1 for row in rows]
        means[side] = sum(min(n, max_length - p) for n, p in zip(lengths, prompt)) / len(rows)
    return {name: round(value, 1) for name, value in means.items()}
