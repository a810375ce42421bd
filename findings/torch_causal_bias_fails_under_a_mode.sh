#!/usr/bin/env bash
# torch 2.13.0: the mask torch.nn.attention.bias.causal_lower_right, made inside FlopCounterMode.
#
# Expected: attention runs as it does without the mode, and as it does with is_causal=True under the mode.
# Seen:     RuntimeError "Creating a new Tensor subclass": the FLOPs of code that makes this mask cannot be counted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

query = torch.rand(1, 1, 4, 8)


def attend():
    return scaled_dot_product_attention(query, query, query, attn_mask=causal_lower_right(4, 4))


print(f"without a mode: {tuple(attend().shape)}")
with FlopCounterMode(display=False):
    result = scaled_dot_product_attention(query, query, query, is_causal=True)
print(f"is_causal=True under FlopCounterMode: {tuple(result.shape)}")
error = None
try:
    with FlopCounterMode(display=False):
        attend()
except RuntimeError as raised:
    error = raised
print(f"causal_lower_right under FlopCounterMode: {error}")
assert "Creating a new Tensor subclass" in str(error)
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
