"""Sampling by a vLLM server, beside one on loopback that computes adapters by hand: against `model.generate` on the policy."""

from __future__ import annotations

import importlib.util
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the client is built on it: pip install 'dpo_trainer[judge]'")

import online_tiny
import tiny
import torch
from chat_server import unused_port
from peft import IA3Config, PeftModel, get_peft_model
from vllm_stand_in import BASE, VLLMStandIn, error

from dpo_trainer.online.feedback.protocol import FeedbackUnavailable
from dpo_trainer.online.samples import Completion
from dpo_trainer.online.sampling.generate import Decoding, TransformersGenerator
from dpo_trainer.online.sampling.vllm_server import VLLMServerGenerator, check_policy
from dpo_trainer.reference.strategies import DisabledAdapter, NamedAdapter

KEY = "sk-SECRET-0123456789abcdef"
PROMPTS = [online_tiny.ids_of(text, finished=False) for text in ("cat", "the owl likes", "x", "dog eats figs and hay")]
NEW = 8
GREEDY = Decoding(max_new_tokens=NEW, temperature=0.0)
SAMPLED = Decoding(max_new_tokens=NEW, temperature=0.8)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    """No key, no proxies, and pauses that are short."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused_port()}")  # must not be asked for a loopback address
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def policy() -> PeftModel:
    """On the base that every stand-in has, with an adapter that was trained before."""
    adapted = get_peft_model(tiny.llama(), tiny.lora())
    tiny.fill_adapters(adapted, scale=0.3)
    return adapted


def generator(server: VLLMStandIn | str, folder: Path, *ends: int, **options: Any) -> VLLMServerGenerator:
    url = server if isinstance(server, str) else server.base_url
    defaults: dict[str, Any] = {"end_ids": [tiny.END, *ends], "timeout": 10.0, "max_retries": 1}
    return VLLMServerGenerator(
        tiny.tokenizer(), base_url=url, adapter_dir=folder / "adapters", **{**defaults, **options}
    )


def here(model: torch.nn.Module, *ends: int, decoding: Decoding = GREEDY) -> list[list[Completion]]:
    """By transformers."""
    ours = TransformersGenerator(tiny.tokenizer(), pad_token_id=tiny.PAD, end_ids=[tiny.END, *ends], batch_size=8)
    return ours(model, PROMPTS, 1, decoding=decoding, seed=0)


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "adapters").iterdir())


# --- what is written, and by which model ---


def test_the_policy_before_and_after_a_change_and_the_reference(tmp_path, policy):
    """Greedy answers to the token. Float32 on both sides; sums come in another order, and no two tokens are that close."""
    reference = DisabledAdapter(scorer=None)  # type: ignore[arg-type]  # only for its model
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        first = ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        assert first == here(policy)
        tiny.fill_adapters(policy, seed=2, scale=0.3)
        second = ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        assert second == here(policy) != first
        with reference.in_place(policy) as model:
            base = ask(model, PROMPTS, 1, decoding=GREEDY, seed=0)
        assert base == here(tiny.llama())
        assert base not in (first, second)
        assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == second  # the adapter is on again
    assert len(server.bodies("/v1/load_lora_adapter")) == 2


def test_changes_that_no_version_counter_sees(tmp_path, policy):
    """As engines make them: `weight.data` has a counter of its own."""
    weight = next(p for name, p in policy.named_parameters() if "lora_B" in name)
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        before = weight._version
        weight.data.add_(1.0)
        assert weight._version == before
        assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy)
    assert len(server.bodies("/v1/load_lora_adapter")) == 2


def test_rows_come_in_the_order_of_prompts_and_a_wrapped_model_is_the_same(tmp_path, policy):
    class DataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            torch.nn.Module.__init__(self)
            self.module = module

    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path, concurrency=1)
        one_by_one = [ask(policy, [prompt], 1, decoding=GREEDY, seed=0)[0] for prompt in PROMPTS]
        assert ask(DataParallel(policy), PROMPTS, 1, decoding=GREEDY, seed=0) == one_by_one
        assert ask(policy, [], 1, decoding=GREEDY, seed=0) == []


def test_a_reference_adapter_beside_the_policys(tmp_path, policy):
    """It starts as a copy, is kept when the policy goes on, and room at the server for one of the two is enough."""
    policy.add_adapter("reference", tiny.lora())
    own = {name: p for name, p in policy.named_parameters() if ".default." in name}
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if ".reference." in name:
                p.copy_(own[name.replace(".reference.", ".default.")])
    reference = NamedAdapter(None, "default", "reference", "a copy")  # type: ignore[arg-type]
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        first = ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        for seed in (2, 3):
            with reference.in_place(policy) as model:
                assert ask(model, PROMPTS, 1, decoding=GREEDY, seed=0) == first
            tiny.fill_adapters(policy, seed=seed, scale=0.3, adapter=".default.")
            assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy) != first
        assert len(folders(tmp_path)) == 2
        with reference.in_place(policy) as model:
            assert ask(model, PROMPTS, 1, decoding=GREEDY, seed=0) == first
    assert len(server.bodies("/v1/load_lora_adapter")) == 3


def test_ends_and_texts(tmp_path, policy):
    """A token of ours ends one answer in its middle, the server's EOS another; text is ours, without special tokens."""
    whole = [row[0].ids for row in here(policy)]
    ours, servers = whole[0][3], whole[1][1]
    with VLLMStandIn(tiny.llama(), eos=servers) as server:
        got = generator(server, tmp_path, ours, servers)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
    want = here(policy, ours, servers)
    assert got == want
    assert [row[0].finished for row in got][:2] == [True, True]
    assert {len(row[0].ids) for row in got} >= {NEW}, "and some do not end"


@pytest.mark.parametrize(("stop", "end"), [(7, 7), (None, tiny.END), ("text", tiny.END), (99, tiny.END)])
def test_an_end_that_the_server_leaves_out_is_put_back(stop, end, tmp_path, policy):
    def without(path: str, body: Any, answer: Any) -> Any:
        if path != "/v1/completions":
            return answer
        ids = {"index": 0, "token_ids": [5, 6], "finish_reason": "stop", "stop_reason": stop}
        return 200, {"choices": [ids]}

    with VLLMStandIn(tiny.llama(), changed=without) as server:
        got = generator(server, tmp_path, 7)(policy, PROMPTS[:1], 1, decoding=GREEDY, seed=0)
    assert (got[0][0].ids, got[0][0].finished) == ([5, 6, end], True)


# --- chance ---


def test_seeds(tmp_path, policy):
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        twice = [*PROMPTS, PROMPTS[0]]
        one, again, other = (ask(policy, twice, 3, decoding=SAMPLED, seed=seed) for seed in (3, 3, 4))
        assert one == again
        assert all(a != b for a, b in zip(one, other, strict=True))
        assert one[0] != one[-1], "one prompt in two places is drawn twice"
        assert all(len({tuple(c.ids) for c in row}) == 3 for row in one)
        greedy = ask(policy, PROMPTS, 3, decoding=GREEDY, seed=3)
        assert greedy == [row * 3 for row in here(policy)]
    assert len({body["seed"] for body in server.bodies("/v1/completions")[:5]}) == 5


# --- what is asked ---


def test_the_request(tmp_path, policy):
    how = Decoding(max_new_tokens=5, temperature=0.7, top_p=0.8, top_k=9, min_p=0.01, repetition_penalty=1.2)
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path, 7)
        ask(policy, PROMPTS[:1], 2, decoding=how, seed=3)
        ask(policy, PROMPTS[:1], 2, decoding=GREEDY, seed=3)
    sampled, greedy = server.bodies("/v1/completions")
    (load,) = server.bodies("/v1/load_lora_adapter")
    assert load["lora_path"] == str(tmp_path / "adapters" / load["lora_name"])
    assert 0 <= sampled.pop("seed") < 2**56
    assert sampled == {
        "model": load["lora_name"],
        "prompt": PROMPTS[0],
        "n": 2,
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [tiny.END, 7],
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    assert (greedy["temperature"], greedy["n"], greedy["min_p"]) == (0.0, 1, 0.0)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_requests_at_once_as_allowed(concurrency, tmp_path, policy):
    with VLLMStandIn(tiny.llama(), pause=0.05) as server:
        ask = generator(server, tmp_path, concurrency=concurrency)
        got = ask(policy, PROMPTS * 2, 1, decoding=GREEDY, seed=0)
    assert server.busiest == concurrency
    assert got == here(policy) * 2


# --- adapters that come and go ---


def test_an_adapter_is_sent_once_and_the_old_one_goes(tmp_path, policy):
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        for _ in range(2):
            ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        (first,) = server.adapters
        assert folders(tmp_path) == [first]
        for seed in (2, 3):
            tiny.fill_adapters(policy, seed=seed)
            ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        assert list(server.adapters) == folders(tmp_path) != [first]
    assert len(server.bodies("/v1/load_lora_adapter")) == 3


def test_what_an_earlier_run_left_is_replaced_and_nothing_else(tmp_path, policy):
    """The same adapter (from a folder that is gone), an older one, half a folder; and things that are not ours."""
    with VLLMStandIn(tiny.llama()) as server:
        generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        (name,) = server.adapters
        server.adapters = {"policy-chosen": "/x", "other-0123456789abcdef": "/x", name: "/gone"}
        old, half, spared = (f"policy-{'0' * 16}", f"policy-{'1' * 16}.part", "policy-final")
        for folder in (old, half, spared):
            (tmp_path / "adapters" / folder).mkdir()
        got = generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        assert got == here(policy)
        assert set(server.adapters) == {"policy-chosen", "other-0123456789abcdef", name}
        assert server.adapters[name] == str(tmp_path / "adapters" / name)
    assert folders(tmp_path) == sorted([name, spared])


def test_an_adapter_that_the_server_no_longer_holds_is_no_obstacle(tmp_path, policy):
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        server.held = None  # dropped for another
        tiny.fill_adapters(policy, seed=2)
        assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy)
    assert len(server.bodies("/v1/unload_lora_adapter")) == 1, "a no is not asked again"


def test_a_load_whose_answer_was_lost(tmp_path, policy):
    lost: list[str] = []

    def drop(path: str, body: Any, answer: Any) -> Any:
        if path != "/v1/load_lora_adapter" or lost:
            return answer
        lost.append(path)
        return 503, "a proxy"

    with VLLMStandIn(tiny.llama(), changed=drop) as server:
        assert generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy)
    assert len(server.bodies("/v1/load_lora_adapter")) == 2


def test_another_scale_of_the_same_numbers_is_another_adapter(tmp_path):
    names = []
    for alpha in (8, 16):
        adapted = get_peft_model(tiny.llama(), tiny.lora(lora_alpha=alpha))
        tiny.fill_adapters(adapted, scale=0.3)
        with VLLMStandIn(tiny.llama()) as server:
            got = generator(server, tmp_path)(adapted, PROMPTS, 1, decoding=GREEDY, seed=0)
            assert got == here(adapted)
            names += server.adapters
    assert len(set(names)) == 2


def test_two_processes_one_of_which_sends(tmp_path, policy):
    """Threads stand for ranks: both wait whenever weights have changed, and at no other time. One computes longer."""
    together, waits = threading.Barrier(2), []
    copies = [policy, get_peft_model(tiny.llama(), tiny.lora())]
    tiny.fill_adapters(copies[1], scale=0.3)
    answers: dict[int, Any] = {}

    def wait() -> None:
        waits.append(threading.current_thread().name)
        together.wait(10)

    with VLLMStandIn(tiny.llama()) as server:
        ranks = [generator(server, tmp_path, is_main_process=rank == 0, wait=wait) for rank in range(2)]

        def run(rank: int) -> None:
            for seed in (2, 3):
                for times in (1, 1 + 2 * rank):
                    answers[rank] = ranks[rank](copies[rank], PROMPTS * times, 1, decoding=GREEDY, seed=0)[:4]
                if seed == 2:
                    tiny.fill_adapters(copies[rank], seed=seed, scale=0.3)

        threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(waits) == ["0"] * 4 + ["1"] * 4, "before and after each of 2 adapters"
    assert answers[0] == answers[1] == here(policy)
    assert len(server.bodies("/v1/load_lora_adapter")) == 2


def test_a_main_process_that_fails_leaves_nobody_waiting(tmp_path, policy):
    waits: list[int] = []
    with VLLMStandIn(tiny.llama(), max_lora_rank=2) as server:
        main = generator(server, tmp_path, wait=lambda: waits.append(0))
        with pytest.raises(ValueError, match="LoRA rank 4"):
            main(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        other = generator(server, tmp_path, is_main_process=False, wait=lambda: waits.append(1))
        with pytest.raises(FeedbackUnavailable, match="has not got the adapter of the main process"):
            other(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
    assert waits == [0, 0, 1, 1]


# --- a server that is not there, or says no ---


def test_a_server_that_is_down_at_the_start(tmp_path):
    url = f"http://127.0.0.1:{unused_port()}/v1"
    with pytest.raises(ValueError, match=rf"{url} is not up .*Start it: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm"):
        generator(url, tmp_path)


def test_a_server_that_is_starting(tmp_path):
    with (
        VLLMStandIn(tiny.llama(), changed=lambda path, body, answer: (503, "loading")) as server,
        pytest.raises(ValueError, match=r"is not up \(503: loading\)"),
    ):
        generator(server, tmp_path)


def test_a_server_that_is_no_vllm(tmp_path):
    for answer in (error(404, "what?"), (200, {"data": []}), (200, "<html>"), (200, [1]), (500, "oh")):
        with (
            VLLMStandIn(
                tiny.llama(), changed=lambda path, body, _, said=answer: said if "/v1" in path else _
            ) as server,
            pytest.raises(ValueError, match="vllm serve"),
        ):
            generator(server, tmp_path)


def test_an_address_without_v1(tmp_path, policy):
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server.base_url.removesuffix("/v1") + "/", tmp_path)
        assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy)


@pytest.mark.parametrize("busy", ["completions", "load_lora_adapter"])
def test_a_server_that_fails_for_a_while_is_asked_again(busy, tmp_path, policy):
    failures = iter([503, 429] if busy == "completions" else [502])

    def flaky(path: str, body: Any, answer: Any) -> Any:
        status = next(failures, None) if path.endswith(busy) else None
        return (status, "busy") if status else answer

    with VLLMStandIn(tiny.llama(), changed=flaky) as server:
        got = generator(server, tmp_path, max_retries=2)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
    assert got == here(policy)
    assert next(failures, None) is None


def test_a_server_that_goes_stops_the_run(tmp_path, policy):
    """While it computes, and then before the next adapter."""
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        server.stop()
        with pytest.raises(FeedbackUnavailable, match=r"The generation server http.* did not answer .*resume"):
            ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        tiny.fill_adapters(policy)
        with pytest.raises(FeedbackUnavailable, match=r"generation server"):
            ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)


def test_a_server_that_fails_for_good_is_not_asked_for_the_rest(tmp_path, policy):
    def dead(path: str, body: Any, answer: Any) -> Any:
        return error(500, "EngineCore died") if path == "/v1/completions" else answer

    with VLLMStandIn(tiny.llama(), changed=dead) as server:
        ask = generator(server, tmp_path, concurrency=1, max_retries=0)
        with pytest.raises(FeedbackUnavailable, match=r"said no \(500: EngineCore died\).*resume"):
            ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
    assert len(server.bodies("/v1/completions")) == 1


def test_a_server_that_came_back_without_the_adapter(tmp_path, policy):
    """A run that is started again sends it."""
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        server.adapters.clear()
        with pytest.raises(FeedbackUnavailable, match=r"404: The model `policy-.*resume"):
            ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        assert generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy)


def test_a_completion_that_was_broken_off(tmp_path, policy):
    def aborted(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/completions":
            answer[1]["choices"][0]["finish_reason"] = "abort"
        return answer

    with (
        VLLMStandIn(tiny.llama(), changed=aborted) as server,
        pytest.raises(FeedbackUnavailable, match=r"broke off a completion \(abort\)"),
    ):
        generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)


def test_a_server_that_takes_no_adapters(tmp_path, policy):
    for options, says in (
        ({"updating": False}, r"404: Not Found.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"max_lora_rank": 2}, r"500: LoRA rank 4 is greater than.*--max-lora-rank 4 or more"),
    ):
        with VLLMStandIn(tiny.llama(), **options) as server, pytest.raises(ValueError, match=says):
            generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)
        assert server.bodies("/v1/completions") == []


def test_a_server_that_does_not_see_the_folder(tmp_path, policy, monkeypatch):
    with VLLMStandIn(tiny.llama()) as server:
        load = server._load
        monkeypatch.setattr(server, "_load", lambda body: load({**body, "lora_path": "/elsewhere"}))
        with pytest.raises(ValueError, match=r"No adapter found.*--vllm_adapter_dir\) that the server sees"):
            generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)


def test_a_server_too_old_for_token_ids(tmp_path, policy):
    def old(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/completions":
            del answer[1]["choices"][0]["token_ids"]
        return answer

    with (
        VLLMStandIn(tiny.llama(), changed=old) as server,
        pytest.raises(ValueError, match=r"no token_ids: .*needs vLLM 0\.10\.2"),
    ):
        generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)


@pytest.mark.parametrize("token_ids", [["5"], [5.0], [True], [-1], "56", None])
def test_token_ids_that_are_none(token_ids, tmp_path, policy):
    choice = {"index": 0, "token_ids": token_ids, "finish_reason": "length"}

    def wrong(path: str, body: Any, answer: Any) -> Any:
        return (200, {"choices": [choice]}) if path == "/v1/completions" else answer

    with VLLMStandIn(tiny.llama(), changed=wrong) as server, pytest.raises(ValueError, match="no token_ids"):
        generator(server, tmp_path)(policy, PROMPTS, 1, decoding=GREEDY, seed=0)


@pytest.mark.parametrize(
    "body", ["", "<html>", "[]", {}, {"choices": None}, {"choices": [1, 2]}, {"choices": [{"index": 0}] * 2}]
)
def test_a_body_that_is_no_completion(body, tmp_path, policy):
    def wrong(path: str, _: Any, answer: Any) -> Any:
        return (200, body) if path == "/v1/completions" else answer

    with VLLMStandIn(tiny.llama(), changed=wrong) as server, pytest.raises(ValueError, match="choices for n=2"):
        generator(server, tmp_path)(policy, PROMPTS, 2, decoding=SAMPLED, seed=0)


def test_choices_in_another_order(tmp_path, policy):
    def backwards(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/completions":
            answer[1]["choices"].reverse()
        return answer

    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        want = ask(policy, PROMPTS, 3, decoding=SAMPLED, seed=0)
        server.changed = backwards
        assert ask(policy, PROMPTS, 3, decoding=SAMPLED, seed=0) == want


def test_a_prompt_that_is_too_long(tmp_path, policy):
    with (
        VLLMStandIn(tiny.llama(), max_model_len=20) as server,
        pytest.raises(ValueError, match=r"8 tokens after a prompt of 21 tokens.*takes 20 tokens.*--max_new_tokens"),
    ):
        generator(server, tmp_path)(policy, [PROMPTS[0], PROMPTS[3]], 1, decoding=GREEDY, seed=0)
    assert len(PROMPTS[3]) == 21


def test_another_base_is_worth_a_warning(tmp_path, policy, caplog):
    with VLLMStandIn(tiny.llama()) as server:
        for name, warnings in (("", 0), (BASE, 0), ("/models/base/", 0), ("/models/../models/base", 0), ("org/b", 1)):
            caplog.clear()
            policy.get_base_model().name_or_path = name
            ask = generator(server, tmp_path)
            for _ in range(2):
                ask(policy, PROMPTS[:1], 1, decoding=GREEDY, seed=0)
            assert [record.name.endswith("vllm_server") for record in caplog.records if record.levelno > 20] == [
                True
            ] * warnings
    assert "org/b" in caplog.text
    assert BASE in caplog.text


# --- the key ---


def every_word_of(found: BaseException | None) -> str:
    """Of an error and of all that it hangs on."""
    said = ""
    while found is not None:
        said += f"{found!r} {found} {vars(found)}"
        found = found.__cause__ or found.__context__
    return said


def test_the_key_is_sent(tmp_path, policy, monkeypatch):
    with VLLMStandIn(tiny.llama(), key=KEY) as server:
        with pytest.raises(ValueError, match=r"refuses the key \(401\): set \$VLLM_API_KEY"):
            generator(server, tmp_path)
        assert KEY not in "".join(server.authorizations)
        monkeypatch.setenv("MY_KEY", KEY)
        ask = generator(server, tmp_path, api_key_env="MY_KEY")
        assert ask(policy, PROMPTS, 1, decoding=GREEDY, seed=0) == here(policy)
    assert server.authorizations[-1] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [400, 401, 404, 500])
@pytest.mark.parametrize("where", ["/health", "/v1/models", "/v1/load_lora_adapter", "/v1/completions"])
def test_the_key_is_nowhere(where, status, tmp_path, policy, monkeypatch, caplog, capfd):
    """Not in a log down to the last library, in an error, or in what is kept: also if the server says it aloud."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    words = ""

    def echo(path: str, body: Any, answer: Any) -> Any:
        if path == where == "/v1/load_lora_adapter":
            server.adapters.clear()  # it said no
        return error(status, f"no: {server.authorizations[-1]}") if path == where else answer

    with VLLMStandIn(tiny.llama(), changed=echo, key=KEY) as server:
        try:
            ask = generator(server, tmp_path, max_retries=0)
            words += f"{vars(ask)} {vars(ask.server)}"
            ask(policy, PROMPTS[:1], 1, decoding=GREEDY, seed=0)
        except (ValueError, FeedbackUnavailable) as found:
            words += every_word_of(found)
    assert f"generation server {server.base_url}" in words
    assert f"Bearer {KEY}" in server.authorizations
    words += f"{caplog.text} {capfd.readouterr()} {[vars(record) for record in caplog.records]}"
    words += "".join(path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert len(words) > 100
    assert KEY not in words
    assert KEY[3:] not in words


# --- policies and options that cannot be ---


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "no LoRA with use_dora True"),
        ({"modules_to_save": ["lm_head"]}, "no LoRA with modules_to_save"),
        ({"lora_bias": True}, "no LoRA with lora_bias True"),
        ({"bias": "all"}, "no LoRA with bias 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "no LoRA with rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "no LoRA with alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "no LoRA with init_lora_weights 'pissa'"),
        ({"trainable_token_indices": [5]}, "no LoRA with trainable_token_indices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_that_vllm_has_not(settings, says):
    with pytest.raises(ValueError, match=rf"{says}.*--generator transformers"):
        check_policy(get_peft_model(tiny.llama(), tiny.lora(**settings)))


def test_adapters_that_vllm_has():
    for settings in ({}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"target_modules": ["q_proj"]}):
        check_policy(get_peft_model(tiny.llama(), tiny.lora(**settings)))


def test_models_without_an_adapter_and_weights_besides(tmp_path, policy):
    says = r"none \({}\): train one \(--use_peft true\).*--generator transformers.*NCCL"
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    for model, kind in ((tiny.llama(), "LlamaForCausalLM"), (get_peft_model(tiny.llama(), ia3), ".*IA3")):
        with pytest.raises(ValueError, match=says.format(kind)):
            check_policy(model)
    policy.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight is trained besides: freeze it"):
        check_policy(policy)
    with VLLMStandIn(tiny.llama()) as server:
        ask = generator(server, tmp_path)
        for model in (policy, tiny.llama()):
            with pytest.raises(ValueError, match=r"--generator vllm_\.\.\. hands vLLM"):
                ask(model, PROMPTS, 1, decoding=GREEDY, seed=0)
    assert server.bodies("/v1/completions") == []


def test_several_adapters_at_once(policy):
    policy.add_adapter("other", tiny.lora())
    policy.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\] are active"):
        check_policy(policy)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lora_name": "a/b"}, "lora_name is 'a/b'"),
        ({"lora_name": ""}, "lora_name is ''"),
        ({"base_url": "localhost:8000"}, "base_url 'localhost:8000' is no address"),
        ({"base_url": f"http://user:{KEY}@host/v1"}, "base_url must be a text without user"),
        ({"api_key_env": KEY}, "api_key_env is no name"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"adapter_dir": Path(__file__) / "x"}, r"adapter_dir \(--vllm_adapter_dir\) cannot be made"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong, says, tmp_path):
    options = {"base_url": "http://127.0.0.1:1/v1", "adapter_dir": tmp_path, "end_ids": [1], **wrong}
    with pytest.raises(ValueError, match=says) as caught:
        VLLMServerGenerator(tiny.tokenizer(), **options)
    assert KEY not in every_word_of(caught.value)


def test_a_key_that_no_header_holds_is_refused_without_showing_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", f"{KEY}\r\nX-Other: 1")
    with pytest.raises(ValueError, match=r"\$VLLM_API_KEY has white space") as caught:
        generator("http://127.0.0.1:1/v1", tmp_path)
    assert KEY not in every_word_of(caught.value)


def test_without_the_package(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openai" else find(name, *rest)
    )
    with pytest.raises(ValueError, match=r"pip install 'dpo_trainer\[judge\]'"):
        generator("http://127.0.0.1:1/v1", tmp_path)


# --- in a run ---


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_run_that_samples_from_the_server(trained_before, tmp_path):
    """3 steps with an adapter each, and the last one. The reference is the base, or a copy of the adapter that began."""
    parts: dict[str, Any] = {"model": tiny.llama(), "peft_config": tiny.lora()}
    if trained_before:
        parts = {"model": get_peft_model(tiny.llama(), tiny.lora())}
        tiny.fill_adapters(parts["model"], scale=0.3)
    began = here(parts["model"])
    with VLLMStandIn(tiny.llama()) as server:
        trainer = online_tiny.trainer(
            tmp_path,
            generator=generator(server, tmp_path),
            parts=parts,
            max_steps=3,
            max_new_tokens=4,
            learning_rate=2.0,
        )
        trainer.train()
        texts = ["cat", "the owl likes", "x", "dog eats figs and hay"]  # PROMPTS
        now = trainer.sample_answers(texts, max_new_tokens=NEW)
        assert now == [answer.text for (answer,) in here(trainer.model)]
        for _ in range(2):
            then = trainer.sample_answers(texts, reference=True, max_new_tokens=NEW)
            assert then == [answer.text for (answer,) in began]
            assert then != now
        assert trainer.sample_answers(texts, max_new_tokens=NEW) == now
    models = [body["model"] for body in server.bodies("/v1/completions")]
    assert (BASE in models) is not trained_before
    assert len(set(models)) == 5 - trained_before
    assert len(server.bodies("/v1/load_lora_adapter")) == 4 + trained_before
    assert folders(tmp_path) == sorted(server.adapters)
