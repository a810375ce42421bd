"""OnlineDPOTrainer: what it samples, scores and pairs, and that it then trains as DPOTrainer does on the same pairs."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import online_tiny
import oracles
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from online_tiny import Known, Recording, Steps, Told, by_chance, completion, lines, without_times, wordy
from torch import Tensor

from dpo_trainer.data.batches import padding_rows as fillers
from dpo_trainer.losses import LOSSES
from dpo_trainer.online.feedback.protocol import FeedbackUnavailable
from dpo_trainer.online.trainer import OnlineDPOTrainer

LN2 = math.log(2)


def trained(folder, **how: Any) -> OnlineDPOTrainer:
    made = online_tiny.trainer(folder, **how)
    made.train()
    return made


def last(made: OnlineDPOTrainer, name: str) -> float:
    return lines(made)[-1][name]


# --- online equals offline ---


def offline_rows(rows: list[dict[str, str]], count: int, every_pair: bool) -> Dataset:
    """What `wordy` answers to them, ranked by `preferring`, as token ids."""
    generator, judge, ready = wordy(), online_tiny.preferring(), []
    for row in rows:
        answers = [generator.answer(row["prompt"], number, None).ids for number in range(count)]
        scored = sorted(((by_chance(row["prompt"], ids), ids) for ids in answers), reverse=True)
        assert judge is not None
        assert len({score for score, _ in scored}) == count
        ranked = scored if every_pair else [scored[0], scored[-1]]
        pairs = [[i, j] for i in range(len(ranked)) for j in range(i + 1, len(ranked))]
        (_, chosen), (_, rejected), *more = ranked
        ready.append(
            {
                "prompt_ids": online_tiny.ids_of(row["prompt"], finished=False),
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "more_ids": [ids for _, ids in more],
                "pairs": pairs,
                "margin": [ranked[i][0] - ranked[j][0] for i, j in pairs],
            }
        )
    return Dataset.from_list(ready)


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize(("count", "selection"), [(2, "best_worst"), (2, "all"), (4, "best_worst"), (4, "all")])
def test_online_is_offline_on_the_pairs_that_it_makes(count, selection, layout, tmp_path):
    how: dict[str, Any] = {"max_steps": 2, "layout": layout}
    how |= {"loss_type": ["odpo"], "odpo_offset": "linear"} if selection == "all" else {}  # it looks at margins
    sampled = {"num_generations": count, "pair_selection": selection, "generator": wordy()}
    online = trained(tmp_path / "online", **how, **sampled)
    train = offline_rows(online_tiny.rows(), count, selection == "all")
    offline = tiny.trained(tmp_path / "offline", train=train, **how)
    assert online.layout.name == layout
    assert tiny.losses(online) == tiny.losses(offline)
    want = tiny.weights(offline.model)
    assert tiny.moved(tiny.weights(tiny.llama()), want) > 1e-3
    tiny.assert_same_weights(tiny.weights(online.model), want, atol=1e-7)
    of_pairs = without_times(tiny.log_lines(offline)[-1])
    assert len(of_pairs) > 12
    assert {name: value for name, value in lines(online)[-1].items() if name in of_pairs} == of_pairs


def test_the_first_step_knows_no_difference(tmp_path):
    """Policy and reference are one model: ln 2 and no divergence, to float32's rounding of sums over a few tokens."""
    first = lines(trained(tmp_path, max_steps=1))[0]
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/non_score_reward"] == pytest.approx(0, abs=1e-6)
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/scores"], abs=1e-6)


def in_full(model: torch.nn.Module, sampled: Any, number: int) -> tuple[Tensor, Tensor]:
    """(log-prob of the completion, entropy at each of its tokens) over the whole vocabulary, float64."""
    ids = sampled.completions[number].ids
    logps = oracles.completion_logits(model, sampled.prompt_ids, ids).double().log_softmax(-1)
    return logps[torch.arange(len(ids)), ids].sum(), -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_kl_and_entropy_of_all_completions(layout, tmp_path):
    """Of tied prompts too: they are samples like others. The second step is computed by what the first one made."""
    after_one: list[Any] = []
    keep = Steps(lambda state: after_one.append(copy.deepcopy(online.model)))
    told = Told(lambda prompt, number, answer: by_chance(prompt, number) if by_chance(prompt) > 0.5 else 0.5)
    how: dict[str, Any] = {"max_steps": 2, "learning_rate": 1.0, "beta": 0.3, "layout": layout}
    online = online_tiny.trainer(tmp_path, judge=told, generator=wordy(), parts={"callbacks": [keep]}, **how)
    online.train()
    line = lines(online)[-1]
    assert 0 < line["tie_rate"] < 1
    policy, reference = oracles.in_double(after_one[0]), oracles.in_double(tiny.llama())
    places = [(sampled, number) for sampled, _ in online.last_samples for number in (0, 1)]
    with torch.no_grad():
        of_policy = [in_full(policy, *place) for place in places]
        of_reference = [in_full(reference, *place)[0] for place in places]
    kl = torch.stack([p - r for (p, _), r in zip(of_policy, of_reference, strict=True)]).mean().item()
    entropy = torch.cat([e for _, e in of_policy]).mean().item()
    assert abs(kl) > 0.1
    assert line["objective/kl"] == pytest.approx(kl, abs=oracles.NATS)
    assert line["objective/entropy"] == pytest.approx(entropy, abs=oracles.NATS)
    scores = [score for _, row in online_tiny.judged(online) for score in row]
    assert line["objective/scores"] == pytest.approx(sum(scores) / 8, abs=1e-12)
    assert line["objective/non_score_reward"] == pytest.approx(-0.3 * line["objective/kl"], abs=1e-12)
    assert line["objective/rlhf_reward"] == pytest.approx(sum(scores) / 8 - 0.3 * line["objective/kl"], abs=1e-12)


def test_what_is_said_of_samples(tmp_path):
    """Four prompts of one step, by hand."""
    answers = {
        "p0": [completion("a"), completion("bcd")],
        "p1": [completion("ef", finished=False), completion("g")],
        "p2": [completion("h"), completion("i")],
        "p3": [completion("j"), completion("k", finished=False)],
    }
    scores = {"p0": [1.0, 4.0], "p1": [0.0, None], "p2": [2.0, 2.0], "p3": [None, None]}
    line = lines(
        trained(
            tmp_path,
            max_steps=1,
            train=Dataset.from_dict({"prompt": list(answers)}),
            generator=Known(lambda prompt, number, model: answers[prompt][number]),
            judge=Told(lambda prompt, number, answer: scores[prompt][number]),
        )
    )[0]
    want = {
        "objective/scores": 9 / 5,
        "objective/scores_margin": 3 / 2,  # of p0 and p2
        "val/contain_eos_token": 6 / 8,
        "completions/length": (2 + 4 + 2 + 2 + 2 + 2 + 2 + 1) / 8,  # with the token that ends it
        "tie_rate": 1 / 4,
        "failed_rate": 2 / 4,
        "staleness": 0,
    }
    assert {name: line[name] for name in want} == want
    assert line["rewards/chosen"] == pytest.approx(0, abs=1e-6)


# --- accumulation ---


def test_accumulation_samples_the_same_and_trains_the_same(tmp_path):
    """The prompts of a step are sampled together, however they are split. Sums of float32 in another order are off by a
    few roundings of the gradients, of 1e-7 of their size."""
    runs = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        online = online_tiny.trainer(
            tmp_path / f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        recording = Recording(online.generator)
        online.generator = recording
        online.train()
        assert online.state.global_step == 4
        runs.append((recording.sampled, tiny.weights(online.model)))
    assert tiny.moved(tiny.weights(tiny.llama()), runs[0][1]) > 1e-3
    # What a step samples depends on the weights before it, so that all but the first could drift apart.
    assert runs[0][0] == runs[1][0] == runs[2][0]
    for _, weights in runs[1:]:
        tiny.assert_same_weights(weights, runs[0][1], atol=2e-6)


def test_each_step_has_other_samples_of_the_same_prompts(tmp_path):
    online = online_tiny.trainer(tmp_path, train=online_tiny.dataset(4), learning_rate=0.0)
    recording = Recording(online.generator)
    online.generator = recording
    online.train()
    first, *others = recording.sampled
    for other in others:
        assert other.keys() == first.keys()
        assert all(other[prompt] != first[prompt] for prompt in first)


# --- prompts that teach nothing ---


def counted(made: OnlineDPOTrainer) -> list[int]:
    """Calls of `training_step`, which makes forward and backward."""
    calls: list[int] = []
    inner = made.training_step

    def counting(*args, **kwargs):
        calls.append(made.state.global_step)
        return inner(*args, **kwargs)

    made.training_step = counting  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("score", "rate"), [(1.0, "tie_rate"), (None, "failed_rate")])
def test_a_step_without_a_pair_passes_and_changes_nothing(score, rate, optim, tmp_path):
    """Every rank makes as many passes as the others; the gradient is 0, and 0 loss counts for no line."""
    online = online_tiny.trainer(tmp_path, judge=Told(lambda *of: score), optim=optim, gradient_accumulation_steps=2)
    backwards = []
    online.model.lm_head.weight.register_hook(lambda grad: backwards.append(grad.abs().max().item()))
    calls = counted(online)
    online.train()
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3]
    assert backwards == [0.0] * 8
    tiny.assert_same_weights(tiny.weights(online.model), tiny.weights(tiny.llama()))
    assert [line[rate] for line in lines(online)] == [1.0] * 4
    assert not any("loss" in line for line in lines(online))


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].builtin])  # other tests register theirs
def test_any_loss_bears_a_step_without_a_pair(name, tmp_path):
    needs: dict[str, Any] = {"exo_pair": {"label_smoothing": 1e-3}}.get(name, {})
    more: dict[str, Any] = {"rpo_normalization": "token"} if name == "sft" else {}
    online = trained(
        tmp_path, model=tiny.llama(num_hidden_layers=1), judge=Told(lambda *of: 0.0), loss_type=[name], max_steps=1,
        **needs, **more,
    )  # fmt: skip
    tiny.assert_same_weights(tiny.weights(online.model), tiny.weights(tiny.llama(num_hidden_layers=1)))


@pytest.mark.parametrize("idle", ["tied", "failed", "one failed", "one answer twice"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_they_leave_the_others_alone(idle, layout, tmp_path):
    """A step with them is the step without them: the mean is over the pairs that are there. In float32 the gradients of
    the others are added up in another order."""
    scores = {"tied": [3.0, 3.0], "failed": [None, None], "one failed": [None, 3.0], "one answer twice": [0.0, 3.0]}

    def answer(prompt: str, number: int, model: Any) -> Any:
        return (
            " same" if prompt.startswith("idle") and idle == "one answer twice" else wordy().answer(prompt, number, 0)
        )

    def score(prompt: str, number: int, of: Any) -> float | None:
        return scores[idle][number] if prompt.startswith("idle") else by_chance(prompt, number)

    real = [row["prompt"] for row in online_tiny.rows(4)]
    mixed = ["idle 1", *real[:3], "idle 2", real[3]]
    how: dict[str, Any] = {"max_steps": 1, "layout": layout, "generator": Known(answer), "judge": Told(score)}
    runs = [
        trained(
            tmp_path / str(n),
            train=Dataset.from_dict({"prompt": prompts}),
            per_device_train_batch_size=len(prompts),
            **how,
        )
        for n, prompts in enumerate((mixed, real))
    ]
    rates = {"tie_rate": last(runs[0], "tie_rate"), "failed_rate": last(runs[0], "failed_rate")}
    assert rates == {"tie_rate": 0.0, "failed_rate": 0.0} | {
        ("failed_rate" if "failed" in idle else "tie_rate"): pytest.approx(1 / 3)
    }
    want = tiny.weights(runs[1].model)
    assert tiny.moved(tiny.weights(tiny.llama()), want) > 1e-3
    tiny.assert_same_weights(tiny.weights(runs[0].model), want, atol=1e-7)
    of_pairs = ("loss", "rewards/accuracies", "logps/chosen", "nll_loss", "entropy", "mean_token_accuracy")
    assert {n: last(runs[0], n) for n in of_pairs} == pytest.approx({n: last(runs[1], n) for n in of_pairs}, abs=1e-5)


# --- scores ---


def test_what_did_not_end_pays(tmp_path):
    answers = [completion("a", finished=False), completion("b"), completion("c", finished=False)]
    told = Told(lambda prompt, number, answer: [3.0, 2.0, None][number])
    online = trained(
        tmp_path, max_steps=1, missing_eos_penalty=1.5, num_generations=3, judge=told,
        generator=Known(lambda prompt, number, model: answers[number]),
    )  # fmt: skip
    assert online_tiny.judged(online)[0][1] == [1.5, 2.0, None]
    assert last(online, "objective/scores") == (1.5 + 2.0) / 2
    assert last(online, "objective/scores_margin") == 0.5


def words(prompts, completions, topic, **columns):
    return [float(len(text.split())) if topic[n] != "none" else None for n, text in enumerate(completions)]


def half(completions, prompts=None):
    return [0.5] * len(completions)


def test_rewards_are_weighted_logged_and_get_the_columns(tmp_path):
    seen: dict[str, list[Any]] = {}

    def letters(prompts, completions, topic, level):
        seen.update(prompts=prompts, completions=completions, topic=topic, level=level)
        return [float(len(text)) for text in completions]

    rows = {"prompt": ["p0", "p1"], "topic": ["x", "none"], "level": [1, 2]}
    online = trained(
        tmp_path,
        max_steps=1,
        train=Dataset.from_dict(rows),
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        generator=Known(lambda prompt, number, model: ["a", "b c"][number]),
        parts={"reward_funcs": [words, letters]},
        reward_weights=[2.0, 1.0],
        reward_scale=0.5,
    )
    assert seen == {
        "prompts": ["p0", "p0", "p1", "p1"],
        "completions": ["a", "b c", "a", "b c"],
        "topic": ["x", "x", "none", "none"],
        "level": [1, 1, 2, 2],
    }
    # 0.5 (2 words + letters)
    assert online_tiny.judged(online) == [("p0", [1.5, 3.5]), ("p1", [None, None])]
    line = lines(online)[0]
    assert (line["scores/words"], line["scores/letters"]) == (1.5, 2.0)  # before weight and scale
    assert (line["rewards/failed/words"], line["rewards/failed/letters"]) == (2.0, 0.0)
    assert (line["failed_rate"], line["objective/scores"]) == (0.5, 2.5)


def test_conversations_reach_rewards_as_messages(tmp_path):
    seen: list[Any] = []

    def look(prompts, completions):
        seen.append((prompts, completions))
        return list(map(float, range(len(completions))))

    prompt = [{"role": "user", "content": "hi"}]
    trained(
        tmp_path,
        max_steps=1,
        train=Dataset.from_list([{"prompt": prompt}]),
        generator=Known(lambda prompt, number, model: "yes"),
        parts={"reward_funcs": look},
    )
    assert seen == [([prompt] * 2, [[{"role": "assistant", "content": "yes"}]] * 2)]


# --- rounds of several steps ---


class Trace:
    """What a run trained on, and when it sampled."""

    def __init__(self, online: OnlineDPOTrainer):
        self.prompts: list[list[int]] = []  # example ids of each optimizer step
        self.sampled: list[tuple[int, int]] = []  # (optimizer steps made, prompts)
        online.add_callback(Steps(lambda state: self.prompts.append([])))
        self.prompts.append([])
        step, sample = online.training_step, online.generator

        def training_step(model, inputs, *rest):
            self.prompts[-1] += [
                i for part in inputs.get("micro_batches", [inputs]) for i in part["example_ids"].tolist()
            ]
            return step(model, inputs, *rest)

        def generator(model, prompts, count, **how):
            self.sampled.append((online.state.global_step, len(prompts)))
            return sample(model, prompts, count, **how)

        online.training_step, online.generator = training_step, generator  # type: ignore[method-assign]
        online.train()
        self.prompts.pop()


def test_several_steps_by_one_round(tmp_path):
    online = online_tiny.trainer(tmp_path, generate_every=2)
    trace = Trace(online)
    assert [line["staleness"] for line in lines(online)] == [0, 1, 0, 1]
    assert trace.sampled == [(0, 8), (2, 8)]
    one_by_one = Trace(online_tiny.trainer(tmp_path))
    assert one_by_one.sampled == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert trace.prompts == one_by_one.prompts, "the same prompts in the same steps"


def test_a_round_ends_with_its_epoch(tmp_path):
    """22 prompts are 6 steps, the last of 2: a round of 4, then one of 2. With accumulation of 3 the last step has a batch
    less than the others."""
    online = online_tiny.trainer(tmp_path, generate_every=4, max_steps=-1, num_train_epochs=2)
    trace = Trace(online)
    assert [line["staleness"] for line in lines(online)] == [0, 1, 2, 3, 0, 1] * 2
    assert trace.sampled == [(0, 16), (4, 6), (6, 16), (10, 6)]
    epochs = [sorted(i for step in trace.prompts[start : start + 6] for i in step) for start in (0, 6)]
    assert epochs == [list(range(22))] * 2
    short = Trace(
        online_tiny.trainer(
            tmp_path, generate_every=2, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=3,
            gradient_accumulation_steps=3,
        )
    )  # fmt: skip
    assert [len(step) for step in short.prompts] == [9, 9, 4]
    assert short.sampled == [(0, 18), (2, 4)]


def test_a_stream_goes_round(tmp_path):
    """Pass after pass, as it does offline: 6 prompts, 4 to a step."""
    rows = online_tiny.rows(6)
    trace = Trace(
        online_tiny.trainer(
            tmp_path, train=IterableDataset.from_generator(lambda: iter(rows)), generate_every=3, max_steps=3
        )
    )
    assert trace.prompts == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]
    assert trace.sampled == [(0, 12)]


def test_a_second_run_draws_its_own_prompts(tmp_path):
    """What the first one left over belongs to its epoch."""
    online = online_tiny.trainer(tmp_path, generate_every=4, max_steps=3)
    Trace(online)
    second = Trace(online)
    assert second.sampled[0][0] == 0
    assert [line["staleness"] for line in lines(online)] == [0, 1, 2]


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_rows_that_fill_the_last_batch_are_those_of_the_last_batch(every, tmp_path, monkeypatch):
    """On several processes accelerate repeats rows at the end of an epoch, and knows of them while it hands out that batch:
    a round that looks ahead must ask then. Here it says that one row of the last batch of four is real."""

    def rows_of_last_round(accelerator, rows_of_all_ranks):
        return 1 if accelerator.gradient_state.end_of_dataloader else 0

    monkeypatch.setattr(fillers, "_rows_of_last_round", rows_of_last_round)
    online = online_tiny.trainer(
        tmp_path, train=online_tiny.dataset(12), generate_every=every, max_steps=-1, num_train_epochs=1, logging_steps=3,
        parts={"eval_dataset": online_tiny.dataset(8)},
    )  # fmt: skip
    weights: list[list[float]] = []
    step = online.training_step

    def training_step(model, inputs, *rest):
        weights.append(inputs["weight"].tolist())
        return step(model, inputs, *rest)

    counted_samples = {"train": 0, "eval": 0}
    for split, tally in online.rollout.tally.items():

        def add(name, values, split=split, inner=tally.add):
            counted_samples[split] += len(values) if name == "completions/length" else 0
            inner(name, values)

        tally.add = add  # type: ignore[method-assign]
    online.training_step = training_step  # type: ignore[method-assign]
    online.train()
    online.evaluate()
    assert weights == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert counted_samples == {"train": 9 * 2, "eval": 5 * 2}


# --- beta by epochs ---


def test_the_second_epoch_has_the_second_beta(tmp_path):
    """Weights stay where they are: rewards are beta times the same log-probs, and the loss is -log sigmoid of them."""
    online = trained(
        tmp_path,
        train=online_tiny.dataset(4),
        beta=[0.2, 0.5],
        max_steps=-1,
        num_train_epochs=3,
        learning_rate=0.0,
        generator=wordy(),
        eval_strategy="epoch",
        parts={"ref_model": tiny.llama(seed=7), "eval_dataset": online_tiny.dataset(4)},
    )
    first, second, third = lines(online)
    assert [line["beta"] for line in (first, second, third)] == [0.2, 0.5, 0.5]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) > 1e-3
        assert second[name] == third[name] == pytest.approx(first[name] * 2.5, rel=1e-5)
    assert second["objective/non_score_reward"] == pytest.approx(-0.5 * first["objective/kl"], rel=1e-6)
    assert abs(second["loss"] - first["loss"]) > 1e-3
    want = trained(
        tmp_path, train=online_tiny.dataset(4), beta=0.5, max_steps=1, learning_rate=0.0, generator=wordy(),
        parts={"ref_model": tiny.llama(seed=7)},
    )  # fmt: skip
    assert second["loss"] == pytest.approx(last(want, "loss"), abs=1e-6)


def test_a_beta_by_epochs_needs_epochs(tmp_path):
    """A stream is one long pass: the second beta would never come."""
    rows = online_tiny.rows(6)
    with pytest.raises(ValueError, match=r"--beta .*stream"):
        online_tiny.trainer(tmp_path, train=IterableDataset.from_generator(lambda: iter(rows)), beta=[0.2, 0.1])


def test_a_list_of_one_beta_is_that_beta(tmp_path):
    one, other = (trained(tmp_path, beta=beta, max_steps=2) for beta in ([0.3], 0.3))
    assert tiny.losses(one) == tiny.losses(other)
    tiny.assert_same_weights(tiny.weights(one.model), tiny.weights(other.model))
    third = trained(tmp_path, beta=0.6, max_steps=2)
    assert tiny.moved(tiny.weights(third.model), tiny.weights(one.model)) > 1e-5


# --- evaluation ---


class Two:
    """Answers by who was asked: the policy as "mine", any other state or model as "theirs"."""

    def __init__(self, mine: dict[str, list[str]], theirs: dict[str, str]):
        self.mine, self.theirs = mine, theirs
        self.asked: list[tuple[str, int, int]] = []
        self.policy: Any = None

    def __call__(self, model, prompts, count, *, decoding, seed):
        off = any(getattr(module, "disable_adapters", False) is True for module in model.modules())
        who = "mine" if model is self.policy and not off else "theirs"
        self.asked.append((who, len(prompts), count))
        texts = [online_tiny.TOKENIZER.decode(ids) for ids in prompts]
        if who == "mine":
            return [[completion(a) for a in self.mine[text][:count]] for text in texts]
        return [[completion(self.theirs[text])] * count for text in texts]


def five() -> tuple[Two, Told]:
    """Five prompts. Of first answers against the reference's: two wins, a tie, a loss, and one that nobody can judge."""
    mine = {
        "p0": ["good", "bad"],
        "p1": ["best", "bad"],
        "p2": ["good", "good"],
        "p3": ["bad", "good"],
        "p4": ["?", "bad"],
    }
    theirs = {"p0": "bad", "p1": "good", "p2": "good", "p3": "best", "p4": "good"}
    worth = {"bad": 0.0, "good": 1.0, "best": 2.0, "?": None}
    return Two(mine, theirs), Told(lambda prompt, number, answer: worth[answer.text])


@pytest.mark.parametrize("kind", ["frozen copy", "model of its own", "adapter", "stream"])
def test_the_win_rate_is_over_the_reference(kind, tmp_path):
    generator, judge = five()
    prompts = Dataset.from_dict({"prompt": list(generator.theirs)})
    parts: dict[str, Any] = {"eval_dataset": prompts.to_iterable_dataset() if kind == "stream" else prompts}
    parts |= {"peft_config": tiny.lora()} if kind == "adapter" else {}
    parts |= {"ref_model": tiny.llama(seed=7)} if kind == "model of its own" else {}
    online = online_tiny.trainer(tmp_path, generator=generator, judge=judge, parts=parts)
    generator.policy = online.model
    found = online.evaluate()
    assert found["eval_win_rate"] == (1 + 1 + 0.5 + 0) / 4
    assert found["eval_scores/reference"] == (0 + 1 + 1 + 2 + 1) / 5
    assert found["eval_objective/scores"] == (1 + 0 + 2 + 0 + 1 + 1 + 0 + 1 + 0) / 9
    assert (found["eval_tie_rate"], found["eval_failed_rate"]) == (1 / 5, 1 / 5)
    assert "eval_staleness" not in found
    assert generator.asked[:2] == [("mine", 4, 2), ("theirs", 4, 1)]
    if kind == "model of its own":
        assert found["eval_loss"] != pytest.approx(LN2, abs=1e-3)
    else:
        assert found["eval_loss"] == pytest.approx(LN2, abs=1e-5)
    again = online.evaluate()
    asked = {who: sum(1 for who_, *_ in generator.asked if who_ == who) for who in ("mine", "theirs")}
    assert asked == {"mine": 4, "theirs": 2}, "a reference that stays answers each prompt once"
    assert without_times(again) == without_times(found)


def test_no_reference_no_win_rate(tmp_path):
    generator, judge = five()
    prompts = Dataset.from_dict({"prompt": list(generator.theirs)})
    online = online_tiny.trainer(
        tmp_path, generator=generator, judge=judge, loss_type="simpo", parts={"eval_dataset": prompts}
    )
    generator.policy = online.model
    found = online.evaluate()
    assert "eval_win_rate" not in found
    assert {who for who, *_ in generator.asked} == {"mine"}
    with pytest.raises(ValueError, match="no reference model to sample answers from"):
        online.sample_answers(["p0"], reference=True)


def test_a_reference_that_moves_answers_anew(tmp_path):
    online = online_tiny.trainer(
        tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, learning_rate=3.0,
        eval_strategy="steps", eval_steps=2, parts={"eval_dataset": online_tiny.dataset(3)},
    )  # fmt: skip
    recording = Recording(online.generator)
    online.generator = recording
    online.train()
    of_reference = [call for call in recording.sampled if all(len(answers) == 1 for answers in call.values())]
    first, second = of_reference
    assert first.keys() == second.keys()
    assert first != second


def test_evaluations_of_an_untrained_model_are_the_same_and_of_a_trained_one_are_not(tmp_path):
    online = online_tiny.trainer(tmp_path, learning_rate=3.0, parts={"eval_dataset": online_tiny.dataset(6)})
    first, second = (without_times(online.evaluate()) for _ in range(2))
    assert first == second
    assert 0 <= first["eval_win_rate"] <= 1
    online.train()
    assert without_times(online.evaluate())["eval_objective/entropy"] != first["eval_objective/entropy"]


@pytest.mark.parametrize(
    "parts", [{}, {"peft_config": tiny.lora(lora_dropout=0.2)}], ids=["full", "lora with dropout"]
)
def test_evaluation_leaves_training_as_it_is(parts, tmp_path):
    """Sampling and judging draw numbers of their own."""
    runs = []
    for every in (None, 1):
        how: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": every} if every else {}
        given = parts | ({"eval_dataset": online_tiny.dataset(3)} if every else {})
        runs.append(trained(tmp_path / str(every), learning_rate=1.0, generate_every=2, parts=given, **how))
    plain, evaluated = runs
    assert sum("eval_loss" in line for line in evaluated.state.log_history) == 4
    tiny.assert_same_weights(tiny.weights(evaluated.model), tiny.weights(plain.model))
    assert tiny.losses(evaluated) == tiny.losses(plain)


def test_rows_that_fill_a_stream_do_not_count(tmp_path):
    """Five prompts in batches of four: the last three of the stream are there to fill it."""
    found = []
    for rows in (online_tiny.dataset(5), online_tiny.dataset(5).to_iterable_dataset()):
        parts = {"ref_model": tiny.llama(seed=7), "eval_dataset": rows}
        found.append(without_times(online_tiny.trainer(tmp_path, generator=wordy(), parts=parts).evaluate()))
    of_table, of_stream = found
    assert abs(of_table["eval_objective/kl"]) > 0.1
    assert of_stream == pytest.approx(of_table, abs=1e-6)  # batches of other sizes add up in another order


def test_several_evaluation_sets(tmp_path):
    sets = {"a": online_tiny.dataset(3), "b": online_tiny.dataset(5)}
    found = online_tiny.trainer(tmp_path, parts={"eval_dataset": sets}).evaluate()
    assert {"eval_a_win_rate", "eval_b_win_rate", "eval_a_loss", "eval_b_loss"} <= found.keys()


def test_evaluation_and_training_are_counted_apart(tmp_path):
    """An evaluation within a logging window changes nothing of its line."""
    how: dict[str, Any] = {"logging_steps": 4, "learning_rate": 0.0}
    plain = trained(tmp_path / "plain", **how)
    evaluated = trained(
        tmp_path / "eval", eval_strategy="steps", eval_steps=1, parts={"eval_dataset": online_tiny.dataset(3)}, **how
    )
    (want,), (got,) = lines(plain), lines(evaluated)
    assert without_times(got) == without_times(want)


# --- answers for callbacks ---


def test_sample_answers_of_policy_and_reference(tmp_path):
    online = trained(tmp_path, learning_rate=3.0, max_steps=2)
    prompts = ["cat", [{"role": "user", "content": "dog"}]]
    frozen = tiny.llama().eval()
    want = {True: frozen, False: copy.deepcopy(online.model).eval()}
    found = {reference: online.sample_answers(prompts, reference=reference, max_new_tokens=4) for reference in want}
    ids = [online_tiny.ids_of("cat", finished=False), [2, *online_tiny.ids_of("dog"), 3]]
    for reference, model in want.items():
        with torch.no_grad():
            for text, prompt in zip(found[reference], ids, strict=True):
                so_far = list(prompt)
                while len(so_far) < len(prompt) + 4 and so_far[-1] != tiny.END:
                    so_far.append(int(model(input_ids=torch.tensor([so_far])).logits[0, -1].argmax()))
                assert text == online_tiny.TOKENIZER.decode(so_far[len(prompt) :], skip_special_tokens=True)
    assert found[True] != found[False]
    assert online.model.training


# --- feedback that is down ---


class Down(Told):
    """Is not there at one call, and at all that follow."""

    def __init__(self, at: int):
        super().__init__(lambda prompt, number, answer: by_chance(prompt, answer.ids))
        self.at = at

    def scores(self, samples):
        if self.calls + 1 >= self.at:
            raise FeedbackUnavailable("Nobody is at home.")
        return super().scores(samples)


def test_feedback_that_is_down_at_the_first_step(tmp_path):
    with pytest.raises(FeedbackUnavailable, match=r"^Nobody is at home\.$"):
        trained(tmp_path, judge=Down(1))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_feedback_that_is_down_within_an_evaluation(tmp_path):
    """It ends with the judge's own words, and the next one counts from nothing."""
    down = Down(3)  # the second of two batches; the first asked for the policy's answers, and for the reference's
    online = online_tiny.trainer(tmp_path, judge=down, parts={"eval_dataset": online_tiny.dataset(6)})
    with pytest.raises(FeedbackUnavailable, match=r"^Nobody is at home\.$"):
        online.evaluate()
    assert not list(tmp_path.glob("checkpoint-*"))
    down.at = 100
    fresh = online_tiny.trainer(tmp_path, parts={"eval_dataset": online_tiny.dataset(6)})
    assert without_times(online.evaluate()) == without_times(fresh.evaluate())


# --- what a run is made of ---


def test_the_longest_completions_must_fit_the_budget(tmp_path):
    longest = max(len(online_tiny.ids_of(row["prompt"], finished=False)) for row in online_tiny.rows())
    for layout, selection, count, most in (
        ("flat", "best_worst", 4, longest + 2 * 6),
        ("flat", "all", 4, longest + 4 * 6),
        ("padded", "best_worst", 4, 2 * (longest + 6)),
        ("padded", "all", 3, 3 * (longest + 6)),
    ):
        how: dict[str, Any] = {"layout": layout, "pair_selection": selection, "num_generations": count}
        online_tiny.trainer(tmp_path, max_tokens_per_micro_batch=most, **how)
        with pytest.raises(
            ValueError, match=rf"may have {most} tokens, more than --max_tokens_per_micro_batch {most - 1}"
        ):
            online_tiny.trainer(tmp_path, max_tokens_per_micro_batch=most - 1, **how)


def test_parts_of_a_batch_train_the_same(tmp_path):
    whole, parts = (
        trained(tmp_path / str(budget), max_tokens_per_micro_batch=budget, generator=wordy(), num_generations=4)
        for budget in (None, 60)
    )
    tiny.assert_same_weights(tiny.weights(parts.model), tiny.weights(whole.model), atol=1e-6)


def test_cut_weights_need_a_generator_of_ones_own(tmp_path, monkeypatch):
    args = online_tiny.config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="Sampling by transformers needs the whole model on every process"):
        OnlineDPOTrainer(model=tiny.llama(), judge="random", args=args)


def test_stop_tokens_end_completions(tmp_path):
    online = online_tiny.trainer(tmp_path, stop_tokens=["<|user|>"])
    assert set(online.generator.end_ids) == {tiny.END, 2}
    with pytest.raises(ValueError, match="--stop_tokens 'ab' is 2 tokens"):
        online_tiny.trainer(tmp_path, stop_tokens=["ab"])


def test_callbacks_that_want_the_trainer_get_it(tmp_path):
    class Bound(Steps):
        def bind(self, trainer):
            self.trainer = trainer

    callback = Bound(lambda state: None)
    assert online_tiny.trainer(tmp_path, parts={"callbacks": [callback]}).callback_handler.callbacks
    assert isinstance(callback.trainer, OnlineDPOTrainer)


def test_the_model_card_says_online(tmp_path, caplog):
    online = online_tiny.trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        online.save_model()
    assert "online-dpo" in (tmp_path / "README.md").read_text()


def test_an_option_beside_a_generator_object_is_not_ignored(tmp_path):
    args = online_tiny.config(tmp_path, generator="continuous")
    with pytest.raises(ValueError, match="--generator continuous would be ignored beside a generator object"):
        online_tiny.trainer(tmp_path, generator=wordy(), parts={"args": args})
