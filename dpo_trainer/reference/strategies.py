"""The strategies. Each is asked once per batch, computes without gradients, and leaves the policy as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn

from ..batch import PairBatch, PairLogps
from ..logprobs import Scorer, evaluation_mode


class Reference(Protocol):
    """Where reference log-probs come from. Chosen once, when the trainer is built."""

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps | None:
        """Log-probs of `batch` under the reference: no gradient, float32, pairs in batch order.

        `policy` is the model in training as it is wrapped now. None stands for log-probs of 0 (no reference).
        """

    description: str
    """One line for the log and the model card."""

    own: list[tuple[Scorer, nn.Module]]
    """Models of its own besides the policy, each with its scorer: the trainer places them and checks their layout."""


class NoReference:
    """For losses that need none, and for a uniform reference (`reference_free`)."""

    description = "none"

    def __init__(self) -> None:
        self.own: list[tuple[Scorer, nn.Module]] = []

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps | None:
        return None


class FrozenModel:
    """A model of its own that never changes: a copy of the policy as training found it, or one that the user gave."""

    def __init__(self, model: nn.Module, scorer: Scorer, description: str):
        self.model = model.eval().requires_grad_(False)
        self.scorer = scorer
        self.description = description
        self.own = [(scorer, self.model)]

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        with torch.no_grad():
            return self.scorer(self.model, batch, extras=False)


class DisabledAdapter:
    """The policy with its adapter off: one more forward, no more memory."""

    description = "the policy with its adapter disabled"

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.own: list[tuple[Scorer, nn.Module]] = []

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        peft_model: PeftModel = extract_model_from_parallel(policy)
        with (
            torch.no_grad(),
            evaluation_mode(peft_model),
            _same_trainable_after(peft_model),
            peft_model.disable_adapter(),
        ):
            return self.scorer(policy, batch, extras=False)


class NamedAdapter:
    """A second, frozen adapter on the same base model."""

    def __init__(self, scorer: Scorer, policy_adapter: str, reference_adapter: str, description: str):
        self.scorer = scorer
        self.policy_adapter = policy_adapter
        self.reference_adapter = reference_adapter
        self.description = description
        self.own: list[tuple[Scorer, nn.Module]] = []

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        peft_model = extract_model_from_parallel(policy)
        with torch.no_grad(), evaluation_mode(peft_model), _same_trainable_after(peft_model):
            peft_model.set_adapter(self.reference_adapter)
            try:
                return self.scorer(policy, batch, extras=False)
            finally:
                peft_model.set_adapter(self.policy_adapter)


@contextlib.contextmanager
def _same_trainable_after(model: nn.Module) -> Iterator[None]:
    """peft ties "active" to "trainable" and switches both: what the user froze or trains is put back as it was."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
