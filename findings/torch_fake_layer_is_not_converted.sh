#!/usr/bin/env bash
# torch 2.13.0: a layer made under FakeTensorMode and converted to another data type.
#
# Expected: the layer in float64, as without the mode, and as a fake tensor is converted.
# Seen:     RuntimeError "Couldn't swap Linear.weight": a model that is converted as it is made cannot be planned with fake tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

print(f"without a mode: {torch.nn.Linear(2, 2).to(torch.float64).weight.dtype}")
with FakeTensorMode():
    print(f"a fake tensor: {torch.rand(2, 2).to(torch.float64).dtype}")
error = None
try:
    with FakeTensorMode():
        torch.nn.Linear(2, 2).to(torch.float64)
except RuntimeError as raised:
    error = raised
print(f"a layer under FakeTensorMode: {error}")
assert "Couldn't swap Linear.weight" in str(error)
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
