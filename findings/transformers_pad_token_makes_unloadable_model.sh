#!/usr/bin/env bash
# transformers 5.24.0: Trainer with a tokenizer whose pad token was added and has no embedding. Nothing is padded with it.
#
# Expected: the saved model is the trained one, and loads.
# Seen:     Trainer copies the tokenizer's pad token into the model's config. Training and saving work; loading what was saved
#           raises an AssertionError, for the pad token is also the padding index of the embeddings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(32)}))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
tokenizer.add_special_tokens({"pad_token": "<pad>"})
options = TrainingArguments("out", max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)
trainer = Trainer(
    LlamaForCausalLM(LlamaConfig(**sizes)),
    options,
    train_dataset=[{"input_ids": [2, 3, 4], "labels": [2, 3, 4]}] * 8,
    processing_class=tokenizer,
    data_collator=default_data_collator,
)
trainer.train()
trainer.save_model("out")
try:
    AutoModelForCausalLM.from_pretrained("out")
    outcome = "loads"
except AssertionError as error:
    outcome = f"AssertionError: {error}"
print(f"pad token {tokenizer.pad_token_id} of {sizes['vocab_size']} embeddings; the saved model: {outcome}")
assert outcome == "AssertionError: Padding_idx must be within num_embeddings"
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
