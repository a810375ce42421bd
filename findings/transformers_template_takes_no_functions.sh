#!/usr/bin/env bash
# transformers 5.24.0: a function among the arguments that apply_chat_template hands to a chat template.
#
# Expected: the template can call it, so that a caller can replace the clock of templates that write today's date
#           (strftime_now=...).
# Seen:     the template receives the text "<function>" in its place.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 jinja2==3.1.6
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
turns = [{"role": "user", "content": "a"}]


def clock(format):
    return "2026-11-30"


tokenizer.chat_template = "{{ strftime_now }}"
received = tokenizer.apply_chat_template(turns, tokenize=False, strftime_now=clock)
print(f"the template receives {received!r}")
assert received == "<function>"
PYTHON
cd "$folder" && venv/bin/python show.py 2>/dev/null
