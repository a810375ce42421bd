"""BOS and EOS of plain text: one of each, where they belong. (For conversations the chat template decides.)"""

from __future__ import annotations

from typing import Any, NamedTuple


class SpecialTokens(NamedTuple):
    """What a tokenizer begins and ends texts with, asked once: a tokenizer is slow to answer."""

    bos: int | None
    eos: int
    eos_text: str

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token)

    def without_second_bos(self, ids: list[int]) -> list[int]:
        """The text itself began with BOS, and the tokenizer put another before it."""
        return ids[1:] if self.bos is not None and ids[:2] == [self.bos, self.bos] else ids

    def without_own_eos(self, prompt: list[int], text: str, *, as_text: bool) -> list[int]:
        """Without the EOS that the tokenizer put after a text; `as_text`: one in the text itself is not read as EOS."""
        written = text.endswith(self.eos_text) and not as_text
        return prompt[:-1] if prompt[-1 - written :] == [self.eos] * (1 + written) else prompt

    def ended(self, completion: list[int], text: str, where: str) -> list[int]:
        """The completion with EOS at its end, as often as the text has it there, and at least once."""
        eos = self.eos
        if not completion or (completion == [eos] and self.eos_text not in text):
            raise ValueError(
                f"{where}: the tokenizer makes no token of {text[:40]!r}. Leave such rows out with dataset.filter, or use a "
                "tokenizer that knows these characters."
            )
        written = 0
        while text.endswith(self.eos_text * (written + 1)):
            written += 1
        if completion[-written - 1 :] == [eos] * (written + 1):
            return (
                completion[:-1] if written else completion
            )  # the text's own EOS, and the one that the tokenizer adds
        return completion if completion[-1] == eos else [*completion, eos]

    def bos_instead_of_prompt(self, where: str) -> int:
        """What predicts the first token of the completions of a prompt without tokens."""
        if self.bos is None:
            raise ValueError(
                f"{where}: the prompt has no token of its own, so nothing predicts the first token of the completions, and "
                "the tokenizer has no BOS token to stand in. Give a prompt, or set tokenizer.bos_token."
            )
        return self.bos
