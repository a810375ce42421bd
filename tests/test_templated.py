"""What a chat template makes of a row: the answer as the model would write it, all that the row says, or a refusal.

The templates here have the form of real ones, each with one habit; tests/templates holds the real ones.
"""

from __future__ import annotations

import json

import pytest
from test_render import assistant, scored, talk, tokenize, tool, turn, user
from tiny_tokenizers import CHAT, byte_bpe

from dpo_trainer.data.rows.schema import pair_from_row
from dpo_trainer.types import Flag

GENERATION = "{% if add_generation_prompt %}<|assistant|>"
WITH_CALLS = CHAT.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}",
)


def texts(template, *pairs):
    """(prompt, chosen, flags) of each row."""
    tokenizer = byte_bpe(chat_template=template)
    rows = tokenize(tokenizer, *pairs)
    return [(tokenizer.decode(ids.prompt), tokenizer.decode(ids.chosen), ids.flags) for ids in rows]


def refusal(template, pair):
    with pytest.raises(ValueError, match="Row 0 of train") as error:
        tokenize(byte_bpe(chat_template=template), pair)
    return str(error.value)


def calling(arguments, content="", **more):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return assistant(content, tool_calls=[call], **more)


# --- where the answer begins ---


def test_an_empty_block_of_reasoning_is_put_before_the_answer():
    """The generation prompt closes what it opens, so the model goes on with the answer."""
    template = CHAT.replace(GENERATION, GENERATION + "<think></think>")
    assert texts(template, talk([assistant("ab")])) == [("<|user|>q<eos><|assistant|><think></think>", "ab<eos>", 0)]


def test_an_answer_without_reasoning_is_not_put_behind_an_opened_thought():
    template = CHAT.replace(GENERATION, GENERATION + "<think>")
    assert texts(template, talk([assistant("ab")])) == [
        ("<|user|>q<eos><|assistant|>", "ab<eos>", Flag.GENERATION_DIFFERS)
    ]


def test_an_answer_that_closes_the_thought_follows_the_opened_one():
    template = CHAT.replace(GENERATION, GENERATION + "<think>")
    row = talk([assistant("a</think>b")], [assistant("c</think>d")])
    assert texts(template, row) == [("<|user|>q<eos><|assistant|><think>", "a</think>b<eos>", 0)]


def test_both_answers_decide_where_the_prompt_ends():
    """One could follow the opened thought and the other could not: they need one prompt."""
    template = CHAT.replace(GENERATION, GENERATION + "<think>")
    ((prompt, chosen, flags),) = texts(template, talk([assistant("a</think>b")], [assistant("d")]))
    assert (prompt, chosen, flags) == ("<|user|>q<eos><|assistant|>", "a</think>b<eos>", Flag.GENERATION_DIFFERS)


def test_an_answer_behind_a_thought_that_the_finished_turn_opens_too_is_refused():
    template = CHAT.replace(GENERATION, GENERATION + "<think>").replace(
        "{{ m.content }}", "{{ '<think>' if m.role == 'assistant' }}{{ m.content }}"
    )
    said = refusal(template, talk([assistant("ab")]))
    assert "does not close the reasoning" in said
    assert "(<think>)" in said
    assert "chat_template_kwargs" in said
    ((_, chosen, flags),) = texts(template, talk([assistant("a</think>b")], [assistant("c</think>d")]))
    assert (chosen, flags) == ("a</think>b<eos>", 0)


SYSTEM_LAST = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
    "{% if m.role == 'user' %}<|user|>{{ messages[0].content + '/' if loop.last and messages[0].role == 'system' }}"
    "{{ m.content }}<|assistant|>{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
"""The system text stands in the last question, until it is answered."""


def test_a_prompt_that_is_written_anew_once_it_is_answered():
    prompt = [turn("system", "s"), user("q"), assistant("x"), user("q")]
    row = talk([assistant("ab")], prompt=prompt)
    assert texts(SYSTEM_LAST, row) == [("<|user|>q<|assistant|>x<eos><|user|>s/q<|assistant|>", "ab<eos>", 0)]


def test_words_of_the_prompt_are_never_scored():
    """The last question is written otherwise once it is answered, so where the answer begins is not known."""
    template = CHAT.replace("{{ m.content }}", "{{ m.content | upper if loop.last else m.content }}")
    assert "words of the prompt would be scored" in refusal(
        template, talk([assistant("AB")], [assistant("CD")], prompt=[user("Q q")])
    )


def test_a_generation_prompt_behind_every_conversation_is_not_scored():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}<|assistant|>"  # asked for or not
    )
    tokenizer = byte_bpe(chat_template=template)
    one, several = tokenize(tokenizer, talk([assistant("ab")]), talk([assistant("ab"), tool("42"), assistant("abc")]))
    assert tokenizer.decode(one.prompt) == "<|user|>q<eos><|assistant|>"
    assert scored(tokenizer, one) == ["ab<eos>"]
    assert scored(tokenizer, several) == ["ab<eos>", "abc<eos>"]


def test_an_end_that_is_written_behind_the_last_turn_alone_stays():
    """As Phi-3 does: no generation prompt, though it is gone once another turn follows."""
    template = CHAT.replace("{% if add", "{% if not add_generation_prompt %}<bos>{% endif %}{% if add")
    assert texts(template, talk([assistant("ab")]))[0][1] == "ab<eos><bos>"


def test_markers_that_begin_in_the_generation_prompt():
    """Of a later turn, too, the generation prompt is not the model's."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|assistant|>{{ m.content }}<eos>{% endgeneration %}"
        "{% else %}<|{{ m.role }}|>{{ m.content }}<eos>{% endif %}{% endfor %}" + GENERATION + "{% endif %}"
    )
    tokenizer = byte_bpe(chat_template=template)
    (ids,) = tokenize(tokenizer, talk([assistant("ab"), tool("42"), assistant("abc")]))
    assert scored(tokenizer, ids) == ["ab<eos>", "abc<eos>"]
    assert ids.flags == 0


def test_answers_without_an_end_are_counted():
    ((_, chosen, flags),) = texts(CHAT.replace("<eos>", ""), talk([assistant("ab")]))
    assert (chosen, flags) == ("ab", Flag.NO_END_OF_TURN)


# --- what the template leaves out ---


@pytest.mark.parametrize(
    ("completion", "field"),
    [
        ([calling({"city": "Oslo"}), tool("5"), assistant("Oslo look")], "tool_calls"),
        ([calling({"city": "Oslo"}, "I look up Oslo.")], "tool_calls"),
        ([assistant("look", reasoning_content="a look")], "reasoning_content"),
        ([assistant("ab", thinking="so")], "thinking"),
    ],
    ids=[
        "before a result",
        "beside words that hold the same",
        "reasoning beside words that hold the same",
        "thinking",
    ],
)
def test_what_an_answer_holds_besides_words_is_not_lost(completion, field):
    said = refusal(CHAT, talk(completion))
    assert f"column 'chosen': has {field} of the role 'assistant', which the chat template does not write" in said


def test_a_call_in_the_prompt_is_not_lost():
    prompt = [user("q"), calling({"city": "Oslo"}), tool("5 C")]
    assert "column 'prompt': has tool_calls" in refusal(CHAT, talk([assistant("ab")], prompt=prompt))
    ((text, _, flags),) = texts(WITH_CALLS, talk([assistant("ab")], prompt=prompt))
    assert '[look({"city": "Oslo"})]' in text
    assert flags == 0


def test_tools_are_not_lost():
    tools = [{"type": "function", "function": {"name": "q", "parameters": {}}}]  # a name that the question holds
    assert "column 'tools': are not written by the chat template" in refusal(
        CHAT, talk([assistant("ab")], tools=tools)
    )
    assert texts("{{ tools | tojson if tools }}" + CHAT, talk([assistant("ab")], tools=tools))[0][2] == 0


def test_earlier_reasoning_that_a_template_leaves_out_is_counted():
    """Most reasoning models are given their earlier answers without it, in training as later."""
    template = CHAT.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    for earlier in (assistant("so<think></think>ab"), assistant("ab", reasoning_content="so")):
        ((prompt, _, flags),) = texts(template, talk([assistant("c")], prompt=[user("q"), earlier, user("r")]))
        assert prompt == "<|user|>q<eos><|assistant|>ab<eos><|user|>r<eos><|assistant|>"
        assert (
            flags & ~Flag.CONTROL_TEXT == Flag.REASONING_LEFT_OUT
        )  # <think> is a control token of the tokenizer here


def test_a_role_that_a_template_skips():
    template = CHAT.replace("in messages", "in messages if m.role in ('user', 'assistant', 'system', 'tool')")
    said = refusal(template, talk([assistant("ab")], prompt=[turn("critic", "mind the gap"), user("q")]))
    assert "column 'prompt': has words of the role 'critic'" in said


def test_developer_is_the_system_turn_where_the_template_does_not_know_it():
    prompt = [turn("developer", "be short"), user("q")]
    assert texts(CHAT, talk([assistant("ab")], prompt=prompt))[0][::2] == (
        "<|system|>be short<eos><|user|>q<eos><|assistant|>",
        Flag.ROLES_RENAMED,
    )
    knows = "{# developer #}" + CHAT
    assert texts(knows, talk([assistant("ab")], prompt=prompt))[0][0].startswith("<|developer|>be short")


def test_renamed_roles_are_counted():
    row = {
        "prompt": [{"role": "human", "content": "q"}],
        "chosen": [{"role": "gpt", "content": "ab"}],
        "rejected": [{"role": "gpt", "content": "c"}],
    }
    ((prompt, chosen, flags),) = texts(CHAT, pair_from_row(row, "Row 0 of train"))
    assert (prompt, chosen) == ("<|user|>q<eos><|assistant|>", "ab<eos>")
    assert flags == Flag.ROLES_RENAMED


def test_white_space_and_escapes_lose_nothing():
    """A template may strip a content, or write it as JSON."""
    template = CHAT.replace(
        "{{ m.content }}", "{{ m.content | trim | tojson if m.role == 'tool' else m.content | trim }}"
    )
    prompt = [user("  a\n\nb  "), assistant("c"), tool('{"x": "é",\n "y": 2}'), user("\tq\n")]
    assert texts(template, talk([assistant(" ab\n")], prompt=prompt))[0][2] == 0


def test_a_template_that_reads_a_content_in_parts():
    template = CHAT.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert texts(template, talk([assistant("ab")])) == [("<|user|>q<eos><|assistant|>", "ab<eos>", 0)]


# --- the forms of a tool call ---

ARGUMENTS = {"city": "Oslo", "note": 'a "b"'}
AS_JSON = WITH_CALLS
ITEMS = WITH_CALLS.replace(
    "{{ c.function.arguments | tojson }}",
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
)
CONCATENATED = WITH_CALLS.replace("{{ c.function.arguments | tojson }}", "{{ 'json ' + c.function.arguments }}")
PRINTED = WITH_CALLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")


@pytest.mark.parametrize("given", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "JSON text"])
@pytest.mark.parametrize(
    ("template", "written"),
    [
        (AS_JSON, 'look({"city": "Oslo", "note": "a \\"b\\""})'),
        (ITEMS, 'look(city=Oslo;note=a "b";)'),
        (CONCATENATED, 'look(json {"city": "Oslo", "note": "a \\"b\\""})'),
        (PRINTED, 'look({"city": "Oslo", "note": "a \\"b\\""})'),
    ],
    ids=["tojson", "items", "concatenated", "printed"],
)
def test_arguments_come_in_the_form_that_the_template_takes(template, written, given):
    assert texts(template, talk([calling(given)]))[0][1] == f"[{written}]<eos>"


def test_a_call_without_content():
    """OpenAI's API has `content: null` beside calls, and transformers removes the key."""
    strict = WITH_CALLS.replace("{{ m.content }}", "{{ m.content + '' }}")
    without = {name: value for name, value in calling(ARGUMENTS).items() if name != "content"}
    assert texts(strict, talk([without]))[0][1].startswith("[look(")
    absent = WITH_CALLS.replace("{{ m.content }}", "{% if 'content' in m %}{{ m.content }}|{% endif %}")
    assert texts(absent, talk([without]))[0][1].startswith("[look("), "what works without a content is given none"


def test_a_template_that_takes_no_form_says_that_all_were_tried():
    template = WITH_CALLS.replace(
        "{% for c in", "{% if m.tool_calls %}{{ raise_exception('no calls') }}{% endif %}{% for c in"
    )
    said = refusal(template, talk([calling(ARGUMENTS)]))
    assert "no calls" in said
    assert "arguments as objects and as JSON text" in said
