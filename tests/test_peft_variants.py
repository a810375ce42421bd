"""One table over PEFT's kinds of adapters: each trains from ln 2, beside a reference that stays, and is saved as what it is.

What cannot is refused when the trainer is built. The kinds that need a package that is not installed here (AdaMSS, LoftQ) and
those that only some architectures have (adaption prompts) are not in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, MontecloraConfig
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_trainer import DPOTrainer
from dpo_trainer.types import PairBatch

QV = ["q_proj", "v_proj"]
SQUARE = ["q_proj", "o_proj"]
WORDS = tiny.tokenizer()("cat dog").input_ids
NO_CHECKPOINTS = {"gradient_checkpointing": False}
INVOKED = tiny.tokenizer().convert_tokens_to_ids("<|assistant|>")


def base() -> Qwen2ForCausalLM:
    """Unlike a Llama, one with biases."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**tiny.SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def of(kind: str, **settings: Any) -> Callable[[], PeftConfig]:
    """A config of PEFT, made anew each time: PEFT changes those that it uses."""
    where = {} if "num_virtual_tokens" in settings or "cpt_token_ids" in settings else {"target_modules": QV}
    return lambda: getattr(peft, kind)(**{**where, "task_type": "CAUSAL_LM", **settings})


def lora(**settings: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": QV, "task_type": "CAUSAL_LM", **settings})


KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora(),
    "lora, bias all": lora(bias="all"),
    "lora, bias lora_only": lora(bias="lora_only"),
    "lora, bias of its own": lora(lora_bias=True),
    "lora, modules_to_save": lora(modules_to_save=["lm_head"]),
    "lora, trainable tokens": lora(trainable_token_indices=WORDS),
    "lora, embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "lora, target_parameters": lora(target_modules=None, target_parameters=["lm_head.weight"]),
    "lora, gaussian": lora(init_lora_weights="gaussian"),
    "lora, not zero": lora(init_lora_weights=False),
    "lora, orthogonal": lora(init_lora_weights="orthogonal"),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "alora": lora(alora_invocation_tokens=[INVOKED]),
    "ia3": of("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": of("VeraConfig", r=4, target_modules=SQUARE),
    "loha": of("LoHaConfig", r=4),
    "lokr": of("LoKrConfig", r=4),
    "oft": of("OFTConfig", oft_block_size=8),
    "boft": of("BOFTConfig", boft_block_size=4),
    "hra": of("HRAConfig", r=4),
    "ln tuning": of("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "trainable tokens": of("TrainableTokensConfig", token_indices=WORDS, target_modules=["embed_tokens"]),
    "fourierft": of("FourierFTConfig", n_frequency=20),
    "waveft": of("WaveFTConfig", n_frequency=20),
    "miss": of("MissConfig", r=4),
    "vblora": of("VBLoRAConfig", r=4, num_vectors=8, vector_length=8),
    "randlora": of("RandLoraConfig", r=4),
    "shira": of("ShiraConfig", r=2),
    "c3a": of("C3AConfig", block_size=8),
    "road": of("RoadConfig", group_size=8),
    "osf": of("OSFConfig", effective_rank=4),
    "prompt tuning": of("PromptTuningConfig", num_virtual_tokens=3),
    "p-tuning": of("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": of("PrefixTuningConfig", num_virtual_tokens=3),
    "cpt": of("CPTConfig", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
}
OPTIONS: dict[str, dict[str, Any]] = {"prefix tuning": NO_CHECKPOINTS, "alora": NO_CHECKPOINTS}
NOT_MERGED = {"alora", "prompt tuning", "p-tuning", "prefix tuning", "cpt"}

# As many tokens as a row of the data has: some of those that are trained, and the one that invokes aLoRA.
IDS = torch.tensor([[2, *WORDS, 1, INVOKED, 70, 71, 82, 1]])


def log_probs(model: torch.nn.Module) -> Tensor:
    """[L, V] nats."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits.float()[0, -IDS.shape[1] :].log_softmax(-1)  # soft prompts stand in front


def build(folder: Path, kind: str, **how: Any) -> DPOTrainer:
    """Adam, whose state a resumed run must find again; conversations, in which aLoRA is invoked."""
    options = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-2, **OPTIONS.get(kind, {})}
    given = {"model": base(), "parts": {"peft_config": KINDS[kind]()}, "train": Dataset.from_list(tiny.chat_rows())}
    return tiny.trainer(folder, **{**given, **options, **how})


def of_reference(trainer: DPOTrainer) -> Tensor:
    """[2N] nats, of the first batch."""
    batch = PairBatch.from_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    logps = trainer.reference.logps(trainer.model, batch)
    return torch.cat([logps.chosen, logps.rejected])


@pytest.mark.parametrize("kind", KINDS)
def test_from_ln_2_to_a_saved_adapter(kind, tmp_path):
    trainer = build(tmp_path, kind, save_strategy="steps", save_steps=3)
    before, start = of_reference(trainer), log_probs(trainer.model)
    trainer.train()
    trainer.save_model(tmp_path / "saved")

    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-6)  # float32 sums of 200 nats, times beta 0.1
    assert torch.equal(of_reference(trainer), before)
    live = log_probs(trainer.model)
    assert (live - start).abs().max() > 1e-3  # or all of this would hold for a trainer that does nothing

    # PEFT alone, on a base that never saw the run. 1e-5: the last digits of float32, of log-probs of 5 to 20 nats.
    fresh = PeftModel.from_pretrained(base(), tmp_path / "saved")
    torch.testing.assert_close(log_probs(fresh), live, rtol=0, atol=1e-5)
    if kind not in NOT_MERGED:
        torch.testing.assert_close(log_probs(fresh.merge_and_unload()), live, rtol=0, atol=1e-5)

    resumed = build(tmp_path, kind)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert tiny.losses(resumed) == tiny.losses(trainer)
    last_digits = 1e-6 if kind == "cpt" else 0  # each forward of CPT projects its vectors once more
    torch.testing.assert_close(log_probs(resumed.model), live, rtol=0, atol=last_digits)


@pytest.mark.parametrize("kind", ["lora, bias all", "lora, embeddings", "dora", "vera", "fourierft", "alora"])
def test_a_copy_is_what_was_trained_before(kind, tmp_path):
    """DPO after DPO: the adapter goes on, and its frozen copy is the reference."""
    build(tmp_path, kind, max_steps=2).save_model(tmp_path / "before")
    model = PeftModel.from_pretrained(base(), tmp_path / "before", is_trainable=True)
    trainer = build(tmp_path, kind, model=model, parts={}, max_steps=3)
    assert "a frozen copy of the adapter 'default'" in trainer.reference.description
    before = of_reference(trainer)
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-6)
    assert tiny.losses(trainer)[-1] != tiny.losses(trainer)[0]
    assert torch.equal(of_reference(trainer), before)


def loftq() -> LoraConfig:
    """As `LoraConfig(init_lora_weights="loftq")`, which needs scipy."""
    config = lora()()
    config.init_lora_weights = "loftq"
    return config


ADALORA = of("AdaLoraConfig", init_r=4, target_r=2, total_step=5, tinit=1, tfinal=1)
REFUSED: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "adalora": (ADALORA, r"ADALORA prunes its ranks.*Use LoRA"),
    "pissa by a random svd": (lora(init_lora_weights="pissa_niter_4"), "random SVD.*Use init_lora_weights='pissa'"),
    "corda": (
        lora(init_lora_weights="corda", corda_config=CordaConfig()),
        "'corda' moves a part of the base.*Use init_lora",
    ),
    "lora-ga": (lora(init_lora_weights="lora_ga"), "'lora_ga' moves a part of the base.*Use init_lora_weights"),
    "loftq": (loftq, "'loftq' puts quantised weights.*replace_lora_weights_loftq"),
    "eva without data": (lora(init_lora_weights="eva"), "needs activations.*initialize_lora_eva_weights"),
    "kasa": (lora(kasa_config=peft.KasaConfig()), "kasa_config comes with two losses"),
    "monteclora": (lora(monteclora_config=MontecloraConfig()), "monteclora_config comes with a loss"),
    "layers twice": (lora(layer_replication=[(0, 2), (0, 2)]), "layer_replication makes another model"),
    "shadow": (lambda: peft.ShadowConfig(task_type="CAUSAL_LM"), "SHADOW adds a loss"),
    "multitask": (of("MultitaskPromptTuningConfig", num_virtual_tokens=3), "MULTITASK_PROMPT_TUNING needs a task id"),
    "poly": (of("PolyConfig", r=4), "POLY needs a task id"),
    "prefix tuning under checkpointing": (KINDS["prefix tuning"], "cache of keys.*--gradient_checkpointing false"),
    "alora under checkpointing": (KINDS["alora"], "one forward pass.*--gradient_checkpointing false"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_be_what_it_says(kind, tmp_path):
    config, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, model=base(), parts={"peft_config": config()})


def test_a_model_with_such_an_adapter(tmp_path):
    model = get_peft_model(base(), REFUSED["pissa by a random svd"][0]())
    with pytest.raises(ValueError, match="random SVD"):
        tiny.trainer(tmp_path, model=model)


def test_eva_that_has_seen_data(tmp_path):
    """Initialised by the user, it is LoRA: nothing of the base has moved."""
    model = get_peft_model(base(), lora(init_lora_weights="eva")())
    tiny.fill_adapters(model)
    trainer = tiny.trained(tmp_path, model=model)
    trainer.save_model(tmp_path / "saved")
    fresh = PeftModel.from_pretrained(base(), tmp_path / "saved")
    torch.testing.assert_close(log_probs(fresh), log_probs(trainer.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_rest_of_a_base_is_no_reference(init, tmp_path):
    parts = {"peft_config": lora(init_lora_weights=init)()}
    with pytest.raises(ValueError, match=rf"--use_separate_reference_adapter false.*init_lora_weights='{init}'"):
        tiny.trainer(tmp_path, model=base(), use_separate_reference_adapter=False, parts=parts)


def test_a_package_that_peft_lacks(tmp_path, monkeypatch):
    def without_it(*args: Any, **kwargs: Any) -> None:
        raise ImportError("The required package 'scipy' is not installed.")

    monkeypatch.setattr("dpo_trainer.models.adapters.get_peft_model", without_it)
    with pytest.raises(ValueError, match=r"peft_config needs a package that is not here.*scipy"):
        tiny.trainer(tmp_path, parts={"peft_config": tiny.lora()})


def test_alora_is_read_row_by_row(tmp_path, caplog):
    """Two short rows need not hold the tokens that invoke it, so that a comparison of layouts could miss the difference."""
    trainer = build(tmp_path, "alora")
    assert trainer.layout.name == "padded"
    assert "aLoRA looks for its invocation tokens once in a row" in caplog.text
