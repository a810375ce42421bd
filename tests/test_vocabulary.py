"""Token ids that a model of the run has no embedding for, and adapters whose base was resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dpo_trainer.models.load import load_model
from dpo_trainer.models.vocabulary import refuse_smaller_reference

IDS = [5, 40, 80, 261, 17]


def more_tokens(**special: Any) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens(
        special or {"extra_special_tokens": ["<|user|>", "<|assistant|>", "<|tool|>", "<|b|>"]}
    )
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    return tokenizer


def larger(model: Any, size: int = tiny.VOCABULARY + 2) -> Any:
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def rows_with_a_new_token() -> Dataset:
    row = tiny.chat_rows(1)[0]
    return Dataset.from_list(
        [*tiny.chat_rows(4), {**row, "prompt": [*row["prompt"], {"role": "tool", "content": "4"}]}]
    )


def test_rows_are_held_against_every_model_of_the_run(tmp_path):
    parts = {"processing_class": more_tokens()}
    how: dict[str, Any] = {"train": rows_with_a_new_token(), "max_steps": 2}
    with pytest.raises(ValueError, match=r"Row 4 of train has the token id 260, and the model has 260 .*resize_token"):
        tiny.trainer(tmp_path, parts=parts, **how)
    for policy, own in ((larger(tiny.llama()), {}), (larger(tiny.llama()), {"precompute_ref_log_probs": True})):
        with pytest.raises(
            ValueError, match=r"Row 4 .* id 260, and the reference \(ref_model\) has 260 .*leave ref_model out"
        ):
            tiny.trainer(tmp_path, model=policy, parts={**parts, "ref_model": tiny.llama()}, **how, **own)
    with pytest.raises(ValueError, match=r"Row 4 of eval has the token id 260, and the reference"):
        eval_rows = {"ref_model": tiny.llama(), "eval_dataset": rows_with_a_new_token()}
        tiny.trainer(tmp_path, model=larger(tiny.llama()), parts={**parts, **eval_rows})
    tiny.trained(tmp_path, model=larger(tiny.llama()), parts={**parts, "ref_model": larger(tiny.llama(seed=1))}, **how)


def test_a_pad_token_without_an_embedding(tmp_path):
    """Beyond the model's own, EOS pads; a reference with fewer has to read the pad token too."""
    parts = {"processing_class": more_tokens(pad_token="<|fresh|>")}
    trainer = tiny.trainer(tmp_path, parts=parts)
    assert trainer.pad_token_id == parts["processing_class"].eos_token_id
    with pytest.raises(ValueError, match=r"pad token .* id 260, and the reference \(ref_model\) has 260 embeddings"):
        tiny.trainer(tmp_path, model=larger(tiny.llama()), parts={**parts, "ref_model": tiny.llama()})
    tiny.trainer(tmp_path, model=larger(tiny.llama()), parts=parts)


def test_a_policy_may_not_sample_what_its_reference_cannot_read():
    small, large = tiny.llama(), larger(tiny.llama())
    refuse_smaller_reference(large, small, tiny.tokenizer())  # only padded
    refuse_smaller_reference(small, None, more_tokens())
    refuse_smaller_reference(small, large, more_tokens())
    with pytest.raises(ValueError, match=r"ref_model\) has 260 embeddings, and the tokenizer has 262 tokens"):
        refuse_smaller_reference(large, small, more_tokens())


# --- adapters on a base that was resized ---


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits


def saved_adapter(folder: Path, size: int, **lora: Any) -> tuple[Path, Tensor]:
    tiny.llama().save_pretrained(folder / "base")
    model = get_peft_model(larger(AutoModelForCausalLM.from_pretrained(folder / "base"), size), tiny.lora(**lora))
    tiny.fill_adapters(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model)


LORA: list[dict[str, Any]] = [
    {},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("lora", LORA, ids=["linear", "modules_to_save", "on embeddings"])
def test_an_adapter_on_a_resized_base_loads_as_it_was_saved(lora, tmp_path):
    adapter, want = saved_adapter(tmp_path, 262, **lora)
    more_tokens().save_pretrained(adapter)
    loaded = load_model(str(adapter))
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), want, atol=1e-6, rtol=0)


def test_without_a_tokenizer_and_with_padded_embeddings_too(tmp_path):
    adapter, want = saved_adapter(tmp_path, 264)
    torch.testing.assert_close(logits(load_model(str(adapter))), want, atol=1e-6, rtol=0)


def test_an_adapter_without_the_head_that_was_resized_is_refused(tmp_path):
    adapter, _ = saved_adapter(tmp_path, 262, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(
        ValueError, match=r"has 262 embeddings, its base has 260, and the head 'lm_head' .*modules_to_save"
    ):
        load_model(str(adapter))


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path):
    adapter, _ = saved_adapter(tmp_path, 262)
    tiny.llama(hidden_size=16).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"adapter .* does not fit its base .*size mismatch.*base_model_name_or_path"):
        load_model(str(adapter))


# --- weights of rows ---


def test_data_in_which_no_row_counts_is_refused(tmp_path):
    weightless = Dataset.from_list([{**row, "weight": 0.0} for row in tiny.rows(4)])
    with pytest.raises(ValueError, match="Every row of the train data has the weight 0"):
        tiny.trainer(tmp_path, train=weightless)
    with pytest.raises(ValueError, match="Every row of the eval data has the weight 0"):
        tiny.trainer(tmp_path, parts={"eval_dataset": weightless})
