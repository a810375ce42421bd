"""When completions are sampled: for one optimizer step at a time, or for several at once (`--generate_every`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

Batches = list[Any]
"""The batches of one optimizer step."""


class Rounds:
    """Draws prompts of as many steps as one round of sampling serves, and hands the steps out one by one.

    A round ends with the epoch: what is drawn is trained on in the epoch it was drawn in. What waits goes into
    checkpoints, for its completions were sampled by a policy that is gone by then.
    """

    def __init__(self, every: int):
        self.every = every
        self.waiting: deque[Batches] = deque()
        self.sampled_at = 0  # optimizer steps made when the round was sampled
        self._drawn = True  # the prompts of what waits were drawn from the data of this process

    def next(
        self, draw: Callable[[], Batches], sample: Callable[[list[Batches]], list[Batches]], step: int
    ) -> Batches:
        """The batches of the coming step. `draw` returns the prompts of one step, nothing at the end of an epoch."""
        if not self._drawn:  # resumed: the data begin behind the last step that was made
            for _ in self.waiting:
                draw()
            self._drawn = True
        if not self.waiting:
            drawn: list[Batches] = []
            while len(drawn) < self.every and (batches := draw()):
                drawn.append(batches)
            if not drawn:
                return []
            self.waiting.extend(sample(drawn))
            self.sampled_at = step
        return self.waiting.popleft()

    def state(self) -> dict[str, Any]:
        """JSON, if batches are."""
        return {"waiting": list(self.waiting), "sampled_at": self.sampled_at}

    def load(self, state: dict[str, Any]) -> None:
        self.waiting = deque(state["waiting"])
        self.sampled_at = state["sampled_at"]
        self._drawn = not self.waiting
