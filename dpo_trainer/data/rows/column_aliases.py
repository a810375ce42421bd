"""What other files call our columns, and the refusal of rows whose prompt stands in a column that is not read."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import clean
from .column_kinds import fits

QUESTIONS = (
    *(
        "question",
        "questions",
        "instruction",
        "instructions",
        "query",
        "user",
        "userinput",
        "userprompt",
        "usermessage",
    ),
    *(
        "userquery",
        "request",
        "task",
        "problem",
        "human",
        "prompts",
        "prompttext",
        "questiontext",
        "inputtext",
        "input",
    ),
    *("inputs", "post", "promptmessages", "inputmessages", "conversation", "dialogue", "dialog", "turns", "chat"),
    "text",
)
"""What may be a prompt by itself; the first of them that a file has is taken for it."""

CONTEXTS = (
    *(
        "context",
        "contexts",
        "history",
        "passage",
        "document",
        "documents",
        "article",
        "background",
        "input",
        "inputs",
    ),
    *("systemprompt", "systemmessage", "sysprompt", "chathistory", "conversationhistory"),
)
"""What belongs in front of a question."""

SYSTEM = ("systemprompt", "systemmessage", "sysprompt")

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": QUESTIONS,
    "chosen": (
        *(
            "chosenresponse",
            "responsechosen",
            "chosenanswer",
            "answerchosen",
            "chosentext",
            "chosenmessages",
            "accepted",
        ),
        *(
            "acceptedanswer",
            "acceptedresponse",
            "preferred",
            "preferredresponse",
            "preferredanswer",
            "preferredoutput",
        ),
        *("best", "bestresponse", "bestanswer", "better", "betterresponse", "betteranswer", "positive", "winning"),
        *("winningresponse", "win", "good", "goodresponse", "chosencompletion", "chosenoutput", "responsej", "yw"),
    ),
    "rejected": (
        *(
            "rejectedresponse",
            "responserejected",
            "rejectedanswer",
            "answerrejected",
            "rejectedtext",
            "rejectedmessages",
        ),
        *(
            "dispreferred",
            "dispreferredresponse",
            "nonpreferred",
            "unpreferred",
            "rejectedoutput",
            "rejectedcompletion",
        ),
        *("worst", "worstresponse", "worstanswer", "worse", "worseresponse", "worseanswer", "negative", "losing"),
        *("losingresponse", "lose", "bad", "badresponse", "responsek", "yl"),
    ),
    "completions": ("responses", "answers", "generations", "candidates", "outputs"),
    "scores": ("ratings", "rewards", "score", "rating"),
}
"""{our column: what others call it, without case and signs}"""

PAIRED = (("a", "b"), ("0", "1"), ("1", "2"), ("j", "k"), ("left", "right"))
"""What tells two answers apart whose names are otherwise one."""

ANSWERS = re.compile("response|answer|conversation|completion|output|reply|summary|ref|generation|message|text")
VERDICTS = re.compile("winner|label|pref|better|choice|chosen|verdict|rank|which")
GRADES = re.compile("score|rating|reward|grade")


def plain(name: str) -> str:
    """Without case and signs: `User Input` and `user_input` are one name."""
    return re.sub(r"[\W_]+", "", name.lower())


def prompt_like(name: str) -> bool:
    """Whether a column of this name may hold the prompt, or a part of it."""
    return plain(name) in (*QUESTIONS, *CONTEXTS)


def context_like(name: str) -> bool:
    """Whether a column of this name may belong in front of a prompt."""
    return plain(name) in CONTEXTS


def other_name(ours: str, columns: Sequence[str], *, cutoff: float) -> str | None:
    """The column that may be meant by `ours`: by a name that others use, or spelt alike."""
    by_plain = {plain(column): column for column in reversed(columns)}
    for alias in (plain(ours), *ALIASES.get(ours, ())):
        if alias in by_plain:
            return by_plain[alias]
    by_lower = {column.lower(): column for column in columns}
    close = difflib.get_close_matches(ours, by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def columns_option(names: Mapping[str, str]) -> str:
    """What stands after --columns for {ours: theirs}, or {name: ""} to leave a column out."""
    simple = all(name == name.strip() and not set(name) & set(",=\"'{} ") for name in (*names, *names.values()))
    if simple:
        return ",".join(f"{ours}={theirs}" for ours, theirs in names.items())
    return "'" + json.dumps(dict(names), ensure_ascii=False).replace("'", "'\\''") + "'"


def two_answers(columns: Sequence[str], unread: Mapping[str, str]) -> str:
    """How to make `chosen` and `rejected` of two answers of which another column says the better; "" where there are none."""
    answers = [
        name for name, kind in unread.items() if kind in ("text", "messages", "unknown") and ANSWERS.search(name)
    ]
    pair = _paired(answers)
    if pair is None:
        return ""
    first, second = map(clean, pair)
    grades = _paired([name for name in columns if GRADES.search(name.lower())])
    verdict = next((name for name in columns if VERDICTS.search(name.lower()) and name not in pair), None)
    if grades:
        better = f"row[{clean(grades[0])!r}] > row[{clean(grades[1])!r}]"
    else:
        better = f"row[{clean(verdict)!r}] == ..." if verdict else "..."
    may_ask = [name for name, kind in unread.items() if fits(kind, "prompt") and name not in pair]
    prompt = "prompt" if "prompt" in columns else other_name("prompt", may_ask, cutoff=0.82)
    prompt = prompt or next(filter(context_like, may_ask), None)
    also = f'"prompt": row[{clean(prompt)!r}], ' if prompt not in (None, "prompt") else ""
    note = "" if grades else f" Put in for ... what says that {first!r} is the better one."
    return (
        f"It has two answers, {first!r} and {second!r}, and one of them must be chosen: dataset.map(lambda row: {{{also}"
        f'**dict(zip(("chosen", "rejected"), (row[{first!r}], row[{second!r}]) if {better} else (row[{second!r}], '
        f"row[{first!r}])))}}), with ties left out by dataset.filter.{note}"
    )


def _paired(names: Sequence[str]) -> tuple[str, str] | None:
    """Two of them whose names differ in nothing but which one they are."""
    for name in names:
        words = re.split(r"([\W_]+|\d+)", name)
        for place, word in enumerate(words):
            for one, two in PAIRED:
                if word.lower() == one:
                    other = "".join([*words[:place], two.upper() if word.isupper() else two, *words[place + 1 :]])
                    if other in names and other != name:
                        return name, other
    return None


def refuse_lost_prompt(row: Mapping[str, Any], prompt: str | None, values: Mapping[str, Any], where: str) -> None:
    """Raise where a row has no prompt, or an empty one, and a column that is not read says something that stands nowhere else.

    `prompt` is the name of its prompt's column, `values` are its prompt and its completions.
    """
    if prompt is not None and any(map(str.strip, strings(values[prompt]))):
        return
    read = "\n".join(text for value in values.values() for text in strings(value))
    lost = [
        name
        for name, value in row.items()
        if name not in values and prompt_like(name) and not all(text.strip() in read for text in strings(value))
    ]
    if lost:
        state = "has no prompt" if prompt is None else "has an empty prompt"
        names = " and ".join(repr(clean(name)) for name in lost)
        raise ValueError(f"{where} {state}, and {names}, which would not be read. {_way_out(row, lost)}")


def strings(value: Any) -> Iterator[str]:
    """The words of a value: of messages their contents, not their roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "from", "type"):
                yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def _way_out(row: Mapping[str, Any], lost: Sequence[str]) -> str:
    """The `--columns` that reads the columns; where there are several, the line that joins them first."""
    there = [
        name for name in row if prompt_like(name) and row[name] is not None
    ]  # an input may be empty here and not elsewhere
    system = next((name for name in lost if plain(name) in SYSTEM and "system" not in row), None)
    parts = [name for name in there if plain(name) not in SYSTEM]
    question = other_name("prompt", parts, cutoff=1.0) or (parts[0] if parts else None)
    names = {ours: theirs for ours, theirs in (("prompt", question), ("system", system)) if theirs is not None}
    leave = f"To train without it: --columns {columns_option({lost[0]: ''})}."
    if len(parts) < 2:
        return f"Read it: --columns {columns_option(names)}. {leave}"
    ordered = [name for name in parts if name != question]
    ordered = [question, *ordered] if plain(ordered[0]) in ("input", "inputs") else [*ordered, question]  # type: ignore[list-item]
    if not all(isinstance(row[name], str) for name in ordered):
        return (
            f"Make one prompt of {', '.join(repr(clean(n)) for n in ordered)}, which are not all text: dataset.map(lambda row: "
            f'{{"prompt": [{{"role": "user", "content": ...}}, ...]}}), or read one of them: --columns {columns_option(names)}. {leave}'
        )
    joined = ", ".join(f"row[{clean(name)!r}]" for name in ordered)
    mapped = {name: theirs for name, theirs in names.items() if name != "prompt"}
    then = f" and --columns {columns_option(mapped)}" if mapped else ""
    others = ", ".join(repr(clean(name)) for name in ordered if name != question)
    return (
        f'Join them first: dataset = dataset.map(lambda row: {{"prompt": "\\n\\n".join(filter(None, [{joined}]))}}){then}. '
        f"Where {others} can be left out: --columns {columns_option(names)}."
    )
