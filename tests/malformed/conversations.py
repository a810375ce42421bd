"""Chat messages with wrong roles, wrong content, wrong options, and templates that do not go with them."""

from __future__ import annotations

from tiny_tokenizers import CHAT, byte_bpe

from .case import (
    ASKED,
    ASSISTANT,
    EOS,
    NO,
    SHAREGPT,
    SO,
    SYSTEM,
    TALK,
    TEXT,
    USER,
    Control,
    assistant,
    becomes,
    drops,
    gives,
    gpt,
    human,
    lines,
    refused,
    refused_row,
    second,
    tokenizer,
    user,
)

A_NAME = "Give a name of letters and digits, such as user or assistant"
ROLE_AND_CONTENT = "A message needs role and content"
LONG = "x" * 2_000_000


def says(role, content="x"):
    return {"role": role, "content": content}


def prompt(*messages):
    return second(TALK, prompt=list(messages))


def chosen(*messages):
    return second(TALK, chosen=list(messages))


ROLES = {
    "None": refused_row(prompt(says(None)), r"'prompt\[0\]': has no role", ROLE_AND_CONTENT),
    "missing": refused_row(prompt({"content": "x"}), r"has no role \(it has: content\)", ROLE_AND_CONTENT),
    "a number": refused_row(prompt(says(7)), "has the role 7", A_NAME),
    "a list": refused_row(prompt(says(["user"])), r"has the role \['user'\]", A_NAME),
    "empty": refused_row(prompt(says("")), "has the role ''", A_NAME),
    "with a space": refused_row(prompt(says("us er")), "has the role 'us er'", A_NAME),
    "with a line break": refused_row(prompt(says("user\n")), r"has the role 'user\\n'", A_NAME),
    "that ends a marker": refused_row(prompt(says("user|>")), r"has the role 'user\|>'", A_NAME),
    "a whole marker": refused_row(prompt(says("<|assistant|>")), "'<.assistant.>'", A_NAME),
    "with a null byte": refused_row(prompt(says("user\0")), r"has the role 'user\\x00'", A_NAME),
    "with a direction override": refused_row(prompt(says("user\u202e")), r"'user\\u202e'", A_NAME),
    "of 2 MB": refused_row(prompt(says("|" + LONG)), "has the role '", A_NAME),
    "misspelt": refused_row(
        prompt(user("q"), says("assistent"), user("r")),
        "assistent",
        "Did you mean 'assistant'",
    ),
    "that only the template knows": becomes(
        prompt(says("critic", "Hm.")), gives(["<|critic|>Hm.", EOS, ASSISTANT], SO, NO)
    ),
    "of a user in a completion": refused_row(
        chosen(user("x")), "'chosen': starts with a 'user' turn", "Move the turns before it to 'prompt'"
    ),
    "of a tool at the end of a completion": refused_row(
        chosen(assistant("x"), says("tool")), "'chosen': ends with a 'tool' turn", "End it with what"
    ),
    "of an assistant at the end of the prompt": becomes(
        prompt(user("Why?"), assistant("Be")), gives([*ASKED, "Be"], SO, NO)
    ),
    "ShareGPT, unknown": refused_row(
        second(SHAREGPT, conversations=[{"from": "bot", "value": "x"}]),
        r"'conversations\[0\]': is from 'bot'",
        "Known: human, user, gpt",
    ),
    "ShareGPT, capital": refused_row(
        second(SHAREGPT, chosen={"from": "GPT", "value": "x"}), "'chosen': is from 'GPT'", "Known: human"
    ),
    "ShareGPT, a number": refused_row(
        second(SHAREGPT, conversations=[{"from": 7, "value": "x"}]), "is from 7", "Known: human"
    ),
    "ShareGPT, None": refused_row(
        second(SHAREGPT, conversations=[{"from": None, "value": "x"}]), "has no role", ROLE_AND_CONTENT
    ),
    "ShareGPT, of 2 MB": refused_row(
        second(SHAREGPT, conversations=[{"from": LONG, "value": "x"}]),
        "is from 'xxx",
        "Known: human",
    ),
    "ShareGPT, human in a completion": refused_row(
        second(SHAREGPT, rejected=human("x")), "'rejected': starts with a 'user' turn", "Move the turns"
    ),
}

CALLS = "data/rows/messages.py: passed on unseen, and most templates then write nothing of it"
ONLY_TEXT = "Only parts of type 'text'"

MESSAGES = {
    "no list but one message": becomes(second(TALK, chosen=assistant("x")), gives(ASKED, ["x", EOS], NO)),
    "None among messages": refused_row(prompt(user("x"), None), r"'prompt\[1\]': is of type NoneType", "Give"),
    "a number among messages": refused_row(prompt(user("x"), 7), r"'prompt\[1\]': is of type int", "Give"),
    "a string among messages": refused_row(prompt(user("x"), "y"), "'prompt", "Give|Only"),
    "an empty message": refused_row(prompt({}), "has no role .it has: nothing", ROLE_AND_CONTENT),
    "no messages in a prompt": refused_row(prompt(), "'prompt': is an empty list", "Give at least one message"),
    "no messages in a completion": refused_row(chosen(), "'chosen': is an empty list", "Give at least one"),
    "content None": refused_row(prompt(user(None)), "has no content", ROLE_AND_CONTENT),
    "content missing": refused_row(chosen({"role": "assistant"}), r"'chosen\[0\]': has no content", ROLE_AND_CONTENT),
    "content a number": refused_row(chosen(assistant(7)), "content of type int", "Give the content as one string"),
    "content a bool": refused_row(prompt(user(True)), "content of type bool", "Give the content as one string"),
    "content an object": refused_row(prompt(user({"text": "x"})), "content of type dict", "Give the content as"),
    "content an image": refused_row(
        prompt(user([{"type": "image", "url": "x"}])), "image part that holds 'url' itself", 'a column "images"'
    ),
    "content an image beside text": refused_row(
        prompt(user([{"type": "text", "text": "x"}, {"type": "image_url"}])), "'image_url'", ONLY_TEXT
    ),
    "content a list of strings": refused_row(prompt(user(["x"])), "content part of type 'str'", ONLY_TEXT),
    "content a text part without text": refused_row(
        prompt(user([{"type": "text"}])),
        "text part.*(without|no|lacks) .?text",
        "Give|Only",
    ),
    "content text parts": becomes(
        prompt(user([{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}])), gives(ASKED, SO, NO)
    ),
    "content an empty list": becomes(prompt(user([])), gives([USER, EOS, ASSISTANT], SO, NO)),
    "content of the chosen one an empty list": becomes(chosen(assistant([])), drops("empty_completion")),
    "content of the chosen one blank": becomes(chosen(assistant(" \n")), drops("empty_completion")),
    "ShareGPT value None": refused_row(
        second(SHAREGPT, chosen=gpt(None)), "'chosen': has no content", "from and value"
    ),
    "ShareGPT value a number": refused_row(second(SHAREGPT, chosen=gpt(7)), "content of type int", "one string"),
    "ShareGPT no turns": refused_row(second(SHAREGPT, conversations=[]), "'conversations': is an empty list", "Give"),
    "ShareGPT function_call that is no JSON": refused_row(
        second(SHAREGPT, conversations=[human("x"), {"from": "function_call", "value": "{"}]),
        "function_call that is not JSON",
        "Mend it",
    ),
    "ShareGPT function_call without a name": refused_row(
        second(SHAREGPT, conversations=[human("x"), {"from": "function_call", "value": "{}"}]),
        "without a name",
        'Give .*"name"',
    ),
    "tool_calls a string": refused_row(
        prompt(user("x"), {"role": "assistant", "tool_calls": "f()"}, user("y")),
        r"'prompt\[1\]': .*tool_calls",
        "Give",
    ),
    "tool_calls of numbers": refused_row(
        prompt(user("x"), {"role": "assistant", "content": "", "tool_calls": [7]}, user("y")),
        r"'prompt\[1\]': .*tool_calls",
        "Give",
    ),
    "mixed spellings": becomes(second(SHAREGPT, chosen=[assistant("x")]), gives(ASKED, ["x", EOS], NO)),
    "role and value": refused_row(
        prompt({"role": "user", "value": "x"}), "has no content .it has: role, value", ROLE_AND_CONTENT
    ),
    "a string beside messages is a turn": becomes(
        second(TALK, prompt="Hm?"), gives([USER, "Hm?", EOS, ASSISTANT], SO, NO)
    ),
    "control characters in a key": refused_row(
        prompt({"\x1b[31m": 1}),
        r"it has: .*31m",
        ROLE_AND_CONTENT,
    ),
    "a key of 2 MB": refused_row(prompt({LONG: 1}), "it has: .?xxx", ROLE_AND_CONTENT),
    "completions that repeat the prompt": refused_row(
        chosen(user("Why?"), assistant("x")), "starts with a 'user' turn", "remove the column 'prompt'"
    ),
    "nothing shared": refused(
        lines({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}),
        "share no first turn",
        "Give the shared turns in a column 'prompt'",
        at="Row 0",
    ),
}

WRITES_TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}<eos>{% endif %}" + CHAT
TOOLS = TALK | {"tools": [{"type": "function"}]}
KWARGS = TALK | {"chat_template_kwargs": {"thinking": False}}
JSON_OF = "Give a .*, its JSON, or None"


def tools(value):
    return second(TOOLS, tools=value)


def kwargs(value):
    return second(KWARGS, chat_template_kwargs=value)


def sets(name, value):
    return refused_row(
        kwargs({name: value}), f"'chat_template_kwargs': sets {name}, which is set for you", "Remove it"
    )


OPTIONS = {
    "tools broken JSON": refused_row(tools("[{"), "'tools': is not JSON", "Mend it, or give None"),
    "tools an object": refused_row(tools({"a": 1}), "'tools': is of type dict", JSON_OF),
    "tools a number": refused_row(tools(7), "'tools': is of type int", JSON_OF),
    "tools JSON of a string": refused_row(tools('"x"'), "'tools': is of type str", JSON_OF),
    "tools of strings": refused_row(tools(["f"]), "'tools': holds something else than JSON objects", "Describe"),
    "tools of None": refused_row(tools([None]), "'tools': holds something else", "Describe each tool"),
    "tools in text": refused_row(second(TEXT, tools=[{"a": 1}]), "'tools': is for conversations", "Give messages"),
    "tools with half a surrogate pair in their JSON": refused_row(
        tools('[{"name": "\\ud800"}]'),
        "'tools'.*(surrogate|half of a character)",
        "Write|Mend",
        tokenizer=tokenizer(WRITES_TOOLS),
    ),
    "tools empty": becomes(tools([]), gives(ASKED, SO, NO), tokenizer=tokenizer(WRITES_TOOLS)),
    "tools as JSON": becomes(
        tools('[{"a": 1}]'), gives([SYSTEM, '[{"a": 1}]', EOS, *ASKED], SO, NO), tokenizer=tokenizer(WRITES_TOOLS)
    ),
    "kwargs broken JSON": refused_row(kwargs("{"), "'chat_template_kwargs': is not JSON", "Mend it, or give"),
    "kwargs a list": refused_row(kwargs([1]), "'chat_template_kwargs': is of type list", JSON_OF),
    "kwargs of ours": sets("add_generation_prompt", True),
    "kwargs tokenize": sets("tokenize", True),
    "kwargs chat_template": sets("chat_template", "{{ messages[0].content }}"),
    "kwargs messages": sets("messages", []),
    "kwargs truncation": sets("truncation", True),
    "kwargs max_length": sets("max_length", 3),
    "kwargs padding": sets("padding", "max_length"),
    "kwargs return_tensors": sets("return_tensors", "pt"),
    "kwargs sanitize_control_tokens": sets("sanitize_control_tokens", False),
    "kwargs tokenizer_kwargs": sets("tokenizer_kwargs", {"truncation": True}),
    "kwargs eos_token": sets("eos_token", ""),
    "kwargs the template does not read": becomes(kwargs({"class": 1, "": 2, "a b": 3}), gives(ASKED, SO, NO)),
    "system a number": refused_row(
        second(TALK | {"system": "x"}, system=7), "'system': is of type int", "Give a string"
    ),
    "system a list": refused_row(second(TALK | {"system": "x"}, system=["x"]), "'system': is of type list", "Give"),
    "system twice": refused_row(
        second(TALK | {"system": "x"}, prompt=[says("system"), user("q")]), "a system turn already", "Keep one"
    ),
    "system without a prompt": refused(
        lines({"system": "x", "chosen": "a b", "rejected": "a c"}),
        "'system': needs a prompt",
        "Give the prompt",
        at="Row 0",
    ),
    "system None": becomes(second(TALK | {"system": "x"}, system=None), gives(ASKED, SO, NO)),
}

TEMPLATE = "Change their roles or order, or the template"
TURNS_OF_OTHERS = lines(TALK | {"chosen": [assistant("x"), says("tool", "t"), assistant("y")]})
LAST_ONLY = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}<eos>{% endif %}{% endfor %}"


def with_template(template, wrong, remedy=TEMPLATE, *, make=None, **how):
    return refused(make or lines(TALK), wrong, remedy, at="Row 0", tokenizer=tokenizer(template), **how)


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}

TEMPLATES = {
    "none": with_template(None, "no chat template", "Set tokenizer.chat_template"),
    "that raises": with_template(
        "{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"
    ),
    "of wrong syntax": with_template("{% for m in %}", "refuses these messages: Expected an expression"),
    "that reads what is not there": with_template("{{ a.b.c }}", "'a' is undefined"),
    "that divides by zero": with_template("{{ 1 / 0 }}", "division by zero"),
    "that breaks out": with_template("{{ messages.__class__.__mro__ }}", "unsafe"),
    "that never ends": with_template("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "that calls itself": with_template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "that repeats a 2 MB message in its error": with_template(
        "{{ raise_exception(messages[0].content) }}",
        "refuses these messages: xxx",
        make=lines(TALK | {"prompt": [user(LONG)]}),
    ),
    "that repeats control characters in its error": with_template(
        "{{ raise_exception(messages[0].content) }}",
        "refuses these messages: .*31m",
        make=lines(TALK | {"prompt": [user("\x1b[31m")]}),
    ),
    "that writes nothing": with_template(
        " ", "'prompt': has words of the role 'user' that the chat template does not write", "a template that writes"
    ),
    "that leaves the assistant out": with_template(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "'chosen': has words of the role 'assistant' that the chat template does not write",
        "Use a template that",
    ),
    "that writes nothing of a tool call": with_template(
        CHAT,
        "'chosen': has tool_calls of the role 'assistant', which the chat template does not write",
        "Use a template that writes",
        make=lines(TALK | {"chosen": [CALL]}),
    ),
    "that writes only the last turn": with_template(
        "{{ messages[-1].content }}",
        "prompt",
        "template",
    ),
    "that rewrites earlier turns": with_template(
        LAST_ONLY, "rewrites earlier turns", "Use a template with {% generation %} markers", make=TURNS_OF_OTHERS
    ),
    "for rewrites earlier turns": becomes(
        # x, EOS | <|tool|>t, EOS, ASSISTANT: 8 + 1 characters and two control tokens, not scored | y, EOS
        TURNS_OF_OTHERS,
        gives(ASKED, ["x", EOS, "<|tool|>t", EOS, ASSISTANT, "y", EOS], NO, unscored=[[0, 2, 13]]),
        rows=1,
    ),
    "without a generation prompt": becomes(
        lines(TALK),
        gives(ASKED[:-1], [Control("<|assistant|>"), *SO], [ASSISTANT, *NO]),
        rows=1,
        tokenizer=tokenizer("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"),
    ),
    "and a tokenizer without EOS": refused(
        lines(TEXT), "no EOS token", "tokenizer.eos_token = ", tokenizer=tokenizer(eos_token=None), names_file=False
    ),
    "and a tokenizer without BOS": refused(
        lines(TEXT | {"prompt": ""}),
        "no token of its own",
        "Give a prompt, or set tokenizer.bos_token",
        at="Row 0",
        tokenizer=byte_bpe(bos_token=None),
    ),
    "and no tokenizer": refused(lines(TEXT), "holds text, and there is no tokenizer", "pass one", tokenizer=None),
}
