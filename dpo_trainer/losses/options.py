"""The options of the objective: fields of `DPOConfig`, their bounds and what does not go together. Each error names the flag, the value
and the way out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..registry import choices
from .registry import LOSSES, SUPPLIED, hyperparameters
from .user import load_loss_module


@dataclass
class LossOptions:
    """Which losses, and their hyperparameters. docs/losses.md."""

    # --- the objective ---
    beta: float = field(
        default=0.1,
        metadata={
            "help": "Strength of the regularization towards the reference, > 0. Usual range 0.01 to 0.5; higher stays closer. "
            "The tau of `ipo`, the lambda of `orpo`."
        },
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One loss, or several that are summed with --loss_weights. docs/losses.md lists them."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per --loss_type; 1.0 each when not given."}
    )
    loss_module: str | None = field(
        default=None,
        metadata={
            "help": "A Python file (or importable module) that registers losses of your own with @register_loss. "
            "It is executed: name only files that you trust."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a preference label is flipped, in [0, 0.5). `sigmoid` becomes cDPO; "
            "`exo_pair` needs it above 0 (1e-3 is its paper's choice)."
        },
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the negative log-likelihood of the chosen completion, added to any loss (RPO)."},
    )
    rpo_normalization: str = field(
        default="sequence",
        metadata=choices(
            "sequence",
            "token",
            help="How the NLL of --rpo_alpha and `sft` is averaged: per completion, then over pairs (the papers), "
            "or over all tokens of the micro-batch (TRL's `sft`).",
        ),
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight each pair by how likely the policy is to write it (WPO)."}
    )
    wpo_clamp: bool = field(default=False, metadata={"help": "Clamp the WPO weights of --use_weighting at 1."})
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "LD-DPO: weight in [0, 1] of the log-probs beyond the length that both completions of a pair share."
        },
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata=choices(
            "reverse_kl",
            "forward_kl",
            "js_divergence",
            "alpha_divergence",
            help="Divergence from the reference, for the losses of the margin.",
        ),
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "The alpha of --f_divergence_type alpha_divergence, in (0, 1)."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of `discopop`, > 0."})
    simpo_gamma: float = field(
        default=0.5, metadata={"help": "Target reward margin of `simpo`, >= 0, in units of the reward."}
    )
    ipo_normalization: str = field(
        default="token",
        metadata=choices(
            "token",
            "sequence",
            help="`ipo` with log-probs per token (its authors' choice) or summed over the completion (its Eq. 17).",
        ),
    )
    odpo_alpha: float = field(
        default=1.0, metadata={"help": "Weight of the offset that `odpo` makes of a pair's margin, >= 0."}
    )
    odpo_offset: str = field(
        default="log",
        metadata=choices(
            "log",
            "linear",
            help="How `odpo` makes an offset of the column `margin`: its logarithm (margins above 0) or itself.",
        ),
    )
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the NLL term of `cpo`, >= 0."})
    dpop_lambda: float = field(
        default=50.0, metadata={"help": "Weight of `dpop`'s penalty on a falling chosen log-prob, >= 0."}
    )
    chi_po_reward_bound: float | None = field(
        default=None,
        metadata={"help": "R of `chi_po`, > 0: its scores, times beta, are clipped to [-2R, 2R]. None: no clip."},
    )


class Bound(NamedTuple):
    holds: Callable[[float], bool]
    words: str
    hint: str = ""


BOUNDS = {
    "beta": Bound(
        lambda v: v > 0, "above 0", "Usual values are 0.01 to 0.5; to train without a reference: --reference_free."
    ),
    "label_smoothing": Bound(
        lambda v: 0 <= v < 0.5,
        "at least 0 and below 0.5",
        "It is the share of flipped labels; 0.5 would be pure noise.",
    ),
    "rpo_alpha": Bound(lambda v: v >= 0, "at least 0", "0 switches the NLL term off."),
    "ld_alpha": Bound(lambda v: 0 <= v <= 1, "between 0 and 1", "1 changes nothing, 0 ignores the longer one's tail."),
    "f_alpha_divergence_coef": Bound(
        lambda v: 0 < v < 1, "above 0 and below 1", "The limits are --f_divergence_type reverse_kl and forward_kl."
    ),
    "discopop_tau": Bound(lambda v: v > 0, "above 0", "Its paper uses 0.05."),
    "simpo_gamma": Bound(lambda v: v >= 0, "at least 0", "0 asks for no margin."),
    "odpo_alpha": Bound(lambda v: v >= 0, "at least 0", "0 is plain DPO."),
    "cpo_alpha": Bound(lambda v: v >= 0, "at least 0", "0 switches the NLL term off."),
    "dpop_lambda": Bound(lambda v: v >= 0, "at least 0", "0 is plain DPO."),
    "chi_po_reward_bound": Bound(lambda v: v > 0, "above 0", "Leave it out for no clipping."),
}


def check_loss_options(args: LossOptions) -> None:
    """Raise ValueError where the loss options of a config contradict themselves or would be ignored.

    Also replaces aliases in `args.loss_type` by the names under which their losses are listed.
    """
    if isinstance(args.loss_type, str):
        args.loss_type = [args.loss_type]
    if args.loss_module is not None:
        load_loss_module(args.loss_module)
    _check_names(args)
    _check_weights(args)
    for name in BOUNDS:
        _check_bound(args, name)
    for name in args.loss_type:
        hyperparameters(LOSSES[name], args)
    _check_something_uses(args)
    _check_combinations(args)


def _check_names(args: LossOptions) -> None:
    if not args.loss_type:
        raise ValueError(f"--loss_type is empty: name one or more of {', '.join(LOSSES)}.")
    for name in args.loss_type:
        try:
            LOSSES[name]
        except ValueError as error:
            raise ValueError(f"--loss_type: {error} For one of your own, add --loss_module with its file.") from None
    args.loss_type = [LOSSES.resolve(name) for name in args.loss_type]
    for name in args.loss_type:
        if args.loss_type.count(name) > 1:
            raise ValueError(
                f"--loss_type names {name!r} twice: name it once, and raise its weight in --loss_weights."
            )


def _check_weights(args: LossOptions) -> None:
    weights = args.loss_weights
    if weights is None:
        return
    if len(weights) != len(args.loss_type):
        raise ValueError(
            f"--loss_weights has {len(weights)} values for {len(args.loss_type)} losses "
            f"({', '.join(args.loss_type)}): give one weight each."
        )
    for weight in weights:
        if not is_number(weight):
            raise ValueError(f"--loss_weights must be finite numbers, got {weight!r}.")


def is_number(value: Any) -> bool:
    """Finite, also as a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_bound(args: LossOptions, name: str) -> None:
    value: Any = getattr(args, name, None)
    if value is None and _defaults(args).get(name) is None:
        return
    if isinstance(value, str):
        raise ValueError(f"--{name} must be a number, got the text {value!r} (YAML reads 1e-3 as text: write 1.0e-3).")
    if not is_number(value) or not BOUNDS[name].holds(value):
        raise ValueError(f"--{name} must be {BOUNDS[name].words}, got {value!r}. {BOUNDS[name].hint}")


def _check_something_uses(args: LossOptions) -> None:
    """A hyperparameter that was changed must have a chosen loss that takes it. (`beta` also scales the logged rewards.)"""
    builtin = {argument for name in LOSSES if LOSSES[name].builtin for argument in LOSSES[name].arguments}
    taken = {argument for name in args.loss_type for argument in LOSSES[name].arguments}
    taken |= {"beta"} | ({"rpo_normalization"} if args.rpo_alpha is not None else set())
    defaults = _defaults(args)
    for name in sorted(builtin - taken - set(SUPPLIED)):
        if name in defaults and getattr(args, name) != defaults[name]:
            also = " or with --rpo_alpha" if name == "rpo_normalization" else ""
            raise ValueError(
                f"--{name} {getattr(args, name)} would be ignored by --loss_type {' '.join(args.loss_type)}: it is used "
                f"by {', '.join(LOSSES.taking(name))}{also}. Leave it out, or choose one of these losses."
            )


def _check_combinations(args: LossOptions) -> None:
    losses = [LOSSES[name] for name in args.loss_type]
    if "exo_pair" in args.loss_type and not args.label_smoothing:
        raise ValueError(
            "--loss_type exo_pair needs --label_smoothing above 0, got 0: its target would be log 0. Its paper uses 1e-3."
        )
    if args.wpo_clamp and not args.use_weighting:
        raise ValueError(
            "--wpo_clamp limits the weights of --use_weighting, which is off: add it, or drop --wpo_clamp."
        )

    if args.f_divergence_type != "reverse_kl":
        unfit = [loss.name for loss in losses if loss.needs_reference and "divergence" not in loss.arguments]
        fit = any("divergence" in loss.arguments for loss in losses)
        if unfit or not fit:
            raise ValueError(
                f"--f_divergence_type {args.f_divergence_type} does not apply to "
                f"{', '.join(unfit) or ', '.join(args.loss_type)}: it is defined for {', '.join(LOSSES.taking('divergence'))}."
                " Choose among those, or leave it at reverse_kl."
            )
    if (
        args.f_divergence_type != "alpha_divergence"
        and args.f_alpha_divergence_coef != _defaults(args)["f_alpha_divergence_coef"]
    ):
        raise ValueError(
            f"--f_alpha_divergence_coef {args.f_alpha_divergence_coef} would be ignored with --f_divergence_type "
            f"{args.f_divergence_type}: add --f_divergence_type alpha_divergence, or leave it out."
        )
    unfit = [loss.name for loss in losses if not loss.takes_ld]
    if args.ld_alpha is not None and unfit:
        raise ValueError(
            f"--ld_alpha compares the two completions of a pair; {', '.join(unfit)} also trains on the likelihood of "
            "chosen alone. Leave --ld_alpha out, or take another loss (with --rpo_alpha, whose NLL it does not touch)."
        )


def _defaults(args: LossOptions) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(args)}
