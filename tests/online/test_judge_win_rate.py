"""The script that judges answers: from files and from a tiny model, by judges and a reward model, all offline."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from dpo_trainer.online.feedback.protocol import JUDGES, FeedbackUnavailable, Judge, register_judge
from dpo_trainer.online.feedback.reward_model import RewardModel
from dpo_trainer.online.feedback.win_rate import WinRate
from dpo_trainer.online.samples import Completion, Sampled

ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("judge_win_rate_script", ROOT / "scripts" / "judge_win_rate.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that what a test registers is gone afterwards."""
    monkeypatch.setattr(JUDGES, "_items", dict(JUDGES._items))


@pytest.fixture
def spy(registry):
    """A judge that keeps what it sees and prefers the longer answer."""
    seen = []

    @register_judge("spy")
    class Spy(Judge):
        def scores(self, samples):
            seen.extend(samples)
            return [[len(completion.text) for completion in sampled.completions] for sampled in samples]

    return seen


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def jsonl(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def judged(*flags):
    """What the script wrote."""
    script.main([str(flag) for flag in flags])
    return json.loads(Path("win_rate.json").read_text())


def refused(*flags):
    with pytest.raises(SystemExit) as caught:
        script.main([str(flag) for flag in flags])
    assert str(caught.value).startswith("judge_win_rate.py: ")
    assert not Path("win_rate.json").exists()
    return str(caught.value)


def texts(seen):
    return [(s.prompt, *(c.text for c in s.completions)) for s in seen]


# --- answers from files ---

PROMPTS = ["p0", "p1", "p2", "p3"]
ANSWERS = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, ["long one", "ab", "x", "yy"])]
OTHERS = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, ["x", "cd", "long one", ""])]


def two_files(judge="length", *more):
    answers, others = jsonl("answers.jsonl", ANSWERS), jsonl("others.jsonl", OTHERS)
    return "--answers", answers, "--reference_answers", others, "--judge", judge, *more


def test_two_files_by_length(capsys):
    """Shorter wins by default: 8 letters against 1, 2 against 2, 1 against 8, 2 against none."""
    found = judged(*two_files())
    expected = WinRate(wins=1, ties=1, losses=2)
    assert capsys.readouterr().out == f"{expected}\n"
    assert found == expected.to_dict() | {"model": "answers.jsonl", "parameters": None, "judge": "length", "n": 4}


def test_options_reach_the_judge_and_the_file(capsys):
    more = ["--judge_kwargs", '{"prefer": "longer"}', "--level", "0.8", "--model_size", "7e9", "--series", "online"]
    found = judged(*two_files("length", *more))
    assert found == WinRate(2, 1, 1).to_dict(0.8) | {
        "model": "answers.jsonl",
        "parameters": 7_000_000_000,
        "judge": "length",
        "n": 4,
        "series": "online",
    }
    assert "80 % interval" in capsys.readouterr().out


def test_output_goes_where_it_is_told():
    script.main([*two_files(), "--output", "new/folder/a.json"])
    assert json.loads(Path("new/folder/a.json").read_text())["wins"] == 1


def test_rows_drawn_by_seed_stay_together(spy):
    judged(*two_files("spy", "--n", 2, "--seed", 5))
    ids = sorted(random.Random(5).sample(range(4), 2))
    assert [sampled.example_id for sampled in spy] == ids
    assert texts(spy) == [(PROMPTS[i], ANSWERS[i]["answer"], OTHERS[i]["answer"]) for i in ids]


def test_more_rows_than_there_are_is_all(spy):
    assert judged(*two_files("spy", "--n", 100))["n"] == 4


def test_reference_column_beside_the_answers_and_other_columns(spy):
    rows = [row | {"human": f"h{i}", "topic": i} for i, row in enumerate(ANSWERS)]
    judged("--answers", jsonl("a.jsonl", rows), "--reference_column", "human", "--judge", "spy")
    assert texts(spy)[3] == ("p3", "yy", "h3")
    assert spy[3].columns == {"answer": "yy", "human": "h3", "topic": 3}


def test_exact_match_reads_a_column():
    rows = [
        {"prompt": "1+1", "answer": "2", "other": "3", "truth": "2"},
        {"prompt": "2+2", "answer": "5", "other": "4", "truth": "4"},
    ]
    options = ["--judge_kwargs", '{"column": "truth"}']
    file = jsonl("a.jsonl", rows)
    found = judged("--answers", file, "--reference_column", "other", "--judge", "exact_match", *options)
    assert (found["wins"], found["ties"], found["losses"]) == (1, 0, 1)


def test_messages(spy):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    rows = [
        {
            "prompt": prompt,
            "answer": [{"role": "assistant", "content": "a"}],
            "other": {"role": "assistant", "content": "b"},
        }
    ]
    judged("--answers", jsonl("a.jsonl", rows), "--reference_column", "other", "--judge", "spy")
    assert texts(spy) == [(prompt, "a", "b")]


def test_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "judge_win_rate.py"), *two_files()]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{WinRate(1, 1, 2)}\n"


# --- answers of a model ---

PAIRS = [
    {"prompt": "cat", "chosen": " eats", "rejected": " sees milk"},
    {"prompt": "the owl likes", "chosen": " hay", "rejected": " figs"},
    {"prompt": "dog", "chosen": " not now", "rejected": " milk"},
]


def greedy(prompt_ids, new):
    """One prompt at a time, without padding and without a cache: a loop over the likeliest token."""
    network, tokenizer = tiny.llama().eval(), tiny.tokenizer()
    ids = list(prompt_ids)
    with torch.no_grad():
        while len(ids) < len(prompt_ids) + new and (len(ids) == len(prompt_ids) or ids[-1] != tiny.END):
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True)


def test_greedy_answers_against_the_chosen_ones(model, spy):
    data = jsonl("pairs.jsonl", PAIRS)
    flags = [
        "--dataset_name",
        data,
        "--reference_column",
        "chosen",
        "--judge",
        "spy",
        "--max_new_tokens",
        6,
        "--dtype",
        "float32",
    ]
    found = judged("--model_name_or_path", model, *flags, "--batch_size", 2)
    tokenizer = tiny.tokenizer()
    expected = [greedy(tokenizer(row["prompt"]).input_ids, 6) for row in PAIRS]
    assert texts(spy) == [(row["prompt"], answer, row["chosen"]) for row, answer in zip(PAIRS, expected)]
    assert len(set(expected)) > 1  # or a model that says the same to everything would pass
    wins = sum(len(answer) > len(row["chosen"]) for row, answer in zip(PAIRS, expected))
    assert (found["wins"], found["n"], found["model"]) == (wins, 3, model)
    assert found["parameters"] == tiny.llama().num_parameters()


def test_conversations_go_through_the_template(model, spy):
    """With the prompt repeated in both completions, as datasets of the hub have it."""
    turn = {"role": "user", "content": "what?"}
    rows = [
        {
            "chosen": [turn, {"role": "assistant", "content": "good"}],
            "rejected": [turn, {"role": "assistant", "content": "bad"}],
        }
    ]
    data = jsonl("chat.jsonl", rows)
    judged(
        "--model_name_or_path",
        model,
        "--dataset_name",
        data,
        "--reference_column",
        "rejected",
        "--judge",
        "spy",
        "--max_new_tokens",
        5,
    )
    tokenizer = tiny.tokenizer()
    ids = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
    assert texts(spy) == [([turn], greedy(ids, 5), "bad")]


def test_prompts_alone_with_answers_in_a_file(model, spy):
    data = jsonl("prompts.jsonl", [{"question": "cat"}, {"question": "dog"}])
    others = jsonl("others.jsonl", [{"answer": "a"}, {"answer": "b"}])
    flags = ["--dataset_name", data, "--columns", "prompt=question", "--reference_answers", others]
    judged("--model_name_or_path", model, *flags, "--judge", "spy", "--max_new_tokens", 3, "--model_size", 12)
    assert [(prompt, other) for prompt, _, other in texts(spy)] == [("cat", "a"), ("dog", "b")]
    assert json.loads(Path("win_rate.json").read_text())["parameters"] == 12


def test_temperature_draws_by_seed(model, spy):
    data = jsonl("pairs.jsonl", PAIRS)
    flags = ["--model_name_or_path", model, "--dataset_name", data, "--reference_column", "chosen", "--judge", "spy"]
    flags += ["--max_new_tokens", 12, "--temperature", 1.0]
    for seed in (1, 1, 2):
        judged(*flags, "--seed", seed)
    first, again, other = (texts(spy)[at : at + 3] for at in (0, 3, 6))
    assert first == again
    assert first != other


def test_a_reward_model_judges(tmp_path):
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(LlamaConfig(**tiny.SIZES, num_labels=1))
    classifier.save_pretrained(tmp_path / "reward")
    tiny.tokenizer().save_pretrained(tmp_path / "reward")
    found = judged(*two_files()[:4], "--reward_model_path", tmp_path / "reward")
    samples = [
        Sampled(
            example_id=0,
            prompt=a["prompt"],
            prompt_ids=[],
            completions=[Completion(ids=[], text=row["answer"], finished=True) for row in (a, b)],
        )
        for a, b in zip(ANSWERS, OTHERS)
    ]
    scores = RewardModel(str(tmp_path / "reward"), device="cpu").scores(samples)
    assert found["wins"] == sum(a > b for a, b in scores)
    assert found["losses"] == sum(a < b for a, b in scores)
    assert found["wins"] + found["losses"] > 0
    assert found["judge"] == str(tmp_path / "reward")


# --- refusals ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reference_column", "c", "--judge", "length"], "one of --answers and --model_name_or_path"),
        (
            ["--answers", "a", "--model_name_or_path", "m", "--judge", "length"],
            "one of --answers and --model_name_or_path",
        ),
        (["--answers", "a", "--judge", "length"], "one of --reference_answers and --reference_column"),
        (["--answers", "a", "--reference_column", "c"], "one of --judge and --reward_model_path"),
        (["--answers", "a", "--reference_column", "c", "--judge", "x", "--reward_model_path", "r"], "and not both"),
        (["--model_name_or_path", "m", "--reference_column", "c", "--judge", "length"], "without --dataset_name"),
        (
            ["--answers", "a", "--reference_column", "c", "--judge", "length", "--temperature", "1"],
            "--temperature does nothing",
        ),
        (
            ["--answers", "a", "--reference_column", "c", "--judge", "length", "--dataset_name", "d"],
            "--dataset_name does nothing",
        ),
        (
            ["--answers", "a", "--reference_column", "c", "--reward_model_path", "r", "--judge_kwargs", "{}"],
            "there is no --judge",
        ),
    ],
)
def test_options_that_do_not_go_together(flags, message):
    assert message in refused(*flags)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n", "0"], "--n 0"),
        (["--level", "95"], "--level is 95"),
        (["--model_size", "0"], "--model_size 0"),
        (["--judge_kwargs", "{prefer"], "is not valid JSON"),
        (["--judge_kwargs", "[1]"], "must be a JSON object"),
        (["--judge_kwargs", '{"prefers": 1}'], "no option 'prefers'"),
        (["--no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_options_out_of_range(more, message):
    assert message in refused(*two_files("length", *more))


def test_an_unknown_judge():
    assert "Did you mean 'length'" in refused(*two_files("lenght"))


def test_unlike_files():
    jsonl("short.jsonl", OTHERS[:3])
    first = two_files()[:2]
    assert "4 rows and short.jsonl 3" in refused(*first, "--reference_answers", "short.jsonl", "--judge", "length")
    jsonl("turned.jsonl", OTHERS[::-1])
    assert "Row 0 of turned.jsonl answers another prompt" in refused(
        *first, "--reference_answers", "turned.jsonl", "--judge", "length"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "a", "c": "b"}, "Row 0 of a.jsonl has no column 'prompt' (it has: answer, c)"),
        ({"prompt": "p", "c": "b"}, "Row 0 of a.jsonl has no column 'answer'"),
        ({"prompt": "p", "answer": "a"}, "Row 0 of a.jsonl has no column 'c'"),
        ({"prompt": "p", "answer": 3, "c": "b"}, "column 'answer': is 3"),
        ({"prompt": " ", "answer": "a", "c": "b"}, "'prompt': is empty"),
        ({"prompt": "p", "answer": [{"role": "user", "content": "x"}], "c": "b"}, "ends with a 'user' turn"),
    ],
)
def test_bad_rows(row, message):
    jsonl("a.jsonl", [row])
    assert message in refused("--answers", "a.jsonl", "--reference_column", "c", "--judge", "length")


def test_a_prompt_beyond_the_window(model):
    data = jsonl("pairs.jsonl", [PAIRS[0], {**PAIRS[1], "prompt": "x" * 250}])
    flags = ["--dataset_name", data, "--reference_column", "chosen", "--judge", "length", "--max_new_tokens", 10]
    assert "Row 1 of pairs.jsonl: its prompt of 250 tokens" in refused("--model_name_or_path", model, *flags)


def test_no_such_file():
    assert "gone.jsonl" in refused("--answers", "gone.jsonl", "--reference_column", "c", "--judge", "length")


def test_a_misspelt_judge_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(script, "load_model", lambda *a, **k: pytest.fail("loaded"))
    assert "Unknown judge" in refused(
        "--model_name_or_path", "m", "--dataset_name", "d", "--reference_column", "c", "--judge", "nobody"
    )


def test_a_judge_that_is_down(registry):
    @register_judge("down")
    class Down(Judge):
        def scores(self, samples):
            raise FeedbackUnavailable("nobody answers at http://localhost:1")

    assert "nobody answers at http://localhost:1" in refused(*two_files("down"))
