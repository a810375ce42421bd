"""Whether the reference is the model that training starts from, and stays it: read on a few tokens, at both ends of a run.

Trust but verify: adapters are switched on and off, copied and read through each other by a library that gains kinds of
them all the time. Two short rows of the first batch are held, and cost one small batch at the start and one at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..distributed.engines import reshard
from ..models.unwrap import base_model, evaluation_mode
from ..scoring.layout import Layout, any_rank
from ..scoring.logprobs import Scorer
from ..types import PairBatch
from . import Reference

logger = logging.get_logger(__name__)

# Relative, of the log-prob sums. The same products in the same order, if nothing is wrong; adapters of some kinds take weights apart
# and put them together again (1e-6), which half precision rounds anew.
AT_START = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# At the end the same numbers go through the same kernels once more: bits that differ come from sums in another order.
AT_END = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4}


class ReferenceCheck:
    """Holds two short rows, and what the reference said of them before the first step.

    A reference that moves, one that is read from a cache, and none at all are not checked.

    Args:
        scorer: the policy's.
        layout: of the run.
    """

    def __init__(self, reference: Reference, scorer: Scorer, layout: Layout):
        self.reference = reference
        self.scorer = scorer
        self.layout = layout
        self.held: PairBatch | None = None
        self.before: Tensor | None = None
        self.applies = not (reference.moving or reference.keyed)
        self.begun = False

    @torch.no_grad()
    def begin(self, policy: nn.Module, batch: PairBatch, *, untrained: bool) -> None:
        """Once, with the first batch of training, in the layout of the run. `policy` as it is wrapped now. Collective.

        Args:
            untrained: no step has been made, also by a run that this one resumes.

        Raises:
            ValueError: the reference was chosen as what training starts from, and says something else; or weights that it
                would share have been made trainable since.
        """
        if self.begun:
            return
        self.begun = True
        if unkept := self.reference.unkept(policy):
            raise ValueError(
                f"{len(unkept)} weights of the base model ({unkept[0]} ...) were made trainable after the trainer was built, and the "
                f"reference ({self.reference.description}) would move with them. Make them trainable before that: the "
                "reference then reads them from a copy."
            )
        if not self.applies:
            return
        self.held = self.layout.short(batch)
        self.before = self._of_reference(policy)
        if self.before is None:
            self.applies = False
        elif untrained and self.reference.is_start:
            with evaluation_mode(policy):
                logps = self.scorer(policy, self.held, extras=False)
            start = torch.cat([logps.chosen, logps.rejected])
            if far := self._differs(self.before, start, AT_START, policy):
                raise ValueError(
                    f"The reference ({self.reference.description}) is not the model that training starts from: their log-probs of two "
                    f"short rows differ by {far} (relative), and the first loss would not be ln 2. Choose another reference: "
                    "--use_separate_reference_adapter true or false where there is an adapter, or a ref_model."
                )

    @torch.no_grad()
    def end(self, policy: nn.Module) -> None:
        """After the last step: says in the log if the reference moved. (An error would cost the weights.) Collective."""
        if not self.applies or self.before is None:
            return
        after = self._of_reference(policy)
        reshard(policy)
        assert after is not None
        if far := self._differs(after, self.before, AT_END, policy):
            logger.error(
                f"The reference ({self.reference.description}) moved while the policy trained: its log-probs of two short rows "
                f"are not what they were (difference {far}, relative). Losses and rewards of this run were measured from a "
                "moving start. Something that trains is part of the reference: train again with a ref_model, or with "
                "--precompute_ref_log_probs true."
            )

    def _of_reference(self, policy: nn.Module) -> Tensor | None:
        """[2N] nats."""
        assert self.held is not None
        logps = self.reference.logps(policy, self.held)
        return None if logps is None else torch.cat([logps.chosen, logps.rejected]).clone()

    def _differs(self, got: Tensor, want: Tensor, limits: dict[torch.dtype, float], policy: nn.Module) -> str | None:
        """How much, in words, where any rank sees more than rounding."""
        far = ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
        limit = limits[self.layout.autocast or base_model(policy).dtype]
        differs = any_rank(not far <= limit, got.device)  # NaN differs as well
        return f"{far:.1e}" if differs else None
