"""What vLLM is asked for and what it says of a completion, by its server and by its engine alike."""

from __future__ import annotations

import hashlib
from typing import Any

from ..samples import Completion
from .generate import Decoding


def asked_for(decoding: Decoding, count: int) -> int:
    """Completions of a prompt to ask for: vLLM refuses several where all would be the same."""
    return 1 if decoding.temperature == 0 else count


def sampling_options(decoding: Decoding, end_ids: list[int]) -> dict[str, Any]:
    """All of them: what is not given may come from the model's own generation config."""
    return {
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": decoding.min_p or 0.0,
        "repetition_penalty": decoding.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": end_ids,
        "skip_special_tokens": False,
    }


def completion_of(ids: list[int], finish: str, stop: Any, end_ids: list[int], tokenizer: Any) -> Completion:
    """`finish` is "stop" or "length". vLLM has the end among the ids; so it is also where something between us leaves it out."""
    finished = finish == "stop"
    if finished and ids[-1:] not in [[end] for end in end_ids]:
        ids = [*ids, stop if stop in end_ids else end_ids[0]]
    return Completion(ids=ids, text=tokenizer.decode(ids, skip_special_tokens=True), finished=finished)


def seed_of(seed: int, place: int) -> int:
    """56 bits, as good as unrelated: vLLM counts on from it for the n completions of a prompt."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=7).digest(), "little")
