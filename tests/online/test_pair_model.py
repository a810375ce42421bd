"""The judge that is a pairwise model: verdicts derived by hand from logits that are known, and what must not change them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from dpo_trainer.online.feedback.pair_model import PairModelJudge
from dpo_trainer.online.feedback.protocol import Comparison, make_judge
from dpo_trainer.online.samples import Completion, Sampled

MARKS = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]
SOURCE, FIRST, SECOND = range(tiny.VOCABULARY, tiny.VOCABULARY + 3)


def tokenizer(special: bool = True):
    made = tiny.tokenizer()
    made.add_tokens(MARKS, special_tokens=special)
    return made


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


(X,) = ids("x")


def bert(num_labels: int = 1, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {
        "vocab_size": tiny.VOCABULARY + 3,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "num_labels": num_labels,
    }
    return BertForSequenceClassification(BertConfig(**{**sizes, **options, **config}))


def llama(num_labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "vocab_size": tiny.VOCABULARY + 3, "num_labels": num_labels, "max_position_embeddings": 512}
    return LlamaForSequenceClassification(LlamaConfig(**sizes))


def counting(monkeypatch, *, per_x: float, bias: float = 0.0, num_labels: int = 1):
    """A model whose logit is `per_x` for each x of the first answer, less those of the second, and `bias` for the first place.

    Returned beside it: the texts that it reads, without padding.
    """
    model, read = bert(num_labels), []

    def forward(input_ids, attention_mask):
        logits = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            text = row[mask.bool()].tolist()
            read.append(text)
            first, second = text.index(FIRST), text.index(SECOND)
            one, two = (per_x * part.count(X) for part in (text[first:second], text[second:]))
            logits.append([one - two + bias] if num_labels == 1 else [one + bias, two])
        return SimpleNamespace(logits=torch.tensor(logits))

    monkeypatch.setattr(model, "forward", forward)
    return model, read


def sampled(*texts: str, prompt: Any = "why?") -> Sampled:
    answers = [Completion(ids=[1], text=text, finished=True) for text in texts]
    return Sampled(example_id=7, prompt=prompt, prompt_ids=[5], completions=answers)


def compare(judge: PairModelJudge, first: str, second: str, prompt: str = "why?") -> float:
    (verdict,) = judge.compare([Comparison(sampled(first, second, prompt=prompt), 0, 1)])
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize(
    ("first", "second", "temperature", "probability"),
    [
        ("x", "", 1.0, 3 / 4),  # log-odds ln 3: three to one
        ("", "x", 1.0, 1 / 4),
        ("xx", "", 1.0, 9 / 10),
        ("xx", "", 2.0, 3 / 4),  # ln 9 by 2 is ln 3
        ("xx", "xx", 1.0, 1 / 2),
    ],
)
def test_a_logit_is_the_log_odds_of_the_first(monkeypatch, num_labels, first, second, temperature, probability):
    model, _ = counting(monkeypatch, per_x=math.log(3), num_labels=num_labels)
    judge = PairModelJudge(model=model, tokenizer=tokenizer(), temperature=temperature)
    # The logits are float32.
    assert compare(judge, first, second) == pytest.approx(probability, abs=1e-6)


def test_both_orders_are_asked_and_averaged(monkeypatch):
    """ln 3 for an x, ln 9 for the first place: odds 27:1 and, in the other order, 3:1 for the other; (27/28 + 1/4) / 2."""
    model, read = counting(monkeypatch, per_x=math.log(3), bias=math.log(9))
    judge = PairModelJudge(model=model, tokenizer=tokenizer())
    assert compare(judge, "x", "y") == pytest.approx((27 / 28 + 1 / 4) / 2, abs=1e-6)
    assert len(read) == 2
    once = PairModelJudge(model=model, tokenizer=tokenizer(), swap=False)
    assert compare(once, "x", "y") == pytest.approx(27 / 28, abs=1e-6)
    assert len(read) == 3


def test_scores_of_three_answers(monkeypatch):
    """Odds 3 for each x more: against the two others, "xx" has (9/10 + 3/4) / 2, "" the rest, and "x" a half."""
    model, _ = counting(monkeypatch, per_x=math.log(3))
    judge = PairModelJudge(model=model, tokenizer=tokenizer(), batch_size=2)
    ((none, two, one),) = judge([sampled("", "xx", "x")])
    assert [none, one, two] == pytest.approx([0.175, 0.5, 0.825], abs=1e-6)
    assert judge.counts == {"comparisons": 3.0, "cut": 0.0}


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_batch_says_the_same_as_one_by_one_and_the_other_order_the_opposite(make, num_labels):
    samples = [sampled("a", "bb"), sampled("no, never", "x" * 40, prompt="really?"), sampled("c", "")]
    forth = [Comparison(s, 0, 1) for s in samples]
    back = [Comparison(s, 1, 0) for s in samples]
    judge = PairModelJudge(model=make(num_labels), tokenizer=tokenizer(), batch_size=16)
    alone = PairModelJudge(model=make(num_labels), tokenizer=tokenizer(), batch_size=1)
    got = judge.compare(forth)
    # float32, sums in another order: the worst seen is 2.4e-7.
    assert got == pytest.approx(alone.compare(forth), abs=1e-5)
    assert [1 - verdict for verdict in judge.compare(back)] == pytest.approx(got, abs=1e-5)
    assert max(got) - min(got) > 1e-3  # they are no half each
    once = PairModelJudge(model=make(num_labels), tokenizer=tokenizer(), swap=False)
    assert abs(once.compare(forth)[0] - got[0]) > 1e-4  # without the swap, the place counts


# --- what the model reads ---


def test_the_parts_stand_behind_their_marks(monkeypatch):
    model, read = counting(monkeypatch, per_x=1.0)
    compare(PairModelJudge(model=model, tokenizer=tokenizer(), swap=False), "no", "yes")
    assert read == [[SOURCE, *ids("why?"), FIRST, *ids("no"), SECOND, *ids("yes")]]


def test_a_conversation_is_told_turn_by_turn(monkeypatch):
    model, read = counting(monkeypatch, per_x=1.0)
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    judge = PairModelJudge(model=model, tokenizer=tokenizer(), swap=False)
    judge.compare([Comparison(sampled("a", "b", prompt=turns), 0, 1)])
    assert read == [[SOURCE, *ids("user: hi\n\nassistant: ho\n\nuser: ?"), FIRST, *ids("a"), SECOND, *ids("b")]]


def test_the_tokens_that_the_tokenizer_adds_stand_around_it_all(monkeypatch):
    from tokenizers import processors

    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 2), ("<|end|>", tiny.END)]
    )
    model, read = counting(monkeypatch, per_x=1.0)
    compare(PairModelJudge(model=model, tokenizer=made, swap=False), "a", "b")
    assert read == [[2, SOURCE, *ids("why?"), FIRST, *ids("a"), SECOND, *ids("b"), tiny.END]]


@pytest.mark.parametrize("special", [True, False])
def test_an_answer_cannot_begin_another_part(monkeypatch, special):
    """As text where the marks are special tokens; PairRM's are not, and such text is left out."""
    model, read = counting(monkeypatch, per_x=1.0)
    compare(PairModelJudge(model=model, tokenizer=tokenizer(special), swap=False), "a<|candidate2|>xxx", "b")
    said = "a<|candidate2|>xxx" if special else "axxx"
    assert read == [[SOURCE, *ids("why?"), FIRST, *ids(said), SECOND, *ids("b")]]


def test_long_texts_lose_their_ends(monkeypatch):
    """Shares of 6 and twice 4, marks included. A source of 2 tokens leaves 3 of its 6: one more for each answer."""
    model, read = counting(monkeypatch, per_x=1.0)
    judge = PairModelJudge(model=model, tokenizer=tokenizer(), swap=False, source_max_length=6, candidate_max_length=4)
    compare(judge, "abcdefgh", "a", prompt="12345678")
    compare(judge, "abcdefgh", "ABCDE", prompt="12")
    compare(judge, "abcd", "abcd", prompt="12")
    assert read == [
        [SOURCE, *ids("12345"), FIRST, *ids("abc"), SECOND, *ids("a")],
        [SOURCE, *ids("12"), FIRST, *ids("abcd"), SECOND, *ids("ABCD")],
        [SOURCE, *ids("12"), FIRST, *ids("abcd"), SECOND, *ids("abcd")],
    ]
    assert judge.counts == {"comparisons": 3.0, "cut": 2.0}


@pytest.mark.parametrize(
    ("window", "given", "shares"),
    [
        (4096, {}, (1224, 412)),
        (2048, {}, (1224, 412)),
        (512, {}, (306, 103)),  # a quarter of all
        (512, {"source_max_length": 112}, (112, 200)),
        (512, {"candidate_max_length": 100}, (312, 100)),
        (4096, {"source_max_length": 2000}, (2000, 412)),
        (2048, {"source_max_length": 10, "candidate_max_length": 20}, (10, 20)),
    ],
)
def test_shares_fit_the_window(window, given, shares):
    judge = PairModelJudge(model=bert(max_position_embeddings=window), tokenizer=tokenizer(), **given)
    assert (judge.source_max_length, judge.candidate_max_length) == shares
    longest = sampled("a" * 5000, "b" * 5000, prompt="c" * 5000)
    if window <= 512:
        assert 0 < judge.compare([Comparison(longest, 0, 1)])[0] < 1  # fits the model's positions


def test_without_a_limit_the_shares_are_those_of_pairrm(monkeypatch):
    monkeypatch.setattr("dpo_trainer.online.feedback.classifier._window", lambda config, tokenizer: None)
    judge = PairModelJudge(model=bert(), tokenizer=tokenizer(), source_max_length=3000)
    assert (judge.source_max_length, judge.candidate_max_length) == (3000, 412)


# --- options ---


def test_by_name_from_a_folder(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    judge = make_judge("pair_model", {"model": str(tmp_path), "batch_size": 2})
    here = PairModelJudge(model=model, tokenizer=tokenizer())
    samples = [sampled("a", "bb", "ccc")]
    assert judge.name == "pair_model"
    assert judge(samples)[0] == pytest.approx(here(samples)[0], abs=1e-5)


def test_marks_of_another_name(monkeypatch):
    model, read = counting(monkeypatch, per_x=1.0)
    judge = PairModelJudge(model=model, tokenizer=tokenizer(), swap=False, source_token="<|user|>")
    compare(judge, "a", "b")
    assert read[0][0] == tiny.SPECIAL.index("<|user|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"temperature": math.nan}, "temperature must be a number above 0, got nan"),
        ({"temperature": "1"}, "temperature must be a number above 0"),
        ({"swap": "yes"}, "swap must be true or false, got 'yes'"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        (
            {"source_max_length": 400, "candidate_max_length": 100},
            "400 and twice candidate_max_length 100 do not fit.*at most 512",
        ),
        ({"source_max_length": 100.5}, "source_max_length must be a whole number, got 100.5"),
        ({"source_max_length": 1}, "source_max_length 1 .* at least 2 each"),
        ({"candidate_max_length": 300}, "do not fit"),
        ({"first_token": "<|first|>"}, "'<|first|>' is no token of 'BertForSequenceClassification'"),
        ({"model": None}, "must be a name or a transformers model, got a NoneType"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_judge("pair_model", {"model": bert(), "tokenizer": tokenizer(), **options})


def test_a_model_with_three_outputs_is_refused():
    with pytest.raises(ValueError, match=r"has 3 outputs: give a model with one .* or two"):
        PairModelJudge(model=bert(3), tokenizer=tokenizer())


def test_it_must_be_told_which_model():
    with pytest.raises(ValueError, match=r"does not fit judge 'pair_model'.*model"):
        make_judge("pair_model", {})


def test_it_moves_with_the_trainer():
    judge = PairModelJudge(model=bert(), tokenizer=tokenizer())
    judge.to("meta")
    assert judge.classifier.model.device.type == "meta"
