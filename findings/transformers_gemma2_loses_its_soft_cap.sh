#!/usr/bin/env bash
# transformers 5.20.2 (the newest for Python 3.10) and Gemma 2, whose attention scores have a soft cap.
#
# Expected: the default attention computes the model, as `eager` does.
# Seen:     the default is `sdpa`, which has no soft cap and leaves it out without a word. 5.21.0 takes `eager` by default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.20.2
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

sizes = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    query_pre_attn_scalar=1,
    initializer_range=1.0,  # scores of a size at which a cap shows
    tie_word_embeddings=False,
)
torch.manual_seed(0)
model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=0.1)).eval()
default, ids = model.config._attn_implementation, torch.arange(10)[None]
with torch.no_grad():
    by_default = model(ids).logits
    model.set_attn_implementation("eager")
    difference = (by_default - model(ids).logits).abs().max().item()
print(f"default attention {default!r}: logits differ from eager by {difference:.2f}")
assert default == "sdpa"
assert difference > 1
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
