"""Every type that flows: Pair -> TokenizedPair -> PairBatch -> PairLogps.

N pairs   C completions   R rows   L tokens in a row   M scored tokens   S segments of a flat row
log-probs: nats, float32, summed over a completion unless the name says mean
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

Message = dict[str, Any]
"""One chat turn: {"role": ..., "content": ...} and whatever else the chat template reads."""

Text: TypeAlias = "str | list[Message]"
"""A prompt or a completion, before tokenization."""

Span: TypeAlias = tuple[int, int, int]
"""Tokens `start` to `end` of a completion: (number of the completion, start, end)."""


class Preferred(NamedTuple):
    """That one completion of a prompt is better than another: their numbers among the completions of the row."""

    chosen: int
    rejected: int
    margin: float | None = None  # by how much, in the unit of the judge; None where it is not known


ONE_PAIR = (Preferred(0, 1),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One row, before tokenization: strings, or lists of chat messages (all of the same form).

    Mostly that is one preference, `chosen` over `rejected`. A ranked row has `more` completions of the same prompt, and
    `pairs` says which of them all (`completions`) are compared.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    more: tuple[Text, ...] = ()
    pairs: tuple[Preferred, ...] = ONE_PAIR
    tools: list[dict] | None = None
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: tuple[Any, ...] = ()  # of the prompt, as the row holds them, in the order of their places in it
    roles_renamed: bool = False  # messages had roles of other tools, such as human and gpt

    @classmethod
    def of(cls, prompt: Text, completions: Sequence[Text], pairs: Sequence[Preferred], **options: Any) -> Pair:
        chosen, rejected, *more = completions
        return cls(prompt=prompt, chosen=chosen, rejected=rejected, more=tuple(more), pairs=tuple(pairs), **options)

    @property
    def completions(self) -> tuple[Text, ...]:
        """K completions, numbered as `pairs` counts them."""
        return self.chosen, self.rejected, *self.more


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTensors:
    """One image, processed: what the model's forward takes of it, by name, and what tells it from any other."""

    tensors: dict[str, Tensor]
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPair:
    """One row as token ids. `prompt_ids` stands before every completion, token for token.

    `unscored` lists stretches of completions that the model reads but does not answer for (a tool's reply):
    (number of the completion, start, end). They never meet the loss; every completion has a scored token.
    """

    example_id: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    more_ids: Sequence[list[int]] = ()
    pairs: Sequence[Preferred] = ONE_PAIR
    unscored: Sequence[Span] = ()
    weight: float = 1.0  # of each of its pairs
    images: Sequence[Any] = ()  # of the prompt: as the row holds them, or `ImageTensors` once they are loaded

    @property
    def completions(self) -> list[list[int]]:
        """[K] lists of token ids, numbered as `pairs` and `unscored` count them."""
        return [self.chosen_ids, self.rejected_ids, *self.more_ids]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """How attention runs in one flat row: S segments that follow each other and fill it.

    The tokens of a segment see each other causally, after all `prefix_length[s]` tokens that start at `prefix_start[s]`, where
    another segment starts that is as long at least. `prompt | chosen | rejected` is two segments: prompt + chosen without a
    prefix, and rejected with the prompt as its prefix; every further completion is one more of the latter kind. Lives on the
    host; the index tensors for variable-length kernels are made on demand.

    `mutual` lists stretches (start, end) of the row, none across two segments, whose tokens see each other both ways: the
    tokens of an image, where the model has them so.
    """

    length: tuple[int, ...]
    prefix_start: tuple[int, ...]
    prefix_length: tuple[int, ...]
    mutual: tuple[tuple[int, int], ...] = ()

    @cached_property
    def _memo(self) -> dict[Any, Any]:
        return {}

    def remember(self, key: Any, make: Callable[[], T]) -> T:
        """What all layers of this batch, of policy and reference, need alike: masks, index tensors."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def forget(self) -> None:
        """Let go of all that: it would live as long as the batch, and those of an optimizer step live until its end."""
        self._memo.clear()

    def varlen(self, device: torch.device) -> VarlenIndex:
        """The same segments as index tensors on `device`."""
        return self.remember(device, lambda: VarlenIndex.of(self, device))


@dataclass(frozen=True, kw_only=True)
class VarlenIndex:
    """`Segments` as variable-length attention kernels want them: queries in row order, keys gathered as prefix + segment."""

    cu_queries: Tensor  # [S + 1] int32
    cu_keys: Tensor  # [S + 1] int32
    keys_at: Tensor  # [sum of prefix + segment lengths] position in the row of each gathered key
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, segments: Segments, device: torch.device) -> VarlenIndex:
        queries, keys, at, start = [0], [0], [], 0
        for length, prefix, n_prefix in zip(
            segments.length, segments.prefix_start, segments.prefix_length, strict=True
        ):
            at += [torch.arange(prefix, prefix + n_prefix), torch.arange(start, start + length)]
            start += length
            queries.append(start)
            keys.append(keys[-1] + n_prefix + length)

        def to_device(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=True)

        return cls(
            cu_queries=to_device(torch.tensor(queries, dtype=torch.int32)),
            cu_keys=to_device(torch.tensor(keys, dtype=torch.int32)),
            keys_at=to_device(torch.cat(at)),
            max_queries=max(segments.length),
            max_keys=max(n + p for n, p in zip(segments.length, segments.prefix_length, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """The images of a batch as the model takes them, one behind the other in the order of their places.

    `inputs` are arguments of the model's forward; along `axis[name]` an image has `extent[image][name]` entries, and row r of
    the batch has `count[r]` images.
    """

    inputs: dict[str, Tensor]
    axis: dict[str, int]
    extent: tuple[dict[str, int], ...]
    digests: tuple[bytes, ...]
    count: tuple[int, ...]

    def to(self, device: torch.device, **options: Any) -> ImageBatch:
        moved = {name: tensor.to(device, **options) for name, tensor in self.inputs.items()}
        return dataclasses.replace(self, inputs=moved)

    def pin_memory(self) -> ImageBatch:
        return dataclasses.replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})

    def by_row(self) -> list[tuple[ImageTensors, ...]]:
        """Taken apart again."""
        pieces = {
            name: tensor.split([extent[name] for extent in self.extent], dim=self.axis[name])
            for name, tensor in self.inputs.items()
        }
        images = iter(
            ImageTensors(tensors={name: pieces[name][number] for name in pieces}, digest=digest)
            for number, digest in enumerate(self.digests)
        )
        return [tuple(next(images) for _ in range(count)) for count in self.count]


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """N preference pairs over C completions, laid out in R rows of L tokens (flat: one row; padded: one per completion).

    Scored tokens are listed in the order of their completions. Every count that the host needs is a Python int, so that
    nothing on an accelerator is waited for.
    """

    example_ids: Tensor  # [N] dataset row of each pair: its name in error messages
    weight: Tensor  # [N] float32, weight of the pair in the mean; 0 for a row that only fills an uneven batch
    input_ids: Tensor  # [R, L]
    score_at: Tensor  # [M] index into the R * L positions: the state that predicts the token
    target_ids: Tensor  # [M] the completion token predicted there
    completion: Tensor  # [M] in [0, C): the completion that the scored token belongs to
    completion_position: Tensor  # [M] 0, 1, 2 ... within its completion
    lengths: Tensor  # [C] scored tokens of each completion
    chosen: Tensor  # [N] in [0, C): a pair is two completions, so that K samples of a prompt need no copies
    rejected: Tensor  # [N] in [0, C)
    num_tokens: int  # tokens computed, without padding
    margin: Tensor | None = None  # [N] float32, by how much chosen is better, as the data says; NaN where it does not
    position_ids: Tensor | None = (
        None  # [R, L] or [3, R, L], flat: every completion continues from the end of its prompt
    )
    attention_mask: Tensor | None = None  # [R, L] padded: 1 for a token, 0 for padding
    segments: Segments | None = None  # flat: who sees whom
    keys: tuple[bytes, ...] | None = (
        None  # [C] what each completion is (data/content.py), on the host; None: not asked for
    )
    pairs_by_rank: tuple[int, ...] | None = None  # N of every rank, on the host; None: not asked for
    images: ImageBatch | None = None
    token_types: dict[str, Tensor] | None = None  # {argument of the model: [R, L]} padded: which tokens are an image's
    tokenized_rows: Sequence[TokenizedPair] | None = None  # what was collated, on the host, without the images

    @property
    def is_flat(self) -> bool:
        return self.segments is not None

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], device: torch.device | None = None) -> PairBatch:
        """What a collator returned, possibly one written for another library (see `from_completion_mask`).

        Raises:
            ValueError: for a batch in parts (`micro_batches`), each of which is one.
        """
        if MICRO_BATCHES in inputs:
            raise ValueError(
                "This batch comes in parts, each a PairBatch of its own: take them from micro_batches(inputs), or collate whole "
                "batches with DataCollatorForPreference(..., max_tokens=None, pack_tokens=None)."
            )
        if device is not None:
            inputs = sent(dict(inputs), device)
        if "score_at" not in inputs:
            return cls.from_completion_mask(inputs)
        return cls(**{f.name: inputs[f.name] for f in dataclasses.fields(cls) if f.name in inputs})

    @classmethod
    def from_completion_mask(cls, inputs: Mapping[str, Any]) -> PairBatch:
        """Rows as other DPO trainers collate them: [2N, L], chosen rows first, `completion_mask` 1 on completion tokens."""
        missing = {"input_ids", "attention_mask", "completion_mask"} - set(inputs)
        if missing:
            raise ValueError(
                f"The data collator's batch lacks {sorted(missing)}. Use DataCollatorForPreference, or return "
                "input_ids, attention_mask and completion_mask of shape [2N, L], chosen rows first."
            )
        if pixels := sorted(name for name in inputs if name.startswith(("pixel_", "image_"))):
            raise ValueError(
                f"The data collator's batch has {', '.join(pixels)}, which would not reach the model: images are collated by "
                "DataCollatorForPreference, or a subclass of it."
            )
        input_ids, mask = inputs["input_ids"], inputs["completion_mask"].bool()
        rows, length = input_ids.shape
        if rows % 2:
            raise ValueError(f"A padded batch has chosen rows, then rejected rows: {rows} rows cannot be halved.")
        if mask[:, 0].any():
            raise ValueError(
                "completion_mask marks the first token of a row: nothing predicts it. Prompts need a token."
            )
        completion, column = mask.nonzero(as_tuple=True)
        lengths = mask.sum(1)
        if not lengths.all():
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(
                f"completion_mask marks no token in row {row}: every row needs a completion. Drop such pairs."
            )
        first = lengths.cumsum(0) - lengths
        pairs = torch.arange(rows // 2, device=input_ids.device)
        example_ids = inputs.get("example_ids", pairs)
        return cls(
            example_ids=example_ids,
            weight=pair_weight(inputs),
            input_ids=input_ids,
            attention_mask=inputs["attention_mask"],
            score_at=completion * length + column - 1,
            target_ids=input_ids[completion, column],
            completion=completion,
            completion_position=torch.arange(len(completion), device=input_ids.device) - first[completion],
            lengths=lengths,
            chosen=pairs,
            rejected=pairs + rows // 2,
            num_tokens=int(inputs["attention_mask"].sum()),
            margin=inputs.get("margin"),
            tokenized_rows=_masked_rows(input_ids.tolist(), mask.tolist(), example_ids.tolist()),
        )


def _masked_rows(tokens: list[list[int]], mask: list[list[bool]], example_ids: list[int]) -> list[TokenizedPair]:
    """Return the N pairs of [2N, L] tokens: the prompt ends where `mask` first marks a token of a completion."""
    completions = [
        [token for token, marked in zip(*row, strict=True) if marked] for row in zip(tokens, mask, strict=True)
    ]
    number = len(example_ids)
    return [
        TokenizedPair(
            example_id=example_ids[n],
            prompt_ids=tokens[n][: mask[n].index(True)],
            chosen_ids=completions[n],
            rejected_ids=completions[n + number],
        )
        for n in range(number)
    ]


def with_scored_tokens(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a collator returned, with what `PairBatch.from_completion_mask` reads from its masks, if it is one for other
    libraries. Its own entries stay, and stay first: accelerate and Trainer take the batch size from the first tensor."""
    if MICRO_BATCHES in inputs or "score_at" in inputs:
        return dict(inputs)
    batch = PairBatch.from_completion_mask(inputs)
    read = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in inputs}
    return {**inputs, **{name: value for name, value in read.items() if value is not None}}


def sent(data: T, device: torch.device) -> T:
    """Every tensor in `data` on `device`, without waiting for it: a GPU computes with them once they are there."""
    return send_to_device(data, device, non_blocking=device.type == "cuda")


MICRO_BATCHES = "micro_batches"
"""Key of the parts of a batch that a collator cut."""


def micro_batches(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of what a collator returned, each with the inputs of a forward: one, where it was not cut."""
    return inputs.get(MICRO_BATCHES) or [inputs]


def pair_weight(inputs: Mapping[str, Any]) -> Tensor:
    """[N] weight of each pair of a collated batch, ours or one of another library: chosen rows, then rejected rows."""
    if "weight" in inputs:
        return inputs["weight"]
    rows = inputs["input_ids"]
    return torch.ones(len(rows) // 2, device=rows.device)


def pair_row(inputs: Mapping[str, Any]) -> Tensor:
    """[N] row of the device batch that each pair belongs to. Collators of other libraries do not say, and have one pair a row."""
    if "row" in inputs:
        return inputs["row"]
    weight = pair_weight(inputs)
    return torch.arange(len(weight), device=weight.device)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Around arithmetic on `tensor` that mixed precision must leave alone.

    Autocast rounds the inputs of some operations (products of vectors among them) to its dtype, also where they are float32.
    """
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


def widest_float(device: torch.device) -> torch.dtype:
    """What sums are added up in: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, kw_only=True)
class TokenLogps:
    """Per scored token; what only some losses and metrics need is None unless it was asked for."""

    logps: Tensor  # [M] log-prob of the token
    completion: Tensor  # [M] in [0, C)
    position: Tensor  # [M] 0, 1, 2 ... within the completion
    chosen: Tensor  # [N] in [0, C)
    rejected: Tensor  # [N] in [0, C)
    lengths: Tensor  # [C]
    entropy: Tensor | None = None  # [M] of the predicted distribution, nats
    is_top1: Tensor | None = None  # [M] 1 where the token is the most likely one
    mean_logit: Tensor | None = None  # [M] mean over the vocabulary
    log_sum_sq: Tensor | None = None  # [M] log of the summed squared probabilities

    def sum_by_completion(self, values: Tensor) -> Tensor:
        """[M] -> [C], float32. Added up in float64: token by token in float32, 700 tokens are off by 0.01 nats."""
        wide = widest_float(values.device)
        sums = torch.zeros(len(self.lengths), dtype=wide, device=values.device)
        return sums.index_add(0, self.completion, values.to(wide)).float()


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Log-probs of N pairs under one model, in batch order."""

    chosen: Tensor  # [N] nats, summed over the completion
    rejected: Tensor  # [N]
    chosen_lengths: Tensor  # [N] scored tokens
    rejected_lengths: Tensor  # [N]
    tokens: TokenLogps | None = None
    aux_loss: Tensor | None = None  # [] load-balancing loss of a mixture-of-experts model

    @classmethod
    def from_tokens(cls, tokens: TokenLogps, aux_loss: Tensor | None = None) -> PairLogps:
        sums = tokens.sum_by_completion(tokens.logps)
        return cls(
            chosen=sums[tokens.chosen],
            rejected=sums[tokens.rejected],
            chosen_lengths=tokens.lengths[tokens.chosen],
            rejected_lengths=tokens.lengths[tokens.rejected],
            tokens=tokens,
            aux_loss=aux_loss,
        )

    def margin(self) -> Tensor:
        """Chosen minus rejected, [N] nats."""
        return self.chosen - self.rejected

    def mean_chosen(self) -> Tensor:
        """[N] nats per token."""
        return self.chosen / self.chosen_lengths

    def mean_rejected(self) -> Tensor:
        """[N] nats per token."""
        return self.rejected / self.rejected_lengths


class Flag(IntFlag):
    """What happened to a row; kept as a column, so that a cached dataset reports as a fresh one does."""

    TRUNCATED_PROMPT = 1
    TRUNCATED_CHOSEN = 2
    TRUNCATED_REJECTED = 4
    MERGED_BOUNDARY = 8
    EMPTY_PROMPT = 16
    IDENTICAL = 32
    NO_ROOM = 64
    EMPTY_COMPLETION = 128
    TOO_LONG = 256
    TIED = 512
    DUPLICATE = 1024
    CONTROL_TEXT = 2048
    GENERATION_DIFFERS = 4096
    REASONING_LEFT_OUT = 8192
    NO_END_OF_TURN = 16384
    ROLES_RENAMED = 32768


class PairIds(NamedTuple):
    """Token ids of a row on its way through the pipeline, and what happened to it so far.

    Completions are numbered as `TokenizedPair.completions` numbers them.
    """

    prompt: list[int]
    completions: list[list[int]]  # at least two
    pairs: tuple[Preferred, ...] = ONE_PAIR  # never empty: without a useful pair the first stays, and flags say why
    unscored: tuple[Span, ...] = ()
    flags: int = 0
    left_out: int = 0  # pairs of a ranked row that are not used: ties, useless ones, those beyond a limit
    images: tuple[tuple[int, int], ...] = ()  # (start, end) in the prompt: what may not be cut, in order

    @property
    def chosen(self) -> list[int]:
        return self.completions[0]

    @property
    def rejected(self) -> list[int]:
        return self.completions[1]

    def drop_pairs(self, useless: Callable[[Preferred], bool], flag: Flag) -> PairIds:
        """Without the useless pairs and without completions that no pair needs; flagged if no pair is left."""
        pairs = [pair for pair in self.pairs if not useless(pair)]
        if len(pairs) == len(self.pairs):
            return self
        if not pairs:
            return self._replace(flags=self.flags | flag)
        used = sorted({number for pair in pairs for number in (pair.chosen, pair.rejected)})
        at = {number: position for position, number in enumerate(used)}
        return self._replace(
            completions=[self.completions[number] for number in used],
            pairs=tuple(pair._replace(chosen=at[pair.chosen], rejected=at[pair.rejected]) for pair in pairs),
            unscored=tuple((at[number], start, end) for number, start, end in self.unscored if number in at),
            left_out=self.left_out + len(self.pairs) - len(pairs),
        )

    def scored(self, number: int) -> int:
        """How many tokens of a completion are scored."""
        return len(self.completions[number]) - sum(end - start for n, start, end in self.unscored if n == number)


@dataclass(frozen=True, kw_only=True)
class ModelSight:
    """How a model treats the tokens of images, as far as a batch must know.

    Args:
        types: the argument of its forward that says which tokens they are; None where it has none.
        mutual: "images" or "prompt": whose tokens see each other both ways; None: all are causal. For "prompt" `types` says 0
            for prompts and 1 for completions instead (PaliGemma).
        positions: its own helper for positions in several dimensions (`get_rope_index`), without its weights.
    """

    types: str | None = None
    mutual: str | None = None
    positions: Callable[..., tuple[Tensor, Any]] | None = None
