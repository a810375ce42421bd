"""Rows of strings, ranked lists and token ids whose values are not what they must be, and columns that are not there."""

from __future__ import annotations

from .case import (
    ASKED,
    ASSISTANT,
    BOS,
    EOS,
    IDS,
    NO,
    RANKED,
    SHAREGPT,
    SO,
    STREAM,
    TABLE,
    TALK,
    TEXT,
    USER,
    assistant,
    becomes,
    drops,
    gives,
    human,
    lines,
    logs,
    refused,
    refused_row,
    second,
    user,
)

NAN, INF = float("nan"), float("inf")
WHY = [BOS, "Why?"]
LONG = "x" * 2_000_000


def without(row, *columns):
    return {name: value for name, value in row.items() if name not in columns}


FILL_IN = "Fill it in, or leave such rows out"
A_TEXT = "Give a string or a list of messages"
ONE_TEXT = "Only 'rejected' and 'completions' may hold several"

STRINGS = {
    "prompt None": refused_row(second(TEXT, prompt=None), "'prompt': is None", FILL_IN),
    "chosen None": refused_row(second(TEXT, chosen=None), "'chosen': is None", FILL_IN),
    "a column of nothing but None": refused(
        lines(*[TEXT | {"rejected": None}] * 2), "'rejected': is None", FILL_IN, at="Row 0"
    ),
    "prompt a number": refused_row(second(TEXT, prompt=7), "'prompt': is of type int", A_TEXT),
    "chosen a bool": refused_row(second(TEXT, chosen=True), "'chosen': is of type bool", A_TEXT),
    "rejected a float": refused_row(second(TEXT, rejected=1.5), "'rejected': is of type float", A_TEXT),
    "chosen NaN": refused_row(second(TEXT, chosen=NAN), "'chosen': (is of type float|NaN)", "Give"),
    "prompt an empty list": refused_row(second(TEXT, prompt=[]), "'prompt': is an empty list", "Give at"),
    "prompt an empty object": refused_row(
        second(TEXT, prompt={}), "'prompt': has no role", "A message needs role and content"
    ),
    "prompt a list of strings": refused_row(second(TEXT, prompt=["x", "y"]), "'prompt': is a list of texts", ONE_TEXT),
    "chosen nested": refused_row(second(TEXT, chosen=[["x"]]), "'chosen': is a list of texts", ONE_TEXT),
    "prompt empty": becomes(second(TEXT, prompt=""), gives([BOS], SO, NO, counts={"empty_prompts": 1})),
    "prompt blank": becomes(second(TEXT, prompt=" \n"), gives([BOS, " \n"], SO, NO)),
    "chosen empty": becomes(second(TEXT, chosen=""), drops("empty_completion")),
    "rejected blank": becomes(second(TEXT, rejected=" \n\t\u3000"), drops("empty_completion")),
    "chosen is rejected": becomes(second(TEXT, chosen="No."), drops("identical")),
    "no row of use": refused(
        lines(TEXT | {"chosen": ""}, TEXT | {"chosen": "No."}),
        r"No pair .* is left: empty completion: 1 \(row 0\); chosen equals rejected: 1 \(row 1\)",
        "chosen and rejected must say something, and differ",
        ways=[TABLE],
    ),
    "no row of use, as a stream": becomes(
        lines(TEXT | {"chosen": ""}, TEXT | {"chosen": ""}),
        logs(r"empty completion: 2 \(rows 0, 1\), of 2 rows so far"),
        ways=[STREAM],
    ),
    "nothing shared, no prompt": becomes(
        lines(without(TEXT, "prompt")), gives([BOS], SO, NO, counts={"empty_prompts": 1}), rows=1
    ),
}


LISTS = {
    "rejected a list": becomes(second(TEXT, rejected=["a", "b"]), gives(WHY, SO, ["a", EOS], ["b", EOS])),
    "rejected a list of one": becomes(second(TEXT, rejected=["a"]), gives(WHY, SO, ["a", EOS], pairs=[[0, 1]])),
    "rejected an empty list": refused_row(second(TEXT, rejected=[]), "'rejected': is an empty list", "Give"),
    "rejected list with None": refused_row(second(TEXT, rejected=["a", None]), r"'rejected\[1\]': is None", FILL_IN),
    "rejected list with a number": refused_row(
        second(TEXT, rejected=["a", 7]), r"'rejected\[1\]': is of type int", A_TEXT
    ),
    "rejected list nested": refused_row(
        second(TEXT, rejected=[["a"], ["b"]]), r"'rejected\[0\]': is a list of texts", ONE_TEXT
    ),
    "rejected list of a message and a string": refused_row(
        second(TEXT, rejected=[assistant("a"), "b"]),
        r"'rejected(\[1\])?': .*(string|str)",
        "Give",
    ),
    "rejected list with an empty string": becomes(
        second(TEXT, rejected=["", "b"]), gives(WHY, SO, ["b", EOS], pairs=[[0, 1]])
    ),
    "rejected list with the chosen one": becomes(
        second(TEXT, rejected=["So.", "b"]), gives(WHY, SO, ["b", EOS], pairs=[[0, 1]])
    ),
    "rejected a list, no prompt": refused_row(
        lines(TEXT | {"rejected": ["a", "b"]}, without(TEXT, "prompt") | {"rejected": ["a", "b"]}),
        "'prompt': is None",
        FILL_IN,
    ),
    "rejected lists, no prompt column": refused(
        lines(without(TEXT, "prompt") | {"rejected": ["a", "b"]}),
        "several completions and no prompt",
        "Give what they share in a column 'prompt'",
        at="Row 0",
    ),
    "scores NaN": refused_row(second(RANKED, scores=[1, NAN, 3]), "'scores': (holds nan at 1|NaN)", "Give"),
    "scores infinite": refused_row(
        second(RANKED, scores=[1, INF, 3]), "'scores': (holds inf at 1|Infinity)", "Give finite"
    ),
    "scores None": refused_row(second(RANKED, scores=[None, 2, 3]), "holds None at 0", "Give finite"),
    "scores bool": refused_row(second(RANKED, scores=[True, 2, 3]), "holds True at 0", "Give finite"),
    "scores strings": refused_row(second(RANKED, scores=["1", "2", "3"]), "holds '1' at 0", "Give finite"),
    "scores nested": refused_row(second(RANKED, scores=[[1], [2], [3]]), r"holds \[1\] at 0", "Give"),
    "scores too few": refused_row(second(RANKED, scores=[1, 2]), "2 of them for 3", "Give one number per"),
    "scores too many": refused_row(second(RANKED, scores=[1, 2, 3, 4]), "4 of them for 3", "Give one"),
    "scores missing in a row": refused_row(
        lines(RANKED, without(RANKED, "scores")), "'scores': is None for 3", "Give one number per"
    ),
    "scores beyond float32": refused_row(second(RANKED, scores=[1e308, 0, -1e308]), "'scores'.*1e.308", "Give"),
    "scores all equal": becomes(second(RANKED, scores=[2, 2, 2]), drops("tied")),
    "scores beside a margin": refused_row(
        second(RANKED, margin=1.0), "'margin': is set, and 'scores' say it", "Remove one of the two"
    ),
    "completions of one": refused_row(second(RANKED, completions=["one"]), "two or more", "Give a list"),
    "completions empty": refused_row(second(RANKED, completions=[]), "two or more", "Give a list"),
    "completions None": refused_row(
        second(RANKED, completions=None),
        "'completions': is None",
        "Fill it in|Give",
    ),
    "completions a string": refused_row(second(RANKED, completions="abc"), "two or more", "Give a list"),
    "completions numbers": refused_row(second(RANKED, completions=[1, 2, 3]), "'completions", "Give"),
    "completions nested": refused_row(
        second(RANKED, completions=["a", ["b"], "c"]), r"'completions\[1\]': is a list of texts", "Only"
    ),
    "completions of bare messages": becomes(
        lines(
            TALK
            | {"completions": [assistant("a"), assistant("b")], "scores": [1, 2], "chosen": None, "rejected": None}
        ),
        gives(ASKED, ["b", EOS], ["a", EOS], margin=[1.0]),
        rows=1,
    ),
    "completions with None": refused_row(
        second(RANKED, completions=["a", None, "c"]), r"'completions\[1\]': is None", FILL_IN
    ),
    "completions with an empty string": becomes(
        second(RANKED, completions=["a", "", "c"]), gives(WHY, ["c", EOS], ["a", EOS], pairs=[[0, 1]], margin=[2.0])
    ),
    "completions all empty": becomes(second(RANKED, completions=["", " ", "\n"]), drops("empty_completion")),
    "completions and no prompt": refused_row(lines(RANKED, without(RANKED, "prompt")), "'prompt'", FILL_IN),
    "pair and ranked columns": becomes(lines(RANKED | TEXT), gives(WHY, SO, NO, pairs=[[0, 1]], margin=[]), rows=1),
}

WEIGHT, MARGIN = TEXT | {"weight": 1.0}, TEXT | {"margin": 1.0}
FINITE = "Give a finite number"

NUMBERS = {
    "weight NaN": refused_row(second(WEIGHT, weight=NAN), "'weight': is nan", FINITE),
    "weight infinite": refused_row(second(WEIGHT, weight=INF), "'weight': is inf", FINITE),
    "weight negative": refused_row(second(WEIGHT, weight=-1), "'weight': is -1", "at least 0"),
    "weight a string": refused_row(second(WEIGHT, weight="1"), "'weight': is '1'", FINITE),
    "weight a list": refused_row(second(WEIGHT, weight=[1, 2]), r"'weight': is \[1, 2\]", FINITE),
    "weight a bool": refused_row(second(WEIGHT, weight=True), "'weight': is True", FINITE),
    "weight of 2 MB": refused_row(second(WEIGHT, weight=LONG), "'weight': is 'xxx", FINITE),
    "weight beyond float32": refused_row(second(WEIGHT, weight=1e39), r"'weight': is 1e\+39", FINITE),
    "weight None": becomes(second(WEIGHT, weight=None), gives(WHY, SO, NO, weight=1.0)),
    "weight 0": becomes(second(WEIGHT, weight=0), gives(WHY, SO, NO, weight=0.0)),
    "margin NaN": refused_row(second(MARGIN, margin=NAN), "'margin': is nan", FINITE),
    "margin infinite": refused_row(second(MARGIN, margin=INF), "'margin': is inf", FINITE),
    "margin a string": refused_row(second(MARGIN, margin="1"), "'margin': is '1'", FINITE),
    "margin too long": refused_row(second(MARGIN, margin=[1, 2]), "2 entries for 1 pairs", "Give one number"),
    "margin with a hole": refused(
        lines(MARGIN | {"rejected": ["a", "b"], "margin": [1, None]}), "'margin': is None", FINITE, at="Row 0"
    ),
    "margin beyond float32": refused_row(second(MARGIN, margin=1e39), r"'margin': is 1e\+39", FINITE),
    "margin negative": becomes(second(MARGIN, margin=-1), gives(WHY, SO, NO, margin=[-1.0])),
    "margin None": becomes(second(MARGIN, margin=None), gives(WHY, SO, NO, margin=[])),
}

AN_ID = "Give at least one token id"
THREE = IDS | {"more_ids": [[5, 6]], "pairs": [[0, 1], [0, 2]], "unscored": [[2, 0, 1]]}

TOKEN_IDS = {
    "ids None": refused_row(second(IDS, chosen_ids=None), "'chosen_ids': is None", AN_ID),
    "ids empty": refused_row(second(IDS, prompt_ids=[]), r"'prompt_ids': is \[\]", AN_ID),
    "ids a string": refused_row(second(IDS, chosen_ids="12"), "'chosen_ids': is '12'", AN_ID),
    "ids strings": refused_row(second(IDS, chosen_ids=["1"]), r"\['1'\]", AN_ID),
    "ids negative": refused_row(second(IDS, chosen_ids=[5, -1]), r"\[5, -1\]", AN_ID),
    "ids floats": refused_row(second(IDS, chosen_ids=[1.5]), r"\[1\.5\]", AN_ID),
    "ids beyond int32": refused_row(second(IDS, chosen_ids=[2**31]), "2147483648", AN_ID),
    "ids beyond int64": refused_row(second(IDS, chosen_ids=[2**63]), "9223372036854775808", AN_ID),
    "ids bool": refused_row(second(IDS, chosen_ids=[True]), "True", AN_ID),
    "ids bool among numbers": refused_row(
        second(IDS, chosen_ids=[1, True]),
        "True",
        AN_ID,
    ),
    "ids with None": refused_row(second(IDS, chosen_ids=[1, None]), "None", AN_ID),
    "ids nested": refused_row(second(IDS, chosen_ids=[[1], [2]]), "'chosen_ids'", AN_ID),
    "ids nested unevenly": refused_row(second(IDS, chosen_ids=[[1], [2, 3]]), "nested", AN_ID),
    "ids beyond the vocabulary": refused_row(
        second(IDS, chosen_ids=[100_000]),
        "token id 100000",
        "resize_token_embeddings",
    ),
    "ids and text in turn": refused_row(lines(IDS, TEXT), "'prompt_ids': is None", AN_ID),
    "ids beside text": becomes(lines(IDS | TEXT), gives([BOS, "#"], ["$", EOS], ["%", EOS]), rows=1),
    "more_ids a number": refused_row(second(THREE, more_ids=7), "'more_ids'", "Give"),
    "more_ids empty ids": refused_row(second(THREE, more_ids=[[]]), r"'more_ids\[0\]'", AN_ID),
    "pairs flat": refused_row(second(THREE, pairs=[0, 1]), "'pairs'", "Give two numbers"),
    "pairs with None": refused_row(second(THREE, pairs=[None]), "'pairs'", "Give two"),
    "pairs of one completion": refused_row(second(THREE, pairs=[[1, 1]]), r"[\[(]1, 1[\])]", "Give two numbers"),
    "pairs beyond the completions": refused_row(second(THREE, pairs=[[0, 3]]), "for 3 completions", "Give"),
    "unscored flat": refused_row(second(THREE, unscored=[7]), "'unscored'", "Give"),
    "unscored strings": refused_row(second(THREE, unscored=[["a", 0, 1]]), "'unscored'", "Give"),
    "unscored floats": refused_row(second(THREE, unscored=[[0, 0.5, 1]]), "'unscored'", "Give"),
    "unscored beyond the end": refused_row(second(THREE, unscored=[[2, 0, 9]]), r"\[2, 0, 9\]", "Give"),
    "unscored everything": refused_row(
        second(THREE, unscored=[[2, 0, 2]]), "without a scored token", "Leave such rows out"
    ),
    "unscored everything, in stretches that overlap": refused_row(
        second(THREE, unscored=[[2, 0, 2], [2, 0, 1]]), "'unscored'.*overlap", "Join them"
    ),
    "example_id a string": refused_row(
        second(IDS | {"example_id": 3}, example_id="x"), "'example_id': is 'x'", "Give an integer"
    ),
    "example_id beyond int64": refused_row(
        second(IDS | {"example_id": 3}, example_id=2**63),
        "'example_id'",
        "Give an integer",
    ),
    "margin of ids NaN": refused_row(
        second(IDS | {"margin": 1.0}, margin=[NAN]), r"'margin': (is \[nan\]|NaN)", "Give"
    ),
}

NEEDS = "A row needs 'chosen' and 'rejected'"

COLUMNS = {
    "no rejected": refused(lines(without(TEXT, "rejected")), "no column 'rejected'", NEEDS),
    "no rejected in one row": refused_row(lines(TEXT, without(TEXT, "rejected")), "'rejected': is None", FILL_IN),
    "columns of something else": refused(lines({"a": 1, "b": 2}), r"no column 'chosen'.*it has: a, b", NEEDS),
    "something else in the last of 300 rows": refused(
        lines(*[TEXT] * 300, {"a": 1}), "'prompt': is None", FILL_IN, at="Row 300"
    ),
    "misspelt chosen": refused(
        lines({"prompt": "q", "choosen": "a", "rejected": "b"}), "Is 'choosen' meant", r"rename_column\('choosen'"
    ),
    "misspelt prompt": refused(
        lines({"promt": "q", "chosen": "a", "rejected": "b"}), "Is 'promt' meant", r"rename_column\('promt'"
    ),
    "capital letters": refused(
        lines({"Prompt": "q", "Chosen": "a", "Rejected": "b"}),
        "'Chosen' and 'Rejected' meant",
        "--columns prompt=Prompt,chosen=Chosen,",
    ),
    "misspelt ids": refused(
        lines(without(IDS, "rejected_ids") | {"rejected_id": [3]}), "no column 'rejected_ids'", "rename_column"
    ),
    "completions without scores": refused(lines(without(RANKED, "scores")), "no column 'scores'", NEEDS),
    "another name for the prompt": refused(
        lines(*[{"question": "q", "chosen": "a b", "rejected": "a c"}] * 2),
        "'question'",
        "--columns prompt=question",
        at="Row 0",
    ),
    "another name, and the prompt is in the answers": becomes(
        lines(*[{"question": "a", "chosen": "a b", "rejected": "a c"}] * 2),
        logs("no column 'prompt': prompts are what .* share.*question"),
    ),
    "a prompt in one row only": refused_row(lines(TEXT, without(TEXT, "prompt")), "'prompt': is None", FILL_IN),
    "prompt and messages": becomes(lines(TALK | {"messages": [user("x")]}), gives(ASKED, SO, NO), rows=1),
    "prompt None and messages": becomes(
        lines(TALK | {"prompt": None, "messages": TALK["prompt"]}), gives(ASKED, SO, NO), rows=1
    ),
    "control characters in a column name": refused(lines({"a\x1b[31m\u202e": 1}), r"it has: .*a", NEEDS),
    "a column name of 2 MB": refused(lines({LONG: 1}), "it has: .?xxx", NEEDS),
    "optional columns of nothing but None": becomes(
        lines(*[TEXT | dict.fromkeys(["weight", "margin", "tools", "chat_template_kwargs"])] * 2),
        gives(WHY, SO, NO, weight=1.0, margin=[]),
    ),
    "many forms in one file": becomes(
        lines(TEXT, TALK, RANKED, TEXT | {"rejected": ["a", "b"]}, SHAREGPT | {"conversations": [human("Hm?")]}),
        gives([USER, "Hm?", EOS, ASSISTANT], SO, NO),
        rows=5,
    ),
}
