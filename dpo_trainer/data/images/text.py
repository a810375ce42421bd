"""What a processor writes into text for the images of a prompt.

A prompt marks each image by the processor's placeholder (`<image>`, `<|image_pad|>`, ...), which its chat template writes for a
part {"type": "image"} (image_places.py). The processor puts tokens in its place, and how many depends on the size of the image
alone: so the token ids of a row are known before any image is processed, from its header.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import transformers
from PIL import Image
from transformers import ProcessorMixin

from ...types import Message, PairIds
from ..errors import bad, clean
from ..processor import text_tokenizer
from .pixels import Size
from .source import ImageAccess, check_count

TEXT_OUTPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
REPLACED = "text_replacement_offsets"


def is_processor(processing_class: Any) -> bool:
    """Whether it makes inputs of images too, rather than of text alone."""
    return hasattr(processing_class, "image_processor") and hasattr(processing_class, "tokenizer")


def processed(processor: Any, image: Image.Image) -> tuple[str, dict[str, Any]]:
    """What a processor makes of one image: what stands for it in the text, and what the model takes, as tensors."""
    options = {"return_text_replacement_offsets": True, "return_tensors": "pt", "add_special_tokens": False}
    out = processor(images=[[image]], text=[processor.image_token], **options)
    ((replaced,),) = out.pop(REPLACED)
    return replaced["replacement"], {name: value for name, value in out.items() if name not in TEXT_OUTPUTS}


@dataclass(frozen=True, eq=False)
class ImageText:
    """The text side of a processor. Picklable, for `num_proc`.

    Args:
        processor: a `transformers` processor with an image processor and a tokenizer.
        access: where images may be read from; here their sizes are.
    """

    processor: Any
    access: ImageAccess

    def __post_init__(self):
        name, own = type(self.processor).__name__, getattr(type(self.processor), "replace_image_token", None)
        if own in (None, ProcessorMixin.replace_image_token) or getattr(self.processor, "image_token", None) is None:
            raise ValueError(
                f"{name} does not say how it writes images into text (image_token, replace_image_token), and so its models cannot be "
                "trained here: update transformers, or use a model whose processor does, such as Idefics3 or Qwen3-VL."
            )
        try:
            assert self.image_ids
        except Exception as error:  # whatever a processor does instead of what others do
            raise ValueError(
                f"{name} does not write an image into text as other processors do ({type(error).__name__}: {error}), and so its models "
                "cannot be trained here: update transformers, or use a model with another processor, such as Qwen3-VL."
            ) from error

    @classmethod
    def of(cls, processing_class: Any, access: ImageAccess) -> ImageText | None:
        """Of a processor; None for a tokenizer."""
        return cls(processing_class, access) if is_processor(processing_class) else None

    @property
    def placeholder(self) -> str:
        return self.processor.image_token

    @cached_property
    def image_ids(self) -> frozenset[int]:
        """The token whose embeddings are an image's features: of the processor's `image_token_ids`, which may be those of
        rows and line breaks too, the one that stands most often for an image."""
        own = [number for number in self._ids_of_size((64, 64)) if number in self.processor.image_token_ids]
        ((most, _),) = Counter(own).most_common(1)
        return frozenset([most])

    @cached_property
    def _kept_ids(self) -> frozenset[int]:
        """Of special tokens that stand around images, and are nothing without them: those of rows, columns, begin and end."""
        tokenizer = self.processor.tokenizer
        own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset((special | set(tokenizer.all_special_ids)) - own) | self.image_ids

    @cached_property
    def beside_words(self) -> re.Pattern[str]:
        """Matches the placeholder and the tokens that frame it, which a prompt of plain text writes itself."""
        tokenizer = self.processor.tokenizer
        named = getattr(tokenizer, "special_tokens_map", {})
        about = ("image", "vision", "boi", "eoi")
        frames = {
            str(token) for name, token in named.items() if isinstance(token, str) and any(a in name for a in about)
        }
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        frames |= {token for token in special.union(tokenizer.all_special_tokens) if re.search("vision|image", token)}
        return re.compile("|".join(map(re.escape, sorted({self.placeholder, *frames}, key=len, reverse=True))))

    # --- chat templates ---

    @cached_property
    def _takes_blocks(self) -> bool:
        """Whether the chat template reads contents as lists of parts: those of vision-language models do, or read both."""
        word = "wordtofind"
        try:
            text = self.tokenizer.apply_chat_template(
                self._in_blocks([{"role": "user", "content": word}]), tokenize=False
            )
        except Exception:  # a template may raise anything
            return False
        return word in text and "'type'" not in text

    @cached_property
    def tokenizer(self) -> Any:
        return text_tokenizer(self.processor)

    def for_template(self, messages: list[Message]) -> list[Message]:
        return self._in_blocks(messages) if self._takes_blocks else messages

    def _in_blocks(self, messages: Iterable[Message]) -> list[Message]:
        def blocks(content: Any) -> Any:
            return [{"type": "text", "text": content}] if isinstance(content, str) else content

        return [
            {**message, "content": blocks(message["content"])} if message.get("content") else message
            for message in messages
        ]

    @cached_property
    def _own_bos(self) -> str:
        """The BOS that the tokenizer puts before every text; "" where it puts none."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.bos_token if bos is not None and self.tokenizer.encode("")[:1] == [bos] else ""

    def opened(self, text: Any) -> Any:
        """What a chat template wrote, with the BOS where it leaves that to the tokenizer, as `processor.apply_chat_template` has it."""
        bos = self._own_bos if isinstance(text, str) else [self.tokenizer.bos_token_id] if self._own_bos else []
        return text if text[: len(bos)] == bos else bos + text

    # --- what stands there ---

    def sizes(self, images: Sequence[Any], where: str) -> list[Size]:
        """Of each image; all are such that the processor takes them."""
        found = []
        for number, image in enumerate(images):
            at = f"{where}, image {number}"
            found.append(size := self.access.size(image, at))
            try:
                self._of_size(size)
            except Exception as error:  # whatever a processor thinks of a size
                problem = f"the image processor refuses its {size[0]} x {size[1]} pixels: {clean(error)}"
                raise ValueError(f"{at}: {problem}. Leave the row out.") from error
        return found

    def write(self, prompt: str, sizes: Sequence[Size], where: str) -> str:
        """A prompt as the processor has it: the placeholders replaced, and what it adds of its own."""
        pieces = self._laid_out(prompt, len(sizes))
        check_count(len(pieces) - 1, len(sizes), where, f"{self.placeholder!r}")
        standing = [self._of_size(size) for size in sizes]
        return "".join(piece + image for piece, image in zip(pieces, [*standing, ""], strict=True))

    def write_ids(self, ids: list[int], sizes: Sequence[Size], where: str) -> list[int]:
        """The same of token ids, for a prompt whose words must not be read again (`Rendered.control_text`)."""
        place = self.tokenizer.convert_tokens_to_ids(self.placeholder)
        check_count(ids.count(place), len(sizes), where, f"{self.placeholder!r}")
        edges = [-1, *(at for at, number in enumerate(ids) if number == place), len(ids)]
        words = [ids[start + 1 : end] for start, end in pairwise(edges)]
        standing = [*map(self._ids_of_size, sizes), []]
        out: list[int] = []
        for own, (before, after), image in zip(words, self._added(len(sizes)), standing, strict=True):
            out += [*before, *own, *after, *image]
        return out

    def _added(self, images: int) -> list[list[list[int]]]:
        """What the processor writes before and after the words that stand between images, of its own."""
        word = "wordtofind"
        pieces = self._laid_out(self.placeholder.join([word] * (images + 1)), images)
        return [[self._ids_of(side) for side in piece.split(word)] for piece in pieces]

    def _laid_out(self, prompt: str, images: int) -> list[str]:
        """What stands between the images, with what the processor adds to it."""
        if not images:
            return [prompt]
        blank = [Image.new("RGB", (8, 8))] * images
        _, (prompt,), *_ = self.processor.prepare_inputs_layout(images=[blank], text=[prompt])
        return prompt.split(self.placeholder)

    def _ids_of_size(self, size: Size) -> list[int]:
        return self._ids_of(self._of_size(size))

    def _ids_of(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _of_size(self, size: Size) -> str:
        return _of_size(self, size)

    # --- token ids ---

    def guarded(self, ids: PairIds, where: str) -> PairIds:
        """With the stretches of the prompt that must not be cut: the tokens of each image and those that frame them."""
        if not self.image_ids.isdisjoint(number for completion in ids.completions for number in completion):
            problem = f"holds {self.placeholder!r}, which stands for an image"
            raise bad(where, "chosen or rejected", problem, "Take it out, or move it to the prompt with its image")
        spans: list[tuple[int, int]] = []
        for place, number in enumerate(ids.prompt):
            if number in self.image_ids and (not spans or place >= spans[-1][1]):
                spans.append(self._around(ids.prompt, place))
        return ids._replace(images=tuple(spans)) if spans else ids

    def _around(self, prompt: list[int], place: int) -> tuple[int, int]:
        """The stretch of special tokens that `place` is in, with line breaks between its rows (two tokens at most)."""
        start, end = place, place + 1
        while start and prompt[start - 1] in self._kept_ids:
            start -= 1
        while (
            gap := next((g for g in range(3) if end + g < len(prompt) and prompt[end + g] in self._kept_ids), None)
        ) is not None:
            end += gap + 1
        if prompt[end : end + 1] == [self.tokenizer.bos_token_id]:  # of PaliGemma, behind the last image
            end += 1
        return start, end

    def check_features(self, ids: PairIds, sizes: Sequence[Size], where: str) -> None:
        """As many image tokens as the images of the row have: of token ids that came from elsewhere."""
        have = sum(number in self.image_ids for number in ids.prompt)
        need = sum(number in self.image_ids for size in sizes for number in self._ids_of_size(size))
        if have != need:
            problem = f"has {have} image tokens in its prompt, and its {len(sizes)} images come to {need}"
            raise bad(
                where,
                "prompt_ids",
                problem,
                "Prepare the rows again: a file has changed, or another processor was used",
            )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides what an image becomes."""
        own = self.processor.image_processor.to_json_string()
        plain = {k: v for k, v in vars(self.processor).items() if isinstance(v, str | int | float | bool | None)}
        blocks = [type(self.processor).__qualname__, own, json.dumps(plain, sort_keys=True), transformers.__version__]
        return hashlib.blake2b(json.dumps(blocks).encode(), digest_size=16).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"processor": self.processor, "access": self.access}  # what is cached is made anew


@lru_cache(maxsize=16_384)
def _of_size(images: ImageText, size: Size) -> str:
    """What stands in the text for an image: asked of the processor with a black one."""
    return processed(images.processor, Image.new("RGB", size))[0]
