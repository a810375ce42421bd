"""The tokenizer of a processor."""

from __future__ import annotations

import copy
from typing import Any

from datasets.utils._dill import dumps
from transformers import PreTrainedTokenizerBase


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor, with the processor's chat template; or the tokenizer itself."""
    if isinstance(
        processing_class, PreTrainedTokenizerBase
    ):  # some hold another one, of the library that they stand for
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    template = getattr(processing_class, "chat_template", None)
    if template is None or template == tokenizer.chat_template:
        return tokenizer
    twin = copy.copy(tokenizer)
    twin.chat_template = template
    return twin


def works_in_processes(tokenizer: Any) -> bool:
    """Whether it can be handed to another process; one that has a part in Python may not."""
    try:
        dumps(tokenizer)
    except Exception:  # see above
        return False
    return True
