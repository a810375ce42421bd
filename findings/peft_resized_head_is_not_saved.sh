#!/usr/bin/env bash
# peft 0.21.2: LoRA on a base whose vocabulary was resized from that of the base's folder.
#
# Expected: what the resized rows hold is saved in both cases below, as peft does for LoRA on other layers: the embeddings and the
#           head are put into the adapter's file ("save_embedding_layers").
# Seen:     with LoRA on the embeddings too, the head is left out, without a word. Its new rows come back as random numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
from tempfile import mkdtemp

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
base = mkdtemp(dir=".")
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(base)
has_head = {}
for targets in (["q_proj"], ["q_proj", "embed_tokens"]):
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(36)
    folder = mkdtemp(dir=".")
    get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM")).save_pretrained(folder)
    saved = load_file(f"{folder}/adapter_model.safetensors")
    has_head[", ".join(targets)] = any("lm_head" in name for name in saved)
print(f"head in the saved adapter, by target_modules: {has_head}")
assert has_head == {"q_proj": True, "q_proj, embed_tokens": False}
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
