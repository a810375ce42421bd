"""Which reference a run has: asked once, with everything that decides it; contradictions are refused by name."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from ..distributed.sharding import copy_of
from ..scoring.logprobs import Scorer
from .beside_adapter import StartingWeights
from .fresh_adapter import begins_at_zero
from .moving import MovingAdapter, MovingModel
from .strategies import DisabledAdapter, FrozenModel, NamedAdapter, NoReference, Reference, UntrainedPolicy
from .twins import copy_adapter, freeze

COPIED_ADAPTER = "ref"
MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Starts of `init_lora_weights` that take out of the base what they put into the adapter."""


def choose_reference(
    policy: nn.Module,
    ref_model: nn.Module | None,
    scorer: Scorer,
    *,
    needed: bool,
    reference_free: bool = False,
    fresh_adapter: bool = False,
    ref_adapter_name: str | None = None,
    separate_adapter: bool | None = None,
    moving: bool = False,
    copy_policy: bool = True,
    sharded: bool = False,
) -> Reference:
    """The strategy for this run. `policy` is not wrapped yet, and stands as training will find it.

    Args:
        ref_model: an explicit reference, loaded.
        scorer: the policy's; a reference inside the policy is read through it.
        needed: whether any chosen loss looks at the reference.
        reference_free: the user asked for none.
        fresh_adapter: the adapter was added just now, so that the model below it is where training starts.
        ref_adapter_name: an adapter of the policy that is the reference.
        separate_adapter: whether the reference is a copy of the adapter or the model below it. None: what training starts
            from, at the least memory.
        moving: whether the reference shall follow the policy.
        copy_policy: whether the policy's frozen copy shall be made, where that is the reference. False: its log-probs are
            all taken before the policy trains, so that it can stand in for its copy.
        sharded: whether an engine will leave each rank a part of every weight.

    Raises:
        ValueError: for what contradicts itself or cannot work, by name and with the way out.
    """
    chosen = {
        "ref_model": ref_model,
        "--ref_adapter_name": ref_adapter_name,
        "--use_separate_reference_adapter": separate_adapter,
    }
    _refuse_useless([name for name, value in chosen.items() if value is not None], needed, reference_free, moving)
    _refuse_the_policy(policy, ref_model)
    _refuse_adapters(policy, ref_adapter_name, separate_adapter)
    if not needed:
        return NoReference()
    if ref_model is not None:
        how = ", moving" if moving else ""
        return _of_model(ref_model, f"a model of its own, given as ref_model{how}", policy, moving)
    kind = "moving" if moving else "frozen"
    if not isinstance(policy, PeftModel) and not copy_policy:
        return UntrainedPolicy(scorer)
    if not isinstance(policy, PeftModel):
        # The live policy, not a reload by name: it may have been merged, resized, trained or built in this process.
        copied = copy_of(policy)
        return _start(_of_model(copied, f"a {kind} copy of the model that training started from", policy, moving))
    trained = _active_adapter(policy)
    if ref_adapter_name is not None:
        freeze(policy, ref_adapter_name)
        start = StartingWeights(policy, sharded=sharded)
        return NamedAdapter(scorer, trained, ref_adapter_name, f"the adapter {ref_adapter_name!r}", start)
    starts_below = fresh_adapter and begins_at_zero(policy, trained)
    _refuse_residual_base(policy, trained, separate_adapter)
    if separate_adapter or (separate_adapter is None and (moving or not starts_below)):
        copy_adapter(policy, trained, COPIED_ADAPTER)
        copied_from = f"a {kind} copy of the adapter {trained!r} that training started from"
        if moving:
            return MovingAdapter(scorer, trained, COPIED_ADAPTER, copied_from, policy)
        start = StartingWeights(policy, sharded=sharded)
        return _start(NamedAdapter(scorer, trained, COPIED_ADAPTER, copied_from, start))
    start = StartingWeights(policy, sharded=sharded)
    if starts_below:
        return _start(DisabledAdapter(scorer, start=start))
    below = f"the base model, with the adapter {trained!r} off (the first loss need not be ln 2)"
    return DisabledAdapter(scorer, below, start)


def _start(reference: Reference) -> Reference:
    reference.is_start = True
    return reference


def _of_model(model: nn.Module, description: str, policy: nn.Module, moving: bool) -> Reference:
    if moving:
        return MovingModel(model, Scorer(model), description, policy)
    return FrozenModel(model, Scorer(model), description)


def _refuse_useless(chosen: list[str], needed: bool, reference_free: bool, moving: bool) -> None:
    """A reference where nothing looks at one, and several at once."""
    why = "--reference_free asks for none" if reference_free else "none of the losses in --loss_type looks at one"
    if chosen and not needed:
        raise ValueError(f"A reference was given by {' and '.join(chosen)}, but {why}: drop one of the two.")
    if moving and not needed:
        raise ValueError(f"--sync_ref_model moves the reference, but {why}: drop one of the two.")
    if len(chosen) > 1:
        raise ValueError(f"Both {' and '.join(chosen)} name a reference: give one of them.")


def _refuse_the_policy(policy: nn.Module, ref_model: nn.Module | None) -> None:
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
    held = (
        set() if ref_model is None else {p.data_ptr() for p in ref_model.parameters()} - {0}
    )  # 0: not in this process
    shared = [name for name, p in policy.named_parameters() if p.requires_grad and p.data_ptr() in held]
    if shared:
        raise ValueError(
            f"ref_model shares the memory of {len(shared)} weights that are trained ({shared[0]} ...): it would move along. Leave "
            "ref_model out (the reference is then a frozen copy), give copy.deepcopy of it, or load a second one."
        )


def _refuse_adapters(policy: nn.Module, ref_adapter_name: str | None, separate_adapter: bool | None) -> None:
    """Adapters that are not there, or that are trained."""
    if separate_adapter is not None and not isinstance(policy, PeftModel):
        raise ValueError(
            f"--use_separate_reference_adapter {separate_adapter} is about the adapter of a model, and this one has none: "
            "train one (peft_config, --use_peft), or drop the option."
        )
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


def _refuse_residual_base(policy: PeftModel, trained: str, separate_adapter: bool | None) -> None:
    init = getattr(policy.peft_config[trained], "init_lora_weights", None)
    if separate_adapter is False and str(init).startswith(MOVES_BASE):
        raise ValueError(
            f"--use_separate_reference_adapter false makes the model below the adapter the reference, and init_lora_weights="
            f"{init!r} moved a part of that model into the adapter: what is left is not a trained model. Leave the "
            "option out, and the reference is a frozen copy of the adapter as it began."
        )


def _active_adapter(model: PeftModel) -> str:
    active = model.active_adapter
    if not isinstance(active, str):
        raise ValueError(f"Several adapters are active ({active}): name the one to train with --model_adapter_name.")
    return active
