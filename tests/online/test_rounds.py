"""Rounds of sampling, without models: a step is the list of its prompts, and sampling it puts a mark on each."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer.online.rounds import Rounds

FEW = st.integers(0, 6)


def mark(prompt: str, policy: int) -> str:
    return f"{prompt} by policy {policy}"


class Run:
    """Epochs of so many steps, trained on by `Rounds` as the trainer does."""

    def __init__(self, epochs: list[int], every: int):
        self.epochs, self.every = epochs, every
        self.rounds = Rounds(every)
        self.made = 0  # optimizer steps
        self.sizes: list[int] = []  # steps of each round
        self.trained: list[list[str]] = []
        self.staleness: list[int] = []

    def sample(self, steps):
        self.sizes.append(len(steps))
        return [[mark(prompt, self.made) for prompt in step] for step in steps]

    def to_the_end(self, stops: set[int]) -> Run:
        for epoch, count in enumerate(self.epochs):
            self.one_epoch([[f"{epoch}.{step}"] for step in range(count)], stops)
        return self

    def one_epoch(self, steps: list[list[str]], stops: set[int]) -> None:
        place, data = 0, iter(steps)
        while True:
            batches = self.rounds.next(partial(next, data, []), self.sample, self.made)
            if not batches:
                return
            self.trained.append(batches)
            self.staleness.append(self.made - self.rounds.sampled_at)
            place, self.made = place + 1, self.made + 1
            if self.made in stops:  # saved, killed, and started again behind the step that was made last
                saved = json.dumps(self.rounds.state())
                self.rounds, data = Rounds(self.every), islice(iter(steps), place, None)
                self.rounds.load(json.loads(saved))


@given(epochs=st.lists(FEW, max_size=4), every=st.integers(1, 5), stops=st.sets(st.integers(1, 24)))
def test_each_step_once_and_in_order_wherever_it_was_interrupted(epochs, every, stops):
    run = Run(epochs, every).to_the_end(stops)
    drawn = [f"{epoch}.{step}" for epoch, count in enumerate(epochs) for step in range(count)]
    assert [prompt.split()[0] for (prompt,) in run.trained] == drawn
    # Neither does a stop change who sampled what: a round begins each `every` steps, and with each epoch.
    ages = [step % every for count in epochs for step in range(count)]
    assert run.staleness == ages
    assert [prompt for (prompt,) in run.trained] == [mark(p, n - age) for n, (p, age) in enumerate(zip(drawn, ages))]
    assert run.sizes == [min(every, count - start) for count in epochs for start in range(0, count, every)]


def test_what_waits_is_handed_out_before_anything_is_drawn():
    run = Run([], every=2)
    steps = iter([["a"], ["b"], ["c"]])
    run.rounds.next(lambda: next(steps, []), run.sample, 0)
    assert run.rounds.next(lambda: pytest.fail("drawn"), run.sample, 1) == [mark("b", 0)]
    assert run.sizes == [2]
    assert next(steps) == ["c"]


def test_nothing_is_sampled_for_nothing():
    rounds = Rounds(3)
    assert rounds.next(list, lambda steps: pytest.fail("sampled"), 0) == []
    assert rounds.state() == {"waiting": [], "sampled_at": 0}


def test_a_resumed_round_passes_over_its_own_prompts():
    """They were drawn before the checkpoint, and the data of the new process begin with them."""
    rounds = Rounds(3)
    rounds.load({"waiting": [["b by policy 4"], ["c by policy 4"]], "sampled_at": 4})
    steps = iter([["b"], ["c"], ["d"]])
    assert rounds.next(lambda: next(steps, []), lambda steps: pytest.fail("sampled"), 5) == ["b by policy 4"]
    assert next(steps) == ["d"]
