"""A sequence classifier that gives feedback, and its tokenizer: loaded, checked, asked in batches.

N texts   C classes
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ...distributed.sharding import is_sharded
from ...models.load import DTYPES, load_tokenizer
from ...models.names import fetch, where
from ...models.soft_caps import keep_soft_caps
from ...registry import did_you_mean
from ...storage.hub import brief_without_network

logger = logging.getLogger(__name__)


class Classifier:
    """A sequence classifier and its tokenizer: token ids in, logits out, in batches of texts of about one length.

    Args:
        model: a hub id or local folder (safetensors only), or the model itself.
        tokenizer: None: the one that lies beside the model.
        batch_size: texts in a forward pass.
        dtype: of the weights, "float32" and so on; None: as they were saved. Only for a model that is loaded here.
        device: where it stays; None: where `to` puts it.

    `window`: tokens that it can read, None if there is no limit.

    Raises:
        ValueError: for a model that does not load or is no trained classifier, or an option that does not fit.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number from 1 on, got {batch_size!r}.")
        if not isinstance(model, str) and dtype is not None:
            raise ValueError(f"dtype {dtype!r} is for a model given by name: this one is of {model.dtype} already.")
        loaded = _load(model, dtype, trust_remote_code) if isinstance(model, str) else _checked_object(model)
        keep_soft_caps(loaded)
        name = model if isinstance(model, str) else loaded.name_or_path
        if tokenizer is None and not name:
            raise ValueError(f"A {type(loaded).__name__} made in memory has no tokenizer: give one as `tokenizer`.")
        self.name = Path(name).name or type(loaded).__name__
        own = tokenizer is None
        self.tokenizer: Any = load_tokenizer(name, trust_remote_code=trust_remote_code) if own else tokenizer
        self.model = loaded.eval() if device is None else loaded.eval().to(device)  # eval: no dropout
        self.labels: int = loaded.config.num_labels
        self.window = _window(loaded.config, self.tokenizer)
        self._pinned = device is not None
        self._set_padding(batch_size)

    def _set_padding(self, batch_size: int) -> None:
        """Decoders score at the last token that is not the pad token of their config, and refuse batches if it names none.

        EOS cannot be taken for it: where a text ends with EOS, the score would be read a token earlier than in training.
        """
        config, tokenizer = self.model.config, self.tokenizer
        known = range(self.model.get_input_embeddings().weight.shape[0])  # some configs say -1
        pad = config.get_text_config().pad_token_id
        if pad not in known and tokenizer.pad_token_id in known and tokenizer.pad_token_id != tokenizer.eos_token_id:
            pad = tokenizer.pad_token_id
            self.model.config = copy.deepcopy(config)  # others may hold the one that it was made with
            self.model.config.get_text_config().pad_token_id = pad
        self._pad: int = pad if pad in known else 0
        self.batch_size = batch_size if pad in known else 1
        if self.batch_size < batch_size:
            logger.warning(
                "%s has no pad token apart from EOS, neither in its config nor in its tokenizer: it reads one text at a time. "
                "Set model.config.pad_token_id to the token that it was trained with.",
                self.name,
            )

    @torch.inference_mode()
    def logits(self, texts: Sequence[list[int]]) -> Tensor:
        """[N, C] float32 on the host, for the token ids of N texts, each of at least one token."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]), reverse=True)
        out = torch.empty(len(texts), self.labels)
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            out[numbers] = self._forward([torch.tensor(texts[number]) for number in numbers]).float().cpu()
        return out

    def _forward(self, texts: list[Tensor]) -> Tensor:
        ids = pad_sequence(texts, batch_first=True, padding_value=self._pad)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        no_cache = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        return self.model(**inputs, **no_cache).logits

    def to(self, device: Any) -> None:
        """Move the model, unless it was given a device of its own."""
        if not self._pinned:
            self.model.to(device)


def _load(name: str, dtype: str | torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    if fetch(name, "adapter_config.json", None):
        raise ValueError(
            f"{name!r} is an adapter: merge it into its base (merge_and_unload), and save that with its tokenizer."
        )
    try:
        with brief_without_network(name):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                where(name),
                use_safetensors=True,
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The model {name!r} did not load (only safetensors are read): {error}") from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{name!r} is not a sequence classifier. {str(error).splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name!r} is no trained {type(model).__name__}: it has no {missing[0]}, and random weights would judge. Give a model "
            "that was trained as a reward model and saved as a sequence classifier."
        )
    return _checked_object(model)


def _checked_object(model: Any) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A reward model must be a name or a transformers model, got a {type(model).__name__}. If it is an adapter on its base, "
            "give model.merge_and_unload()."
        )
    if any(map(is_sharded, model.parameters())):
        raise ValueError("DeepSpeed ZeRO-3 has cut the reward model: load it before the config of the run is made.")
    return model


def _window(config: Any, tokenizer: Any) -> int | None:
    """DeBERTa's positions are relative: what it calls the most of them is no limit."""
    relative = getattr(config, "position_biased_input", True) is False
    positions = None if relative else getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits, default=None)
