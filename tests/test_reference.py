"""Whatever it comes from, the reference is the model that training started from, and stays it to the bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_trainer import DPOTrainer
from dpo_trainer.reference import DisabledAdapter, FrozenModel, NamedAdapter, NoReference
from dpo_trainer.types import PairBatch

LAYOUTS = ["flat", "padded"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


def trained_adapter(kind: str = "lora", name: str = "style", seed: int = 1) -> PeftModel:
    """A model with an adapter that is far from zero, and not called "default"."""
    model = get_peft_model(tiny.llama(), tiny.lora(**KINDS[kind]), adapter_name=name)
    tiny.fill_adapters(model, seed)
    return model


# --- every strategy: {name: folder -> (what to give the trainer, the strategy it should choose, what of it is trained)} ---

Case = tuple[dict[str, Any], type, Callable[[str], bool]]


def everything(name: str) -> bool:
    return True


def frozen_copy(folder: Path) -> Case:
    return {}, FrozenModel, everything


def model_object(folder: Path) -> Case:
    return {"parts": {"ref_model": tiny.llama()}}, FrozenModel, everything


def model_path(folder: Path) -> Case:
    tiny.llama().save_pretrained(folder / "reference")
    return {"parts": {"ref_model": str(folder / "reference")}}, FrozenModel, everything


def model_object_beside_an_adapter(folder: Path) -> Case:
    parts = {"ref_model": tiny.llama(), "peft_config": tiny.lora()}
    return {"parts": parts}, FrozenModel, lambda name: "lora_" in name


def disabled(kind: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        return {"parts": {"peft_config": tiny.lora(**KINDS[kind])}}, DisabledAdapter, lambda name: ".default" in name

    return case


def continued(kind: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        return {"model": trained_adapter(kind)}, NamedAdapter, lambda name: ".style" in name

    return case


def named(folder: Path) -> Case:
    """Two adapters with the same weights: the one is trained, the other the reference."""
    model = trained_adapter()
    model.add_adapter("start", tiny.lora())
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if ".style" in name:
                parameters[name.replace(".style", ".start")].copy_(parameter)
    options = {"model": model, "model_adapter_name": "style", "ref_adapter_name": "start"}
    return options, NamedAdapter, lambda name: ".style" in name


CASES: dict[str, Callable[[Path], Case]] = {
    "frozen_copy": frozen_copy,
    "model_object": model_object,
    "model_path": model_path,
    "model_object_beside_an_adapter": model_object_beside_an_adapter,
    **{f"disabled_{kind}": disabled(kind) for kind in KINDS},
    **{f"continued_{kind}": continued(kind) for kind in KINDS},
    "named_adapters": named,
}


def first_batch(trainer: DPOTrainer, n: int = 4) -> PairBatch:
    return PairBatch.from_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(n)]))


def reference_logps(trainer: DPOTrainer, batch: PairBatch) -> torch.Tensor:
    """[2N] nats."""
    logps = trainer.reference.logps(trainer.model, batch)
    return torch.cat([logps.chosen, logps.rejected])


def policy_logps(trainer: DPOTrainer, batch: PairBatch) -> torch.Tensor:
    with torch.no_grad():
        logps = trainer.scorer(trainer.model, batch)
    return torch.cat([logps.chosen, logps.rejected])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_start_and_stays_it(case, layout, tmp_path):
    given, strategy, is_trained = CASES[case](tmp_path)
    trainer = tiny.trainer(tmp_path, layout=layout, max_steps=3, learning_rate=0.5, **given)
    assert isinstance(trainer.reference, strategy)
    batch = first_batch(trainer)
    before = reference_logps(trainer, batch)
    torch.testing.assert_close(policy_logps(trainer, batch), before, rtol=0, atol=1e-4)  # sums of up to 200 nats
    policy = tiny.weights(trainer.model)
    own = [tiny.weights(model) for _, model in trainer.reference.own]

    trainer.train()

    line = tiny.log_lines(trainer)[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=2e-6)  # float32 sums of 200 nats, times beta 0.1
    assert line["rewards/margins"] == pytest.approx(0, abs=5e-6)
    # Nothing of the reference moved or became trainable, to the bit.
    assert torch.equal(reference_logps(trainer, batch), before)
    for (_, model), start in zip(trainer.reference.own, own, strict=True):
        tiny.assert_same_weights(tiny.weights(model), start)
        assert not any(p.requires_grad for p in model.parameters())
    # Exactly what should be trained is trainable and was trained.
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable == {name for name in policy if is_trained(name)} != set()
    still = {name for name, p in trainer.model.named_parameters() if torch.equal(p, policy[name])}
    assert still == set(policy) - trainable
    # The policy did leave its start, or all of the above would hold for a trainer that does nothing.
    assert (policy_logps(trainer, batch) - before).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_that_differs_is_used_as_it_is(layout, tmp_path):
    """The log-probs of an explicit reference are those of that model, and the first loss is not ln 2."""
    other = tiny.llama(seed=7)
    trainer = tiny.trainer(tmp_path, layout=layout, max_steps=1, parts={"ref_model": other})
    batch = first_batch(trainer)
    alone = tiny.trainer(tmp_path, layout=layout, model=tiny.llama(seed=7))
    torch.testing.assert_close(reference_logps(trainer, batch), policy_logps(alone, batch), rtol=0, atol=1e-4)
    trainer.train()
    assert abs(tiny.losses(trainer)[0] - math.log(2)) > 0.01


def test_explicit_reference_may_carry_an_adapter(tmp_path):
    reference = trained_adapter()
    trainer = tiny.trainer(tmp_path, max_steps=2, parts={"ref_model": reference})
    batch = first_batch(trainer)
    alone = tiny.trainer(tmp_path, model=trained_adapter())
    torch.testing.assert_close(reference_logps(trainer, batch), policy_logps(alone, batch), rtol=0, atol=1e-4)
    before = reference_logps(trainer, batch)
    trainer.train()
    assert torch.equal(reference_logps(trainer, batch), before)
    assert not any(p.requires_grad for p in reference.parameters())


# --- the live policy, not a reload by name ---


def merged(base: torch.nn.Module) -> torch.nn.Module:
    model = get_peft_model(base, tiny.lora())
    tiny.fill_adapters(model)
    return model.merge_and_unload().requires_grad_(True)  # PEFT leaves it frozen


def resized(base: torch.nn.Module) -> torch.nn.Module:
    base.resize_token_embeddings(tiny.VOCABULARY + 8)
    return base


def changed_in_memory(base: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.3)
    return base


@pytest.mark.parametrize("change", [merged, resized, changed_in_memory])
def test_frozen_copy_is_the_live_model(change, tmp_path):
    """`config._name_or_path` still names the folder of the model as it was before."""
    tiny.llama().save_pretrained(tmp_path / "start")
    model = change(AutoModelForCausalLM.from_pretrained(tmp_path / "start"))
    assert model.config._name_or_path == str(tmp_path / "start")
    trainer = tiny.trainer(tmp_path, model=model, max_steps=1)
    batch = first_batch(trainer)
    before = policy_logps(trainer, batch)
    reload = tiny.trainer(tmp_path, model=AutoModelForCausalLM.from_pretrained(tmp_path / "start"))
    assert (policy_logps(reload, batch) - before).abs().max() > 1e-3  # a reload would be another model
    trainer.train()
    assert torch.equal(reference_logps(trainer, batch), before)
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-6)


def test_frozen_copy_shares_no_memory_with_the_policy(tmp_path):
    trainer = tiny.trainer(tmp_path)
    (_, reference), *rest = trainer.reference.own
    assert not rest
    addresses = {p.data_ptr() for p in trainer.model.parameters()}
    assert addresses.isdisjoint(p.data_ptr() for p in reference.parameters())


# --- continued adapters ---


def test_continued_adapter_is_copied_whatever_it_is_called(tmp_path):
    model = trained_adapter(name="my-style.v2".replace(".", "_"))
    start = {n: w for n, w in tiny.weights(model).items() if "lora_" in n}
    trainer = tiny.trainer(tmp_path, model=model)
    assert set(trainer.model.peft_config) == {"my-style_v2", "ref"}
    copied = {n.replace(".ref", ".my-style_v2"): w for n, w in tiny.weights(trainer.model).items() if ".ref" in n}
    tiny.assert_same_weights(copied, start)
    assert trainer.model.active_adapter == "my-style_v2"
    assert "'my-style_v2'" in trainer.reference.description


def test_the_second_run_over_one_model_starts_from_where_the_first_ended(tmp_path):
    """DPO after DPO in one process: the `ref` adapter of the first run is in the way, and the error says how to go on."""
    first = tiny.trained(tmp_path, model=trained_adapter(), max_steps=1)
    with pytest.raises(ValueError, match=r"already has an adapter 'ref'.*--ref_adapter_name ref"):
        tiny.trainer(tmp_path, model=first.model)
    first.model.delete_adapter("ref")
    second = tiny.trained(tmp_path, model=first.model, max_steps=1)
    assert tiny.losses(second)[0] == pytest.approx(math.log(2), abs=2e-6)


def test_frozen_parts_of_the_trained_adapter_stay_frozen(tmp_path):
    """A user who trains only the B matrices (LoRA-FA): switching adapters must not thaw the others."""
    for given in ({"model": trained_adapter()}, {"parts": {"peft_config": tiny.lora()}}):
        trainer = tiny.trainer(tmp_path, max_steps=2, **given)
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        trainer.train()
        assert [name for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" not in name] == []


# --- weights of the base that are trained beside the adapter ---


def unfrozen_norms() -> PeftModel:
    model = get_peft_model(tiny.llama(), tiny.lora())
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model


def with_biases(bias: str) -> PeftModel:
    return get_peft_model(tiny.llama(attention_bias=True), tiny.lora(bias=bias, target_modules=["q_proj", "v_proj"]))


BESIDE: dict[str, Callable[[], PeftModel]] = {
    "norms": unfrozen_norms,
    "bias all": lambda: with_biases("all"),
    "bias lora_only": lambda: with_biases("lora_only"),
}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BESIDE)
def test_weights_beside_the_adapter_do_not_move_the_reference(kind, layout, separate, tmp_path):
    options = {"layout": layout, "use_separate_reference_adapter": separate, "max_steps": 3, "learning_rate": 0.5}
    trainer = tiny.trainer(tmp_path, model=BESIDE[kind](), **options)
    assert "trained weights of the base as they were" in trainer.reference.description
    batch = first_batch(trainer)
    before, weights = reference_logps(trainer, batch), tiny.weights(trainer.model)
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-6)
    assert torch.equal(reference_logps(trainer, batch), before)
    # They were trained, and are what was trained after the reference was read.
    after = tiny.weights(trainer.model)
    moved = {name for name in weights if not torch.equal(weights[name], after[name])}
    assert [name for name in moved if "lora_" not in name]
    assert (policy_logps(trainer, batch) - before).abs().max() > 0.1


def test_gradients_are_not_those_of_the_swapped_weights(tmp_path):
    """The reference is read between forward and backward of the policy: with an explicit one, the run is the same."""
    plain = tiny.trainer(tmp_path, model=unfrozen_norms(), parts={"ref_model": tiny.llama()}, learning_rate=0.5)
    swapped = tiny.trainer(tmp_path, model=unfrozen_norms(), use_separate_reference_adapter=False, learning_rate=0.5)
    plain.train()
    swapped.train()
    tiny.assert_same_weights(
        tiny.weights(swapped.model, trainable=True), tiny.weights(plain.model, trainable=True), 1e-6
    )


def test_weights_beside_the_adapter_under_autocast(tmp_path):
    """Autocast remembers rounded weights by their address, which the copies have for as long as the reference is read."""
    online = tiny.trainer(tmp_path, model=with_biases("all"), use_separate_reference_adapter=False, bf16=True)
    batch = first_batch(online)

    def read() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            policy_logps(online, batch)  # so that something is remembered
            return reference_logps(online, batch)

    before = read()
    online.train()
    assert torch.equal(read(), before)


def test_sharded_weights_beside_the_adapter_are_refused():
    from dpo_trainer.reference import choose_reference
    from dpo_trainer.scoring.logprobs import Scorer

    model = unfrozen_norms()
    with pytest.raises(ValueError, match=r"weights of the base model are trained beside.*modules_to_save.*ref_model"):
        choose_reference(model, None, Scorer(model), needed=True, separate_adapter=False, sharded=True)
    model = get_peft_model(tiny.llama(), tiny.lora())  # nothing beside it
    choose_reference(model, None, Scorer(model), needed=True, separate_adapter=False, sharded=True)


@pytest.mark.parametrize("separate", [None, True])
def test_the_cache_of_such_a_reference_has_its_name(separate, tmp_path):
    """After training its hash is what it was, though the weights in the model are others."""
    trainer = tiny.trainer(
        tmp_path, model=unfrozen_norms(), use_separate_reference_adapter=separate, learning_rate=0.5
    )
    before = trainer.reference.identity(trainer.model, "float32")
    trainer.train()
    assert trainer.reference.identity(trainer.model, "float32") == before


@pytest.mark.parametrize("tied", [True, False])
def test_layers_that_peft_ties_are_in_the_copy(tied, tmp_path):
    """With `ensure_weight_tying`, LoRA on the embedding puts itself on the head too: the copy must have that."""
    config = tiny.lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=tied)
    model = get_peft_model(tiny.llama(tie_word_embeddings=True), config)
    tiny.fill_adapters(model, scale=0.3)
    trainer = tiny.trainer(tmp_path, model=model, max_steps=2)
    copied = {name for name in tiny.weights(trainer.model) if ".ref" in name}
    assert len(copied) == len([name for name in tiny.weights(trainer.model) if ".default" in name])
    assert any("lm_head" in name for name in copied) == tied
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-6)


def test_a_copy_that_is_not_its_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_trainer.reference.twins._copy_parameters", lambda *_: None)
    monkeypatch.setattr("dpo_trainer.reference.twins.set_peft_model_state_dict", lambda *_, **__: None)
    with pytest.raises(
        ValueError, match=r"frozen copy of the adapter 'style'.*lora_\w+\.weight is missing in it or differs"
    ):
        tiny.trainer(tmp_path, model=trained_adapter())


def test_copying_thaws_nothing(tmp_path):
    model = trained_adapter()
    frozen = {name for name, p in model.named_parameters() if "lora_A" in name and p.requires_grad_(False) is p}
    trainer = tiny.trainer(tmp_path, model=model)
    assert isinstance(trainer.reference, NamedAdapter)
    assert frozen
    assert [name for name, p in trainer.model.named_parameters() if name in frozen and p.requires_grad] == []


# --- no reference ---


@pytest.mark.parametrize("options", [{"loss_type": "simpo"}, {"loss_type": "orpo"}, {"reference_free": True}], ids=str)
def test_no_reference_costs_nothing(options, tmp_path):
    trainer = tiny.trainer(tmp_path, **options)
    assert isinstance(trainer.reference, NoReference)
    assert trainer.reference.own == []
    assert trainer.reference.logps(trainer.model, first_batch(trainer)) is None


def test_reference_free_counts_the_reference_as_zero(tmp_path):
    """Sigmoid loss of the first batch by hand: mean of log(1 + exp(-beta (log p(chosen) - log p(rejected))))."""
    trainer = tiny.trainer(tmp_path, reference_free=True, max_steps=1, train=tiny.dataset(4))
    chosen, rejected = policy_logps(trainer, first_batch(trainer)).double().chunk(2)
    want = torch.log1p(torch.exp(-0.1 * (chosen - rejected))).mean().item()
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(want, abs=1e-5)
    assert abs(want - math.log(2)) > 1e-3


def test_a_mixture_needs_a_reference_if_one_of_its_losses_does(tmp_path):
    assert isinstance(tiny.trainer(tmp_path, loss_type=["sft", "sigmoid"]).reference, FrozenModel)
    assert isinstance(tiny.trainer(tmp_path, loss_type=["sft", "simpo"]).reference, NoReference)


# --- refusals ---


def test_ref_model_is_the_policy(tmp_path):
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"ref_model is the model that is trained.*Leave ref_model"):
        tiny.trainer(tmp_path, model=model, parts={"ref_model": model})


def test_ref_model_is_the_base_of_the_policy(tmp_path):
    model = tiny.llama()
    peft_model = get_peft_model(model, tiny.lora())
    with pytest.raises(ValueError, match=r"ref_model is the base of the PEFT model.*Leave ref_model out"):
        tiny.trainer(tmp_path, model=peft_model, parts={"ref_model": model})


def test_ref_model_has_the_memory_of_the_policy(tmp_path):
    model, twin = tiny.llama(), tiny.llama()
    twin.lm_head.weight = model.lm_head.weight
    with pytest.raises(ValueError, match=r"shares the memory of 1 weights that are trained \(lm_head.weight"):
        tiny.trainer(tmp_path, model=model, parts={"ref_model": twin})
    # The frozen base of an adapter may be shared.
    model, twin = tiny.llama(), tiny.llama()
    twin.load_state_dict(model.state_dict(), assign=True)
    tiny.trainer(tmp_path, model=model, parts={"ref_model": twin, "peft_config": tiny.lora()})


def test_ref_model_is_the_model_that_gets_an_adapter(tmp_path):
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"ref_model is the .*Leave ref_model"):
        tiny.trainer(tmp_path, model=model, parts={"ref_model": model, "peft_config": tiny.lora()})


def test_unknown_adapters(tmp_path):
    with pytest.raises(ValueError, match=r"--ref_adapter_name 'strat' is not an adapter.*style.*load_adapter"):
        tiny.trainer(tmp_path, model=trained_adapter(), ref_adapter_name="strat")
    with pytest.raises(
        ValueError, match=r"--model_adapter_name 'stile' is not an adapter of the model, which has style"
    ):
        tiny.trainer(tmp_path, model=trained_adapter(), model_adapter_name="stile")
    with pytest.raises(ValueError, match=r"--model_adapter_name 'x' .* has none: pass a PeftModel or a peft_config"):
        tiny.trainer(tmp_path, model_adapter_name="x")
    with pytest.raises(ValueError, match=r"--ref_adapter_name 'x' needs a PEFT model"):
        tiny.trainer(tmp_path, ref_adapter_name="x")


def test_reference_adapter_is_the_trained_one(tmp_path):
    with pytest.raises(ValueError, match=r"--ref_adapter_name 'style' is the adapter that is trained.*Name another"):
        tiny.trainer(tmp_path, model=trained_adapter(), ref_adapter_name="style")


def test_two_references(tmp_path):
    model = trained_adapter()
    model.add_adapter("start", tiny.lora())
    with pytest.raises(ValueError, match="Both ref_model and --ref_adapter_name name a reference"):
        tiny.trainer(tmp_path, model=model, ref_adapter_name="start", parts={"ref_model": tiny.llama()})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"reference_free": True}, "--reference_free asks for none"),
        ({"loss_type": "simpo"}, "none of the losses in --loss_type looks at one"),
    ],
)
def test_a_reference_that_nothing_looks_at(options, why, tmp_path):
    with pytest.raises(ValueError, match=rf"given by ref_model, but {why}: drop one of the two"):
        tiny.trainer(tmp_path, parts={"ref_model": tiny.llama()}, **options)


# --- what is left behind ---


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["frozen_copy", "disabled_lora", "continued_lora", "named_adapters"])
def test_state_after_an_exception(case, layout, tmp_path, monkeypatch):
    """A reference forward that dies half-way (out of memory, Ctrl-C) leaves the policy as it found it."""
    given, _, _ = CASES[case](tmp_path)
    trainer = tiny.trainer(tmp_path, layout=layout, **given)
    batch = first_batch(trainer)
    trainer.model.train()
    trainer.model.get_submodule(next(n for n, m in trainer.model.named_modules() if n.endswith("layers.0"))).eval()
    before = state_of(trainer)

    def die(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    models = [trainer.model, *(model for _, model in trainer.reference.own)]
    hooks = [
        next(m for n, m in model.named_modules() if n.endswith("layers.1")).register_forward_pre_hook(die)
        for model in models
    ]
    with pytest.raises(Interrupted):
        trainer.reference.logps(trainer.model, batch)
    for hook in hooks:
        hook.remove()
    assert state_of(trainer) == before
    want = copy.deepcopy(trainer.scorer)(trainer.model, batch).chosen
    torch.testing.assert_close(want, trainer.reference.logps(trainer.model, batch).chosen, rtol=0, atol=1e-4)


def state_of(trainer: DPOTrainer) -> dict[str, Any]:
    """Everything that a strategy might switch."""
    models = {"policy": trainer.model, **{f"own {i}": m for i, (_, m) in enumerate(trainer.reference.own)}}
    state: dict[str, Any] = {}
    for key, model in models.items():
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        state[key] = {
            "attention": base.config._attn_implementation,
            "head": "forward" in vars(base.get_output_embeddings()),
            "training": {n: m.training for n, m in model.named_modules()},
            "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
            "active": getattr(model, "active_adapter", None),
            "disabled": {n: m.disable_adapters for n, m in model.named_modules() if hasattr(m, "disable_adapters")},
        }
    return state


# --- references that cannot be ---


def test_a_reference_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere"):
        tiny.trainer(tmp_path, parts={"ref_model": str(tmp_path / "nowhere")})


def test_a_reference_in_another_dtype_is_said(tmp_path, caplog):
    import logging

    with caplog.at_level(logging.WARNING):
        tiny.trainer(tmp_path, parts={"ref_model": tiny.llama().bfloat16()})
        said = [message for message in caplog.messages if "first loss need not be ln 2" in message]
        assert len(said) == 1
        assert "torch.bfloat16" in said[0]
        assert "torch.float32" in said[0]
        caplog.clear()
        tiny.trainer(tmp_path, parts={"ref_model": tiny.llama()})
    assert not any("ln 2" in message for message in caplog.messages)
