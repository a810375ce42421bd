"""The digest of a reference changes with its logits, and with nothing else."""

from __future__ import annotations

import contextlib
import copy
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from dpo_trainer.models.unwrap import evaluation_mode
from dpo_trainer.reference import UntrainedPolicy, hashing
from dpo_trainer.reference.identity import identify
from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.training.run_identity import model_identity

IDS = torch.tensor([[2, 40, 41, 42, 90, 91, 3, 77, 78, 1], [2, 200, 100, 50, 3, 9, 8, 7, 6, 5]])

# Float32 on one CPU. Sums in another order (sdpa against eager) move these logits by at most 1e-6.
NOISE = 1e-5
CHANGE = 1e-3


@dataclass
class Reference:
    """A model as a reference would run it."""

    model: nn.Module
    adapter: str | None = None
    precision: str = "float32"

    def digest(self) -> str:
        return identify(self.model, adapter=self.adapter, precision=self.precision).digest

    def logits(self) -> Tensor:
        mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bfloat16")
        with torch.no_grad(), evaluation_mode(self.model), self._adapters(), mixed:
            return self.model(input_ids=IDS, use_cache=False).logits.float()

    @contextlib.contextmanager
    def _adapters(self) -> Iterator[None]:
        if not isinstance(self.model, PeftModel):
            yield
        elif self.adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(self.adapter)
            yield


def farthest(one: Reference, other: Reference) -> float:
    length = IDS.shape[1]  # prompt tuning puts tokens of its own in front
    return (one.logits()[:, -length:] - other.logits()[:, -length:]).abs().max().item()


# --- building blocks ---


def edited(change: Callable[[Any], Any], model: nn.Module | None = None, **how: Any) -> Reference:
    model = tiny.llama() if model is None else model
    with torch.no_grad():
        change(model)
    return Reference(model, **how)


def lora(name: str = "style", seed: int = 1, **options: Any) -> PeftModel:
    model = get_peft_model(tiny.llama(), tiny.lora(**options), adapter_name=name)
    tiny.fill_adapters(model, seed)
    return model


def with_head(name: str = "style", by: float = 0.1) -> PeftModel:
    """LoRA, and an output embedding that is trained as a whole."""
    model = lora(name, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save[name].weight.add_(by)
    return model


def with_tokens(by: float = 0.5) -> PeftModel:
    """LoRA, and the embeddings of two tokens."""
    model = lora(trainable_token_indices={"embed_tokens": [41, 90]})
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta["style"].add_(by)
    return model


def with_experts() -> PeftModel:
    """LoRA on parameters rather than modules: two layers of PEFT around one module."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(tiny.mixtral(), config, adapter_name="style")
    tiny.fill_adapters(model)
    return model


PROMPTS: dict[str, Any] = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=8,
        encoder_num_layers=2,
        encoder_dropout=0.5,
    ),
}


def prompted(kind: str, seed: int = 3) -> PeftModel:
    base = tiny.llama()
    torch.manual_seed(seed)
    return get_peft_model(base, copy.deepcopy(PROMPTS[kind]), adapter_name="style")


def ia3() -> PeftModel:
    config = IA3Config(target_modules=["k_proj", "down_proj", "up_proj"], feedforward_modules=["down_proj", "up_proj"])
    model = get_peft_model(tiny.llama(), config, adapter_name="style")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_" in name:
                parameter.add_(0.3)
    return model


def gemma2(**config: Any) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**{**tiny.SIZES, "head_dim": 8, **config}))


def set_scaling(model: PeftModel, value: float) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj.scaling["style"] = value


def first_norm(model: PreTrainedModel) -> nn.Module:
    return model.model.layers[0].input_layernorm


# --- what must change it ---


def llama(**config: Any) -> Reference:
    return Reference(tiny.llama(**config))


def styled(model: PeftModel) -> Reference:
    return Reference(model, "style")


CHANGES: dict[str, Callable[[], tuple[Reference, Reference]]] = {
    "weights": lambda: (llama(), llama(seed=1)),
    "a weight": lambda: (llama(), edited(lambda m: m.model.layers[1].mlp.up_proj.weight[3, 4].add_(1))),
    "a weight of a norm": lambda: (llama(), edited(lambda m: m.model.norm.weight[3].add_(0.1))),
    "weights swapped": lambda: (
        llama(),
        edited(lambda m: setattr(m.model, "layers", nn.ModuleList(reversed(m.model.layers)))),
    ),
    "a bias": lambda: (llama(mlp_bias=True), edited(lambda m: m.model.layers[0].mlp.up_proj.bias.add_(0.1), tiny.llama(mlp_bias=True))),
    "dtype": lambda: (llama(), Reference(tiny.llama().bfloat16())),
    "dtype of a layer": lambda: (
        edited(lambda m: m.bfloat16()),
        edited(lambda m: m.bfloat16().lm_head.register_forward_pre_hook(lambda _, x: (x[0].float(),)) and m.lm_head.float()),
    ),
    "mixed precision": lambda: (llama(), Reference(tiny.llama(), precision="bfloat16")),
    "rope_theta": lambda: (llama(), llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "rope scaling": lambda: (
        llama(),
        llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    ),
    "rms_norm_eps": lambda: (llama(), llama(rms_norm_eps=0.1)),
    "activation": lambda: (llama(), llama(hidden_act="relu")),
    "tied embeddings": lambda: (llama(), llama(tie_word_embeddings=True)),
    "cap of the logits": lambda: (Reference(gemma2()), Reference(gemma2(final_logit_softcapping=1.0))),
    "cap of attention": lambda: (
        Reference(gemma2(attn_implementation="eager")),
        Reference(gemma2(attn_implementation="eager", attn_logit_softcapping=0.1)),
    ),
    "sliding window": lambda: (Reference(gemma2()), Reference(gemma2(sliding_window=2))),
    "experts per token": lambda: (Reference(tiny.mixtral()), Reference(tiny.mixtral(num_experts_per_tok=1))),
    "a number of a module": lambda: (llama(), edited(lambda m: setattr(first_norm(m), "variance_epsilon", 0.1))),
    "an adapter": lambda: (Reference(lora()), styled(lora())),
    "another adapter": lambda: (styled(lora()), styled(lora(seed=2))),
    "a weight of the adapter": lambda: (
        styled(lora()),
        edited(
            lambda m: m.get_base_model().model.layers[1].mlp.up_proj.lora_B["style"].weight[3, 2].add_(1),
            lora(),
            adapter="style",
        ),
    ),
    "the base below the adapter": lambda: (
        styled(lora()),
        edited(lambda m: m.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.add_(0.1), lora(), adapter="style"),
    ),
    "lora_alpha": lambda: (styled(lora()), styled(lora(lora_alpha=16))),
    "alpha_pattern": lambda: (styled(lora()), styled(lora(alpha_pattern={"up_proj": 64}))),
    "rank": lambda: (styled(lora()), styled(lora(r=8))),
    "rslora": lambda: (styled(lora()), styled(lora(use_rslora=True))),
    "dora": lambda: (styled(lora()), styled(lora(use_dora=True))),
    "scaling at run time": lambda: (
        styled(lora()),
        edited(lambda m: set_scaling(m, 20.0), lora(), adapter="style"),
    ),
    "scaling of an expert's adapter at run time": lambda: (
        styled(with_experts()),
        edited(
            lambda m: m.get_base_model().model.layers[0].mlp.experts.scaling.update(style=200.0),
            with_experts(),
            adapter="style",
        ),
    ),
    "an embedding trained as a whole": lambda: (styled(lora()), styled(with_head())),
    "a weight of an embedding trained as a whole": lambda: (
        styled(with_head()),
        edited(lambda m: m.get_base_model().lm_head.modules_to_save["style"].weight[5, 5].add_(1), with_head(), adapter="style"),
    ),
    "embeddings of tokens": lambda: (styled(with_tokens()), styled(with_tokens(by=0.6))),
    "tokens that switch the adapter on": lambda: (
        styled(lora(alora_invocation_tokens=[40, 41])),
        styled(lora(alora_invocation_tokens=[90, 91])),
    ),
    "ia3": lambda: (Reference(ia3()), styled(ia3())),
    **{
        f"{kind}, {how}": lambda kind=kind, first=first: (first(kind), styled(prompted(kind, seed=4)))
        for kind in PROMPTS
        for how, first in {
            "on": lambda kind: Reference(prompted(kind)),
            "other weights": lambda kind: styled(prompted(kind)),
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_logits_changes_the_digest(change):
    before, after = CHANGES[change]()
    assert farthest(before, after) > CHANGE
    assert before.digest() != after.digest()


def test_one_ulp_of_one_weight():
    weight = (model := tiny.llama()).model.layers[1].mlp.down_proj.weight
    before = identify(model).digest
    with torch.no_grad():
        weight[5, 7] = weight[5, 7].nextafter(torch.tensor(float("inf")))
    assert identify(model).digest != before
    with torch.no_grad():
        weight[5, 7] = weight[5, 7].nextafter(torch.tensor(float("-inf")))
    assert identify(model).digest == before


# --- what must not ---


def in_reverse(model: PreTrainedModel) -> None:
    """Every module has its parts, and every part its weights, in another order."""
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            module._modules = dict(reversed(module._modules.items()))
            module._parameters = dict(reversed(module._parameters.items()))


def add_untrained(model: PeftModel) -> None:
    model.add_adapter("other", tiny.lora(r=2, target_modules=["q_proj"]))
    tiny.fill_adapters(model, adapter="other")


def second_head(model: PeftModel) -> None:
    model.add_adapter("other", tiny.lora(modules_to_save=["lm_head"]))
    tiny.fill_adapters(model, adapter="other")


def dropout(model: PreTrainedModel) -> None:
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


def generation(model: PreTrainedModel) -> None:
    model.generation_config.temperature = 0.1
    model.generation_config.do_sample = True


def tokens(model: PreTrainedModel) -> None:
    """As the trainer does for a tokenizer with other special tokens."""
    model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id = 7, 8, 9


EDITS: dict[str, Callable[[Any], Any]] = {
    "name": lambda m: setattr(m.config, "_name_or_path", "/elsewhere/model"),
    "version": lambda m: setattr(m.config, "transformers_version", "4.0.0"),
    "architectures": lambda m: setattr(m.config, "architectures", ["LlamaForCausalLM"]),
    "use_cache": lambda m: setattr(m.config, "use_cache", False),
    "dtype of the config": lambda m: setattr(m.config, "dtype", torch.float32),
    "generation": generation,
    "special tokens": tokens,
    "attention": lambda m: m.set_attn_implementation("eager"),
    "dropout": dropout,
    "evaluation mode": lambda m: m.eval(),
    "frozen": lambda m: m.requires_grad_(False),
    "checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "gradients of inputs": lambda m: m.enable_input_require_grads(),
    "order": in_reverse,
    "used": lambda m: m(input_ids=IDS),
    "not contiguous": lambda m: [setattr(p, "data", p.data.t().contiguous().t()) for p in m.parameters() if p.dim() == 2],
}  # fmt: skip
ADAPTER_EDITS: dict[str, Callable[[Any], Any]] = {
    "another adapter": add_untrained,
    "another adapter is active": lambda m: (add_untrained(m), m.set_adapter("other")),
    "another embedding trained as a whole": second_head,
    "lora dropout": lambda m: (
        [setattr(part, "p", 0.5) for name, part in m.named_modules() if name.endswith("lora_dropout.style")],
        setattr(m.peft_config["style"], "lora_dropout", 0.5),
    ),
    "inference mode": lambda m: setattr(m.peft_config["style"], "inference_mode", True),
    "its paths": lambda m: setattr(m.peft_config["style"], "base_model_name_or_path", "/elsewhere/model"),
    "its revision": lambda m: setattr(m.peft_config["style"], "revision", "main"),
}
SAME: dict[str, Callable[[], tuple[Reference, Reference]]] = {
    **{name: lambda edit=edit: (llama(), edited(edit)) for name, edit in EDITS.items()},
    **{
        f"{name}, beside an adapter": lambda edit=edit: (styled(lora()), edited(edit, lora(), adapter="style"))
        for name, edit in ADAPTER_EDITS.items()
    },
    "wrapped": lambda: (llama(), Reference(nn.DataParallel(tiny.llama()))),
    "tied in memory": lambda: (
        llama(tie_word_embeddings=True),
        edited(lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.clone())), tiny.llama(tie_word_embeddings=True)),
    ),
    "below LoRA": lambda: (llama(), Reference(lora())),
    "below two": lambda: (llama(), edited(add_untrained, lora())),
    "below DoRA": lambda: (llama(), Reference(lora(use_dora=True))),
    "below a trained embedding": lambda: (llama(), Reference(with_head())),
    "below LoRA on both embeddings": lambda: (llama(), Reference(lora(target_modules=["lm_head", "embed_tokens"]))),
    "below trained tokens": lambda: (llama(), Reference(with_tokens())),
    "below IA3": lambda: (llama(), Reference(ia3())),
    "below LoRA on parameters": lambda: (Reference(tiny.mixtral()), Reference(with_experts())),
    **{f"below {kind}": lambda kind=kind: (llama(), Reference(prompted(kind))) for kind in PROMPTS},
    "the adapter's name": lambda: (styled(lora()), Reference(lora("other.one".replace(".", "-")), "other-one")),
    "the name of one with an embedding": lambda: (styled(with_head()), Reference(with_head("other"), "other")),
    "targets said in another way": lambda: (
        styled(lora(target_modules=["q_proj", "v_proj"])),
        styled(lora(target_modules=r".*\.(q|v)_proj")),
    ),
    "dropout in the adapter's config": lambda: (styled(lora()), styled(lora(lora_dropout=0.3))),
    "a deep copy": lambda: (llama(), Reference(copy.deepcopy(tiny.llama()))),
    "a deep copy with an adapter": lambda: (styled(with_head()), styled(copy.deepcopy(with_head()))),
}  # fmt: skip


@pytest.mark.parametrize("same", SAME)
def test_what_leaves_logits_alone_leaves_the_digest_alone(same):
    before, after = SAME[same]()
    assert before.model is not after.model
    assert before.digest() == after.digest()
    assert farthest(before, after) < NOISE
    assert before.digest() == after.digest()  # nor do the forwards change it


def test_the_base_of_a_peft_model_alone():
    """Its adapters may be on: that cannot be seen from the call, so they must be off."""
    model = lora()
    with pytest.raises(ValueError, match=r"active adapter in model\.layers.* is no PeftModel"):
        identify(model.get_base_model())
    with model.disable_adapter():
        assert identify(model.get_base_model()) == identify(tiny.llama())


# --- saved and loaded ---


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_saved_and_loaded(tmp_path):
    model = tiny.llama()
    one, other = (AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / name)) for name in "ab")
    assert identify(one).digest == identify(other).digest == identify(model).digest
    assert identify(one).about["source"] != identify(other).about["source"]


SAVED: dict[str, Callable[[], PeftModel]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True, alpha_pattern={"up_proj": 64}),
    "modules_to_save": with_head,
    "tokens": with_tokens,
    "ia3": ia3,
    # Not p-tuning: PEFT saves what its encoder returns in training, which is rounded otherwise, dropout aside.
    **{kind: lambda kind=kind: prompted(kind) for kind in PROMPTS if kind != "p-tuning"},
}


@pytest.mark.parametrize(
    ("kind", "is_trainable"),
    [(kind, False) for kind in SAVED] + [(kind, True) for kind in SAVED if kind not in PROMPTS],  # PEFT refuses these
)
def test_adapter_saved_and_loaded(kind, is_trainable, tmp_path):
    model = SAVED[kind]()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        tiny.llama(), tmp_path / "style", adapter_name="again", is_trainable=is_trainable
    )
    assert farthest(Reference(model, "style"), Reference(again, "again")) < NOISE
    assert identify(again, adapter="again").digest == identify(model, adapter="style").digest


def test_another_process_finds_the_same_digest():
    """Where sets are in another order."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    code = "import test_reference_identity as t; print(t.styled(t.with_head()).digest(), t.styled(t.ia3()).digest())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == [styled(with_head()).digest(), styled(ia3()).digest()]


def test_sets_come_in_order():
    """The one that IA3 keeps, for example; by chance these are in order in one process of 720."""
    assert hashing.plain({"layers": {"f", "b", "d", "a", "e", "c"}}) == {"layers": ["a", "b", "c", "d", "e", "f"]}


# --- quantised ---


def quantization(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": torch.float32, **options})


def test_quantized_models(tmp_path):
    pytest.importorskip("bitsandbytes")
    name = saved(tiny.llama(), tmp_path / "model")
    ways = {
        "plain": None,
        "nf4": quantization(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "nf4, nested": quantization(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "nf4, half": quantization(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        "fp4": quantization(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "int8": quantization(load_in_8bit=True),
    }
    logits, digests = {}, {}
    for way, config in ways.items():
        model, again = (AutoModelForCausalLM.from_pretrained(name, quantization_config=config) for _ in range(2))
        for module in model.modules():  # as the trainer does
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
        digests[way] = identify(model).digest
        logits[way] = Reference(model).logits()
        assert identify(model).digest == digests[way]  # int8 moves its state about in the first forward
        assert identify(again).digest == digests[way]
        adapted = get_peft_model(again, tiny.lora())
        assert identify(adapted).digest == digests[way]
        assert identify(adapted, adapter="default").digest != digests[way]
    assert len(set(digests.values())) == len(ways)
    distances = [(logits[a] - logits[b]).abs().max() for a in ways for b in ways if a < b]
    assert min(distances) > 1e-4  # nested against plain constants is the smallest


def test_quantized_model_saved_and_loaded(tmp_path):
    pytest.importorskip("bitsandbytes")
    name = saved(tiny.llama(), tmp_path / "model")
    config = quantization(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "again"))
    assert identify(again).digest == identify(model).digest
    about = identify(model).about
    assert about["quantization"] == "bitsandbytes, nf4, nested, computed in float32"
    assert about["model"] == identify(tiny.llama()).about["model"]  # weights are counted, not the bytes they are in


# --- merged adapters ---


def test_merged_for_good_is_a_model_of_its_own():
    merged = Reference(lora().merge_and_unload())
    assert farthest(merged, styled(lora())) < 1e-4  # W x + B A x against (W + B A) x
    assert len({merged.digest(), styled(lora()).digest(), llama().digest()}) == 3
    assert merged.digest() == Reference(lora().merge_and_unload()).digest()


@pytest.mark.parametrize("adapter", [None, "style"])
def test_merged_for_now_is_refused(adapter):
    """Its first pass with the adapter off takes it out again: the weights now are not those of the reference."""
    model = lora()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'style' is merged into the weights of .*unmerge_adapter"):
        identify(model, adapter=adapter)
    assert farthest(Reference(model), llama()) < 1e-4  # merged and unmerged again: rounded twice


# --- bytes ---

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]
DTYPES += [torch.float8_e4m3fn, torch.float64]


def digest_of(tensor: Tensor) -> list[Any]:
    return hashing.digests({"x": tensor})["x"]


def test_bytes_by_hand():
    """1, -2 and 0.5 as little-endian float32; 1 and -2 as bfloat16, the upper halves 3f80 and c000 of theirs."""
    raw = struct.pack("<3f", 1, -2, 0.5)
    assert digest_of(torch.tensor([1, -2, 0.5])) == ["torch.float32", [3], xxhash.xxh3_128_hexdigest(raw)]
    raw = bytes.fromhex("803f00c0")
    half = torch.tensor([[1], [-2]], dtype=torch.bfloat16)
    assert digest_of(half) == ["torch.bfloat16", [2, 1], xxhash.xxh3_128_hexdigest(raw)]


@given(st.data())
def test_one_bit_and_no_stride_counts(data):
    """Any dtype, any shape (none and 0 included): the layout in memory does not matter, each bit does."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    transposed = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    expanded = torch.stack([tensor, tensor], dim=-1)[..., 0]
    assert digest_of(tensor) == digest_of(transposed) == digest_of(expanded)
    if size:
        raw[data.draw(st.integers(0, size - 1))] ^= 1
        assert digest_of(raw.view(dtype).reshape(shape)) != digest_of(expanded)


def test_shape_and_dtype_count():
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6, dtype=torch.int32), torch.zeros(0)]
    zeros += [torch.zeros(0, 2), torch.tensor(0.0), torch.zeros(1)]
    assert len({str(digest_of(z)) for z in zeros}) == len(zeros)


def test_views_of_one_storage_are_told_apart():
    square = torch.arange(9.0).reshape(3, 3)
    views = {"rows": square, "columns": square.t(), "part": square[:2], "again": square}
    got = hashing.digests(views)
    assert got == {name: digest_of(view.clone()) for name, view in views.items()}
    assert got["rows"] == got["again"] != got["columns"]


# --- refusals ---


def test_meta_device():
    with torch.device("meta"):
        model = tiny.llama()
    with pytest.raises(ValueError, match=r"embed_tokens.weight is on the meta device .*before the model is sharded"):
        identify(model)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_by_fsdp2(one_rank, tied):
    """The same as whole. With parts on several ranks, and by ZeRO-3: tests/distributed."""
    from torch.distributed.fsdp import fully_shard

    model = tiny.llama(tie_word_embeddings=tied)
    whole = identify(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    assert identify(fully_shard(model, mesh=mesh)) == whole


def test_wrapped_by_ddp(one_rank):
    assert identify(nn.parallel.DistributedDataParallel(tiny.llama())) == identify(tiny.llama())


def test_sharded_by_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = tiny.llama()
    # It cannot be built on a CPU alone: a module of its class stands for it.
    model.model.layers[0].__class__ = type("Sharded", (FullyShardedDataParallel,), {"forward": nn.Identity.forward})
    with pytest.raises(ValueError, match="The model is sharded by FSDP"):
        identify(model)


def test_state_that_is_no_tensor():
    class Scaled(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"amax": 3}

    model = tiny.llama()
    model.lm_head = Scaled(32, tiny.VOCABULARY, bias=False)
    with pytest.raises(ValueError, match=r"lm_head\._extra_state is saved with the model as a dict"):
        identify(model)


def test_unknown_adapters():
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM has no adapter 'strict' \(it has style\)"):
        identify(lora(), adapter="strict")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no adapter 'style' \(it has none\)"):
        identify(tiny.llama(), adapter="style")


def test_adapter_in_a_model_that_is_no_peft_model():
    """As `model.add_adapter` of transformers leaves it, which not every pair of versions can do."""
    model = tiny.llama()
    inject_adapter_in_model(tiny.lora(), model)
    with pytest.raises(ValueError, match=r"active adapter .*no PeftModel.*get_peft_model.*disable_adapters"):
        identify(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert identify(model) == identify(tiny.llama())


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"one of float32, bfloat16, float16, got 'bf16'"):
        identify(tiny.llama(), precision="bf16")


# --- nothing left behind, and what people read ---


@pytest.mark.parametrize("make", [tiny.llama, with_head, *(lambda kind=kind: prompted(kind) for kind in PROMPTS)])
def test_leaves_everything_as_it_was(make):
    model = make()
    model.train()
    model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("layers.1"))).eval()
    next(model.parameters()).requires_grad_(False)

    def state() -> list[Any]:
        return [
            {name: module.training for name, module in model.named_modules()},
            {name: (p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()},
            getattr(model, "active_adapter", None),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]

    before = state()
    digests = {identify(model, adapter=adapter).digest for adapter in (getattr(model, "active_adapter", None),) * 3}
    assert len(digests) == 1  # no dropout in it
    assert state() == before


def test_about():
    model = lora()
    model.get_base_model().config._name_or_path = "org/model"
    assert identify(model, adapter="style", precision="bfloat16").about == {
        "model": f"LlamaForCausalLM, {sum(p.numel() for p in tiny.llama().parameters()):,} parameters, float32",
        "source": "org/model",
        "adapter": "'style', LORA",
        "quantization": "none",
        "computed in": "bfloat16",
    }
    half = identify(tiny.llama().bfloat16()).about
    assert (half["source"], half["adapter"], half["computed in"]) == ("built in memory", "none", "bfloat16")


def test_digest_is_32_hex_digits():
    assert len(bytes.fromhex(identify(tiny.llama()).digest)) == 16


def test_a_run_whose_weights_are_elsewhere_is_known_by_the_rest():
    """Sharded by an engine before anybody could look: not compared on resume, rather than refused."""
    model = tiny.llama()
    whole = model_identity(model, UntrainedPolicy(Scorer(model)), "float32")
    assert whole["reference"] is not None
    model.to("meta")
    sharded = model_identity(model, UntrainedPolicy(Scorer(model)), "float32")
    assert sharded == {**whole, "reference": None}
