"""Steps against the Trainer's own count, memory against arithmetic and against what a model really keeps."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from dpo_trainer.data import DataCollatorForPreference
from dpo_trainer.inspection.estimate import CHUNK, Run, estimate_memory, optimizer_steps
from dpo_trainer.inspection.plan import _optimizer_bytes
from dpo_trainer.inspection.shape import load_config, shape_of
from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.types import PairBatch

# --- steps ---


def test_steps_by_hand():
    """10 rows by 4: 3 micro-batches, by 2: 2 steps, 2.5 epochs: 5 steps."""
    got = optimizer_steps(10, batch_size=4, accumulation=2, epochs=2.5)
    assert (got.micro_batches_per_epoch, got.per_epoch, got.total, got.rows_per_step) == (3, 2, 5, 8)
    assert optimizer_steps(0, batch_size=4, accumulation=2, epochs=1) is None
    assert optimizer_steps(3, batch_size=4, accumulation=1, epochs=1, drop_last=True) is None


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4, "num_train_epochs": 2},
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3, "num_train_epochs": 1.5},
        {"per_device_train_batch_size": 4, "dataloader_drop_last": True, "num_train_epochs": 1},
        {"per_device_train_batch_size": 4, "max_steps": 7},
    ],
    ids=["plain", "accumulated", "drop-last", "max-steps"],
)
def test_steps_are_those_of_the_trainer(tmp_path, options):
    trainer = tiny.trainer(tmp_path, **{"max_steps": -1, **options})
    args = trainer.args
    want = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    got = optimizer_steps(
        22,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        drop_last=args.dataloader_drop_last,
    )
    assert (got.per_epoch, got.total) == (want[1], want[-1])


# --- shapes ---

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_shape_by_hand():
    """Embedding and head 96 * 32 each; a layer: q and o 32 * 32 each, k and v 32 * 16 each, three MLP matrices of 32 * 48, two norms."""
    got = shape_of(LlamaConfig(**SIZES, **HEADS))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert got.parameters == got.trainable == 2 * 96 * 32 + 3 * layer + 32
    assert (got.layers, got.hidden, got.query, got.key_value, got.mlp, got.vocabulary) == (3, 32, 32, 32, 48, 96)
    assert got.weight_bytes == 4 * got.parameters
    assert got.why_not_flat is None


def test_half_precision_halves_the_weights():
    config = LlamaConfig(**SIZES, **HEADS)
    assert 2 * shape_of(config, dtype="bfloat16").weight_bytes == shape_of(config).weight_bytes
    config.dtype = torch.bfloat16
    assert shape_of(config, dtype="auto").weight_bytes == 2 * shape_of(config).parameters


def test_an_adapter_trains_what_it_adds():
    """Rank 4 on q and v: 4 * (32 + 32) and 4 * (32 + 16) in each of 3 layers."""
    config = LlamaConfig(**SIZES, **HEADS)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    got = shape_of(config, peft_config=lora)
    assert got.trainable == 3 * (4 * 64 + 4 * 48)
    assert got.parameters == shape_of(config).parameters + got.trainable


def test_four_bits_are_for_linear_layers_but_the_head():
    """4.5 bits with their scales; embedding, head and norms are raised to float32."""
    config = LlamaConfig(**SIZES, **HEADS)
    linear = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    rest = shape_of(config).parameters - linear
    assert shape_of(config, bits=4).weight_bytes == linear * 4.5 / 8 + 4 * rest
    assert shape_of(config, bits=8).weight_bytes == linear + 4 * rest


def test_experts_that_a_token_visits():
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    assert shape_of(config).mlp == 2 * 48
    assert shape_of(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)).mlp == 4 * 32


def test_no_weights_are_made():
    """70 billion parameters would not fit into this machine."""
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    config.num_key_value_heads = 8
    assert shape_of(config, dtype="bfloat16").parameters > 68e9


def test_the_config_of_an_adapter_is_that_of_its_base(tmp_path):
    base = tmp_path / "base"
    tiny.llama().save_pretrained(base)
    adapter = tiny.lora()
    adapter.base_model_name_or_path = str(base)
    adapter.save_pretrained(tmp_path / "adapter")
    config, peft_config = load_config(str(tmp_path / "adapter"), revision=None, trust_remote_code=False)
    assert config.hidden_size == 32
    got = shape_of(config, peft_config=peft_config)
    assert 0 < got.trainable < got.parameters


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_config(str(tmp_path), revision=None, trust_remote_code=False)


# --- memory ---


def run_of(**changes) -> Run:
    defaults = {
        "tokens": 100,
        "scored": 60,
        "mixed_precision": False,
        "gradient_checkpointing": False,
        "reference_copy": True,
        "optimizer_bytes": 8.0,
    }
    return Run(**{**defaults, **changes})


def parts(memory) -> dict[str, int]:
    return {part.name: part.bytes for part in memory.fixed}


def test_memory_by_hand():
    """P parameters in float32: 4 P weights, 4 P reference, 4 P gradients, 8 P Adam. 60 scored tokens of 96 logits, four times."""
    shape = shape_of(LlamaConfig(**SIZES, **HEADS))
    memory = estimate_memory(shape, run_of())
    p = shape.parameters
    assert parts(memory) == {
        "weights": 4 * p,
        "reference": 4 * p,
        "gradients": 4 * p,
        "optimizer": 8 * p,
        "logits": 4 * 4 * 60 * 96,
    }
    layer = 32 * 32 + 4 * (2 * 32 + 32 + 4 * 48)
    assert memory.activations.bytes == 100 * 3 * layer
    assert memory.activations_checkpointed.bytes == 100 * (3 * 32 * 4 + layer)
    assert memory.total == memory.total_plain == sum(parts(memory).values()) + memory.activations.bytes


def test_a_reference_below_an_adapter_costs_nothing():
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    shape = shape_of(LlamaConfig(**SIZES, **HEADS), peft_config=lora)
    memory = estimate_memory(shape, run_of(reference_copy=False))
    assert parts(memory)["reference"] == 0
    assert parts(memory)["gradients"] == 4 * shape.trainable


def test_logits_are_one_chunk_at_most():
    shape = shape_of(LlamaConfig(**{**SIZES, "vocab_size": 2**17}, **HEADS))
    logits = parts(estimate_memory(shape, run_of(scored=10**6)))["logits"]
    assert logits == 4 * 4 * CHUNK


def test_mixed_precision_keeps_copies_of_the_weights():
    """With gradient checkpointing those of the trained weights alone: frozen ones are cast again layer by layer."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    shape = shape_of(LlamaConfig(**SIZES, **HEADS), peft_config=lora)
    for checkpointing, copies in ((False, shape.parameters), (True, shape.trainable)):
        memory = estimate_memory(shape, run_of(mixed_precision=True, gradient_checkpointing=checkpointing))
        assert parts(memory)["half-precision copies"] == 2 * copies


@pytest.mark.parametrize(
    ("name", "size", "want"),
    [
        ("adamw_torch_fused", 4, 8),
        ("adamw_torch", 2, 4),
        ("paged_adamw_8bit", 4, 2),
        ("lion_32bit", 4, 4),
        ("sgd", 4, 0),
    ],
)
def test_bytes_of_the_optimizer(name, size, want):
    assert _optimizer_bytes(name, size) == want


def kept_for_backward(config, rows: list[dict], autocast: bool = False) -> tuple[int, int]:
    """Bytes that a forward pass keeps for its backward, weights left out, and its tokens."""
    torch.manual_seed(0)
    model = config[0](config[1]).train()
    batch = PairBatch.from_inputs(DataCollatorForPreference(pad_token_id=0)(rows))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: list[torch.Tensor] = []  # alive until the end, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        Scorer(model)(model, batch, extras=False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for at, size in storages.items() if at not in weights), batch.num_tokens


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_activations_are_what_a_model_keeps(kind):
    """The difference of two depths is what layers keep; the rest (embeddings, logits, masks) is not theirs.

    Within 5 %: the formula leaves out the square roots of the norms, one number per token.
    """
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
    model, config = kinds[kind]
    rows = [{"prompt_ids": [1] * 32, "chosen_ids": [2] * 48, "rejected_ids": [3] * 40}] * 2
    kept = {}
    for depth in (2, 4):
        sizes = config(**{**SIZES, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": depth}, **HEADS)
        kept[depth], tokens = kept_for_backward((model, sizes), rows)
    per_token = (kept[4] - kept[2]) / 2 / tokens
    assert shape_of(sizes).kept_per_token(4) == pytest.approx(per_token, rel=0.05)
