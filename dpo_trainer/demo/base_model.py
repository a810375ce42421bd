"""The demo's base model: a 0.4 M parameter Llama, trained from nothing in seconds, then kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from . import world

logger = logging.get_logger(__name__)

PRETRAINING_STEPS = 200
PRETRAINING_BATCH = 80  # sentences: half of the world, so that two steps see all of it
PRETRAINING_LR = 4e-3
ANSWER_TOKENS = 5  # name, likes, food, full stop, end
CACHE_VARIABLE = "DPO_TRAINER_CACHE"
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def demo_model_and_tokenizer(cache_dir: str | os.PathLike | None = None, seed: int = 0) -> Path:
    """Folder of the pretrained demo model and its tokenizer, for `from_pretrained`; built on the first call.

    One folder for each `seed` and each version of the recipe, below `cache_dir` (default: `$DPO_TRAINER_CACHE`, else
    `dpo_trainer` in `$XDG_CACHE_HOME`, else in `~/.cache`).
    """
    folder = _cache_root(cache_dir) / "demo" / f"{_recipe_hash()}-seed{seed}"
    if _is_complete(folder):
        return folder
    logger.warning("Training the demo's base model from nothing: once, for some ten seconds, then it is cached.")
    started = time.perf_counter()
    tokenizer = world.build_tokenizer()
    model, loss = pretrain(tokenizer, seed)
    _save_whole_or_not_at_all(model, tokenizer, folder)
    logger.warning(
        f"{model.num_parameters():,} parameters in {time.perf_counter() - started:.0f} s, loss {loss:.3f} nats per answer "
        f"(the least possible is ln 10 = 2.303). Saved in {folder}"
    )
    return folder


def _cache_root(cache_dir: str | os.PathLike | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_trainer"


def _recipe_hash() -> str:
    """Changes with anything that makes the model: the code of this module and of the world, and the library that saves it."""
    sources = [Path(path).read_bytes() for path in (__file__, world.__file__)]
    return hashlib.sha256(b"".join([*sources, transformers.__version__.encode()])).hexdigest()[:12]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED_FILES)


def _save_whole_or_not_at_all(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Written aside and renamed: a killed run leaves no half model, and of two runs at once the later one wins or yields."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder)  # files were deleted from it
        try:
            aside.rename(folder)
        except OSError:
            if not _is_complete(folder):  # else another process finished the same model first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def pretrain(tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[PreTrainedModel, float]:
    """The model after a few seconds of next-token training on every sentence of the world, and its last loss.

    Only answers are scored. Every food is equally frequent, so the least possible loss is ln 10 = 2.303 nats per answer:
    the food is a guess, everything else is certain. The random state of the caller is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _untrained(tokenizer).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PRETRAINING_LR, total_steps=PRETRAINING_STEPS, pct_start=0.1
        )
        for batch in islice(_batches(all_conversations(tokenizer)), PRETRAINING_STEPS):
            loss = -answer_logps(model, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval(), loss.item()


def _batches(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Epoch after epoch, each in another order."""
    while True:
        yield from ids[torch.randperm(len(ids))].split(PRETRAINING_BATCH)


def answer_logps(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[B, L] whole conversations -> [B] log-prob of each answer, its end included, in nats."""
    logits = model(ids, logits_to_keep=ANSWER_TOKENS + 1, use_cache=False).logits[:, :-1].float()
    targets = ids[:, -ANSWER_TOKENS:]
    return logits.log_softmax(-1).gather(-1, targets[:, :, None]).sum((1, 2))


def all_conversations(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """[160, L] token ids, by name and then food. Every word is one token, so all are of one length, without padding."""
    rows = [
        tokenizer.apply_chat_template(world.conversation(name, food), return_dict=False)
        for name in world.NAMES
        for food in world.FOODS
    ]
    return torch.tensor(rows)


def _untrained(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
