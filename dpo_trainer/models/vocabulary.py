"""Token ids that the models of a run have embeddings for. An id beyond them is an error inside the model, on a GPU one without a line."""

from __future__ import annotations

from typing import Any

from torch import nn

from .unwrap import base_model

OF_POLICY = ("the model", "call model.resize_token_embeddings(len(tokenizer))")
OF_REFERENCE = (
    "the reference (ref_model)",
    "give a ref_model with as many embeddings as the model (ref_model.resize_token_embeddings), or leave ref_model out: the "
    "reference is then the model as training begins",
)


def vocabulary_size(model: nn.Module) -> int | None:
    """How many input embeddings a model has; None where it does not tell."""
    return getattr(base_model(model).get_input_embeddings(), "num_embeddings", None)


def smallest_vocabulary(policy: nn.Module, reference: nn.Module | None) -> dict[str, Any]:
    """The arguments of `Needs` that say which token ids every model of the run can read.

    `reference`: the second model of the run, None where there is none.
    """
    own = vocabulary_size(policy)
    other = None if reference is None else vocabulary_size(reference)
    if other is not None and (own is None or other < own):
        return {"vocabulary_size": other, "smallest_model": OF_REFERENCE}
    return {"vocabulary_size": own, "smallest_model": OF_POLICY}


def check_pad_token(pad_token_id: int, policy: nn.Module, reference: nn.Module | None) -> None:
    """ValueError for a pad token that a model has no embedding for: batches could not be read, nor the saved model be loaded."""
    smallest = smallest_vocabulary(policy, reference)
    size, (model, way_out) = smallest["vocabulary_size"], smallest["smallest_model"]
    if size is not None and pad_token_id >= size:
        raise ValueError(
            f"The pad token of the tokenizer has the id {pad_token_id}, and {model} has {size} embeddings. Take another pad token "
            f"(tokenizer.pad_token = tokenizer.eos_token), or {way_out}."
        )


def refuse_smaller_reference(policy: nn.Module, reference: nn.Module | None, tokenizer: Any) -> None:
    """ValueError where the policy may sample tokens that the reference cannot read. Ids beyond the tokenizer are not sampled."""
    smallest = smallest_vocabulary(policy, reference)
    size, (model, way_out) = smallest["vocabulary_size"], smallest["smallest_model"]
    if model == OF_REFERENCE[0] and size < len(tokenizer):
        raise ValueError(
            f"{model} has {size} embeddings, and the tokenizer has {len(tokenizer)} tokens, which the model may sample: {way_out}."
        )
