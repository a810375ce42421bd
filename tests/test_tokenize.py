"""Joint tokenization of prompt and completion, special tokens, ways through the tokenizer, truncation: on tokenizers made by hand.

What chat templates do to conversations of several turns, and to control tokens in them, is in test_render.py.
"""

from __future__ import annotations

import dataclasses
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, byte_bpe, word_level
from transformers import PreTrainedTokenizerFast

from dpo_trainer.data.tokens.encode import check_tokenizer, tokenizer_fingerprint
from dpo_trainer.data.tokens.tokenize import tokenize_pairs
from dpo_trainer.data.tokens.truncate import Limits
from dpo_trainer.types import Flag, Pair, PairIds, Preferred

PLAIN = byte_bpe()
CHATTY = byte_bpe(chat_template=CHAT)


def pair(prompt, chosen, rejected, **options):
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **options)


def talk(*contents, prompt=("q",), **options):
    roles = ["user", "assistant"] * len(prompt)
    turns = [{"role": role, "content": text} for role, text in zip(roles, prompt)]
    chosen, rejected = ([{"role": "assistant", "content": content}] for content in contents)
    return pair(turns, chosen, rejected, **options)


def tokenize(tokenizer, *pairs, **how):
    return tokenize_pairs(pairs, tokenizer, [f"Row {row} of train" for row in range(len(pairs))], **how)


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


# --- the boundary ---


def test_a_token_across_the_boundary_goes_to_both_completions():
    """Merges make "ab" + "c" one token, so "xab" is `x ab` alone and `x abc` before a c: the pair's prompt is `x`."""
    assert pieces(PLAIN, PLAIN("xab")["input_ids"]) == ["x", "ab"]
    (ids,) = tokenize(PLAIN, pair("xab", "cd", "ef"))
    assert pieces(PLAIN, ids.prompt) == ["x"]
    assert pieces(PLAIN, ids.chosen) == ["abc", "d", "<eos>"]
    assert pieces(PLAIN, ids.rejected) == ["ab", "e", "f", "<eos>"]
    assert ids.flags == Flag.MERGED_BOUNDARY


def test_without_a_token_across_the_boundary_the_prompt_is_the_prompt():
    (ids,) = tokenize(PLAIN, pair("x:", "cd", "ef"))
    assert pieces(PLAIN, ids.prompt) == ["x", ":"]
    assert pieces(PLAIN, ids.chosen) == ["c", "d", "<eos>"]
    assert ids.flags == 0


text = st.text(alphabet="abch:i é\n\U0001f600", min_size=1, max_size=12)
said = text.filter(str.strip)


@given(st.lists(st.tuples(text, said, said), min_size=1, max_size=4))
def test_any_text_comes_back_whole_and_in_order(rows):
    """Prompt + completion decode to the text, and are what the tokenizer makes of it: nothing is tokenized apart."""
    for (prompt, chosen, rejected), ids in zip(rows, tokenize(PLAIN, *(pair(*row) for row in rows)), strict=True):
        added = [] if not ids.flags & Flag.EMPTY_PROMPT else [PLAIN.bos_token_id]
        for completion, completion_ids in ((chosen, ids.chosen), (rejected, ids.rejected)):
            whole = added + PLAIN(prompt + completion)["input_ids"] + [PLAIN.eos_token_id]
            assert ids.prompt + completion_ids == whole
            assert PLAIN.decode(whole[len(added) : -1]) == prompt + completion


def test_text_and_conversations_may_stand_in_one_batch():
    rows = [pair("x", "cd", "ef"), talk("cd", "ef"), pair("y", "cd", "ef")]
    together = tokenize(CHATTY, *rows)
    assert together == [tokenize(CHATTY, row)[0] for row in rows]
    assert len({tuple(ids.prompt) for ids in together}) == 3


# --- BOS and EOS ---


@pytest.mark.parametrize("adds", ["$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"], ids=["none", "bos", "both", "eos"])
def test_one_bos_and_one_eos_whatever_the_tokenizer_adds(adds):
    tokenizer = byte_bpe(adds=adds)
    (ids,) = tokenize(tokenizer, pair("x", "cd", "ef"))
    assert pieces(tokenizer, ids.prompt) == (["<bos>", "x"] if "<bos>" in adds else ["x"])
    assert pieces(tokenizer, ids.chosen) == ["c", "d", "<eos>"]
    assert pieces(tokenizer, ids.rejected) == ["e", "f", "<eos>"]
    assert ids.flags == 0  # the tokenizer's own EOS behind the prompt is no merged boundary


@pytest.mark.parametrize(
    "adds",
    [
        pytest.param("<bos> $A", id="bos"),
        pytest.param(
            "<bos> $A <eos>",
            id="both",
        ),
    ],
)
def test_a_text_that_may_bring_its_bos_and_eos_gets_no_second_one(adds):
    tokenizer = byte_bpe(adds=adds)
    (ids,) = tokenize(tokenizer, pair("<bos>x", "cd<eos>", "ef"), allow_special_tokens_in_text=True)
    assert pieces(tokenizer, ids.prompt) == ["<bos>", "x"]
    assert pieces(tokenizer, ids.chosen) == ["c", "d", "<eos>"]
    assert pieces(tokenizer, ids.rejected) == ["e", "f", "<eos>"]
    assert ids.flags == 0  # the user allowed it: nothing to tell


def test_by_default_the_bos_and_eos_of_a_text_are_text():
    tokenizer = byte_bpe(adds="<bos> $A")
    (ids,) = tokenize(tokenizer, pair("<bos>x", "cd<eos>", "ef"))
    assert pieces(tokenizer, ids.prompt) == ["<bos>", "<", "b", "o", "s", ">", "x"]
    assert pieces(tokenizer, ids.chosen) == ["c", "d", "<", "e", "o", "s", ">", "<eos>"]
    assert ids.flags == Flag.CONTROL_TEXT


def test_an_eos_in_the_text_of_a_prompt_merges_no_boundary():
    tokenizer = byte_bpe(adds="$A <eos>")
    (ids,) = tokenize(tokenizer, pair("x<eos>", "cd", "ef"))
    assert pieces(tokenizer, ids.prompt) == ["x", "<", "e", "o", "s", ">"]
    assert pieces(tokenizer, ids.chosen) == ["c", "d", "<eos>"]
    assert ids.flags == Flag.CONTROL_TEXT


def test_bos_stands_in_for_a_prompt_without_tokens():
    (empty,) = tokenize(PLAIN, pair("", "cd", "ef"))
    assert pieces(PLAIN, empty.prompt) == ["<bos>"]
    assert empty.flags == Flag.EMPTY_PROMPT
    (swallowed,) = tokenize(PLAIN, pair("a", "b", "c"))  # "a" + "b" is one token, which leaves nothing before it
    assert pieces(PLAIN, swallowed.prompt) == ["<bos>"]
    assert pieces(PLAIN, swallowed.chosen) == ["ab", "<eos>"]
    assert swallowed.flags == Flag.EMPTY_PROMPT | Flag.MERGED_BOUNDARY


def test_without_a_bos_such_a_prompt_is_refused():
    with pytest.raises(ValueError, match=r"Row 0 of train: the prompt has no token.*tokenizer\.bos_token"):
        tokenize(word_level("a", "b"), pair("", "a", "b"))


def test_a_completion_that_the_tokenizer_drops_is_refused():
    with pytest.raises(ValueError, match=r"Row 0 of train, column 'rejected': the tokenizer makes no token of ' z'"):
        tokenize(word_level("q", "a"), pair("q", " a", " z"))


@pytest.mark.parametrize("bad", ["unknown", "\ud83d"], ids=["no UNK", "surrogate"])
def test_a_text_that_the_tokenizer_refuses_is_found_in_its_batch(bad):
    with pytest.raises(ValueError, match=r"Row 1 of train: the tokenizer refuses this text"):
        tokenize(word_level("q", "a", "b"), pair("q", " a", " b"), pair("q", " a", f" {bad}"), pair("q", " b", " a"))


def test_blank_completions_are_flagged():
    rows = tokenize(CHATTY, pair("x", "", "y"), pair("x", "y", "\n"), talk("a", " "), talk("a", "b"))
    assert [bool(ids.flags & Flag.EMPTY_COMPLETION) for ids in rows] == [True, True, True, False]


def test_tokenizers_without_eos_or_pad(caplog):
    with pytest.raises(ValueError, match=r"no EOS token.*tokenizer\.eos_token ="):
        check_tokenizer(byte_bpe(eos_token=None))
    assert check_tokenizer(PLAIN) == PLAIN.pad_token_id
    assert not caplog.records
    bare = byte_bpe(pad_token=None)
    with caplog.at_level(logging.WARNING):
        assert check_tokenizer(bare) == bare.eos_token_id
    assert len(caplog.records) == 1
    assert "<eos>" in caplog.text
    assert bare.pad_token is None  # the user's tokenizer is not changed


def test_a_processor_lends_its_tokenizer():
    class Processor:
        tokenizer = PLAIN

    assert check_tokenizer(Processor()) == PLAIN.pad_token_id


# --- special tokens in plain text ---

CONTROL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<think>"]


@pytest.mark.parametrize("token", CONTROL)
def test_the_text_of_a_special_token_is_text(token):
    """Token by token what the tokenizer makes of it under split_special_tokens, in the prompt and in the completions."""
    prompt, chosen, rejected = f"a{token}b", f"c {token}{token}", f"{token}ab"
    (ids,) = tokenize(PLAIN, pair(prompt, chosen, rejected))
    for completion, completion_ids in ((chosen, ids.chosen), (rejected, ids.rejected)):
        want = PLAIN(prompt + completion, split_special_tokens=True)["input_ids"]
        assert ids.prompt + completion_ids == [*want, PLAIN.eos_token_id]
        assert not set(PLAIN.all_special_ids) & set(want)
    assert ids.flags & Flag.CONTROL_TEXT

    (allowed,) = tokenize(PLAIN, pair(prompt, chosen, rejected), allow_special_tokens_in_text=True)
    assert allowed.prompt + allowed.chosen == _once_ended(PLAIN(prompt + chosen)["input_ids"])
    assert allowed.prompt + allowed.rejected == _once_ended(PLAIN(prompt + rejected)["input_ids"])
    assert allowed.chosen.count(PLAIN.convert_tokens_to_ids(token)) >= 2
    assert allowed.flags == 0


def _once_ended(ids):
    return ids if ids[-1] == PLAIN.eos_token_id else [*ids, PLAIN.eos_token_id]


def test_an_answer_of_nothing_but_a_control_token():
    """The model may be to say <think>, or nothing at all: where control tokens are allowed, that is an answer."""
    (ids,) = tokenize(CHATTY, talk("cd", "<think>"), allow_special_tokens_in_text=True)
    assert pieces(CHATTY, ids.rejected) == ["<think>", "<eos>"]


def test_a_special_token_that_only_the_boundary_completes_is_text_too():
    """Neither string has it, so there is nothing to flag; the text of both does."""
    (ids,) = tokenize(PLAIN, pair("x<e", "os>", "f"))
    assert pieces(PLAIN, ids.prompt + ids.chosen) == ["x", "<", "e", "o", "s", ">", "<eos>"]
    assert pieces(PLAIN, ids.prompt + ids.rejected) == ["x", "<", "e", "f", "<eos>"]


def test_rows_without_control_tokens_are_not_flagged():
    clean, found = tokenize(PLAIN, pair("x:", "cd", "ef"), pair("x:", "cd", "<think>"))
    assert clean.flags == 0
    assert found.flags == Flag.CONTROL_TEXT
    assert tokenize(PLAIN, pair("x:", "cd", "ef"), allow_special_tokens_in_text=True) == [clean]


# --- ways through the tokenizer ---


class Counting(PreTrainedTokenizerFast):
    """A tokenizer with a call of its own, as remote code has: it must be asked in the documented way."""

    def _encode_plus(self, *args, **how):
        self.calls = getattr(self, "calls", 0) + 1
        return super()._encode_plus(*args, **how)


MANY = [
    pair("xab", "cd", "ef"),
    pair("<think>x", "cd<eos>", "ef"),
    pair("é \U0001f600", " a", "hi"),
    talk("cd", "ef"),
    talk("cd", "e<eos>", prompt=("q", "x", "y")),
]


@pytest.mark.parametrize("allow", [False, True], ids=["text", "control"])
@pytest.mark.parametrize("adds", ["$A", "<bos> $A", "<bos> $A <eos>"])
def test_the_documented_way_through_a_tokenizer_gives_what_the_fast_one_gives(adds, allow):
    fast = byte_bpe(adds=adds, chat_template=CHAT)
    own = Counting(tokenizer_object=fast.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    own.chat_template = CHAT
    how = {"allow_special_tokens_in_text": allow}
    assert tokenize(own, *MANY, **how) == tokenize(fast, *MANY, **how)
    assert own.calls  # else the fast way was taken


def test_padding_and_truncation_of_an_earlier_call_do_not_stay():
    used, fresh = byte_bpe(chat_template=CHAT), byte_bpe(chat_template=CHAT)
    used(["a long text", "b"], padding="max_length", truncation=True, max_length=3)
    assert used.backend_tokenizer.padding
    assert used.backend_tokenizer.truncation  # else there is nothing to leave out
    assert tokenize(used, *MANY) == tokenize(fresh, *MANY)


def test_the_tokenizer_gives_its_user_the_same_ids_afterwards():
    tokenizer = byte_bpe(adds="<bos> $A", chat_template=CHAT)
    text = "x<eos><think>ab"
    before = tokenizer(text)["input_ids"], tokenizer.encode(text), tokenizer.backend_tokenizer.encode(text).ids
    tokenize(tokenizer, *MANY)
    assert (tokenizer(text)["input_ids"], tokenizer.encode(text)) == before[:2]


def test_the_backend_is_left_as_it_was():
    tokenizer = byte_bpe(chat_template=CHAT)
    before = tokenizer.backend_tokenizer.encode("x<eos>").ids
    tokenize(tokenizer, pair("x:", "cd", "ef"))
    assert tokenizer.backend_tokenizer.encode("x<eos>").ids == before


def test_a_tokenizer_that_splits_special_tokens_does_so_in_templates_too():
    """As asked for by its own setting: then nothing in a text is a hard edge, and "a" may join what a template writes."""
    tokenizer = byte_bpe(chat_template="{% for m in messages %}{{ m.content }}bX{% endfor %}")
    tokenizer.add_special_tokens({"extra_special_tokens": ["bX"]})
    tokenizer.split_special_tokens = True
    (ids,) = tokenize(tokenizer, talk("cd", "a"))
    assert ids.prompt + ids.chosen == tokenizer("qbXcdbX", split_special_tokens=True)["input_ids"]
    assert ids.prompt + ids.rejected == tokenizer("qbXabX", split_special_tokens=True)["input_ids"]
    (long,) = tokenize(tokenizer, talk("a", "x", prompt=("a", "x", "a")))
    assert long.prompt + long.chosen == tokenizer("abXxbXabXabX", split_special_tokens=True)["input_ids"]


def test_ranked_rows_share_one_prompt_where_any_boundary_merges():
    """ "xab" + "cd" has the token "abc": that "ab" is no token of the prompt any more holds for all three completions."""
    row = Pair.of("xab", ["ef", "gh", "cd"], [Preferred(0, 1), Preferred(0, 2)])
    (ids,) = tokenize(PLAIN, row)
    assert pieces(PLAIN, ids.prompt) == ["x"]
    assert [pieces(PLAIN, completion) for completion in ids.completions] == [
        ["ab", "e", "f", "<eos>"],
        ["ab", "g", "h", "<eos>"],
        ["abc", "d", "<eos>"],
    ]
    assert ids.pairs == (Preferred(0, 1), Preferred(0, 2))
    assert ids.flags == Flag.MERGED_BOUNDARY


# --- chat templates ---


def test_the_template_is_applied_once_and_decides_the_end():
    (ids,) = tokenize(CHATTY, talk("cd", "ef"))
    assert CHATTY.decode(ids.prompt) == "<|user|>q<eos><|assistant|>"
    assert CHATTY.decode(ids.chosen) == "cd<eos>"
    assert CHATTY.decode(ids.rejected) == "ef<eos>"
    assert ids.flags == 0
    endless = byte_bpe(chat_template=CHAT.replace("<eos>", ""), adds="<bos> $A <eos>")
    assert endless.decode(tokenize(endless, talk("cd", "ef"))[0].chosen) == "cd"


def test_a_generation_prompt_that_the_full_text_lacks_is_cut_where_they_part():
    """As templates of reasoning models do: "<think>" is opened for generation, and absent from a finished turn."""
    template = CHAT.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>"
    )
    tokenizer = byte_bpe(chat_template=template)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True
    ).endswith("<think>")
    (ids,) = tokenize(tokenizer, talk("cd", "ef"))
    assert tokenizer.decode(ids.prompt) == "<|user|>q<eos><|assistant|>"
    assert tokenizer.decode(ids.chosen) == "cd<eos>"
    assert ids.flags == Flag.GENERATION_DIFFERS


def test_a_prompt_that_ends_in_an_assistant_turn_is_continued():
    (ids,) = tokenize(CHATTY, talk(" cd", " ef", prompt=("q", "x")))
    assert CHATTY.decode(ids.prompt) == "<|user|>q<eos><|assistant|>x"
    assert CHATTY.decode(ids.chosen) == " cd<eos>"


def test_tools_and_template_arguments_reach_the_template():
    template = "{{ tools[0].function.name if tools else '-' }}{{ mood if mood is defined else '-' }}" + CHAT
    tokenizer = byte_bpe(chat_template=template)
    tool = {"type": "function", "function": {"name": "f"}}
    with_both, with_none = tokenize(
        tokenizer, talk("c", "d", tools=[tool], chat_template_kwargs={"mood": "!"}), talk("c", "d")
    )
    assert tokenizer.decode(with_both.prompt).startswith("f!<|user|>")
    assert tokenizer.decode(with_none.prompt).startswith("--<|user|>")


@given(st.lists(st.tuples(said, said, said), min_size=1, max_size=3))
def test_any_conversation_is_the_rendered_text(rows):
    pairs = [talk(chosen, rejected, prompt=(prompt,)) for prompt, chosen, rejected in rows]
    for row, ids in zip(pairs, tokenize(CHATTY, *pairs), strict=True):
        for turns, completion in ((row.chosen, ids.chosen), (row.rejected, ids.rejected)):
            rendered = CHATTY.apply_chat_template(row.prompt + turns, tokenize=False)
            assert CHATTY.decode(ids.prompt + completion) == rendered


def test_what_a_template_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"Row 0 of train is a conversation.*no chat template.*plain strings"):
        tokenize(PLAIN, talk("a", "b"))
    strict = byte_bpe(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"Row 1 of train: the chat template refuses.*roles must alternate"):
        tokenize(strict, pair("x", "c", "d"), talk("a", "b"))
    deaf = byte_bpe(chat_template=CHAT.replace("in messages", "in messages if m.role == 'user'"))
    with pytest.raises(
        ValueError, match=r"Row 0 of train, column 'chosen': has words of the role 'assistant' .* does not write"
    ):
        tokenize(deaf, talk("a", "b"))


# --- the cache key ---


def test_the_fingerprint_follows_content_and_not_use():
    tokenizer = byte_bpe(chat_template=CHAT)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["long " * 50, "short"], padding=True, truncation=True, max_length=7)
    assert tokenizer.backend_tokenizer.padding is not None  # else the call left no trace to ignore
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(byte_bpe(chat_template=CHAT)) == before
    assert tokenizer_fingerprint(byte_bpe()) != before
    assert tokenizer_fingerprint(byte_bpe(chat_template=CHAT, adds="<bos> $A")) != before
    assert tokenizer_fingerprint(byte_bpe(chat_template=CHAT, eos_token="<pad>")) != before
    for setting, value in (("split_special_tokens", True), ("chat_control_tokens", ["<think>"])):
        changed = byte_bpe(chat_template=CHAT)
        setattr(changed, setting, value)
        assert tokenizer_fingerprint(changed) != before, setting


def test_the_fingerprint_follows_a_class_with_a_call_of_its_own():
    fast = byte_bpe(chat_template=CHAT)
    own = Counting(tokenizer_object=fast.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    own.chat_template = CHAT
    assert own.special_tokens_map == fast.special_tokens_map  # else they differ for another reason
    assert tokenizer_fingerprint(own) != tokenizer_fingerprint(fast)


# --- truncation ---


def limits(max_length=None, prompt=None, completion=None, mode="keep_start", bos=None, **how):
    return Limits(
        max_length=max_length,
        max_prompt_length=prompt,
        max_completion_length=completion,
        truncation_mode=mode,
        bos_token_id=bos,
        **how,
    )


CUT_P, CUT_C, CUT_R = Flag.TRUNCATED_PROMPT, Flag.TRUNCATED_CHOSEN, Flag.TRUNCATED_REJECTED


CUTS = [
    (limits(), ([1, 2, 3], [4, 5, 6, 7], [8, 9]), 0),
    (limits(7), ([1, 2, 3], [4, 5, 6, 7], [8, 9]), 0),
    (limits(6), ([1, 2, 3], [4, 5, 6], [8, 9]), CUT_C),
    (limits(4), ([1, 2, 3], [4], [8]), CUT_C | CUT_R),
    (limits(3), ([1, 2, 3], [4, 5, 6, 7], [8, 9]), Flag.NO_ROOM),
    (limits(6, mode="keep_end"), ([2, 3], [4, 5, 6, 7], [8, 9]), CUT_P),
    (limits(3, mode="keep_end"), ([3], [4, 5], [8, 9]), CUT_P | CUT_C),
    (limits(1, mode="keep_end"), ([1, 2, 3], [4, 5, 6, 7], [8, 9]), Flag.NO_ROOM),
    (limits(prompt=2), ([2, 3], [4, 5, 6, 7], [8, 9]), CUT_P),
    (limits(prompt=2, bos=1), ([1, 3], [4, 5, 6, 7], [8, 9]), CUT_P),
    (limits(prompt=1, bos=1), ([3], [4, 5, 6, 7], [8, 9]), CUT_P),
    (limits(completion=3), ([1, 2, 3], [4, 5, 6], [8, 9]), CUT_C),
    (limits(5, prompt=2, completion=1), ([2, 3], [4], [8]), CUT_P | CUT_C | CUT_R),
    (limits(3, prompt=2), ([2, 3], [4], [8]), CUT_P | CUT_C | CUT_R),
]


@pytest.mark.parametrize(("given", "want", "flags"), CUTS)
def test_cuts_by_hand(given, want, flags):
    assert given.apply(PairIds([1, 2, 3], [[4, 5, 6, 7], [8, 9]])) == PairIds(want[0], list(want[1:]), flags=flags)


@pytest.mark.parametrize("too_long", ["drop", "error"])
@pytest.mark.parametrize(("given", "want", "flags"), CUTS)
def test_whatever_would_be_cut_is_too_long(given, want, flags, too_long):
    """Then it comes back whole; `error` is raised by the report, which knows how many there are."""
    given = dataclasses.replace(given, too_long=too_long)
    row = PairIds([1, 2, 3], [[4, 5, 6, 7], [8, 9]])
    assert given.apply(row) == row._replace(flags=Flag.TOO_LONG if flags else 0)


def test_rows_that_are_useless_already_are_left_alone():
    """What is known about them stays the reason: nothing is cut, and no second one is found."""
    for flag in (Flag.EMPTY_COMPLETION, Flag.TIED):
        row = PairIds([1, 2, 3], [[4, 5], [4, 5]], flags=flag | Flag.CONTROL_TEXT)
        for too_long in ("truncate", "drop", "error"):
            assert limits(2, too_long=too_long).apply(row) == row


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_flags_of_the_tokenizer_stay(mode):
    cut = limits(5, mode=mode).apply(PairIds([1, 2, 3], [[4, 5, 6], [8, 9]], flags=Flag.MERGED_BOUNDARY))
    assert cut.flags == Flag.MERGED_BOUNDARY | (CUT_C if mode == "keep_start" else CUT_P)


def test_completions_that_become_equal_are_identical():
    assert limits(completion=1).apply(PairIds([1], [[4, 5], [4, 6]])).flags & Flag.IDENTICAL
    assert not limits(completion=2).apply(PairIds([1], [[4, 5], [4, 6]])).flags & Flag.IDENTICAL


ids = st.lists(st.integers(0, 9), min_size=1, max_size=9)
limit = st.none() | st.integers(1, 12)


@given(ids, ids, ids, limit, limit, limit, st.sampled_from(["keep_start", "keep_end"]), st.none() | st.integers(0, 9))
def test_truncation_keeps_its_promises(prompt, chosen, rejected, max_length, n_prompt, n_completion, mode, bos):
    given = limits(max_length, n_prompt, n_completion, mode, bos)
    cut = given.apply(PairIds(prompt, [chosen, rejected]))
    assert cut.prompt
    assert cut.chosen
    assert cut.rejected
    assert cut.chosen == chosen[: len(cut.chosen)]
    assert cut.rejected == rejected[: len(cut.rejected)]
    for flag, before, after in (
        (CUT_P, prompt, cut.prompt),
        (CUT_C, chosen, cut.chosen),
        (CUT_R, rejected, cut.rejected),
    ):
        assert bool(cut.flags & flag) == (len(after) < len(before))
    if cut.flags & Flag.NO_ROOM:
        assert (cut.prompt, cut.chosen, cut.rejected) == (prompt, chosen, rejected)
        return
    assert bool(cut.flags & Flag.IDENTICAL) == (cut.chosen == cut.rejected)
    assert cut.prompt[-1] == prompt[-1]
    assert len(cut.prompt) <= (n_prompt or len(prompt))
    longer = max(len(cut.chosen), len(cut.rejected))
    assert longer <= (n_completion or longer)
    assert len(cut.prompt) + longer <= (max_length or len(cut.prompt) + longer)
    assert given.apply(cut._replace(flags=0))[:3] == cut[:3]


def test_an_eos_that_is_cut_stays_cut():
    (whole,) = tokenize(PLAIN, pair("x", "cdef", "ef"))
    cut = limits(completion=3).apply(whole)
    assert pieces(PLAIN, cut.chosen) == ["c", "d", "e"]
    assert pieces(PLAIN, cut.rejected) == ["e", "f", "<eos>"]


def test_senseless_limits_are_refused():
    with pytest.raises(ValueError, match=r"truncation_mode must be.*'keep_left'"):
        limits(mode="keep_left")
    with pytest.raises(ValueError, match=r"too_long must be.*truncate, drop, error.*'cut'"):
        limits(too_long="cut")
    with pytest.raises(ValueError, match=r"max_prompt_length must be at least 1, or None.*got 0"):
        limits(prompt=0)
    with pytest.raises(ValueError, match=r"max_pairs must be at least 1, or None.*got -1"):
        limits(max_pairs=-1)
