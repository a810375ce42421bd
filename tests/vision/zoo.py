"""Tiny vision-language models with their processors, built from configs: one function per family.

model, processor = zoo.ZOO["qwen2_vl"]()               2 layers of 32, pictures of 32 x 32 in patches of 8, float32
text = processor.apply_chat_template(zoo.question("what?"), add_generation_prompt=True)
processor(images=[[zoo.noise()]], text=[text], return_mm_token_type_ids=True, return_tensors="pt")

One token per byte of text, and the special tokens of the family under its names. What differs between families in
earnest differs here too: who writes the BOS (template, tokenizer, processor, nobody), tiles, positions, attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.smolvlm import processing_smolvlm

Pair = tuple[PreTrainedModel, ProcessorMixin]

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SIDE, PATCH = 32, 8  # pixels of a picture (or a tile of one), and of a patch of it
SQUARE = {"height": SIDE, "width": SIDE}
TOKENS = 4  # per picture or tile: of its 4 x 4 patches, 2 x 2 become one token each

# Unlike the usual 0.02, large enough for attention to differ between tokens, and so for pictures to matter.
INITIALIZER_RANGE = 0.2
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
VISION = {**LAYERS, "image_size": SIDE, "patch_size": PATCH, "initializer_range": INITIALIZER_RANGE}
CLIP = {**VISION, "model_type": "clip_vision_model", "patch_size": 16, "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}


def noise(seed: int = 0, height: int = 40, width: int = 60) -> Image.Image:
    """A picture of noise: no two seeds alike, in any patch."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(text: str, pictures: int = 1) -> list[dict[str, Any]]:
    """A conversation of one turn: `pictures`, then `text`."""
    return [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}]


def tokenizer(
    *, pad: str, eos: str, bos: str | None = None, writes_bos: bool = False, others: Iterable[str] = (), **named: str
) -> PreTrainedTokenizerFast:
    """One token per byte; special tokens are `others`, and `named` ones: attributes of the tokenizer, with their `_id`.

    `writes_bos`: puts a BOS before every text, unless told not to add special tokens.
    """
    special = list(dict.fromkeys([pad, eos, *([bos] if bos else []), *named.values(), *others]))
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*special, *ALPHABET])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if writes_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, special.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )


def content(image: str, text: str = "{{ part.text }}", string: str = "{{ message.content }}") -> str:
    """The piece of a chat template that writes a message's content: `image` and `text` for its parts, or its string."""
    return (
        f"{{% if message.content is string %}}{string}{{% else %}}{{% for part in message.content %}}"
        f"{{% if part.type == 'image' %}}{image}{{% elif part.type == 'text' %}}{text}{{% endif %}}"
        "{% endfor %}{% endif %}"
    )


def chatml(image: str, before: str = "") -> str:
    """`<|im_start|>role`, the content, `<|im_end|>`; `before` is written at the start of each message."""
    return (
        f"{{% for message in messages %}}{before}<|im_start|>{{{{ message.role }}}}\n{content(image)}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def utterances(start: str) -> str:
    """`User:` and `Assistant:`, without a space before a picture."""
    space = "{% if message.content is string or message.content[0].type != 'image' %} {% endif %}"
    return (
        f"{start}{{% for message in messages %}}{{{{ message.role | capitalize }}}}:{space}{content('<image>')}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )


LLAVA_CHAT = (
    "{% for message in messages %}{{ message.role | upper }}: " + content("<image>\n") + "{% if message.role =="
    " 'assistant' %}</s>{% else %} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Nothing for add_generation_prompt to add.
LLAVA_NEXT_CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %} " + content("<image>\n") + "</s>"
    "{% else %}[INST] " + content("<image>\n") + " [/INST]{% endif %}{% endfor %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SYSTEM = (
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
GEMMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    + content("<start_of_image>", text="{{ part.text | trim }}", string="{{ message.content | trim }}")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The family has none. Its processor writes a BOS after the last picture, and a newline after the text.
PALIGEMMA_CHAT = (
    "{% for message in messages %}" + content("<image>") + "{% if message.role == 'assistant' %}<eos>"
    "{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)

# In the place of a video processor, which would need torchvision: the attributes that a processor asks each part for.
NO_VIDEOS = SimpleNamespace(model_input_names=[], _auto_class=None, num_frames=None, fps=None)


class ImagesOnly(ProcessorMixin):
    """A processor that demands a video processor, and takes NO_VIDEOS for one; saved and loaded without it."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is NO_VIDEOS:
            return SimpleNamespace
        return super().check_argument_for_proper_class(argument_name, argument)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "video_processor"}

    @classmethod
    def _get_arguments_from_pretrained(cls, folder: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        text = cls._load_tokenizer_from_pretrained("tokenizer", folder, **kwargs)
        return [AutoImageProcessor.from_pretrained(folder, **kwargs), text, NO_VIDEOS]


class SmolVLMImages(ImagesOnly, transformers.SmolVLMProcessor):
    pass


class Qwen2VLImages(ImagesOnly, transformers.Qwen2VLProcessor):
    pass


class Qwen25VLImages(ImagesOnly, transformers.Qwen2_5_VLProcessor):
    pass


class Qwen3VLImages(ImagesOnly, transformers.Qwen3VLProcessor):
    pass


class InternVLImages(ImagesOnly, transformers.InternVLProcessor):
    pass


# AutoProcessor finds by name what a saved processor says that it is.
AutoProcessor.register(transformers.SmolVLMConfig, SmolVLMImages, exist_ok=True)
AutoProcessor.register(transformers.Qwen2VLConfig, Qwen2VLImages, exist_ok=True)
AutoProcessor.register(transformers.Qwen2_5_VLConfig, Qwen25VLImages, exist_ok=True)
AutoProcessor.register(transformers.Qwen3VLConfig, Qwen3VLImages, exist_ok=True)
AutoProcessor.register(transformers.InternVLConfig, InternVLImages, exist_ok=True)

# Spells out how many frames a video has; its processor refuses to be without it.
processing_smolvlm.num2words = processing_smolvlm.num2words or str


def text_config(model_type: str, words: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        **LAYERS,
        "num_key_value_heads": 2,
        "vocab_size": len(words),
        "max_position_embeddings": 512,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "initializer_range": INITIALIZER_RANGE,
        **more,
    }


def build(model_type: str, seed: int, **config: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    filled = AutoConfig.for_model(model_type, initializer_range=INITIALIZER_RANGE, **config)
    model = AutoModelForImageTextToText.from_config(filled, dtype=torch.float32)
    # Matrices that begin at zero: Gemma 3's projection, with which no picture would matter, InternVL's positions.
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=INITIALIZER_RANGE)
    return model


# The first token of CLIP is no patch, and left out.
PATCHES_OF_CLIP = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def llava(seed: int = 0) -> Pair:
    """CLIP, whose last layer has no part in it, and Llama. The tokenizer writes the BOS."""
    words = tokenizer(pad="<pad>", bos="<s>", eos="</s>", writes_bos=True, image_token="<image>")
    model = build(
        "llava",
        seed,
        text_config=text_config("llama", words),
        vision_config=CLIP,
        image_token_index=words.image_token_id,
        image_seq_length=TOKENS,
    )
    pictures = transformers.LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return model, transformers.LlavaProcessor(pictures, words, **PATCHES_OF_CLIP, chat_template=LLAVA_CHAT)


def llava_next(seed: int = 0) -> Pair:
    """Llava in tiles, a newline after each row of patches: tokens per picture depend on its shape."""
    words = tokenizer(pad="<pad>", bos="<s>", eos="</s>", writes_bos=True, image_token="<image>")
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    model = build(
        "llava_next",
        seed,
        text_config=text_config("mistral", words),
        vision_config=CLIP,
        image_token_index=words.image_token_id,
        image_grid_pinpoints=grids,
        image_seq_length=TOKENS,
    )
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=grids
    )
    return model, transformers.LlavaNextProcessor(pictures, words, **PATCHES_OF_CLIP, chat_template=LLAVA_NEXT_CHAT)


TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]


def idefics3(seed: int = 0) -> Pair:
    """Each picture as 2 x 2 or fewer tiles, each behind its row and column, and as a whole. Both write a BOS."""
    words = tokenizer(
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        eos="<end_of_utterance>",
        writes_bos=True,
        others=["<image>", "<fake_token_around_image>", "<global-img>", *TILES],
    )
    model = build(
        "idefics3",
        seed,
        text_config=text_config("llama", words),
        vision_config=VISION,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return model, transformers.Idefics3Processor(
        pictures, words, image_seq_len=TOKENS, chat_template=utterances("<|begin_of_text|>")
    )


def smolvlm(seed: int = 0) -> Pair:
    """The tiles of Idefics3. The template writes the BOS, which is the token that opens the conversation."""
    words = tokenizer(
        pad="<|im_end|>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        others=TILES,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        video_token="<video>",
    )
    model = build(
        "smolvlm",
        seed,
        text_config=text_config("llama", words),
        vision_config=VISION,
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    pictures = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return model, SmolVLMImages(
        pictures, words, NO_VIDEOS, image_seq_len=TOKENS, chat_template=utterances("<|im_start|>")
    )


def qwen_words() -> PreTrainedTokenizerFast:
    """Without a BOS."""
    return tokenizer(
        pad="<|endoftext|>",
        eos="<|im_end|>",
        others=["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    )


def qwen_ids(words: PreTrainedTokenizerFast) -> dict[str, int]:
    names = (
        ("image_pad", "image"),
        ("video_pad", "video"),
        ("vision_start", "vision_start"),
        ("vision_end", "vision_end"),
    )
    return {f"{ours}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for token, ours in names}


def qwen_pictures() -> Any:
    """Pictures as large as they come, from 4 tokens to 9: patches side by side in one row for the whole batch."""
    pixels = {"shortest_edge": SIDE**2, "longest_edge": (SIDE + SIDE // 2) ** 2}
    return transformers.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=pixels)


def mrope(**more: Any) -> dict[str, Any]:
    """Of the 4 frequencies of a head of 8, those for time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **more}}


def qwen2_vl(seed: int = 0) -> Pair:
    """Positions in three dimensions, from `mm_token_type_ids`. The template adds a system message."""
    words = qwen_words()
    vision = {"depth": 2, "num_heads": 4, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "patch_size": PATCH}
    model = build(
        "qwen2_vl",
        seed,
        text_config=text_config("qwen2_vl_text", words, **mrope()),
        vision_config={**vision, "initializer_range": INITIALIZER_RANGE},
        **qwen_ids(words),
    )
    return model, Qwen2VLImages(qwen_pictures(), words, NO_VIDEOS, chat_template=chatml(QWEN_IMAGE, QWEN_SYSTEM))


QWEN_VISION = {
    "depth": 2,
    "num_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "initializer_range": INITIALIZER_RANGE,
}


def qwen2_5_vl(seed: int = 0) -> Pair:
    """Qwen2-VL with attention inside windows of 2 x 2 tokens in the first layer of vision."""
    words = qwen_words()
    model = build(
        "qwen2_5_vl",
        seed,
        text_config=text_config("qwen2_5_vl_text", words, **mrope()),
        vision_config={**QWEN_VISION, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
        **qwen_ids(words),
    )
    return model, Qwen25VLImages(qwen_pictures(), words, NO_VIDEOS, chat_template=chatml(QWEN_IMAGE, QWEN_SYSTEM))


def qwen3(model_type: str, seed: int, **text: Any) -> Pair:
    words = qwen_words()
    model = build(
        model_type,
        seed,
        text_config=text_config(f"{model_type}_text", words, head_dim=8, **mrope(mrope_interleaved=True), **text),
        vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **qwen_ids(words),
    )
    return model, Qwen3VLImages(qwen_pictures(), words, NO_VIDEOS, chat_template=chatml(QWEN_IMAGE))


def qwen3_vl(seed: int = 0) -> Pair:
    """Features of an early layer of vision are added to the image tokens after the first layer of text."""
    return qwen3("qwen3_vl", seed)


def qwen3_vl_moe(seed: int = 0) -> Pair:
    """A mixture of 4 experts, 2 at work for each token."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    return qwen3("qwen3_vl_moe", seed, **experts)


def gemma3(seed: int = 0) -> Pair:
    """Image tokens see each other both ways, from `token_type_ids`; windows of 8 tokens in the outer layers of 3."""
    words = tokenizer(
        pad="<pad>",
        eos="<eos>",
        bos="<bos>",
        writes_bos=True,
        others=["<start_of_turn>", "<end_of_turn>"],
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    layers = {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
    }
    model = build(
        "gemma3",
        seed,
        text_config=text_config("gemma3_text", words, **layers),
        vision_config=SIGLIP,
        mm_tokens_per_image=TOKENS,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    pictures = transformers.Gemma3ImageProcessorPil(size=SQUARE)
    return model, transformers.Gemma3Processor(pictures, words, image_seq_length=TOKENS, chat_template=GEMMA3_CHAT)


def internvl(seed: int = 0) -> Pair:
    """Each picture in up to 2 tiles, and then as a whole too. No BOS."""
    words = tokenizer(
        pad="<|endoftext|>",
        eos="<|im_end|>",
        others=["<|im_start|>"],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    model = build(
        "internvl",
        seed,
        text_config=text_config("qwen2", words),
        vision_config=VISION,
        image_token_id=words.context_image_token_id,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    pictures = transformers.GotOcr2ImageProcessorPil(size=SQUARE, max_patches=2)
    return model, InternVLImages(
        pictures, words, NO_VIDEOS, image_seq_length=TOKENS, chat_template=chatml("<IMG_CONTEXT>\n")
    )


def paligemma(seed: int = 0) -> Pair:
    """All of a prompt, words too, sees itself both ways; the processor writes the BOS, after the last picture."""
    words = tokenizer(pad="<pad>", eos="<eos>", bos="<bos>", image_token="<image>")
    pictures = transformers.SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 4 * TOKENS
    processor = transformers.PaliGemmaProcessor(pictures, words, chat_template=PALIGEMMA_CHAT)
    model = build(
        "paligemma",
        seed,
        text_config=text_config("gemma", words, head_dim=8),  # with the tokens that the processor has added
        vision_config=SIGLIP,
        image_token_index=words.image_token_id,
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(words),
    )
    return model, processor


ZOO = {
    family.__name__: family
    for family in (
        llava,
        llava_next,
        idefics3,
        smolvlm,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        gemma3,
        internvl,
        paligemma,
    )
}
