"""A tokenizer for each template: one token per byte, and one per control string that the template writes."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
THOUGHT = ("<think>", "</think>")
"""Tokens that many models have, and do not count as special."""

CONTROL = re.compile(
    r"""<\|"\|> | <\|[^\s|<>{}'"%]{1,40}\|?> | <[a-z_]{1,30}\|> | <｜[^\s<>{}'"]{1,40}｜>
    | </?s> | \[/?[A-Z_]{3,}\] | <(?:start|end|begin|beginning)_of_\w+> | <SPECIAL_\d+> | <seed:[a-z]+>
    | \]~!?b[\[\]] | \[e~\[ | \[\|[a-z]+\|\] | <(?:bos|eos|sep|sop|eop)> | \[gMASK\]""",
    re.VERBOSE,
)


OPENS = re.compile(r"start|begin|chatbot|think|assistant\W*$", re.IGNORECASE)


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Any text comes back from its tokens unchanged. EOS is the token that the template writes after an answer, if any."""
    control = sorted(set(CONTROL.findall(template)) - {BOS, EOS, PAD})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([BOS, EOS, PAD, *control])
    core.add_tokens([AddedToken(text, normalized=False) for text in THOUGHT])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=control,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    made.eos_token = _end_of_an_answer(made) or EOS
    return made


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches each special token of the tokenizer."""
    return re.compile("|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True))))


def _end_of_an_answer(tokenizer: Any) -> str:
    """The last control token behind an answer that does not open something new (a template may add a generation prompt)."""
    conversation = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    for tools in (None, []):
        try:
            text = tokenizer.apply_chat_template(conversation, tools=tools, tokenize=False)
        except Exception:  # a template is a program and may raise anything
            continue
        behind = control_pattern(tokenizer).findall(text.partition("ANSWER")[2])
        return next((token for token in reversed(behind) if not OPENS.search(token)), "")
    return ""
