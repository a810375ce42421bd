"""Rows in the forms of public preference datasets: read as they are meant, or refused with a way out that works when followed.

The words are this file's own; the columns and their types are those of the datasets.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, NamedTuple

import pytest
import tiny
from datasets import Dataset, Features, IterableDataset, Json, List, Value

from dpo_trainer.data import DataOptions, pair_from_row, prepare_dataset
from dpo_trainer.data.files.renaming import parse_columns, rename_columns
from dpo_trainer.data.rows.column_kinds import kinds_of_features, kinds_of_values
from dpo_trainer.data.rows.column_names import check_columns

Q, GOOD, POOR = "Name a tree.", "Oak is one.", "Brick."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


class Want(NamedTuple):
    """What a row must be read as; `steps`: the ways out that the refusals before it name, in their order."""

    prompt: Any
    chosen: Any
    rejected: Any
    steps: tuple[str, ...] = ()


CHAT = Want([user(Q)], [said(GOOD)], [said(POOR)])
TEXT = Want(Q, GOOD, POOR)
WITH_SYSTEM = Want([system("Be brief."), user(Q)], [said(GOOD)], [said(POOR)])
TALK = [user("Hello."), said("Hello! What is it?"), user(Q)]
LONG = Want(TALK, [said(GOOD)], [said(POOR)])

READ: dict[str, tuple[dict, Want]] = {
    "hh-rlhf: two transcripts": (
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {POOR}"},
        Want(f"\n\nHuman: {Q}\n\nAssistant:", f" {GOOD}", f" {POOR}"),
    ),
    "ultrafeedback binarized: a prompt, whole conversations, and the chosen one again as messages": (
        {
            "prompt": Q,
            "prompt_id": "ab12",
            "chosen": [user(Q), said(GOOD)],
            "rejected": [user(Q), said(POOR)],
            "messages": [user(Q), said(GOOD)],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        CHAT,
    ),
    "ultrafeedback, cleaned: no messages, ratings and models beside": (
        {
            "source": "evol_instruct",
            "prompt": Q,
            "chosen": [user(Q), said(GOOD)],
            "chosen-rating": 5.0,
            "chosen-model": "a",
            "rejected": [user(Q), said(POOR)],
            "rejected-rating": 1.0,
            "rejected-model": "b",
        },
        CHAT,
    ),
    "mixes of messages: chosen and rejected are whole conversations, with ratings": (
        {
            "dataset": "capybara",
            "chosen": [*TALK, said(GOOD)],
            "rejected": [*TALK, said(POOR)],
            "chosen_rating": 5.0,
            "rejected_rating": 2.0,
        },
        LONG,
    ),
    "a prompt of text, chosen a list of messages, rejected a list of messages": (
        {"prompt": Q, "chosen": [said(GOOD)], "rejected": [said(POOR)]},
        CHAT,
    ),
    "a prompt of text, chosen a list of messages, rejected a string": (
        {"prompt": Q, "chosen": [said(GOOD)], "rejected": POOR},
        CHAT,
    ),
    "capybara: the talk once more in another form, whole conversations beside": (
        {
            "source": "Airoboros",
            "conversation": [{"input": Q, "output": GOOD}],
            "original_response": GOOD,
            "chosen": [user(Q), said(GOOD)],
            "rejected": [user(Q), said(POOR)],
            "rating_chosen": 5,
            "model_chosen": "a",
        },
        CHAT,
    ),
    "truthy: id, source, system, prompt, chosen, rejected": (
        {"id": "1", "source": "truthy_dpo", "system": "Be brief.", "prompt": Q, "chosen": GOOD, "rejected": POOR},
        WITH_SYSTEM,
    ),
    "truthy with an empty system message": (
        {"id": "1", "source": "truthy_dpo", "system": "", "prompt": Q, "chosen": GOOD, "rejected": POOR},
        CHAT,
    ),
    "python preferences: prompt, chosen, rejected, id": (
        {"prompt": Q, "chosen": GOOD, "rejected": POOR, "id": "x"},
        TEXT,
    ),
    "toxic pairs: three strings": ({"prompt": Q, "chosen": GOOD, "rejected": POOR}, TEXT),
    "skywork: whole conversations and a source": (
        {"chosen": [user(Q), said(GOOD)], "rejected": [user(Q), said(POOR)], "source": "magpie"},
        CHAT,
    ),
    "tulu 3: id, source, prompt, whole conversations, models": (
        {
            "id": "a1",
            "source": "on-policy",
            "prompt": Q,
            "chosen": [user(Q), said(GOOD)],
            "rejected": [user(Q), said(POOR)],
            "chosen_model": "a",
            "rejected_model": "b",
        },
        CHAT,
    ),
    "olmo's: a prompt that is the last of several questions": (
        {"prompt": Q, "chosen": [*TALK, said(GOOD)], "rejected": [*TALK, said(POOR)], "dataset": "x"},
        LONG,
    ),
    "llama-factory, ShareGPT: conversations, and each answer as one message": (
        {
            "conversations": [human("Hello."), gpt("Hello! What is it?"), human(Q)],
            "chosen": gpt(GOOD),
            "rejected": gpt(POOR),
        },
        LONG,
    ),
    "llama-factory, ShareGPT with a system column": (
        {"conversations": [human(Q)], "system": "Be brief.", "chosen": gpt(GOOD), "rejected": gpt(POOR)},
        WITH_SYSTEM,
    ),
    "infinity preference: id, prompt, whole conversations": (
        {
            "id": 3,
            "prompt": Q,
            "chosen": [user(Q), said(GOOD)],
            "rejected": [user(Q), said(POOR)],
            "task_category": "x",
        },
        CHAT,
    ),
    "argilla's maths: metadata as JSON text": (
        {
            "metadata": '{"length": 9}',
            "prompt": Q,
            "chosen": [said(GOOD)],
            "rejected": [said(POOR)],
            "ratings": [5.0, 1.0],
        },
        CHAT,
    ),
    "trl's: prompt, chosen and rejected are messages": (
        {"prompt": [user(Q)], "chosen": [said(GOOD)], "rejected": [said(POOR)], "score_chosen": 5.0},
        CHAT,
    ),
    "messages that ask, beside one message each": (
        {"messages": TALK, "chosen": said(GOOD), "rejected": said(POOR)},
        LONG,
    ),
    "a question that the conversations hold is not lost": (
        {"question": Q, "chosen": [user(Q), said(GOOD)], "rejected": [user(Q), said(POOR)]},
        CHAT,
    ),
    "ranked: prompt, completions, scores": ({"prompt": Q, "completions": [POOR, GOOD], "scores": [1.0, 4.0]}, TEXT),
    "several rejected": ({"prompt": Q, "chosen": GOOD, "rejected": [POOR]}, TEXT),
    "gutenberg: prompt, chosen, rejected and their models": (
        {"prompt": Q, "chosen": GOOD, "rejected": POOR, "rejected_model": "m", "genre": ["a", "b"], "id": 4},
        TEXT,
    ),
    "purpura of hh, as messages without a prompt": (
        {"chosen": [*TALK, said(GOOD)], "rejected": [*TALK, said(POOR)], "is_response": True},
        LONG,
    ),
}


def renamed(want: Want, columns: str) -> Want:
    return want._replace(steps=(f"--columns {columns}",))


JOINED = "dataset.map"

RENAMED: dict[str, tuple[dict, Want]] = {
    "orca pairs: system, question, chosen, rejected": (
        {"system": "Be brief.", "question": Q, "chosen": GOOD, "rejected": POOR},
        renamed(WITH_SYSTEM, "prompt=question"),
    ),
    "orca pairs with an empty system message": (
        {"system": "", "question": Q, "chosen": GOOD, "rejected": POOR},
        renamed(CHAT, "prompt=question"),
    ),
    "orca pairs of distilabel: system, input, chosen, rejected, generations": (
        {
            "system": "Be brief.",
            "input": Q,
            "chosen": GOOD,
            "rejected": POOR,
            "generations": [GOOD, POOR],
            "order": ["a", "b"],
            "labelling_prompt": [user("Which?")],
            "rating": [9.0, 2.0],
            "status": "unchanged",
        },
        renamed(WITH_SYSTEM, "prompt=input"),
    ),
    "question, chosen, rejected": (
        {"question": Q, "chosen": GOOD, "rejected": POOR},
        renamed(TEXT, "prompt=question"),
    ),
    "question beside answers that begin alike": (
        {"question": Q, "chosen": "It is oak.", "rejected": "It is brick."},
        Want(Q, "It is oak.", "It is brick.", ("--columns prompt=question",)),
    ),
    "distilabel: instruction, chosen, rejected": (
        {"instruction": Q, "chosen": GOOD, "rejected": POOR, "model_name": "m"},
        renamed(TEXT, "prompt=instruction"),
    ),
    "query, chosen, rejected": ({"query": Q, "chosen": GOOD, "rejected": POOR}, renamed(TEXT, "prompt=query")),
    "a question and a system prompt by another name": (
        {"system_prompt": "Be brief.", "question": Q, "chosen": GOOD, "rejected": POOR},
        renamed(WITH_SYSTEM, "prompt=question,system=system_prompt"),
    ),
    "llama-factory, alpaca: instruction, input, chosen, rejected": (
        {"instruction": "Name one.", "input": "A tree.", "chosen": GOOD, "rejected": POOR},
        Want("Name one.\n\nA tree.", GOOD, POOR, (JOINED,)),
    ),
    "llama-factory, alpaca, with nothing as input": (
        {"instruction": Q, "input": "", "chosen": GOOD, "rejected": POOR},
        TEXT._replace(steps=(JOINED,)),
    ),
    "a context and a question": (
        {"context": "Of wood.", "question": Q, "chosen": GOOD, "rejected": POOR},
        Want(f"Of wood.\n\n{Q}", GOOD, POOR, (JOINED,)),
    ),
    "an empty prompt beside the question": (
        {"prompt": "", "question": Q, "chosen": GOOD, "rejected": POOR},
        renamed(TEXT, "prompt=question"),
    ),
    "a context of messages": (
        {"context": [user(Q)], "chosen": GOOD, "rejected": POOR},
        renamed(CHAT, "prompt=context"),
    ),
    "stack exchange, paired: question, response_j, response_k": (
        {"qid": 4, "question": Q, "date": "2020/01/01", "metadata": ["u"], "response_j": GOOD, "response_k": POOR},
        renamed(TEXT, "prompt=question,chosen=response_j,rejected=response_k"),
    ),
    "code preferences: input, accepted, rejected": (
        {"input": Q, "accepted": GOOD, "rejected": POOR, "ID": "1"},
        renamed(TEXT, "prompt=input,chosen=accepted"),
    ),
    "capital letters": (
        {"Prompt": Q, "Chosen": GOOD, "Rejected": POOR},
        renamed(TEXT, "prompt=Prompt,chosen=Chosen,rejected=Rejected"),
    ),
    "names with blanks": (
        {"user prompt": Q, "chosen response": GOOD, "rejected response": POOR},
        renamed(
            TEXT,
            """'{"prompt": "user prompt", "chosen": "chosen response", "rejected": "rejected response"}'""",
        ),
    ),
    "question, chosen_response, rejected_response": (
        {"question": Q, "chosen_response": GOOD, "rejected_response": POOR},
        renamed(TEXT, "prompt=question,chosen=chosen_response,rejected=rejected_response"),
    ),
    "a list of responses with ratings": (
        {"prompt": Q, "completions": [POOR, GOOD], "ratings": [1.0, 4.0]},
        renamed(TEXT, "scores=ratings"),
    ),
    "messages that hold the chosen answer, and whole conversations": (
        {"messages": [user(Q), said(GOOD)], "chosen": [user(Q), said(GOOD)], "rejected": [user(Q), said(POOR)]},
        renamed(CHAT, "messages="),
    ),
    "messages that hold the chosen answer, and answers alone": (
        {"messages": [user(Q), said(GOOD)], "chosen": [said(GOOD)], "rejected": [said(POOR)]},
        CHAT._replace(steps=(JOINED,)),
    ),
    "ShareGPT conversations that hold the chosen answer": (
        {"conversations": [human(Q), gpt(GOOD)], "chosen": gpt(GOOD), "rejected": gpt(POOR)},
        CHAT._replace(steps=(JOINED,)),
    ),
    "a misspelt prompt": ({"promt": Q, "chosen": GOOD, "rejected": POOR}, renamed(TEXT, "prompt=promt")),
}

TWO = {
    "pku-saferlhf: two responses and who is better": (
        {
            "prompt": Q,
            "response_0": POOR,
            "response_1": GOOD,
            "is_response_0_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        ["'response_0' and 'response_1'", "row['better_response_id'] == ..."],
    ),
    "shp: history, two replies and a label": (
        {
            "post_id": "x",
            "history": Q,
            "human_ref_A": GOOD,
            "human_ref_B": POOR,
            "labels": 1,
            "score_A": 9,
            "score_B": 2,
        },
        ["'human_ref_A' and 'human_ref_B'", "row['score_A'] > row['score_B']"],
    ),
    "webgpt: two answers and scores": (
        {"question": {"full_text": Q}, "answer_0": GOOD, "answer_1": POOR, "score_0": 1.0, "score_1": -1.0},
        ["'answer_0' and 'answer_1'", "row['score_0'] > row['score_1']"],
    ),
    "helpsteer 3: context, two responses, a preference": (
        {"domain": "general", "context": [user(Q)], "response1": POOR, "response2": GOOD, "overall_preference": 2},
        ["'response1' and 'response2'", "row['overall_preference'] == ..."],
    ),
    "arena: two conversations and a winner": (
        {
            "question_id": "1",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_a",
            "conversation_a": [user(Q), said(GOOD)],
            "conversation_b": [user(Q), said(POOR)],
            "turn": 1,
        },
        ["'conversation_a' and 'conversation_b'", "row['winner'] == ..."],
    ),
    "multipref: two completions": (
        {"comparison_id": "1", "text": Q, "completion_a": GOOD, "completion_b": POOR, "overall_pref": "A"},
        ["'completion_a' and 'completion_b'", "row['overall_pref'] == ..."],
    ),
    "chatbot comparisons: two outputs": (
        {"instruction": Q, "output_1": GOOD, "output_2": POOR, "preference": 1},
        ["'output_1' and 'output_2'", "row['preference'] == ...", "\"prompt\": row['instruction']"],
    ),
}

REFUSED = {
    "helpsteer 2: one response with grades": {"prompt": Q, "response": GOOD, "helpfulness": 4, "correctness": 4},
    "nectar: answers with ranks": {
        "prompt": Q,
        "answers": [{"answer": GOOD, "model": "m", "rank": 1.0}],
        "num_responses": 1,
    },
    "summaries: an index of the better one": {
        "info": {"post": Q},
        "summaries": [{"text": GOOD}, {"text": POOR}],
        "choice": 0,
        "worker": "w",
    },
    "open assistant: a tree of messages": {
        "message_id": "1",
        "parent_id": "0",
        "text": GOOD,
        "role": "assistant",
        "rank": 0,
    },
    "ultrafeedback: completions with grades inside": {
        "source": "x",
        "instruction": Q,
        "models": ["m"],
        "completions": [{"response": GOOD, "overall_score": 8.0}],
    },
    "rlhf-v: the pair as JSON text": {"ds_name": "x", "text": '{"question": "?", "chosen": "a", "rejected": "b"}'},
}

FLAG = re.compile(r"--columns ('\{.*?\}'|[^\s']*[^\s'.])")


def followed(dataset: Any, message: str, step: str) -> Any:
    """What is left when the way out that a message names is followed to the letter."""
    if step == JOINED:
        code = re.search(r"dataset\.map\(lambda row: \{.*?\}\)", message)
        assert code, message
        return eval(code[0], {"dataset": dataset})
    assert f"{step}" in message, message
    given = FLAG.search(message)
    assert given, message
    assert f"--columns {given[1]}" == step, message
    return rename_columns(dataset, parse_columns(given[1].strip("'")))


def check(row: dict, want: Want) -> None:
    dataset = Dataset.from_list([row])
    for step in want.steps:
        with pytest.raises(ValueError) as error:
            prepare_dataset(dataset, tiny.tokenizer(), OPTIONS)
        with pytest.raises(ValueError):
            stream, _ = prepare_dataset(dataset.to_iterable_dataset(), tiny.tokenizer(), OPTIONS)
            list(stream)
        dataset = followed(dataset, str(error.value), step)
    pair = pair_from_row(dataset[0], "Row 0")
    assert (pair.prompt, pair.chosen, pair.rejected) == want[:3]
    prepare_dataset(dataset, tiny.tokenizer(), OPTIONS)


OPTIONS = DataOptions(max_length=512, disable_tqdm=True)


@pytest.mark.parametrize(("row", "want"), READ.values(), ids=READ)
def test_forms_that_are_read_as_they_are(row, want):
    check(row, want)


@pytest.mark.parametrize(("row", "want"), RENAMED.values(), ids=RENAMED)
def test_forms_that_are_refused_with_what_mends_them(row, want):
    assert want.steps
    check(row, want)


@pytest.mark.parametrize(("row", "words"), TWO.values(), ids=TWO)
def test_two_answers_and_a_label(row, words):
    """Which label means which answer is for the user to say; the rest of the line is there, and works."""
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError) as error:
        prepare_dataset(dataset, tiny.tokenizer(), OPTIONS)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "Is '" not in message
    code = re.search(r"dataset\.map\(.*\)\)\}\)", message)
    assert code, message
    made = eval(code[0].replace(" == ...", " in (1, 'model_a', 'A')"), {"dataset": dataset})
    assert {*map(str, (made[0]["chosen"], made[0]["rejected"]))} == {
        str(row[words[0].split("'")[1]]),
        str(row[words[0].split("'")[3]]),
    }


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_forms_that_need_work_are_refused_with_what_a_row_needs(row):
    with pytest.raises(ValueError) as error:
        prepare_dataset(Dataset.from_list([row]), tiny.tokenizer(), OPTIONS)
    message = str(error.value)
    assert "A row needs 'chosen' and 'rejected'" in message or "Give a list" in message or "scores" in message
    for name in re.findall(r"Is '(\w+)' meant|Are '(\w+)'", message):
        raise AssertionError(f"{name}: {message}")


def test_pictures_beside_a_question():
    """The form of RLAIF-V; that the model must see is another matter (tests/vision)."""
    row = {"image": None, "question": Q, "chosen": GOOD, "rejected": POOR, "origin_dataset": "x", "idx": 0}
    check(row, renamed(TEXT, "prompt=question"))


@pytest.mark.parametrize(
    ("columns", "kinds", "refused"),
    [
        (["prompt", "completions", "source"], {"source": "text"}, True),
        (["prompt", "rejected", "choice"], {"choice": "number"}, True),
        (["promt", "chosen", "rejected"], {"promt": "number"}, False),  # no prompt at all, then
    ],
)
def test_no_advice_names_a_column_of_another_type(columns, kinds, refused):
    with pytest.raises(ValueError, match=r"meant\?"):  # where nothing is known of types, it may be
        check_columns(columns, "train")
    with pytest.raises(ValueError, match=r"^((?!meant).)*$") if refused else contextlib.nullcontext():
        check_columns(columns, "train", kinds)


def test_the_kind_of_a_column_is_the_same_by_its_type_and_by_its_values():
    row = {
        "text": "a",
        "number": 1.5,
        "flag": True,
        "texts": ["a"],
        "turns": [["a", "b"]],
        "numbers": [1],
        "message": user("a"),
        "messages": [user("a")],
        "conversations": [[user("a")], [user("b")]],
        "object": {"a": 1},
        "objects": [{"a": 1}],
        "nothing": None,
    }
    want = {
        "text": "text",
        "number": "number",
        "flag": "number",
        "texts": "texts",
        "turns": "texts",
        "numbers": "numbers",
        "message": "messages",
        "messages": "messages",
        "conversations": "conversations",
        "object": "object",
        "objects": "objects",
        "nothing": "unknown",
    }
    assert kinds_of_values(row) == want
    assert kinds_of_features(Dataset.from_list([row]).features) == want
    assert kinds_of_features(Features({"a": Json(), "b": List(Value("large_string"))})) == {
        "a": "unknown",
        "b": "texts",
    }


def test_columns_that_are_named_to_be_left_out_are_not_asked_for_again():
    rows = Dataset.from_list([{"question": Q, "chosen": "It is oak.", "rejected": "It is brick."}])
    pair = pair_from_row(rename_columns(rows, parse_columns("question="))[0], "Row 0")
    assert (pair.prompt, pair.chosen) == ("It is", " oak.")


def test_a_later_row_without_its_question_is_found():
    """Where most rows have a prompt, one without is still looked at."""
    rows = [{"prompt": Q, "context": "", "chosen": GOOD, "rejected": POOR}] * 3
    rows.append({"prompt": " ", "context": "Of wood.", "chosen": GOOD, "rejected": POOR})
    with pytest.raises(ValueError, match=r"Row 3 of train has an empty prompt, and 'context'"):
        prepare_dataset(Dataset.from_list(rows), tiny.tokenizer(), OPTIONS)


def test_text_beside_a_prompt_is_named(caplog):
    row = {
        "prompt": Q,
        "context": "Of wood.",
        "system_prompt": "Be brief.",
        "history_id": "a",
        "chosen": GOOD,
        "rejected": POOR,
    }
    for dataset in (Dataset.from_list([row]), Dataset.from_list([row]).to_iterable_dataset()):
        caplog.clear()
        prepare_dataset(dataset, tiny.tokenizer(), OPTIONS)
        (line,) = [record.message for record in caplog.records if "beside its prompt" in record.message]
        assert "not read: context, system_prompt." in line


def test_a_stream_that_knows_no_columns_is_refused_alike():
    row = {"question": Q, "chosen": GOOD, "rejected": POOR}
    stream = IterableDataset.from_generator(lambda: iter([row]))
    prepared, _ = prepare_dataset(stream, tiny.tokenizer(), OPTIONS)
    with pytest.raises(ValueError, match=r"--columns prompt=question"):
        list(prepared)


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_rows_that_are_templated_already(kind, caplog):
    row = {"prompt": f"<|user|>{Q}<|end|><|assistant|>", "chosen": f"{GOOD}<|end|>", "rejected": f"{POOR}<|end|>"}
    dataset = Dataset.from_list([row, {"prompt": Q, "chosen": GOOD, "rejected": POOR}, row])
    for allow, warned in ((False, True), (True, False)):
        caplog.clear()
        options = DataOptions(max_length=512, disable_tqdm=True, allow_special_tokens_in_text=allow)
        rows = dataset if kind == "table" else dataset.to_iterable_dataset()
        prepared, report = prepare_dataset(rows, tiny.tokenizer(), options)
        list(prepared)
        assert ("2 of 3 rows hold the text of control tokens" in caplog.text) == warned
        assert ("--allow_special_tokens_in_text" in report.table()) == warned
