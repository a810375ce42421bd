#!/usr/bin/env bash
# peft 0.21.2: an adapter called "model" beside another one.
#
# Expected: get_peft_model_state_dict(model, adapter_name="other") returns the weights of "other".
# Seen:     it returns those of "model" as well, for "model" is part of every path.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
counts = {}
for second in ("another", "model"):
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config, adapter_name="other")
    model.add_adapter(second, config)
    counts[second] = len(get_peft_model_state_dict(model, adapter_name="other"))
print(f"tensors of adapter 'other', beside an adapter called: {counts}")
assert counts == {"another": 2, "model": 4}
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
