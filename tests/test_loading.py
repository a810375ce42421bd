"""Models, tokenizers, adapters, quantisation and dropout: everything offline, on tiny models made from a config."""

from __future__ import annotations

import importlib.util
import json

import huggingface_hub
import pytest
import tiny
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tiny_tokenizers import byte_bpe
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5Model,
)

from dpo_trainer.models.adapters import apply_peft, make_quantization_config
from dpo_trainer.models.dropout import disable_dropout
from dpo_trainer.models.load import load_model, load_tokenizer
from dpo_trainer.online.feedback.reward_model import RewardModel

VOCAB = len(byte_bpe())
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, **sizes | changes))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    byte_bpe().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_folder(llama_folder, tmp_path):
    """An adapter on tiny-llama that changes its output (a fresh LoRA has B = 0 and does not)."""
    model = get_peft_model(load_model(str(llama_folder)), LoraConfig(**LORA, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(10, 22)[None]).logits


# --- models ---


def test_a_folder_loads_in_float32_with_the_weights_that_were_saved(llama_folder):
    model = load_model(str(llama_folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=0, atol=0)


def test_attention_scores_are_capped(tmp_path):
    """transformers before 5.21 loads Gemma 2 with `sdpa`, which leaves the cap out."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(vocab_size=300, num_key_value_heads=1, attn_logit_softcapping=0.5, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config._attn_implementation == "eager"
    config.num_labels = 1
    classifier = Gemma2ForSequenceClassification(config)
    classifier.config._attn_implementation = "sdpa"
    RewardModel(classifier, tiny.tokenizer())
    assert classifier.config._attn_implementation == "eager"


def test_bfloat16_weights_come_back_as_float32_unless_asked(tmp_path):
    """transformers' own default, "auto", would train bfloat16 weights, which lose small updates."""
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    kwargs = {"dtype": "bfloat16"}
    assert load_model(str(tmp_path)).dtype == torch.float32
    assert load_model(str(tmp_path), model_init_kwargs=kwargs).dtype == torch.bfloat16
    assert load_model(str(tmp_path), model_init_kwargs={"torch_dtype": "auto"}).dtype == torch.bfloat16
    assert kwargs == {"dtype": "bfloat16"}, "the caller's dict must stay as it is"


def test_an_adapter_folder_loads_base_and_adapter_ready_to_train(adapter_folder, llama_folder):
    model = load_model(str(adapter_folder))
    assert isinstance(model, PeftModel)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 8  # A and B of q and v in two layers
    assert all("lora_" in name for name in trainable)
    assert not torch.equal(logits(model), logits(load_model(str(llama_folder)))), "the adapter is not applied"


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "loaded"])
def test_adapters_get_gradients_under_checkpointing(adapter_folder, llama_folder, fresh, use_reentrant):
    model = (
        apply_peft(load_model(str(llama_folder)), LoraConfig(**LORA, init_lora_weights=False), quantized=False)
        if fresh
        else load_model(str(adapter_folder))
    )
    model.train()
    tiny.checkpoint_layers(model.get_base_model(), use_reentrant)
    model(input_ids=torch.arange(10, 22)[None]).logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_missing_folder_suggests_its_neighbour(llama_folder):
    with pytest.raises(ValueError, match=r"There is no folder .*tiny-lama'\. Did you mean 'tiny-llama'\?"):
        load_model(str(llama_folder.parent / "tiny-lama"))


def test_folder_without_a_model_names_the_checkpoint_in_it(llama_folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "checkpoint-20")
    with pytest.raises(ValueError, match=r"neither config\.json nor adapter_config\.json.*subfolder 'checkpoint-20'"):
        load_model(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it is empty"):
        load_model(str(tmp_path / "empty"))


def test_a_file_is_not_a_model(llama_folder):
    with pytest.raises(ValueError, match="is a file: give the folder"):
        load_model(str(llama_folder / "model.safetensors"))


def test_pickled_weights_are_refused_with_a_way_to_convert_them(llama_folder, tmp_path):
    torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"pickle alone \(pytorch_model\.bin\).*use_safetensors=False"):
        load_model(str(tmp_path))


def test_pickled_adapter_is_refused(adapter_folder):
    (adapter_folder / "adapter_model.safetensors").unlink()
    torch.save({}, adapter_folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors, and pickled weights \(\.bin\) are refused"):
        load_model(str(adapter_folder))


def test_config_without_weights(llama_folder, tmp_path):
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"no weights: no \.safetensors file is in it \(it holds config\.json"):
        load_model(str(tmp_path))


def test_truncated_safetensors(llama_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama_folder / name).read_bytes()[:3000])
    with pytest.raises(ValueError, match="did not load"):
        load_model(str(tmp_path))


def test_an_encoder_decoder_is_not_a_causal_model(tmp_path):
    T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a causal language model"):
        load_model(str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_hub_out_of_reach():
    with pytest.raises(ValueError, match=r"no folder 'some/model', and the hub.*out of reach.*give its folder"):
        load_model("some/model")


def test_adapter_whose_base_is_gone(adapter_folder):
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    (adapter_folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(
        ValueError, match=r"The base model of the adapter .* did not load: There is no folder '\./gone'"
    ):
        load_model(str(adapter_folder))
    (adapter_folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it belongs to"):
        load_model(str(adapter_folder))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "bfloat61"}, r"--dtype 'bfloat61' is not one of .*Did you mean 'bfloat16'\?"),
        ({"trust_remote_code": True}, "cannot hold 'trust_remote_code': use --trust_remote_code"),
        ({"use_safetensors": False}, "only safetensors are read"),
        ({"no_such_thing": 1}, "--model_init_kwargs .*no_such_thing.* does not suit"),
        ("dtype=float32", "must be a JSON object"),
    ],
)
def test_bad_model_init_kwargs(llama_folder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(llama_folder), model_init_kwargs=kwargs)


def test_device_map_is_refused_under_a_launcher(llama_folder, monkeypatch):
    kwargs = {"device_map": "cpu"}
    assert load_model(str(llama_folder), model_init_kwargs=kwargs).device.type == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"device_map='cpu'.*every one of the 2 processes"):
        load_model(str(llama_folder), model_init_kwargs=kwargs)


# --- tokenizers ---


def test_tokenizer_of_a_folder_and_of_an_adapter_without_one(llama_folder, adapter_folder):
    text = "hi: abc"
    want = byte_bpe()(text).input_ids
    assert load_tokenizer(str(llama_folder))(text).input_ids == want
    assert not list(adapter_folder.glob("token*"))
    assert load_tokenizer(str(adapter_folder))(text).input_ids == want


def test_folder_without_a_tokenizer(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer .*processing_class"):
        load_tokenizer(str(tmp_path))


@pytest.mark.usefixtures("offline")
def test_tokenizer_out_of_reach():
    with pytest.raises(ValueError, match="The tokenizer of 'some/model' did not load"):
        load_tokenizer("some/model")


# --- adapters and quantisation ---


def test_apply_peft_trains_the_adapter_alone_in_float32():
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = apply_peft(tiny_llama().bfloat16(), config, quantized=False)
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 4  # A and B of q in two layers
    assert set(trainable.values()) == {torch.float32}
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert config.task_type is None, "the caller's config must stay as it is"


def test_a_second_adapter_is_refused_with_the_way_out():
    model = apply_peft(tiny_llama(), LoraConfig(**LORA), quantized=False)
    with pytest.raises(ValueError, match=r"already carries an adapter.*merge_and_unload"):
        apply_peft(model, LoraConfig(**LORA), quantized=False)


def test_bad_peft_arguments():
    with pytest.raises(ValueError, match="cannot be named 'train'"):
        apply_peft(tiny_llama(), LoraConfig(**LORA), quantized=False, adapter_name="train")
    with pytest.raises(ValueError, match=r"must be a PeftConfig such as peft\.LoraConfig, got dict"):
        apply_peft(tiny_llama(), {"r": 4}, quantized=False)


def test_quantization_flags(monkeypatch):
    assert make_quantization_config() is None
    with pytest.raises(ValueError, match="--load_in_4bit and --load_in_8bit exclude each other"):
        make_quantization_config(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="--bnb_4bit_quant_type 'nf3' is not one of nf4, fp4"):
        make_quantization_config(load_in_4bit=True, bnb_4bit_quant_type="nf3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--load_in_8bit needs bitsandbytes: `pip install dpo_trainer\[quant"):
        make_quantization_config(load_in_8bit=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_carries_a_float32_adapter(tmp_path, bits):
    """bitsandbytes runs on a CPU. The base keeps its quantised matrices, all else is float32, and the adapter learns."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = make_quantization_config(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = load_model(str(tmp_path), quantization_config=quantization)
    held_in = model.model.layers[0].self_attn.q_proj.weight.dtype
    assert held_in == (torch.uint8 if bits == 4 else torch.int8)

    model = apply_peft(model, LoraConfig(**LORA, init_lora_weights=False), quantized=True)
    others = [p for p in model.parameters() if p.dtype not in (torch.uint8, torch.int8)]
    assert {p.dtype for p in others} == {torch.float32}

    def forward_and_gradients():
        model.train().zero_grad()
        out = model(input_ids=torch.arange(10, 22)[None]).logits
        out.square().mean().backward()
        return out.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    out, grads = forward_and_gradients()
    assert len(grads) == 8
    assert all(grad.abs().max() > 0 for grad in grads)
    # An evaluation in between changes nothing, and sees the same model: to the bit but for a few roundings in 4 bits. In 8
    # bits it rounds the activations to int8 as well, on a CPU (logits of up to about 0.5; worst seen 5e-3).
    torch.testing.assert_close(logits(model), out, rtol=0, atol=1e-6 if bits == 4 else 2e-2)
    torch.testing.assert_close(forward_and_gradients()[1], grads, rtol=0, atol=0)


# --- dropout ---


def wobble(model: nn.Module) -> float:
    """Largest difference between two training-mode forward passes: 0 exactly if nothing is random."""
    model.train()
    with torch.no_grad():
        first, second = (model(input_ids=torch.arange(10, 40)[None]).logits for _ in range(2))
    return (first - second).abs().max().item()


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def tiny_opt() -> OPTForCausalLM:
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    return OPTForCausalLM(
        OPTConfig(vocab_size=VOCAB, max_position_embeddings=64, attention_dropout=0.3, layerdrop=0.5, **sizes)
    )


@pytest.mark.parametrize(
    "make",
    [tiny_gpt2, lambda: tiny_llama(attention_dropout=0.5), tiny_opt],
    ids=["modules", "attention_dropout", "layerdrop"],
)
def test_no_dropout_is_left(make):
    model = make()
    assert wobble(model) > 0, "this model has no dropout to switch off"
    disable_dropout(model, lora=False)
    assert wobble(model) == 0


def test_rates_in_nested_configs_and_odd_modules():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout1d(0.2), nn.AlphaDropout(0.2)
            self.hidden_dropout, self.dropout_layers, self.use_dropout = 0.3, 2, True
            self.config = LlamaConfig(attention_dropout=0.1)
            self.config.text_config = LlamaConfig(attention_dropout=0.4)

    odd = Odd()
    disable_dropout(odd, lora=False)
    rates = (odd.a.p, odd.b.p, odd.hidden_dropout, odd.config.attention_dropout)
    assert rates == (0, 0, 0, 0)
    assert odd.config.text_config.attention_dropout == 0
    assert (odd.dropout_layers, odd.use_dropout) == (2, True), "a count and a switch are no rates"


def test_lora_dropout_stays_unless_told():
    config = LoraConfig(**LORA, lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(tiny_llama(attention_dropout=0.5), config)
    disable_dropout(model, lora=False)
    assert wobble(model) > 0, "LoRA's dropout was switched off"
    with model.disable_adapter():
        assert wobble(model) == 0, "the model's own dropout is still on"
    disable_dropout(model, lora=True)
    assert wobble(model) == 0


def test_rank_dropout_of_loha():
    config = LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], rank_dropout=0.5, init_weights=False)
    model = get_peft_model(tiny_llama(), config)
    disable_dropout(model, lora=False)
    assert wobble(model) > 0
    disable_dropout(model, lora=True)
    assert wobble(model) == 0
