"""Rows with images -> token ids: those that the processor itself gives, from every form of row and of image, in tables and streams.

The oracle is `processor(...)` and `processor.apply_chat_template(..., tokenize=True)`, which process the images; the pipeline
reads nothing of them but their sizes.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import zoo
from datasets import Dataset, Image, IterableDataset, List, concatenate_datasets, load_from_disk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ImageFile
from transformers import ProcessorMixin

from dpo_trainer.data import FEATURES, DataOptions, prepare_dataset, prepare_mixture
from dpo_trainer.data.images.image_columns import same_image_types
from dpo_trainer.data.images.source import ImageAccess, images_of
from dpo_trainer.data.images.text import ImageText
from dpo_trainer.data.mapping import PairMapper
from dpo_trainer.data.processor import text_tokenizer
from dpo_trainer.data.rows.schema import pair_from_row
from dpo_trainer.data.tokens.tokenize import tokenize_pairs
from dpo_trainer.types import Flag

Ids = list[int]
ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"disable_tqdm": True}
PICTURES = [zoo.noise(0, 40, 60), zoo.noise(1, 32, 32), zoo.noise(2, 20, 90), zoo.noise(3, 90, 20)]


@cache
def processor(family: str) -> Any:
    return zoo.ZOO[family]()[1]


@pytest.fixture(params=list(zoo.ZOO))
def family(request) -> str:
    return request.param


def prepare(rows: Any, family: str, **options: Any) -> Any:
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_dataset(rows, processor(family), DataOptions(**OPTIONS, **options))[0]


def ids_of(prepared: Any) -> list[tuple[Ids, list[Ids]]]:
    """Of each row: the prompt, and its completions."""
    return [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"], *row["more_ids"]]) for row in prepared]


def pixels(row: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(ImageAccess().open(image, "")) for image in images_of(row, "")]


def text_of(ids: Ids, family: str) -> str:
    return processor(family).tokenizer.decode(ids)


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """A message; None among the parts is an image."""
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def said(text: str) -> list[dict[str, Any]]:
    return [turn("assistant", text)]


# --- the oracle ---


def shown(messages: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """The same messages with the images in their parts. (Neighbouring texts as one: transformers marks each by itself.)"""
    left, out = iter(images), []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image":
                parts.append({**part, "image": next(left)})
            elif parts and parts[-1]["type"] == "text":
                parts[-1] = {**part, "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
        out.append({**message, "content": parts})
    return out


PROCESSOR_KNOWS = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
"""What is right where a conversation holds the text of control tokens: since transformers 5.23."""


def read(family: str, prompt: Any, answer: Any, images: list[Any], **how: Any) -> tuple[Ids, Ids]:
    """Prompt and completion as the processor tokenizes them, images and all."""
    own = processor(family)
    if isinstance(prompt, str):
        start, whole = (
            [*own(images=[images] if images else None, text=[text])["input_ids"][0]]
            for text in (prompt, prompt + answer)
        )
    else:
        how = {"tokenize": True, "return_dict": True, **how}
        start = [*own.apply_chat_template(shown(prompt, images), add_generation_prompt=True, **how)["input_ids"][0]]
        whole = [*own.apply_chat_template(shown([*prompt, *answer], images), **how)["input_ids"][0]]
    if family == "paligemma" and images:  # ends all that it is given with a newline: prompts, says its suffix=...
        newline = start[-1]
        assert own.tokenizer.decode([newline]) == "\n" == own.tokenizer.decode([whole.pop()])
        whole.insert(len(start) - 1, newline)
    assert whole[: len(start)] == start
    return start, whole[len(start) :] + [own.tokenizer.eos_token_id] * isinstance(prompt, str)


def texts_of(family: str) -> list[tuple[str, list[Any]]]:
    place = processor(family).image_token
    return [
        (f"{place}what?", PICTURES[:1]),
        (f"one {place} two {place}{place}\nthree", PICTURES[1:]),
        ("nothing to be seen", []),
        (f"a{place}", PICTURES[3:]),
    ]


TALKS = [
    ([turn("system", "look"), turn("user", None, "what?")], PICTURES[:1]),
    ([turn("user", "one ", None, " two", None), turn("assistant", "fine"), turn("user", None, "or?")], PICTURES[1:]),
    ([turn("user", "nothing to be seen")], []),
    ([turn("user", "a", None)], PICTURES[3:]),
]


@pytest.mark.parametrize("form", ["text", "conversation"])
def test_ids_are_those_of_the_processor(family, form):
    """One, several and no images, of several shapes, at the beginning, in the midst and at the end."""
    given_rows: list[tuple[Any, list[Any]]] = texts_of(family) if form == "text" else TALKS
    answers: list[Any] = [" yes", " no"] if form == "text" else [said("yes"), said("no")]
    chosen, rejected = answers
    if family == "paligemma":  # its processor refuses texts without images
        given_rows = [row for row in given_rows if row[1]]
    rows = [{"prompt": p, "chosen": chosen, "rejected": rejected, "images": images} for p, images in given_rows]
    want = []
    for prompt, images in given_rows:
        both = [read(family, prompt, answer, images) for answer in answers]
        assert both[0][0] == both[1][0]
        want.append((both[0][0], [completion for _, completion in both]))
    assert ids_of(prepare(rows, family)) == want
    number = max(processor(family).image_token_ids)
    counts = [prompt.count(number) for prompt, _ in want]
    assert counts[1] >= 3 * zoo.TOKENS
    assert counts.count(0) == (family != "paligemma")


def test_ids_of_implicit_prompts_are_those_of_the_processor(family):
    place = processor(family).image_token
    texts = [{name: f"{place}what? {said}" for name, said in (("chosen", "yes"), ("rejected", "no"))}]
    talks = [{name: [*TALKS[1][0], *said(text)] for name, text in (("chosen", "yes"), ("rejected", "no"))}]
    for rows, prompt, answers, images in (
        (texts, f"{place}what?", [" yes", " no"], PICTURES[:1]),
        (talks, TALKS[1][0], [said("yes"), said("no")], PICTURES[1:]),
    ):
        ((got, completions),) = ids_of(prepare([{**row, "images": images} for row in rows], family))
        assert [(got, completion) for completion in completions] == [read(family, prompt, a, images) for a in answers]


BOS = {
    "llava": ("first", "first"),
    "llava_next": ("first", "first"),
    "idefics3": ("first", "first"),
    "smolvlm": (None, "first"),
    "gemma3": ("first", "first"),
    "paligemma": ("after the image", "after the image"),
}
"""Where a BOS stands, in plain text and in conversations: once, whoever writes it. The other families have none."""


def test_there_is_one_bos(family):
    place = processor(family).image_token
    rows = [
        {"prompt": f"{place}what?", "chosen": "yes", "rejected": "no", "image": PICTURES[1]},
        {"prompt": [turn("user", None, "what?")], "chosen": said("yes"), "rejected": said("no"), "image": PICTURES[1]},
    ]
    bos = processor(family).tokenizer.bos_token_id
    for row, where in zip(rows, BOS.get(family, (None, None)), strict=True):
        ((prompt, completions),) = ids_of(prepare([row], family))
        last_image = max(at for at, number in enumerate(prompt) if number in processor(family).image_token_ids)
        want = {None: [], "first": [0], "after the image": [last_image + 1]}[where]
        assert [at for at, number in enumerate(prompt) if number == bos] == want
        assert not any(bos in completion for completion in completions) or bos is None


# --- random rows ---

CONTROL = {"qwen2_vl": ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"], "idefics3": []}
"""Control tokens in the words of conversations. (The processor of Idefics3 cannot keep them as text itself.)"""
lengths = st.integers(8, 100)
pictures = st.builds(zoo.noise, st.integers(0, 3), lengths, lengths)


def words(*more: str) -> st.SearchStrategy[str]:
    pieces = ["a", "what?", " ", "\n", "é", "\U0001f600", "{{ x }}", "<|im", "_end|>", *more]
    return st.lists(st.sampled_from(pieces), min_size=1, max_size=4).map("".join)


@st.composite
def talks(draw: Any, control: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Any]]:
    """Up to three images among words, in one turn or in two with an answer between them."""
    own = words(*control)
    images = draw(st.lists(pictures, max_size=3))
    parts = draw(st.permutations([None] * len(images) + [draw(own) for _ in range(3)]))
    cut = draw(st.integers(0, len(parts) - 1))
    earlier = [turn("user", *parts[:cut]), turn("assistant", draw(own))] if cut else []
    return [*earlier, turn("user", *parts[cut:])], said("x" + draw(own)), images


@st.composite
def plain_texts(draw: Any, place: str) -> tuple[str, str, list[Any]]:
    images = draw(st.lists(pictures, max_size=3))
    prompt, answer = place.join(draw(words()) for _ in range(len(images) + 1)), "x" + draw(words())
    assume("<|im_end|>" not in prompt + answer)  # refused beside images
    return prompt, answer, images


@pytest.mark.parametrize("family", list(CONTROL), indirect=True)
def test_ids_of_random_rows_are_those_of_the_processor(family):
    """In conversations the text of control tokens is text, beside images too."""
    own, text = processor(family), ImageText(processor(family), ImageAccess())
    seen: Counter = Counter()

    @settings(max_examples=60)
    @given(st.lists(st.one_of(talks(CONTROL[family]), plain_texts(own.image_token)), min_size=1, max_size=3))
    def check(rows):
        pairs = [
            pair_from_row(
                {"prompt": p, "chosen": a, "rejected": "z" if isinstance(a, str) else said("z"), "images": i}, ""
            )
            for p, a, i in rows
        ]
        got = tokenize_pairs(pairs, text_tokenizer(own), ["Row"] * len(rows), images=text)
        for (prompt, answer, images), ids in zip(rows, got, strict=True):
            control = bool(ids.flags & Flag.CONTROL_TEXT)
            how = {"sanitize_control_tokens": True} if control else {}
            if not control or PROCESSOR_KNOWS:
                assert (ids.prompt, ids.chosen) == read(family, prompt, answer, images, **how)
            seen["control"] += control and bool(images)
            seen["text"] += isinstance(prompt, str)
            seen["several"] += len({image.size for image in images}) > 1
            seen["none"] += not images

    check()
    assert min(seen[kind] for kind in ["text", "several", "none", *["control"] * bool(CONTROL[family])]) >= 3, seen


# --- what rows may look like ---

ONE = {"chosen": said("yes"), "rejected": said("no")}
PICTURE = PICTURES[0]


def encoded(image: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def file_of(folder: Path, image: Any = PICTURE) -> str:
    path = folder / "x.png"
    path.write_bytes(encoded(image))
    return str(path)


@pytest.mark.parametrize("column", ["image", "images"])
def test_all_kinds_of_image_columns_give_the_same_rows(column, tmp_path):
    """Also in the column `images` one image need not be in a list."""
    path, data = file_of(tmp_path), encoded(PICTURE)
    kinds = {
        "PIL": PICTURE,
        "bytes": data,
        "path": path,
        "struct": {"bytes": data, "path": None},
        "struct of a path": {"bytes": None, "path": path},
    }
    if column == "images":
        kinds |= {f"list of {kind}": [value] for kind, value in kinds.items()}
    talk = {"prompt": [turn("user", None, "what?")], **ONE}
    start, _ = read("qwen2_vl", talk["prompt"], ONE["chosen"], [PICTURE])
    for kind, value in kinds.items():
        prepared = prepare([talk | {column: value}] * 2, "qwen2_vl")
        assert [row["prompt_ids"] for row in prepared] == [start] * 2, kind
        for row in prepared:
            (got,) = pixels(row)
            np.testing.assert_array_equal(got, np.asarray(PICTURE))
        assert prepared.column_names == [*FEATURES, column]


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_declared_images_are_the_same_decoded_or_not(several, decode, tmp_path):
    column, feature = ("images", List(Image(decode=decode))) if several else ("image", Image(decode=decode))
    path = file_of(tmp_path)
    rows = Dataset.from_list([{"prompt": [turn("user", None)], **ONE, column: [path] if several else path}])
    rows = rows.cast_column(column, feature)
    (row,) = prepare(rows, "qwen2_vl")
    assert row["prompt_ids"] == read("qwen2_vl", [turn("user", None)], said("yes"), [PICTURE])[0]
    np.testing.assert_array_equal(pixels(row)[0], np.asarray(PICTURE))


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_images_find_their_places(family):
    """At image parts, at the placeholder or `<image>` in strings, in ShareGPT too; else in front of the user's first turn."""
    place = processor(family).image_token
    two = PICTURES[1:3]
    same_places = [
        [turn("user", None, "what", None, "?")],
        user(f"{place}what{place}?"),
        user("<image>what<image>?"),
        [{"from": "human", "value": "<image>what<image>?"}],
    ]
    in_front = [[turn("user", None, None, "what?")], user("what?"), [{"from": "human", "value": "what?"}]]
    for prompts in (same_places, in_front):
        want, _ = read(family, prompts[0], said("yes"), two)
        for prompt in prompts:
            gpt = {name: {"from": "gpt", "value": text} for name, text in (("chosen", "yes"), ("rejected", "no"))}
            answers: dict[str, Any] = gpt if "from" in prompt[0] else ONE
            ((got, _),) = ids_of(prepare([{"prompt": prompt, **answers, "images": two}], family))
            assert got == want, prompt


def test_images_without_a_place_stand_in_the_first_turn_of_the_user():
    """Behind the system's turn, and not in a later one."""
    talk = [("system", "look"), ("user", "what?"), ("assistant", "this"), ("user", "sure?")]
    strings = [{"role": role, "content": text} for role, text in talk]
    parts = [turn(role, *[None] * (number == 1), text) for number, (role, text) in enumerate(talk)]
    (row,) = prepare([{"prompt": strings, **ONE, "image": PICTURE}], "qwen2_vl")
    assert row["prompt_ids"] == read("qwen2_vl", parts, said("yes"), [PICTURE])[0]
    (row,) = prepare([{"system": "look", "prompt": strings[1:], **ONE, "image": PICTURE}], "qwen2_vl")
    assert row["prompt_ids"] == read("qwen2_vl", parts, said("yes"), [PICTURE])[0]
    # Not what stands in the words of an image that is there by a part already.
    literal = [turn("user", None, "is <image> a tag?")]
    (row,) = prepare([{"prompt": literal, **ONE, "image": PICTURE}], "qwen2_vl")
    assert row["prompt_ids"] == read("qwen2_vl", literal, said("yes"), [PICTURE])[0]
    assert "<image> a tag?" in text_of(row["prompt_ids"], "qwen2_vl")


def test_a_string_prompt_beside_messages_is_a_turn_of_the_user():
    (row,) = prepare([{"prompt": "what?", **ONE, "image": PICTURE}], "idefics3")
    assert row["prompt_ids"] == read("idefics3", [turn("user", None, "what?")], said("yes"), [PICTURE])[0]


def test_a_prompt_that_ends_in_an_answer_is_continued():
    started = [*TALKS[0][0], turn("assistant", "It is ")]
    (row,) = prepare([{"prompt": started, **ONE, "image": PICTURE}], "qwen2_vl")
    whole, answer = read("qwen2_vl", TALKS[0][0], said("It is yes"), [PICTURE])
    assert row["prompt_ids"] + row["chosen_ids"] == whole + answer
    assert text_of(row["chosen_ids"], "qwen2_vl") == "yes<|im_end|>\n"


def test_tools_and_template_options_reach_the_template(monkeypatch):
    own = copy.copy(processor("qwen2_vl"))
    own.chat_template = "{{ tools | tojson if tools else '' }}{{ mood }}" + own.chat_template
    monkeypatch.setitem(zoo.ZOO, "with tools", lambda: (None, own))
    prompt, images = TALKS[0]
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]
    row = {"prompt": prompt, **ONE, "images": images, "tools": json.dumps(tools)}
    (row,) = prepare([row | {"chat_template_kwargs": '{"mood": "calm"}'}], "with tools")
    assert row["prompt_ids"] == read("with tools", prompt, said("yes"), images, tools=tools, mood="calm")[0]
    assert "zoom" in (text := text_of(row["prompt_ids"], "with tools"))
    assert "calm<|im_start|>" in text


@pytest.mark.parametrize("family", ["idefics3", "paligemma", "qwen2_vl"], indirect=True)
def test_ranked_rows_and_lists_of_rejected_share_one_prompt(family):
    prompt, images = TALKS[1]
    answers = [said(text) for text in ("yes", "no", "well")]
    forms = {
        "ranked": ({"completions": answers, "scores": [1.0, 3.0, 2.0]}, [1, 2, 0], [[0, 1], [0, 2], [1, 2]]),
        "list of rejected": ({"chosen": answers[0], "rejected": answers[1:]}, [0, 1, 2], [[0, 1], [0, 2]]),
    }
    for columns, order, pairs in forms.values():
        (row,) = prepare([{"prompt": prompt, **columns, "images": images}], family)
        ((start, completions),) = ids_of([row])
        want = [read(family, prompt, answers[number], images) for number in order]
        assert [(start, completion) for completion in completions] == want
        assert row["pairs"] == pairs


MARKED = (
    "{% for message in messages %}{{ message.role }}:{% if message.role == 'assistant' %}{% generation %}"
    + zoo.content("<image>")
    + "</s>{% endgeneration %}{% else %}"
    + zoo.content("<image>")
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("template", [zoo.LLAVA_CHAT, MARKED], ids=["", "marked"])
def test_of_answers_in_several_turns_the_assistants_words_are_scored(template, monkeypatch):
    """Behind a BOS that the template did not write, and images that are longer than their places."""
    own = copy.copy(processor("llava"))
    own.chat_template = template
    monkeypatch.setitem(zoo.ZOO, f"llava {len(template)}", lambda: (None, own))
    answers = [[*said(text), turn("user", "sure?"), *said("so")] for text in ("yes", "no")]
    prompt, images = TALKS[1]
    (row,) = prepare(
        [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "images": images}], f"llava {len(template)}"
    )
    want = [read(f"llava {len(template)}", prompt, answer, images) for answer in answers]
    assert [(row["prompt_ids"], row[f"{name}_ids"]) for name in ("chosen", "rejected")] == want
    for number, words in enumerate(("yes", "no")):
        hidden = {at for n, start, end in row["unscored"] if n == number for at in range(start, end)}
        scored = [token for at, token in enumerate(want[number][1]) if at not in hidden]
        assert text_of(scored, "llava").replace(" ", "") == f"{words}</s>so</s>"


# --- control tokens in the words of a row ---


def test_control_tokens_in_conversations_stay_text_beside_images(family):
    """As other words of as many letters do, of which there is a token each: nothing else of the row changes."""
    tokenizer = processor(family).tokenizer
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    word = max((token for token in special if token != processor(family).image_token), key=len)
    filler = "#" * len(word)

    def row(word: str) -> dict[str, Any]:
        return {
            "prompt": [turn("user", None, f"a {word} b", None), turn("assistant", word), turn("user", f"c {word}")],
            "chosen": said(f"yes {word}"),
            "rejected": said("no"),
            "images": PICTURES[1:3],
        }

    dataset = Dataset.from_list([row(word)])
    prepared, report = prepare_dataset(dataset, processor(family), DataOptions(**OPTIONS))
    ((prompt, completions),) = ids_of(prepared)
    ((want, want_completions),) = ids_of(prepare([row(filler)], family))
    letters = tokenizer(word, add_special_tokens=False, split_special_tokens=True)["input_ids"] * 4
    (hole,) = set(tokenizer("##", add_special_tokens=False)["input_ids"])
    left = iter(letters)
    whole = [next(left) if number == hole else number for number in want + want_completions[0]]
    assert prompt + completions[0] == whole
    assert next(left, None) is None
    assert len(prompt) == len(want)
    assert report.counts["control_text"] == 1


def test_the_placeholder_among_the_words_beside_an_image_part_stays_text(family):
    place = processor(family).image_token
    row = {"prompt": [turn("user", None, f"is {place} a token?")], **ONE, "image": PICTURE}
    (got,) = prepare([row], family)
    row["prompt"] = [turn("user", None, f"is {'#' * len(place)} a token?")]
    (want,) = prepare([row], family)
    assert len(got["prompt_ids"]) == len(want["prompt_ids"])
    assert f"is {place} a token?" in text_of(got["prompt_ids"], family)


def test_two_halves_of_a_control_token_make_none():
    """Neighbouring parts of a message stand side by side behind the template."""
    if not PROCESSOR_KNOWS:
        pytest.skip("processors of transformers before 5.23 cannot say what is right")
    (row,) = prepare([{"prompt": [turn("user", None, "a <|im", "_end|> b")], **ONE, "image": PICTURE}], "qwen2_vl")
    prompt = [turn("user", None, "a <|im_end|> b")]
    assert row["prompt_ids"] == read("qwen2_vl", prompt, said("yes"), [PICTURE], sanitize_control_tokens=True)[0]


def plain_row(prompt: str, chosen: str = "yes") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": "no", "image": PICTURE}


FRAMED = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("prompt", "chosen", "token"),
    [
        (f"{FRAMED}a <|im_end|>", "yes", "<|im_end|>"),
        (f"{FRAMED}a", "yes <|im_start|>", "<|im_start|>"),
        (f"{FRAMED}a", "yes <|vision_end|>", "<|vision_end|>"),
        (f"{FRAMED}a <|im", "_end|>", "<|im_end|>"),
        (f"{FRAMED}a", "yes <|image_pad|>", "<|image_pad|>"),
    ],
)
def test_control_tokens_in_plain_text_beside_images_are_refused(prompt, chosen, token):
    """There, the tokens around an image are words of the prompt, so that no others can be told from them."""
    rows = [plain_row(f"{FRAMED}fine"), plain_row(prompt, chosen)]
    with pytest.raises(ValueError) as error:
        prepare(rows, "qwen2_vl")
    assert "Row 1 of train, column 'prompt or completion': holds" in str(error.value)
    assert repr(token) in str(error.value)
    assert "Give the row as messages" in str(error.value)


def test_control_tokens_in_plain_text_are_read_as_such_where_they_may_be():
    row = plain_row(f"<|im_start|>user\n{FRAMED}a<|im_end|>\n", "yes")
    (got,) = prepare([row], "qwen2_vl", allow_special_tokens_in_text=True)
    assert got["prompt_ids"] == read("qwen2_vl", row["prompt"], "yes", [PICTURE])[0]


# --- rows that are token ids ---

SOURCE: list[dict[str, Any]] = [
    {"prompt": prompt, "chosen": said(f"yes {number}"), "rejected": said("no"), "images": images}
    for number, (prompt, images) in enumerate(TALKS)
]


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3", "gemma3"], indirect=True)
def test_preparing_again_changes_nothing(family):
    once = prepare(SOURCE, family)
    twice = prepare(once, family)
    assert twice.to_list() == once.to_list()
    assert twice.features == once.features
    some = prepare(once.select([2, 0]), family)
    assert some["example_id"][:] == [2, 0]
    assert [len(pixels(row)) for row in some] == [len(TALKS[2][1]), len(TALKS[0][1])]
    shorter = prepare(once, family, max_length=max(once["length"][:]) - 8, truncation_mode="keep_end")
    assert shorter.to_list() != once.to_list()


def test_token_ids_are_counted_beside_their_images():
    once = prepare(SOURCE, "qwen2_vl").to_list()
    number = processor("qwen2_vl").image_token_id
    have = once[0]["prompt_ids"].count(number)
    place = once[0]["prompt_ids"].index(number)
    changes = {
        "a token missing": {"prompt_ids": [n for at, n in enumerate(once[0]["prompt_ids"]) if at != place]},
        "no image": {"images": []},
        "an image more": {"images": once[0]["images"] * 2},
        "another size": {"images": once[1]["images"][:1]},
    }
    for change in changes.values():
        with pytest.raises(ValueError) as error:
            prepare([once[1], once[0] | change], "qwen2_vl")
        assert "Row 1 of train, column 'prompt_ids': has " in str(error.value)
        assert "Prepare the rows again: a file has changed, or another processor" in str(error.value)
    assert f"has {have} image tokens in its prompt, and its 1 images come to" in str(error.value)


# --- streams, processes, the cache ---


def as_stream(rows: list[dict[str, Any]]) -> IterableDataset:
    """Of which nothing is known before it is read."""

    def generate():
        yield from rows

    return IterableDataset.from_generator(generate)


def content(rows: Any) -> list[tuple]:
    return [(*ids, [image.tobytes() for image in pixels(row)]) for row, ids in zip(rows, ids_of(rows), strict=True)]


@pytest.mark.parametrize("limit", [None, 60])
def test_streams_give_what_tables_give(limit):
    options = {"max_length": limit, "truncation_mode": "keep_end"}
    table = Dataset.from_list(SOURCE)
    want = content(list(prepare(table, "qwen2_vl", **options)))
    assert len(want) == 4
    for stream in (as_stream(SOURCE), table.to_iterable_dataset(num_shards=2), as_stream(list(table))):
        prepared = prepare(stream, "qwen2_vl", **options)
        rows = list(prepared)
        assert content(rows) == want
        assert len({row["example_id"] for row in rows}) == 4
        assert set(rows[0]) == {*FEATURES, "images"}
    # Equal words beside other images are another row.
    other = [row | {"images": [zoo.noise(9, image.height, image.width) for image in row["images"]]} for row in SOURCE]
    ids = {row["example_id"] for row in prepare(as_stream(other), "qwen2_vl", **options)}
    assert len(ids & {row["example_id"] for row in rows}) == 1  # of the row without images


def test_two_processes_give_what_one_gives():
    table = Dataset.from_list(SOURCE * 2)
    assert prepare(table, "idefics3", dataset_num_proc=2).to_list() == prepare(table, "idefics3").to_list()


def refuse(*_: Any) -> None:
    raise RuntimeError("tokenized again")


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    Dataset.from_list(SOURCE).save_to_disk(tmp_path / "a")
    smaller = [row | {"images": [image.resize((36, 36)) for image in row["images"]]} for row in SOURCE]
    Dataset.from_list(smaller).save_to_disk(tmp_path / "b")

    def run(own: Any = None, name: str = "a", **options: Any) -> list[dict[str, Any]]:
        own = own or zoo.qwen2_vl()[1]
        return prepare_dataset(load_from_disk(tmp_path / name), own, DataOptions(**OPTIONS, **options))[0].to_list()

    first = run()
    monkeypatch.setattr(PairMapper, "__call__", refuse)
    assert run() == first
    larger, templated = zoo.qwen2_vl()[1], zoo.qwen2_vl()[1]
    larger.image_processor.size = {"shortest_edge": 32**2, "longest_edge": 64**2}
    templated.chat_template += " "
    for own, changed in (
        (larger, {}),
        (templated, {}),
        (zoo.qwen3_vl()[1], {}),
        (None, {"name": "b"}),
        (None, {"image_root": str(tmp_path)}),
        (None, {"max_length": 100}),
    ):
        with pytest.raises(RuntimeError, match="tokenized again"):
            run(own, **changed)


def test_fingerprints_are_those_of_any_process():
    """Sets of words come in another order there."""
    code = (
        "import zoo\nfrom dpo_trainer.data.images.source import ImageAccess\nfrom dpo_trainer.data.images.text import ImageText\n"
        "for family in ('qwen2_vl', 'idefics3'):\n    print(ImageText(zoo.ZOO[family]()[1], ImageAccess()).fingerprint)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "vision")])}
    env["PYTHONHASHSEED"] = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    here = [ImageText(zoo.ZOO[name]()[1], ImageAccess()).fingerprint for name in ("qwen2_vl", "idefics3")]
    assert done.stdout.split() == here
    assert len(set(here)) == 2


def bytes_on_disk(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("selected", "copied"),
    [(None, 0), ([0, 1, 2], 0), ([3, 0, 2], 0), ([3, 0, 3], 3), ([0, 3], 0)],
    ids=["all", "the first ones", "shuffled", "one twice", "half"],
)
def test_images_are_not_copied(selected, copied, tmp_path):
    """Neither on disk nor in memory; but for rows that were selected twice. 4 images of a megabyte."""
    images = [zoo.noise(number, 600, 600) for number in range(4)]
    prompt = [turn("user", None, "what?")]
    Dataset.from_list([{"prompt": prompt, **ONE, "images": [image]} for image in images]).save_to_disk(tmp_path)
    rows = load_from_disk(tmp_path)
    one = bytes_on_disk(tmp_path) // 4
    assert one > 1_000_000
    rows = rows if selected is None else rows.select(selected)
    before, held = bytes_on_disk(tmp_path), pyarrow.total_allocated_bytes()
    prepared = prepare(rows, "qwen2_vl")
    assert round((bytes_on_disk(tmp_path) - before) / one, 1) == copied
    assert pyarrow.total_allocated_bytes() - held < one / 10
    assert prepared["example_id"][:] == [*range(len(rows))]
    for row, number in zip(prepared, selected or range(4), strict=True):
        np.testing.assert_array_equal(pixels(row)[0], np.asarray(images[number]))


def test_dropped_rows_take_their_images_along():
    rows = [row | {"rejected": said(f"yes {number}")} if number % 2 else row for number, row in enumerate(SOURCE)]
    for table in (Dataset.from_list(rows), Dataset.from_list(rows[::-1]).select([3, 2, 1, 0])):
        prepared = prepare(table, "qwen2_vl")
        assert prepared["example_id"][:] == [0, 2]
        assert content(prepared) == [content(prepare(SOURCE, "qwen2_vl"))[number] for number in (0, 2)]


def test_rows_with_the_same_words_and_other_images_are_no_duplicates():
    row = {"prompt": [turn("user", None, "what?")], **ONE}
    rows = [row | {"image": image} for image in (PICTURES[0], zoo.noise(7, 40, 60), PICTURES[0])]
    prepared, report = prepare_dataset(
        Dataset.from_list(rows), processor("qwen2_vl"), DataOptions(**OPTIONS, deduplicate=True)
    )
    assert (prepared["example_id"][:], report.first_rows["duplicate"]) == ([0, 1], [2])
    assert prepared["prompt_ids"][0] == prepared["prompt_ids"][1]


@pytest.mark.parametrize("streamed", [False, True], ids=["table", "stream"])
def test_images_are_not_decoded(streamed, tmp_path, monkeypatch):
    decoded: list[str] = []
    load = ImageFile.ImageFile.load

    def counted(image: Any) -> Any:
        decoded.append(image.format)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    kinds = ["PNG", "JPEG", "WEBP"]
    files = []
    for kind in kinds:
        files.append(tmp_path / f"x.{kind.lower()}")
        files[-1].write_bytes(encoded(PICTURE, kind))
    row = {"prompt": [turn("user", *[None] * 3)], **ONE}
    for images in ([str(file) for file in files], [file.read_bytes() for file in files]):
        table = Dataset.from_list([row | {"images": images}])
        for rows in (table, table.cast_column("images", List(Image()))):
            decoded.clear()
            (prepared,) = prepare(rows.to_iterable_dataset() if streamed else rows, "qwen2_vl")
            assert not decoded
            assert len(pixels(prepared)) == 3
            assert [*dict.fromkeys(decoded)] == kinds  # else nobody counts


# --- mixtures ---

TEXT_ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]


def mixture(*parts: Any) -> tuple[Any, Any]:
    parts = tuple(Dataset.from_list(part) if isinstance(part, list) else part for part in parts)
    return prepare_mixture(parts, processor("qwen2_vl"), DataOptions(**OPTIONS))


def test_images_beside_a_dataset_of_text():
    rows, reports = mixture(SOURCE, TEXT_ROWS)
    assert rows["example_id"][:] == [*range(6)]
    assert rows["images"][4:] == [None, None]
    assert content(rows) == content(prepare(SOURCE, "qwen2_vl")) + content(prepare(TEXT_ROWS, "qwen2_vl"))
    assert {name: report.kept for name, report in reports.items()} == {"train 0": 4, "train 1": 2}
    other_way, _ = mixture(TEXT_ROWS, SOURCE)
    assert content(other_way) == content(rows)[4:] + content(rows)[:4]
    again = prepare(rows, "qwen2_vl")
    assert content(again) == content(rows)


def test_mixtures_of_all_forms_of_images(tmp_path):
    path, data = file_of(tmp_path), encoded(PICTURE)
    row = {"prompt": [turn("user", None, "what?")], **ONE}
    no_image = {"prompt": [turn("user", "what?")], **ONE}
    forms = [
        [row | {"images": [PICTURE]}],
        [row | {"images": [path]}],
        [row | {"images": [data]}],
        [row | {"images": [{"bytes": data, "path": None}]}],
        [row | {"images": PICTURE}],
        [row | {"images": path}],
        [row | {"image": PICTURE}],
        [row | {"image": path}],
        [row | {"image": data}],
        [no_image | {"images": None}],
        [no_image | {"images": []}],
        [no_image | {"image": None}],
        [no_image],
    ]
    tables = [prepare(form, "qwen2_vl") for form in forms]
    alone = [content(table)[0] for table in tables]
    assert [len(images) for *_, images in alone] == [1] * 9 + [0] * 4
    for first, second in itertools.combinations(range(len(forms)), 2):
        both = concatenate_datasets(same_image_types([tables[first], tables[second]]))
        assert content(both) == [alone[first], alone[second]]
    rows, _ = mixture(*forms)
    assert content(rows) == alone


def test_streams_of_images_and_of_text_take_turns():
    rows, _ = mixture(as_stream(SOURCE[:2]), as_stream(TEXT_ROWS))
    both = content(prepare(SOURCE[:2], "qwen2_vl")), content(prepare(TEXT_ROWS, "qwen2_vl"))
    assert content(list(rows)) == [row for turns in zip(*both, strict=True) for row in turns]
