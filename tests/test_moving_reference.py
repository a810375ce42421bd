"""A reference that follows the policy is the equation of its paper, at its moments; and which adapter is the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from dpo_trainer import DPOTrainer
from dpo_trainer.reference import DisabledAdapter, MovingAdapter, MovingModel, NamedAdapter, moving
from dpo_trainer.types import PairBatch

LN2 = math.log(2)


def moving_trainer(folder: Path, *, watch: Callable[[DPOTrainer], None] | None = None, **how: Any) -> DPOTrainer:
    """A trainer with `sync_ref_model`; `watch` is called at the end of each step."""
    trainer = tiny.trainer(folder, sync_ref_model=True, **how)
    if watch is not None:
        trainer.add_callback(AtStepEnd(lambda: watch(trainer)))
    return trainer


class AtStepEnd(TrainerCallback):
    def __init__(self, do: Callable[[], None]):
        self.do = do

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.do()


def continued(**options: Any) -> PeftModel:
    """A model with an adapter that is far from zero."""
    model = get_peft_model(tiny.llama(), tiny.lora(**options))
    tiny.fill_adapters(model)
    return model


def named_by_a_part_of_the_model() -> PeftModel:
    """Every parameter has "model" in its name, and those of the adapter have it once more."""
    model = get_peft_model(tiny.llama(), tiny.lora(), adapter_name="model")
    tiny.fill_adapters(model)
    return model


def soft_prompt() -> PeftModel:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(tiny.llama(), config)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "full_tied": lambda: {"model": tiny.llama(tie_word_embeddings=True)},
    "ref_model": lambda: {"parts": {"ref_model": tiny.llama(seed=7)}},
    "fresh_lora": lambda: {"parts": {"peft_config": tiny.lora()}},
    "continued_lora": lambda: {"model": continued()},
    "continued_dora": lambda: {"model": continued(use_dora=True)},
    "modules_to_save": lambda: {"model": continued(modules_to_save=["lm_head"])},
    "adapter_named_model": lambda: {"model": named_by_a_part_of_the_model()},
    "soft_prompt": lambda: {"model": soft_prompt(), "layout": "padded"},
}
STARTS_APART = {"ref_model"}


def both(trainer: DPOTrainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the weights of reference and policy, under the same names."""
    if trainer.reference.own:
        return tiny.weights(trainer.reference.own[0][1]), tiny.weights(trainer.model)
    weights = tiny.weights(trainer.model)
    trained = trainer.model.active_adapter
    end = {name: name[::-1].replace("fer.", f"{trained[::-1]}.", 1)[::-1] for name in weights if ".ref" in name}
    assert set(end.values()) <= set(weights)
    return {name: weights[name] for name in end}, {name: weights[twin] for name, twin in end.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys() != set()
    return tiny.moved(one, other)


def first_batch(trainer: DPOTrainer) -> PairBatch:
    return PairBatch.from_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))


def reference_logps(trainer: DPOTrainer) -> Tensor:
    """[2N] nats."""
    logps = trainer.reference.logps(trainer.model, first_batch(trainer))
    return torch.cat([logps.chosen, logps.rejected])


# --- the equation ---


@dataclass
class Run:
    """5 steps of SGD, moved at steps 2 and 4 with alpha 0.3."""

    case: str
    trainer: DPOTrainer
    start: dict[str, Tensor]
    policy_at_start: dict[str, Tensor]
    policies: list[dict[str, Tensor]]
    """After each step."""


HOW: dict[str, Any] = {"max_steps": 5, "learning_rate": 0.5, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory) -> Run:
    policies: list[dict[str, Tensor]] = []
    folder = tmp_path_factory.mktemp("run")
    trainer = moving_trainer(
        folder, watch=lambda trainer: policies.append(both(trainer)[1]), **HOW, **CASES[request.param]()
    )
    start, policy = both(trainer)
    trainer.train()
    return Run(request.param, trainer, start, policy, policies)


def test_reference_is_the_closed_form(run):
    """0.3 p4 + 0.7 (0.3 p2 + 0.7 start), in float64 by hand."""
    assert isinstance(run.trainer.reference, MovingModel if run.trainer.reference.own else MovingAdapter)
    assert "moving" in run.trainer.reference.description
    assert (distance(run.start, run.policy_at_start) == 0) is (run.case not in STARTS_APART)
    want = {
        name: 0.3 * run.policies[3][name].double()
        + 0.7 * (0.3 * run.policies[1][name].double() + 0.7 * start.double())
        for name, start in run.start.items()
    }
    reference, policy = both(run.trainer)
    # Weights up to 2, each move rounds three times by at most 2^-24 of that: 4e-7 each.
    tiny.assert_same_weights({name: weight.double() for name, weight in reference.items()}, want, atol=1e-6)
    # Else a reference that stays, or that is the policy, would pass as well.
    assert distance(reference, run.start) > 1e-3
    assert distance(reference, policy) > 1e-3


def test_it_never_asks_for_gradients(run):
    trainable = {name for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any(".ref" in name for name in trainable)
    assert not any(p.requires_grad for _, model in run.trainer.reference.own for p in model.parameters())


def test_state_through_safetensors(run, tmp_path):
    """What one run writes, another run with the same settings takes up, to the bit and in place."""
    save_file(run.trainer.reference.state(), tmp_path / "reference.safetensors")
    state = load_file(tmp_path / "reference.safetensors")
    if run.case == "full_tied":
        assert "model.embed_tokens.weight" in state
        assert "lm_head.weight" not in state

    again = moving_trainer(tmp_path, **HOW, **CASES[run.case]())
    want, _ = both(run.trainer)
    assert distance(both(again)[0], want) > 1e-3
    again.reference.load_state(state)
    tiny.assert_same_weights(both(again)[0], want)
    if again.reference.own:  # inside a policy, the log-probs would be those of both
        assert torch.equal(reference_logps(again), reference_logps(run.trainer))
    if run.case == "full_tied":
        model = again.reference.own[0][1]
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("run", ["fresh_lora", "continued_dora"], indirect=True)
def test_a_saved_adapter_has_the_reference_beside_it(run, tmp_path):
    """`ref/` in the folder is where the reference went, and the root the trained adapter."""
    run.trainer.save_model(tmp_path)
    for name, folder in {"default": tmp_path, "ref": tmp_path / "ref"}.items():
        tiny.assert_same_weights(adapter(peft_model(folder)), adapter(run.trainer.model, name))
    assert distance(adapter(run.trainer.model), adapter(run.trainer.model, "ref")) > 1e-3


def margins(trainer: DPOTrainer) -> list[float]:
    return [line["rewards/margins"] for line in tiny.log_lines(trainer)]


@pytest.mark.parametrize("case", ["full", "fresh_lora", "continued_dora", "modules_to_save"])
def test_a_reference_that_is_replaced_each_step_leaves_no_margin(case, tmp_path):
    """alpha = 1 after each step: every step begins with policy = reference, so that its loss is ln 2 again."""
    options = {"max_steps": 3, "learning_rate": 0.5, **CASES[case]()}
    trainer = moving_trainer(tmp_path, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1, **options)
    trainer.train()
    assert tiny.losses(trainer) == [pytest.approx(LN2, abs=2e-6)] * 3  # float32 sums of 200 nats, times beta 0.1
    assert margins(trainer) == [pytest.approx(0, abs=5e-6)] * 3
    reference, policy = both(trainer)
    assert distance(reference, policy) == 0


@pytest.mark.parametrize(("case", "alpha"), [("full", None), ("fresh_lora", 0.5)])
def test_other_references_leave_one(case, alpha, tmp_path):
    """The guard of the test above: one that stays, and one that goes half the way."""
    options = {"max_steps": 3, "learning_rate": 0.5, **CASES[case]()}
    if alpha is None:
        trainer = tiny.trained(tmp_path, **options)
    else:
        trainer = moving_trainer(tmp_path, ref_model_mixup_alpha=alpha, ref_model_sync_steps=1, **options)
        trainer.train()
    assert [abs(margin) > 1e-3 for margin in margins(trainer)] == [False, True, True]


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(st.integers(0, 2**32 - 1), DTYPES, DTYPES, st.floats(0.01, 1.0))
def test_mix_in_any_dtypes(seed, own, other, alpha):
    numbers = torch.Generator().manual_seed(seed)
    reference = nn.Parameter(torch.randn(3, 5, generator=numbers).to(own), requires_grad=False)
    policy = nn.Parameter(torch.randn(3, 5, generator=numbers).to(other))
    want = alpha * policy.detach().double() + (1 - alpha) * reference.double()
    address, before = reference.data_ptr(), policy.detach().clone()

    moving.mix(reference, policy, alpha)

    # One rounding to the dtype of the reference, of numbers up to 5; and three in the wider one of policy and reference.
    scale = 5 * max(torch.finfo(own).eps, 2 * torch.finfo(torch.promote_types(own, other)).eps)
    assert (reference.double() - want).abs().max() <= scale
    assert (reference.dtype, reference.data_ptr(), reference.requires_grad) == (own, address, False)
    assert torch.equal(policy, before)


@given(st.integers(0, 2**32 - 1), DTYPES, DTYPES)
def test_alpha_of_1_is_a_copy(seed, own, other):
    numbers = torch.Generator().manual_seed(seed)
    reference, policy = torch.randn(7, generator=numbers).to(own), torch.randn(7, generator=numbers).to(other)
    assert not torch.equal(reference, policy.to(own))
    moving.mix(reference, policy, 1.0)
    assert torch.equal(reference, policy.to(own))


def test_a_narrow_reference_is_mixed_in_the_wide_dtype():
    """Above 1, bfloat16 steps by 2^-7 = 0.0078. 1 + 0.55 * 0.0065 = 1.0036 lies below half a step, and rounds to 1.

    Had the policy's 1.0065 been rounded first, to 1.0078, the mix would be 1.0043, and round to 1.0078.
    """
    reference = torch.tensor([1.0], dtype=torch.bfloat16)
    moving.mix(reference, torch.tensor([1.0065]), 0.55)
    assert reference.item() == 1.0
    moving.mix(reference, torch.tensor([1.0078]), 0.55)  # 0.0043: over half a step
    assert reference.item() == 1 + 2**-7


class WithBuffers(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("running_mean", torch.full((2,), value))
        self.register_buffer("positions", torch.arange(2))
        self.register_buffer("frequencies", torch.full((2,), value), persistent=False)


def test_buffers_that_are_saved_move_too():
    policy, model = WithBuffers(1.0), WithBuffers(0.0)
    reference = MovingModel(model, scorer=None, description="", policy=policy)
    reference.move(policy, 0.25)
    assert model.weight.tolist() == model.running_mean.tolist() == [0.25, 0.25]
    assert model.frequencies.tolist() == [0.0, 0.0]
    assert model.positions.tolist() == [0, 1]
    assert set(reference.state()) == {"weight", "running_mean"}


# --- when ---


def moves(trainer: DPOTrainer) -> list[int]:
    """Train, and list the steps after which the reference moved."""
    steps: list[int] = []
    trainer.reference.move = lambda policy, alpha: steps.append(trainer.state.global_step)
    trainer.train()
    return steps


def test_every_so_many_steps(tmp_path):
    assert moves(moving_trainer(tmp_path, max_steps=8, ref_model_sync_steps=3)) == [3, 6]


@pytest.mark.parametrize(("accumulation", "period", "want"), [(1, 1, [3, 6, 9]), (2, 1, [2, 4, 6]), (2, 2, [4])])
def test_every_so_many_epochs(accumulation, period, want, tmp_path):
    """12 rows in batches of 4 are 3 batches: 3 steps, or 2 (of 2 batches and of 1)."""
    trainer = moving_trainer(
        tmp_path,
        train=tiny.dataset(12),
        max_steps=-1,
        num_train_epochs=3,
        gradient_accumulation_steps=accumulation,
        ref_model_sync_epochs=period,
    )
    assert moves(trainer) == want


def test_a_checkpoint_holds_the_reference_after_the_move(tmp_path):
    """3 steps are an epoch: what is written at step 3 sees what moved at the end of the epoch."""
    at_save: list[float] = []

    class Watch(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            at_save.append(distance(*both(trainer)))

    trainer = moving_trainer(
        tmp_path,
        train=tiny.dataset(12),
        max_steps=4,
        learning_rate=0.5,
        ref_model_mixup_alpha=1.0,
        ref_model_sync_epochs=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.add_callback(Watch())
    trainer.train()
    assert [far == 0 for far in at_save] == [False, False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 4}, r"the reference moves every 512 steps, and the run has 4. Lower --ref_model_sync_steps"),
        ({"max_steps": 4, "ref_model_sync_steps": 4}, r"every 4 steps, and the run has 4"),
        ({"max_steps": 4, "ref_model_sync_epochs": 1}, r"every 1 epochs, and the run ends with epoch 1.*_sync_steps"),
        (
            {"max_steps": -1, "num_train_epochs": 1.5, "ref_model_sync_epochs": 2},
            r"every 2 epochs, and the run ends with epoch 2",
        ),
    ],
    ids=str,
)
def test_a_reference_that_would_never_move(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        moving_trainer(tmp_path, **options).train()


def test_epochs_of_a_stream_of_unknown_length(tmp_path):
    stream = IterableDataset.from_generator(tiny.rows)
    trainer = moving_trainer(tmp_path, train=stream, max_steps=4, ref_model_sync_epochs=1)
    with pytest.raises(ValueError, match=r"--ref_model_sync_epochs 1 counts epochs.*use --ref_model_sync_steps"):
        trainer.train()
    assert moves(moving_trainer(tmp_path, train=stream, max_steps=4, ref_model_sync_steps=2)) == [2, 4]


# --- checkpoints of it ---


def test_state_of_another_reference(tmp_path):
    full = moving_trainer(tmp_path, ref_model_sync_steps=1).reference
    lora = moving_trainer(tmp_path, ref_model_sync_steps=1, **CASES["fresh_lora"]()).reference
    stays = tiny.trainer(tmp_path).reference
    tied = moving_trainer(tmp_path, ref_model_sync_steps=1, **CASES["full_tied"]()).reference
    for reference, state, difference in [
        (full, lora.state(), "model.embed_tokens.weight is missing"),
        (lora, {}, "is missing"),
        (full, tied.state(), "lm_head.weight is missing"),
        (tied, full.state(), "lm_head.weight is one too many"),
        (
            full,
            full.state() | {"model.norm.weight": torch.ones(7)},
            r"norm.weight has the shape \(7,\) instead of \(32,",
        ),
    ]:
        before = {name: weight.clone() for name, weight in reference.state().items()}
        with pytest.raises(ValueError, match=rf"holds another moving reference.*{difference}.*Resume with the model"):
            reference.load_state(state)
        tiny.assert_same_weights(reference.state(), before)
    with pytest.raises(ValueError, match=r"holds a reference that moved, and this run's stays.*--sync_ref_model"):
        stays.load_state(full.state())


def test_references_that_stay_have_no_state(tmp_path):
    for how in ({}, {"parts": {"peft_config": tiny.lora()}}, {"model": continued()}, {"loss_type": "simpo"}):
        reference = tiny.trainer(tmp_path, **how).reference
        assert not reference.moving
        assert reference.state() == {}
        reference.load_state({})


# --- refusals of what cannot move ---


@pytest.mark.parametrize(
    ("ref_model", "difference"),
    [
        (lambda: tiny.llama(num_hidden_layers=1), r"model.layers.1.self_attn.q_proj.weight is missing"),
        (lambda: tiny.llama(num_hidden_layers=3), r"model.layers.2.self_attn.q_proj.weight is one too many"),
        (lambda: tiny.llama(intermediate_size=40), r"gate_proj.weight has the shape \(40, 32\) instead of \(48, 32\)"),
        (lambda: tiny.llama(tie_word_embeddings=True), "lm_head.weight is missing"),
        (continued, "model.embed_tokens.weight is missing"),
    ],
    ids=["fewer layers", "more layers", "another size", "tied", "with an adapter"],
)
def test_ref_model_of_another_architecture(ref_model, difference, tmp_path):
    with pytest.raises(ValueError, match=rf"they differ: in ref_model, \S*{difference}.*Give a ref_model of the same"):
        moving_trainer(tmp_path, parts={"ref_model": ref_model()})
    tiny.trainer(tmp_path, parts={"ref_model": ref_model()})  # one that stays may be anything


def test_ref_model_that_is_offloaded(tmp_path):
    reference = tiny.llama()
    reference.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"in ref_model, model.norm.weight is offloaded"):
        moving_trainer(tmp_path, parts={"ref_model": reference})


def test_weights_that_are_trained_beside_the_adapter(tmp_path):
    model = continued()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model.norm.weight is trained without being part of the adapter.*Freeze it"):
        moving_trainer(tmp_path, model=model)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"reference_free": True}, "--reference_free asks for none"), ({"loss_type": "simpo"}, "none of the losses")],
    ids=str,
)
def test_no_reference_to_move(options, why, tmp_path):
    with pytest.raises(ValueError, match=rf"--sync_ref_model moves the reference, but {why}"):
        moving_trainer(tmp_path, **options)


# --- which adapter is the reference ---


def test_a_fresh_adapter_with_a_reference_of_its_own(tmp_path):
    """Its B is zero, so that the copy gives the numbers of the base, before and after training."""
    options = {"max_steps": 3, "learning_rate": 0.5, "parts": {"peft_config": tiny.lora()}}
    plain = tiny.trainer(tmp_path, **options)
    separate = tiny.trainer(tmp_path, use_separate_reference_adapter=True, **options)
    assert isinstance(plain.reference, DisabledAdapter)
    assert isinstance(separate.reference, NamedAdapter)
    before = reference_logps(plain)
    assert torch.equal(reference_logps(separate), before)
    plain.train()
    separate.train()
    assert torch.equal(reference_logps(separate), before)
    assert tiny.losses(separate) == tiny.losses(plain)
    assert tiny.losses(separate)[-1] != tiny.losses(separate)[0]


def test_a_continued_adapter_with_its_base_as_the_reference(tmp_path):
    trainer = tiny.trainer(tmp_path, model=continued(), use_separate_reference_adapter=False, max_steps=2)
    assert isinstance(trainer.reference, DisabledAdapter)
    assert "'default' off (the first loss need not be ln 2)" in trainer.reference.description
    assert list(trainer.model.peft_config) == ["default"]
    base = reference_logps(tiny.trainer(tmp_path))
    torch.testing.assert_close(reference_logps(trainer), base, rtol=0, atol=1e-4)  # sums of up to 200 nats
    before = reference_logps(trainer)
    trainer.train()
    assert abs(tiny.losses(trainer)[0] - LN2) > 1e-3
    assert torch.equal(reference_logps(trainer), before)


@pytest.mark.parametrize("init", ["pissa", "olora", False])
@pytest.mark.parametrize("fresh", [True, False])
def test_an_adapter_that_does_not_begin_at_zero_is_its_own_reference(init, fresh, tmp_path):
    """PiSSA and OLoRA move a part of the base into the adapter: the base alone is no model, and copying must not do it twice."""
    config = tiny.lora(init_lora_weights=init)
    model = tiny.llama() if fresh else get_peft_model(tiny.llama(), config)
    before = tiny.weights(model)
    trainer = tiny.trainer(tmp_path, model=model, parts={"peft_config": config} if fresh else {})
    assert isinstance(trainer.reference, NamedAdapter)
    if not fresh:
        after = {name: weight for name, weight in tiny.weights(trainer.model).items() if ".ref" not in name}
        tiny.assert_same_weights(after, before)
    with torch.no_grad():
        policy = trainer.scorer(trainer.model, first_batch(trainer))
    assert torch.equal(reference_logps(trainer), torch.cat([policy.chosen, policy.rejected]))
    with torch.no_grad(), trainer.model.disable_adapter():
        below = trainer.scorer(trainer.model, first_batch(trainer))
    assert (below.chosen - policy.chosen).abs().max() > 1e-2  # so that adapter off is another model
    assert trainer.model.peft_config["default"].init_lora_weights == init


@pytest.mark.parametrize("value", [True, False])
def test_separate_adapter_of_a_model_without_one(value, tmp_path):
    with pytest.raises(ValueError, match=rf"--use_separate_reference_adapter {value} is about the adapter.*has none"):
        tiny.trainer(tmp_path, use_separate_reference_adapter=value)


@pytest.mark.parametrize("value", [True, False])
def test_separate_adapter_beside_another_reference(value, tmp_path):
    option = {"use_separate_reference_adapter": value}
    with pytest.raises(ValueError, match="Both ref_model and --use_separate_reference_adapter name a reference"):
        tiny.trainer(tmp_path, model=continued(), parts={"ref_model": tiny.llama()}, **option)
    model = continued()
    model.add_adapter("before", tiny.lora())
    with pytest.raises(ValueError, match="Both --ref_adapter_name and --use_separate_reference_adapter name"):
        tiny.trainer(tmp_path, model=model, ref_adapter_name="before", **option)
    with pytest.raises(ValueError, match="given by --use_separate_reference_adapter, but none of the losses"):
        tiny.trainer(tmp_path, model=continued(), loss_type="simpo", **option)


def test_one_adapter_named_twice(tmp_path):
    model = continued()
    model.add_adapter("style", tiny.lora())
    with pytest.raises(ValueError, match=r"--ref_adapter_name 'style' is the adapter that is trained"):
        tiny.trainer(tmp_path, model=model, model_adapter_name="style", ref_adapter_name="style")


# --- chains: SFT, then DPO, then DPO ---

LIVE = {"r": 3, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.25}
RECORDED = {"inference_mode", "base_model_name_or_path"}  # what loading itself fills in


def settings(model: PeftModel) -> dict[str, Any]:
    return {key: value for key, value in model.peft_config["default"].to_dict().items() if key not in RECORDED}


def test_the_adapter_of_one_stage_is_the_reference_of_the_next(tmp_path):
    """SFT, DPO on it by name, DPO on that as a PeftModel."""
    base, folders = tmp_path / "base", [tmp_path / "sft", tmp_path / "dpo", tmp_path / "dpo2"]
    tiny.llama().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    options = {"max_steps": 2, "learning_rate": 2.0, "disable_lora_dropout": True}
    sft = tiny.trained(
        folders[0], model=str(base), loss_type="sft", parts={"peft_config": tiny.lora(**LIVE)}, **options
    )
    sft.save_model()
    start, previous = settings(sft.model), adapter(sft.model)
    assert start.items() >= LIVE.items()
    for load, came_from, folder in zip((str, peft_model), folders, folders[1:], strict=False):
        dpo = tiny.trainer(folder, model=load(came_from), **options)
        assert settings(dpo.model) == start
        tiny.assert_same_weights(adapter(dpo.model), previous)
        tiny.assert_same_weights(adapter(dpo.model, "ref"), previous)
        dpo.train()
        line = tiny.log_lines(dpo)[0]
        assert line["loss"] == pytest.approx(0.693147, abs=1e-6)
        assert line["rewards/margins"] == pytest.approx(0, abs=5e-6)
        trainable = {name for name, p in dpo.model.named_parameters() if p.requires_grad}
        assert trainable == {name for name in tiny.weights(dpo.model) if ".default" in name} != set()
        tiny.assert_same_weights(adapter(dpo.model, "ref"), previous)
        assert distance(adapter(dpo.model), previous) > 1e-3
        dpo.save_model()
        previous = adapter(dpo.model)
        assert (folder / "adapter_model.safetensors").is_file()
        assert (folder / "ref" / "adapter_model.safetensors").is_file()


def peft_model(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)


def adapter(model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    """Its weights under names without its own."""
    return {n.replace(f".{name}", ""): w for n, w in tiny.weights(model).items() if "lora_" in n and f".{name}" in n}


def test_lora_dropout_of_the_trained_adapter_stays(tmp_path):
    """The copied adapter is asked without dropout, the trained one keeps it."""
    trainer = tiny.trainer(tmp_path, model=continued(lora_dropout=0.25), max_steps=1)
    assert trainer.model.peft_config["default"].lora_dropout == 0.25
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.25
    assert torch.equal(reference_logps(trainer), reference_logps(trainer))
