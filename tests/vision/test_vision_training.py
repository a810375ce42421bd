"""What else a run may be told, with images: adapters, a frozen vision tower, caches, workers, streams, resuming. None of it
changes what is learned from which image.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import torch
import vision_rows
import xxhash
import zoo
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

import dpo_trainer.data.images.inputs
from dpo_trainer import DPOTrainer
from dpo_trainer.data.batches.collate import inputs_of, read_row
from dpo_trainer.data.content import completion_keys
from dpo_trainer.models.unwrap import base_model
from dpo_trainer.types import PairBatch

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # PaliGemma's processor

# float32, the same products in another order, 3 steps of plain gradient descent: worst seen 2e-7 in a loss, 6e-7 in a weight.
LOSS_ATOL, WEIGHT_ATOL = 2e-6, 1e-5
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> DPOTrainer:
    """Trained with no option at all: 3 steps on all 4 rows."""
    return vision_rows.trained(tmp_path_factory.mktemp("plain"))


def assert_same_run(got: DPOTrainer, want: DPOTrainer, atol: float = WEIGHT_ATOL) -> None:
    """Losses and weights; the layout too, which was flat."""
    assert got.layout.name == "flat"
    assert tiny.losses(got) == pytest.approx(tiny.losses(want), rel=0, abs=LOSS_ATOL)
    assert max(tiny.losses(want)) - min(tiny.losses(want)) > 0.05
    tiny.assert_same_weights(tiny.weights(got.model), tiny.weights(want.model), atol)


def linear_layers(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Linear) for part in module.modules())


# --- adapters, and what of the model trains ---


def with_adapters(model: nn.Module) -> set[str]:
    """Modules of the base model that have one."""
    ends = ".lora_A.default.weight"
    return {name.removesuffix(ends) for name, _ in base_model(model).named_parameters() if name.endswith(ends)}


@pytest.mark.parametrize("family", list(zoo.ZOO))
def test_lora_is_on_the_language_model_alone(family, tmp_path):
    """Every linear layer of it, but for the head; nothing else trains."""
    untouched, _ = zoo.ZOO[family]()
    made = vision_rows.trainer(tmp_path, family, parts={"peft_config": tiny.lora()})
    decoder = next(name for name, module in untouched.named_modules() if module is untouched.get_decoder())
    found = with_adapters(made.model)
    assert len(found) == linear_layers(untouched.get_decoder()) > 6
    assert all(name.startswith(f"{decoder}.") for name in found)
    assert all("lora_" in name for name, p in made.model.named_parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in vision_rows.tower_of(made.model).parameters())


@pytest.mark.parametrize("family", list(zoo.ZOO))
def test_lora_is_on_the_vision_tower_too_where_it_is_not_frozen(family, tmp_path):
    untouched, _ = zoo.ZOO[family]()
    made = vision_rows.trainer(tmp_path, family, parts={"peft_config": tiny.lora()}, freeze_vision_tower=False)
    tower = vision_rows.tower_of(untouched)
    assert len(with_adapters(made.model)) == linear_layers(untouched) - 1  # the head
    trained = [name for name, p in vision_rows.tower_of(made.model).named_parameters() if p.requires_grad]
    idle = linear_layers(tower.encoder.layers[-1]) if family in ("llava", "llava_next") else 0  # see zoo.py
    assert len(trained) == 2 * (linear_layers(tower) - idle) > 10
    assert all("lora_" in name for name in trained)


def test_settings_of_an_adapter_that_leave_something_out_are_left_as_they_are(tmp_path):
    """Whoever names what to leave out has said all."""
    config = tiny.lora(exclude_modules=r".*language_model.*|lm_head")
    made = vision_rows.trainer(tmp_path, "llava", parts={"peft_config": config}, freeze_vision_tower=False)
    assert all("vision_tower" in name or "projector" in name for name in with_adapters(made.model))
    assert config.exclude_modules == r".*language_model.*|lm_head"


ADAPTED: dict[str, dict[str, Any]] = {"language": {}, "vision too": {"freeze_vision_tower": False}}


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Any:
    """Which parts have adapters -> trained in padded rows, nothing recomputed."""

    @cache
    def run(adapted: str) -> DPOTrainer:
        parts = {"peft_config": tiny.lora()}
        options = {"layout": "padded", "learning_rate": 1.0, **ADAPTED[adapted]}
        return vision_rows.trained(tmp_path_factory.mktemp("lora"), parts=parts, **options)

    return run


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("checkpointing", [{}, REENTRANT, NON_REENTRANT], ids=["plain", "reentrant", "non_reentrant"])
def test_adapters_train_flat_and_recomputed_as_they_do_padded(checkpointing, adapted, lora, tmp_path):
    """Reentrant checkpoints give no gradient where no input has one: the pixels of a frozen patch embedding have none."""
    want = lora(adapted)
    how = {"learning_rate": 1.0, **ADAPTED[adapted], **checkpointing}
    made = vision_rows.trainer(tmp_path, parts={"peft_config": tiny.lora()}, **how)
    before = tiny.weights(made.model)
    made.train()
    assert tiny.losses(made)[0] == pytest.approx(math.log(2), rel=0, abs=1e-6)
    assert_same_run(made, want)
    moved = {name for name, value in tiny.weights(made.model).items() if not torch.equal(value, before[name])}
    assert all("lora_" in name for name in moved)
    assert any("visual" in name for name in moved) == (adapted == "vision too")


@pytest.mark.parametrize(("family", "projector"), [("llava", "multi_modal_projector"), ("idefics3", "connector")])
def test_a_frozen_tower_stays_as_it_is_to_the_bit(family, projector, tmp_path):
    """What lies between it and the language model trains, and so does the language model."""
    made = vision_rows.trainer(tmp_path, family, freeze_vision_tower=True, max_steps=2)
    before = tiny.weights(made.model)
    made.train()
    after = tiny.weights(made.model)
    tower, language = (
        vision_rows.names_of(made.model, part) for part in (vision_rows.tower_of(made.model), made.model.get_decoder())
    )
    assert len(tower) > 10
    tiny.assert_same_weights({name: after[name] for name in tower}, {name: before[name] for name in tower})
    for trained in (language, {name for name in before if projector in name}):
        assert not trained & tower
        assert tiny.moved({name: before[name] for name in trained}, after) > 1e-3
    assert tiny.losses(made)[1] < 0.6


@pytest.mark.parametrize("freeze", [True, False])
def test_a_text_model_has_no_tower_to_freeze(freeze, tmp_path):
    with pytest.raises(
        ValueError, match="--freeze_vision_tower is about a vision-language model, and LlamaForCausalLM has no"
    ):
        tiny.trainer(tmp_path, freeze_vision_tower=freeze)


def test_a_text_model_takes_no_processor(tmp_path):
    _, processor = zoo.llava()
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM reads text alone: pass the tokenizer \(processor.tokenizer\)"
    ):
        tiny.trainer(tmp_path, parts={"processing_class": processor})


def test_a_model_without_its_processor_refuses_images(tmp_path):
    _, processor = zoo.qwen3_vl()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    with pytest.raises(ValueError, match=r"Row 0 of train.* images.*processor"):
        vision_rows.trainer(tmp_path, parts={"processing_class": tokenizer})


# --- rows without images ---


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_text_alone_trains_as_it_does_with_the_tokenizer(family, tmp_path):
    """Plain text, whose token ids are the same of both: the same run, in which the vision tower takes no part."""
    rows = [{"prompt": f"say {number}", "chosen": " yes", "rejected": " not at all"} for number in range(4)]
    runs = []
    for part in ("processor", "tokenizer"):
        _, processor = zoo.ZOO[family]()
        given = processor if part == "processor" else processor.tokenizer
        how = {"train": Dataset.from_list(rows), "parts": {"processing_class": given}}
        made = vision_rows.trainer(tmp_path, family, **how)
        before = tiny.weights(made.model)
        made.train()
        runs.append(made)
        after, tower = tiny.weights(made.model), vision_rows.names_of(made.model, vision_rows.tower_of(made.model))
        tiny.assert_same_weights({name: after[name] for name in tower}, {name: before[name] for name in tower})
    assert runs[0].layout.images is not None
    assert runs[1].layout.images is None
    assert_same_run(*runs)
    assert tiny.losses(runs[0])[0] == pytest.approx(math.log(2), rel=0, abs=1e-6)


def test_conversations_of_text_alone_train_flat_and_padded(tmp_path):
    """Of every family of attention; the tables have no column of images."""
    for family in ("qwen3_vl", "gemma3", "paligemma"):
        how = {"train": vision_rows.dataset(vision_rows.text_rows()), "max_steps": 2}
        flat, padded = (vision_rows.trained(tmp_path, family, layout=layout, **how) for layout in ("auto", "padded"))
        assert padded.layout.name == "padded"
        assert_same_run(flat, padded)


def test_split_of_a_step_changes_nothing(plain, tmp_path):
    """Also where one micro-batch has no image, and another three completions."""
    how: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same_run(vision_rows.trained(tmp_path, **how), plain)


def test_padding_at_the_end_of_a_flat_row_changes_nothing(plain, tmp_path):
    made = vision_rows.trained(tmp_path, pad_to_multiple_of=64)
    assert vision_rows.collated(made)["input_ids"].shape[1] % 64 == 0
    assert_same_run(made, plain)


def test_parts_within_a_budget_of_tokens_change_nothing(plain, tmp_path):
    made = vision_rows.trainer(tmp_path, max_tokens_per_micro_batch=80)
    parts = vision_rows.collated(made)["micro_batches"]
    assert len(parts) > 1
    assert sum(len(part["images"].digests) for part in parts if "images" in part) == 4
    made.train()
    assert_same_run(made, plain)


# --- the reference ---


@pytest.fixture
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_cache_of_its_own")
def test_precomputed_log_probs_make_the_same_run(plain, tmp_path):
    """Computed in the first run, found in the second; other pixels behind the same words are other completions."""
    told = []
    for number in (1, 2):
        with vision_rows.warnings_of() as said:
            made = vision_rows.trained(tmp_path, precompute_ref_log_probs=True)
        assert tiny.losses(made) == pytest.approx(tiny.losses(plain), rel=0, abs=1e-6), number
        tiny.assert_same_weights(tiny.weights(made.model), tiny.weights(plain.model), WEIGHT_ATOL)
        told += [text for text in said if "found in the cache" in text]
    assert "9 completions, 0 found in the cache, 9 computed" in told[0]
    assert "9 completions, 9 found in the cache, 0 computed" in told[1]
    rows = vision_rows.rows()
    other = [vision_rows.shuffled(row) for row in rows]
    with vision_rows.warnings_of() as said:
        made = vision_rows.trained(
            tmp_path, precompute_ref_log_probs=True, train=vision_rows.dataset(other), max_steps=1
        )
    (third,) = [text for text in said if "found in the cache" in text]
    assert "2 found in the cache, 7 computed" in third  # those of the row without images
    assert tiny.losses(made)[0] == pytest.approx(math.log(2), rel=0, abs=1e-6)


def test_keys_of_completions_follow_the_pixels_and_not_how_they_are_stored(tmp_path):
    """PIL image, bytes of a PNG or a path: the same keys. One pixel, or the order of two images: others."""
    made = vision_rows.trainer(tmp_path)
    image, second = zoo.noise(1, 40, 60), zoo.noise(2, 40, 60)
    image.save(tmp_path / "image.png")
    changed = image.copy()
    red, *others = image.getpixel((7, 7))  # type: ignore[misc]
    changed.putpixel((7, 7), (red ^ 1, *others))
    row, inputs = read_row(made.train_dataset[0], 0), made.layout.images
    assert inputs is not None

    def keys(*images: Any) -> list[bytes]:
        words = [number for number in row.prompt_ids if number not in inputs.text.image_ids]
        place = inputs.text.tokenizer.convert_tokens_to_ids(inputs.text.placeholder)
        shown = inputs.text.write_ids([place] * len(images), inputs.text.sizes(images, ""), "")
        return completion_keys(inputs.load(dataclasses.replace(row, prompt_ids=[*words, *shown], images=images)))

    assert keys(image) == keys(image.copy()) == keys(str(tmp_path / "image.png"))
    assert keys(image) == keys((tmp_path / "image.png").read_bytes())
    distinct = [keys(image), keys(changed), keys(second), keys(), keys(image, second), keys(second, image)]
    assert len({tuple(each) for each in distinct}) == len(distinct)
    assert len(set(keys(image))) == 2  # of chosen and rejected


def test_a_moving_reference_sees_images_too(tmp_path):
    how: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    runs = [vision_rows.trained(tmp_path, layout=layout, **how) for layout in ("auto", "padded")]
    assert_same_run(*runs)
    ((_, reference),) = runs[0].reference.own
    began, _ = zoo.qwen3_vl()
    tower = {name: began.get_parameter(name) for name in vision_rows.names_of(began, vision_rows.tower_of(began))}
    went, followed = (tiny.moved(tower, tiny.weights(model)) for model in (runs[0].model, reference))
    assert 0.2 * went < followed < went


# --- precision ---


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_mixed_precision_trains_flat(family, tmp_path):
    made = vision_rows.trained(tmp_path, family, bf16=True)
    assert made.layout.name == "flat"
    assert made.layout.settled
    assert tiny.losses(made)[0] == pytest.approx(math.log(2), rel=0, abs=1e-6)  # the same numbers twice
    assert tiny.losses(made)[2] < 0.6
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


# --- loaders, and processed images on disk ---


def test_a_loader_worker_processes_images(plain, tmp_path):
    assert_same_run(vision_rows.trained(tmp_path, dataloader_num_workers=1), plain)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "paligemma"])
def test_the_collator_goes_through_pickle(family, tmp_path):
    """As it does to workers that are spawned, without a weight of the model."""
    made = vision_rows.trainer(tmp_path, family)
    data = pickle.dumps(made.data_collator)
    assert len(data) < 4 * sum(p.numel() for p in made.model.parameters())
    rows = [made.train_dataset[place] for place in range(4)]
    got, want = pickle.loads(data)(rows), made.data_collator(rows)
    assert got.keys() == want.keys()
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert torch.equal(got["position_ids"], want["position_ids"])
    assert got["segments"] == want["segments"]
    assert got["images"].digests == want["images"].digests
    assert all(torch.equal(got["images"].inputs[name], value) for name, value in want["images"].inputs.items())


@contextmanager
def images_processed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which images of rows go through the image processor, by their pixels; those that are made to ask it things aside."""
    own = {_hash(image) for row in vision_rows.rows() for image in row["images"]}
    seen: list[str] = []
    process = dpo_trainer.data.images.inputs.processed

    def recorded(processor: Any, image: Any) -> Any:
        if _hash(image) in own:
            seen.append(_hash(image))
        return process(processor, image)

    with monkeypatch.context() as patch:
        patch.setattr(dpo_trainer.data.images.inputs, "processed", recorded)
        yield seen


def _hash(image: Any) -> str:
    return xxhash.xxh3_128_hexdigest(f"{image.size}".encode() + image.tobytes())


def last_byte_changed(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.usefixtures("_cache_of_its_own")
def test_processed_images_are_kept_on_disk(plain, tmp_path, monkeypatch):
    """Each of 4 is processed once, in 3 epochs and a second run; what is not whole is made anew."""
    with images_processed(monkeypatch) as seen:
        vision_rows.trained(tmp_path)
        assert len(seen) == 3 * 4
    with images_processed(monkeypatch) as seen:
        assert_same_run(vision_rows.trained(tmp_path, cache_processed_images=True), plain)
        assert len(seen) == len(set(seen)) == 4
    files = sorted((tmp_path / "cache" / "images").rglob("*.safetensors"))
    assert len(files) == 4
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path not in files] == []
    with images_processed(monkeypatch) as seen:
        made = vision_rows.trained(tmp_path, cache_processed_images=True)
        assert_same_run(made, plain)
        assert seen == []
    whole = {path: path.read_bytes() for path in files}
    damage = [lambda data: data[:-7], lambda data: data[:20], lambda data: b"", last_byte_changed]
    for path, spoil in zip(files, damage, strict=True):
        path.write_bytes(spoil(whole[path]))
    want = vision_rows.collated(plain)
    with images_processed(monkeypatch) as seen:
        got = vision_rows.collated(made)
        assert len(seen) == 4
    assert {path: path.read_bytes() for path in files} == whole
    assert got["images"].digests == want["images"].digests
    assert all(torch.equal(got["images"].inputs[name], value) for name, value in want["images"].inputs.items())


@pytest.mark.usefixtures("_cache_of_its_own")
def test_another_processor_does_not_read_the_images_of_the_first(tmp_path):
    """The same picture at another size."""
    shapes = []
    for side in (32, 48):
        _, processor = zoo.qwen3_vl()
        processor.image_processor.size = {"shortest_edge": side**2, "longest_edge": side**2}
        made = vision_rows.trainer(tmp_path, cache_processed_images=True, parts={"processing_class": processor})
        shapes.append(vision_rows.collated(made)["images"].inputs["pixel_values"].shape[0])
    assert shapes[1] > shapes[0]


# --- streams, evaluation, resuming ---


def stream(seed: int = 0) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(vision_rows.rows(seed)))


def test_a_stream_trains_as_the_table_does(plain, tmp_path):
    made = vision_rows.trained(tmp_path, train=stream())
    assert_same_run(made, plain)


def test_evaluation_is_the_same_in_both_layouts(plain, tmp_path):
    """In batches of 3 rows and 1, of a table and of a stream."""
    table, lines = vision_rows.dataset(vision_rows.rows(seed=50)), []
    for layout in ("auto", "padded"):
        how: dict[str, Any] = {"layout": layout, "per_device_eval_batch_size": 3}
        made = vision_rows.trainer(tmp_path, parts={"eval_dataset": table}, **how)
        made.model.load_state_dict(plain.model.state_dict())
        lines += [made.evaluate(), made.evaluate(stream(seed=50))]
    names = ["eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_logps/chosen", "eval_logps/rejected"]
    for line in lines[1:]:
        assert [line[name] for name in names] == pytest.approx([lines[0][name] for name in names], rel=0, abs=1e-5)
    assert abs(lines[0]["eval_loss"] - math.log(2)) > 1e-3  # the model is not its reference


# llava, qwen2_vl and gemma3 are saved under other names of weights than they have in memory (checkpointing/weights.py).
RESUMED = ["qwen3_vl", "idefics3", "llava", "qwen2_vl", "gemma3"]


@pytest.mark.parametrize("family", RESUMED)
def test_resume_equals_uninterrupted_to_the_bit(family, tmp_path):
    """AdamW on a falling rate; from the middle of the second epoch, after 3 of 5 steps of 2 rows."""
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 2,
        "max_steps": 5,
    }
    whole = vision_rows.trained(tmp_path, family, save_strategy="steps", save_steps=3, **options)
    resumed = vision_rows.trainer(tmp_path, family, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.layout.name == whole.layout.name == "flat"
    assert tiny.losses(resumed) == tiny.losses(whole)
    assert len(tiny.losses(whole)) == 5
    tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))


# --- an image that no row has ---


@pytest.mark.parametrize("family", list(zoo.ZOO))
def test_an_image_that_no_row_has_changes_nothing(family, tmp_path):
    """Of a batch without images, flat and padded: log-probs as without it; the vision tower has a part in it, of gradient 0."""
    made = vision_rows.trainer(tmp_path, family, train=vision_rows.dataset(vision_rows.rows()[2:3]))
    images: Any = made.layout.images
    rows = [read_row(made.train_dataset[0], 0)]
    logps: dict[tuple[str, bool], Tensor] = {}
    for layout in ("flat", "padded"):
        for images.always in (False, True):
            inputs = inputs_of(rows, layout, made.pad_token_id, images=images)
            assert ("images" in inputs) == images.always
            batch = PairBatch.from_inputs(inputs)
            with made.scorer.step():
                found = made.scorer(made.model, batch)
                logps[layout, images.always] = torch.cat([found.chosen, found.rejected]).detach()
                made.model.zero_grad(set_to_none=True)
                (found.chosen - found.rejected).sum().backward()
            took_part = [p.grad for p in vision_rows.tower_of(made.model).parameters() if p.grad is not None]
            assert bool(took_part) == images.always
            assert not any(grad.any() for grad in took_part)
        # Another length of the row or another number of rows: products in another order.
        torch.testing.assert_close(logps[layout, True], logps[layout, False], rtol=0, atol=2e-5)
        assert batch.num_tokens == PairBatch.from_inputs(inputs_of(rows, layout, made.pad_token_id)).num_tokens
    torch.testing.assert_close(logps["flat", True], logps["padded", True], rtol=0, atol=2e-5)


def test_rows_with_images_get_none_besides(tmp_path):
    made = vision_rows.trainer(tmp_path)
    want = vision_rows.collated(made)
    images: Any = made.layout.images
    images.always = True
    got = vision_rows.collated(made)
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert got["images"].digests == want["images"].digests
