#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode and scaled_dot_product_attention on the CPU.
#
# Expected: the FLOPs of its two products, as the counter gives them for the same call with the MATH backend.
# Seen:     0 with the backend that the CPU takes by default, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

query = torch.rand(1, 2, 64, 32)


def count(*backends):
    with FlopCounterMode(display=False) as counter:
        if backends:
            with sdpa_kernel(list(backends)):
                scaled_dot_product_attention(query, query, query)
        else:
            scaled_dot_product_attention(query, query, query)
    return counter.get_total_flops()


as_matrices, by_default = count(SDPBackend.MATH), count()
print(f"attention on the CPU: {as_matrices} FLOPs with the MATH backend, {by_default} with the default one")
assert as_matrices == 2 * 2 * 64 * 64 * 32 * 2  # two products, two heads, 64 by 64 scores, 32 channels, multiply and add
assert by_default == 0
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
