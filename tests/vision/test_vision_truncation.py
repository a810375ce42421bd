"""Limits cut words and never images: their tokens stay whole, in order and as many as the model has features for."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import pytest
import tiny
import zoo
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_trainer import DPOTrainer
from dpo_trainer.data import DataOptions, Limits, prepare_dataset, tokenize_pairs
from dpo_trainer.data.images.source import ImageAccess
from dpo_trainer.data.images.text import ImageText, processed
from dpo_trainer.data.processor import text_tokenizer
from dpo_trainer.data.report import USELESS
from dpo_trainer.data.rows.schema import pair_from_row
from dpo_trainer.types import Flag, PairIds

Ids = list[int]
BOS, IMAGE = 1, 2  # words are from 10 on
CUT = Flag.TRUNCATED_PROMPT | Flag.TRUNCATED_CHOSEN | Flag.TRUNCATED_REJECTED


# --- on numbers alone, beside another implementation ---


class Cut(NamedTuple):
    prompt: Ids
    images: list[Ids]  # what stands in each span
    completions: list[Ids]


def one_by_one(ids: PairIds, limits: Limits) -> Cut | None:
    """What the docstring of `Limits` says, a token at a time; None: no room."""
    spans = {at: number for number, (start, end) in enumerate(ids.images) for at in range(start, end)}
    words = [at for at in range(len(ids.prompt)) if at not in spans]
    first = [0] if ids.prompt[0] == limits.bos_token_id and 0 not in spans else []
    # A BOS goes last: but a prompt of one token without images is its last word.
    last = words[-1:] if not spans and words[-1:] != first else []
    going = [at for at in words if at not in first and at not in last] + first + last
    stay = list(range(len(ids.prompt)))

    def shrink(most: int, least: int) -> None:
        while len(stay) > max(most, least) and going:
            stay.remove(going.pop(0))

    completions = [completion[: limits.max_completion_length] for completion in ids.completions]
    if limits.max_prompt_length is not None:
        shrink(limits.max_prompt_length, 1)
        if len(stay) > limits.max_prompt_length:
            return None
    if limits.max_length is not None:
        if limits.truncation_mode == "keep_end":
            shrink(limits.max_length - max(map(len, completions)), 1)
        room = limits.max_length - len(stay)
        if room < 1:
            return None
        completions = [completion[:room] for completion in completions]
    groups: list[Ids] = [[] for _ in ids.images]
    for at in stay:
        if at in spans:
            groups[spans[at]].append(ids.prompt[at])
    return Cut([ids.prompt[at] for at in stay], groups, completions)


@st.composite
def prompts(draw: Any, *, images: bool) -> tuple[Ids, tuple[tuple[int, int], ...]]:
    """Words, all different, and spans among them; perhaps a BOS first."""
    prompt, spans = [BOS] * draw(st.integers(0, 3).map(bool)), []
    word = iter(range(10, 1000))
    for _ in range(draw(st.integers(1, 3)) if images else 0):
        prompt += [next(word) for _ in range(draw(st.integers(0, 4)))]
        start = len(prompt)
        # The number behind tells one image from another.
        prompt += [IMAGE, *(next(word) for _ in range(draw(st.integers(0, 2))))]
        spans.append((start, len(prompt)))
    prompt += [next(word) for _ in range(draw(st.integers(0, 6 if images else 16)))]
    return prompt or [next(word)], tuple(spans)


limit = st.none() | st.integers(1, 20)
all_limits = st.builds(
    Limits,
    max_length=limit,
    max_prompt_length=limit,
    max_completion_length=st.none() | st.integers(1, 6),
    truncation_mode=st.sampled_from(["keep_start", "keep_end"]),
    bos_token_id=st.sampled_from([None, BOS, BOS, BOS]),
)
answers = st.lists(st.integers(10, 12), min_size=1, max_size=8)


@pytest.mark.parametrize("images", [True, False], ids=["images", "no images"])
def test_the_same_as_token_by_token(images):
    seen: Counter = Counter()

    @settings(max_examples=600)
    @given(prompts(images=images), st.lists(answers, min_size=2, max_size=2), all_limits)
    def check(given_prompt, completions, limits):
        prompt, spans = given_prompt
        ids = PairIds(prompt, completions, images=spans)
        got, want = limits.apply(ids), one_by_one(ids, limits)
        if want is None:
            seen["no room"] += 1
            assert got == ids._replace(flags=Flag.NO_ROOM)
            return
        if want.completions[0] == want.completions[1] and (want.prompt, want.completions) != (prompt, completions):
            seen["identical"] += 1
            assert got.flags & Flag.IDENTICAL
        assert got.prompt == want.prompt
        assert [got.prompt[start:end] for start, end in got.images] == want.images
        assert want.images == [prompt[start:end] for start, end in spans]
        assert got.completions == want.completions
        assert bool(got.flags & Flag.TRUNCATED_PROMPT) == (want.prompt != prompt)
        assert len(got.prompt) <= (limits.max_prompt_length or 10**6)
        assert len(got.prompt) + max(map(len, got.completions)) <= (limits.max_length or 10**6)
        seen["cut"] += want.prompt != prompt
        seen["cut between images"] += len(spans) > 1 and len(want.prompt) < len(prompt) - spans[0][0]
        seen["BOS kept"] += want.prompt != prompt and want.prompt[0] == limits.bos_token_id
        seen["nothing cut"] += not got.flags & CUT
        again = limits.apply(got)
        assert again == got or got.flags & USELESS

    check()
    kinds = ["no room", "cut", "BOS kept", "nothing cut", "identical", *["cut between images"] * images]
    assert all(seen[kind] >= 5 for kind in kinds), seen


def test_truncation_by_hand():
    """Words from the beginning on, behind the BOS; the words between images before those behind them."""
    row = PairIds([BOS, 10, 11, 2, 2, 12, 2, 2, 13, 14], [[20, 21, 22], [23]], images=((3, 5), (6, 8)))

    def cut(**limits: Any) -> PairIds:
        unset = {"max_length": None, "max_prompt_length": None, "max_completion_length": None, "bos_token_id": BOS}
        return Limits(**{**unset, **limits}).apply(row)

    assert cut(max_prompt_length=8).prompt == [BOS, 2, 2, 12, 2, 2, 13, 14]
    assert cut(max_prompt_length=7).prompt == [BOS, 2, 2, 2, 2, 13, 14]
    assert cut(max_prompt_length=7).images == ((1, 3), (3, 5))
    assert cut(max_prompt_length=5).prompt == [BOS, 2, 2, 2, 2]
    assert cut(max_prompt_length=4).prompt == [2, 2, 2, 2]
    assert cut(max_prompt_length=4).flags == Flag.TRUNCATED_PROMPT
    assert cut(max_prompt_length=3).flags == Flag.NO_ROOM
    assert cut(max_prompt_length=7, bos_token_id=None).prompt == [2, 2, 12, 2, 2, 13, 14]
    keep_end = {"max_length": 7, "truncation_mode": "keep_end"}
    assert cut(**keep_end)[:2] == ([2, 2, 2, 2], [[20, 21, 22], [23]])
    assert cut(**keep_end | {"max_length": 6})[:2] == ([2, 2, 2, 2], [[20, 21], [23]])
    assert cut(**keep_end | {"max_length": 4}).flags == Flag.NO_ROOM
    assert cut(max_length=11)[:2] == (row.prompt, [[20], [23]])
    assert cut(max_length=10).flags == Flag.NO_ROOM
    assert cut(max_prompt_length=3, too_long="drop").flags == Flag.TOO_LONG


# --- on the tokens of processors ---


@cache
def sight(family: str) -> ImageText:
    return ImageText(zoo.ZOO[family]()[1], ImageAccess())


def turn(role: str, *parts: Any) -> dict[str, Any]:
    """A message; None among the parts is an image."""
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def tokenized(family: str, prompt: Any, images: list[Any], *answers: str) -> PairIds:
    said: list[Any] = [*answers] if isinstance(prompt, str) else [[turn("assistant", text)] for text in answers]
    row = {"prompt": prompt, "chosen": said[0], "rejected": said[1], "images": images}
    own = text_tokenizer(sight(family).processor)
    return tokenize_pairs([pair_from_row(row, "Row")], own, ["Row"], images=sight(family))[0]


def parts_of(ids: Ids, images: list[Ids]) -> list[int] | None:
    """Where each of `images` begins in `ids`, one behind the other and whole; None: some are not there."""
    places, start = [], 0
    for image in images:
        at = next((at for at in range(start, len(ids)) if ids[at : at + len(image)] == image), None)
        if at is None:
            return None
        places.append(at)
        start = at + len(image)
    return places


words = st.lists(st.sampled_from(["a", "of what? ", "\n", "1 2 3", "."]), max_size=4).map("".join)
pictures = st.builds(zoo.noise, st.integers(0, 3), st.sampled_from([20, 40, 90]), st.sampled_from([20, 40, 90]))


@st.composite
def talks(draw: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    images = draw(st.lists(pictures, min_size=1, max_size=3))
    parts = draw(st.permutations([None] * len(images) + [draw(words) for _ in range(2)]))
    cut = draw(st.integers(0, len(parts) - 1))
    earlier = [turn("user", *parts[:cut]), turn("assistant", draw(words))] if cut else []
    return [*earlier, turn("user", *parts[cut:], "end")], images


@pytest.mark.parametrize("family", list(zoo.ZOO))
def test_images_stay_whole(family):
    """As the processor wrote them, tiles and frames and all, each inside its span; all image tokens are in spans."""
    seen: Counter = Counter()
    own = sight(family)
    image_id = max(own.image_ids)

    @settings(max_examples=12)
    @given(talks(), st.lists(st.tuples(st.integers(0, 100), st.booleans()), min_size=4, max_size=4))
    def check(talk, cuts):
        prompt, images = talk
        ids = tokenized(family, prompt, images, "yes, all of it", "no")
        written = [processed(own.processor, image)[0].strip("\n") for image in images]
        whole = [own.tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]
        assert parts_of(ids.prompt, whole) is not None
        for percent, keep_end in cuts:
            most = 1 + len(ids.prompt) * percent // 100 + (14 if keep_end else 0)
            how = {"max_length": most} if keep_end else {"max_prompt_length": most}
            none = {"max_length": None, "max_prompt_length": None, "max_completion_length": None}
            bos = own.tokenizer.bos_token_id
            got = Limits(**{**none, **how}, truncation_mode="keep_end", bos_token_id=bos).apply(ids)
            if got.flags & Flag.NO_ROOM:
                seen["no room"] += 1
                assert got[:2] == ids[:2]
                continue
            seen["cut"] += bool(got.flags & Flag.TRUNCATED_PROMPT)
            assert (places := parts_of(got.prompt, whole)) is not None
            covered = {at for start, end in got.images for at in range(start, end)}
            assert all({*range(at, at + len(image))} <= covered for at, image in zip(places, whole, strict=True))
            assert {at for at, number in enumerate(got.prompt) if number == image_id} <= covered
            assert got.prompt.count(image_id) == ids.prompt.count(image_id) == sum(i.count(image_id) for i in whole)
            if bos in ids.prompt and len(got.prompt) > len(covered):
                seen["BOS"] += 1
                assert bos in got.prompt

    check()
    assert seen["cut"] >= 5, seen
    assert seen["no room"] >= 1, seen
    assert seen["BOS"] >= 5 or family not in ("llava", "llava_next", "idefics3", "smolvlm", "gemma3", "paligemma")


def test_paligemma_keeps_the_bos_behind_its_images():
    ids = tokenized("paligemma", "<image><image>what is that?", [zoo.noise(0), zoo.noise(1)], "yes", "no")
    bos = sight("paligemma").tokenizer.bos_token_id
    assert ids.prompt.index(bos) == 2 * 16
    limits = Limits(max_length=None, max_prompt_length=2 * 16 + 5, max_completion_length=None, bos_token_id=bos)
    cut = limits.apply(ids)
    assert sight("paligemma").tokenizer.decode(cut.prompt[2 * 16 :]) == "<bos>at?\n"
    assert cut.images == ((0, 2 * 16 + 1),)


# --- through prepare_dataset ---

LONG = "a long story of many words, " * 3


def rows_of(family: str) -> list[dict[str, Any]]:
    """Short; long before and behind the image; long without an image; 25 images."""
    talks: list[tuple[list[dict[str, Any]], int]] = [
        ([turn("user", None, "what?")], 1),
        ([turn("user", LONG, None, "what?")], 1),
        ([turn("user", None, LONG)], 1),
        ([turn("user", LONG)], 0),
        ([turn("user", *[None] * 25, "?")], 25),
    ]
    return [
        {
            "prompt": prompt,
            "chosen": [turn("assistant", "yes")],
            "rejected": [turn("assistant", "no")],
            "images": [zoo.noise(seed, 40, 40) for seed in range(count)],
        }
        for prompt, count in talks
    ]


def limit_of(family: str) -> int:
    """What the image tokens of the first row need, and some words: less than those of 25 images."""
    _, processor = zoo.ZOO[family]()
    (row, *_) = prepare_dataset(Dataset.from_list(rows_of(family)[:1]), processor, DataOptions(disable_tqdm=True))[0]
    return row["length"] + 4


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_rows_that_cannot_fit_are_dropped_and_counted(family):
    _, processor = zoo.ZOO[family]()
    table, limit = Dataset.from_list(rows_of(family)), limit_of(family)

    def prepare(**options: Any) -> Any:
        return prepare_dataset(table, processor, DataOptions(disable_tqdm=True, max_length=limit, **options))

    prepared, report = prepare(truncation_mode="keep_end")
    assert prepared["example_id"][:] == [0, 1, 2, 3]
    assert (report.first_rows["no_room"], report.first_rows["truncated_prompts"]) == ([4], [1, 2, 3])
    longest = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in prepared]
    assert max(longest) == limit
    number = max(sight(family).image_ids)
    counts = [row["prompt_ids"].count(number) for row in prepared]
    assert counts[0] == counts[1] == counts[2] > counts[3] == 0
    assert [len(row["images"]) for row in prepared] == [1, 1, 1, 0]
    again, _ = prepare_dataset(prepared, processor, DataOptions(disable_tqdm=True, max_length=limit))
    assert again.to_list() == prepared.to_list()

    prepared, report = prepare(too_long="drop")
    assert (prepared["example_id"][:], report.first_rows["too_long"]) == ([0], [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"train has rows that --max_length.*would cut: 4 \(rows 1, 2, 3, 4\)"):
        prepare(too_long="error")
    with pytest.raises(ValueError, match=r"teach nothing: no room for a completion after the prompt: 1 \(row 4\)"):
        prepare(truncation_mode="keep_end", useless_pairs="error")


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3", "gemma3"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_training_within_limits(family, layout, tmp_path):
    """The model itself refuses a batch whose features are not as many as its image tokens."""
    model, processor = zoo.ZOO[family]()
    args = tiny.config(
        tmp_path,
        layout=layout,
        max_length=limit_of(family),
        truncation_mode="keep_end",
        max_steps=2,
        per_device_train_batch_size=2,
    )
    rows = Dataset.from_list(rows_of(family))
    trainer = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    counts = trainer.data.reports["train"].counts
    assert (counts["no_room"], counts["truncated_prompts"]) == (1, 3)
    trainer.train()
    first, _ = tiny.losses(trainer)
    assert abs(first - 0.6931) < 1e-3
    assert trainer.layout.name == layout
