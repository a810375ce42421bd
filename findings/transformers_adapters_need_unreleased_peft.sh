#!/usr/bin/env bash
# transformers 5.24.0 beside peft 0.21.2, the newest peft when it came out.
#
# Expected: `model.add_adapter` of transformers and `get_peft_model` of peft both put LoRA layers into the model, as with 5.23.0.
# Seen:     pip reports no conflict, get_peft_model works, and every adapter method of transformers refuses the peft that is
#           installed: it asks for 0.22.0, which did not exist. 5.23.0 takes the same peft.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }

cat > "$folder/show.py" <<'PYTHON'
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
ids, lora = torch.tensor([[1, 2, 3]]), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
assert get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora)(input_ids=ids).logits.shape == (1, 3, 32)
try:
    LlamaForCausalLM(LlamaConfig(**sizes)).add_adapter(lora)
    outcome = "add_adapter works"
except ValueError as error:
    outcome = f"add_adapter raises ValueError: {error}"
print(f"transformers {version('transformers')}, peft {version('peft')}: get_peft_model works, {outcome}")
PYTHON

install torch==2.13.0 transformers==5.23.0 peft==0.21.2
before=$("$folder/venv/bin/python" "$folder/show.py" 2>/dev/null)
install transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/pip" check --disable-pip-version-check >/dev/null
after=$("$folder/venv/bin/python" "$folder/show.py" 2>/dev/null)
printf '%s\n%s\n' "$before" "$after"
[[ $before == *"add_adapter works"* ]]
[[ $after == *"add_adapter raises ValueError"*">= 0.22.0"* ]]
