"""Where the prompt ends when a row has none: two whole conversations or texts, the prompt is what they share."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...types import Message

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
ZERO_WIDTH_JOINER = "\u200d"


def shared_length(first: Sequence, second: Sequence) -> int:
    """Length of the common beginning of two strings or lists, by halving: slices compare much faster than items."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def split_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The longest shared beginning after which both go on with an assistant turn; each keeps at least its last turn.

    An empty prompt comes back when there is no such place.
    """
    end = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while end > 0 and not chosen[end]["role"] == rejected[end]["role"] == "assistant":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Transcripts after the last assistant marker that both share; other texts at a word boundary.

    A transcript's reply may come back blank; a completion of any other text is blank only where the whole text is.
    """
    shared = shared_length(chosen, rejected)
    if HUMAN in chosen and HUMAN in rejected:
        marker = chosen.rfind(ASSISTANT, 0, shared)
        if marker >= 0:
            return _cut(chosen, rejected, marker + len(ASSISTANT))
    return _cut(chosen, rejected, _word_boundary(chosen, rejected, shared))


def _cut(chosen: str, rejected: str, end: int) -> tuple[str, str, str]:
    return chosen[:end], chosen[end:], rejected[end:]


def _word_boundary(chosen: str, rejected: str, shared: int) -> int:
    """The last place in the shared beginning that is inside no word and leaves both texts something to say.

    One space before it goes to the completions: tokenizers join a word with the space in front of it.
    """
    end = max(0, min(shared, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1))
    while end > 0 and (_inside_word(chosen, end) or _inside_word(rejected, end)):
        end -= 1
    return end - 1 if end > 0 and chosen[end - 1] == " " else end


def _inside_word(text: str, at: int) -> bool:
    """Whether a cut before `text[at]` would part letters, or a sign from what it modifies."""
    before, after = text[at - 1], text[at]
    if _is_flag_letter(before) and _is_flag_letter(after):
        return _flag_letters_before(text, at) % 2 == 1
    return _modifies(after) or before == ZERO_WIDTH_JOINER or (_is_word(before) and _is_word(after))


def _is_flag_letter(char: str) -> bool:
    """Two of them are one flag."""
    return "\U0001f1e6" <= char <= "\U0001f1ff"


def _flag_letters_before(text: str, at: int) -> int:
    start = at
    while start > 0 and _is_flag_letter(text[start - 1]):
        start -= 1
    return at - start


def _is_word(char: str) -> bool:
    return char.isalnum() or char in "_'’-" or _modifies(char)


def _modifies(char: str) -> bool:
    """Combining marks, variation selectors, emoji skin tones, tags, joiners: nothing without the sign before them."""
    if "\U000e0020" <= char <= "\U000e007f":
        return True
    return char == ZERO_WIDTH_JOINER or unicodedata.category(char) in ("Mn", "Mc", "Me") or "🏻" <= char <= "🏿"
