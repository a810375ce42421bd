"""Sampling completions, behind one protocol; by `transformers` here.

P prompts   K completions of each   L tokens of the longest prompt
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ...models.unwrap import base_model, evaluation_mode
from ..samples import Completion


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a completion is sampled. `temperature` 0 takes the likeliest token each time."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def greedy(self, max_new_tokens: int | None = None) -> Decoding:
        return replace(self, temperature=0.0, max_new_tokens=max_new_tokens or self.max_new_tokens)


class Generator(Protocol):
    """Where completions come from."""

    def __call__(
        self, model: nn.Module, prompts: Sequence[list[int]], count: int, *, decoding: Decoding, seed: int
    ) -> list[list[Completion]]:
        """[P][K]: `count` completions of each prompt by `model`, as it is wrapped now. The same seed gives the same ones."""


class TransformersGenerator:
    """`model.generate`, with a cache of keys and values, without dropout and without gradient checkpointing.

    Prompts of like length go together, padded on the left; all completions of a prompt are in one batch.

    Args:
        tokenizer: decodes.
        pad_token_id: fills the left of shorter prompts, and the right of shorter completions.
        end_ids: tokens that end a completion.
        batch_size: most completions at once.
    """

    def __init__(self, tokenizer: Any, *, pad_token_id: int, end_ids: Sequence[int], batch_size: int):
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.end_ids = list(dict.fromkeys(end_ids))
        self.batch_size = batch_size

    def __call__(
        self, model: nn.Module, prompts: Sequence[list[int]], count: int, *, decoding: Decoding, seed: int
    ) -> list[list[Completion]]:
        model, inner = extract_model_from_parallel(model), base_model(model)
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        at_once = max(1, self.batch_size // count)
        sampled: list[list[Completion]] = [[] for _ in prompts]
        with torch.no_grad(), evaluation_mode(model), _without_own_defaults(inner), _seeded(seed, inner.device):
            for start in range(0, len(order), at_once):
                places = order[start : start + at_once]
                rows = self._generate(model, [prompts[place] for place in places], count, decoding)
                for place, row in zip((place for place in places for _ in range(count)), rows, strict=True):
                    sampled[place].append(self.completion(row))
        return sampled

    def _generate(self, model: Any, prompts: list[list[int]], count: int, decoding: Decoding) -> list[list[int]]:
        """[P * K] what was written after each prompt, with whatever follows its end."""
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        out: Tensor = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=self._config(decoding, count),
        )
        return out[:, width:].tolist()

    def _config(self, decoding: Decoding, count: int) -> GenerationConfig:
        options = asdict(decoding)
        greedy = decoding.temperature == 0
        if greedy:
            options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
        return GenerationConfig(
            **options,
            do_sample=not greedy,
            num_return_sequences=count,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_token_id,
        )

    def completion(self, ids: list[int]) -> Completion:
        """Up to the token that ends it, that included."""
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        ids = ids if end is None else ids[: end + 1]
        return Completion(ids=ids, text=self.tokenizer.decode(ids, skip_special_tokens=True), finished=end is not None)


PAGE = 256
"""Tokens of a page of the cache of continuous batching."""


class ContinuousGenerator(TransformersGenerator):
    """`model.generate_batch`: continuous batching, in which a completion that ends makes room for the next one at once.

    For many completions of very different lengths on a GPU. On a CPU it is several times slower than `generate`.
    """

    def _generate(self, model: Any, prompts: list[list[int]], count: int, decoding: Decoding) -> list[list[int]]:
        # Pages for all at once; left to itself it would fill the memory. No warm-up, which every call would repeat.
        pages = -(-(max(map(len, prompts)) + decoding.max_new_tokens) // PAGE) + 1
        batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages * len(prompts) * count)
        results = list(  # in the order of the prompts, those of one prompt together
            model.generate_batch(
                inputs=prompts,
                generation_config=self._config(decoding, count),
                continuous_batching_config=batching,
                progress_bar=False,
                warmup=False,
            ).values()
        )
        if len(results) < len(prompts) * count:
            raise RuntimeError(
                f"transformers' continuous batching returned {len(results)} of {len(prompts) * count} completions: its log above "
                "says why. Use --generator transformers."
            )
        return [result.generated_tokens for result in results]


def end_tokens(tokenizer: Any, model: Any, stop_tokens: Sequence[str] | None) -> list[int]:
    """EOS of the tokenizer and of the model's generation config, and those that the user names.

    Raises:
        ValueError: for a stop token that is not one token.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None else [])]
    for text in stop_tokens or ():
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"--stop_tokens {text!r} is {len(ids)} tokens for this tokenizer: name single tokens, such as '<|im_end|>'."
            )
        ends += ids
    return ends


@contextlib.contextmanager
def _without_own_defaults(model: Any) -> Iterator[None]:
    """A model's own generation config fills in what is not set, and there is no list of all that could be."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of their own, and those of training go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
