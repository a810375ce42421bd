"""vLLM in the training process, beside a stand-in for its module that computes adapters by hand (vllm_stand_in.py)."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import online_tiny
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from vllm_stand_in import with_adapter

from dpo_trainer.online.sampling.generate import Decoding, TransformersGenerator
from dpo_trainer.online.sampling.vllm_colocated import VLLMColocatedGenerator
from dpo_trainer.reference.strategies import DisabledAdapter

PROMPTS = [online_tiny.ids_of(text, finished=False) for text in ("cat", "the owl likes", "x")]
GREEDY = Decoding(max_new_tokens=6, temperature=0.0)
BASE = "org/base"


@dataclass
class LoRARequest:
    name: str
    number: int
    path: str


@dataclass
class Engine:
    """`vllm.LLM`, greedy or sampled with the seed it is given; one adapter at a time, read from its folder."""

    model: str
    rest: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[Any, Any]] = field(default_factory=list)

    def generate(
        self, prompts: list[dict], params: list[dict], lora_request: LoRARequest | None, use_tqdm: bool
    ) -> list:
        self.asked.append((params, lora_request))
        model = tiny.llama()
        if lora_request is not None:
            model = with_adapter(model, Path(lora_request.path))
        return [
            self._reply(model, prompt["prompt_token_ids"], own) for prompt, own in zip(prompts, params, strict=True)
        ]

    def _reply(self, model: Any, ids: list[int], params: dict[str, Any]) -> Any:
        assert params["temperature"] > 0 or params["n"] == 1, "vLLM refuses this"
        ends = params["stop_token_ids"]
        ours = TransformersGenerator(tiny.tokenizer(), pad_token_id=tiny.PAD, end_ids=ends, batch_size=64)
        decoding = Decoding(max_new_tokens=params["max_tokens"], temperature=params["temperature"])
        (answers,) = ours(model, [ids], params["n"], decoding=decoding, seed=params["seed"])
        return types.SimpleNamespace(
            outputs=[
                types.SimpleNamespace(
                    token_ids=tuple(answer.ids),
                    finish_reason="stop" if answer.finished else "length",
                    stop_reason=None,
                )
                for answer in answers
            ]
        )


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """Those that were made, by a module that looks installed."""
    made: list[Engine] = []

    def make(model: str, **rest: Any) -> Engine:
        made.append(Engine(model, rest))
        return made[-1]

    vllm, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams, request.LoRARequest = make, dict, LoRARequest  # type: ignore[attr-defined]
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


@pytest.fixture
def policy() -> PeftModel:
    base = tiny.llama()
    base.name_or_path = BASE
    adapted = get_peft_model(base, tiny.lora())
    tiny.fill_adapters(adapted, scale=0.3)
    return adapted


def generator(policy: PeftModel, folder: Path) -> VLLMColocatedGenerator:
    return VLLMColocatedGenerator(
        tiny.tokenizer(),
        policy,
        adapter_dir=folder / "adapters",
        end_ids=[tiny.END],
        gpu_memory=0.25,
        max_model_len=64,
    )


def here(model: torch.nn.Module) -> list:
    ours = TransformersGenerator(tiny.tokenizer(), pad_token_id=tiny.PAD, end_ids=[tiny.END], batch_size=8)
    return ours(model, PROMPTS, 1, decoding=GREEDY, seed=0)


def test_the_policy_before_and_after_a_change_and_the_reference(engines, policy, tmp_path):
    """Greedy answers to the token; one adapter on disk, and a number of its own for each version."""
    ask = generator(policy, tmp_path)
    first = ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
    assert first == here(policy) != here(tiny.llama())
    assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == first
    tiny.fill_adapters(policy, seed=2, scale=0.3)
    assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy) != first
    with DisabledAdapter(scorer=None).in_place(policy) as model:  # type: ignore[arg-type]  # only for its model
        assert ask(model, PROMPTS, 1, decoding=GREEDY, seed=0) == here(tiny.llama())
    (engine,) = engines
    requests = [request for _, request in engine.asked]
    assert [request and request.number for request in requests] == [1, 1, 2, None]
    assert requests[0].name == requests[1].name != requests[2].name
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [requests[2].name]


def test_the_engine_and_what_it_is_asked(engines, policy, tmp_path):
    ask = generator(policy, tmp_path)
    sampled = ask(policy, PROMPTS, 3, decoding=Decoding(max_new_tokens=5, temperature=0.8, top_k=9), seed=4)
    assert [len(row) for row in sampled] == [3, 3, 3]
    assert ask(policy, PROMPTS, 2, decoding=GREEDY, seed=0) == [row * 2 for row in here(policy)]
    (engine,) = engines
    assert engine.model == BASE
    known = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "gpu_memory_utilization": 0.25}
    known |= {"max_model_len": 64, "generation_config": "vllm", "dtype": "float32"}
    assert engine.rest == known
    params = engine.asked[0][0]
    assert (params[0]["n"], params[0]["top_k"], params[0]["temperature"]) == (3, 9, 0.8)
    assert len({own["seed"] for own in params}) == 3


def test_what_cannot_work_is_refused(engines, policy, tmp_path, monkeypatch):
    policy.get_base_model().name_or_path = ""
    with pytest.raises(ValueError, match="loads the base model by its name"):
        generator(policy, tmp_path)
    with pytest.raises(ValueError, match="hands vLLM a LoRA adapter"):
        generator(tiny.llama(), tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dpo_trainer\[vllm\]'"):
        generator(policy, tmp_path)


def test_a_run_that_samples_from_the_engine(engines, policy, tmp_path):
    args = online_tiny.config(tmp_path, generator="vllm_colocated", max_steps=2, max_new_tokens=4)
    trainer = online_tiny.trainer(tmp_path, parts={"model": policy, "args": args})
    trainer.train()
    assert len({request.name for _, request in engines[0].asked}) == 2, "an adapter for each step"


@pytest.mark.parametrize(("max_length", "window"), [(1024, 256), (100, 100), (None, 256)])
def test_the_engine_gets_the_window_that_prompts_are_cut_to(max_length, window, engines, policy, tmp_path):
    """vLLM refuses a max_model_len beyond what the model was made for: 256 tokens here."""
    args = online_tiny.config(tmp_path, generator="vllm_colocated", max_length=max_length)
    trainer = online_tiny.trainer(tmp_path, parts={"model": policy, "args": args})
    assert engines[0].rest["max_model_len"] == trainer.data.limit + args.max_new_tokens == window
