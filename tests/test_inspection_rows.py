"""Rows of every form and bad ones among them, what is found in their texts, and how they are shown token by token."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from datasets import Dataset, IterableDataset
from tiny_tokenizers import CHAT, byte_bpe

from dpo_trainer.data import Limits
from dpo_trainer.data.prepare import prepare_dataset
from dpo_trainer.inspection.checks import ControlText, Endings, TemplateCheck, UnknownIds, control_ids
from dpo_trainer.inspection.collect import Collection, Sample
from dpo_trainer.inspection.facts import columns_of, sizes_of
from dpo_trainer.inspection.parts import Part, in_order, read_parts
from dpo_trainer.inspection.rows import BadRow, Row, RowReader
from dpo_trainer.inspection.show import CUT, MOST, READ, SCORED, Gap, pieces, show_row
from dpo_trainer.inspection.visible import with_white_space
from dpo_trainer.types import Flag, PairIds

USER, ANSWER, OTHER = (
    {"role": "user", "content": "q?"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)

FORMS = {
    "text": {"prompt": "q?", "chosen": " yes", "rejected": " no"},
    "text, implicit prompt": {"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"},
    "text, list of rejected": {"prompt": "q?", "chosen": " yes", "rejected": [" no", " nay"]},
    "text, ranked list": {"prompt": "q?", "completions": [" a", " b", " c"], "scores": [1.0, 3.0, 2.0]},
    "conversation": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "conversation, implicit prompt": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "ShareGPT conversation": {
        "conversations": [{"from": "human", "value": "q?"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "token ids": {"prompt_ids": [5, 6], "chosen_ids": [7, tiny.END], "rejected_ids": [8, 9, tiny.END]},
}


def no_limits(**given) -> Limits:
    return Limits(**{"max_length": None, "max_prompt_length": None, "max_completion_length": None, **given})


def read(rows: list, tokenizer=None, **limits) -> list[Row | BadRow]:
    reader = RowReader(tokenizer=tokenizer or tiny.tokenizer(), limits=no_limits(**limits))
    return list(reader.read((number, f"Row {number} of train", row) for number, row in enumerate(rows)))


def collected(rows: list, **options) -> Collection:
    seen = Collection(tiny.tokenizer(), **{"show": 2, "seed": 0, **options})
    for row in read(rows):
        seen.see(row)
    return seen


# --- reading ---


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_training_reads_it(form):
    """The same token ids as `prepare_dataset` makes of the row."""
    [row] = read([FORMS[form]])
    assert row.form == form
    prepared, _ = prepare_dataset(Dataset.from_list([FORMS[form]]), tiny.tokenizer())
    want = prepared[0]
    assert row.cut.prompt == want["prompt_ids"]
    assert row.cut.completions == [want["chosen_ids"], want["rejected_ids"], *want["more_ids"]]
    assert [list(pair[:2]) for pair in row.cut.pairs] == want["pairs"]


def test_a_bad_row_is_no_end():
    """Bad in the schema, bad for the template, bad for the tokenizer: each stands where it was, the others are as if alone."""
    rows = [
        FORMS["text"],
        {"prompt": "q?", "chosen": None, "rejected": " no"},
        FORMS["conversation"],
        {**FORMS["text"], "weight": -1},
        {"prompt": [USER], "chosen": [USER], "rejected": [OTHER]},
        FORMS["text"],
    ]
    got = read(rows)
    assert [type(row) for row in got] == [Row, BadRow, Row, BadRow, BadRow, Row]
    assert [row.number for row in got] == list(range(6))
    assert "Row 1 of train, column 'chosen': is None" in got[1].error
    assert "weight" in got[3].error
    assert got[5].ids == got[0].ids == read([FORMS["text"]])[0].ids


def test_what_an_error_quotes_is_shortened():
    """A weight of 2 MB is quoted in its error."""
    seen = collected([{**FORMS["text"], "weight": "x" * 2_000_000}])
    assert seen.bad == 1
    assert 200 < len(seen.errors[0].error) < 400
    assert seen.errors[0].error.startswith("Row 0 of train, column 'weight'")


def test_bad_rows_that_only_the_template_finds_are_found_by_halving():
    strict = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = strict
    rows = [FORMS["conversation"]] * 20
    for at in (3, 4, 17):
        rows[at] = {**FORMS["conversation"], "prompt": [{"role": "user", "content": "bad"}]}
    assert [row.number for row in read(rows, tokenizer) if isinstance(row, BadRow)] == [3, 4, 17]


def test_conversations_without_a_template_are_bad_rows():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    text, chat = read([FORMS["text"], FORMS["conversation"]], tokenizer)
    assert isinstance(text, Row)
    assert "no chat template" in chat.error


# --- datasets by number ---


def table(count: int) -> Dataset:
    return Dataset.from_list([{**FORMS["text"], "prompt": str(number)} for number in range(count)])


def numbers(parts: list[Part], max_rows: int | None = None) -> list[tuple[int, str]]:
    return [(row.number, row.row["prompt"]) for row in read_parts(parts, max_rows, seed=0)]


def test_a_selected_split_keeps_the_numbers_of_its_file():
    parts = in_order(["pairs.jsonl"], [table(6).select([1, 4])])
    assert numbers(parts) == [(1, "1"), (4, "4")]
    assert [row.where for row in read_parts(parts, None, 0)] == ["Row 1 of pairs.jsonl", "Row 4 of pairs.jsonl"]


def test_rows_of_a_mixture_count_on():
    parts = in_order(["a", "b"], [table(2), table(3)])
    assert numbers(parts) == [(0, "0"), (1, "1"), (2, "0"), (3, "1"), (4, "2")]
    assert [row.where for row in read_parts(parts, None, 0)][2] == "Row 0 of b"


def test_some_rows_of_a_table_are_random_and_in_order():
    parts = in_order(["a", "b"], [table(50), table(50)])
    got = numbers(parts, 20)
    assert len(got) == 20
    assert got == sorted(got)
    assert got != numbers(parts)[:20]
    assert set(got) <= set(numbers(parts))
    assert numbers(parts, 1000) == numbers(parts)


def test_some_rows_of_a_stream_are_its_first():
    stream = IterableDataset.from_generator(lambda: iter([{**FORMS["text"], "prompt": str(n)} for n in range(5)]))
    assert numbers(in_order(["s"], [stream]), 2) == [(0, "0"), (1, "1")]


# --- what is kept of rows ---


def test_lengths_and_outcomes_by_hand():
    """One byte is one token, and EOS one more: q? is 2, " yes" 5, " no" 4. At max_length 6 chosen loses one token.

    Identical answers are dropped; those of a blank one are no lengths to compare.
    """
    seen = Collection(tiny.tokenizer(), show=0, seed=0)
    rows = [
        FORMS["text"],
        {**FORMS["text"], "rejected": " yes"},
        {**FORMS["text"], "rejected": "  "},
        {**FORMS["text"], "prompt": "a long prompt"},
    ]
    for row in read(rows, max_length=6):
        seen.see(row)
    columns = columns_of(seen.facts)
    assert columns.prompt.tolist() == [2, 2, 2, 13]
    assert (columns.chosen.tolist(), columns.rejected.tolist()) == ([5, 5, 5], [4, 5, 4])
    counts = seen.row_counts(of=4)
    wanted = {"identical": 1, "empty_completion": 1, "no_room": 1, "truncated_chosen": 1}
    assert {kind: number for kind, number in counts.outcomes.items() if number} == wanted
    assert (counts.kept, counts.dropped, counts.first_rows["no_room"]) == (1, 3, [3])
    assert sizes_of(seen.trained_on).flat.tolist() == [2 + 4 + 4]


def test_counts_are_those_of_training():
    """`DataReport` of the trainer, over all forms."""
    rows = [FORMS["text"], {**FORMS["text"], "rejected": " yes"}, {**FORMS["text"], "prompt": "long " * 9}] * 3
    _, report = prepare_dataset(Dataset.from_list(rows), tiny.tokenizer())
    got = collected(rows).row_counts(of=None)
    assert (got.kept, got.pairs, got.outcomes, got.first_rows) == (
        report.kept,
        report.pairs,
        report.counts,
        report.first_rows,
    )


def test_deduplicate_flags_what_training_drops():
    rows = [FORMS["text"], FORMS["conversation"], FORMS["text"]]
    assert collected(rows).row_counts(of=None).outcomes["duplicate"] == 0
    counts = collected(rows, deduplicate=True).row_counts(of=None)
    assert (counts.outcomes["duplicate"], counts.first_rows["duplicate"], counts.kept) == (1, [2], 2)


def test_ranked_rows_have_several_pairs():
    """Scores 3, 2, 1 are three pairs of one row."""
    counts = collected([FORMS["text, ranked list"]]).row_counts(of=None)
    assert (counts.kept, counts.pairs) == (1, 3)


def test_the_sample_has_a_row_that_is_cut():
    sample = Sample(3, seed=0)
    rows = read([FORMS["text"]] * 50 + [{**FORMS["text"], "chosen": " yes!"}], max_length=7)
    for row in rows:
        sample.see(row)
    assert rows[50].cut.flags & Flag.TRUNCATED_CHOSEN
    got = [row.number for row in sample.chosen()]
    assert len(got) == 3
    assert got[-1] == 50


def test_the_sample_is_random_and_of_used_rows():
    """Each of 40 rows is drawn for 2 places: over 200 seeds every one shows up (expected 10 times), the useless one never."""
    rows = read([FORMS["text"]] * 40 + [{**FORMS["text"], "rejected": " yes"}])
    drawn = []
    for seed in range(200):
        sample = Sample(2, seed)
        for row in rows:
            sample.see(row)
        drawn += [row.number for row in sample.chosen()]
    times = np.bincount(drawn, minlength=41)
    assert times.sum() == 400
    assert times[40] == 0
    assert times[:40].min() > 0


def test_useless_rows_are_shown_where_there_are_no_others():
    sample = Sample(2, seed=0)
    for row in read([{**FORMS["text"], "rejected": " yes"}] * 3):
        sample.see(row)
    assert [row.number for row in sample.chosen()] == [0, 1]


# --- texts ---


def found(check, rows: list, tokenizer=None):
    for row in read(rows, tokenizer):
        check.see(row)
    return check.found


def test_control_tokens_inside_texts_are_counted_by_row():
    """Twice in one row is one row; tokens in a role's name or in token ids are not looked for."""
    tokenizer = byte_bpe(chat_template=CHAT)
    rows = [
        {"prompt": "a<|user|>b<|user|>", "chosen": " <eos>", "rejected": " c"},
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": "x <|user|> y"}], "rejected": [OTHER]},
    ]
    got = found(ControlText(tokenizer), rows, tokenizer)
    assert {token: (seen.rows, seen.first) for token, seen in got.items()} == {
        "<eos>": (1, [0]),
        "<|user|>": (2, [0, 2]),
    }


def test_completions_without_eos_are_counted():
    """Token ids are taken as they are: here one ends in EOS, one in EOS and a line break, one in text, one in a control token."""
    tokenizer = byte_bpe()
    break_, end, user = (
        tokenizer("\n")["input_ids"],
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|user|>"),
    )
    letter = tokenizer("x")["input_ids"]
    rows = [
        {"prompt_ids": [9], "chosen_ids": [*letter, end], "rejected_ids": [*letter, end, *break_]},
        {"prompt_ids": [9], "chosen_ids": [*letter, *break_], "rejected_ids": [*letter, user]},
    ]
    got = found(Endings(tokenizer), rows, tokenizer)
    assert (got.completions, got.without_eos, got.rows.first) == (4, 2, [1])
    assert dict(got.ends_in) == {"text": 1, "<|user|>": 1}


def test_templates_that_end_turns_otherwise_are_found():
    tokenizer = byte_bpe(chat_template=CHAT.replace("<eos>", "<|system|>"))
    got = found(Endings(tokenizer), [FORMS["conversation"], FORMS["text"]], tokenizer)
    assert (got.completions, got.without_eos, dict(got.ends_in)) == (4, 2, {"<|system|>": 2})


def test_empty_completions_are_not_looked_at():
    assert found(Endings(tiny.tokenizer()), [{**FORMS["text"], "rejected": " "}]).completions == 0


def test_ids_of_another_tokenizer_are_found():
    row = FORMS["token ids"]
    beyond = {**row, "chosen_ids": [len(tiny.tokenizer())]}
    got = found(UnknownIds(tiny.tokenizer()), [row, beyond, FORMS["text"]])
    assert got.first == [1]


DATED = "{{ strftime_now('%d') }}" + tiny.CHAT_TEMPLATE
OPENS = tiny.CHAT_TEMPLATE.replace(
    "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>"
)


@pytest.mark.parametrize(
    ("template", "seen", "dated"),
    [
        (tiny.CHAT_TEMPLATE, [], False),
        (OPENS, ["generation_differs"], False),
        (tiny.CHAT_TEMPLATE.replace("<|end|>", ""), ["no_end_of_turn"], False),
        (DATED, [], True),
        ("{# strftime_now #}" + tiny.CHAT_TEMPLATE, [], False),
    ],
    ids=["sound", "opens a thought", "no end", "dated", "comment"],
)
def test_habits_of_templates(template, seen, dated):
    assert OPENS != tiny.CHAT_TEMPLATE
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    rows = [
        {**FORMS["conversation"], "prompt": [{"role": "system", "content": "be kind"}, USER]},
        FORMS["text"],
    ]
    got = found(TemplateCheck(tokenizer), rows, tokenizer)
    assert (got.conversations, got.texts, got.has_template) == (1, 1, True)
    assert [name for name, count in got.seen.items() if count.rows] == seen
    assert got.changes_with_the_day == dated


def test_two_bos():
    tokenizer = byte_bpe(chat_template="<bos><bos>" + CHAT)
    assert found(TemplateCheck(tokenizer), [FORMS["conversation"]], tokenizer).two_bos.first == [0]
    tokenizer = byte_bpe(chat_template="<bos>" + CHAT)
    assert found(TemplateCheck(tokenizer), [FORMS["conversation"]], tokenizer).two_bos.rows == 0


# --- token by token ---


def joined(ids: list[int], tokenizer) -> list[str]:
    return [text for _, _, text in pieces(ids, tokenizer, control_ids(tokenizer))]


def test_pieces_are_whole_characters_and_add_up():
    """A byte per token: é is two of them, € three, and an emoji four. Together the pieces are the text."""
    tokenizer = tiny.tokenizer()
    text = "aé €😀 b\n"
    ids = tokenizer(text)["input_ids"]
    assert joined(ids, tokenizer) == ["a", "é", " ", "€", "😀", " ", "b", "\n"]
    assert "".join(joined(ids, tokenizer)) == text


def test_pieces_keep_control_tokens_apart():
    tokenizer = tiny.tokenizer()
    ids = tokenizer("a<|end|> b", split_special_tokens=False)["input_ids"]
    assert joined(ids, tokenizer) == ["a", "<|end|>", " ", "b"]
    assert joined([], tokenizer) == []


def test_half_a_character_is_shown_and_ends_nothing():
    tokenizer = tiny.tokenizer()
    ids = tokenizer("é")["input_ids"][:1] + [tiny.END] + tokenizer("b")["input_ids"]
    assert joined(ids, tokenizer) == ["\ufffd", "<|end|>", "b"]


def test_a_row_token_by_token():
    """At max_length 6 of "q?" + " yes" + EOS: four tokens of chosen are scored, EOS is cut away; rejected is whole."""
    [row] = read([FORMS["text"]], max_length=6)
    shown = show_row(row, tiny.tokenizer())
    prompt, chosen, rejected = shown.stretches
    assert [stretch.role for stretch in shown.stretches] == ["prompt", "chosen", "rejected"]
    assert [(t.text, t.state) for t in prompt.tokens] == [("q", READ), ("?", READ)]
    assert [(t.text, t.state) for t in chosen.tokens] == [
        ("·", SCORED),
        ("y", SCORED),
        ("e", SCORED),
        ("s", SCORED),
        ("<|end|>", CUT),
    ]
    assert [t.control for t in chosen.tokens] == [False] * 4 + [True]
    assert (chosen.counts, rejected.counts) == ({SCORED: 4, CUT: 1}, {SCORED: 4})
    assert shown.outcome == "truncated chosen"


def test_what_is_cut_of_a_prompt_stands_behind_its_bos():
    """<bos>abcd with at most 3 tokens of prompt: <bos>, then d and one before it stay."""
    tokenizer = byte_bpe(adds="<bos> $A")
    rows = [{"prompt": "uvwx", "chosen": " y", "rejected": " z"}]
    [row] = read(rows, tokenizer, max_prompt_length=3, bos_token_id=tokenizer.bos_token_id)
    tokens = show_row(row, tokenizer).stretches[0].tokens
    assert [(t.text, t.state) for t in tokens] == [
        ("<bos>", READ),
        ("u", CUT),
        ("v", CUT),
        ("w", READ),
        ("x", READ),
    ]
    [row] = read(rows, tokenizer, max_prompt_length=2)
    assert [t.state for t in show_row(row, tokenizer).stretches[0].tokens] == [CUT, CUT, CUT, READ, READ]


def test_tokens_that_are_not_scored_are_read():
    ids = PairIds([5], [[6, 7, 8, 9], [6, 7]], unscored=[(0, 1, 3)])
    shown = show_row(Row(0, "conversation", None, ids, no_limits().apply(ids)), tiny.tokenizer())
    assert [t.state for t in shown.stretches[1].tokens] == [SCORED, READ, READ, SCORED]
    assert shown.stretches[1].counts == {READ: 2, SCORED: 2}


def test_ranked_completions_say_what_they_are_better_than():
    [row] = read([FORMS["text, ranked list"]])
    shown = show_row(row, tiny.tokenizer())
    assert [(s.role, s.title) for s in shown.stretches[1:]] == [
        ("chosen", "completion 0: better than 1, 2"),
        ("between", "completion 1: better than 2 and worse than 0"),
        ("rejected", "completion 2: worse than 0, 1"),
    ]


def test_completions_that_no_pair_needs_are_cut_away_whole():
    """With one pair per prompt the best and the second are compared, or the best and the worst: the clearest pair."""
    [row] = read([FORMS["text, ranked list"]], max_pairs=1)
    shown = show_row(row, tiny.tokenizer())
    assert [CUT in s.counts for s in shown.stretches[1:]] == [False, True, False]


def test_long_texts_show_their_ends():
    [row] = read([{**FORMS["text"], "prompt": "a" * (MOST + 10) + "z"}])
    tokens = show_row(row, tiny.tokenizer()).stretches[0].tokens
    gaps = [token for token in tokens if isinstance(token, Gap)]
    assert [gap.hidden for gap in gaps] == [11]
    assert len(tokens) == MOST + 1
    assert tokens[-1].text == "z"


def test_a_dropped_row_says_why():
    [row] = read([{**FORMS["text"], "rejected": " yes"}])
    assert show_row(row, tiny.tokenizer()).outcome == "dropped, chosen equals rejected"


# --- what is made visible ---


def test_white_space_has_signs():
    assert with_white_space("a b\n\tc\r") == "a·b⏎\n⇥c\\r"
