"""Texts -> ids by short cuts that must not show: no text twice, what a row's texts share tokenized once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, byte_bpe
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_trainer.data.tokens.encode import encode, encode_from_one_head, tokenizer_fingerprint

ALPHABET = [*"abch: i\n", "▁", "é", *SPECIAL[2:5]]


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """Characters and a few merges, with the leading space that SentencePiece models put at the start of a text."""
    pieces = [*SPECIAL, "▁", *"abch:i\né", "▁a", "ab", "ca"]
    core = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("a", "b"), ("c", "a")],
            unk_token="<pad>",
        )
    )
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    wrapped.add_special_tokens({"extra_special_tokens": SPECIAL[3:]})
    return wrapped


def stripping() -> PreTrainedTokenizerFast:
    """An added token that swallows the space before it: what stands before it is then no hard edge."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens([AddedToken("<|tool|>", lstrip=True, normalized=False)])
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_bpe(),
    "metaspace first": sentencepiece_like("first"),
    "metaspace always": sentencepiece_like("always"),
    "stripping": stripping(),
}
text = st.lists(st.sampled_from(ALPHABET), max_size=12).map("".join)
HOW = {"add_special_tokens": False, "control_as_text": False}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_what_rows_share_is_tokenized_once_and_nobody_notices(kind, rows):
    """The texts of a row: a prompt and what follows it. Token for token what one call per text gives."""
    tokenizer = TOKENIZERS[kind]
    texts = [[prompt, *(prompt + rest for rest in tails)] for prompt, tails in rows]
    want = [[tokenizer(one, add_special_tokens=False)["input_ids"] for one in row] for row in texts]
    assert encode_from_one_head(tokenizer, texts, **HOW) == want


def test_the_short_cut_is_taken(monkeypatch):
    """Else the test above compares a tokenizer with itself."""
    seen: list[str] = []
    tokenizer = TOKENIZERS["byte-level"]
    monkeypatch.setattr(
        "dpo_trainer.data.tokens.encode._encode",
        lambda tokenizer, texts, *how: seen.extend(texts) or [[0]] * len(texts),
    )
    prompt = "<|user|>a question<eos><|assistant|>"
    encode_from_one_head(tokenizer, [[prompt, prompt + "a", prompt + "b"]], **HOW)
    assert seen == ["<|user|>a question<eos>", "<|assistant|>", "<|assistant|>a", "<|assistant|>b"]
    seen.clear()
    encode_from_one_head(TOKENIZERS["stripping"], [[prompt, prompt + "a"]], **HOW)
    assert seen == [prompt, prompt + "a"]


def test_a_text_is_tokenized_once_however_often_it_comes():
    tokenizer = TOKENIZERS["byte-level"]
    ids = encode(tokenizer, ["abc", "x", "abc"], **HOW)
    assert ids[0] is ids[2]
    assert ids == [tokenizer(one)["input_ids"] for one in ("abc", "x", "abc")]


class Shouting(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus([one.upper() for one in text], *args, **kwargs)


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    plain = byte_bpe()
    own = Shouting(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>")
    assert encode(own, ["ab"], **HOW) == plain(["AB"])["input_ids"]
    assert encode(own, ["<eos>"], add_special_tokens=False, control_as_text=True) != [[own.eos_token_id]]


def test_control_tokens_are_text_where_they_must_be_and_tokens_again_afterwards():
    tokenizer = byte_bpe(adds="<bos> $A")
    (as_text,) = encode(tokenizer, ["a<eos>"], add_special_tokens=True, control_as_text=True)
    assert tokenizer.convert_ids_to_tokens(as_text) == ["<bos>", "a", "<", "e", "o", "s", ">"]
    (as_token,) = encode(tokenizer, ["a<eos>"], add_special_tokens=True, control_as_text=False)
    assert tokenizer.convert_ids_to_tokens(as_token) == ["<bos>", "a", "<eos>"]
    assert tokenizer("a<eos>")["input_ids"] == as_token


def test_the_fingerprint_does_not_depend_on_what_was_tokenized_before():
    tokenizer = byte_bpe()
    before = tokenizer_fingerprint(tokenizer)
    encode(tokenizer, ["a<eos>"], add_special_tokens=False, control_as_text=True)
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before
