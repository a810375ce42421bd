"""Random rows of every accepted form, each with what the model must read, worked out turn by turn beside the pipeline.

The tokenizer is tiny_tokenizers.byte_bpe: no merge crosses a special token, nor "<" or ">". So the ids of a conversation are
those of its turns, one after another; and the text of a control token inside a turn changes nothing around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypothesis import assume
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, byte_bpe

from dpo_trainer.data.rows.implicit import split_texts

PLAIN = byte_bpe()
BOS, EOS, ASSISTANT = (SPECIAL.index(token) for token in ("<bos>", "<eos>", "<|assistant|>"))

Turn = tuple[str, str]  # role, content

pieces = st.sampled_from(
    [*"abch: i\n", "ab", "abc", ": a", "é", "\U0001f600", "x", "don't", "<e", "os>", *SPECIAL[1:4], "<think>"]
)
texts = st.lists(pieces, max_size=5).map("".join)
said_texts = st.one_of(texts, st.sampled_from(["a", "c"]), texts.map("xhi".__add__))
"""Of completions: some are equal, some become so when they are cut."""
JOINTS = [("xab", "c", "i"), ("a", "b", "c"), ("q:", " a", "x"), ("h", "a", "i")]
"""A prompt's end, and two completions of which one makes a token with it: abc, ab, ": a", hi."""
scores = st.integers(0, 3)


@dataclass(frozen=True)
class Told:
    """What a row says: the prompt's ids alone, each completion's ids after the prompt's beginning, in the row's order."""

    prompt: list[int]
    wholes: list[list[int]]
    texts: list[str]
    blank: list[bool]
    control: bool  # a string has the text of a control token
    scored: list[list[bool] | None]  # of each whole; None: all that is not the prompt's
    pairs: list[tuple[int, int, float | None]]  # best first, ties left out


class Example(NamedTuple):
    row: dict[str, Any]
    told: Told


def said(text: str) -> list[int]:
    """Ids of a text in which nothing is special."""
    return PLAIN(text, split_special_tokens=True)["input_ids"]


def has_control(text: str) -> bool:
    return any(token in text for token in SPECIAL)


# --- plain text ---


def tell_text(prompt: str, completions: Sequence[str], pairs: list, *, bos: bool) -> Told:
    first = [BOS] * bos
    return Told(
        prompt=first + said(prompt),
        wholes=[[*first, *said(prompt + completion), EOS] for completion in completions],
        texts=["<bos>" * bos + prompt + completion + "<eos>" for completion in completions],
        blank=[not completion.strip() for completion in completions],
        control=any(has_control(prompt + completion) for completion in completions),  # as one text: "<e" + "os>"
        scored=[None] * len(completions),
        pairs=pairs,
    )


TEXT_FORMS = ("text", "joint", "rejected list", "ranked", "transcript", "implicit")


@st.composite
def text_rows(draw: Callable, *, bos: bool = False, form: str | None = None) -> Example:
    form = form or draw(st.sampled_from(TEXT_FORMS))
    prompt = draw(texts)
    if form == "joint":
        prompt, chosen, rejected = draw(st.sampled_from(JOINTS))
        row, completions = {"prompt": prompt, "chosen": chosen, "rejected": rejected}, [chosen, rejected]
    elif form == "transcript":
        prompt = f"\n\nHuman: {prompt.strip()}\n\nAssistant:"
        # Both begin with another character, so that what they share ends with the marker.
        chosen, rejected = draw(said_texts), draw(said_texts)
        assume(chosen[:1] != rejected[:1] and "\n\nAssistant:" not in chosen + rejected)
        row, completions = {"chosen": prompt + chosen, "rejected": prompt + rejected}, [chosen, rejected]
    elif form == "implicit":
        row = {name: prompt + draw(said_texts) for name in ("chosen", "rejected")}
        prompt, *completions = split_texts(**row)  # test_schema.py has its own tests of where it splits
        assume(
            all(
                has_control(text) == (has_control(prompt) or has_control(text[len(prompt) :])) for text in row.values()
            )
        )
    else:
        row, completions = draw(completions_of(said_texts, form))
        row["prompt"] = prompt
    return Example(row, tell_text(prompt, completions, pairs_of(row, len(completions)), bos=bos))


@st.composite
def completions_of(draw: Callable, one: st.SearchStrategy, form: str) -> tuple[dict[str, Any], list]:
    """The columns of the completions, and the completions in their order there. A newline is blank, and merges with nothing."""
    several = st.lists(one, min_size=2, max_size=4)
    if form == "ranked":
        completions = draw(several)
        numbers = draw(st.lists(scores, min_size=len(completions), max_size=len(completions)))
        return {"completions": completions, "scores": [float(number) for number in numbers]}, completions
    if form == "rejected list":
        chosen, *rejected = completions = draw(several)
        margin = draw(st.sampled_from([None, [float(n) for n in range(len(rejected))]]))
        return {"chosen": chosen, "rejected": rejected, "margin": margin}, completions
    chosen, rejected = completions = draw(st.lists(one, min_size=2, max_size=2))
    return {"chosen": chosen, "rejected": rejected}, completions


def pairs_of(row: dict[str, Any], count: int) -> list[tuple[int, int, float | None]]:
    """(better, worse, margin) by their places in the row, in the order in which the pipeline lists them."""
    if "scores" in row:
        s = row["scores"]
        order = sorted(range(count), key=lambda number: (-s[number], number))
        return [(i, j, s[i] - s[j]) for at, i in enumerate(order) for j in order[at + 1 :] if s[i] > s[j]]
    margins = row.get("margin")
    margins = margins if isinstance(margins, list) else [margins] * (count - 1)
    return [(0, number, margin) for number, margin in zip(range(1, count), margins, strict=True)]


# --- conversations ---


def header(role: str) -> list[int]:
    token = f"<|{role}|>"
    return [SPECIAL.index(token)] if token in SPECIAL else said(token)


def turn_ids(turn: Turn) -> list[int]:
    role, content = turn
    return [*header(role), *said(content), EOS]


def tell_talk(prompt: list[Turn], completions: list[list[Turn]], pairs: list) -> Told:
    """CHAT by hand. Of a completion of several turns, the assistant's contents and their EOS are scored, headers are not."""
    continued = prompt[-1][0] == "assistant"
    before = [token for turn in (prompt[:-1] if continued else prompt) for token in turn_ids(turn)]
    start = prompt[-1][1] if continued else ""
    own = [[("assistant", start + first[1]), *rest] for first, *rest in completions]
    wholes, masks = [], []
    for turns in own:
        mask = [False] * len(before)
        for role, content in turns:
            mask += [False] * len(header(role)) + [role == "assistant"] * (len(said(content)) + 1)
        for at in range(len(before) + 1 + len(said(start))):
            mask[at] = False
        wholes.append(before + [token for turn in turns for token in turn_ids(turn)])
        masks.append(mask if len(turns) > 1 else None)
    shown = [[*(prompt[:-1] if continued else prompt), *turns] for turns in own]
    contents = [content for turns in [prompt, *completions] for _, content in turns]
    return Told(
        prompt=[*before, ASSISTANT, *said(start)],
        wholes=wholes,
        texts=["".join(f"<|{role}|>{content}<eos>" for role, content in turns) for turns in shown],
        blank=[not any(content.strip() for role, content in c if role == "assistant") for c in completions],
        control=any(map(has_control, contents)),
        scored=masks,
        pairs=pairs,
    )


SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
SPELLINGS: dict[str, Callable[[Turn], dict[str, Any]]] = {
    "messages": lambda turn: {"role": turn[0], "content": turn[1]},
    "sharegpt": lambda turn: {"from": SHAREGPT[turn[0]], "value": turn[1]},
    "parts": lambda turn: {
        "role": turn[0],
        "content": [{"type": "text", "text": part} for part in (turn[1][:2], turn[1][2:])],
    },
}

others = st.lists(st.tuples(st.sampled_from(["user", "tool"]), texts), min_size=1, max_size=2)
single = said_texts.map(lambda content: [("assistant", content)])
several_turns = st.tuples(single, others, single).map(lambda parts: [turn for part in parts for turn in part])


@st.composite
def prompts(draw: Callable) -> list[Turn]:
    system = [("system", draw(texts))] if draw(st.booleans()) else []
    earlier = draw(st.sampled_from([[], ["user", "assistant"], ["user", "assistant", "tool", "assistant"]]))
    return [
        *system,
        *((role, draw(texts)) for role in earlier),
        (draw(st.sampled_from(["user", "user", "tool"])), draw(texts)),
    ]


SHORT_FORMS = ("implicit", "strings", "string prompt", "one message", "joint")
"""Those whose completions are one turn each."""
CHAT_FORMS = ("pair", "rejected list", "ranked", "system", "continued", *SHORT_FORMS)


@st.composite
def chat_rows(draw: Callable, *, form: str | None = None, spelling: str | None = None) -> Example:
    form = form or draw(st.sampled_from(CHAT_FORMS))
    spelling = spelling or draw(st.sampled_from([*SPELLINGS]))
    spell = SPELLINGS[spelling]
    prompt = draw(prompts())
    many = form not in SHORT_FORMS and draw(st.booleans())
    row, completions = draw(completions_of(several_turns if many else single, form))
    if form == "continued":
        # The full stop: no token of an answer takes a part of what the prompt has said.
        prompt = [*prompt, ("assistant", draw(texts) + ".")]
    if form == "joint":
        start, *contents = draw(st.sampled_from(JOINTS))
        prompt, completions = [*prompt, ("assistant", start)], [[("assistant", content)] for content in contents]
        row = dict(zip(("chosen", "rejected"), completions))
    if form == "string prompt":
        prompt = [("user", draw(texts))]
    told = tell_talk(prompt, completions, pairs_of(row, len(completions)))

    def spelt(value: Any) -> Any:
        """A completion, or a list of several."""
        if not isinstance(value[0], tuple):
            return [spelt(item) for item in value]
        if form == "strings":
            return value[0][1]
        return spell(value[0]) if form == "one message" else [spell(turn) for turn in value]

    row |= {name: spelt(row[name]) for name in ("chosen", "rejected", "completions") if name in row}
    if form == "implicit":
        start = [spell(turn) for turn in prompt]
        row |= {name: start + row[name] for name in ("chosen", "rejected")}
    elif form == "system":
        (_, system), *rest = prompt if prompt[0][0] == "system" else [("system", ""), *prompt]
        row |= {"system": system or None, "prompt": [spell(turn) for turn in rest]}
        told = tell_talk(rest if not system else prompt, completions, pairs_of(row, len(completions)))
    elif form == "string prompt":
        row["prompt"] = prompt[0][1]
    else:
        row["conversations" if spelling == "sharegpt" else "prompt"] = [spell(turn) for turn in prompt]
    return Example(row, told)


def tables() -> list[st.SearchStrategy[list[Example]]]:
    """For each form: rows of that form in one spelling. That is what an Arrow table can hold."""
    text = [st.lists(text_rows(form=form), min_size=1, max_size=6) for form in TEXT_FORMS]
    chat = [
        st.sampled_from([*SPELLINGS]).flatmap(
            lambda spelling, form=form: st.lists(chat_rows(form=form, spelling=spelling), min_size=1, max_size=6)
        )
        for form in CHAT_FORMS
    ]
    return text + chat
