"""The date that a chat template writes: one date for all rows, whenever they are tokenized.

Templates ask for the time by `strftime_now(format)`, which transformers answers with the clock. Tokens would change with
the day, so that a run were another one after midnight. Here the template itself gets a macro of that name, written in
front of it, which formats a date that was decided before. (An argument of the name would not do: transformers hands a
template nothing that can be called.) The template is all that changes, in a copy of the tokenizer, so every fingerprint
of it knows the date, and nothing that others share is touched.
"""

from __future__ import annotations

import copy
import re
from datetime import datetime
from typing import Any

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")
MACRO = "{% macro strftime_now(format) %}"
PERCENT = "\ue000"
"""Stands for %% while directives are replaced."""


def checked_date(date: Any) -> str | None:
    """A date as YYYY-MM-DD, or None where it is not one."""
    try:
        return date if datetime.strptime(date, "%Y-%m-%d").strftime("%Y-%m-%d") == date else None
    except (TypeError, ValueError):
        return None


def writes_date(tokenizer: Any) -> bool:
    """Whether its chat template (one of them, where there are several) asks for the time."""
    return any(map(_asks, _templates(tokenizer).values()))


def dated(tokenizer: Any, date: str | None) -> Any:
    """The tokenizer, or a copy of it whose chat template writes `date` (YYYY-MM-DD, its first second) for the time."""
    if date is None or not writes_date(tokenizer):
        return tokenizer
    templates = {name: _dated(template, date) for name, template in _templates(tokenizer).items()}
    twin = copy.copy(tokenizer)
    twin.chat_template = templates if isinstance(tokenizer.chat_template, dict) else templates["default"]
    return twin


def _asks(template: str) -> bool:
    return "strftime_now" in COMMENT.sub("", template)


def _templates(tokenizer: Any) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    return dict(template) if isinstance(template, dict) else {"default": template} if template else {}


def _dated(template: str, date: str) -> str:
    if template.startswith(MACRO) or not _asks(template):
        return template
    moment = datetime.strptime(date, "%Y-%m-%d")
    filters = [("%%", PERCENT)]
    # All that look like one, also where it is no format: what a format may hold stands in the template.
    for directive in sorted(set(DIRECTIVE.findall(template)), key=len, reverse=True):
        filters.append((directive, moment.strftime(directive)))
    filters.append((PERCENT, "%"))
    replaced = "".join(f"|replace({_quoted(old)}, {_quoted(new)})" for old, new in filters)
    # The line break goes: the environment trims one behind a block. The template begins at the beginning of a line, as ever.
    return f"{MACRO}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
