"""OnlineDPOConfig and who gives feedback: every option works or is refused by name; flags, YAML and --help."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import online_tiny
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from dpo_trainer import DPOConfig
from dpo_trainer.cli import parse_args
from dpo_trainer.online.choose import choose_feedback
from dpo_trainer.online.config import OFFLINE_ONLY, OnlineDPOConfig
from dpo_trainer.online.feedback.protocol import JUDGES, Judge
from dpo_trainer.online.feedback.reward_model import RewardModel
from dpo_trainer.online.feedback.rewards import Rewards
from dpo_trainer.online.samples import Completion, Sampled
from dpo_trainer.online.sampling.generate import Decoding

ROOT = Path(__file__).parents[2]
CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true"]


def config(**options: Any) -> OnlineDPOConfig:
    return online_tiny.config("unused", **options)


def parse(*argv: str):
    return parse_args([*argv, *CPU], OnlineDPOConfig)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *[({name: value}, f"--{name} must be an integer of at least {least}, got {value!r}")
          for name, least in {"num_generations": 2, "max_new_tokens": 1, "generate_every": 1,
                              "generation_batch_size": 1, "top_k": 0}.items()
          for value in (least - 1, float(least), None, True)],
        *[({name: value}, f"--{name} must be a number above 0, got {value!r}")
          for name in ("temperature", "repetition_penalty", "reward_scale")
          for value in (0, -1.0, math.nan, math.inf, "1", None, True)],
        *[({"top_p": value}, f"--top_p must be in (0, 1], got {value!r}") for value in (0, 1.1, math.nan, None, True)],
        *[({"min_p": value}, f"--min_p must be in [0, 1], got {value!r}") for value in (-0.1, 1.1, math.nan, True)],
        *[({"missing_eos_penalty": value}, f"--missing_eos_penalty must be a number of at least 0, got {value!r}")
          for value in (-1, math.nan, math.inf, True)],
        *[({"beta": value}, f"--beta must be a number above 0, or a list of them, one for each epoch; got {value!r}")
          for value in (0, -0.1, math.nan, math.inf, "0.1", None, True, [], [0.1, 0], [0.1, "0.2"])],
        ({"generator": "vllm"}, "--generator 'vllm' is not one of transformers, continuous, vllm_server, vllm_colocated"),
        ({"generator": "vllm_server"}, "--generator vllm_server needs --vllm_server_url"),
        ({"vllm_server_url": "http://x/v1"}, "--vllm_server_url without --generator vllm_server would do nothing"),
        ({"vllm_adapter_dir": "here"}, "--vllm_adapter_dir without --generator vllm_server or"),
        ({"vllm_gpu_memory": 0.5}, "--vllm_gpu_memory without --generator vllm_colocated would do nothing"),
        ({"generator": "vllm_colocated", "vllm_gpu_memory": 1.0}, "--vllm_gpu_memory must be in (0, 1), got 1.0"),
        ({"pair_selection": "best"}, "--pair_selection 'best' is not one of best_worst, all"),
        ({"num_generations": 5, "generation_batch_size": 4},
         "--generation_batch_size 4 is less than --num_generations 5"),
        ({"max_new_tokens": 32, "max_length": 32}, "--max_new_tokens 32 leaves no room for a prompt in --max_length 32"),
        ({"judge_kwargs": {"a": 1}}, "--judge_kwargs without --judge would do nothing"),
        ({"judge": "random", "judge_kwargs": "{oops"}, "--judge_kwargs '{oops' is not valid JSON"),
        ({"judge": "random", "judge_kwargs": "[1]"}, "--judge_kwargs must be a JSON object, got '[1]'"),
        ({"judge": "random", "reward_model_path": ["r"]}, "--judge random and --reward_model_path both say"),
        ({"judge": "random", "reward_module": "r.py"}, "--judge random and --reward_module both say"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_name(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"precompute_ref_log_probs": True},
        {"deduplicate": True},
        {"max_pairs_per_prompt": 3},
        {"max_completion_length": 9},
        {"auto_find_batch_size": True},
        {"truncation_mode": "keep_end"},
        {"useless_pairs": "error"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_for_preference_rows_are_refused(options):
    (name,) = options
    assert name in OFFLINE_ONLY
    with pytest.raises(ValueError, match=rf"--{name} does not go with online DPO: .*\. Leave it out\."):
        config(**options)


def test_every_such_option_is_tested_above():
    tested = test_options_for_preference_rows_are_refused.pytestmark[0].args[1]
    assert {name for options in tested for name in options} == set(OFFLINE_ONLY)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0, "top_p": 1, "min_p": 0, "missing_eos_penalty": 0, "temperature": 1e-3},
        {"min_p": 1.0, "num_generations": 4, "generation_batch_size": 4},
        {"max_new_tokens": 31, "max_length": 32},
        {"max_length": None},
        {"judge": "random", "judge_kwargs": {"seed": 1}},
        {"reward_model_path": ["a", "b"], "reward_module": "c.py"},
    ],
    ids=str,
)
def test_the_bounds_themselves_are_fine(options):
    made = config(**options)
    assert {name: getattr(made, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "sigmod"}, "Did you mean 'sigmoid'?"),
        ({"label_smoothing": 0.6}, "--label_smoothing"),
        ({"ref_model_sync_steps": 2}, "--ref_model_sync_steps 2 would be ignored"),
        ({"max_prompt_length": 64, "max_length": 64}, "--max_prompt_length 64 leaves no room"),
    ],
)
def test_what_dpo_config_refuses_is_refused_here(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        config(**options)


# --- beta ---


def test_beta_is_a_number_and_betas_are_all():
    for given, betas in ((0.3, [0.3]), ([0.3], [0.3]), ((0.5, 1), [0.5, 1.0])):
        made = config(beta=given)
        assert (made.beta, made.betas) == (betas[0], betas)
    assert config().betas == [0.1]


@pytest.mark.parametrize(("epoch", "beta"), [(0.0, 0.5), (0.99, 0.5), (1.0, 0.2), (1.5, 0.2), (2.0, 0.1), (7.3, 0.1)])
def test_beta_of_an_epoch(epoch, beta):
    assert config(beta=[0.5, 0.2, 0.1]).beta_of_epoch(epoch) == beta


@pytest.mark.parametrize("beta", [0.3, [0.3, 0.2]])
def test_a_config_and_what_it_writes_down_are_the_same(beta):
    """As in training_args.json, and for whoever makes a config of another one's options."""
    made = config(beta=beta, judge="random", judge_kwargs='{"seed": 2}', stop_tokens=["<|user|>"], min_p=0.1)
    again = OnlineDPOConfig(**json.loads(json.dumps(made.to_dict())))
    assert (again.betas, again.decoding, again.judge_kwargs) == (made.betas, made.decoding, {"seed": 2})
    assert again.to_dict() == made.to_dict()


# --- decoding ---


def test_decoding_has_the_options_of_sampling():
    how = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2}
    assert config(**how).decoding == Decoding(**how)
    assert {field.name for field in dataclasses.fields(Decoding)} == set(how)


# --- the command line ---


def test_flags(tmp_path):
    _, _, made, given = parse(
        *("--beta", "0.2", "0.1", "--num_generations", "4", "--pair_selection", "all", "--temperature", "0.7"),
        *("--judge", "length", "--judge_kwargs", '{"prefer": "longer"}', "--stop_tokens", "<|user|>", "."),
        *("--generate_every", "3", "--missing_eos_penalty", "1.5", "--loss_type", "ipo"),
    )
    assert isinstance(made, OnlineDPOConfig)
    assert (made.betas, made.num_generations, made.pair_selection) == ([0.2, 0.1], 4, "all")
    assert (made.judge, made.judge_kwargs) == ("length", {"prefer": "longer"})
    assert (made.stop_tokens, made.generate_every, made.missing_eos_penalty) == (["<|user|>", "."], 3, 1.5)
    assert (made.temperature, made.loss_type) == (0.7, ["ipo"])
    assert {"beta", "judge_kwargs", "stop_tokens"} <= given


def test_a_file_and_flags_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "beta: [0.3, 0.2]\njudge: exact_match\njudge_kwargs: {column: solution}\nnum_generations: 3\nmin_p: 0.05\n"
    )
    made = parse(str(file), "--num_generations", "5")[2]
    assert (made.betas, made.judge_kwargs, made.num_generations) == ([0.3, 0.2], {"column": "solution"}, 5)
    assert made.min_p == 0.05
    file.write_text("beta: 0.3\nreward_model_path: some/model\nreward_weights: [2]\n")
    made = parse(str(file))[2]
    assert (made.betas, made.reward_model_path, made.reward_weights) == ([0.3], ["some/model"], [2.0])


def test_defaults_without_flags():
    _, _, made, _ = parse()
    plain = OnlineDPOConfig(output_dir=made.output_dir, use_cpu=True, bf16=False)
    own = [f.name for f in dataclasses.fields(OnlineDPOConfig) if f.name in OnlineDPOConfig.__annotations__]
    assert len(own) > 15
    assert {name: getattr(made, name) for name in own} == {name: getattr(plain, name) for name in own}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num_generation", "4"], "Unknown argument '--num_generation'. Did you mean '--num_generations'?"),
        (["--judge_kwargs", "{1}"], "--judge_kwargs '{1}' is not valid JSON"),
        (["--judge_kwargs", '{"a": 1}'], "--judge_kwargs without --judge"),
        (["--num_generations", "1"], "--num_generations must be an integer of at least 2"),
    ],
)
def test_flags_that_are_refused(argv, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(*argv)


def test_online_options_are_unknown_to_dpo():
    with pytest.raises(ValueError, match="Unknown argument '--num_generations'"):
        parse_args(["--num_generations", "4", *CPU], DPOConfig)


def test_help_of_the_script(capsys):
    spec = importlib.util.spec_from_file_location("dpo_online", ROOT / "scripts" / "dpo_online.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    ours, training = shown.split("\ntraining (transformers.TrainingArguments)")
    for field in dataclasses.fields(OnlineDPOConfig):
        if field.init and field.name in OnlineDPOConfig.__annotations__:
            assert f"--{field.name}" in ours.split("\nDPO")[1], field.name
    assert "--weight_decay" in training
    with pytest.raises(SystemExit, match=r"dpo_online.py: --num_generations must be"):
        script.main(["--num_generations", "1"])


# --- who gives feedback ---


def choose(passed: Any = None, rewards: Any = None, tokenizers: Any = None, **options: Any):
    """`passed` is the judge that the trainer was given, `judge=` the option."""
    return choose_feedback(config(**options), judge=passed, rewards=rewards, tokenizers=tokenizers)


def short(prompts, completions):
    return [-len(completion) for completion in completions]


def long(prompts, completions):
    return [len(completion) for completion in completions]


class Mine(Judge):
    def scores(self, samples):
        return [[0.0] * len(sampled.completions) for sampled in samples]


@pytest.fixture(scope="module")
def reward_model():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**tiny.SIZES, "num_hidden_layers": 1, "num_labels": 1}))


@pytest.fixture
def reward_module(tmp_path):
    text = "def fun(prompts, completions):\n    return [1.0] * len(prompts)\n\n\nREWARDS = [fun]\n"
    (tmp_path / "mine.py").write_text(text)
    return str(tmp_path / "mine.py")


def samples() -> list[Sampled]:
    completions = [Completion(ids=online_tiny.ids_of(text), text=text, finished=True) for text in ("a", "bcd")]
    return [Sampled(example_id=0, prompt="p", prompt_ids=[9], completions=completions)]


def test_a_judge_by_name_with_its_options():
    assert choose(judge="length", judge_kwargs={"prefer": "longer", "unit": "tokens"})(samples()) == [[2, 4]]
    assert choose(judge="length")(samples()) == [[-1, -3]]


def test_a_judge_as_an_object():
    mine = Mine()
    assert choose(mine) is mine
    assert choose("length").name == "length", "or its name, where the trainer takes one"


def test_rewards_are_one_weighted_sum():
    made = choose(rewards=[short, long], reward_weights=[3.0, 1.0], reward_scale=0.5)
    assert isinstance(made, Rewards)
    assert made(samples()) == [[-1.0, -3.0]]  # 0.5 (-3 n + n)
    assert choose(rewards=short)(samples()) == [[-1.0, -3.0]], "one alone needs no list"


def test_rewards_of_a_module(reward_module):
    assert choose(reward_module=reward_module, reward_scale=2.0)(samples()) == [[2.0, 2.0]]


def test_a_reward_model_gets_its_tokenizer(reward_model):
    made = choose(rewards=[reward_model, short], tokenizers=[tiny.tokenizer(), None])
    first, second = made.rewards
    assert isinstance(first, RewardModel)
    assert second.name == "short"
    (row,) = made(samples())
    assert row == [a + b for a, b in zip(made.last[first.name], made.last["short"], strict=True)]
    assert made.last["short"] == [-1, -3]
    assert isinstance(choose(rewards=reward_model, tokenizers=tiny.tokenizer()).rewards[0], RewardModel)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "No judge or reward was given: name a judge (--judge), a reward model"),
        ({"rewards": []}, "No judge or reward was given"),
        ({"passed": Mine(), "judge": "random"}, "A judge was passed to the trainer, and --judge random names another"),
        ({"passed": Mine(), "rewards": [short]}, "A judge and rewards both say which completion is better"),
        ({"judge": "random", "rewards": short}, "A judge and rewards both say which completion is better"),
        ({"passed": Mine(), "reward_model_path": ["r"]}, "A judge and rewards both say"),
        ({"rewards": [short], "reward_model_path": ["r"]}, "Rewards were passed to the trainer, and --reward_model_path"),
        ({"judge": "lenght"}, "Unknown judge 'lenght'. Did you mean 'length'? Known: "),
        ({"judge": "length", "judge_kwargs": {"prefers": "longer"}},
         "--judge_kwargs: judge 'length' has no option 'prefers'. It has: prefer, unit."),
        ({"judge": "length", "judge_kwargs": {"prefer": "best"}}, "prefer must be 'shorter' or 'longer', got 'best'"),
        ({"judge": "regex"}, "--judge_kwargs does not fit judge 'regex'"),
        ({"judge": "random", "reward_weights": [1.0]}, "--reward_weights and --reward_scale are about rewards"),
        ({"passed": Mine(), "reward_scale": 2.0}, "--reward_weights and --reward_scale are about rewards"),
        ({"passed": 3}, "judge is 3: give a name, or an object of a class derived from"),
        ({"passed": short}, "give a name, or an object of a class derived from"),
        ({"rewards": [short, long], "reward_weights": [1.0]}, "The weights [1.0] do not fit the rewards short, long"),
        ({"rewards": [short, long], "tokenizers": [None]}, "1 reward_processing_classes for 2 rewards: give one each"),
        ({"rewards": [short, short]}, "Two rewards are named 'short'"),
        ({"reward_module": "no/such.py"}, "there is no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_feedback_that_is_refused(how, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        choose(**how)


def test_a_passed_reward_beside_a_module(reward_module):
    with pytest.raises(
        ValueError, match="Rewards were passed to the trainer, and --reward_model_path or --reward_module"
    ):
        choose(rewards=short, reward_module=reward_module)


def test_every_judge_of_the_package_is_known_here():
    assert {"random", "length", "regex", "exact_match", "llm"} <= set(JUDGES)


# --- as arguments of the trainer ---


def test_other_names_of_the_rewards(reward_model, tmp_path):
    parts = {"reward_model": reward_model, "reward_processing_class": tiny.tokenizer()}
    trainer = online_tiny.trainer(tmp_path, parts=parts)
    assert isinstance(trainer.feedback.rewards[0], RewardModel)
    assert trainer.feedback.rewards[0].classifier.model is reward_model


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"reward_model": short, "reward_funcs": short}, "reward_model is another name for reward_funcs"),
        ({"reward_funcs": short, "reward_processing_class": [None], "reward_processing_classes": [None]},
         "reward_processing_class is another name for reward_processing_classes"),
    ],
)  # fmt: skip
def test_one_of_two_names(parts, said, tmp_path):
    with pytest.raises(ValueError, match=f"{said}: give one of the two"):
        online_tiny.trainer(tmp_path, parts=parts)
