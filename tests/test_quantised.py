"""Adapters on bases of 4 and 8 bits, and optimizers of 8 bits: bitsandbytes on the CPU, for real.

The yardstick is the same model in float32, with the numbers that the quantised weights stand for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback
from transformers.training_args import OptimizerNames

from dpo_trainer import DPOTrainer
from dpo_trainer.models.adapters import compute_as_in_training, make_quantization_config
from dpo_trainer.models.linear_check import wrong_gradients

bnb = pytest.importorskip("bitsandbytes")

LN2 = math.log(2)
SIZES: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
"""A matrix of 64 columns: whole blocks of 64 for 4 bits, and 4,096 numbers, the least that an optimizer holds in 8."""

BASES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "nf4 nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
HELD_IN = {"nf4": torch.uint8, "nf4 nested": torch.uint8, "fp4": torch.uint8, "int8": torch.int8}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama(**SIZES).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_adapter(saved, tmp_path_factory) -> Path:
    """An adapter that is far from zero, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved), tiny.lora())
    tiny.fill_adapters(model)
    model.save_pretrained(folder)
    return folder


def quantised(saved: Path, base: str, **options: Any) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=make_quantization_config(**BASES[base]), **options
    )


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The quantised ones, named as in a model without adapters."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = {name: module for name, module in model.named_modules() if type(module) in kinds}
    return {name.replace("base_model.model.", "").replace(".base_layer", ""): m for name, m in found.items()}


def numbers(layer: Any) -> Tensor:
    """What a quantised weight stands for, by the definition of the format. float32, [out, in]."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scale = weight.SCB if weight.SCB is not None else layer.state.SCB  # moves at the first forward
    return weight.data.float() * scale[:, None] / 127


def dequantised(saved: Path, base: str) -> LlamaForCausalLM:
    """The yardstick: plain float32 layers with the numbers of the quantised ones."""
    plain = AutoModelForCausalLM.from_pretrained(saved)
    for name, layer in layers(quantised(saved, base)).items():
        plain.get_submodule(name).weight.data.copy_(numbers(layer))
    return plain


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the base, scales and tables included."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "lora_" not in name and isinstance(value, Tensor)
    }


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """To the bit."""
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def logits(model: nn.Module, *, train: bool = True) -> Tensor:
    """[1, L, V] in train mode (nothing drops out): the mode in which every CPU takes the same way through a layer."""
    ids = tiny.tokenizer()("the cat likes milk", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.train(train)(input_ids=ids).logits


# --- the base ---


@pytest.mark.parametrize("base", BASES)
def test_base_as_peft_prepares_it(base, saved, tmp_path):
    """Loaded in bfloat16: what is not quantised (norms, embeddings, head) is raised to float32 and frozen."""
    given = quantised(saved, base, dtype=torch.bfloat16)
    names = {name for name, p in given.named_parameters() if p.dtype == torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < names
    before = {name: given.get_parameter(name).detach().clone() for name in names}
    trainer = tiny.trainer(tmp_path, model=given, parts={"peft_config": tiny.lora()})
    model = trainer.model.get_base_model()
    for name, weight in before.items():
        now = model.get_parameter(name)
        assert (now.dtype, now.requires_grad) == (torch.float32, False)
        assert torch.equal(now, weight.float())
    assert len(layers(model)) == 7
    for layer in layers(model).values():
        assert (layer.weight.dtype, layer.weight.requires_grad) == (HELD_IN[base], False)
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 14
    assert set(trained.values()) == {torch.float32}
    assert all("lora_" in name for name in trained)


def test_formats_differ_and_stay_close(saved):
    """What follows compares a base with its own numbers: here, that these are neither the original's nor each other's.

    A number is off by half a step at most, relative to the largest one beside it: 1/254 in int8 (a row); the widest gap
    of nf4 is 0.304 and of fp4 1/3 (a block of 64), half of which is 0.152 and 0.167.
    """
    plain = AutoModelForCausalLM.from_pretrained(saved)
    widest = {"nf4": 0.152, "nf4 nested": 0.152, "fp4": 0.167, "int8": 1 / 254}
    heads = {base: numbers(layers(quantised(saved, base))["model.layers.0.mlp.up_proj"]) for base in BASES}
    original = plain.get_submodule("model.layers.0.mlp.up_proj").weight
    largest = original.abs().amax(1, keepdim=True)  # a row of 64 is a block
    for base, got in heads.items():
        off = ((got - original).abs() / largest).max()
        # Further only by scales rounded to 8 bits (nested, 1 %), and by int8's own arithmetic in float16: 127 x 2^-11 of
        # a step, which is 12 % of half a step.
        assert 0.5 * widest[base] < off < 1.15 * widest[base], base
    assert min((heads[a] - heads[b]).abs().max() for a in heads for b in heads if a < b) > 1e-5


@pytest.mark.parametrize("base", BASES)
def test_eval_mode_computes_what_train_mode_does(base, saved, tmp_path):
    """The reference is read in one, the policy trained in the other, and nothing drops out in either."""
    model = quantised(saved, base, dtype=torch.float32)
    if base == "int8":  # as bitsandbytes has it (in 4 bits it depends on the CPU), or the rest would show nothing
        other = quantised(saved, base, dtype=torch.float32)
        assert (logits(other) - logits(other, train=False)).abs().max() > 1e-3
    trainer = tiny.trainer(tmp_path, model=model, parts={"peft_config": tiny.lora()})
    assert torch.equal(logits(trainer.model, train=False), logits(trainer.model))
    assert not trainer.model.eval().training


def test_a_quantised_reference_by_name(saved, tmp_path):
    """Its eval mode, too, is the train mode of the policy above the same base."""
    how = with_adapter("int8", "fresh", saved, saved)
    how["parts"]["ref_model"] = str(saved)
    trainer = tiny.trained(tmp_path, max_steps=1, **how)
    assert [len(layers(model)) for _, model in trainer.reference.own] == [7]
    assert tiny.losses(trainer)[0] == pytest.approx(LN2, abs=2e-6)


# --- adapters on it, each with every reference ---

REFERENCES: dict[str, dict[str, Any]] = {
    "disabled": {"use_separate_reference_adapter": False},
    "copied": {"use_separate_reference_adapter": True},
    "cached": {"precompute_ref_log_probs": True},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0},
}


def with_adapter(base: str, adapter: str, saved: Path, saved_adapter: Path) -> dict[str, Any]:
    quantization = make_quantization_config(**BASES[base])
    if adapter == "fresh":
        return {"model": str(saved), "parts": {"peft_config": tiny.lora(), "quantization_config": quantization}}
    return {"model": str(saved_adapter), "parts": {"quantization_config": quantization}}


BELOW = ("continued", "disabled")
"""The one cell whose reference is not where training starts: the base, from which the adapter has gone away."""
CELLS = list(itertools.product(BASES, ["fresh", "continued"], REFERENCES))


@pytest.mark.parametrize(("base", "adapter", "reference"), CELLS)
def test_only_the_adapter_trains(base, adapter, reference, saved, saved_adapter, tmp_path):
    how = with_adapter(base, adapter, saved, saved_adapter)
    trainer = tiny.trainer(tmp_path, learning_rate=1.0, max_steps=2, **REFERENCES[reference], **how)
    assert len(layers(trainer.model)) == 7
    untouched, before = base_state(trainer.model), tiny.weights(trainer.model)
    trainer.train()
    assert_equal(base_state(trainer.model), untouched)
    after = tiny.weights(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if "lora_" in name and ".ref." not in name}
    if reference == "moving":  # at alpha 1 the copy is the policy after each step
        expected |= {name for name in before if "lora_" in name}
        assert_equal(
            {name.replace(".ref.", ".default."): value for name, value in after.items() if ".ref." in name},
            {name: value for name, value in after.items() if ".default." in name},
        )
    assert changed == expected
    assert {after[name].dtype for name in changed} == {torch.float32}
    first, second = tiny.losses(trainer)
    if (adapter, reference) == BELOW:
        assert abs(first - LN2) > 1e-3
    else:
        # Policy and reference are one function of the same numbers; what is left is ln 2 in float32 and its mean.
        assert first == pytest.approx(LN2, abs=2e-6)
        assert tiny.log_lines(trainer)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    if reference == "moving":
        assert second == pytest.approx(LN2, abs=2e-6)
    else:
        assert abs(second - first) > 1e-4


# --- gradients ---


class Gradients(TrainerCallback):
    """Of the adapter, as the optimizer gets them in the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(folder: Path, base_model: nn.Module, **how: Any) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of one step; the adapter is far from zero and the reference below it, so that none is small."""
    torch.manual_seed(0)
    model = get_peft_model(base_model, tiny.lora())
    tiny.fill_adapters(model)
    seen = Gradients()
    trainer = tiny.trained(
        folder,
        model=model,
        max_steps=1,
        use_separate_reference_adapter=False,
        parts={"callbacks": [seen]},
        **how,
    )
    assert trainer.layout.name == how["layout"]
    return tiny.losses(trainer)[0], seen.found


def checkpointing(reentrant: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


WAYS: dict[str, dict[str, Any]] = {
    "flat": {"layout": "flat", "gradient_checkpointing": False},
    "flat, reentrant": {"layout": "flat", **checkpointing(True)},
    "flat, not reentrant": {"layout": "flat", **checkpointing(False)},
    "padded": {"layout": "padded", "gradient_checkpointing": False},
    "padded, reentrant": {"layout": "padded", **checkpointing(True)},
}


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_dequantised_model(base, saved, tmp_path):
    """In both layouts, and with layers recomputed in either way."""
    want_loss, want = gradients(tmp_path, dequantised(saved, base), **WAYS["padded"])
    assert len(want) == 14
    assert all(gradient.abs().max() > 0 for gradient in want.values())
    for way, options in WAYS.items():
        loss, got = gradients(tmp_path, quantised(saved, base), **options)
        # float32 products in another order: worst seen 0 and 5e-7.
        assert loss == pytest.approx(want_loss, abs=1e-6), way
        assert got.keys() == want.keys()
        far = {name: ((got[name] - want[name]).norm() / want[name].norm()).item() for name in want}
        assert max(far.values()) < 1e-5, (way, far)


def packed(model: LlamaForCausalLM, *, and_back: bool = False) -> LlamaForCausalLM:
    """As after a pass in eval mode on a CPU with AVX512-BF16, whatever this CPU has; `and_back`: as after saving it then."""
    whole_blocks = [layer for layer in layers(model).values() if layer.in_features % 64 == 0]
    for layer in whole_blocks:
        layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
    if and_back:
        model.state_dict()
    return model


@pytest.mark.parametrize("and_back", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("base", [base for base in BASES if base != "int8"])
def test_a_packed_model_is_refused(base, wrapped, and_back, saved, tmp_path):
    model = packed(quantised(saved, base), and_back=and_back)
    how = (
        {"model": get_peft_model(model, tiny.lora())}
        if wrapped
        else {"model": model, "parts": {"peft_config": tiny.lora()}}
    )
    with pytest.raises(ValueError, match=r"4-bit layer .*q_proj.* packed its weights.*Load the model again"):
        tiny.trainer(tmp_path, **how)


def test_a_look_at_a_model_in_training_does_not_pack_it(saved, tmp_path):
    """After the trainer was built; so that a second one can be built over the same model."""
    trainer = tiny.trainer(tmp_path, model=quantised(saved, "nf4"), parts={"peft_config": tiny.lora()})
    logits(trainer.model, train=False)
    tiny.trainer(tmp_path, model=trainer.model)


class Pack(TrainerCallback):
    """Right before the first batch: nothing saves the model from then on, which would unpack it."""

    def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        packed(model)


def test_layers_packed_behind_the_trainer_are_found_with_the_first_batch(saved, tmp_path):
    trainer = tiny.trainer(tmp_path, model=quantised(saved, "nf4"), parts={"peft_config": tiny.lora()})
    trainer.add_callback(Pack())
    with pytest.raises(
        ValueError, match=r"through the quantised layer .*q_proj.* are not those.*Load the model again"
    ):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_sound_layers_pass(base, dtype, saved):
    model = quantised(saved, base)
    compute_as_in_training(model.train())
    assert wrong_gradients(model, dtype) is None


# --- saved, loaded, resumed ---


@pytest.mark.parametrize("base", BASES)
def test_saved_adapter_on_a_fresh_base(base, saved, tmp_path):
    how = with_adapter(base, "fresh", saved, saved)
    trainer = tiny.trained(tmp_path, learning_rate=1.0, max_steps=2, **how)
    trainer.save_model()
    fresh = quantised(saved, base, dtype=torch.float32)
    untrained = logits(fresh)
    loaded = logits(PeftModel.from_pretrained(fresh, str(tmp_path)))
    assert (loaded - untrained).abs().max() > 1e-2
    assert torch.equal(loaded, logits(trainer.model))


@pytest.mark.parametrize("base", BASES)
def test_resumed_to_the_bit(base, saved, tmp_path):
    """Under an 8-bit optimizer, some of whose states are really 8 bits."""
    lora = tiny.lora(r=64, target_modules=["q_proj", "up_proj"])
    how: dict[str, Any] = {
        "parts": {"peft_config": lora, "quantization_config": make_quantization_config(**BASES[base])},
        "model": str(saved),
    }
    whole, again = resumed(tmp_path, "adamw_8bit", **how)
    eight = {name for name, held in state_dtypes(whole).items() if held == torch.uint8}
    # A of both and B of up_proj are 64 x 64, 64 x 64 and 96 x 64; q_proj's B is 64 x 64.
    assert eight == {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert len(eight) == 4
    assert_same_run(again, whole)


# --- optimizers ---

EIGHT_BITS = [
    "adamw_bnb_8bit",
    "adamw_8bit",
    "lion_8bit",
    "ademamix_8bit",
    "rmsprop_bnb_8bit",
    "paged_adamw_8bit",
    "paged_lion_8bit",
    "paged_ademamix_8bit",
]
THIRTY_TWO_BITS = [
    "ademamix",
    "lion_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "paged_adamw_32bit",
    "paged_lion_32bit",
    "paged_ademamix_32bit",
]


def state_dtypes(trainer: DPOTrainer) -> dict[str, torch.dtype]:
    """What the first moment of each trained weight is held in."""
    optimizer: Any = trainer.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state
    return {name: states[p]["state1"].dtype for name, p in trainer.model.named_parameters() if p in states}


def resumed(
    folder: Path, optim: str, model: Callable[[], nn.Module] | str, **how: Any
) -> tuple[DPOTrainer, DPOTrainer]:
    """A run of 4 steps, and another of its last 2, from the checkpoint in the middle."""
    made = []
    for checkpoint in (None, str(folder / "run" / "checkpoint-2")):
        trainer = tiny.trainer(
            folder / ("run" if checkpoint is None else "again"),
            model=model if isinstance(model, str) else model(),
            optim=optim,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=2,
            gradient_checkpointing=False,
            **how,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        made.append(trainer)
    return made[0], made[1]


def assert_same_run(again: DPOTrainer, whole: DPOTrainer) -> None:
    assert again.state.global_step == whole.state.global_step == 4
    assert tiny.losses(again) == tiny.losses(whole)
    tiny.assert_same_weights(tiny.weights(again.model, trainable=True), tiny.weights(whole.model, trainable=True))


def small() -> LlamaForCausalLM:
    return tiny.llama(**SIZES)


@pytest.mark.parametrize("optim", EIGHT_BITS)
def test_optimizer_of_8_bits(optim, tmp_path):
    """Moments are bytes from 4,096 numbers on, but for embeddings (transformers asks for that); a run resumes to the bit."""
    whole, again = resumed(tmp_path, optim, small)
    want = {
        name: torch.uint8 if p.numel() >= 4096 and "embed_tokens" not in name else torch.float32
        for name, p in whole.model.named_parameters()
    }
    assert set(want.values()) == {torch.uint8, torch.float32}
    assert state_dtypes(whole) == want
    assert state_dtypes(again) == want
    assert_trained(whole)
    assert_same_run(again, whole)


@pytest.mark.parametrize("optim", THIRTY_TWO_BITS)
def test_optimizer_of_32_bits(optim, tmp_path):
    whole, again = resumed(tmp_path, optim, small)
    assert state_dtypes(whole) == dict.fromkeys(tiny.weights(whole.model), torch.float32)
    assert_trained(whole)
    assert_same_run(again, whole)


def assert_trained(trainer: DPOTrainer) -> None:
    """By 4 steps of 1e-3, more or less (RMSprop begins with wider ones)."""
    assert min(tiny.losses(trainer)[1:]) != pytest.approx(LN2, abs=1e-3)
    assert 1e-3 < tiny.moved(tiny.weights(small()), tiny.weights(trainer.model)) < 5e-2


def test_every_optimizer_of_bitsandbytes_is_tested():
    """A name that transformers adds is to be put on one of the lists."""
    others = {"galore_adamw_8bit", "galore_adamw_8bit_layerwise", "adamw_torch_8bit"}
    words = ("8bit", "32bit", "paged", "bnb", "lion")
    known = {str(name.value) for name in OptimizerNames if any(word in name.value for word in words)}
    assert known - others == set(EIGHT_BITS + THIRTY_TWO_BITS) - {"ademamix"}


def test_eight_bits_follow_thirty_two(tmp_path):
    """The first step of 8-bit AdamW is that of AdamW: moments are rounded after they were used. Later ones drift apart."""
    runs = {
        (optim, steps): tiny.trained(
            tmp_path, model=small(), optim=optim, learning_rate=1e-3, max_steps=steps, weight_decay=0.1
        )
        for optim in ("adamw_torch", "adamw_8bit")
        for steps in (1, 4)
    }
    weights = {run: tiny.weights(trainer.model) for run, trainer in runs.items()}
    # Both steps are 1e-3 wide; float32 rounding, magnified where a gradient is of the size of Adam's epsilon.
    tiny.assert_same_weights(weights["adamw_8bit", 1], weights["adamw_torch", 1], 2e-6)
    drift = tiny.moved(weights["adamw_torch", 4], weights["adamw_8bit", 4])
    assert 1e-6 < drift < 4e-3  # never farther than four steps
    assert tiny.losses(runs["adamw_8bit", 4]) == pytest.approx(tiny.losses(runs["adamw_torch", 4]), abs=5e-3)
