#!/usr/bin/env bash
# transformers 5.24.0: generate_batch (continuous batching) of Gemma 2, whose attention scores have a soft cap.
#
# Expected: greedy answers are those of generate.
# Seen:     they differ, and are the same for a model without a cap: the paged attention leaves the cap out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 psutil
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig

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


def same_answers(cap):
    torch.manual_seed(0)
    tokens = dict(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **tokens, attn_logit_softcapping=cap)).eval()
    prompt = list(range(3, 12))
    ids = torch.tensor([prompt])
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    (batched,) = model.generate_batch([prompt], generation_config=greedy).values()
    return alone.tolist() == batched.generated_tokens


outcome = {"without a cap": same_answers(None), "with a cap": same_answers(0.1)}
print(f"generate_batch answers as generate does: {outcome}")
assert outcome == {"without a cap": True, "with a cap": False}
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
