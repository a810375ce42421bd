"""What only shows in the texts themselves: control tokens inside them, completions without an end, habits of templates.

Each check looks at one row after another (`see`) and keeps counts and first row numbers (`found`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..data.report import KEPT
from ..data.tokens.render import control_tokens, strings_of
from ..types import Flag
from .rows import Row
from .similar import FIRST

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def control_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that steer the model: those that the tokenizer calls special."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


@dataclass(kw_only=True)
class Count:
    """How many rows, and which come first."""

    rows: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        self.rows += 1
        if len(self.first) < FIRST:
            self.first.append(row)


class ControlText:
    """Texts of the tokenizer's special tokens inside the strings of rows, by token. Rows of token ids have no text."""

    def __init__(self, tokenizer: Any):
        self.pattern = control_tokens(tokenizer)
        self.found: dict[str, Count] = {}

    def see(self, row: Row) -> None:
        if row.pair is None:
            return
        tokens = {token for text in strings_of(row.pair) for token in self.pattern.findall(text)}
        for token in sorted(tokens):
            self.found.setdefault(token, Count()).add(row.number)


@dataclass(kw_only=True)
class EndingCounts:
    """Over all completions of all rows, before any limit."""

    completions: int = 0
    without_eos: int = 0
    rows: Count = field(default_factory=Count)  # with a completion that has no EOS at its end
    ends_in: Counter[str] = field(default_factory=Counter)  # instead of EOS: a control token, or "text"


class Endings:
    """Whether completions end in EOS; white space after it counts as nothing.

    Only an EOS in the data teaches a model to stop. Plain strings get theirs from the tokenization, conversations from
    the chat template, whose last token of a turn may be another than the tokenizer's EOS. Rows of which a completion is empty
    are dropped, and not looked at.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        self.control = control_ids(tokenizer)
        self._blank: dict[int, bool] = {}
        self.found = EndingCounts()

    def see(self, row: Row) -> None:
        if row.ids.flags & Flag.EMPTY_COMPLETION:
            return
        lasts = [self._last_token(completion) for completion in row.ids.completions]
        other = [last for last in lasts if last != self.eos]
        self.found.completions += len(lasts)
        self.found.without_eos += len(other)
        self.found.ends_in.update(self._name(last) for last in other)
        if other:
            self.found.rows.add(row.number)

    def _last_token(self, ids: list[int]) -> int | None:
        return next((token for token in reversed(ids) if token == self.eos or not self._is_blank(token)), None)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = self.tokenizer.decode([token]).isspace()
        return self._blank[token]

    def _name(self, token: int | None) -> str:
        return self.tokenizer.convert_ids_to_tokens(token) if token in self.control else "text"


class UnknownIds:
    """Rows of token ids that the tokenizer does not have: made with another one, and shown here as nothing."""

    def __init__(self, tokenizer: Any):
        self.size = len(tokenizer)
        self.found = Count()

    def see(self, row: Row) -> None:
        if row.pair is None and max(map(max, (row.ids.prompt, *row.ids.completions))) >= self.size:
            self.found.add(row.number)


OF_TEMPLATES = ("generation_differs", "reasoning_left_out", "no_end_of_turn", "roles_renamed")
"""Of `report.KEPT`. What a template loses or cannot do beyond that makes a bad row, as it does in training."""


@dataclass(kw_only=True)
class TemplateCounts:
    """Rows whose conversation comes out of the chat template other than it should."""

    has_template: bool = False
    texts: int = 0  # rows of plain text, which no template is put around
    conversations: int = 0
    changes_with_the_day: bool = False  # the template asks for today's date
    seen: dict[str, Count] = field(default_factory=lambda: {name: Count() for name in OF_TEMPLATES})
    two_bos: Count = field(default_factory=Count)  # rows of any form


class TemplateCheck:
    """What training counts of conversations, and what else their template does."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.found = TemplateCounts(has_template=bool(tokenizer.chat_template))

    def see(self, row: Row) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and row.ids.prompt[:2] == [bos, bos]:
            self.found.two_bos.add(row.number)
        if row.pair is None:
            return
        if isinstance(row.pair.prompt, str):
            self.found.texts += 1
            return
        self.found.conversations += 1
        template = self.tokenizer.get_chat_template(tools=row.pair.tools)
        self.found.changes_with_the_day |= "strftime_now" in COMMENT.sub("", template)
        for name, count in self.found.seen.items():
            if row.ids.flags & KEPT[name].flag:
                count.add(row.number)
