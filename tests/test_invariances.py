"""What must not change the result of a run: layout, checkpointing, how a step is split, an interruption, a `generate`.

All through `trainer.train()`, for that is where layers are recomputed, gradients accumulated and callbacks called.
Plain gradient descent (see `tiny.config`), so that a difference in gradients reaches the weights as it is.
"""

from __future__ import annotations

import copy
import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from dpo_trainer import DPOTrainer
from dpo_trainer.models.unwrap import base_model

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "off": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
# Adapters learn at a higher rate: their B matrices start at zero, and the A matrices wait for them.
TRAINED: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 0.2},
    "lora": {"learning_rate": 1.0, "parts": {"peft_config": tiny.lora()}},
}

# float32 on CPU, the same products in another order: worst seen 1.3e-7 in a loss and 1.6e-7 in a weight, after 4 steps in
# which losses change by more than 0.02 and weights by more than 0.02 (asserted below).
LOSS_ATOL, WEIGHT_ATOL = 2e-6, 1e-6


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Any:
    """{full or lora: losses and weights} of the plainest run: padded rows, nothing recomputed."""

    @cache
    def run(trained: str) -> tuple[list[float], dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp(trained)
        trainer = tiny.trained(folder, layout="padded", **CHECKPOINTING["off"], **copy.deepcopy(TRAINED[trained]))
        assert not base_model(trainer.model).is_gradient_checkpointing
        return tiny.losses(trainer), tiny.weights(trainer.model)

    return run


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_layout_and_checkpointing_change_nothing(layout, checkpointing, trained, plain, tmp_path):
    if (layout, checkpointing) == ("padded", "off"):
        pytest.skip("the run that the others are compared with")
    losses, weights = plain(trained)
    trainer = tiny.trainer(tmp_path, layout=layout, **CHECKPOINTING[checkpointing], **copy.deepcopy(TRAINED[trained]))
    before = tiny.weights(trainer.model)
    trainer.train()
    assert trainer.layout.name == layout  # it did not fall back
    assert trainer.scorer.through_head
    assert base_model(trainer.model).is_gradient_checkpointing == (checkpointing != "off")
    assert len(losses) == 4
    assert max(losses) - min(losses) > 0.02
    assert tiny.losses(trainer) == pytest.approx(losses, rel=0, abs=LOSS_ATOL)
    assert tiny.moved(before, weights) > 0.02
    tiny.assert_same_weights(tiny.weights(trainer.model), weights, WEIGHT_ATOL)


# --- the loss of a step is the mean over its pairs ---

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("n", [24, 22, 7], ids=["full steps", "short third step", "short only step"])
def test_split_of_a_step_changes_nothing(n, trained, tmp_path):
    """3 steps of 8 pairs; of 22 rows the third has 6 (4 + 2, and 6 x 1), of 7 rows every one has 7 (4 + 3)."""
    rows = tiny.dataset(n)
    runs = {}
    for size, accumulate in SPLITS:
        trainer = tiny.trained(
            tmp_path,
            train=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            **copy.deepcopy(TRAINED[trained]),
        )
        assert trainer.state.global_step == 3
        runs[size, accumulate] = tiny.losses(trainer), tiny.weights(trainer.model)
    losses, weights = runs[8, 1]
    for split in SPLITS[1:]:
        assert runs[split][0] == pytest.approx(losses, rel=0, abs=LOSS_ATOL), split
        tiny.assert_same_weights(runs[split][1], weights, WEIGHT_ATOL)
    start = (
        tiny.weights(tiny.llama()) if trained == "full" else {n: w * 0 for n, w in weights.items() if "lora_B" in n}
    )
    assert tiny.moved(start, weights) > 1e-3


def test_split_does_not_matter_with_weights_of_rows(tmp_path):
    rows = tiny.dataset(7).add_column("weight", [0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.25])
    how = {"train": rows, "max_steps": 2}
    one = tiny.trained(tmp_path, per_device_train_batch_size=8, **how)
    many = tiny.trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **how)
    plain = tiny.trained(tmp_path, per_device_train_batch_size=8, train=tiny.dataset(7), max_steps=2)
    tiny.assert_same_weights(tiny.weights(many.model), tiny.weights(one.model), 1e-6)
    assert tiny.moved(tiny.weights(plain.model), tiny.weights(one.model)) > 1e-3  # weights do something


@pytest.mark.parametrize(
    ("options", "separable"),
    [
        ({"loss_type": ["sigmoid", "sft"]}, True),
        ({"loss_type": "ipo"}, True),
        ({"rpo_alpha": 0.5}, True),
        ({"loss_type": "aot_unpaired"}, False),
        ({"loss_type": "bco_pair"}, False),
        ({"rpo_alpha": 0.5, "rpo_normalization": "token"}, False),
    ],
    ids=str,
)
def test_what_is_said_to_be_separable_is(options, separable, tmp_path):
    """Losses that couple the pairs of a micro-batch are documented as such, and do differ."""
    how = {"max_steps": 2, "learning_rate": 0.05, **options}
    one = tiny.trained(tmp_path, per_device_train_batch_size=8, **how)
    many = tiny.trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **how)
    assert one.loss_objective.separable is separable
    far = tiny.moved(tiny.weights(one.model), tiny.weights(many.model))
    assert (far < 1e-6) if separable else (far > 1e-5)


# --- rows of several completions ---


def ranked_rows(numbers: tuple[int, ...] = (3, 2, 5, 2, 4, 2, 3), seed: int = 0) -> list[dict[str, Any]]:
    """Token ids as preparation leaves them: rows of so many completions, all compared with all, 25 pairs of 7 prompts by
    default. In most rows, some tokens are read and not scored."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(len(tiny.SPECIAL), tiny.VOCABULARY) for _ in range(draw.randint(least, most))]

    rows = []
    for i, k in enumerate(numbers):
        completions = [ids(3, 12) for _ in range(k)]
        rows.append(
            {
                "example_id": 100 + i,
                "prompt_ids": ids(2, 15),
                "chosen_ids": completions[0],
                "rejected_ids": completions[1],
                "more_ids": completions[2:],
                "pairs": [list(pair) for pair in itertools.combinations(range(k), 2)],
                "unscored": [[0, 1, 2], [k - 1, 0, 2]] if i % 3 != 1 else [],
                "weight": 1.0,
            }
        )
    return rows


def apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pair as a row of its own."""
    separate = []
    for row in rows:
        completions = [row["chosen_ids"], row["rejected_ids"], *row["more_ids"]]
        for pair in row["pairs"]:
            unscored = [[pair.index(n), start, end] for n, start, end in row["unscored"] if n in pair]
            ids = {"chosen_ids": completions[pair[0]], "rejected_ids": completions[pair[1]], "unscored": unscored}
            separate.append({**row, **ids, "more_ids": [], "pairs": [[0, 1]]})
    return separate


def trained_on(folder: Path, rows: list[dict[str, Any]], **how: Any) -> DPOTrainer:
    options: dict[str, Any] = {
        "per_device_train_batch_size": len(rows),
        "train_sampling_strategy": "sequential",
        "max_steps": 3,
        "max_length": None,
    }
    return tiny.trained(folder, train=Dataset.from_list(rows), **{**options, **how})


# Worst seen here and in splits: 1.7e-7 in a loss and 1.2e-7 in a weight, after steps that move weights by 0.01.
@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_ranked_row_is_worth_its_pairs(checkpointing, layout, tmp_path):
    """All pairs of a step weigh equally: the same losses and weights as with every pair in a row of its own."""
    rows = ranked_rows()
    want = trained_on(tmp_path, apart(rows), layout="padded", **CHECKPOINTING["off"])
    got = trained_on(tmp_path, rows, layout=layout, **CHECKPOINTING[checkpointing])
    assert got.layout.name == layout
    assert base_model(got.model).is_gradient_checkpointing == (checkpointing != "off")
    assert len(apart(rows)) == 3 + 1 + 10 + 1 + 6 + 1 + 3
    assert tiny.losses(got) == pytest.approx(tiny.losses(want), rel=0, abs=LOSS_ATOL)
    assert tiny.moved(tiny.weights(tiny.llama()), tiny.weights(want.model)) > 0.01
    tiny.assert_same_weights(tiny.weights(got.model), tiny.weights(want.model), WEIGHT_ATOL)
    per_epoch = 0
    for row in rows:
        completions = [row["chosen_ids"], row["rejected_ids"], *row["more_ids"]]
        prompts = len(completions) if layout == "padded" else 1
        per_epoch += prompts * len(row["prompt_ids"]) + sum(map(len, completions))
    assert got.num_tokens == 3 * per_epoch
    assert want.num_tokens > 1.5 * got.num_tokens


def test_weights_of_ranked_rows_are_those_of_their_pairs(tmp_path):
    rows = ranked_rows()
    for row, weight in zip(rows, (0.5, 2.0, 0.0, 1.0, 3.0, 1.0, 0.25), strict=True):
        row["weight"] = weight
    got, want = trained_on(tmp_path, rows), trained_on(tmp_path, apart(rows))
    tiny.assert_same_weights(tiny.weights(got.model), tiny.weights(want.model), WEIGHT_ATOL)
    even = trained_on(tmp_path, ranked_rows())
    assert tiny.moved(tiny.weights(even.model), tiny.weights(got.model)) > 1e-3  # weights do something


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_split_of_a_step_with_uneven_rows_changes_nothing(weighted, trained, tmp_path):
    """4 rows with 10, 1, 3 and 1 pairs: a micro-batch of one row may weigh ten times another."""
    rows = ranked_rows((5, 2, 3, 2, 2, 4, 2, 3))
    if weighted:
        rows = [row | {"weight": 0.25 * (i + 1)} for i, row in enumerate(rows)]
    runs = {}
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = trained_on(
            tmp_path,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
            **copy.deepcopy(TRAINED[trained]),
        )
        runs[size] = tiny.log_lines(trainer), tiny.weights(trainer.model)
    lines, weights = runs[4]
    for size in (2, 1):
        for name in ("loss", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
            got, want = ([line[name] for line in run] for run in (runs[size][0], lines))
            assert got == pytest.approx(want, rel=1e-6, abs=LOSS_ATOL), name
        tiny.assert_same_weights(runs[size][1], weights, WEIGHT_ATOL)
    assert lines[0]["loss"] != lines[1]["loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["ipo", "sft"]},
        {"rpo_alpha": 0.5, "rpo_normalization": "token"},
        {"ld_alpha": 0.3},
        {"use_weighting": True},
        {"loss_type": "bco_pair"},
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
    ],
    ids=str,
)
def test_every_shape_of_the_objective_sees_pairs(options, tmp_path):
    """Also what looks at tokens, at lengths or at the whole batch: a completion counts once for each pair that it is in."""
    rows, how = ranked_rows(), {"learning_rate": 0.05, "max_steps": 2, **options}
    got, want = trained_on(tmp_path, rows, **how), trained_on(tmp_path, apart(rows), **how)
    assert tiny.losses(got) == pytest.approx(tiny.losses(want), rel=1e-6, abs=LOSS_ATOL)
    assert tiny.losses(got)[0] != tiny.losses(got)[1]
    tiny.assert_same_weights(tiny.weights(got.model), tiny.weights(want.model), WEIGHT_ATOL)
    got_state, want_state = (t.loss_objective.state_dict().get("delta", {}) for t in (got, want))
    assert got_state == pytest.approx(
        want_state, rel=1e-4
    )  # the mean reward of all pairs so far: near 0, by differences
    assert bool(got_state) == (options == {"loss_type": "bco_pair"})


# --- an interruption ---

RESUMED: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"parts": {"peft_config": tiny.lora(lora_dropout=0.2)}},  # draws random numbers at every step
    "bco_pair": {"loss_type": "bco_pair"},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def run(folder: Path, resume: int | None = None, **how: Any) -> tuple[DPOTrainer, list[list[int]]]:
    """8 steps of AdamW on a falling rate, over an epoch's end (6 steps); also the rows of every micro-batch."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 8}
    saving = {} if resume else {"save_strategy": "steps", "save_steps": 1}
    trainer = tiny.trainer(folder, **options, **saving, **copy.deepcopy(how))
    rows: list[list[int]] = []
    compute_loss = trainer.compute_loss

    def recorded(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows.append(inputs["example_ids"].tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return trainer, rows


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("case", RESUMED)
def test_resume_equals_uninterrupted_to_the_bit(case, layout, tmp_path):
    """From the middle of the first epoch (step 3) and of the second (step 7), where layout and order are settled anew."""
    whole, all_rows = run(tmp_path, layout=layout, **RESUMED[case])
    size, per_step = len(all_rows[0]), RESUMED[case].get("gradient_accumulation_steps", 1)
    per_epoch = -(-22 // size)
    for step, begun in ((3, 3 * per_step), (7, per_epoch + per_step)):
        resumed, rows = run(tmp_path, resume=step, layout=layout, **RESUMED[case])
        assert rows == all_rows[begun:] != []
        assert tiny.losses(resumed) == tiny.losses(whole)
        tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))
        assert resumed.num_tokens == whole.num_tokens
        assert resumed.loss_objective.state_dict() == whole.loss_objective.state_dict()
    if case == "bco_pair":
        delta = whole.loss_objective.state_dict()["delta"]
        assert delta["count"] == 22 + 2 * 4  # pairs, over an epoch and two steps
        assert delta["mean"] != 0


def test_resume_of_a_stream(tmp_path):
    """Rows that were trained on are passed over, and no pair is seen twice or lost."""

    def stream() -> IterableDataset:
        return IterableDataset.from_generator(lambda: iter(tiny.rows(40)))

    whole, all_rows = run(tmp_path, train=stream())
    resumed, rows = run(tmp_path, resume=3, train=stream())
    assert rows == all_rows[3:]
    assert len({example_id for batch in all_rows for example_id in batch}) == 8 * 4
    tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))


# --- the model is left as it came ---


def generated(model: nn.Module) -> list[str]:
    """Two prompts of unequal length, left-padded, continued greedily."""
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    prompts = tokenizer(["the cat eats", "owl"], return_tensors="pt", padding=True)
    prompts.pop("token_type_ids", None)
    training = model.training
    model.eval()
    with torch.no_grad():
        tokens = model.generate(**prompts, max_new_tokens=8, do_sample=False, use_cache=True)
    model.train(training)
    return tokenizer.batch_decode(tokens)


class GeneratesBetweenSteps(TrainerCallback):
    """Compares the model in training with an untouched one of the same weights after every step, and after evaluation."""

    def __init__(self, untouched: nn.Module):
        self.untouched = untouched
        self.texts: list[list[str]] = []

    def look(self, model: nn.Module) -> None:
        self.untouched.load_state_dict(model.state_dict())
        assert generated(model) == generated(self.untouched)
        assert with_own_parts(model) == with_own_parts(self.untouched)
        self.texts.append(generated(model))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.look(model)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.look(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.look(model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.look(model)

    def on_log(self, args, state, control, model=None, **kwargs):
        self.look(model)


def with_own_parts(model: nn.Module) -> dict[str, Any]:
    """What the scorer exchanges for the time of a step."""
    base = base_model(model)
    return {
        "attention": base.config._attn_implementation,
        "attention of the decoder": base.model.config._attn_implementation,
        "head": "forward" in vars(base.get_output_embeddings()),
        "softcap": getattr(base.config, "final_logit_softcapping", None),
    }


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_generate_before_during_and_after(adapter, checkpointing, tmp_path):
    def made() -> nn.Module:
        return get_peft_model(tiny.llama(), tiny.lora()) if adapter else tiny.llama()

    model, untouched = made(), made()
    before = generated(model)
    callback = GeneratesBetweenSteps(untouched)
    trainer = tiny.trainer(
        tmp_path,
        model=model,
        layout="flat",
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1.0,
        eval_strategy="steps",
        eval_steps=1,
        parts={"callbacks": [callback], "eval_dataset": tiny.dataset(5, seed=2)},
        **CHECKPOINTING[checkpointing],
    )
    if adapter:  # the frozen copy of it; the untouched model gets one too, to have the same weights by name
        untouched.add_adapter("ref", tiny.lora())
    trainer.train()
    assert len(callback.texts) > 3 * 3
    assert callback.texts[0] == before
    assert callback.texts[-1] != before  # training changed what the model says
    callback.look(trainer.model)


def test_config_and_modules_are_as_they_were(tmp_path):
    """What a saved config would say, and which functions the modules call. (`use_cache` is the Trainer's own option.)"""
    model = tiny.llama(attn_implementation="eager")
    before = model.config.to_dict(), with_own_parts(model), {n: type(m) for n, m in model.named_modules()}
    trainer = tiny.trainer(tmp_path, model=model, layout="flat", max_steps=2)
    trainer.train()
    trainer.evaluate(tiny.dataset(5))
    assert trainer.model is model
    assert with_own_parts(model) == before[1]
    assert before[1]["attention"] == "eager"
    assert {n: type(m) for n, m in model.named_modules()} == before[2]
    after = model.config.to_dict()
    assert {k for k, v in after.items() if before[0].get(k) != v} <= {"use_cache"}


class Interrupted(Exception):
    pass


class Interrupts(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise Interrupted


@pytest.mark.parametrize("where", ["forward", "backward", "callback"])
def test_model_is_as_it_was_after_an_exception(where, tmp_path):
    """Ctrl-C in a notebook: the next cell generates."""
    model = tiny.llama()
    want = with_own_parts(model), generated(model)
    trainer = tiny.trainer(
        tmp_path,
        model=model,
        layout="flat",
        gradient_accumulation_steps=2,
        parts={"callbacks": [Interrupts()]} if where == "callback" else None,
    )

    def die(*args: Any) -> None:
        raise Interrupted

    layer = model.model.layers[1]
    trainer.layout.settled = True  # its check takes an exception in flat rows for a verdict on the layout
    if where == "forward":
        layer.register_forward_pre_hook(die)
    elif where == "backward":
        layer.register_full_backward_hook(die)
    with pytest.raises(Interrupted):
        trainer.train()
    for hooks in (layer._forward_pre_hooks, layer._backward_hooks):
        hooks.clear()
    assert (with_own_parts(model), generated(model)) == want
    assert not isinstance(model, PeftModel)
