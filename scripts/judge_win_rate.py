"""How often a model's answers beat reference answers, as a judge or a reward model sees it.

    python scripts/judge_win_rate.py --model_name_or_path out --dataset_name pairs.jsonl --reference_column chosen \\
        --judge llm --judge_kwargs '{"model": "gpt-4o-mini"}' --n 200 --output win_rate.json
    python scripts/judge_win_rate.py --answers answers.jsonl --reference_answers others.jsonl --judge length

The answers come from a model, the likeliest ones or those of --temperature, or from a file with a prompt and an answer in
each row. A prompt that is a string is continued as it stands, messages go through the chat template. Files of answers belong
together row by row. Prints such as "win rate 61.5%, 95 % interval 54.6% to 68.0% (117 wins, 12 ties, 71 losses, 0 failed)";
an interval with 50 % in it does not tell which one is better: raise --n. The same goes to --output, for
scripts/plot_scaling.py. `--judge length` needs no network. `--help` lists every option.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

import torch
from transformers import HfArgumentParser

from dpo_trainer.cli.errors import OneMessage
from dpo_trainer.data.files.datasets import eval_rows
from dpo_trainer.data.files.renaming import parse_columns
from dpo_trainer.data.rows.messages import read_messages
from dpo_trainer.data.rows.schema import pair_from_row
from dpo_trainer.data.tokens.encode import check_tokenizer
from dpo_trainer.data.tokens.tokenize import tokenize_prompts
from dpo_trainer.models.load import load_model, load_tokenizer
from dpo_trainer.models.positions import window_of
from dpo_trainer.online.feedback import judges  # noqa: F401  # registers those that come with the package
from dpo_trainer.online.feedback.protocol import make_judge, parse_options
from dpo_trainer.online.feedback.reward_model import RewardModel
from dpo_trainer.online.feedback.rewards import Rewards
from dpo_trainer.online.feedback.win_rate import check_level, compare_answers
from dpo_trainer.online.prompts import read_prompt
from dpo_trainer.online.sampling.generate import Decoding, TransformersGenerator, end_tokens
from dpo_trainer.types import Text

COMPLETIONS = ("chosen", "rejected")
OF_SAMPLING = ("columns", "dtype", "max_new_tokens", "temperature", "batch_size")
"""Options that do nothing for answers from a file."""


def option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    """Whose answers, against which, in whose eyes."""

    answers: str | None = option(
        "Answers to judge: a .jsonl file (or what else --dataset_name takes) with prompt and answer."
    )
    model_name_or_path: str | None = option("Instead of --answers: the model that answers, a hub id or folder.")
    dataset_name: str | None = option("Its prompts: a dataset of the hub, a local file or a folder of files.")
    dataset_test_split: str | None = option("The split to take. Default: test, or the only one.")
    columns: str | None = option("Names of the columns in the dataset, ours=theirs: prompt=question,chosen=best.")
    reference_answers: str | None = option(
        "Answers to judge them against: a file with an answer in each row, in the same order."
    )
    reference_column: str | None = option(
        "Instead: the column of the dataset (or of --answers) that holds them, such as chosen."
    )
    judge: str | None = option("Who compares: the name of a judge, such as llm or length.")
    judge_kwargs: str | None = option("Its options, a JSON object.")
    reward_model_path: str | None = option("Instead of --judge: a reward model, which scores both answers.")
    output: str = option("Where the numbers go, as JSON.", "win_rate.json")
    n: int | None = option("How many rows, drawn by --seed. Default: all.")
    seed: int = option("Of the draw of rows, and of answers at a --temperature.", 0)
    level: float = option("Confidence of the interval.", 0.95)
    model_size: float | None = option(
        "Parameters of the model, for plot_scaling.py. Default: counted, if it is loaded."
    )
    series: str | None = option("The line that the point belongs to, for plot_scaling.py.")
    dtype: str = option("What the weights are held in: auto (as saved), float32, bfloat16, float16.", "auto")
    max_new_tokens: int = option("Most tokens of an answer.", 256)
    temperature: float = option("0: the likeliest token each time. Above: tokens are drawn.", 0.0)
    batch_size: int = option("Answers that are written at once.", 16)
    traceback: bool = option("Show where an error came from.", False)

    def __post_init__(self):
        self._one_of("answers", "model_name_or_path")
        self._one_of("reference_answers", "reference_column")
        self._one_of("judge", "reward_model_path")
        if self.model_name_or_path and not self.dataset_name:
            raise ValueError("--model_name_or_path without --dataset_name: which prompts shall it answer?")
        idle = [option for option in fields(self) if option.name in ("dataset_name", *OF_SAMPLING)]
        given = [option.name for option in idle if getattr(self, option.name) != option.default]
        if self.answers and given:
            raise ValueError(f"--{given[0]} does nothing for answers from a file: leave it or --answers out.")
        if self.judge_kwargs is not None and not self.judge:
            raise ValueError("--judge_kwargs are options of a judge, and there is no --judge.")
        for name in ("n", "max_new_tokens", "batch_size", "model_size"):
            if (value := getattr(self, name)) is not None and not value >= 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature {self.temperature} must be at least 0.")
        check_level(self.level, "--level")

    def _one_of(self, *names: str) -> None:
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise ValueError(f"Give one of --{' and --'.join(names)}, and not both.")


@dataclass
class Answered:
    """Rows with two answers each. `parameters`: of the model that wrote the first, where that is known."""

    prompts: list[Text]
    answers: list[str]
    references: list[str]
    columns: list[dict[str, Any]]
    ids: list[int]
    parameters: int | None


def main(argv: list[str] | None = None) -> None:
    with OneMessage("judge_win_rate.py", argv):
        parser = HfArgumentParser(Arguments, allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
        run(*parser.parse_args_into_dataclasses(argv))


def run(args: Arguments) -> None:
    """Read or write the answers, ask for feedback, print and save the win rate."""
    feedback = make_feedback(args)  # before the hours of sampling that a misspelt option would cost
    rows = answered(args)
    found = compare_answers(feedback, rows.prompts, rows.answers, rows.references, rows.columns, rows.ids)
    print(found.describe(args.level))
    result = found.to_dict(args.level) | {
        "model": args.model_name_or_path or args.answers,
        "parameters": rows.parameters,
        "judge": args.judge or args.reward_model_path,
        "n": len(rows.prompts),
    }
    result |= {"series": args.series} if args.series else {}
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_feedback(args: Arguments) -> Any:
    if args.reward_model_path:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Rewards([RewardModel(args.reward_model_path, device=device)], None)
    assert args.judge is not None
    return make_judge(args.judge, parse_options(args.judge_kwargs or "{}"))


# --- the answers ---


def answered(args: Arguments) -> Answered:
    name = args.answers or args.dataset_name or ""
    rows = table(name, args.dataset_test_split, args.columns)
    others = table(args.reference_answers) if args.reference_answers else None
    if others is not None and len(others) != len(rows):
        raise ValueError(
            f"{name} has {len(rows)} rows and {args.reference_answers} {len(others)}: they belong together row by row."
        )
    ids = list(range(len(rows)))
    if args.n is not None and args.n < len(ids):
        ids = sorted(random.Random(args.seed).sample(ids, args.n))
    read = [read_row(rows[i], f"Row {i} of {name}", args.reference_column) for i in ids]
    prompts = [prompt for prompt, _ in read]
    references = [text for _, text in read if text is not None]
    if others is not None:
        where = [f"Row {i} of {args.reference_answers}" for i in ids]
        references = [answer_beside(others[i], prompt, at) for i, prompt, at in zip(ids, prompts, where, strict=True)]
    parameters = None if args.model_size is None else round(args.model_size)
    if args.answers:
        answers = [answer_of(rows[i], "answer", f"Row {i} of {name}") for i in ids]
    else:
        answers, counted = sample(args, prompts, [f"Row {i} of {name}" for i in ids])
        parameters = parameters or counted
    columns = [{name: value for name, value in rows[i].items() if name != "prompt"} for i in ids]
    return Answered(prompts, answers, references, columns, ids, parameters)


def table(name: str, split: str | None = None, columns: str | None = None) -> Any:
    return eval_rows(name, split, parse_columns(columns), streaming=False)


def read_row(row: dict[str, Any], where: str, reference_column: str | None) -> tuple[Text, str | None]:
    """(prompt, what `reference_column` answers). Preference pairs are read as in training, with a prompt that is implicit or
    repeated in both completions."""
    if all(row.get(column) is not None for column in COMPLETIONS):
        pair = pair_from_row(row, where)
        if reference_column in COMPLETIONS:
            return pair.prompt, answer_of({reference_column: getattr(pair, reference_column)}, reference_column, where)
        prompt = pair.prompt
    elif row.get("prompt") is None:
        raise ValueError(f"{where} has no column 'prompt' (it has: {', '.join(row)}). Name it: --columns prompt=NAME.")
    else:
        prompt = read_prompt(row["prompt"], where)
    return prompt, None if reference_column is None else answer_of(row, reference_column, where)


def answer_of(row: dict[str, Any], column: str, where: str) -> str:
    """The answer in a column: a string, or messages that end with it."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"{where} has no column {column!r}, or nothing in it. It has: {', '.join(row)}.")
    if isinstance(value, str):
        return value
    if not isinstance(value, list | dict):
        raise ValueError(f"{where}, column {column!r}: is {value!r:.40}. Give an answer as a string, or as messages.")
    last = read_messages(value, where, column)[-1]
    if last["role"] != "assistant":
        raise ValueError(
            f"{where}, column {column!r}: ends with a {last['role']!r} turn. An answer is the assistant's."
        )
    return last.get("content") or ""


def answer_beside(row: dict[str, Any], prompt: Text, where: str) -> str:
    """The reference answer of a file of its own. Where it names the prompt as well, that must be the same one."""
    if row.get("prompt") is not None and read_prompt(row["prompt"], where) != prompt:
        raise ValueError(
            f"{where} answers another prompt than the row beside it: bring both files into the same order."
        )
    return answer_of(row, "answer", where)


def sample(args: Arguments, prompts: Sequence[Text], where: Sequence[str]) -> tuple[list[str], int]:
    """(an answer to each prompt, parameters of the model that wrote them)"""
    assert args.model_name_or_path is not None
    tokenizer = load_tokenizer(args.model_name_or_path)
    model: Any = load_model(args.model_name_or_path, model_init_kwargs={"dtype": args.dtype})
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenize_prompts(prompts, tokenizer, where)
    check_window(model, ids, args.max_new_tokens, where)
    ask = TransformersGenerator(
        tokenizer,
        pad_token_id=check_tokenizer(tokenizer),
        end_ids=end_tokens(tokenizer, model, None),
        batch_size=args.batch_size,
    )
    decoding = Decoding(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    answers = [answer.text for (answer,) in ask(model, ids, 1, decoding=decoding, seed=args.seed)]
    return answers, sum(parameter.numel() for parameter in model.parameters())


def check_window(model: Any, ids: Sequence[list[int]], new: int, where: Sequence[str]) -> None:
    """Refuse what the model was not made for, rather than judge what comes out of it."""
    window = window_of(model)
    for row, at in zip(ids, where, strict=True):
        if window is not None and len(row) + new > window:
            raise ValueError(
                f"{at}: its prompt of {len(row)} tokens and --max_new_tokens {new} exceed the model's window of {window} tokens. "
                "Lower --max_new_tokens, or leave the row out."
            )


if __name__ == "__main__":
    main()
