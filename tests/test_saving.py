"""What `save_model` leaves in a folder, and what is found before training that would keep it from being there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig

from dpo_trainer import DPOTrainer
from dpo_trainer.checkpointing import CheckpointError, remove_leftovers
from dpo_trainer.models.adapters import make_quantization_config
from dpo_trainer.models.load import load_model

sys.path.insert(0, str(Path(__file__).parent / "vision"))
import zoo

IDS = [5, 40, 80, 17, 200, 9]
IMAGE_FAMILY = "qwen3_vl"


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# --- every kind of run, loaded by transformers and peft alone ---


def with_new_tokens() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>", "<|tool|>", "<|more|>"]})
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    return tokenizer


def resized(folder: Path) -> dict[str, Any]:
    """A model with two more embeddings than its base, and the tokenizer that has the tokens."""
    tokenizer, model = with_new_tokens(), load_model(str(folder))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return {"model": model, "processing_class": tokenizer}


def tied(folder: Path) -> dict[str, Any]:
    return {"model": tiny.llama(tie_word_embeddings=True)}


def lora(**options: Any) -> dict[str, Any]:
    return {"peft_config": tiny.lora(lora_dropout=0.0, **options)}


def seeing(folder: Path, **parts: Any) -> dict[str, Any]:
    model, processor = zoo.ZOO[IMAGE_FAMILY]()
    model.save_pretrained(folder.parent / "seeing")
    loaded = load_model(str(folder.parent / "seeing"))
    return {"model": loaded, "processing_class": processor, **parts}


def four_bits(folder: Path) -> dict[str, Any]:
    pytest.importorskip("bitsandbytes")
    wide = folder.parent / "wide"
    tiny.llama(hidden_size=64, intermediate_size=128).save_pretrained(wide)
    config = make_quantization_config(load_in_4bit=True)
    return {"model": load_model(str(wide), quantization_config=config), **lora()}


KINDS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "full": ("causal", lambda base: {"model": str(base)}),
    "full, tied": ("causal", tied),
    "full, resized": ("causal", resized),
    "full, vision": ("seeing", seeing),
    "lora": ("adapter", lambda base: {"model": str(base), **lora()}),
    "lora, modules_to_save": ("adapter", lambda base: {"model": str(base), **lora(modules_to_save=["lm_head"])}),
    "lora, resized": ("adapter", lambda base: {**resized(base), **lora()}),
    "lora, resized, modules_to_save": (
        "adapter",
        lambda base: {**resized(base), **lora(modules_to_save=["lm_head", "embed_tokens"])},
    ),
    "lora, vision": ("adapter of seeing", lambda base: seeing(base, **lora())),
    "lora, 4 bits": ("adapter of 4 bits", four_bits),
}
"""Kind of run -> how its folder is loaded, and the arguments of the trainer."""

READER = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
folders, ids = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def on_base(folder, kind, **how):
    with open(folder + "/adapter_config.json") as file:
        base = json.load(file)["base_model_name_or_path"]
    return PeftModel.from_pretrained(kind.from_pretrained(base, **how), folder)

def four_bits(folder):
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return on_base(folder, AutoModelForCausalLM, quantization_config=bits)

LOAD = {
    "causal": AutoModelForCausalLM.from_pretrained,
    "seeing": AutoModelForImageTextToText.from_pretrained,
    "adapter": AutoPeftModelForCausalLM.from_pretrained,
    "adapter of seeing": lambda folder: on_base(folder, AutoModelForImageTextToText),
    "adapter of 4 bits": four_bits,
}
out = {}
for name, (how, folder) in folders.items():
    model = LOAD[how](folder).train()  # there is no dropout, and 4 bits have another arithmetic in eval mode
    with torch.no_grad():
        out[name] = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0].tolist()
print("RESULT" + json.dumps(out))
"""


def log_probs(model: nn.Module) -> Tensor:
    """[tokens, vocabulary]"""
    model.train()
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits.log_softmax(-1)[0]


@pytest.fixture(scope="module")
def reloaded(base, tmp_path_factory) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each kind of run: log-probs before training, after it, and of the saved folder in another process."""
    before, after, folders = {}, {}, {}
    for name, (how, parts) in KINDS.items():
        folder = tmp_path_factory.mktemp("run")
        try:
            given = {"model": str(base), **parts(base)}
        except pytest.skip.Exception:
            continue
        made = tiny.trainer(folder, model=given.pop("model"), parts=given, max_steps=2, learning_rate=1.0)
        before[name] = log_probs(made.model)
        made.train()
        made.save_model()
        after[name], folders[name] = log_probs(made.model), (how, str(folder))
    command = [sys.executable, "-c", READER, json.dumps(folders), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    return {name: (before[name], after[name], torch.tensor(found[name])) for name in folders}


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_this_package_loads_what_was_trained(kind, reloaded):
    if kind not in reloaded:
        pytest.skip("needs bitsandbytes")
    before, after, loaded = reloaded[kind]
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(loaded, after, atol=1e-5, rtol=0)


# --- configs ---

PUBLISHED = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "_from_model_config": False}
"""As many published models have it: settings of sampling, and no `do_sample`, without which transformers ignores them."""


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def published(folder: Path) -> Path:
    tiny.llama(eos_token_id=2, pad_token_id=None).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(PUBLISHED))
    return folder


def test_a_published_generation_config_is_saved_as_it_is(tmp_path):
    model = str(published(tmp_path / "model"))
    made = tiny.trained(tmp_path / "run", model=model, max_steps=1, save_strategy="steps", save_steps=1)
    kind = type(made.model.generation_config)
    made.save_model()
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-1"):
        saved = config_of(folder, "generation_config.json")
        assert (saved["temperature"], saved["top_p"]) == (0.6, 0.9)
        assert saved["eos_token_id"] == [tiny.END, 2]  # training ends answers with the tokenizer's
    assert type(made.model.generation_config) is kind is GenerationConfig


def test_a_generation_config_that_nothing_can_load_is_refused_ahead_and_left_out_afterwards(tmp_path, caplog):
    model = tiny.llama()
    model.generation_config.num_return_sequences = 4
    with pytest.raises(ValueError, match=r"could not be saved after training.*num_return_sequences"):
        tiny.trainer(tmp_path / "refused", model=model)
    made = tiny.trainer(tmp_path / "run")
    made.model.generation_config.num_return_sequences = 4  # as a callback may
    made.save_model()
    assert "num_return_sequences" not in config_of(tmp_path / "run", "generation_config.json")
    assert made.model.generation_config.num_return_sequences == 4
    assert "default generation config is saved" in caplog.text
    load_model(str(tmp_path / "run"))


def test_the_config_is_saved_as_it_woriginal_config(tmp_path):
    model = tiny.llama(attention_dropout=0.1)
    given = model.config.to_dict()
    made = tiny.trained(tmp_path, model=model, max_steps=1, save_strategy="steps", save_steps=1)
    made.save_model()
    assert (given["attention_dropout"], given["use_cache"]) == (0.1, True)
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        saved = load_model(str(folder)).config.to_dict()
        other = {name for name in {**given, **saved} if given.get(name) != saved.get(name)}
        assert other <= {"_name_or_path", "architectures", "dtype"}
    # The run goes on as before the save.
    assert (made.model.config.attention_dropout, made.model.config.use_cache) == (0.0, False)


def test_the_config_inside_a_config_is_saved_as_it_woriginal_config(tmp_path):
    model, processor = zoo.ZOO[IMAGE_FAMILY]()
    text = model.config.text_config
    text.attention_dropout = 0.1
    had_use_cache = "use_cache" in vars(model.config)
    made = tiny.trainer(tmp_path, model=model, parts={"processing_class": processor})
    assert text.attention_dropout == 0.0
    made.save_model()
    saved = config_of(tmp_path)
    assert saved["text_config"]["attention_dropout"] == 0.1
    assert ("use_cache" in saved) == had_use_cache


# --- found before training ---


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "dp"])
def test_a_wrapped_model_is_refused(wrap, tmp_path):
    for parts in ({"model": wrap(tiny.llama())}, {"ref_model": wrap(tiny.llama(seed=1))}):
        with pytest.raises(ValueError, match=r"is wrapped by .*Pass (the model as it was before|model.module)"):
            tiny.trainer(
                tmp_path, model=parts.pop("model", None), parts={"processing_class": tiny.tokenizer(), **parts}
            )
    inside = tiny.llama()
    inside.model.layers[0] = wrap(inside.model.layers[0])
    with pytest.raises(ValueError, match=r"module 'model\.layers\.0' of the model is wrapped"):
        tiny.trainer(tmp_path, model=inside)


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path):
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    tiny.trainer(adapter, parts=lora()).save_model()
    tiny.trainer(whole).save_model()
    with pytest.raises(ValueError, match=r"adapter_config.json and adapter_model.safetensors .* saves a full model"):
        tiny.trainer(adapter)
    with pytest.raises(ValueError, match=r"model.safetensors .* saves an adapter.*another --output_dir"):
        tiny.trainer(whole, parts=lora())
    tiny.trainer(adapter, parts=lora()).save_model()
    tiny.trainer(whole).save_model()


def test_a_save_into_a_folder_of_another_kind_says_so(tmp_path, caplog):
    tiny.trainer(tmp_path / "adapter", parts=lora()).save_model()
    assert "of another run" not in caplog.text
    tiny.trainer(tmp_path / "run").save_model(str(tmp_path / "adapter"))
    assert (
        "holds a full model now, and adapter_config.json and adapter_model.safetensors of another run" in caplog.text
    )


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dpo_trainer.checkpointing.save_checks.tempfile.TemporaryDirectory", refused)
    with pytest.raises(ValueError, match=r"Nothing can be saved in --output_dir .*another --output_dir"):
        tiny.trainer(tmp_path)


def test_a_config_that_cannot_be_saved_is_refused(tmp_path):
    model = tiny.llama()
    model.config.temperature = 0.7
    with pytest.raises(ValueError, match=r"could not be saved after training.*generation parameters"):
        tiny.trainer(tmp_path, model=model)


def test_weights_that_share_memory_unknown_to_the_config_are_refused(tmp_path):
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"could not be saved after training.*up_proj.*clone"):
        tiny.trainer(tmp_path, model=model)


def test_an_adapter_that_peft_would_save_without_its_head_is_refused(base, tmp_path):
    on_embeddings = {"target_modules": ["embed_tokens", "q_proj"]}
    with pytest.raises(ValueError, match=r"resized from 260 to 262 tokens.*--lora_modules_to_save lm_head"):
        tiny.trainer(tmp_path, model=resized(base)["model"], parts=lora(**on_embeddings))
    tiny.trainer(tmp_path, model=resized(base)["model"], parts=lora(**on_embeddings, modules_to_save=["lm_head"]))
    tiny.trainer(tmp_path, model=load_model(str(base)), parts=lora(**on_embeddings))


def test_the_dry_run_leaves_nothing_behind(tmp_path):
    made = tiny.trainer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data_report.json"]
    assert made.state.global_step == 0


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    """safetensors writes `.tmpXXXXXX` and renames it; a file of the user's that is called alike in part stays."""
    trainer = tiny.trainer(tmp_path)
    (tmp_path / ".tmpq4UOSu").write_bytes(b"half of the weights")
    (tmp_path / ".dry_run_ab12cd_3").mkdir()
    (tmp_path / ".dry_run_ab12cd_3" / "config.json").write_text("{}")
    for kept in (".tmp", ".tmp_notes", "a.tmp"):
        (tmp_path / kept).write_text("mine")
    (tmp_path / ".tmpmynote").mkdir()  # safetensors makes none
    (tmp_path / ".tmpmynote" / "notes").write_text("mine")
    trainer.save_model()
    there = {path.name for path in tmp_path.iterdir()}
    assert {".tmp", ".tmp_notes", "a.tmp", "model.safetensors"} <= there
    assert not {".tmpq4UOSu", ".dry_run_ab12cd_3"} & there
    assert (tmp_path / ".tmpmynote" / "notes").read_text() == "mine"


def test_a_save_that_is_killed_leaves_such_a_file(tmp_path):
    """The name is safetensors' own, and may change with a release."""
    file = tmp_path / "model.safetensors"
    script = f"import numpy, safetensors.numpy as s; s.save_file({{'a': numpy.zeros(10**8, 'u1')}}, {str(file)!r})"
    for _ in range(20):  # it may end before it is seen
        file.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", script]) as saving:
            while saving.poll() is None and not any(tmp_path.glob(".*")):
                time.sleep(0.001)
            saving.kill()
        if any(tmp_path.glob(".*")):
            break
    assert not file.exists()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "dpo_trainer.checkpointing.save_checks.shutil.disk_usage", lambda folder: usage._replace(free=1000)
    )
    tiny.trainer(tmp_path)
    assert "GB free: free space before training ends" in caplog.text


# --- the last save fails ---


def failing_once(made: DPOTrainer, monkeypatch, error: Exception) -> None:
    """The next call of save_pretrained raises `error`."""
    kind = type(made.model)
    save = kind.save_pretrained

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(kind, "save_pretrained", save)
        raise error

    monkeypatch.setattr(kind, "save_pretrained", fail)


def test_a_full_disk_at_the_end_saves_the_model_elsewhere(tmp_path, monkeypatch):
    made = tiny.trained(tmp_path / "run", max_steps=1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing_once(made, monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(
        CheckpointError, match=r"could not be saved in .*run: No space left.*saved in (.*) instead"
    ) as told:
        made.save_model()
    (elsewhere,) = tmp_path.glob("dpo_trainer_model_*")
    assert str(elsewhere) in str(told.value)
    tiny.assert_same_weights(tiny.weights(load_model(str(elsewhere))), tiny.weights(made.model))
    made.save_model()
    tiny.assert_same_weights(tiny.weights(load_model(str(tmp_path / "run"))), tiny.weights(made.model))


@pytest.mark.parametrize("parts", [{}, lora()], ids=["full", "lora"])
def test_whatever_else_fails_at_the_end_leaves_the_weights(parts, tmp_path, monkeypatch):
    made = tiny.trained(tmp_path, parts=parts, max_steps=1)
    failing_once(made, monkeypatch, RuntimeError("no idea"))
    with pytest.raises(
        CheckpointError, match=r"RuntimeError: no idea.*Its weights are in .*rescued_weights.safetensors"
    ):
        made.save_model()
    fresh = get_peft_model(tiny.llama(), parts["peft_config"]) if parts else tiny.llama()
    found = fresh.load_state_dict(load_file(tmp_path / "rescued_weights.safetensors"), strict=False)
    assert not found.unexpected_keys
    tiny.assert_same_weights(tiny.weights(fresh), tiny.weights(made.model))
