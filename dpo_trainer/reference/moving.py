r"""References that follow the policy (TR-DPO), mixed in place: no second copy of the model is made along the way.

    ref <- alpha * policy + (1 - alpha) * ref        for every weight; alpha = 1 makes the reference the policy

Source: Gorbatovski et al. 2024, arXiv:2404.09656. When they move is decided in `callbacks.py`.

For an adapter the equation holds for its parameters (A and B of LoRA, the magnitudes of DoRA, `modules_to_save`), not for
the product B A that they add to the model: the two agree at alpha = 1.
"""

from __future__ import annotations

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from ..distributed.sharding import gathered, kept, shape_of
from ..scoring.logprobs import Scorer
from .strategies import FrozenModel, NamedAdapter
from .twins import twins


class MovingModel(FrozenModel):
    """A model of its own that moves towards the policy, weight by weight.

    Raises:
        ValueError: at construction, for a model whose weights are not those of the policy by name and shape.
    """

    moving = True

    def __init__(self, model: nn.Module, scorer: Scorer, description: str, policy: nn.Module):
        super().__init__(model, scorer, description)
        _refuse_unlike(_weights(policy), _weights(self.model))

    def move(self, policy: nn.Module, alpha: float) -> None:
        live = _weights(extract_model_from_parallel(policy))
        for name, weight in self._own().items():
            mix(weight, live[name], alpha)

    def state(self) -> dict[str, Tensor]:
        return kept(self._own())

    def load_state(self, state: dict[str, Tensor]) -> None:
        _restore(self._own(), state)

    def _own(self) -> dict[str, Tensor]:
        return _weights(extract_model_from_parallel(self.model))


class MovingAdapter(NamedAdapter):
    """A frozen adapter beside the trained one, with the same settings, that moves towards it.

    Args:
        policy: not wrapped yet; wrapping leaves its parameters what they are.

    Raises:
        ValueError: at construction, if something is trained that the reference adapter has no copy of.
    """

    moving = True

    def __init__(
        self, scorer: Scorer, policy_adapter: str, reference_adapter: str, description: str, policy: PeftModel
    ):
        super().__init__(scorer, policy_adapter, reference_adapter, description)
        self.policy = policy
        mixed = set(self._twins(policy).values())
        alone = [name for name, p in policy.named_parameters() if p.requires_grad and name not in mixed]
        if alone:
            raise ValueError(
                f"--sync_ref_model mixes the adapter {policy_adapter!r} into a copy of it, and {alone[0]} is trained "
                "without being part of the adapter: the reference would share it. Freeze it, add it to the "
                "modules_to_save of the adapter, or leave --sync_ref_model off."
            )

    def move(self, policy: nn.Module, alpha: float) -> None:
        model = extract_model_from_parallel(policy)
        parameters = dict(model.named_parameters())
        for own, live in self._twins(model).items():
            mix(parameters[own], parameters[live], alpha)

    def state(self) -> dict[str, Tensor]:
        return kept(self._own())

    def load_state(self, state: dict[str, Tensor]) -> None:
        _restore(self._own(), state)

    def _own(self) -> dict[str, Tensor]:
        """Looked up each time: loading an adapter may put new parameters in the place of the old ones."""
        parameters = dict(self.policy.named_parameters())
        return {name: parameters[name] for name in self._twins(self.policy)}

    def _twins(self, model: nn.Module) -> dict[str, str]:
        """{name of a parameter of the reference adapter: name of the same parameter of the trained one}."""
        return twins(model, self.policy_adapter, self.reference_adapter)


@torch.no_grad()
def mix(reference: Tensor, policy: Tensor, alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, in place; of one shape, dtypes and devices may differ.

    Computed in the wider dtype and rounded once: in the narrower one the two would be rounded before they are compared.
    Collective where an engine has cut the two: they are whole one after the other.
    """
    with gathered(policy) as live, gathered(reference, write=True) as own:
        wide = torch.promote_types(own.dtype, live.dtype)
        mixed = own.to(wide).lerp_(live.to(own.device, wide), alpha)  # `to` copies nothing where none is needed
        if mixed is not own:
            own.copy_(mixed)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What a saved model holds in floating point, tied weights once: parameters, and buffers such as running means.

    Buffers move as well, so that alpha = 1 makes the reference the policy. Those that a model derives from its config
    (positions, rotary frequencies) are not saved, and stay.
    """
    named = model.state_dict(keep_vars=True).items()
    once: dict[int, tuple[str, Tensor]] = {}
    for name, weight in named:
        if isinstance(weight, Tensor) and weight.is_floating_point():
            once.setdefault(id(weight), (name, weight))
    return dict(once.values())


def _refuse_unlike(policy: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    difference = _difference(reference, policy)
    offloaded = next((name for name, weight in reference.items() if weight.is_meta), None)
    if difference is None and offloaded is not None:
        difference = f"{offloaded} is offloaded"
    if difference:
        raise ValueError(
            f"--sync_ref_model mixes the policy into ref_model weight by weight, and they differ: in ref_model, {difference}. "
            "Give a ref_model of the same architecture, whole, not quantised and without adapters; leave ref_model out, and "
            "a copy of what is trained moves; or leave --sync_ref_model off."
        )


def _difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> str | None:
    """The first weight in which `got` differs from `want` by name or shape, in words."""
    for name in [*want, *got]:
        if name not in got:
            return f"{name} is missing"
        if name not in want:
            return f"{name} is one too many"
        if shape_of(got[name]) != shape_of(want[name]):
            return f"{name} has the shape {shape_of(got[name])} instead of {shape_of(want[name])}"
    return None


@torch.no_grad()
def _restore(weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """In place. ValueError for the state of something else."""
    difference = _difference(state, weights)
    if difference:
        raise ValueError(
            f"The checkpoint holds another moving reference than this run has: there, {difference}. Resume with the model, "
            "the reference and the adapter settings that it was written with."
        )
    for name, weight in weights.items():
        with gathered(weight, write=True) as own:
            own.copy_(state[name])
