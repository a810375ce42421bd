"""Whatever is wrong with an image or its place is a ValueError that names the row and says what to do, at each end of the pipeline."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny
import transformers
import zoo
from datasets import Dataset, Image, IterableDataset, List, Video

from dpo_trainer import DPOTrainer
from dpo_trainer.data import DataCollatorForPreference, DataOptions, prepare_dataset
from dpo_trainer.data.images.inputs import ImageInputs
from dpo_trainer.data.images.source import ImageAccess
from dpo_trainer.data.images.text import ImageText
from dpo_trainer.models.vision import sight_of

PICTURE = zoo.noise()
SAID = {"chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}]}


@cache
def pair(family: str = "qwen2_vl") -> tuple[Any, Any]:
    return zoo.ZOO[family]()


def asks(places: int = 1, **columns: Any) -> dict[str, Any]:
    return {"prompt": zoo.question("what?", places), **SAID, **columns}


def as_dataset(rows: list[dict[str, Any]]) -> IterableDataset:
    """A stream keeps each row as it is, and a table makes all rows alike."""

    def generate():
        yield from rows

    return IterableDataset.from_generator(generate)


def prepare(rows: Any, family: str | None = "qwen2_vl", **options: Any) -> list[dict[str, Any]]:
    own = tiny.tokenizer() if family is None else pair(family)[1]
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return list(prepare_dataset(rows, own, DataOptions(disable_tqdm=True, **options))[0])


def refusal(act: Any, *args: Any, **how: Any) -> str:
    with pytest.raises(ValueError) as error:
        act(*args, **how)
    assert type(error.value) is ValueError
    said = str(error.value)
    assert said.endswith(".")
    assert said.isprintable()
    return said


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that says that it has 20000 x 20000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    )


JPEG = encoded(PICTURE, "JPEG")
PNG = encoded(PICTURE)
CORRUPT = PNG[:500] + bytes([PNG[500] ^ 1]) + PNG[501:]
GIF = encoded(PICTURE, "GIF", save_all=True, append_images=[zoo.noise(1)])

IMAGES: dict[str, tuple[Any, str]] = {
    "missing": ("not there.png", "the image 'not there.png' does not exist. Mend the path, or say with --image_root"),
    "empty": (b"", "the image holds no bytes. Fetch it again, or leave the row out"),
    "no image": (b"hello, world", "is not a supported image"),
    "cut short": (JPEG[:-300], "is truncated. Fetch the file again"),
    "corrupt": (CORRUPT, "cannot be decoded"),
    "bomb": (bomb(), "has 400000000 pixels, and more than"),
    "several frames": (GIF, "holds several frames or pages (GIF). Give the frame that is meant"),
    "address": (
        "https://user:secret@x.org/a.png?key=1",
        "is an address. Download the images first, or pass --allow_image_urls",
    ),
    "data address": ("data:image/png;base64,AAAA", "is a data: address. Decode it, and give the bytes"),
    "folder": (".", "is a folder. Give the path of a file"),
    "outside": ("/etc/hostname", "lies outside of --image_root"),
    "too narrow": (encoded(PIL.Image.new("RGB", (2, 600))), "the image processor refuses its 2 x 600 pixels"),
}


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("name", IMAGES)
def test_bad_images_are_refused_with_their_row(name, column, tmp_path):
    """In tables and in streams, whichever way they are stored; the second image of its row where there are several."""
    (tmp_path / "fine.png").write_bytes(encoded(PICTURE))
    image, says = IMAGES[name]
    fine: Any = "fine.png" if isinstance(image, str) else encoded(PICTURE)
    several = column == "images"
    rows = [asks(2, images=[fine, image]) if several else asks(image=image)]
    rows = [asks(2, images=[fine, fine]) if several else asks(image=fine)] * 2 + rows
    table = Dataset.from_list(rows)
    as_images = table.cast_column(column, List(Image()) if several else Image())
    for dataset in (table, as_images, as_dataset(rows), as_images.to_iterable_dataset()):
        said = refusal(prepare, dataset, image_root=str(tmp_path))
        assert said.startswith(f"Row 2 of train, image {int(several)}: the image")
        assert says in said
        assert "secret" not in said


def test_errors_of_worker_processes_name_the_row():
    rows = Dataset.from_list([asks(image=encoded(PICTURE)), asks(image=b"")] * 2)
    said = refusal(prepare, rows.select([0, 2, 1, 3]), dataset_num_proc=2)
    assert "image 0: the image holds no bytes" in said
    assert said.startswith(("Row 1 of train", "Row 3 of train"))


TWO = [PICTURE, zoo.noise(1)]
PLAIN = {"chosen": "yes", "rejected": "no"}
PAD = "<|image_pad|>"
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an image that is None": (asks(2, images=[PICTURE, None]), ["column 'images[1]': is None", "take its place out"]),
    "no image for its part": (asks(1, images=[]), ["holds 0 images", "1 places", "Give the images in a column 'images'"]),
    "one image for two parts": (asks(2, images=[PICTURE]), ["holds 1 images", "2 places", 'Give one {"type": "image"}']),
    "two images for one part": (asks(1, images=TWO), ["holds 2 images", "1 places", 'Give one {"type": "image"}']),
    "no place in a text": ({"prompt": "what?", **PLAIN, "images": TWO}, ["holds 2 images", "0 places", f"one {PAD!r}"]),
    "too many places in a text": (
        {"prompt": f"{PAD}{PAD}", **PLAIN, "image": PICTURE},
        ["holds 1 images", "2 places", f"one {PAD!r}"],
    ),
    "a place in a text, and no image": (
        {"prompt": f"{PAD}what?", **PLAIN},
        ["holds 0 images", "1 places", "Give the images in a column 'images'"],
    ),
    "a place too many in a string": (
        {"prompt": [{"role": "user", "content": "<image><image>"}], **SAID, "image": PICTURE},
        ["holds 1 images", "2 places", "one '<image>'"],
    ),
    "no turn of the user": (
        {"prompt": [{"role": "system", "content": "look"}], **SAID, "image": PICTURE},
        ["has no turn of the user to put the images in", 'Give parts {"type": "image"}'],
    ),
    "an image in an answer": (
        {"prompt": zoo.question("what?", 0), **SAID, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
        ["column 'chosen[0]': has an image in a turn of the assistant", "move the image to a turn of the user"],
    ),
    "an image in an earlier answer": (
        {"prompt": [*zoo.question("a", 0), {"role": "assistant", "content": [{"type": "image"}]}, *zoo.question("b", 0)], **SAID},
        ["column 'prompt[1]': has an image in a turn of the assistant"],
    ),
    "an image in a turn between answers": (
        {"prompt": zoo.question("what?", 0), **SAID, "rejected": [*SAID["rejected"], *zoo.question("b"), *SAID["rejected"]], "images": [PICTURE]},
        ["column 'rejected': holds an image", "Images belong to the prompt"],
    ),
    "a placeholder in a completion": (
        {"prompt": f"{PAD}what?", **PLAIN, "chosen": f"yes {PAD}", "image": PICTURE},
        [f"holds the text of the control token {PAD!r} beside an image", "take the token out"],
    ),
    "an image inside its part": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], **SAID},
        ["has an image part that holds 'image' itself", 'Put images into a column "images"'],
    ),
    "a video in a message": (
        {"prompt": [{"role": "user", "content": [{"type": "video"}]}], **SAID},
        ["column 'prompt[0]': has a content part of type 'video'"],
    ),
    "both columns": (asks(1, image=PICTURE, images=[PICTURE]), ["column 'images': is filled, and so is 'image'"]),
    "a list as image": (asks(1, image=[PICTURE]), ["column 'image': is a list of 1", "Call the column 'images'"]),
    "a video": (asks(1, images=[PICTURE], video="a.mp4"), ["column 'video': holds what cannot be trained on", "remove_columns('video')"]),
    "videos": (asks(1, images=[PICTURE], videos=["a.mp4"]), ["column 'videos': holds what cannot be trained on"]),
    "sound": (asks(1, images=[PICTURE], audio=b"RIFF"), ["column 'audio': holds what cannot be trained on"]),
    "a number": (asks(1, image=3), ["image 0: the image is of type int. Give a PIL image"]),
    "floats": (asks(1, image=np.zeros((8, 8, 3))), ["image 0: the image is an array of float64 [8, 8, 3]"]),
    "nothing by name": (asks(1, image={"url": "x"}), ["has neither bytes nor a path (it has: url)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_bad_rows_are_refused_by_name(name):
    row, words = SHAPES[name]
    said = refusal(prepare, as_dataset([asks(1, image=PICTURE), row]))
    assert said.startswith("Row 1 of train, ")
    assert all(word in said for word in words), said


def test_a_placeholder_in_a_completion_is_refused_where_control_tokens_may_be():
    row = {"prompt": f"{PAD}what?", **PLAIN, "chosen": f"yes {PAD}", "image": PICTURE}
    said = refusal(prepare, [row], allow_special_tokens_in_text=True)
    assert said.startswith(
        "Row 0 of train, column 'chosen or rejected': holds '<|image_pad|>', which stands for an image"
    )


def test_a_declared_video_is_refused_before_anything_is_read():
    table = Dataset.from_list([asks(1, image=PICTURE, video="a.mp4")]).cast_column("video", Video())
    assert "train has a column 'video', which cannot be trained on here" in refusal(prepare, table)
    assert "remove_columns('video')" in refusal(prepare, table.to_iterable_dataset())


def test_sizes_that_only_some_processors_refuse():
    """Wider than 200 times its height; the smallest there is."""
    for size in ((1, 1), (1, 600), (600, 1)):
        row = asks(1, image=PIL.Image.new("RGB", size))
        assert len(prepare([row], "idefics3")) == 1
        if max(size) > 200:
            assert f"refuses its {size[0]} x {size[1]} pixels" in refusal(prepare, [asks(1, image=PICTURE), row])


# --- models that see, and models that do not ---


@pytest.mark.parametrize(
    "row",
    [
        asks(0, image=PICTURE),
        asks(0, images=[PICTURE]),
        asks(1),
        {"prompt": "what?", **PLAIN, "image": PICTURE},
        {"prompt_ids": [4, 5], "chosen_ids": [6], "rejected_ids": [7], "images": [PICTURE]},
    ],
    ids=["image", "images", "part", "text", "token ids"],
)
def test_images_need_a_model_that_sees(row, tmp_path):
    rows = Dataset.from_list([row])
    said = refusal(prepare, rows, None)
    assert said == refusal(tiny.trainer, tmp_path, train=rows)
    assert said.startswith("Row 0 of train, column 'images': holds images, and the model reads text alone. Train a ")
    assert "processor (processing_class), or take the images out: dataset.remove_columns" in said


@pytest.mark.parametrize("empty", [None, []])
@pytest.mark.parametrize("streamed", [False, True])
def test_empty_columns_of_images_are_none(empty, streamed, tmp_path):
    """For models that see and for those that do not."""
    rows = [row | {"images": empty, "image": None} for row in tiny.chat_rows(4)]
    dataset = Dataset.from_list(rows).to_iterable_dataset() if streamed else Dataset.from_list(rows)
    want = [row["prompt_ids"] for row in prepare(tiny.chat_rows(4), None)]
    assert [row["prompt_ids"] for row in prepare(dataset, None)] == want
    assert len(prepare(dataset)) == 4
    if not streamed:
        assert len(tiny.losses(tiny.trained(tmp_path, train=dataset, max_steps=1))) == 1


def train(folder: Path, rows: Any, **options: Any) -> DPOTrainer:
    model, processor = zoo.ZOO["qwen2_vl"]()
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = tiny.config(folder, per_device_train_batch_size=2, max_steps=1, **options)
    return DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)


def test_a_processor_needs_a_model_that_sees(tmp_path):
    rows = Dataset.from_list([asks(1, image=PICTURE)])
    said = refusal(tiny.trainer, tmp_path, train=rows, parts={"processing_class": pair()[1]})
    assert (
        "processing_class is a Qwen2VLImages, which makes inputs of images, and LlamaForCausalLM reads text alone"
        in said
    )
    assert "pass the tokenizer (processor.tokenizer)" in said


def test_a_tokenizer_is_not_enough_for_images(tmp_path):
    model, processor = pair()
    rows, args = Dataset.from_list([asks(1, image=PICTURE)]), tiny.config(tmp_path)
    said = refusal(
        lambda: DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=processor.tokenizer)
    )
    assert "Row 0 of train, column 'images': holds images" in said
    assert "with its processor (processing_class)" in said


@pytest.mark.parametrize("name", ["missing", "cut short", "too narrow"])
def test_the_trainer_refuses_bad_images_at_once(name, tmp_path):
    image, says = IMAGES[name]
    fine = "x" if isinstance(image, str) else encoded(PICTURE)
    if fine == "x":
        (tmp_path / "x").write_bytes(encoded(PICTURE))
    said = refusal(train, tmp_path, [asks(1, image=fine), asks(1, image=image)], image_root=str(tmp_path))
    assert said.startswith("Row 1 of train, image 0: the image")
    assert says in said


# --- what has changed since the rows were prepared ---

CHANGES: dict[str, tuple[bytes | None, str]] = {
    "deleted": (None, "does not exist. Mend the path"),
    "emptied": (b"", "holds no bytes. Fetch it again"),
    "cut short": (JPEG[:-300], "is truncated. Fetch the file again"),
    "replaced": (b"hello, world", "is not a supported image"),
    "corrupt": (CORRUPT, "cannot be decoded"),
}


def changed(path: Path, name: str) -> str:
    """What is said of it from now on."""
    data, says = CHANGES[name]
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    return says


@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_has_changed_is_named_when_a_batch_is_collated(name, cached, tmp_path):
    model, processor = pair()
    files = [tmp_path / f"{number}.jpg" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(encoded(zoo.noise(number), "JPEG"))
    rows = prepare([asks(1, images=[str(files[0])]), asks(2, images=[str(files[1]), str(files[2])])])
    cache = str(tmp_path / "cache") if cached else None
    images = ImageInputs(ImageText(processor, ImageAccess()), sight_of(model), cache=cache)
    collate = DataCollatorForPreference(pad_token_id=0, images=images)
    assert collate(rows)["images"].count == (1, 2)
    says = changed(files[2], name)
    said = refusal(collate, rows)
    assert said.startswith(f"Row 1 of the batch, image 1: the image '{files[2]}' ")
    assert says in said
    assert collate(rows[:1])["images"].count == (1,)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_has_changed_stops_training_by_name(workers, tmp_path):
    file = tmp_path / "x.jpg"
    file.write_bytes(JPEG)
    rows = [asks(1, images=[encoded(PICTURE)]), asks(1, images=[str(file)])]
    table = Dataset.from_list(
        [
            row
            | {
                "images": [
                    {"path": None, "bytes": i} if isinstance(i, bytes) else {"path": i, "bytes": None}
                    for i in row["images"]
                ]
            }
            for row in rows
        ]
    )
    trainer = train(tmp_path, table, dataloader_num_workers=workers)
    says = changed(file, "cut short")
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert f"Row 1 of the batch, image 0: the image '{file}' {says}" in str(error.value)


# --- what may look bad, and is not ---


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "I;16", "I", "F"])
def test_images_of_other_modes_are_rgb(mode):
    """As rows see them: 8 bit RGB with the tokens of their size."""
    levels = np.asarray(PICTURE.convert("L"))
    if mode == "I;16":
        image = PIL.Image.fromarray(levels.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = PIL.Image.fromarray(levels.astype({"I": np.int32, "F": np.float32}[mode]))
    else:
        image = PICTURE.convert(mode)
    assert image.mode == mode
    kind = "PNG" if mode in ("L", "1", "LA", "RGBA", "P", "I;16") else "TIFF"
    rows = [asks(1, image=encoded(image, kind)), asks(1, image=encoded(PICTURE))]
    model, processor = pair()
    got, plain = prepare(rows)
    assert got["prompt_ids"] == plain["prompt_ids"]
    images = ImageInputs(ImageText(processor, ImageAccess()), sight_of(model))
    batch = DataCollatorForPreference(pad_token_id=0, images=images)([got])["images"]
    want = processor.image_processor(images=[ImageAccess().open(encoded(image, kind), "")], return_tensors="pt")
    assert (batch.inputs["pixel_values"] == want["pixel_values"]).all()
    if mode in ("L", "I;16", "I", "F"):  # the same grey levels, however they are written
        want = processor.image_processor(images=[PICTURE.convert("L").convert("RGB")], return_tensors="pt")
        assert (batch.inputs["pixel_values"] - want["pixel_values"]).abs().max() < 1e-6


# --- processors ---


def idefics2() -> Any:
    """Its processor writes images by itself, and says nothing of where."""
    words = zoo.tokenizer(pad="<pad>", eos="</s>", others=["<image>", "<fake_token_around_image>"])
    return transformers.Idefics2Processor(transformers.Idefics2ImageProcessorPil(), words, image_seq_len=4)


def test_a_processor_that_does_not_say_where_images_stand_is_refused_by_name(tmp_path):
    model, processor = zoo.ZOO["qwen2_vl"]()
    with pytest.raises(ValueError, match=r"Idefics2Processor does not say how it writes images into text.*Idefics3"):
        tiny.trainer(tmp_path, model=model, parts={"processing_class": idefics2()})

    class Quiet(type(processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, return_text_replacement_offsets: bool = False, **how: Any) -> Any:
            return super().__call__(*args, **how)

    processor.__class__ = Quiet
    with pytest.raises(ValueError, match=r"Quiet does not write an image into text as other processors do \(KeyError"):
        tiny.trainer(tmp_path, model=model, parts={"processing_class": processor})
