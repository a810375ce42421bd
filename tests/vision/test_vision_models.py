"""Every vision-language architecture: in both layouts it computes what it would of one prompt and completion at a time, each
image once where rows are flat; and it trains, saves and generates.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import oracles
import pytest
import tiny
import torch
import vision_rows
import zoo
from torch import Tensor, nn

import dpo_trainer.models.vision
import dpo_trainer.scoring.layout
from dpo_trainer import DPOTrainer
from dpo_trainer.data.batches.collate import inputs_of, read_row
from dpo_trainer.models.load import load_model, load_processing_class
from dpo_trainer.types import PairBatch, PairLogps, TokenizedPair

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # PaliGemma's processor
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

FAMILIES = list(zoo.ZOO)
LAYOUTS = ["flat", "padded"]
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
MUTUAL = {"gemma3": "images", "paligemma": "prompt"}
CHECKPOINTING = {
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}

# Sums over up to 30 tokens in float32, against float64: worst seen 7e-6 nats.
NATS = 1e-4
# Of each parameter's gradient, of its own norm: worst seen 3e-6.
GRADIENT = 1e-4
# float32, the same products in another order, 3 steps of plain gradient descent: worst seen 6e-7 in a weight and 1.2e-7 in a
# loss, where weights of the vision tower move by more than 1e-3 (asserted).
WEIGHT_ATOL, LOSS_ATOL = 1e-5, 2e-6


@dataclasses.dataclass
class Run:
    """A trainer that has trained, and what it said meanwhile."""

    trainer: DPOTrainer
    began: dict[str, Tensor]
    said: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Any:
    """(family, layout asked for, checkpointing) -> Run, each once."""

    @cache
    def run(family: str, layout: str, checkpointing: str = "off") -> Run:
        how = CHECKPOINTING.get(checkpointing, {})
        with vision_rows.warnings_of() as said:
            made = vision_rows.trainer(tmp_path_factory.mktemp(family), family, layout=layout, **how)
            began = tiny.weights(made.model)
            made.train()
        return Run(made, began, said)

    return run


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Any:
    """family -> a trainer that has not trained. Nothing may change it."""
    return cache(lambda family: vision_rows.trainer(tmp_path_factory.mktemp(family), family))


def batch_of(made: DPOTrainer, layout: str, places: Sequence[int] | None = None) -> Any:
    """Rows of its training data, in a layout."""
    table: Any = made.train_dataset
    places = range(len(table)) if places is None else places
    return batch_of_rows(made, layout, [read_row(table[place], place) for place in places])


def batch_of_rows(made: DPOTrainer, layout: str, rows: Sequence[TokenizedPair]) -> Any:
    return PairBatch.from_inputs(inputs_of(rows, layout, made.pad_token_id, images=made.layout.images))


def scored(made: DPOTrainer, batch: PairBatch, model: nn.Module | None = None) -> PairLogps:
    with torch.no_grad():
        return made.scorer(made.model if model is None else model, batch)


def distance(got: Any, want: Any) -> float:
    """The largest difference of two sets of log-prob sums, in nats."""
    return max((getattr(got, side) - getattr(want, side)).abs().max().item() for side in ("chosen", "rejected"))


# --- the same as of one prompt and completion at a time ---


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_are_those_of_the_processor(family, fresh):
    """Of the prompt, and of the prompt with each completion."""
    made = fresh(family)
    for number, row in enumerate(vision_rows.rows()):
        read = read_row(made.train_dataset[number], number)
        prompt, *wholes = (
            vision_rows.asked(made.processing_class, row, which)["input_ids"][0].tolist()
            for which in (None, *range(len(row["completions"])))
        )
        assert read.prompt_ids == prompt
        assert [read.prompt_ids + ids for ids in read.completions] == wholes


@pytest.fixture(scope="module")
def answers() -> Any:
    """family -> of its model, as the zoo makes it."""
    return cache(lambda family: vision_rows.answer(*zoo.ZOO[family](), vision_rows.rows()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_gradients_of_all_parameters(layout, family, fresh, answers):
    """The vision tower's too: each image has one backward in the flat row, where it takes part in several completions."""
    made, want = fresh(family), answers(family)
    batch = batch_of(made, layout)
    assert batch.is_flat == (layout == "flat")
    with made.scorer.step():
        logps = made.scorer(made.model, batch)
        got = oracles.gradients(made.model, vision_rows.mix(logps.chosen, logps.rejected))
    assert distance(logps, want) < NATS
    oracles.assert_same_gradients(got, want.gradients, rtol=GRADIENT)
    # What gets no gradient does not train either: several ranks would wait for it.
    assert got.keys() == {name for name, p in made.model.named_parameters() if p.requires_grad}
    tower = vision_rows.names_of(made.model, vision_rows.tower_of(made.model))
    assert sum(want.gradients[name].norm().item() > 1e-3 for name in tower & got.keys()) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_tell_images_apart(family, fresh):
    """Without which the comparisons above would say little: pixels in another order, another image, one of two in disorder."""
    made = fresh(family)
    one, two, *_ = vision_rows.rows()
    for place, images in (
        (0, vision_rows.shuffled(one)["images"]),
        (0, [zoo.noise(9, 40, 60)]),
        (1, [two["images"][0], *vision_rows.shuffled(two)["images"][1:]]),
        (1, [*vision_rows.shuffled(two)["images"][:1], two["images"][1]]),
    ):
        given = read_row(made.train_dataset[place], place)
        changed = dataclasses.replace(given, images=images)
        got, want = (scored(made, batch_of_rows(made, "flat", [row])) for row in (changed, given))
        assert distance(got, want) > 1e-3
        assert distance(scored(made, batch_of_rows(made, "padded", [changed])), got) < NATS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_same_alone_and_beside_others(family, fresh):
    """Nothing of one row, image or text, reaches another."""
    made = fresh(family)
    for layout in LAYOUTS:
        together = scored(made, batch_of(made, layout, [3, 2, 1, 0]))
        alone = [scored(made, batch_of(made, layout, [place])) for place in (3, 2, 1, 0)]
        for side in ("chosen", "rejected"):
            want = torch.cat([getattr(one, side) for one in alone])
            torch.testing.assert_close(getattr(together, side), want, rtol=0, atol=NATS)


# --- training ---


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_flat_and_as_padded_rows_do(family, runs):
    flat, padded = runs(family, "auto"), runs(family, "padded")
    assert (flat.trainer.layout.name, padded.trainer.layout.name) == ("flat", "padded")
    assert flat.trainer.layout.settled
    assert not [text for text in flat.said if "is trained with padded rows" in text]
    assert tiny.losses(flat.trainer)[0] == pytest.approx(math.log(2), rel=0, abs=1e-6)
    assert tiny.losses(padded.trainer) == pytest.approx(tiny.losses(flat.trainer), rel=0, abs=LOSS_ATOL)
    assert len(tiny.losses(flat.trainer)) == 3
    assert tiny.losses(flat.trainer)[2] < 0.6
    got, want = (tiny.weights(run.trainer.model) for run in (flat, padded))
    tower = vision_rows.names_of(flat.trainer.model, vision_rows.tower_of(flat.trainer.model))
    assert tiny.moved({n: flat.began[n] for n in tower}, got) > 1e-3
    tiny.assert_same_weights(got, want, WEIGHT_ATOL)


# One with tiles, one with features of an early layer and positions in three dimensions, two with attention both ways.
@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl", "gemma3", "paligemma"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_checkpointing_changes_nothing(checkpointing, family, runs):
    plain, got = runs(family, "auto"), runs(family, "flat", checkpointing)
    assert got.trainer.model.is_gradient_checkpointing
    assert got.trainer.layout.name == "flat"
    assert tiny.losses(got.trainer) == pytest.approx(tiny.losses(plain.trainer), rel=0, abs=LOSS_ATOL)
    tiny.assert_same_weights(tiny.weights(got.trainer.model), tiny.weights(plain.trainer.model), WEIGHT_ATOL)


@contextmanager
def counted(tower: nn.Module) -> Iterator[list[int]]:
    """For each call of a vision tower, how many images (or tiles, or patches) it was given."""
    given: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).shape[0])

    hook = tower.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield given
    finally:
        hook.remove()


def sizes_of_images(family: str) -> list[int]:
    """Of each row: what its images come to, by the processor alone."""
    model, processor = zoo.ZOO[family]()
    sizes = []
    for row in vision_rows.rows():
        with counted(vision_rows.tower_of(model)) as given, torch.no_grad():
            model(**vision_rows.asked(processor, row))
        sizes.append(sum(given))
    assert [bool(size) for size in sizes] == [True, True, False, True]
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_image_is_encoded_once_in_a_flat_batch(layout, family, runs):
    """By the policy, and by the reference: one call for the batch. In padded rows each image comes once per completion."""
    made = runs(family, "auto" if layout == "flat" else layout).trainer
    one, two, _, ranked = sizes_of_images(family)
    want = one + two + ranked if layout == "flat" else 2 * one + 2 * two + 3 * ranked
    ((_, reference),) = made.reference.own
    assert vision_rows.tower_of(reference) is not vision_rows.tower_of(made.model)
    inputs = vision_rows.collated(made)
    with (
        counted(vision_rows.tower_of(made.model)) as policy,
        counted(vision_rows.tower_of(reference)) as frozen,
        made.scorer.step(),
    ):
        made.compute_loss(made.model, inputs)
    assert policy == frozen == [want]
    with counted(vision_rows.tower_of(made.model)) as policy, made.scorer.step():
        made.compute_loss(made.model, vision_rows.collated(made, [2]))
    assert policy == []


# --- what is left behind ---


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_with_its_processor_and_loaded_by_name(family, runs, fresh, tmp_path):
    made = runs(family, "auto").trainer
    made.save_model(str(tmp_path / "saved"))
    processor = load_processing_class(str(tmp_path / "saved"))
    assert type(processor) is type(made.processing_class)
    args = tiny.config(tmp_path, max_steps=1, router_aux_loss_coef=0.0 if "moe" in family else None)
    again = DPOTrainer(model=str(tmp_path / "saved"), args=args, train_dataset=vision_rows.dataset())
    assert type(again.processing_class) is type(processor)
    assert type(load_model(str(tmp_path / "saved"))) is type(made.model)
    want = made.train_dataset.remove_columns("images")[:]
    assert again.train_dataset.remove_columns("images")[:] == want
    # The same weights at other addresses: sums in another order, 1e-6 of a nat.
    assert distance(scored(again, batch_of(again, "flat")), scored(made, batch_of(made, "flat"))) < 1e-5
    batch = batch_of(made, "flat")
    assert distance(scored(fresh(family), batch), scored(made, batch)) > 0.1  # it has learned


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_after_training_as_an_untouched_copy(family, runs):
    """Greedily, behind a prompt with two images: what training exchanges in a model is back in its place."""
    made = runs(family, "auto").trainer
    untouched, processor = zoo.ZOO[family]()
    inputs = vision_rows.asked(processor, vision_rows.rows()[1])
    began = generated(untouched, inputs)[1]
    untouched.load_state_dict(made.model.state_dict())
    assert not made.scorer.attention.is_installed
    (tokens, logits), (want_tokens, want) = (generated(model, inputs) for model in (made.model, untouched))
    assert tokens == want_tokens
    assert len(tokens) == 6
    # The same weights at other addresses: worst seen 2e-6.
    torch.testing.assert_close(logits, want, rtol=0, atol=5e-5)
    assert (logits[0] - began[0]).abs().max() > 1e-2


def generated(model: Any, inputs: dict[str, Tensor]) -> tuple[list[int], Tensor]:
    """Tokens, and the logits of each."""
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
        inputs = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    training = model.training
    model.eval()
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **how)
    model.train(training)
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)


# --- positions ---


def helper(model: Any, processor: Any, row: vision_rows.Row, number: int) -> Tensor:
    """[3, tokens] of a prompt with a completion, by the model's own method."""
    inputs = vision_rows.asked(processor, row, number)
    grids = {name: value for name, value in inputs.items() if "grid" in name}
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    return model.model.get_rope_index(input_ids=ids, mm_token_type_ids=types, **grids)[0][:, 0]


@pytest.mark.parametrize("family", QWEN)
def test_positions_of_qwen_are_those_of_its_helper(family, fresh):
    """Of the prompt with the first completion, and for the others of what stands behind the prompt."""
    made = fresh(family)
    rows, want = vision_rows.rows(), []
    for row in rows:
        prompt = vision_rows.asked(made.processing_class, row)["input_ids"].shape[1]
        of = [helper(made.model, made.processing_class, row, k) for k in range(len(row["completions"]))]
        want += [of[0], *(one[:, prompt:] for one in of[1:])]
    batch = batch_of(made, "flat")
    assert batch.position_ids.shape == (3, *batch.input_ids.shape)
    assert torch.equal(batch.position_ids[:, 0], torch.cat(want, dim=1))

    # Text goes on behind an image: its positions rise by one, equal in all dimensions, and start at 0 with a row alone.
    time, height, width = batch.position_ids[:, 0]
    image = torch.isin(batch.input_ids[0], torch.tensor(sorted(made.layout.images.text.image_ids)))
    assert torch.equal(time[~image], height[~image])
    assert not torch.equal(time[image], width[image])
    starts = (time == 0) & ~image
    assert int(starts.sum()) == len(rows)
    counting = torch.arange(time.shape[0])
    assert not torch.equal(time, counting)  # there are rows, and images, to be minded


@pytest.mark.parametrize("family", QWEN)
def test_positions_of_padded_rows_are_those_of_the_helper(family, fresh):
    """The model makes them itself, of the token types that it is given: what reaches its language model is caught."""
    made, caught = fresh(family), {}
    batch = batch_of(made, "padded")
    assert batch.position_ids is None

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)

    hook = made.model.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        scored(made, batch)
    finally:
        hook.remove()
    order = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1), (3, 2)]
    rows = vision_rows.rows()
    for place, (row, number) in enumerate(order):
        want = helper(made.model, made.processing_class, rows[row], number)
        got = caught["position_ids"][-3:, place, : want.shape[1]]
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in QWEN])
def test_positions_of_others_count(family, fresh):
    batch = batch_of(fresh(family), "flat")
    assert batch.position_ids.shape == batch.input_ids.shape
    lengths = zip(batch.segments.length, batch.segments.prefix_length, strict=True)
    want = [torch.arange(prefix, prefix + length) for length, prefix in lengths]
    assert torch.equal(batch.position_ids[0], torch.cat(want))


# --- who sees whom ---


@pytest.mark.parametrize("family", FAMILIES)
def test_stretches_that_see_each_other_both_ways(family, fresh):
    """The tokens of each image for Gemma 3, the prompts for PaliGemma, none for the others."""
    made = fresh(family)
    batch = batch_of(made, "flat")
    spans, start = [], 0
    for number, row in enumerate(vision_rows.rows()):
        ids = read_row(made.train_dataset[number], number)
        if MUTUAL.get(family) == "prompt":
            spans.append((start, start + len(ids.prompt_ids)))
        elif MUTUAL.get(family) == "images":
            at = [p for p, token in enumerate(ids.prompt_ids) if token == made.model.config.image_token_id]
            assert len(at) == zoo.TOKENS * len(row["images"])
            spans += [(start + at[i], start + at[i] + zoo.TOKENS) for i in range(0, len(at), zoo.TOKENS)]
        start += len(ids.prompt_ids) + sum(map(len, ids.completions))
    assert list(batch.segments.mutual) == spans
    assert bool(spans) == (family in MUTUAL)


@pytest.mark.parametrize("family", MUTUAL)
def test_attention_one_way_would_show(family, fresh, answers):
    """Without these stretches, Gemma 3 is off by more than 0.01 nats, and PaliGemma says that it is not causal."""
    made = fresh(family)
    batch = batch_of(made, "flat")
    segments = dataclasses.replace(batch.segments, mutual=())
    fault = dataclasses.replace(batch, segments=segments)
    if family == "paligemma":
        with pytest.raises(RuntimeError, match="is not a plain causal attention"):
            scored(made, fault)
        segments = dataclasses.replace(batch.segments, mutual=((0, 1),))
        fault = dataclasses.replace(batch, segments=segments)
    assert distance(scored(made, fault), answers(family)) > 1e-2
    assert distance(scored(made, batch), answers(family)) < NATS


ONE_BY_ONE: dict[str, Any] = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}


@pytest.mark.parametrize("family", MUTUAL)
def test_a_model_whose_attention_is_not_known_falls_back_to_padded_rows(family, runs, monkeypatch, tmp_path):
    """The check on the first batch finds it: it looks at an image of its own, whatever that batch holds."""
    known = {"paligemma": "prompt"} if family == "gemma3" else {}
    monkeypatch.setattr(dpo_trainer.models.vision, "MUTUAL", known)
    with vision_rows.warnings_of() as said:
        made = vision_rows.trainer(tmp_path, family, **ONE_BY_ONE)
        assert made.layout.name == "flat"
        made.train()
    assert made.layout.name == "padded"
    (told,) = [text for text in said if "is trained with padded rows" in text]
    assert type(made.model).__name__ in told
    if family == "gemma3":
        assert "differ by" in told
        padded = vision_rows.trained(tmp_path, family, layout="padded", **ONE_BY_ONE)
        tiny.assert_same_weights(tiny.weights(made.model), tiny.weights(padded.model), WEIGHT_ATOL)


def test_the_check_sees_an_image_where_the_first_batch_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(dpo_trainer.models.vision, "MUTUAL", {})
    rows = [*vision_rows.rows()[2:3], *vision_rows.rows()[:1]]
    made = vision_rows.trained(tmp_path, "gemma3", train=vision_rows.dataset(rows), max_steps=1, **ONE_BY_ONE)
    assert made.layout.name == "padded"


def test_the_check_has_words_where_prompts_are_images_alone(fresh):
    """The prompts of its rows would be empty without the images, and nothing would predict the first token."""
    made = fresh("llava")
    ids, _ = made.layout.images.probe
    alone = [n for n in ids if n in made.layout.images.text.image_ids]
    row = dataclasses.replace(read_row(made.train_dataset[0], 0), prompt_ids=alone)
    assert all(short.prompt_ids for short in dpo_trainer.scoring.layout._short([row], made.layout.images))


def test_layout_flat_is_refused_where_it_would_be_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(dpo_trainer.models.vision, "MUTUAL", {})
    made = vision_rows.trainer(tmp_path, "gemma3", layout="flat")
    with pytest.raises(ValueError, match="--layout flat does not work with Gemma3ForConditionalGeneration: flat: "):
        made.train()


@pytest.mark.parametrize("window", [2, 3, 16])
def test_windows_and_images_of_gemma3(window, tmp_path):
    """Narrower than an image, and wider than most prompts: what an image token sees before it ends with the window, what it
    sees of its image behind it does not."""
    model, processor = zoo.gemma3()
    model.config.text_config.sliding_window = window
    for layer in model.model.language_model.layers:
        layer.self_attn.sliding_window = window if layer.self_attn.is_sliding else None
    want = vision_rows.answer(copy.deepcopy(model), processor, vision_rows.rows())
    made = vision_rows.trainer(tmp_path, "gemma3", model=model)
    for layout in LAYOUTS:
        assert distance(scored(made, batch_of(made, layout)), want) < NATS
    assert distance(want, vision_rows.answer(*zoo.gemma3(), vision_rows.rows())) > 1e-2
