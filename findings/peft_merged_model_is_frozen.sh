#!/usr/bin/env bash
# peft 0.21.2: merge_and_unload().
#
# Expected: a plain model again, as it was before the adapter: its weights can be trained.
# Seen:     every weight has requires_grad=False, so that a full fine-tuning of the merged model has nothing to train.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes))
before = sum(weight.requires_grad for weight in model.parameters())
merged = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).merge_and_unload()
after = sum(weight.requires_grad for weight in merged.parameters())
print(f"trainable weights before the adapter: {before}, after merge_and_unload: {after}")
assert before > 0
assert after == 0
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
