"""Rows with images -> what a vision-language model takes besides token ids: pixels, positions, who sees whom.

Images are processed one by one, when a batch is collated, in whichever loader worker does that. The flat row has the
prompt once, and so each image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...storage.folders import atomic_write
from ...types import ImageBatch, ImageTensors, ModelSight, PairIds, TokenizedPair
from ..errors import clean, row_name
from .source import ImageSource
from .text import ImageText, processed

PROBE = 64
"""Width and height of the image that a layout is checked with."""


class ImageInputs:
    """Makes the inputs of images for one model. Picklable, for loader workers.

    Args:
        text: the processor, and where images may be read from.
        sight: of the model.
        cache: folder for processed images; None: each is processed again when its row comes again.
        always: a batch without an image gets a blank one that no pair sees, so that the vision tower has its part in every
            backward, and on all ranks alike.
    """

    def __init__(self, text: ImageText, sight: ModelSight, *, cache: str | None = None, always: bool = False):
        self.text, self.sight, self.cache, self.always = text, sight, cache, always

    # --- one image ---

    def load(self, row: TokenizedPair) -> TokenizedPair:
        """The row with its images processed. What is wrong with one of them is said with the row's name."""
        if all(isinstance(image, ImageTensors) for image in row.images):
            return row
        where = row_name(row.example_id, "the batch")
        self.text.check_features(PairIds(row.prompt_ids, []), self.text.sizes(row.images, where), where)
        images = tuple(self._load(image, f"{where}, image {number}") for number, image in enumerate(row.images))
        return replace(row, images=images)

    def _load(self, value: Any, where: str) -> ImageTensors:
        source = self.text.access.source(value, where)  # says so where it may not be read, in a cache or not
        if self.cache is None:
            return self._processed(source.open(), where)
        path = Path(self.cache) / self.text.fingerprint / f"{_name_of(source)}.safetensors"
        known = _read(path)
        if known is None:
            known = self._processed(source.open(), where)
            _write(path, known)
        return known

    def _processed(self, image: Image.Image, where: str) -> ImageTensors:
        try:
            _, tensors = processed(self.text.processor, image)
        except Exception as error:  # whatever a processor thinks of an image
            raise ValueError(f"{where}: the image processor refuses it: {clean(error)}. Leave the row out.") from error
        pixels = xxhash.xxh3_128(image.tobytes())
        pixels.update(f"{image.size} {self.text.fingerprint}".encode())
        return ImageTensors(tensors=tensors, digest=pixels.digest())

    @cached_property
    def blank(self) -> tuple[list[int], ImageTensors]:
        """Token ids and tensors of an image that says nothing."""
        return self._made(Image.new("RGB", (PROBE, PROBE), "white"))

    @cached_property
    def probe(self) -> tuple[list[int], ImageTensors]:
        """Of one that says much: noise."""
        noise = np.random.default_rng(0).integers(0, 256, (PROBE, PROBE, 3), dtype=np.uint8)
        return self._made(Image.fromarray(noise))

    def _made(self, image: Image.Image) -> tuple[list[int], ImageTensors]:
        ids = self.text.write_ids([self.text.tokenizer.convert_tokens_to_ids(self.text.placeholder)], [image.size], "")
        return ids, self._processed(image, "")

    # --- a batch of them ---

    @cached_property
    def _axis(self) -> dict[str, int]:
        """Along which axis of each tensor images stand: where two of them are twice as long as one."""
        image = Image.new("RGB", (PROBE, PROBE))
        processor = self.text.processor
        _, one = processed(processor, image)
        two = processor(
            images=[[image] * 2], text=[processor.image_token * 2], return_tensors="pt", add_special_tokens=False
        )
        axes = {}
        for name, x in one.items():
            doubled = [d for d, (a, b) in enumerate(zip(x.shape, two[name].shape, strict=True)) if b == 2 * a]
            if not doubled:
                raise ValueError(
                    f"{type(processor).__name__} makes {name} of shape {tuple(x.shape)} for one image and "
                    f"{tuple(two[name].shape)} for two, which cannot be put together image by image: models with this processor "
                    "cannot be trained on images here."
                )
            axes[name] = doubled[0]
        return axes

    def joined(self, rows: Sequence[Sequence[ImageTensors]]) -> ImageBatch | None:
        """The images of all rows; None where they have none. Smaller ones are filled up with zeros, as processors do."""
        images = [image for of_row in rows for image in of_row]
        if not images:
            return None
        inputs = {}
        for name, axis in self._axis.items():
            tensors = [image.tensors[name] for image in images]
            shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
            inputs[name] = torch.cat([_filled_up(tensor, shape, axis) for tensor in tensors], dim=axis)
        return ImageBatch(
            inputs=inputs,
            axis=self._axis,
            extent=tuple(
                {name: image.tensors[name].shape[axis] for name, axis in self._axis.items()} for image in images
            ),
            digests=tuple(image.digest for image in images),
            count=tuple(map(len, rows)),
        )

    # --- the tokens around them ---

    def token_types(self, texts: Sequence[tuple[list[int], list[int]]], width: int) -> dict[str, dict[str, Tensor]]:
        """What the model is told of each token of padded rows, prompt and completion of each: {argument: [R, width]}."""
        if self.sight.types is None:
            return {}
        rows = [
            torch.tensor([0] * len(prompt) + [1] * len(ids))
            if self.sight.mutual == "prompt"
            else self._image_types([*prompt, *ids])
            for prompt, ids in texts
        ]
        return {"token_types": {self.sight.types: torch.stack([F.pad(row, (0, width - len(row))) for row in rows])}}

    def _image_types(self, ids: list[int]) -> Tensor:
        return torch.tensor(self.text.processor.create_mm_token_type_ids([ids])[0])

    def mutual(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """Stretches of a prompt whose tokens see each other both ways."""
        if self.sight.mutual == "prompt":
            return [(0, len(prompt))]
        return self._runs(prompt) if self.sight.mutual == "images" else []

    def _runs(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """Stretches of image tokens."""
        runs, place = [], 0
        for is_image, group in groupby(prompt, key=self.text.image_ids.__contains__):
            end = place + sum(1 for _ in group)
            runs += [(place, end)] if is_image else []
            place = end
        return runs

    def positions(self, row: TokenizedPair) -> list[Tensor] | None:
        """[3, tokens] of the prompt with the first completion, then of each further completion: as the model's helper has
        them for the prompt with each. None where positions just count."""
        if self.sight.positions is None:
            return None
        helper, prompt = self.sight.positions, row.prompt_ids
        if not row.images:
            ends = [torch.arange(len(prompt) + len(ids)).expand(3, -1) for ids in row.completions]
        else:
            batch = self.joined([row.images])
            grids = {name: x for name, x in batch.inputs.items() if "grid" in name} if batch else {}
            ends = [
                helper(
                    input_ids=torch.tensor([[*prompt, *ids]]),
                    mm_token_type_ids=self._image_types([*prompt, *ids])[None],
                    **grids,
                )[0][:, 0]
                for ids in row.completions
            ]
        return [whole[:, len(prompt) * bool(number) :] for number, whole in enumerate(ends)]


def _filled_up(tensor: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    missing = [0 if d == axis else most - size for d, (size, most) in enumerate(zip(tensor.shape, shape, strict=True))]
    return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor


# --- processed images on disk ---


def _name_of(source: ImageSource) -> str:
    """What an image is, without decoding it: its bytes or pixels, or which file it is and when that was written."""
    if source.data is not None:
        return xxhash.xxh3_128_hexdigest(source.data)
    if source.image is not None:
        image = source.image
        return xxhash.xxh3_128_hexdigest(f"{image.mode} {image.size} ".encode() + image.tobytes())
    path = str(source.path)
    about = os.stat(path) if os.path.exists(path) else None  # opening it raises the error that it is missing
    file = f"{os.path.realpath(path)} {about and (about.st_mtime_ns, about.st_size)}"
    return xxhash.xxh3_128_hexdigest(file.encode())


def _read(path: Path) -> ImageTensors | None:
    """None where it is not there, or not whole."""
    try:
        with safe_open(path, "pt") as file:
            digest, _, checksum = file.metadata()["digest"].partition(":")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        if checksum and checksum != _checksum(tensors):  # an earlier release wrote none
            return None
        return ImageTensors(tensors=tensors, digest=bytes.fromhex(digest))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write(path: Path, image: ImageTensors) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in image.tensors.items()}
    with atomic_write(path) as part:
        save_file(tensors, part, metadata={"digest": f"{image.digest.hex()}:{_checksum(tensors)}"})


def _checksum(tensors: dict[str, Tensor]) -> str:
    found = xxhash.xxh3_128()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
