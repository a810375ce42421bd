"""The images of a row find their places in its prompt."""

from __future__ import annotations

from dataclasses import replace

from ...types import Message, Pair
from ..errors import bad
from ..images.source import check_count
from .messages import image_count, words_of

USUAL = "<image>"
"""Marks an image in the messages of most datasets, whatever the placeholder of a processor is."""


def check_none_is_shown(shown: bool, where: str) -> None:
    """ValueError for a row with images where no processor is there to make anything of them."""
    if shown:
        remedy = (
            "Train a vision-language model with its processor (processing_class), or take the images out: "
            "dataset.remove_columns"
        )
        raise bad(where, "images", "holds images, and the model reads text alone", remedy)


def has_images(pair: Pair) -> bool:
    """In a column of its row, or as parts of its messages."""
    return bool(pair.images) or (not isinstance(pair.prompt, str) and any(map(image_count, pair.prompt)))


def placed(pair: Pair, placeholder: str, where: str) -> Pair:
    """A prompt with a place for each image of the row.

    Messages without any image part get them: at the processor's `placeholder` (else at each `<image>`) in their text where there
    are as many, and in front of the first turn of the user where there are none.

    Raises:
        ValueError: where places and images differ in number.
    """
    if isinstance(pair.prompt, str):
        check_count(pair.prompt.count(placeholder), len(pair.images), where, f"{placeholder!r}")
        return pair
    blocks = sum(map(image_count, pair.prompt))
    if blocks == 0 and pair.images:
        pair = replace(pair, prompt=_with_image_blocks(pair.prompt, placeholder, len(pair.images), where))
    else:
        check_count(blocks, len(pair.images), where, '{"type": "image"}')
    return pair


def _with_image_blocks(prompt: list[Message], placeholder: str, images: int, where: str) -> list[Message]:
    for mark in (placeholder, USUAL):
        written = sum(words_of(message).count(mark) for message in prompt)
        if written:
            check_count(written, images, where, f"{mark!r}")
            return [
                {**message, "content": _split(message["content"], mark)}
                if mark in message.get("content", "")
                else message
                for message in prompt
            ]
    first = next((number for number, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise bad(where, "prompt", "has no turn of the user to put the images in", 'Give parts {"type": "image"}')
    content = [{"type": "image"}] * images + [{"type": "text", "text": prompt[first].get("content", "")}]
    return [*prompt[:first], {**prompt[first], "content": content}, *prompt[first + 1 :]]


def _split(text: str, mark: str) -> list[dict[str, str]]:
    """Parts of a message: what stands around each mark, and an image in its place."""
    blocks: list[dict[str, str]] = []
    for number, words in enumerate(text.split(mark)):
        blocks += [{"type": "image"}] if number else []
        blocks += [{"type": "text", "text": words}] if words else []
    return blocks
