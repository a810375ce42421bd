"""The strategies. Each is asked once per batch, computes without gradients, and leaves the policy as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from ..distributed.sharding import copy_of
from ..models.unwrap import evaluation_mode
from ..scoring.logprobs import Scorer
from ..types import PairBatch, PairLogps
from .beside_adapter import StartingWeights, trained_in_base
from .identity import Identity, identify


class Reference(Protocol):
    """Where reference log-probs come from. Chosen once, when the trainer is built.

    A reference that stays needs `logps`, `description` and `own`, and inherits the rest.
    """

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps | None:
        """Log-probs of `batch` under the reference: no gradient, float32, pairs in batch order.

        `policy` is the model in training as it is wrapped now. None stands for log-probs of 0 (no reference).
        """

    def in_place(self, policy: nn.Module) -> contextlib.AbstractContextManager[nn.Module | None]:
        """The reference as a model, for as long as the context lasts: to generate with. None where there is no model."""
        return contextlib.nullcontext()

    description: str
    """One line for the log and the model card."""

    own: list[tuple[Scorer, nn.Module]]
    """Models of its own besides the policy, each with its scorer: the trainer places them and checks their layout."""

    lasting: bool = False
    """Whether it is part of the policy's own module, and there for as long as that is."""

    is_start: bool = False
    """Whether it was chosen as the model that training starts from, so that the first loss must be ln 2."""

    keyed: bool = False
    """Whether it looks completions up by what they are, so that batches must say it (`PairBatch.keys`)."""

    def place(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Put models of its own where `prepare` puts them; what it returns stands in their place. Collective."""
        return

    def release(self) -> Reference | None:
        """Training begins: what is left of it then, without a second model in memory."""
        return self if self.lasting else None

    def identity(self, policy: nn.Module, precision: str) -> Identity | None:
        """What it is, as a hash over its weights. `policy` as it is before training; None where there is no reference."""
        return None

    def unkept(self, policy: nn.Module) -> list[str]:
        """Weights that are trained, and that it would share: found when training begins. `policy` as it is wrapped now."""
        return []

    moving: bool = False
    """Whether it follows the policy while that trains: see `moving.py`."""

    def move(self, policy: nn.Module, alpha: float) -> None:
        """reference <- alpha * policy + (1 - alpha) * reference, in place. `policy` as it is wrapped now."""
        raise RuntimeError(f"{type(self).__name__} does not move.")

    def state(self) -> dict[str, Tensor]:
        """What training changes of it, by name, for checkpoints: contiguous, tied weights once. Empty if it stays."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned, in place. ValueError for the state of another reference."""
        if state:
            raise ValueError(
                f"The checkpoint holds a reference that moved, and this run's stays ({self.description}): resume with "
                "--sync_ref_model, as the checkpoint was written."
            )


class NoReference(Reference):
    """For losses that need none, and for a uniform reference (`reference_free`)."""

    description = "none"

    def __init__(self) -> None:
        self.own: list[tuple[Scorer, nn.Module]] = []

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps | None:
        return None


class FrozenModel(Reference):
    """A model of its own that never changes: a copy of the policy as training found it, or one that the user gave."""

    def __init__(self, model: nn.Module, scorer: Scorer, description: str):
        self.model = model.eval().requires_grad_(False)
        self.scorer = scorer
        self.description = description
        self.own = [(scorer, self.model)]

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        with torch.no_grad():
            return self.scorer(self.model, batch, extras=False)

    def in_place(self, policy: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return contextlib.nullcontext(self.model)

    def place(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        self.model = prepare(self.model)
        self.own = [(self.scorer, self.model)]

    def identity(self, policy: nn.Module, precision: str) -> Identity | None:
        active = self.model.active_adapter if isinstance(self.model, PeftModel) else None
        return identify(self.model, adapter=active, precision=precision)


class UntrainedPolicy(Reference):
    """The policy itself, as long as nothing has trained it: what its frozen copy would say, without the copy."""

    description = "the model as training found it"

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.own: list[tuple[Scorer, nn.Module]] = []

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        with torch.no_grad(), evaluation_mode(extract_model_from_parallel(policy)):
            return self.scorer(policy, batch, extras=False)

    def identity(self, policy: nn.Module, precision: str) -> Identity | None:
        return identify(policy, precision=precision)


class DisabledAdapter(Reference):
    """The policy with its adapter off: one more forward, no more memory.

    Args:
        start: what is trained of the base beside the adapter, as it was. None: nothing is.
    """

    lasting = True

    def __init__(
        self,
        scorer: Scorer,
        description: str = "the policy with its adapter disabled",
        start: StartingWeights | None = None,
    ):
        self.scorer = scorer
        self.start = start
        self.description = description + (start.description if start else "")
        self.own: list[tuple[Scorer, nn.Module]] = []

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        with torch.no_grad(), self.in_place(policy):
            return self.scorer(policy, batch, extras=False)

    @contextlib.contextmanager
    def in_place(self, policy: nn.Module) -> Iterator[nn.Module]:
        peft_model: PeftModel = extract_model_from_parallel(policy)
        with (
            _as_it_was(self.start, peft_model),
            evaluation_mode(peft_model),
            _same_trainable_after(peft_model),
            peft_model.disable_adapter(),
        ):
            yield peft_model

    def identity(self, policy: nn.Module, precision: str) -> Identity | None:
        with _as_it_was(self.start, policy):
            return identify(policy, precision=precision)

    def unkept(self, policy: nn.Module) -> list[str]:
        return _unkept(self.start, policy)


class NamedAdapter(Reference):
    """A second, frozen adapter on the same base model.

    Args:
        start: what is trained of the base beside the adapters, as it was. None: nothing is.
    """

    lasting = True

    def __init__(
        self,
        scorer: Scorer,
        policy_adapter: str,
        reference_adapter: str,
        description: str,
        start: StartingWeights | None = None,
    ):
        self.scorer = scorer
        self.policy_adapter = policy_adapter
        self.reference_adapter = reference_adapter
        self.start = start
        self.description = description + (start.description if start else "")
        self.own: list[tuple[Scorer, nn.Module]] = []

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        with torch.no_grad(), self.in_place(policy):
            return self.scorer(policy, batch, extras=False)

    @contextlib.contextmanager
    def in_place(self, policy: nn.Module) -> Iterator[nn.Module]:
        peft_model = extract_model_from_parallel(policy)
        with _as_it_was(self.start, peft_model), evaluation_mode(peft_model), _same_trainable_after(peft_model):
            peft_model.set_adapter(self.reference_adapter)
            try:
                yield peft_model
            finally:
                peft_model.set_adapter(self.policy_adapter)

    def identity(self, policy: nn.Module, precision: str) -> Identity | None:
        with _as_it_was(self.start, policy):
            return identify(policy, adapter=self.reference_adapter, precision=precision)

    def unkept(self, policy: nn.Module) -> list[str]:
        return _unkept(self.start, policy)


class OnCopy(Reference):
    """A reference inside the policy, read from a copy of the policy until training begins.

    For what must be known before an engine has cut the policy between ranks: the copy is cut already (`place`).
    """

    lasting = True

    def __init__(self, inside: DisabledAdapter | NamedAdapter, policy: nn.Module):
        self.inside = inside
        self.model = copy_of(policy).requires_grad_(False)
        self.description = inside.description
        self.own: list[tuple[Scorer, nn.Module]] = [(inside.scorer, self.model)]

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        return self.inside.logps(self.model, batch)

    def place(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        self.model = prepare(self.model)
        self.own = [(self.inside.scorer, self.model)]

    def release(self) -> Reference:
        return self.inside

    def identity(self, policy: nn.Module, precision: str) -> Identity | None:
        return self.inside.identity(policy, precision)


def _as_it_was(start: StartingWeights | None, policy: nn.Module) -> contextlib.AbstractContextManager[None]:
    return start.in_place(policy) if start else contextlib.nullcontext()


def _unkept(start: StartingWeights | None, policy: nn.Module) -> list[str]:
    return [name for name in trained_in_base(policy) if start is None or name not in start.copies]


@contextlib.contextmanager
def _same_trainable_after(model: nn.Module) -> Iterator[None]:
    """peft ties "active" to "trainable" and switches both: what the user froze or trains is put back as it was."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
