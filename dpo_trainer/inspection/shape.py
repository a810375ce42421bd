"""The sizes of a model, from its config: its parameters stand on the meta device, where they have a shape and no data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..models.names import fetch, where
from ..scoring.attention import why_not_flat
from ..storage.hub import brief_without_network

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = {4: 4.5, 8: 8.0}
"""{bits of a quantised base: bits per weight}; 4-bit ones share a float32 scale among 64."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the memory of a run depends on. Widths are of one decoder layer, in numbers per token."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    query: int
    key_value: int  # keys and values together
    mlp: int  # of a mixture of experts: of all experts that a token visits
    vocabulary: int
    weight_bytes: int
    weight_formula: str
    trainable_size: int  # bytes of a trained weight
    compute_size: int  # bytes of what a layer hands to the next
    why_not_flat: str | None  # what in the architecture rules the flat layout out, as far as its config tells

    def kept_per_token(self, computed: int) -> int:
        """Bytes that one layer keeps of each token for backward; `computed`: bytes of the numbers that it computes with.

        32 D + computed * (2 query + key_value + 4 mlp): norms and residual in float32, queries, keys, values and what
        attention returns, and four widths of a gated MLP. With weights in half precision the first term is 20 D.
        Counted on Llama and Qwen 2; other architectures keep up to twice as much.
        """
        return (32 if self.compute_size == 4 else 20) * self.hidden + computed * (
            2 * self.query + self.key_value + 4 * self.mlp
        )


def load_config(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> tuple[Any, PeftConfig | None]:
    """(config of the model, config of the adapter that is there already or None). ValueError where there is no model."""
    adapter = fetch(name_or_path, "adapter_config.json", revision)
    if adapter is not None:
        peft_config = PeftConfig.from_pretrained(str(Path(adapter).parent))
        peft_config.inference_mode = False
        base, _ = load_config(
            peft_config.base_model_name_or_path or "",
            revision=peft_config.revision,
            trust_remote_code=trust_remote_code,
        )
        return base, peft_config
    try:
        with brief_without_network(name_or_path):
            config = AutoConfig.from_pretrained(
                where(name_or_path), revision=revision or "main", trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"no config.json of a model at {name_or_path!r}") from error
    return config, None


def shape_of(
    config: Any,
    *,
    dtype: str = "float32",
    peft_config: PeftConfig | None = None,
    bits: int | None = None,
    trust_remote_code: bool = False,
) -> ModelShape:
    """`bits`: of a quantised base, 4 or 8."""
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    size = DTYPE_BYTES.get(dtype, 4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        base = sum(p.numel() for p in model.parameters())
        quantised = _linear_parameters(model) if bits else 0
        added = trainable = base
        if peft_config is not None:
            adapted = get_peft_model(model, dataclasses.replace(peft_config, task_type="CAUSAL_LM"))
            trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            added = sum(p.numel() for p in adapted.parameters())
    adapter = added - base
    weight_bytes = _weight_bytes(base, quantised, bits, size) + 4 * adapter
    formula = f"{base:,} x {size} bytes"
    if bits:
        formula = f"{quantised:,} x {BITS[bits]:g} bits + {base - quantised:,} x 4 bytes"
    if adapter:
        formula += f" + adapter {adapter:,} x 4 bytes"
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        parameters=added,
        trainable=trainable,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head_dim,
        key_value=2 * (getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        mlp=_mlp_width(text),
        vocabulary=text.vocab_size,
        weight_bytes=weight_bytes,
        weight_formula=formula,
        trainable_size=4 if peft_config is not None else size,
        compute_size=4 if bits else size,
        why_not_flat=why_not_flat(model),
    )


def _linear_parameters(model: PreTrainedModel) -> int:
    """What bitsandbytes quantises: the weights of linear layers, without the output embedding."""
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def _weight_bytes(parameters: int, quantised: int, bits: int | None, size: int) -> int:
    if not bits:
        return parameters * size
    return int(quantised * BITS[bits] / 8) + 4 * (parameters - quantised)


def _mlp_width(text: Any) -> int:
    """A token of a mixture of experts visits some of the routed ones and all shared ones."""
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        own = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        return experts * own + (getattr(text, "shared_expert_intermediate_size", None) or 0)
    return getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
