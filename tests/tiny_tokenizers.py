"""Tokenizers small enough to reason about, built in memory."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<think>"]
MERGES = [("a", "b"), ("ab", "c"), (":", "Ġ"), (":Ġ", "a"), ("Ġ", "a"), ("Ã", "©"), ("h", "i")]
"""They join across any boundary, for no regular expression splits the text first: "ab" + "c" is one token, so is ": a"."""

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = CHAT.replace(
    "{{ m.content }}<eos>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>{% endgeneration %}"
    "{% else %}{{ m.content }}<eos>{% endif %}",
)
"""The same text, and what the assistant says is marked as such."""

FORGETFUL = "{% if not loop.last and m.role == 'assistant' %}{{ m.content.split('/')[-1] }}{% else %}{{ m.content }}{% endif %}"
"""In place of a content: of an assistant's turn, what stands before a slash is left out once another turn follows."""

WITH_CALLS = "{{ tools | tojson if tools else '' }}" + CHAT.replace(
    "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
)
PLAIN_LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
"""No special token anywhere: turns end where a line does, and ": " joins with the text behind it."""


def byte_bpe(*, adds: str = "$A", chat_template: str | None = None, **special: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE that can write any text; `adds` is what it puts around each, as in "<bos> $A"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *("".join(merge) for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(token, SPECIAL.index(token)) for token in ("<bos>", "<eos>")]
    )
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"} | special
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)
    wrapped.add_special_tokens({"extra_special_tokens": SPECIAL[3:]})
    wrapped.chat_template = chat_template
    return wrapped


def word_level(*words: str) -> PreTrainedTokenizerFast:
    """One token per known word, an error for any other, nothing for "z". No BOS."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<pad>", "<eos>", *words])}))
    tokenizer.normalizer = normalizers.Replace("z", "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
