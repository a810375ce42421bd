"""What sampling makes and feedback reads: a prompt with its completions.

P prompts   K completions of each
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..types import Message


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer."""

    ids: list[int]  # with the token that ended it, where one did
    text: str  # decoded, without special tokens
    finished: bool  # ended by itself, not by the limit of new tokens


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A prompt and the K answers that were sampled for it.

    `prompt` is as in the dataset, a string or messages. `columns` are the other columns of its row, for rewards.
    """

    example_id: int
    prompt: str | list[Message]
    prompt_ids: list[int]
    completions: list[Completion]
    columns: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0  # of its pairs; 0 for a row that only fills an uneven batch

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    def conversation(self, number: int) -> list[Message]:
        """With answer `number`; a prompt that is a string counts as the words of a user."""
        prompt = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        return [*prompt, {"role": "assistant", "content": self.completions[number].text}]

    def question(self) -> str:
        """The prompt as plain text: a string itself, a conversation with a line per turn."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return str(self.prompt[0].get("content") or "")
        return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in self.prompt)
