"""The tiny vision-language models are what tests of real ones need: pictures matter, and they save and load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.fixture(params=list(zoo.ZOO))
def family(request) -> str:
    return request.param


def asked(processor, text: str = "what?", pictures: int = 1) -> str:
    return processor.apply_chat_template(zoo.question(text, pictures), add_generation_prompt=True)


def inputs(processor, images: list[list[Any]], texts: list[str], **options: Any) -> dict[str, Any]:
    """What the model reads of what the processor writes."""
    made = processor(images=images, text=texts, return_mm_token_type_ids=True, return_tensors="pt", **options)
    return {name: value for name, value in made.items() if name != "labels"}


def logits(model, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def at_pictures(model, batch: dict[str, Any]) -> Tensor:
    """Where the first row has image tokens."""
    return (batch["input_ids"][0] == model.config.image_token_id).nonzero().flatten()


def test_a_picture_changes_what_comes_after_it_and_nothing_before(family):
    model, processor = zoo.ZOO[family]()
    one, other = (inputs(processor, [[zoo.noise(seed)]], [asked(processor)]) for seed in (0, 1))
    at = at_pictures(model, one)
    assert zoo.TOKENS <= len(at) <= 5 * zoo.TOKENS
    differ = (logits(model, one) - logits(model, other))[0].abs().amax(-1)
    assert differ[at[-1] + 1 :].min() > 1e-4
    assert differ[: at[0]].sum() == 0


def test_small_and_seeded(family):
    (model, processor), (same, _), (another, _) = (zoo.ZOO[family](seed) for seed in (0, 0, 1))
    assert sum(parameter.numel() for parameter in model.parameters()) < 150_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.shape == (len(processor.tokenizer), 32)
    batch = inputs(processor, [[zoo.noise()]], [asked(processor)])
    want = logits(model, batch)
    assert want.shape[-1] == len(processor.tokenizer)
    assert torch.equal(logits(same, batch), want)
    assert not torch.allclose(logits(another, batch), want)


def test_saved_and_loaded(family, tmp_path):
    """Loaded models are in evaluation mode, new ones are not: there is no dropout."""
    model, processor = zoo.ZOO[family]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)

    want, got = model.state_dict(), loaded.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)

    batch, again = (inputs(each, [[zoo.noise()]], [asked(each)]) for each in (processor, reader))
    assert again.keys() == batch.keys()
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    # The same weights at other addresses: those of a file are not aligned, and their products are summed in another
    # order. Worst seen 3e-7, with experts.
    torch.testing.assert_close(logits(loaded, again), logits(model, batch), rtol=0, atol=5e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_the_same_alone_and_padded(family, side):
    """Pictures of different shapes, two in one row and one in the other."""
    model, processor = zoo.ZOO[family]()
    images = [[zoo.noise(0), zoo.noise(1, 30, 60)], [zoo.noise(2, 50, 20)]]
    texts = [asked(processor, "which is longer?", 2), asked(processor, "a")]
    together = logits(model, inputs(processor, images, texts, padding=True, padding_side=side))
    for row in (0, 1):
        alone = logits(model, inputs(processor, [images[row]], [texts[row]]))[0]
        padded = together[row, -len(alone) :] if side == "left" else together[row, : len(alone)]
        # float32, sums over rows of other lengths: worst seen 3e-6.
        torch.testing.assert_close(padded, alone, rtol=0, atol=5e-5)


def test_chat_templates_read_parts_and_strings(family):
    _, processor = zoo.ZOO[family]()
    render = processor.apply_chat_template

    def turns(*texts: str) -> list[dict[str, Any]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns("a", "b", "c")]
    assert render(parts) == render(turns("a", "b", "c"))
    assert render(turns("a", "b")).startswith(render(turns("a"), add_generation_prompt=True))
    # The last turn ends, with a token or a line of its own.
    assert not render(turns("a", "b")).endswith("b")
    assert asked(processor, pictures=2).count(processor.image_token) == 2
    # Tokenized at once, a conversation has its picture with it.
    shown = zoo.question("what?")
    shown[0]["content"][0]["image"] = zoo.noise()
    batch = render(shown, tokenize=True, return_dict=True)
    assert {"input_ids", "pixel_values"} <= batch.keys()


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "llava_next", "internvl"], indirect=True)
def test_tiles_follow_the_shape_of_a_picture(family):
    model, processor = zoo.ZOO[family]()
    tokens = [
        len(at_pictures(model, inputs(processor, [[zoo.noise(0, height, width)]], [asked(processor)])))
        for height, width in [(32, 32), (32, 64), (20, 90)]
    ]
    assert len(set(tokens)) > 1
    assert max(tokens) > 2 * zoo.TOKENS


def sees_ahead(model, batch: dict[str, Any], at: int, later: int) -> bool:
    """Whether position `at` changes with the token at `later`."""
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, later] += 1
    return bool((logits(model, batch) - logits(model, other))[0, at].any())


def test_only_paligemma_looks_ahead_and_token_types_say_where(family):
    """Where they are 0 or missing, in words too: rows that hold an answer must say 1 there, or it is seen beforehand."""
    model, processor = zoo.ZOO[family]()
    batch = inputs(processor, [[zoo.noise()]], [asked(processor)])
    assert sees_ahead(model, batch, -3, -2) == (family == "paligemma")
    if family == "paligemma":
        without = {name: value for name, value in batch.items() if name != "token_type_ids"}
        assert sees_ahead(model, without, -3, -2)
        batch["token_type_ids"][0, -3:] = 1
        assert not sees_ahead(model, batch, -3, -2)
        assert not sees_ahead(model, batch, -4, -2)


def test_image_tokens_of_gemma3_see_each_other():
    model, processor = zoo.gemma3()
    batch = inputs(processor, [[zoo.noise()]], [asked(processor)])
    causal = {name: value for name, value in batch.items() if name != "token_type_ids"}
    first = at_pictures(model, batch)[0]
    assert (logits(model, batch) - logits(model, causal))[0, first].abs().max() > 1e-4


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"], indirect=True)
def test_qwen_counts_positions_in_three_dimensions(family):
    """From token types. Without them it refuses pictures, but for one model, which takes positions in a row instead."""
    model, processor = zoo.ZOO[family]()
    batch = inputs(processor, [[zoo.noise()]], [asked(processor)])
    in_a_row = logits(model, {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]})
    assert (logits(model, batch) - in_a_row).abs().max() > 1e-4
    del batch["mm_token_type_ids"]
    if family == "qwen2_5_vl":
        assert torch.equal(logits(model, batch), in_a_row)
    else:
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            logits(model, batch)


def test_the_layers_of_gemma3_have_windows_that_matter():
    """A window of 8 against one of 512: a prompt is longer than 8."""
    model, processor = zoo.gemma3()
    assert set(model.config.text_config.layer_types) == {"sliding_attention", "full_attention"}
    batch = inputs(processor, [[zoo.noise()]], [asked(processor, "what is to be seen here?")])
    near = logits(model, batch)
    model.config.text_config.sliding_window = 512
    assert not torch.allclose(logits(model, batch), near)


def test_the_mixture_says_how_it_was_routed():
    model, processor = zoo.qwen3_vl_moe()
    batch = inputs(processor, [[zoo.noise()]], [asked(processor)])
    with torch.no_grad():
        out = model(**batch)
    assert [layer.shape for layer in out.router_logits] == [(batch["input_ids"].numel(), 4)] * 2
    assert out.aux_loss > 0
