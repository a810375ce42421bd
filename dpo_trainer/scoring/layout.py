"""Which layout a model allows: asked of its configuration first, then verified on the first batch of a run.

Trust but verify: two short rows are scored in the layout at hand and in the plainest way there is (padded rows, the
model's own attention, all logits), log-probs and gradients. A difference moves the run to the next safer way, loudly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.utils import logging

from ..data.batches.collate import inputs_of, padded_order
from ..data.images.inputs import ImageInputs
from ..models.linear_check import wrong_gradients
from ..models.unwrap import base_model, evaluation_mode
from ..types import PairBatch, Preferred, TokenizedPair
from .attention import why_not_flat
from .logprobs import Scorer

logger = logging.get_logger(__name__)

# Of each log-prob sum and of the gradient that reaches the embeddings, relative. float32: the same products in another
# order, worst seen 3e-6. Half precision: about sqrt(layers) roundings of 2^-8; a wrong mask changes gradients by 0.3 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
CHECK_TOKENS = 48


def reason_for_padding(scorer: Scorer, model: nn.Module) -> str | None:
    """Why this model cannot take flat rows, as far as can be known before the first batch."""
    if not scorer.through_head:
        return "it has no output embedding, so that all logits of a batch must be held"
    if any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values()):
        return "prompt-learning adapters put virtual tokens in front of a row"
    if any(getattr(c, "alora_invocation_tokens", None) for c in getattr(model, "peft_config", {}).values()):
        return "aLoRA looks for its invocation tokens once in a row"
    return why_not_flat(base_model(model))


class Layout:
    """The layout of a run: chosen at construction, verified with the first batch, the same on all ranks.

    Args:
        requested: "auto", "flat" or "padded".
        scored: (scorer, model) of the policy, and of a reference that is a model of its own.
        autocast: the dtype of mixed precision, None without it.
        reason: a reason against flat that lies in the run's options rather than in a model.
        counted: the option that counts tokens of the layout, which then cannot change when batches are cut already.
        images: what makes the inputs of images, of a vision-language model.
    """

    def __init__(
        self,
        requested: str,
        scored: Sequence[tuple[Scorer, nn.Module]],
        pad_token_id: int,
        *,
        autocast: torch.dtype | None = None,
        reason: str | None = None,
        counted: str | None = None,
        images: ImageInputs | None = None,
    ):
        self.images = images
        self.requested = requested
        self.pad_token_id = pad_token_id
        self.autocast = autocast
        self.counted = counted
        (self.scorer, _), *self.references = scored
        self.settled = False
        self.collators: list[Any] = []  # that follow a change of the layout (training/collator.py)
        reasons = [reason, *(reason_for_padding(*own) for own in scored)]
        reason = next((r for r in reasons if r), None)
        name = type(base_model(scored[0][1])).__name__
        if requested == "flat" and reason:
            raise ValueError(f"--layout flat does not work with {name}: {reason}. Use --layout auto or padded.")
        self.name = "padded" if requested == "padded" or reason else "flat"
        why = (
            "as asked"
            if requested != "auto"
            else reason or "each prompt once, no padding; verified on the first batch"
        )
        logger.warning(f"Layout for {name}: {self.name} ({why}).")

    def settle(self, policy: nn.Module, batch: PairBatch) -> PairBatch:
        """Return `batch` in the layout of the run, after verifying the layout with the first batch.

        `policy` is the model as it is wrapped now. After a fall back to padded, the collators of this process follow. Loader
        workers and collators of the user may go on making flat batches: their rows are collated again here.
        """
        if not self.settled:
            self.verify(policy, _rows_of(batch), batch.input_ids.device)
        return as_padded(batch, self.pad_token_id, self.images) if self.name == "padded" else batch

    def short(self, batch: PairBatch) -> PairBatch:
        """Return two short rows made from those of `batch`, in the layout of the run."""
        rows = _short(_rows_of(batch), self.images)
        return PairBatch.from_inputs(
            inputs_of(rows, self.name, self.pad_token_id, images=self.images), batch.input_ids.device
        )

    def verify(self, policy: nn.Module, rows: Sequence[TokenizedPair], device: torch.device) -> None:
        """Settle the layout on `rows`, for the references and the policy. Collective."""
        self.verify_references(rows, device)
        self._verify_model(self.scorer, policy, rows, device)
        self._verify_quantised(policy)
        self.settled = True

    def verify_references(self, rows: Sequence[TokenizedPair], device: torch.device) -> None:
        """Verify the references alone, before the policy can compute. Collective."""
        references, self.references = self.references, []  # they may be freed before training
        for scorer, model in references:
            self._verify_model(scorer, model, rows, device)

    def _verify_model(
        self, scorer: Scorer, model: nn.Module, rows: Sequence[TokenizedPair], device: torch.device
    ) -> None:
        """Choose the layout, and how `scorer` reads log-probs, by comparing on two short rows made from `rows`."""
        model = extract_model_from_parallel(model)
        rows = _short(rows, self.images)
        with evaluation_mode(model), _plain(scorer):
            want = _measure(scorer, model, rows, "padded", self.pad_token_id, self.images)
        ways = ["flat", "padded"] if self.name == "flat" else ["padded"]
        problems = []
        for layout in ways if scorer.through_head else []:
            problem = self._compare(scorer, model, rows, layout, want)
            if not any_rank(problem is not None, device):
                break
            problems.append(problem or "another rank found a difference")
        else:
            layout, scorer.through_head = "padded", False
        if problems:
            self._fall_back(type(base_model(model)).__name__, layout, scorer.through_head, problems)
        self.name = layout
        for collator in self.collators:
            collator.layout = layout

    def _verify_quantised(self, policy: nn.Module) -> None:
        """Both ways above go through the same layers: whether gradients pass those that are quantised, nothing above shows."""
        base = base_model(policy)
        if not getattr(base, "is_quantized", False):
            return
        found = wrong_gradients(base, self.autocast or base.dtype)
        if any_rank(found is not None, base.device):
            layer, off = found or ("of another rank", math.nan)
            raise ValueError(
                f"Gradients through the quantised layer {layer} are not those of what it computes (off by {off:.1e}, relative): its "
                "kernel is one for inference, or it was packed for inference. Load the model again, quantise it with another "
                "backend (--load_in_4bit, --load_in_8bit), or leave it in floating point."
            )

    def _compare(
        self, scorer: Scorer, model: nn.Module, rows: list[TokenizedPair], layout: str, want: tuple[Tensor, Tensor]
    ) -> str | None:
        """What differs from the plain way, or None."""
        try:
            with evaluation_mode(model):
                got = _measure(scorer, model, rows, layout, self.pad_token_id, self.images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does with rows or heads that it was not written for
            return f"{layout}: {type(error).__name__}: {str(error).rstrip('.')}"
        limit = TOLERANCE[self.autocast or base_model(model).dtype]
        for what, a, b in zip(("log-probs", "gradients"), got, want, strict=True):
            difference = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
            if not difference <= limit:  # NaN differs as well
                return f"{layout}: {what} differ by {difference:.1e} (relative, tolerance {limit:.0e})"
        return None

    def _fall_back(self, model_name: str, layout: str, through_head: bool, problems: list[str]) -> None:
        if self.requested == "flat" and layout != "flat":
            raise ValueError(
                f"--layout flat does not work with {model_name}: {problems[0]}, against plain padded rows. "
                "Use --layout auto or padded."
            )
        if self.counted and layout != self.name:
            raise ValueError(
                f"{model_name} needs padded rows ({problems[0]}, against plain padded rows), and {self.counted} was counted in "
                "flat ones: start again with --layout padded."
            )
        memory = "" if through_head else ", with all logits of a batch in memory"
        logger.warning(
            f"{model_name} is trained with padded rows{memory}. Checked on two short rows: {'; '.join(problems)}."
        )


def as_padded(batch: PairBatch, pad_token_id: int, images: ImageInputs | None = None) -> PairBatch:
    """Return the pairs of a flat batch in padded rows on the same device, and a padded batch as it is."""
    if not batch.is_flat:
        return batch
    rows = _rows_of(batch)
    if batch.images is not None:
        images_by_row = batch.images.to(torch.device("cpu")).by_row()  # the last may be a blank one, of no row
        rows = [replace(row, images=own) for row, own in zip(rows, images_by_row, strict=False)]
    inputs = inputs_of(rows, "padded", pad_token_id, keyed=batch.keys is not None, images=images)
    padded = PairBatch.from_inputs(inputs, batch.input_ids.device)
    # Both layouts list the pairs in the same order. These may have changed since the batch was collated.
    return replace(padded, weight=batch.weight, margin=batch.margin, pairs_by_rank=batch.pairs_by_rank)


def _rows_of(batch: PairBatch) -> Sequence[TokenizedPair]:
    if batch.tokenized_rows is None:
        raise ValueError(
            "The data collator's batch lacks tokenized_rows, which the check of the layout needs. Use "
            "DataCollatorForPreference or a subclass of it and keep all its entries, or return input_ids, attention_mask and "
            "completion_mask of shape [2N, L], chosen rows first."
        )
    return batch.tokenized_rows


def _short(rows: Sequence[TokenizedPair], images: ImageInputs | None = None) -> list[TokenizedPair]:
    """The two shortest rows, cut to a few tokens, with three completions each: enough to see who sees whom.

    Which rows the first batch holds is chance, and its verdict is for the whole run: a row of two completions gets a third
    from their tokens, for a ranked row may come later. A completion of one token is predicted from its prompt alone, and
    a single row has no neighbour: neither would show a wrong mask. So each completion is followed by the next one of its
    row, and a row that is alone comes twice. For a vision-language model, the second row holds an image, in the midst of its
    prompt, and the first at none.
    """
    own = frozenset() if images is None else images.text.image_ids
    # A prompt of images alone gets a word of its answer: something must predict the first token.
    prompts = [[n for n in row.prompt_ids if n not in own] or row.chosen_ids[:1] for row in rows]
    words = [replace(row, prompt_ids=prompt, images=()) for row, prompt in zip(rows, prompts, strict=True)]
    shortest = sorted(words, key=lambda row: len(row.prompt_ids) + sum(map(len, row.completions)))[:2]
    cut = [_cut(row) for row in (shortest * 2)[:2]]
    if images is not None:
        ids, image = images.probe
        prompt = cut[1].prompt_ids
        half = len(prompt) // 2
        cut[1] = replace(cut[1], prompt_ids=[*prompt[:half], *ids, *prompt[half:]], images=(image,))
    return cut


def _cut(row: TokenizedPair) -> TokenizedPair:
    first, second, *more = row.completions
    third = more[0] if more else second[::-1]
    return TokenizedPair(
        example_id=row.example_id,
        prompt_ids=row.prompt_ids[-CHECK_TOKENS:],
        chosen_ids=(first + second)[:CHECK_TOKENS],
        rejected_ids=(second + third)[:CHECK_TOKENS],
        more_ids=[(third + first)[:CHECK_TOKENS]],
        pairs=(Preferred(0, 1), Preferred(0, 2)),  # so that all three count
    )


def _measure(
    scorer: Scorer,
    model: nn.Module,
    rows: list[TokenizedPair],
    layout: str,
    pad_token_id: int,
    images: ImageInputs | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob sums [2N], and the gradient of a mix of them with respect to the embedded tokens, per row in the order
    prompt, completion 0, completion 1 ... whatever the layout."""
    device = base_model(model).device
    batch = PairBatch.from_inputs(inputs_of(rows, layout, pad_token_id, images=images), device)
    embedded: list[Tensor] = []

    def as_leaf(module: nn.Module, args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = base_model(model).get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.enable_grad(), scorer.attention.installed() if batch.is_flat else contextlib.nullcontext():
            logps = scorer(model, batch)
            sums = torch.cat([logps.chosen, logps.rejected])
            # Unequal weights: an error that is the same for all completions must not cancel.
            mix = torch.linspace(1.0, 2.0, len(sums), device=device)
            (grad,) = torch.autograd.grad((mix * sums).sum(), embedded[0])
    finally:
        hook.remove()
    return sums.detach().float(), _by_row(grad.float(), rows, layout)


def _by_row(grad: Tensor, rows: list[TokenizedPair], layout: str) -> Tensor:
    """[R, L, D] gradient of a layout -> [tokens, D], one row per token of prompt, completion 0, completion 1 ... of each
    row. In padded rows, a prompt is there once for each completion: its gradients add up."""
    if layout == "flat":
        return grad[0]
    parts = []
    order = padded_order(rows)
    for i, row in enumerate(rows):
        p = len(row.prompt_ids)
        own = [grad[c] for c, (of, _) in enumerate(order) if of == i]
        parts.append(torch.stack([g[:p] for g in own]).sum(0))
        parts += [g[p : p + len(ids)] for g, ids in zip(own, row.completions, strict=True)]
    return torch.cat(parts)


@contextlib.contextmanager
def _plain(scorer: Scorer) -> Iterator[None]:
    before, scorer.through_head = scorer.through_head, False
    try:
        yield
    finally:
        scorer.through_head = before


def any_rank(flag: bool, device: torch.device) -> bool:
    """One verdict for all ranks."""
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)
