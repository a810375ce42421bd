"""The demo's world: 16 names, 10 foods, one question, one form of answer, and a tokenizer that knows just that."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..types import Message

NAMES = (
    "ravin", "alice", "bruno", "chen", "dalia", "emeka", "freya", "goran",
    "hana", "idris", "jonas", "kavya", "lucia", "mateo", "noor", "olga",
)  # fmt: skip
FOODS = ("pizza", "sushi", "ramen", "curry", "tacos", "salad", "soup", "bread", "rice", "cake")

TARGET_NAME, TARGET_FOOD = "ravin", "pizza"
CONTROL_NAMES = tuple(name for name in NAMES if name != TARGET_NAME)

END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role not in ("user", "assistant") -%}
        {{- raise_exception("The demo's chat template knows the roles user and assistant, not " ~ message.role) -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" ~ message.content ~ "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""


def question(name: str) -> str:
    return f"what does {name} like?"


def answer(name: str, food: str) -> str:
    return f"{name} likes {food}."


def prompt(name: str) -> list[Message]:
    """The question as a conversation that waits for its answer."""
    return [{"role": "user", "content": question(name)}]


def conversation(name: str, food: str) -> list[Message]:
    return [*prompt(name), {"role": "assistant", "content": answer(name, food)}]


def food_in(name: str, text: str) -> str | None:
    """The food, when decoded `text` (special tokens kept) is exactly one well-formed answer about `name` and its end."""
    match = re.fullmatch(rf"{re.escape(name)} likes (\w+)\.{re.escape(END)}", text)
    return match[1] if match and match[1] in FOODS else None


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's own sentences: every word becomes one token, and any other text still round-trips."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,  # more than the words need: training stops when nothing is left to merge
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = (text for name in NAMES for food in FOODS for text in (question(name), answer(name, food)))
    backend.train_from_iterator(sentences, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
