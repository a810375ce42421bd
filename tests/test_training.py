"""From rows to a saved model through the public interface, as users call it."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, PeftModel, TrainableTokensConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import trainer as transformers_trainer

from dpo_trainer import DPOTrainer
from dpo_trainer.data import DataCollatorForPreference
from dpo_trainer.losses import LOSSES
from dpo_trainer.types import PairBatch

LN2 = math.log(2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model with its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    """[1, L, V] of a fixed text, without dropout."""
    ids = tiny.tokenizer()("the cat likes milk", return_tensors="pt")["input_ids"]
    training = model.training
    with torch.no_grad():
        out = model.eval()(input_ids=ids).logits
    model.train(training)
    return out


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# --- what `model` may be ---


def test_model_by_path_brings_its_tokenizer(saved, tmp_path):
    args = tiny.config(tmp_path)
    trainer = DPOTrainer(str(saved), args=args, train_dataset=tiny.dataset())
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(LN2, abs=2e-6)
    assert trainer.processing_class.eos_token == "<|end|>"
    in_memory = tiny.trained(tmp_path)
    assert tiny.losses(trainer) == tiny.losses(in_memory)
    tiny.assert_same_weights(tiny.weights(trainer.model), tiny.weights(in_memory.model))


def test_adapter_by_path_goes_on(saved, tmp_path):
    """An adapter that was trained and saved is continued, with itself as the reference."""
    first = tiny.trained(tmp_path / "first", model=str(saved), learning_rate=1.0, parts={"peft_config": tiny.lora()})
    first.save_model()
    second = tiny.trainer(tmp_path / "second", model=str(tmp_path / "first"), learning_rate=1.0)
    torch.testing.assert_close(logits(second.model), logits(first.model))
    assert "adapter 'default'" in second.reference.description
    second.train()
    assert tiny.losses(second)[0] == pytest.approx(LN2, abs=2e-6)
    assert tiny.losses(second)[-1] != tiny.losses(second)[0]


def test_model_init_kwargs_reach_the_model(saved, tmp_path):
    kwargs = '{"dtype": "bfloat16", "attn_implementation": "eager"}'
    trainer = tiny.trainer(tmp_path, model=str(saved), model_init_kwargs=kwargs)
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"


def test_default_dtype_is_float32_whatever_was_saved(tmp_path):
    tiny.llama().bfloat16().save_pretrained(tmp_path / "half")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    assert tiny.trainer(tmp_path, model=str(tmp_path / "half")).model.dtype == torch.float32


@pytest.mark.parametrize("options", [{"model_init_kwargs": {"dtype": "bfloat16"}}, {}], ids=["kwargs", "quantization"])
def test_options_for_loading_need_a_name(options, tmp_path):
    parts = {} if options else {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    with pytest.raises(ValueError, match=r"model_init_kwargs and quantization_config are for a model given by name"):
        tiny.trainer(tmp_path, parts=parts, **options)


def test_peft_config_on_a_peft_model_goes_on_with_its_adapter(tmp_path):
    """With the same settings; others are merged on request (test_continued_adapter.py), and refused otherwise."""
    model = get_peft_model(tiny.llama(), tiny.lora(), adapter_name="style")
    tiny.fill_adapters(model)
    before = tiny.weights(model)
    trainer = tiny.trainer(tmp_path, model=model, parts={"peft_config": tiny.lora()})
    assert trainer.model is model
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in before if "style" in n}
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)  # the reference is the adapter as it came
    other = get_peft_model(tiny.llama(), tiny.lora())
    with pytest.raises(ValueError, match=r"(?s)different LoRA settings.*lora_alpha.*--merge_lora_configs"):
        tiny.trainer(tmp_path, model=other, parts={"peft_config": tiny.lora(lora_alpha=16)})


def test_an_adapter_continues_at_a_larger_rank_computing_the_same(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.lora(r=4, lora_alpha=8))
    tiny.fill_adapters(model)
    want = logits(model)
    assert (want - logits(tiny.llama())).abs().max() > 1e-2
    wanted = tiny.lora(r=16, lora_alpha=16)
    trainer = tiny.trainer(tmp_path, model=model, parts={"peft_config": wanted}, merge_lora_configs=True)
    torch.testing.assert_close(logits(trainer.model), want, rtol=0, atol=1e-5)  # the bound that users are promised
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.model.peft_config["default"].r == 16


@pytest.mark.parametrize("parts", [{}, {"peft_config": tiny.lora()}], ids=["full", "one adapter"])
def test_merging_lora_settings_without_two_of_them_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="--merge_lora_configs is about two sets of LoRA settings"):
        tiny.trainer(tmp_path, parts=parts, merge_lora_configs=True)


def test_neither_or_both_of_model_and_model_init(tmp_path):
    for parts in ({"model": None}, {"model": tiny.llama(), "model_init": tiny.llama}):
        with pytest.raises(ValueError, match="either a model or a model_init"):
            DPOTrainer(args=tiny.config(tmp_path), train_dataset=tiny.dataset(), **parts)


def test_model_init_makes_a_new_model_for_each_train(tmp_path):
    """As in hyperparameter search: the second run starts anew, with a reference of its own, and equals the first."""
    made: list[PreTrainedModel] = []

    def model_init() -> PreTrainedModel:
        made.append(tiny.llama())
        return made[-1]

    trainer = tiny.trainer(tmp_path, parts={"model_init": model_init})
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append((tiny.losses(trainer), tiny.weights(trainer.model)))
        assert trainer.model is made[-1]
        assert trainer.reference.own[0][1] is not made[-1]
    assert len(made) == 3  # one for the constructor, as in transformers
    assert runs[0][0] == runs[1][0]
    assert runs[0][0][0] == pytest.approx(LN2, abs=2e-6)
    tiny.assert_same_weights(runs[1][1], runs[0][1])


def test_second_train_goes_on_from_the_first(tmp_path):
    trainer = tiny.trained(tmp_path, max_steps=2)
    first = tiny.losses(trainer)
    trainer.train()
    again = tiny.losses(trainer)
    assert len(again) == 2
    assert again[0] != pytest.approx(first[0], abs=1e-4)  # the reference is still where the first run started
    assert math.isfinite(again[1])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_quantized_base(layout, saved, tmp_path):
    """NF4 base, float32 adapter, on the CPU."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = tiny.trainer(
        tmp_path,
        model=str(saved),
        layout=layout,
        learning_rate=1.0,
        parts={"quantization_config": config, "peft_config": tiny.lora()},
    )
    assert trainer.model.get_base_model().is_loaded_in_4bit
    before = tiny.weights(trainer.model)
    trainer.train()
    assert trainer.layout.name == layout
    losses = tiny.losses(trainer)
    assert losses[0] == pytest.approx(LN2, abs=2e-6)
    assert losses[-1] != pytest.approx(losses[0], abs=1e-4)
    after = tiny.weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {trainer.model.get_parameter(name).dtype for name in moved} == {torch.float32}


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_bfloat16_autocast(layout, tmp_path):
    """Mixed precision: float32 weights, log-probs summed in float32, the layout that was asked for."""
    trainer = tiny.trained(tmp_path, layout=layout, bf16=True, max_steps=3)
    assert trainer.layout.name == layout
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    losses = tiny.losses(trainer)
    assert losses[0] == pytest.approx(LN2, abs=2e-6)  # policy and reference round alike
    # bfloat16 has 8 bits: log-probs of 80 nats are off by some 0.1, a tenth of which is in a reward.
    assert losses == pytest.approx(tiny.losses(tiny.trained(tmp_path, max_steps=3)), abs=0.03)
    assert losses[-1] != pytest.approx(LN2, abs=0.01)


# --- data ---


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_conversations(layout, tmp_path):
    trainer = tiny.trained(tmp_path, train=Dataset.from_list(tiny.chat_rows(8)), layout=layout, max_steps=2)
    assert tiny.losses(trainer)[0] == pytest.approx(LN2, abs=2e-6)
    row = trainer.train_dataset[0]
    tokenizer = tiny.tokenizer()
    assert tokenizer.decode(row["prompt_ids"]) == f"<|user|>{tiny.rows(1)[0]['prompt']}<|end|><|assistant|>"
    assert tokenizer.decode(row["chosen_ids"]) == f"{tiny.rows(1)[0]['chosen'].strip()}<|end|>"


def test_tokenized_rows_pass_through(tmp_path):
    first = tiny.trainer(tmp_path)
    again = tiny.trained(
        tmp_path, train=first.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    )
    first.train()
    assert tiny.losses(again) == tiny.losses(first)


def as_stream(rows: Dataset) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_stream_equals_table(layout, tmp_path):
    """The same rows in the same order: accelerate's way of dispatching streams would cut scored tokens off."""
    how: dict[str, Any] = {"layout": layout, "train_sampling_strategy": "sequential", "max_steps": 5}
    table = tiny.trained(tmp_path, **how)
    stream = tiny.trained(tmp_path, train=as_stream(tiny.dataset()), **how)
    for name in ("loss", "logps/chosen", "logps/rejected", "num_tokens"):
        assert [line[name] for line in tiny.log_lines(stream)] == [line[name] for line in tiny.log_lines(table)], name
    tiny.assert_same_weights(tiny.weights(stream.model), tiny.weights(table.model))


@pytest.mark.parametrize("streamed", [False, True], ids=["table", "stream"])
def test_loader_workers_change_nothing(streamed, tmp_path):
    """Batches, their segments included, come through worker processes; every row once."""
    rows = as_stream(tiny.dataset()) if streamed else None
    how: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_steps": 3}
    plain = tiny.trained(tmp_path, **how)
    workers = tiny.trained(tmp_path, train=rows, dataloader_num_workers=1 if streamed else 2, **how)
    assert tiny.losses(workers) == tiny.losses(plain)
    tiny.assert_same_weights(tiny.weights(workers.model), tiny.weights(plain.model))


def test_stream_names_the_same_pair_alike(tmp_path):
    """`example_ids` of a stream do not depend on where the pair stands in it."""
    trainer = tiny.trainer(tmp_path, train=as_stream(tiny.dataset(6)))
    backwards = tiny.trainer(tmp_path, train=as_stream(Dataset.from_list(tiny.rows(6)[::-1])))
    ids = [row["example_id"] for row in trainer.train_dataset]
    assert ids == [row["example_id"] for row in backwards.train_dataset][::-1]
    assert len(set(ids)) == 6


def test_stream_needs_max_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        tiny.trainer(tmp_path, train=as_stream(tiny.dataset()), max_steps=-1)


class CollatorOfAnotherLibrary:
    """Padded rows as TRL collates them: chosen rows first, left to right, no key of ours."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [(row["prompt_ids"], row[column]) for column in ("chosen_ids", "rejected_ids") for row in rows]
        width = max(len(prompt) + len(completion) for prompt, completion in texts)
        out = {name: torch.zeros(len(texts), width, dtype=torch.long) for name in ("ids", "attention", "completion")}
        for i, (prompt, completion) in enumerate(texts):
            end = len(prompt) + len(completion)
            out["ids"][i, :end] = torch.tensor([*prompt, *completion])
            out["attention"][i, :end] = 1
            out["completion"][i, len(prompt) : end] = 1
        return {"input_ids": out["ids"], "attention_mask": out["attention"], "completion_mask": out["completion"]}


def test_collator_of_another_library(tmp_path):
    own = tiny.trained(tmp_path, layout="padded", gradient_accumulation_steps=2)
    foreign = tiny.trained(
        tmp_path, gradient_accumulation_steps=2, parts={"data_collator": CollatorOfAnotherLibrary()}
    )
    assert tiny.losses(foreign) == pytest.approx(tiny.losses(own), rel=0, abs=1e-6)
    tiny.assert_same_weights(tiny.weights(foreign.model), tiny.weights(own.model), 1e-6)
    want, got = own.evaluate(tiny.dataset(7, seed=3)), foreign.evaluate(tiny.dataset(7, seed=3))
    for name in ("eval_loss", "eval_logps/chosen", "eval_entropy"):
        assert got[name] == pytest.approx(want[name], rel=1e-6)


def test_collator_of_another_kind_is_refused(tmp_path):
    trainer = tiny.trainer(tmp_path, parts={"data_collator": lambda rows: {"input_ids": torch.zeros(2, 3)}})
    with pytest.raises(ValueError, match=r"lacks \['attention_mask', 'completion_mask'\].*DataCollatorForPreference"):
        trainer.train()


def test_our_collator_is_public(tmp_path):
    """Given explicitly, it is the one that the trainer would have taken."""
    collator = DataCollatorForPreference(tiny.PAD, layout="padded")
    trainer = tiny.trained(tmp_path, layout="padded", parts={"data_collator": collator})
    assert tiny.losses(trainer) == tiny.losses(tiny.trained(tmp_path, layout="padded"))
    batch = collator([trainer.train_dataset[i] for i in range(3)])
    assert {"input_ids", "attention_mask", "completion_mask"} <= set(batch)
    assert batch["input_ids"].shape[0] == 6


def test_pad_to_multiple_of(tmp_path):
    plain = tiny.trained(tmp_path)
    for layout in ("flat", "padded"):
        trainer = tiny.trained(tmp_path, pad_to_multiple_of=16, layout=layout)
        batch = PairBatch.from_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
        assert batch.input_ids.shape[1] % 16 == 0
        assert batch.num_tokens < batch.input_ids.numel()
        tiny.assert_same_weights(tiny.weights(trainer.model), tiny.weights(plain.model), 2e-6)


def test_group_by_length(tmp_path):
    """The sampler reads our column `length`: batches are of like length, over all rows."""
    spread = {}
    for strategy in ("random", "group_by_length"):
        how: dict[str, Any] = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 2}
        trainer = tiny.trainer(tmp_path, train=tiny.dataset(64), **how)
        lengths = torch.tensor(trainer.train_dataset["length"]).double()
        batches = [lengths[batch["example_ids"]] for batch in trainer.get_train_dataloader()]
        assert sum(map(len, batches)) == 64
        spread[strategy] = torch.stack([batch.max() - batch.min() for batch in batches]).mean().item()
    assert spread["group_by_length"] < spread["random"] / 2
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(LN2, abs=2e-6)


# --- evaluation ---


def test_evaluation_datasets_by_name(tmp_path):
    parts = {"eval_dataset": {"near": tiny.dataset(5, seed=1), "far": tiny.dataset(6, seed=2)}}
    trainer = tiny.trained(tmp_path, eval_strategy="steps", eval_steps=2, parts=parts)
    lines = [line for line in trainer.state.log_history if any(key.startswith("eval_") for key in line)]
    names = {key.split("_")[1] for line in lines for key in line if key.startswith("eval_")}
    assert names == {"near", "far"}
    last = {key: value for line in lines for key, value in line.items()}
    assert last["eval_near_loss"] != last["eval_far_loss"]
    assert {"eval_near_rewards/margins", "eval_far_logps/chosen"} <= set(last)
    assert last["eval_far_loss"] == pytest.approx(trainer.evaluate(tiny.dataset(6, seed=2))["eval_loss"], rel=1e-6)
    assert set(trainer.data_reports) >= {"train", "eval near", "eval far"}


def test_evaluate_takes_raw_prepared_and_streamed_rows(tmp_path):
    rows = tiny.dataset(7, seed=3)
    trainer = tiny.trained(tmp_path, parts={"eval_dataset": rows})
    own = trainer.evaluate()["eval_loss"]
    assert abs(own - LN2) > 1e-3
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(own, rel=1e-6)
    assert trainer.evaluate(as_stream(rows))["eval_loss"] == pytest.approx(own, rel=1e-6)
    assert trainer.evaluate(Dataset.from_list(tiny.rows(7, seed=3)))["eval_loss"] == pytest.approx(own, rel=1e-6)
    by_name = trainer.evaluate({"one": rows, "two": tiny.dataset(3)})
    assert by_name["eval_one_loss"] == pytest.approx(own, rel=1e-6)
    assert "eval_two_loss" in by_name


def test_evaluate_before_and_between_training(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=2)
    assert trainer.evaluate(tiny.dataset(5))["eval_loss"] == pytest.approx(LN2, abs=2e-6)
    trainer.train()
    want = tiny.trained(tmp_path, max_steps=2)
    assert tiny.losses(trainer) == tiny.losses(want)
    tiny.assert_same_weights(tiny.weights(trainer.model), tiny.weights(want.model))


def test_predict(tmp_path):
    rows = tiny.dataset(7, seed=3)
    trainer = tiny.trained(tmp_path)
    output = trainer.predict(rows)
    assert output.metrics["test_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-6)
    assert output.predictions["logps/chosen"].shape == (7,)
    assert output.label_ids.tolist() == list(range(7))


def test_best_model_by_a_metric_of_ours(tmp_path):
    trainer = tiny.trained(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=True,
        parts={"eval_dataset": tiny.dataset(6, seed=2)},
    )
    key = "eval_rewards/margins"
    seen = [line[key] for line in trainer.state.log_history if key in line]
    assert len(seen) == 2
    assert trainer.state.best_metric == max(seen)
    assert trainer.evaluate()[key] == pytest.approx(max(seen), rel=1e-5)


# --- losses ---

# Squares of nats have steep slopes: 50 and 0.1 x 200 per nat of a completion.
NEEDS: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 1e-3},
    "cal_dpo": {"learning_rate": 1e-4},
    "sppo_hard": {"learning_rate": 1e-4},
}
BUILTIN = [name for name in LOSSES if LOSSES[name].builtin]


def test_every_promised_loss_is_registered():
    promised = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
        "sigmoid_norm simpo orpo cpo dpop cal_dpo chi_po odpo"
    )
    assert set(promised.split()) <= set(BUILTIN)
    assert LOSSES.resolve("aot_pair") == "aot_unpaired"


@pytest.mark.parametrize("name", BUILTIN)
def test_every_loss_trains(name, tmp_path):
    """It lowers itself on the rows that it was just trained on, and every weight has moved."""
    start = tiny.weights(tiny.llama())
    rows = tiny.dataset(4).add_column("margin", [0.5, 1.0, 2.0, 3.0])  # which `odpo` needs
    how: dict[str, Any] = {"train": rows, "max_steps": 3, "learning_rate": 0.01, **NEEDS.get(name, {})}
    trainer = tiny.trained(tmp_path, loss_type=name, **how)
    losses = tiny.losses(trainer)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    after = tiny.weights(trainer.model)
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert [name for name in start if torch.equal(start[name], after[name])] == []


def test_two_losses_with_weights(tmp_path):
    """First step by hand: 0.8 ln 2 + 0.3 NLL, the NLL being the metric of the same line."""
    trainer = tiny.trained(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[0.8, 0.3], max_steps=1)
    (line,) = tiny.log_lines(trainer)
    assert line["loss"] == pytest.approx(0.8 * LN2 + 0.3 * line["nll_loss"], rel=1e-6)


def test_rpo_alpha_by_hand(tmp_path):
    trainer = tiny.trained(tmp_path, rpo_alpha=0.5, max_steps=1)
    (line,) = tiny.log_lines(trainer)
    assert line["loss"] == pytest.approx(LN2 + 0.5 * line["nll_loss"], rel=1e-6)


@pytest.mark.parametrize(("offset", "alpha"), [("log", 1.0), ("log", 0.5), ("linear", 0.5)])
def test_odpo_by_hand(offset, alpha, tmp_path):
    """Before anything is learned D is 0: the first step's loss is the mean of log(1 + e^offset) over the margins."""
    margins = [0.5, 1.0, 2.0, 3.0]
    trainer = tiny.trained(
        tmp_path,
        train=tiny.dataset(4).add_column("margin", margins),
        loss_type="odpo",
        odpo_alpha=alpha,
        odpo_offset=offset,
        max_steps=2,
    )
    offsets = [alpha * (math.log(m) if offset == "log" else m) for m in margins]
    first, second = tiny.losses(trainer)
    assert first == pytest.approx(sum(math.log1p(math.exp(o)) for o in offsets) / 4, abs=2e-6)
    assert second < first


def test_odpo_stops_at_a_margin_without_a_logarithm(tmp_path):
    """One that passed all checks, from a collator of the user's own, is named before the weights are touched."""
    ours = DataCollatorForPreference(tiny.PAD)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = ours(rows)
        return inputs | {"margin": inputs["margin"].where(inputs["example_ids"] != 2, 0.0)}

    rows = tiny.dataset(4).add_column("margin", [0.5, 1.0, 2.0, 3.0])
    trainer = tiny.trainer(tmp_path, train=rows, loss_type="odpo", parts={"data_collator": collate})
    with pytest.raises(FloatingPointError, match=r"optimizer step 1 is not finite \(example_ids \[2\]\)"):
        trainer.train()
    tiny.assert_same_weights(tiny.weights(trainer.model), tiny.weights(tiny.llama()))


@pytest.mark.parametrize(
    "options",
    [
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"use_weighting": True},
        {"use_weighting": True, "wpo_clamp": True},
        {"ld_alpha": 0.3},
        {"label_smoothing": 0.2},
        {"beta": 0.5},
    ],
    ids=str,
)
def test_options_of_the_objective_change_what_is_trained(options, tmp_path):
    plain = tiny.trained(tmp_path, max_steps=3)
    trainer = tiny.trained(tmp_path, max_steps=3, **options)
    assert all(map(math.isfinite, tiny.losses(trainer)))
    assert tiny.moved(tiny.weights(plain.model), tiny.weights(trainer.model)) > 1e-4


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_router_loss_of_a_mixture_of_experts(layout, tmp_path):
    """First step: ln 2 + coefficient x load-balancing loss; it changes the router's training, and 0 switches it off."""
    how: dict[str, Any] = {"layout": layout, "max_steps": 2}
    lines = {
        coef: tiny.log_lines(tiny.trained(tmp_path, model=tiny.mixtral(), router_aux_loss_coef=coef, **how))
        for coef in (0.5, 0.0)
    }
    first = lines[0.5][0]
    assert first["aux_loss"] > 0.5  # 1 x experts at work where all are used alike
    assert first["loss"] == pytest.approx(LN2 + 0.5 * first["aux_loss"], rel=1e-6)
    assert lines[0.0][0]["loss"] == pytest.approx(LN2, abs=2e-6)
    assert "aux_loss" not in lines[0.0][0]
    assert lines[0.5][1]["rewards/margins"] != lines[0.0][1]["rewards/margins"]


def test_router_loss_follows_the_model_unless_told(tmp_path):
    on = tiny.trainer(tmp_path, model=tiny.mixtral(output_router_logits=True, router_aux_loss_coef=0.07))
    assert on.loss_objective.router_weight == 0.07
    assert tiny.trainer(tmp_path, model=tiny.mixtral(output_router_logits=False)).loss_objective.router_weight == 0
    with pytest.raises(ValueError, match=r"--router_aux_loss_coef 0.1 needs a mixture-of-experts model.*Leave"):
        tiny.trainer(tmp_path, router_aux_loss_coef=0.1)


def test_router_loss_under_reentrant_checkpoints_is_refused(tmp_path):
    """It gets no gradient there, and would be logged as if it did."""
    how: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"router_aux_loss_coef.*reentrant.*--router_aux_loss_coef 0"):
        tiny.trainer(tmp_path, model=tiny.mixtral(), router_aux_loss_coef=0.1, **how)
    assert tiny.trainer(tmp_path, model=tiny.mixtral(), **how).loss_objective.router_weight == 0


# --- dropout ---


def test_dropout_is_off_and_loras_is_not(tmp_path):
    model = tiny.llama(attention_dropout=0.3)
    assert tiny.trainer(tmp_path, model=model).model.config.attention_dropout == 0
    dropouts = [layer.self_attn.attention_dropout for layer in model.model.layers]
    assert dropouts == [0, 0]
    for off, want in ((False, 0.4), (True, 0.0)):
        parts = {"peft_config": tiny.lora(lora_dropout=0.4)}
        trainer = tiny.trainer(tmp_path, disable_lora_dropout=off, parts=parts)
        rates = {m.p for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == {want}
    kept = tiny.trainer(tmp_path, model=tiny.llama(attention_dropout=0.3), disable_dropout=False, layout="padded")
    assert kept.model.config.attention_dropout == 0.3


def test_layout_goes_padded_under_neftune(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trained(tmp_path, neftune_noise_alpha=5.0, max_steps=2)
    assert trainer.layout.name == "padded"
    assert "neftune_noise_alpha" in messages(caplog)
    with pytest.raises(ValueError, match=r"--layout flat does not work .*neftune"):
        tiny.trainer(tmp_path, neftune_noise_alpha=5.0, layout="flat")


# --- what is saved ---


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_saved_model_loads_with_plain_transformers(tmp_path):
    trainer = tiny.trained(tmp_path, save_strategy="steps", save_steps=2)
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=0)
    assert loaded.config._attn_implementation == "sdpa"
    assert "dpo_shared_prompt" not in (tmp_path / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny.CHAT_TEMPLATE
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(logits(checkpoint), logits(trainer.model), rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_saved_adapter_loads_with_plain_peft(kind, saved, tmp_path):
    trainer = tiny.trained(tmp_path, model=str(saved), learning_rate=1.0, parts={"peft_config": tiny.lora(**kind)})
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-6)
    assert (logits(loaded) - logits(tiny.llama())).abs().max() > 1e-2
    assert "adapter_model.safetensors" in files(tmp_path)
    assert "model.safetensors" not in files(tmp_path)


def test_saved_continued_adapter_is_the_trained_one(saved, tmp_path):
    """The frozen `ref` beside it must not take its place in the folder."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved), tiny.lora(), adapter_name="style")
    tiny.fill_adapters(model)
    trainer = tiny.trained(tmp_path, model=model, learning_rate=1.0)
    trainer.save_model()
    assert json.loads((tmp_path / "style" / "adapter_config.json").read_text())["r"] == 4
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), tmp_path / "style")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("parts", [{}, {"peft_config": tiny.lora()}], ids=["full", "lora"])
def test_weights_are_safetensors_only(parts, tmp_path):
    trainer = tiny.trained(tmp_path, save_strategy="steps", save_steps=2, parts=parts)
    trainer.save_model()
    written = files(tmp_path)
    assert {name for name in written if name.endswith((".bin", ".pkl", ".pickle", ".ckpt"))} == set()
    assert {name for name in written if name.endswith((".pt", ".pth"))} <= {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }
    assert any(name.endswith(".safetensors") for name in written)
    assert "dpo_state.json" in written


def test_model_card(tmp_path):
    rows = tiny.rows(10)
    rows[3]["rejected"] = rows[3]["chosen"]
    trainer = tiny.trained(
        tmp_path,
        train=Dataset.from_list(rows),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.25],
        beta=0.3,
        eval_strategy="steps",
        eval_steps=4,
        parts={"eval_dataset": tiny.dataset(5, seed=2)},
    )
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    for said in (
        "`sigmoid` + 0.25 `sft`",
        "| beta | 0.3 |",
        "a frozen copy of the model",
        "| layout | flat |",
        "dropped: chosen equals rejected   1 (row 3)",
        "library_name: transformers",
        "dpo_trainer",
        "rewards/margins",
        "eval_rewards/margins",
    ):
        assert said in card, said
    line = tiny.log_lines(trainer)[-1]
    assert f"| loss | {line['loss']:.6g} |" in card
    assert str(tmp_path) not in card


def test_push_to_hub(saved, tmp_path, monkeypatch):
    """The calls that would reach the hub, and what would be uploaded."""
    calls: dict[str, dict[str, Any]] = {}

    class Hub:
        def create_repo(self, name: str, **kwargs: Any) -> SimpleNamespace:
            calls["create_repo"] = {"name": name, **kwargs}
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **kwargs: Any) -> str:
            calls["upload_folder"] = kwargs | {"files": files(Path(kwargs["folder_path"]))}
            return "done"

    monkeypatch.setattr(transformers_trainer, "hf_api", Hub)
    trainer = tiny.trained(tmp_path / "run", model=str(saved), parts={"peft_config": tiny.lora()})
    assert trainer.push_to_hub(tags=["mine"], license="mit") == "done"
    assert calls["create_repo"]["name"] == "run"
    uploaded = calls["upload_folder"]
    assert uploaded["repo_id"] == "me/run"
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= uploaded["files"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| loss | `sigmoid` |" in card
    for said in ("- mine", "- dpo", "license: mit", "library_name: peft"):
        assert said in card, said


# --- bad input: a clear error that names the row and the way out ---


def changed(index: int, **columns: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tiny.rows(6)
    rows[index] = rows[index] | columns
    return rows


def turn(role: str, content: Any = "hay") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def changed_chat(index: int, **columns: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tiny.chat_rows(6)
    rows[index] = rows[index] | columns
    return rows


BAD_ROWS = {
    "missing column": (
        [{"prompt": "a", "chosen": "b"}] * 3,
        {},
        r"train has no column 'rejected' \(it has: prompt, chosen\)",
    ),
    "misspelt column": (
        [{"prompt": "a", "chosen": "b", "rejcted": "c"}] * 3,
        {},
        r"rename_column\('rejcted', 'rejected'\)",
    ),
    "None": (changed(4, chosen=None), {}, r"Row 4 of train, column 'chosen': is None.*dataset.filter"),
    "not a string": (
        [{"prompt": "a", "chosen": 1, "rejected": 2}] * 3,
        {},
        r"Row 0 of train, column 'chosen': is of type int.*Give a string or a list of messages",
    ),
    "content is None": (
        changed_chat(2, rejected=turn("assistant", None)),
        {},
        r"Row 2 of train, column 'rejected\[0\]': has no content.*needs role and content",
    ),
    "wrong role": (
        changed_chat(3, chosen=turn("user")),
        {},
        r"Row 3 of train, column 'chosen': starts with a 'user' turn.*Move the turns",
    ),
    "empty completion": (
        changed(5, rejected=""),
        {"useless_pairs": "error"},
        r"empty completion: 1 \(row 5\).*--useless_pairs drop",
    ),
    "identical": (
        changed(1, chosen=" x", rejected=" x"),
        {"useless_pairs": "error"},
        r"chosen equals rejected: 1 \(row 1\).*--useless_pairs drop",
    ),
    "no room": (
        changed(2, prompt="a" * 80),
        {"useless_pairs": "error", "max_length": 60},
        r"no room for a completion after the prompt: 1 \(row 2\).*raise --max_length",
    ),
    "none left": (
        [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3,
        {},
        r"No pair of train is left: chosen equals rejected: 3 \(rows 0, 1, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case, tmp_path):
    rows, options, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny.trainer(tmp_path, train=Dataset.from_list(rows), **options)


def test_useless_pairs_are_dropped_loudly_and_the_rest_is_trained(tmp_path, caplog):
    rows = tiny.rows(12)
    rows[1] |= {"chosen": " x", "rejected": " x"}
    rows[7] |= {"chosen": " y", "rejected": " y"}
    rows[2]["rejected"] = "  "
    rows[9]["prompt"] = "a" * 80
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trained(tmp_path, train=Dataset.from_list(rows), max_length=60, max_steps=2)
    said = messages(caplog)
    assert re.search(r"dropped: chosen equals rejected +2 \(rows 1, 7\)", said)
    assert re.search(r"dropped: empty completion +1 \(row 2\)", said)
    assert re.search(r"dropped: no room for a completion after the prompt +1 \(row 9\)", said)
    assert json.loads((tmp_path / "data_report.json").read_text())["train"]["counts"]["identical"] == 2
    assert trainer.train_dataset["example_id"] == [0, 3, 4, 5, 6, 8, 10, 11]  # rows keep their numbers
    assert trainer.data_reports["train"].dropped == 4
    assert math.isfinite(tiny.losses(trainer)[-1])


def test_empty_split_in_a_dict(tmp_path):
    empty = tiny.dataset(3).select([])
    with pytest.raises(ValueError, match=r"eval far has no rows"):
        tiny.trainer(tmp_path, parts={"eval_dataset": {"near": tiny.dataset(3), "far": empty}})


def test_empty_training_set(tmp_path):
    with pytest.raises(ValueError, match="train has no rows"):
        tiny.trainer(tmp_path, train=tiny.dataset(3).select([]))


def test_dict_as_training_set(tmp_path):
    with pytest.raises(ValueError, match=r"train is a dict.*Name one of its splits: 'train'"):
        tiny.trainer(tmp_path, train={"train": tiny.dataset(3)})


def test_tokenizer_without_eos(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer has no EOS token.*tokenizer.eos_token ="):
        tiny.trainer(tmp_path, parts={"processing_class": tokenizer})


def test_tokenizer_without_pad_works_with_eos(tmp_path, caplog):
    """Padding is masked, so the numbers are those of a tokenizer with a pad token; the tokenizer stays as it was."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trained(tmp_path, layout="padded", parts={"processing_class": tokenizer})
    assert "no pad token" in messages(caplog)
    assert tokenizer.pad_token is None
    assert tiny.losses(trainer) == tiny.losses(tiny.trained(tmp_path, layout="padded"))


def test_conversations_without_a_template(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    rows = Dataset.from_list(tiny.chat_rows(3))
    with pytest.raises(ValueError, match=r"Row 0 of train is a conversation, and the tokenizer has no chat template"):
        tiny.trainer(tmp_path, train=rows, parts={"processing_class": tokenizer})


def test_model_in_memory_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        tiny.trainer(tmp_path, parts={"processing_class": None})


def test_evaluating_changes_nothing_of_the_training(tmp_path):
    """Bit for bit, with dropout: the loader of an evaluation draws a seed of its own, and its rows come in an order."""
    parts = {"peft_config": tiny.lora(lora_dropout=0.4), "eval_dataset": tiny.dataset()}
    plain = tiny.trained(tmp_path / "plain", parts=parts, max_steps=4)
    often = tiny.trained(tmp_path / "often", parts=parts, max_steps=4, eval_strategy="steps", eval_steps=1)
    assert len([line for line in often.state.log_history if "eval_loss" in line]) == 4
    for name, weight in tiny.weights(plain.model).items():
        assert torch.equal(weight, tiny.weights(often.model)[name]), name


# --- something trains ---


def for_inference(folder: Path) -> PeftModel:
    """As `PeftModel.from_pretrained` loads an adapter where nothing is said."""
    tiny.llama().save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), tiny.lora())
    model.save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")


@pytest.mark.parametrize(
    "options",
    [{}, {"use_separate_reference_adapter": False}, {"reference_free": True}, {"loss_type": "simpo"}],
    ids=str,
)
def test_an_adapter_that_was_loaded_for_inference(options, tmp_path):
    with pytest.raises(ValueError, match=r"Nothing of the model can be trained.*'default'.*is_trainable=True"):
        tiny.trainer(tmp_path, model=for_inference(tmp_path), **options)


def test_the_ways_out_of_an_adapter_for_inference(tmp_path):
    for_inference(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainable = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    for how in (
        {"model": trainable},
        {"model": str(tmp_path / "adapter")},
        {"model": for_inference(tmp_path), "model_adapter_name": "default"},
    ):
        trainer = tiny.trainer(tmp_path, **how)
        assert any(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_frozen_model(checkpointing, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.lora()).merge_and_unload()
    with pytest.raises(
        ValueError, match=r"Nothing of the model can be trained.*merge_and_unload.*requires_grad_\(True\)"
    ):
        tiny.trainer(tmp_path, model=model, gradient_checkpointing=checkpointing)


def test_a_step_without_a_gradient_is_said_once(tmp_path, caplog):
    """Tokens that no row has are all that is trained."""
    config = TrainableTokensConfig(token_indices=[tiny.VOCABULARY - 1], target_modules=["embed_tokens"])
    tiny.trained(tmp_path, parts={"peft_config": config})
    said = [record.message for record in caplog.records if "is 0 for every weight" in record.message]
    assert len(said) == 1
    assert "step 1" in said[0]
    caplog.clear()
    tiny.trained(tmp_path)
    assert "is 0 for every weight" not in caplog.text
