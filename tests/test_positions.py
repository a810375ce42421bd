"""Rows and a model's positions, padding and a model's embeddings: what is there is used, and what is not is refused by name."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from dpo_trainer.models.positions import table_of_positions, window_of

SMALL = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def gpt2(positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=positions, n_embd=32, n_layer=2, n_head=4, **SMALL))


def opt(positions: int = 64) -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return OPTForCausalLM(OPTConfig(max_position_embeddings=positions, **sizes, **SMALL))


def gptj(positions: int = 64) -> GPTJForCausalLM:
    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(n_positions=positions, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, **SMALL))


MODELS = {
    "gpt2": (gpt2, 64),
    "opt": (opt, 64),
    "gptj": (gptj, 64),
    "gpt-neo": (
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                max_position_embeddings=64,
                hidden_size=32,
                num_layers=1,
                num_heads=2,
                attention_types=[[["global"], 1]],
                **SMALL,
            )
        ),
        64,
    ),
    "biogpt": (
        lambda: BioGptForCausalLM(
            BioGptConfig(
                max_position_embeddings=64,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                **SMALL,
            )
        ),
        64,
    ),
    "roberta": (
        lambda: RobertaForCausalLM(
            RobertaConfig(
                max_position_embeddings=66,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                is_decoder=True,
                **(SMALL | {"pad_token_id": 1, "eos_token_id": 2}),
            )
        ),
        64,
    ),
    "llama": (tiny.llama, None),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, **SMALL)), None),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, **SMALL)), None),
}


@pytest.mark.parametrize(("make", "positions"), MODELS.values(), ids=MODELS)
def test_a_table_is_found_and_ends_where_the_model_does(make, positions):
    """One token more is an error of the model's own: so the number is neither too small nor too large."""
    model = make()
    assert table_of_positions(model) == positions
    if positions is None:
        return
    ids = torch.full((1, positions + 1), 5)
    with torch.no_grad():
        model(input_ids=ids[:, :positions])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)


def test_under_an_adapter():
    assert table_of_positions(get_peft_model(gpt2(), tiny.lora(target_modules=["c_attn", "wpe"]))) == 64
    assert (
        table_of_positions(get_peft_model(gpt2(), tiny.lora(target_modules=["c_attn"], modules_to_save=["wpe"]))) == 64
    )


def test_what_a_model_was_made_for():
    assert window_of(tiny.llama()) == 256
    assert window_of(gpt2()) == 64
    assert window_of(BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, **SMALL))) is None


# --- rows ---


def rows(longest: int, column: str = "prompt") -> Dataset:
    """Short ones, and in the second place one of `longest` tokens: a token for each byte, and EOS."""
    long = {"prompt": "p", "chosen": "c", "rejected": "r"}
    long[column] = long[column] * (longest - 2)
    return Dataset.from_list([tiny.rows(1)[0], long, *tiny.rows(6, seed=3)])


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("make", [gpt2, opt], ids=["gpt2", "opt"])
def test_rows_up_to_the_last_position_are_trained_on(make, layout, tmp_path):
    made = tiny.trained(tmp_path, model=make(), train=rows(64), layout=layout, max_steps=2)
    assert len(tiny.losses(made)) == 2


@pytest.mark.parametrize("column", ["prompt", "rejected"])
@pytest.mark.parametrize("make", [gpt2, opt, gptj], ids=["gpt2", "opt", "gptj"])
def test_longer_rows_are_refused_before_training(make, column, tmp_path):
    with pytest.raises(ValueError, match=r"Row 1 of train has 65 tokens .* positions for 64 .*--max_length 64"):
        tiny.trainer(tmp_path / "a", model=make(), train=rows(65, column))
    with pytest.raises(ValueError, match=r"Row 1 of eval has 65 tokens"):
        tiny.trainer(tmp_path / "b", model=make(), parts={"eval_dataset": rows(65, column)})
    stream = tiny.trainer(tmp_path / "c", model=make(), train=rows(65, column).to_iterable_dataset())
    with pytest.raises(ValueError, match=r"Row 1 of train has 65 tokens"):
        stream.train()


def test_the_way_out_works(tmp_path):
    tiny.trained(tmp_path / "cut", model=gpt2(), train=rows(90), max_length=64, max_steps=2)
    dropped = tiny.trained(
        tmp_path / "drop", model=gpt2(), train=rows(90), max_length=64, too_long="drop", max_steps=2
    )
    assert dropped.data_reports["train"].counts["too_long"] == 1


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_padding_stands_at_positions_too(layout, tmp_path):
    """61 tokens become 64 in steps of 8, and of 60 positions that is too many."""
    how = {"layout": layout, "pad_to_multiple_of": 8, "max_steps": 2}
    tiny.trained(tmp_path / "a", model=gpt2(64), train=rows(61), **how)
    with pytest.raises(ValueError, match=r"positions for 56"):
        tiny.trainer(tmp_path / "b", model=gpt2(60), train=rows(59), **how)


def test_a_reference_with_fewer_positions(tmp_path):
    with pytest.raises(ValueError, match=r"positions for 32"):
        tiny.trainer(tmp_path, model=gpt2(64), train=rows(40), parts={"ref_model": gpt2(32)})


@pytest.mark.parametrize("form", ["table", "stream"])
def test_rows_beyond_what_a_rotary_model_was_made_for(form, tmp_path, caplog):
    train = Dataset.from_list([*rows(50), *rows(60)])
    given = train if form == "table" else train.to_iterable_dataset()
    made = tiny.trainer(tmp_path, model=tiny.llama(max_position_embeddings=40), train=given, max_steps=2)
    made.train()
    (line,) = [record.message for record in caplog.records if "made for" in record.message]
    assert "2 rows are longer than the 40 tokens" in line
    assert "first row 1 with 50" in line
    caplog.clear()
    tiny.trainer(tmp_path / "b", model=tiny.llama(), train=train)
    assert "made for" not in caplog.text


# --- a pad token without an embedding ---


def with_new_pad_token():
    made = tiny.tokenizer()
    made.add_special_tokens({"pad_token": "[PAD]"})
    assert made.pad_token_id == tiny.VOCABULARY
    return made


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("more", [{}, {"pad_to_multiple_of": 8}, {"precompute_ref_log_probs": True}], ids=str)
def test_padding_with_a_token_that_the_model_has(layout, more, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))
    want = tiny.trained(tmp_path / "want", layout=layout, **more)
    got = tiny.trained(tmp_path / "got", layout=layout, parts={"processing_class": with_new_pad_token()}, **more)
    assert tiny.losses(got) == tiny.losses(want)
    assert caplog.text.count(f"a pad token with the id {tiny.VOCABULARY}") == 1


def test_the_model_that_is_saved_can_be_loaded(tmp_path):
    """Trainer writes the tokenizer's pad token into the configs; an embedding with a padding index beyond it cannot be made."""
    made = tiny.trained(
        tmp_path, parts={"processing_class": with_new_pad_token()}, save_strategy="steps", save_steps=2
    )
    made.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "model", tmp_path / "checkpoint-2"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(loaded, LlamaForCausalLM)
        assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == tiny.END
    again = tiny.trainer(tmp_path, parts={"processing_class": with_new_pad_token()}, max_steps=6)
    again.train(resume_from_checkpoint=True)
