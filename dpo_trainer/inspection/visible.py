"""White space, which a reader would not see, is written out."""

from __future__ import annotations

from ..printable import printable


def with_white_space(text: str) -> str:
    """As `printable`, with spaces, line breaks and tabs as signs; a line break is kept after its sign."""
    return "".join(WHITE_SPACE.get(char) or printable(char) for char in text)


WHITE_SPACE = {" ": "·", "\n": "⏎\n", "\t": "⇥"}
