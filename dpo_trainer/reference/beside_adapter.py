"""Weights of the base model that are trained beside an adapter: switching the adapter off does not bring them back.

LoRA with `bias="all"` trains the base's own biases, and a user may unfreeze norms. A reference inside the policy reads
such weights from a copy of what they were.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from ..models.unwrap import base_model
from .identity import ADAPTER_PARTS, names_without_adapters


def trained_in_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of the base model of a `PeftModel`, by their names in it; without those of adapters."""
    base = base_model(model)
    names = names_without_adapters(base)
    found = {}
    for name, parameter in base.named_parameters():
        owner = name.rpartition(".")[0]
        in_adapter = names[owner] is None or isinstance(base.get_submodule(owner), ADAPTER_PARTS)
        if parameter.requires_grad and not in_adapter:
            found[name] = parameter
    return found


class StartingWeights:
    """What the trained weights of the base were when the reference was chosen.

    Args:
        policy: not wrapped yet, as training will find it.
        sharded: whether an engine will leave each rank a part of every weight.

    Raises:
        ValueError: there are such weights, and they will be sharded: a copy could not stand in for them.
    """

    def __init__(self, policy: PeftModel, *, sharded: bool = False):
        trained = trained_in_base(policy)
        if trained and sharded:
            raise ValueError(
                f"{len(trained)} weights of the base model are trained beside the adapter ({_first(trained)}), so that the "
                "model without its adapter would not stay the reference, and the copies of them that would keep it need "
                "whole weights, which FSDP and ZeRO-3 shard. Freeze them (of LoRA, bias='none'), name their modules in "
                "modules_to_save (--lora_modules_to_save), or give a ref_model."
            )
        self.copies: dict[str, Tensor] = {name: p.detach().clone() for name, p in trained.items()}

    @property
    def description(self) -> str:
        """The end of a reference's description: empty where nothing is kept."""
        if not self.copies:
            return ""
        return f", and {len(self.copies)} trained weights of the base as they were ({_first(self.copies)})"

    @contextlib.contextmanager
    def in_place(self, policy: nn.Module) -> Iterator[None]:
        """The weights as they were, for as long as the block lasts. `policy` as it is wrapped now.

        The parameters stay the same objects: what autograd keeps of a forward of the policy finds its numbers again.
        """
        if not self.copies:
            yield
            return
        parameters = dict(base_model(extract_model_from_parallel(policy)).named_parameters())
        live = {name: parameters[name].data for name in self.copies}
        try:
            for name, copy in self.copies.items():
                self.copies[name] = parameters[name].data = copy.to(live[name].device, live[name].dtype)
            torch.clear_autocast_cache()  # which knows a parameter by its address, not by its numbers
            with warnings.catch_warnings():
                # What PEFT warns of is true of the adapter alone, and mended here.
                warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
                yield
        finally:
            for name, weight in live.items():
                parameters[name].data = weight
            torch.clear_autocast_cache()


def _first(weights: dict[str, Tensor] | dict[str, nn.Parameter]) -> str:
    names = list(weights)
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
