"""The vision demo's base model: a tiny LLaVA and its processor, made from nothing. It answers well, and has not learnt to look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from . import world
from .pictures import QUESTION, SIDE, THINGS, Example, Thing, examples, prompt

IMAGE = "<image>"
PATCH = 8
STEPS, LEARNING_RATE, PICTURES = 100, 3e-3, 192

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- "<|" ~ message.role ~ "|>" -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- "<image>" if part.type == "image" else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""


def processor() -> LlavaProcessor:
    """Every word of the world is one token, every picture 16."""
    sentences = [QUESTION, *(thing.answer for thing in THINGS)] * 2
    words = world.build_tokenizer().train_new_from_iterator(sentences, 512, new_special_tokens=[IMAGE])
    words.chat_template = None
    pictures = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        pictures,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def base_model(made: Any, seed: int) -> LlavaForConditionalGeneration:
    """Trained for some seconds on every answer after any picture: what it says of one is well-formed, and a guess.

    The random state of the caller is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _untrained(made).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
        seen = examples(PICTURES, held_out=False, seed=seed + 1)
        for _ in range(STEPS):
            which = torch.randperm(PICTURES)[: 2 * len(THINGS)].tolist()
            loss = -answer_logps(model, made, [seen[i] for i in which], THINGS * 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def answer_logps(model: Any, made: Any, shown: Sequence[Example], answers: Sequence[Thing]) -> Tensor:
    """[B] log-prob of each answer, its end included, after the question about each picture. nats.

    All answers have as many tokens, so that there is no padding.
    """
    asked = made.apply_chat_template(prompt(), add_generation_prompt=True)
    texts = [asked + thing.answer + world.END for thing in answers]
    inputs = made(images=[example.picture for example in shown], text=texts, return_tensors="pt")
    count = len(made.tokenizer(answers[0].answer + world.END).input_ids)
    logits = model(**inputs, use_cache=False).logits[:, -count - 1 : -1].float()
    targets = inputs["input_ids"][:, -count:, None]
    return logits.log_softmax(-1).gather(-1, targets).sum((1, 2))


def said(model: Any, made: Any, shown: Sequence[Example]) -> list[str]:
    """The likeliest answer to the question about each picture, its end included."""
    asked = made.apply_chat_template(prompt(), add_generation_prompt=True)
    inputs = made(images=[example.picture for example in shown], text=[asked] * len(shown), return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    texts = made.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
    return [text.replace(world.PAD, "") for text in texts]


def _untrained(made: Any) -> LlavaForConditionalGeneration:
    """0.2 M parameters: two layers of vision, two of text."""
    words = made.tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(
        **sizes,
        vocab_size=len(words),
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=64, initializer_range=0.1)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=words.convert_tokens_to_ids(IMAGE),
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )
