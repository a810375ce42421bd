"""What holds for random rows of every form: nothing is lost, moved, emptied or taken for a control token without a word.

The rows, and what the model must read of each, come from random_rows.py. Every property counts what it has seen, and fails
where the odd cases that it is about never came up.
"""

from __future__ import annotations

import copy
from collections import Counter
from unittest.mock import patch

import pytest
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_rows import BOS, CHAT_FORMS, EOS, PLAIN, TEXT_FORMS, Told, chat_rows, tables, text_rows, texts
from tiny_tokenizers import CHAT, MARKED, SPECIAL, WITH_CALLS, byte_bpe

from dpo_trainer.data import DataOptions, Limits, form_of, pair_from_row, prepare_dataset, tokenize_pairs
from dpo_trainer.data.report import DROPPED, USELESS
from dpo_trainer.data.rows.implicit import shared_length
from dpo_trainer.types import Flag, Pair

CHATTY, LOUD = byte_bpe(chat_template=CHAT), byte_bpe(chat_template=MARKED)
WITH_BOS = byte_bpe(adds="<bos> $A")
NO_LIMITS = Limits(max_length=None, max_prompt_length=None, max_completion_length=None)


def examples(count):
    """Of a few rows each; a busy machine fails none."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


def tokenize(tokenizer, rows):
    where = [f"Row {number}" for number in range(len(rows))]
    pairs = [pair_from_row(example.row, at) for example, at in zip(rows, where, strict=True)]
    return tokenize_pairs(pairs, tokenizer, where)


def scored(ids, number):
    """Whether each token of a completion is scored."""
    hidden = {at for n, start, end in ids.unscored if n == number for at in range(start, end)}
    return [at not in hidden for at in range(len(ids.completions[number]))]


# --- what the model reads ---


def want_kept(told: Told):
    """What is left of a row without limits: its useful pairs, and the numbers of the completions that they need."""
    useful = [
        (better, worse, margin)
        for better, worse, margin in told.pairs
        if not told.blank[better] and not told.blank[worse] and told.wholes[better] != told.wholes[worse]
    ]
    return useful, {number for pair in useful for number in pair[:2]}


def check_row(ids, told: Told, tokenizer, seen: Counter):
    """One row after `NO_LIMITS`, against what it says."""
    useful, used = want_kept(told)
    seen["control"] += told.control
    assert bool(ids.flags & Flag.CONTROL_TEXT) == told.control
    if not useful:
        all_blank = all(told.blank[better] or told.blank[worse] for better, worse, _ in told.pairs)
        why = Flag.TIED if not told.pairs else Flag.EMPTY_COMPLETION if all_blank else Flag.IDENTICAL
        seen[why.name] += 1
        assert ids.flags & why
        assert ids.flags & USELESS == why or why == Flag.TIED  # equal scores, and blank too
        return
    assert not ids.flags & USELESS
    seen["kept"] += 1
    end = min(shared_length(told.prompt, whole) for whole in told.wholes)
    seen["merged"] += end < len(told.prompt)
    assert bool(ids.flags & Flag.MERGED_BOUNDARY) == (end < len(told.prompt))
    assert bool(ids.flags & Flag.EMPTY_PROMPT) == (ids.prompt == [BOS])
    seen["no prompt"] += end == 0
    assert ids.prompt == (told.prompt[:end] or [BOS])

    assert ids.left_out == len(told.pairs) - len(useful)
    seen["left out"] += ids.left_out > 0
    assert len(ids.completions) == len(used)
    got = [(tuple(ids.completions[i]), tuple(ids.completions[j]), margin) for i, j, margin in ids.pairs]
    assert got == [(tuple(told.wholes[i][end:]), tuple(told.wholes[j][end:]), margin) for i, j, margin in useful]

    text_of = {tuple(whole[end:]): text for whole, text in zip(told.wholes, told.texts, strict=True)}
    mask_of = {tuple(whole[end:]): mask for whole, mask in zip(told.wholes, told.scored, strict=True)}
    for number, completion in enumerate(ids.completions):
        start = ids.prompt if end else []
        assert tokenizer.decode(start + completion) == text_of[tuple(completion)]
        mask = mask_of[tuple(completion)]
        seen["unscored"] += mask is not None
        assert scored(ids, number) == (mask[end:] if mask else [True] * len(completion))
        assert any(scored(ids, number))


@pytest.mark.parametrize(
    ("tokenizer", "kinds"),
    [
        pytest.param(PLAIN, [text_rows(form=form) for form in TEXT_FORMS], id="text"),
        pytest.param(WITH_BOS, [text_rows(form=form, bos=True) for form in TEXT_FORMS], id="text, BOS"),
        pytest.param(CHATTY, [chat_rows(form=form) for form in CHAT_FORMS], id="conversations"),
        pytest.param(LOUD, [chat_rows(form=form) for form in CHAT_FORMS], id="conversations, marked"),
        pytest.param(CHATTY, [st.one_of(text_rows(), chat_rows())], id="both in one batch"),
    ],
)
def test_the_model_reads_what_the_row_says(tokenizer, kinds):
    """Ids, text, pairs, margins, scored tokens and flags, all worked out by hand; one prompt for all completions."""
    seen = Counter()
    for kind in kinds:

        @examples(40)
        @given(st.lists(kind, min_size=1, max_size=4))
        def check(batch):
            for example, ids in zip(batch, tokenize(tokenizer, batch), strict=True):
                check_row(NO_LIMITS.apply(ids), example.told, tokenizer, seen)
                seen[form_of(example.row, "Row 0")] += 1

        check()
    odd = ["control", "EMPTY_COMPLETION", "kept"]
    if len(kinds) > 1:
        odd += ["merged", "IDENTICAL", "TIED", "left out"]
        odd += {PLAIN: ["no prompt"], WITH_BOS: []}.get(tokenizer, ["unscored"])
    assert all(seen[kind] >= 2 for kind in odd), seen


# --- limits ---

limit = st.none() | st.integers(1, 3) | st.integers(1, 16)
limits = st.builds(
    Limits,
    max_length=limit,
    max_prompt_length=limit,
    max_completion_length=limit,
    truncation_mode=st.sampled_from(["keep_start", "keep_end"]),
    too_long=st.sampled_from(["truncate", "truncate", "drop"]),
    max_pairs=st.none() | st.integers(1, 3),
    bos_token_id=st.sampled_from([None, BOS]),
)


def within(ids, given: Limits) -> bool:
    longest = max(map(len, ids.completions))
    return (
        len(ids.prompt) <= (given.max_prompt_length or len(ids.prompt))
        and longest <= (given.max_completion_length or longest)
        and len(ids.prompt) + longest <= (given.max_length or len(ids.prompt) + longest)
    )


def is_cut_of(cut, pair, whole, before) -> bool:
    """The same pair, by the same margin, of completions that begin those of `before` and are scored where those are."""
    return pair.margin == before.margin and all(
        cut.completions[n] == whole.completions[m][: len(cut.completions[n])]
        and scored(cut, n) == scored(whole, m)[: len(cut.completions[n])]
        for n, m in zip(pair[:2], before[:2], strict=True)
    )


def check_cut(whole, given: Limits, seen: Counter):
    """`whole` is a row as it is without limits, and useful."""
    cut = given.apply(whole)
    fits = within(whole, given)
    seen["fits"] += fits
    if cut.flags & USELESS:
        reasons = [Flag.TOO_LONG, Flag.NO_ROOM, Flag.IDENTICAL]
        (reason,) = [flag for flag in reasons if cut.flags & flag]
        seen[reason.name] += 1
        assert not fits
        assert (reason == Flag.TOO_LONG) == (given.too_long == "drop")
        assert reason == Flag.IDENTICAL or cut[:4] == whole[:4]  # dropped uncut
        return
    assert within(cut, given)
    cuts = cut.flags & (Flag.TRUNCATED_PROMPT | Flag.TRUNCATED_CHOSEN | Flag.TRUNCATED_REJECTED)
    assert bool(cuts) == (not fits)
    seen["cut"] += bool(cuts)
    seen["cut prompt"] += bool(cuts & Flag.TRUNCATED_PROMPT)
    assert bool(cuts & Flag.TRUNCATED_PROMPT) == (len(cut.prompt) < len(whole.prompt))
    kept_start = cut.prompt[:1] == whole.prompt[:1] == [given.bos_token_id]
    assert cut.prompt[kept_start:] == whole.prompt[len(whole.prompt) - len(cut.prompt) + kept_start :]
    assert cut.prompt[-1:] == whole.prompt[-1:]

    for pair in cut.pairs:
        assert any(is_cut_of(cut, pair, whole, before) for before in whole.pairs)
        assert cut.completions[pair.chosen] != cut.completions[pair.rejected]
    seen["pairs left out"] += cut.left_out > whole.left_out
    assert cut.left_out - whole.left_out == len(whole.pairs) - len(cut.pairs)
    assert given.max_pairs is None or len(cut.pairs) <= given.max_pairs
    assert all(any(scored(cut, number)) for number in range(len(cut.completions)))
    seen["unscored"] += bool(cut.unscored and cuts)
    assert given.apply(cut) == cut  # once more changes nothing


def test_a_cut_empties_nothing_silently():
    """Within its limits, with a scored token in every completion and every pair accounted for; or dropped for a reason."""
    seen = Counter()
    for kind in (text_rows(form="text"), text_rows(), chat_rows(form="pair"), chat_rows()):

        @examples(60)
        @given(st.lists(kind, min_size=2, max_size=4), st.lists(limits, min_size=3, max_size=3))
        def check(batch, several):
            for ids in tokenize(CHATTY, batch):
                whole = NO_LIMITS.apply(ids)
                for given_limits in several:
                    if whole.flags & USELESS:
                        assert given_limits.apply(ids).flags & USELESS
                    else:
                        check_cut(whole, given_limits, seen)

        check()
    kinds = ["fits", "cut", "cut prompt", "TOO_LONG", "NO_ROOM", "IDENTICAL", "pairs left out", "unscored"]
    assert all(seen[kind] >= 2 for kind in kinds), seen


# --- whole datasets ---

OPTIONS = st.builds(
    DataOptions,
    max_length=st.none() | st.integers(4, 24),
    max_completion_length=st.none() | st.integers(1, 8),
    truncation_mode=st.sampled_from(["keep_start", "keep_end"]),
    too_long=st.sampled_from(["truncate", "drop"]),
    max_pairs_per_prompt=st.none() | st.integers(1, 2),
    disable_tqdm=st.just(True),
)
IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "more_ids", "pairs", "margin", "unscored", "weight", "length")


def content(rows):
    """Without example_id: tables count their rows, streams hash them."""
    return [{column: row[column] for column in IDS} for row in rows]


def prepare(dataset, options, tokenizer=CHATTY):
    """(rows, report); no rows where nothing is left, which is an error that counts the same."""
    try:
        rows, report = prepare_dataset(dataset, tokenizer, options)
        return list(rows), report
    except ValueError as error:
        if "No pair of train is left" not in str(error):
            raise
        return [], None


def test_order_and_content_survive_batches_shards_and_ranks():
    seen = Counter()

    def check(batch, options, shards):
        table = Dataset.from_list([example.row for example in batch])
        rows, report = prepare(table, options)
        seen["rows"] += len(rows)
        seen["several"] += len(rows) > 1
        seen["dropped"] += len(batch) > len(rows)
        assert [row["example_id"] for row in rows] == sorted(row["example_id"] for row in rows)
        if report is not None:
            assert (report.rows, report.kept) == (len(batch), len(rows))
            assert report.dropped == sum(report.counts[kind] for kind in DROPPED) == report.rows - report.kept
            assert report.pairs == sum(len(row["pairs"]) for row in rows)
            assert report.prompt_tokens + report.completion_tokens == sum(row["length"] for row in rows)
        everything, _ = prepare(table, DataOptions(disable_tqdm=True))
        for row in everything:
            useful, used = want_kept(batch[row["example_id"]].told)
            assert row["margin"] == [margin for _, _, margin in useful if margin is not None]
            assert (len(row["pairs"]), 2 + len(row["more_ids"])) == (len(useful), len(used))
        for size in (1, 3):
            with patch("dpo_trainer.data.prepare.BATCH", size), patch("dpo_trainer.data.stream.BATCH", size):
                again, report_again = prepare(table, options)
                assert (again, report_again) == (rows, report)
                stream, _ = prepare_dataset(table.to_iterable_dataset(), CHATTY, options)
                assert content(stream) == content(rows)
        shards = min(shards, len(batch))
        stream, counts = prepare_dataset(table.to_iterable_dataset(num_shards=shards), CHATTY, options)
        assert content(stream) == content(rows)
        assert counts.rows == len(batch)
        assert report is None or (counts.counts, counts.first_rows) == (report.counts, report.first_rows)
        ranks = [content(split_dataset_by_node(stream, rank, 2)) for rank in (0, 1)]
        assert sorted(map(repr, ranks[0] + ranks[1])) == sorted(map(repr, content(rows)))
        seen["both ranks"] += all(ranks)

    for table in tables():
        examples(5)(given(table, OPTIONS, st.integers(1, 3))(check))()
    assert all(seen[kind] >= 3 for kind in ("rows", "several", "dropped", "both ranks")), seen


def test_two_processes_give_the_rows_in_their_order():
    """Processes are slow to start: two tables, of both kinds, with rows enough for several batches each."""

    @examples(2)
    @given(
        st.tuples(
            st.lists(text_rows(form="ranked"), min_size=4, max_size=4),
            st.lists(chat_rows(form="pair", spelling="sharegpt"), min_size=4, max_size=4),
        )
    )
    def check(both):
        for batch in both:
            rows = [{**example.row, "weight": float(number)} for number, example in enumerate(batch * 20)]
            options = DataOptions(max_length=20, disable_tqdm=True)
            one, report = prepare(Dataset.from_list(rows), options)
            with patch("dpo_trainer.data.prepare.BATCH", 7):
                two, report_of_two = prepare(
                    Dataset.from_list(rows), DataOptions(max_length=20, disable_tqdm=True, dataset_num_proc=2)
                )
            assert (two, report_of_two) == (one, report)
            assert [row["weight"] for row in two] == [float(row["example_id"]) for row in two]

    check()


def test_preparing_again_changes_nothing():
    seen = Counter()

    def check(batch, options):
        rows, report = prepare(Dataset.from_list([example.row for example in batch]), options)
        if not rows:
            return
        seen["rows"] += len(rows)
        seen["unscored"] += any(row["unscored"] for row in rows)
        seen["ranked"] += any(row["more_ids"] for row in rows)
        again, report_again = prepare(Dataset.from_list(rows), options, tokenizer=None)
        assert again == rows
        assert (report_again.kept, report_again.dropped, report_again.pairs_left_out) == (report.kept, 0, 0)
        assert report_again.pairs == report.pairs

    for table in tables():
        examples(10)(given(table, OPTIONS)(check))()
    assert all(seen[kind] >= 3 for kind in ("rows", "unscored", "ranked")), seen


# --- no text steers the model ---

CONTROL_IDS = set(range(len(SPECIAL)))
values = st.recursive(
    texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
calls = st.lists(
    values.map(lambda value: {"function": {"name": "f", "arguments": {"x": value}}}), min_size=1, max_size=2
)


@st.composite
def talks_with_tools(draw):
    def turn(role):
        return {"role": role, "content": draw(texts)}

    called = turn("assistant") | {"tool_calls": draw(calls)}
    prompt = [turn("system"), turn("user"), called, turn("tool")] if draw(st.booleans()) else [turn("user")]
    chosen = [turn("assistant") | {"tool_calls": draw(calls)}, turn("tool"), turn("assistant")]
    tools = draw(
        st.none() | st.lists(values.map(lambda value: {"function": {"description": value}}), min_size=1, max_size=1)
    )
    return Pair(
        prompt=prompt, chosen=chosen, rejected=[{"role": "assistant", "content": "x" + draw(texts)}], tools=tools
    )


def harmless(value):
    """The same, with every angle bracket round: nothing in it is the text of a control token."""
    if isinstance(value, str):
        return value.replace("<", "(").replace(">", ")")
    if isinstance(value, dict):
        return {key: harmless(item) for key, item in value.items()}
    return [harmless(item) for item in value] if isinstance(value, list) else value


def test_text_of_control_tokens_adds_no_control_token():
    """Wherever it stands in a conversation: as many control ids as in the same row without it, in the prompt and in each answer."""
    tokenizer = byte_bpe(chat_template=WITH_CALLS)
    seen = Counter()

    @examples(80)
    @given(talks_with_tools())
    def check(pair):
        given_pair = copy.deepcopy(pair)
        parts = {name: harmless(getattr(pair, name)) for name in ("prompt", "chosen", "rejected", "tools")}
        got, want = tokenize_pairs([pair, Pair(**parts)], tokenizer, ["Row 0", "Row 1"])
        assert pair == given_pair
        seen["control"] += bool(got.flags & Flag.CONTROL_TEXT)
        for ids, other in zip([got.prompt, *got.completions], [want.prompt, *want.completions], strict=True):
            assert Counter(filter(CONTROL_IDS.__contains__, ids)) == Counter(filter(CONTROL_IDS.__contains__, other))
        for completion, turns in zip(got.completions, (pair.chosen, pair.rejected), strict=True):
            text = tokenizer.apply_chat_template(pair.prompt + turns, tools=pair.tools, tokenize=False)
            assert tokenizer.decode(got.prompt + completion) == text
        assert not want.flags & Flag.CONTROL_TEXT
        assert [number for number, _, _ in got.unscored] == [0]

    check()
    assert seen["control"] >= 20, seen


@pytest.mark.parametrize("adds", ["$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"])
def test_text_of_control_tokens_adds_none_to_plain_text(adds):
    """One BOS at most, at the start; one EOS, at the end of each completion that says something; no other."""
    tokenizer = byte_bpe(adds=adds)

    @examples(40)
    @given(texts, st.tuples(texts, texts))
    def check(prompt, completions):
        if not all(map(str.strip, completions)):
            return
        row = {"prompt": prompt, "chosen": completions[0], "rejected": completions[1]}
        (ids,) = tokenize_pairs([pair_from_row(row, "Row 0")], tokenizer, ["Row 0"])
        for completion in ids.completions:
            controls = [token for token in ids.prompt + completion if token in CONTROL_IDS]
            assert controls == [BOS] * (ids.prompt[0] == BOS) + [EOS]
            assert completion[-1] == EOS

    check()
