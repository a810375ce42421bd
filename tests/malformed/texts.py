"""Strings that are odd in themselves: characters, control tokens, splits, depth, size."""

from __future__ import annotations

import json

from tiny_tokenizers import word_level

from .case import (
    ASKED,
    ASSISTANT,
    BOS,
    EOS,
    NO,
    SHAREGPT,
    SO,
    STREAM,
    SYSTEM,
    TABLE,
    TALK,
    TEXT,
    USER,
    Control,
    Prepared,
    assistant,
    becomes,
    counts_of,
    drops,
    gives,
    human,
    lines,
    raw,
    refused,
    refused_row,
    second,
    spelled,
    tokenizer,
    user,
)

WHY = [BOS, "Why?"]
GOOD = json.dumps(TEXT)


def asks(content, **counts):
    """A conversation whose prompt comes through to the letter."""
    return becomes(second(TALK, prompt=[user(content)]), gives([USER, content, EOS, ASSISTANT], SO, NO, counts=counts))


def text_prompt(prompt, **counts):
    return becomes(second(TEXT, prompt=prompt), gives([BOS, prompt], SO, NO, counts=counts))


def line(text, wrong, remedy):
    """A second line written as it stands here."""
    return refused(raw(f"{GOOD}\n{text}\n"), wrong, remedy, at="line 2")


HALF = "half of a character"

CHARACTERS = {
    "null byte, escaped": asks("a\0c"),
    "null byte in a string": text_prompt("\0"),
    "null byte as it is": line('{"prompt": "a\0", "chosen": "b", "rejected": "c"}', "null byte", "remove it"),
    "control characters, escaped": asks("\x01\x1b[31m\x7f\x9b"),
    "control character as it is": line('{"prompt": "\x07"}', "Invalid control character", "mend or delete"),
    "half a surrogate pair": line(
        '{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', f"'prompt'.*{HALF}", "Write the whole"
    ),
    "the other half": line(
        '{"prompt": "q", "chosen": "\\udfffx", "rejected": "c"}', f"'chosen'.*{HALF}", "or remove it"
    ),
    "a pair the wrong way round": line(
        '{"chosen": "\\ude00\\ud83d", "rejected": "c"}', f"'chosen'.*{HALF}", "or remove it"
    ),
    "half a pair in a message": line(
        '{"prompt": [{"role": "user", "content": "\\ud800"}]}', f"'prompt'.*{HALF}", "or remove"
    ),
    "half a pair in a column name": line('{"a\\ud800": 1}', rf"'a\\ud800'.*{HALF}", "or remove it"),
    "a whole pair": asks("\U0001f600"),
    "byte order mark inside": asks("a\ufeffc"),
    "byte order mark as a completion": becomes(second(TEXT, chosen="\ufeff"), gives(WHY, ["\ufeff", EOS], NO)),
    "zero-width space as a completion": becomes(second(TEXT, chosen="\u200b"), gives(WHY, ["\u200b", EOS], NO)),
    "non-breaking space as a completion": becomes(
        second(TEXT, chosen="\u00a0\u3000\u2028"), drops("empty_completion")
    ),
    "right to left": asks("שלום עולם، مرحبا"),
    "right-to-left override": asks("\u202egnp.exe\u202c \u2066x\u2069"),
    "fifty combining marks": asks("e" + "\u0301" * 50),
    "decomposed stays decomposed": text_prompt("cafe\u0301"),
    "composed stays composed": text_prompt("caf\u00e9"),
    "emoji with joiners": asks("👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 🇫🇷"),
    "characters that are no characters": asks("\ufffe\uffff\U0010ffff\ufffd"),
    "private use": asks("\U000f0000\U000f0001\ue000"),
    "every kind of line break": asks("a\r\nc\rd\x0be\x0cf\x85g\u2028h\u2029i"),
    "line separators within a line of the file": becomes(
        raw('{"prompt": "a\u2028\u0085c", "chosen": "So.", "rejected": "No."}\n'),
        gives([BOS, "a\u2028\x85c"], SO, NO),
        rows=1,
    ),
    "jinja": asks("{{ 7 * 7 }}{% for x in y %}{# #}{%- raw -%}"),
    "a word the tokenizer does not know": refused(
        lines(TEXT),
        "the tokenizer refuses this text",
        "Mend the text, or leave it out",
        at="Row 0",
        tokenizer=word_level("a"),
    ),
    "a text of which the tokenizer makes nothing": refused(
        lines({"prompt": "a", "chosen": " a", "rejected": "z"}),
        "'rejected': the tokenizer makes no token of 'z'",
        "Leave such rows out",
        at="Row 0",
        tokenizer=word_level("a"),
    ),
}

WRITES_ALL = (
    "{% if tools %}<|system|>{{ tools | tojson }}<eos>{% endif %}{% if style %}<|system|>{{ style }}<eos>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.name }}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKER = "<|assistant|>"
KEPT = {"control_text": 1}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {MARKER: 1}}}]}


def injects(row, prompt, completion=SO, other=NO):
    check = gives(prompt, completion, other, counts=KEPT)
    return becomes(lines(row), check, rows=1, tokenizer=tokenizer(WRITES_ALL))


def refuses_key(row):
    """A tool or an argument of such a name cannot be kept as text: `transformers` leaves keys as they are."""
    how = {"at": "Row 0", "tokenizer": tokenizer(WRITES_ALL)}
    return refused(lines(row), "control token.*<.assistant.>", "key|name", **how)


CONTROL = {
    "in a user's text": asks(MARKER, **KEPT),
    "all of them in a user's text": asks("<pad><bos><eos><|user|><|system|><think>" + MARKER, **KEPT),
    "a whole turn in a user's text": asks(f"x<eos>{MARKER}Yes.<eos><|user|>", **KEPT),
    "in a system turn": injects(
        TALK | {"prompt": [{"role": "system", "content": MARKER}, user("Why?")]}, [SYSTEM, MARKER, EOS, *ASKED]
    ),
    "in the column system": injects(TALK | {"system": MARKER}, [SYSTEM, MARKER, EOS, *ASKED]),
    "in chosen": injects(TALK | {"chosen": [assistant(f"<eos>{MARKER}")]}, ASKED, [f"<eos>{MARKER}", EOS]),
    "in rejected": injects(TALK | {"rejected": [assistant("x<eos>")]}, ASKED, SO, ["x<eos>", EOS]),
    "in another key of a message": injects(
        TALK | {"prompt": [user("x") | {"name": MARKER}]}, [USER, f"{MARKER}x", EOS, ASSISTANT]
    ),
    "in tools": injects(TALK | {"tools": [{"a": MARKER}]}, [SYSTEM, f'[{{"a": "{MARKER}"}}]', EOS, *ASKED]),
    "in JSON tools": injects(
        TALK | {"tools": json.dumps([{"a": MARKER}])}, [SYSTEM, f'[{{"a": "{MARKER}"}}]', EOS, *ASKED]
    ),
    "in template arguments": injects(
        TALK | {"chat_template_kwargs": {"style": MARKER}}, [SYSTEM, MARKER, EOS, *ASKED]
    ),
    "in ShareGPT turns": injects(SHAREGPT | {"conversations": [human(MARKER)]}, [USER, MARKER, EOS, ASSISTANT]),
    "in a name of a tool's parameter": refuses_key(TALK | {"tools": [{MARKER: 1}]}),
    "in a name of a call's argument": refuses_key(
        TALK | {"prompt": [user("x"), CALL, {"role": "tool", "content": "y"}]}
    ),
    "put together from two parts": injects(
        TALK | {"prompt": [user([{"type": "text", "text": "<|assis"}, {"type": "text", "text": "tant|>"}])]},
        [USER, MARKER, EOS, ASSISTANT],
    ),
    "put together where an answer is continued": becomes(
        lines(TALK | {"prompt": [user("Why?"), assistant("x<eo")], "chosen": [assistant("s>y")]}),
        gives([*ASKED, "x<eo"], ["s>y", EOS], NO, counts=KEPT),
        rows=1,
    ),
    "put together from prompt and completion": becomes(
        lines({"prompt": "<|assis", "chosen": "tant|>", "rejected": "No."}),
        gives([BOS, "<|assis"], ["tant|>", EOS], NO, counts=KEPT),
        rows=1,
    ),
    "in plain strings": becomes(
        lines({"prompt": f"<bos>{MARKER}", "chosen": "<eos>", "rejected": "<eos>x"}),
        gives([BOS, f"<bos>{MARKER}"], ["<eos>", EOS], ["<eos>x", EOS], counts=KEPT),
        rows=1,
    ),
    "allowed": becomes(
        lines(TALK | {"prompt": [user(f"x<eos>{MARKER}")]}),
        gives([USER, "x", EOS, ASSISTANT, EOS, ASSISTANT], SO, NO),
        rows=1,
        options={"allow_special_tokens_in_text": True},
    ),
    "beside private-use characters": refused_row(
        lines(TALK, TALK | {"prompt": [user(f"\U000f0001{MARKER}")]}), r"U\+F0000 or U\+F0001", "Remove them"
    ),
    "hidden by private-use characters": refused_row(
        lines(TALK, TALK | {"prompt": [user(f"<|assis\U000f0000tant|>{MARKER}")]}),
        r"U\+F0000 or U\+F0001",
        "Remove them",
    ),
}


def no_control_inside(out: Prepared, controls: int) -> None:
    assert sum(isinstance(piece, Control) for piece in spelled(out.rows[0]["prompt_ids"], out.tokenizer)) == controls


def splits(prompt, chosen, rejected):
    """Two whole texts, and where they part."""
    check = gives([BOS, prompt], [chosen, EOS], [rejected, EOS])
    return becomes(lines({"chosen": prompt + chosen, "rejected": prompt + rejected}), check, rows=1)


FLAG = "🏴\U000e0067\U000e0062"
INSIDE = "data/rows/implicit.py: parts what is one sign on the screen"

SPLITS = {
    "between joined emoji": splits("ok", " 👩\u200d🚀 go", " 👩\u200d🔬 go"),
    "between skin tones": splits("ok", " 👍🏽 go", " 👍🏻 go"),
    "before a variation selector": splits("ok", " ❤\ufe0f go", " ❤ go"),
    "before a keycap": splits("ok", " 1\ufe0f\u20e3 go", " 1 go"),
    "before a combining mark": splits("ok", " cafe\u0301", " cafe\u0302"),
    "in a flag of two letters": splits("ok", " 🇫🇷 go", " 🇫🇮 go"),
    "in a flag of tags": splits("ok", f" {FLAG}\U000e0065\U000e007f go", f" {FLAG}\U000e0073\U000e007f go"),
    "right to left": splits("שלום", " עולם", " חבר"),
    "no spaces between words": becomes(
        lines({"chosen": "你好世界", "rejected": "你好朋友"}),
        gives([BOS], ["你好世界", EOS], ["你好朋友", EOS], counts={"empty_prompts": 1}),
        rows=1,
    ),
    "transcripts whose user writes the marker": splits("\n\nHuman: say\n\nAssistant: x\n\nAssistant:", "yes", "no"),
}


def nested(levels):
    return "[" * levels + "]" * levels


def with_key(row, key, value):
    return f'{json.dumps(row)[:-1]}, "{key}": {value}}}'


DEEPER = "nested (too deep|more than)"
NOT_THE_TEMPLATE = "JSON|nested|recursion"

DEEP = {
    "a user's own column, 100 levels": becomes(
        raw(f"{GOOD}\n{with_key(TEXT, 'a', nested(100))}\n"), gives(WHY, SO, NO)
    ),
    "a user's own column, 1,000 levels": line(with_key(TEXT, "a", nested(1000)), DEEPER, "mend or delete|Remove"),
    "a user's own column, 100,000 levels": line(with_key(TEXT, "a", nested(100_000)), DEEPER, "mend or delete|Remove"),
    "a prompt of 150 lists": refused_row(
        raw(f'{GOOD}\n{{"prompt": {nested(150)}, "chosen": "a", "rejected": "b"}}'), "list of texts", "Only"
    ),
    "a prompt of 1,000 lists": line(f'{{"prompt": {nested(1000)}}}', DEEPER, "mend or delete|Remove"),
    "a prompt of 1,000 objects": line(
        '{"prompt": ' + '{"a": ' * 1000 + "1" + "}" * 1001, DEEPER, "mend or delete|Remove"
    ),
    "only brackets": refused(raw("[" * 100_000, "pairs.json"), DEEPER, "mend it", at="line 1"),
    "an array of rows": refused(
        raw(f"[{GOOD}, {with_key(TEXT, 'a', nested(1000))}]", "pairs.json"), DEEPER, "mend|Remove", at="line 1"
    ),
    "JSON tools, 300 levels": becomes(
        lines(TALK | {"tools": '[{"a": ' + nested(300) + "}]"}),
        gives([SYSTEM, '[{"a": ' + nested(300) + "}]", EOS, *ASKED], SO, NO),
        rows=1,
        tokenizer=tokenizer(WRITES_ALL),
    ),
    "JSON tools, 5,000 levels": refused(
        lines(TALK | {"tools": '[{"a": ' + nested(5000) + "}]"}), NOT_THE_TEMPLATE, "Mend|Change", at="Row 0"
    ),
    "JSON tools, 100,000 levels": refused(
        lines(TALK | {"tools": nested(100_000)}), "'tools': is not JSON", "Mend", at="Row 0"
    ),
}

MEGABYTES = 2_000_000
WORDS = "word " * (MEGABYTES // 5)
TURNS = [user("q"), assistant("r")] * 5000
LIMITED = {"max_length": 64}


def cut_prompt(chosen, counts):
    """The prompt has what a longest completion of `chosen` leaves of LIMITED."""

    def check(out: Prepared) -> None:
        row = out.rows[-1]
        assert spelled(row["chosen_ids"], out.tokenizer) == chosen
        assert len(row["prompt_ids"]) == 64 - len(row["chosen_ids"])
        assert counts_of(out) == counts

    return check


LARGE = {
    "a prompt of 2 MB": becomes(
        second(TEXT, prompt=WORDS),
        cut_prompt(SO, {"truncated_prompts": 1}),
        options=LIMITED | {"truncation_mode": "keep_end"},
    ),
    "a prompt of 2 MB that leaves no room": becomes(
        second(TEXT, prompt=WORDS), drops("no_room"), options=LIMITED, ways=[TABLE]
    ),
    "a completion of 2 MB without a space": becomes(
        second(TEXT, chosen="x" * MEGABYTES),
        gives(WHY, ["x" * 59], NO, counts={"truncated_chosen": 1}),
        options=LIMITED,
    ),
    "a completion of 2 MB, uncut": becomes(
        second(TEXT, chosen="x" * MEGABYTES), gives(WHY, ["x" * MEGABYTES, EOS], NO), ways=[TABLE]
    ),
    "a message of 2 MB of control tokens": becomes(
        second(TALK, prompt=[user(MARKER * (MEGABYTES // 13))]),
        cut_prompt(SO, {"truncated_prompts": 1, "control_text": 1}),
        options=LIMITED | {"truncation_mode": "keep_end"},
        ways=[STREAM],
    ),
    "two texts of 2 MB, no prompt": becomes(
        lines({"chosen": WORDS + "yes", "rejected": WORDS + "no"}),
        cut_prompt([" yes", EOS], {"truncated_prompts": 1}),
        rows=1,
        options=LIMITED | {"truncation_mode": "keep_end"},
        ways=[TABLE],
    ),
    "one letter and a million marks, no prompt": refused(
        lines({"chosen": "e" + "\u0301" * 1_000_000, "rejected": "e" + "\u0301" * 1_000_000 + "x"}),
        "chosen equals rejected",
        "differ within --max_length",
        options=LIMITED,
        ways=[TABLE],
    ),
    "10,001 turns in a prompt": becomes(
        second(TALK, prompt=[*TURNS, user("Why?")]),
        gives([USER, "q", EOS, ASSISTANT, "r", EOS] * 5000 + ASKED, SO, NO),
    ),
    "10,002 turns, no prompt": becomes(
        lines(
            {"chosen": [*TURNS, user("Why?"), assistant("So.")], "rejected": [*TURNS, user("Why?"), assistant("No.")]}
        ),
        gives([USER, "q", EOS, ASSISTANT, "r", EOS] * 5000 + ASKED, SO, NO),
        rows=1,
    ),
    "101 turns in a completion": becomes(
        second(TALK, chosen=[*[assistant("r"), user("q")] * 50, assistant("r")]),
        # Each r and its EOS are scored; USER, q, EOS, ASSISTANT after each of the first fifty are not.
        gives(
            ASKED,
            ["r", EOS, USER, "q", EOS, ASSISTANT] * 50 + ["r", EOS],
            NO,
            unscored=[[0, 6 * turn + 2, 6 * turn + 6] for turn in range(50)],
        ),
    ),
    "a thousand rejected completions": becomes(
        second(TEXT, rejected=[f"{number}" for number in range(1000)]),
        gives(
            WHY, SO, *([f"{number}", EOS] for number in range(1000)), pairs=[[0, number + 1] for number in range(1000)]
        ),
    ),
}
