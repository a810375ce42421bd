"""Text from outside, made fit to be shown."""

from __future__ import annotations

import pytest

from dpo_trainer.printable import printable


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("plain é 中", "plain é 中"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\t", r"a\nb\t"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("zero\u200bwidth\u00a0", r"zero\u200bwidth\xa0"),
        ("\ud800", r"\ud800"),
        ("\x9b2J", r"\x9b2J"),
    ],
)
def test_nothing_hides_and_nothing_is_obeyed(text, want):
    got = printable(text)
    assert got == want
    assert got.isprintable()
    got.encode()
