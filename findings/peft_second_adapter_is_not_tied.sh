#!/usr/bin/env bash
# peft 0.21.2: a second adapter with ensure_weight_tying=True.
#
# Expected: every adapter made with the same config covers the same layers: of a model with tied embeddings, the embeddings and
#           the head.
# Seen:     the first adapter covers both, a second one the embeddings alone, without a word. A frozen copy of an adapter (a
#           reference) then computes something else than its source.
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


def config():
    return LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM")


model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)), config(), adapter_name="first")
model.add_adapter("second", config())
covered = {
    adapter: sorted({name.split(".lora")[0].split(".")[-1] for name, _ in model.named_parameters() if f".{adapter}" in name})
    for adapter in ("first", "second")
}
print(covered)
assert covered == {"first": ["embed_tokens", "lm_head"], "second": ["embed_tokens"]}
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
