"""How long a row may be for a model: what its table of positions has, and what it was made for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .unwrap import base_model

TABLE = re.compile(r"(^|\.)(wpe|\w*pos(ition)?s?_?emb\w*|emb\w*_pos(ition)?s?)(\.base_layer|\.original_module)?$")
"""The path of a table of positions: `wpe`, `embed_positions`, `position_embeddings`, `pos_embed` ..., and such under PEFT."""

OTHERS = re.compile(r"vision|visual|image|audio|speech|relative|encoder\.")
"""In paths of what counts no tokens of the text."""


def table_of_positions(model: nn.Module) -> int | None:
    """The most tokens of a row for which the model has positions, where it looks them up in a table; None where it computes
    them (rotary, ALiBi, none at all). Beyond the table there is an IndexError, on a GPU a device-side assert.

    Tables are those that the modules hold: of GPT-2, OPT (whose first two rows are for padding), GPT-J ...
    """
    return min(_tables(base_model(model)), default=None)


def _tables(model: nn.Module) -> Iterator[int]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and TABLE.search(name) and not OTHERS.search(name):
            reserved = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            yield module.num_embeddings - reserved
    for name, buffer in model.named_buffers():  # sines and cosines that are not computed anew: GPT-J, CodeGen
        if TABLE.search(name) and buffer.dim() == 2 and not OTHERS.search(name):
            yield buffer.shape[0]


def window_of(model: nn.Module) -> int | None:
    """The most tokens that the model was made for, by its config; None where it does not say."""
    config = getattr(base_model(model), "config", None)
    if config is None:
        return None
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
