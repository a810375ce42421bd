"""Which reference a run has: asked once, with everything that decides it; contradictions are refused by name."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..logprobs import Scorer
from .strategies import DisabledAdapter, FrozenModel, NamedAdapter, NoReference, Reference

COPIED_ADAPTER = "ref"


def choose_reference(
    policy: nn.Module,
    ref_model: nn.Module | None,
    scorer: Scorer,
    *,
    needed: bool,
    reference_free: bool,
    fresh_adapter: bool,
    ref_adapter_name: str | None,
) -> Reference:
    """The strategy for this run. `policy` is not wrapped yet, and stands as training will find it.

    Args:
        ref_model: an explicit reference, loaded.
        scorer: the policy's; a reference inside the policy is read through it.
        needed: whether any chosen loss looks at the reference.
        reference_free: the user asked for none.
        fresh_adapter: the adapter was added just now, so that the model below it is where training starts.
        ref_adapter_name: an adapter of the policy that is the reference.
    """
    _refuse_contradictions(policy, ref_model, needed, reference_free, ref_adapter_name)
    if not needed:
        return NoReference()
    if ref_model is not None:
        return FrozenModel(ref_model, Scorer(ref_model), "a model of its own, given as ref_model")
    if not isinstance(policy, PeftModel):
        # The live policy, not a reload by name: it may have been merged, resized, trained or built in this process.
        copied = copy.deepcopy(policy)
        return FrozenModel(copied, Scorer(copied), "a frozen copy of the model that training started from")
    trained = _active_adapter(policy)
    if ref_adapter_name is not None:
        _freeze(policy, ref_adapter_name)
        return NamedAdapter(scorer, trained, ref_adapter_name, f"the adapter {ref_adapter_name!r}")
    if fresh_adapter:
        return DisabledAdapter(scorer)
    _copy_adapter(policy, trained, COPIED_ADAPTER)
    return NamedAdapter(
        scorer, trained, COPIED_ADAPTER, f"a frozen copy of the adapter {trained!r} that training started from"
    )


def _refuse_contradictions(
    policy: nn.Module, ref_model: Any, needed: bool, reference_free: bool, ref_adapter_name: str | None
) -> None:
    if ref_model is policy:
        raise ValueError(
            "ref_model is the model that is trained: it would move along, and every margin would stay 0. Leave ref_model "
            "out (the reference is then a frozen copy, or the model below a new adapter), or load a second one."
        )
    if ref_model is not None and isinstance(policy, PeftModel) and ref_model is policy.get_base_model():
        raise ValueError(
            "ref_model is the base of the PEFT model that is trained, adapters included. Leave ref_model out: the "
            "reference is then the same base with its adapter off, at no extra memory."
        )
    given = {"ref_model": ref_model, "--ref_adapter_name": ref_adapter_name}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not needed:
        why = "--reference_free asks for none" if reference_free else "none of the losses in --loss_type looks at one"
        raise ValueError(f"A reference was given by {' and '.join(given)}, but {why}: drop one of the two.")
    if len(given) > 1:
        raise ValueError("Both ref_model and --ref_adapter_name name a reference: give one of them.")
    if ref_adapter_name is None:
        return
    if not isinstance(policy, PeftModel):
        raise ValueError(
            f"--ref_adapter_name {ref_adapter_name!r} needs a PEFT model that carries this adapter; the model has no "
            "adapters. Load it with peft's PeftModel.from_pretrained, or drop the option."
        )
    if ref_adapter_name not in policy.peft_config:
        raise ValueError(
            f"--ref_adapter_name {ref_adapter_name!r} is not an adapter of the model, which has "
            f"{', '.join(policy.peft_config)}. Load it with model.load_adapter(path, adapter_name={ref_adapter_name!r})."
        )
    if ref_adapter_name == _active_adapter(policy):
        raise ValueError(
            f"--ref_adapter_name {ref_adapter_name!r} is the adapter that is trained: it would move along. Name another, "
            "or drop the option to use a frozen copy of it."
        )


def _active_adapter(model: PeftModel) -> str:
    active = model.active_adapter
    if not isinstance(active, str):
        raise ValueError(f"Several adapters are active ({active}): name the one to train with --model_adapter_name.")
    return active


def _copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Add a frozen adapter with the weights of another, whatever its kind and name."""
    if target in model.peft_config:
        raise ValueError(
            f"The model already has an adapter {target!r}, the name that a frozen copy of {source!r} would get: say "
            f"--ref_adapter_name {target} if it is the reference, or rename it."
        )
    model.add_adapter(target, copy.deepcopy(model.peft_config[source]))
    weights = {name: w.clone() for name, w in get_peft_model_state_dict(model, adapter_name=source).items()}
    set_peft_model_state_dict(model, weights, adapter_name=target)
    model.set_adapter(source)
    _freeze(model, target)


def _freeze(model: PeftModel, adapter: str) -> None:
    if model.peft_config[adapter].is_prompt_learning:
        model.prompt_encoder[adapter].requires_grad_(False)
    else:
        model.set_requires_grad(adapter, requires_grad=False)
