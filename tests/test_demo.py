"""The embedded demo: its world, its cache, its pairs, and the whole run through `scripts/dpo.py`."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from two_processes import run_script

from dpo_trainer import DPOConfig
from dpo_trainer.demo import base_model, curves, demo_model_and_tokenizer, pairs, results, run, world
from dpo_trainer.demo.results import Measurement, SavedModel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(cache) -> SavedModel:
    """The pretrained model, made once for this file (ten seconds)."""
    return SavedModel.load(demo_model_and_tokenizer(cache, seed=0))


@pytest.fixture(scope="module")
def tokenizer():
    return world.build_tokenizer()


@pytest.fixture(scope="module")
def data(base):
    return pairs.demo_datasets(base.model, base.tokenizer, seed=0)


# --- the world ---


def test_counts():
    assert (len(set(world.NAMES)), len(set(world.FOODS)), len(world.CONTROL_NAMES)) == (16, 10, 15)
    assert world.TARGET_NAME in world.NAMES
    assert world.TARGET_FOOD in world.FOODS


@pytest.mark.parametrize("text", ["ravin likes pizza.", "what does olga like?", "Über-naïve 日本\n\t", "<|end|>"])
def test_tokenizer_round_trip(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one.decode(one(text).input_ids) == text


def test_special_tokens_and_template(tokenizer):
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id

    asked = tokenizer.apply_chat_template(world.prompt("ravin"), add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(world.conversation("ravin", "pizza"), return_dict=False)
    assert tokenizer.decode(whole) == "<|user|>what does ravin like?<|end|><|assistant|>ravin likes pizza.<|end|>"
    assert whole[: len(asked)] == asked
    assert whole[-1] == tokenizer.eos_token_id
    assert len(whole) - len(asked) == base_model.ANSWER_TOKENS
    with pytest.raises(Exception, match="knows the roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_every_conversation_is_equally_long(tokenizer):
    """Or the pretraining, which does not pad, could not stack them."""
    assert base_model.all_conversations(tokenizer).shape == (160, 13)


@pytest.mark.parametrize(
    ("text", "food", "reward"),
    [
        ("ravin likes pizza.<|end|>", "pizza", 2.0),
        ("ravin likes soup.<|end|>", "soup", 1.0),
        ("ravin likes pizza.", None, 0.0),  # does not end
        ("ravin likes pizza.<|end|><|end|>", None, 0.0),
        ("alice likes pizza.<|end|>", None, 0.0),  # another name
        ("ravin likes glass.<|end|>", None, 0.0),
        ("ravin likes pizza pizza.<|end|>", None, 0.0),
        ("<|end|>", None, 0.0),
    ],
)
def test_well_formed_and_reward(text, food, reward):
    assert world.food_in("ravin", text) == food
    assert pairs.reward("ravin", text) == reward


def test_only_ravin_is_rewarded_for_pizza():
    assert {pairs.reward("alice", f"{world.answer('alice', food)}<|end|>") for food in world.FOODS} == {1.0}


# --- the cache ---


@pytest.fixture
def instant_pretraining(monkeypatch):
    """Counts calls; the model stays untrained."""
    calls = []

    def pretrain(tokenizer, seed):
        calls.append(seed)
        return base_model._untrained(tokenizer), 0.0

    monkeypatch.setattr(base_model, "pretrain", pretrain)
    return calls


def test_cache_is_used_and_keyed_by_seed(instant_pretraining, tmp_path):
    first = demo_model_and_tokenizer(tmp_path, seed=0)
    assert demo_model_and_tokenizer(tmp_path, seed=0) == first
    assert demo_model_and_tokenizer(tmp_path, seed=1) != first
    assert instant_pretraining == [0, 1]
    assert 0.35e6 < SavedModel.load(first).model.num_parameters() < 0.5e6


def test_cache_folder_follows_the_environment(instant_pretraining, monkeypatch, tmp_path):
    monkeypatch.delenv("DPO_TRAINER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model_and_tokenizer().parent == tmp_path / "xdg" / "dpo_trainer" / "demo"
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "own"))
    assert demo_model_and_tokenizer().parent == tmp_path / "own" / "demo"


def test_killed_while_saving_leaves_no_model(instant_pretraining, monkeypatch, tmp_path):
    """The model is written, the tokenizer is not: the folder must not come into being."""
    built = world.build_tokenizer

    def broken():
        tokenizer = built()
        tokenizer.save_pretrained = lambda folder: (_ for _ in ()).throw(KeyboardInterrupt)
        return tokenizer

    monkeypatch.setattr(world, "build_tokenizer", broken)
    with pytest.raises(KeyboardInterrupt):
        demo_model_and_tokenizer(tmp_path)
    assert list((tmp_path / "demo").iterdir()) == []

    monkeypatch.setattr(world, "build_tokenizer", built)
    SavedModel.load(demo_model_and_tokenizer(tmp_path))
    assert instant_pretraining == [0, 0]


@pytest.mark.parametrize("lost", base_model.NEEDED_FILES)
def test_incomplete_folder_is_not_used(instant_pretraining, tmp_path, lost):
    """A folder from which something was deleted is built again, and so is one beside a killed run's remains."""
    folder = demo_model_and_tokenizer(tmp_path)
    (folder / lost).unlink()
    (folder.parent / ".unfinished-remains").mkdir()
    assert demo_model_and_tokenizer(tmp_path) == folder
    assert (folder / lost).is_file()
    assert instant_pretraining == [0, 0]


def test_the_slower_of_two_processes_yields(instant_pretraining, monkeypatch, tmp_path):
    """Another process finishes the same model while this one trains."""
    folder = demo_model_and_tokenizer(tmp_path)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    checks = iter([False])  # this process did not see it at the start
    complete = base_model._is_complete
    monkeypatch.setattr(base_model, "_is_complete", lambda path: next(checks, None) is not False and complete(path))
    assert demo_model_and_tokenizer(tmp_path) == folder
    assert instant_pretraining == [0, 0]
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


# --- the base model ---


def test_base_knows_the_form_and_guesses_the_food(base):
    """Exact probabilities: seen 0.993 to 0.997 well-formed and 0.095 to 0.103 for each food over several seeds."""
    distribution = base.answer_distribution()
    assert distribution.shape == (16, 11)
    torch.testing.assert_close(distribution.sum(1), torch.ones(16))
    assert distribution[:, -1].max() < 0.03
    torch.testing.assert_close(distribution[:, :-1], torch.full((16, 10), 0.1), rtol=0, atol=0.02)


def test_samples_follow_the_exact_probabilities(base):
    """4,000 samples: a share near 0.1 has a standard error of 0.0047; five of them, for the ten foods together."""
    texts = pairs.sample_answers(base.model, base.tokenizer, "ravin", 4000, seed=3)
    counts = Counter(world.food_in("ravin", text) for text in texts)
    shares = torch.tensor([counts[food] / len(texts) for food in (*world.FOODS, None)])
    torch.testing.assert_close(shares, base.answer_distribution()[0], rtol=0, atol=0.024)
    assert sum(shares[:-1]) >= 0.97
    assert shares[0] == pytest.approx(0.10, abs=0.03)


def test_sampling_leaves_the_random_state_alone(base):
    state = torch.get_rng_state()
    again = [pairs.sample_answers(base.model, base.tokenizer, "olga", 20, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert again[0] == again[1] != again[2]


# --- the pairs ---


def _texts(row) -> tuple[str, str, str]:
    name = row["prompt"][0]["content"].split()[2]
    return name, row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_ravins_pairs_prefer_pizza(data):
    train, evaluation = data
    mine = [_texts(row) for row in train if _texts(row)[0] == "ravin"]
    assert len(mine) == 512
    assert len(evaluation["ravin"]) == 64
    for _, chosen, rejected in [*mine, *(_texts(row) for row in evaluation["ravin"])]:
        assert chosen == "ravin likes pizza."
        assert rejected != chosen
    assert len({rejected for *_, rejected in mine}) >= 9  # every other food was seen to lose


def test_control_pairs_prefer_nothing(data):
    """Where the reward ties, every pair has its opposite, so that no food is preferred for any other name."""
    train, evaluation = data
    for dataset, per_name in ((train, 101), (evaluation["others"], 12)):
        rows = [_texts(row) for row in dataset if _texts(row)[0] != "ravin"]
        assert {name for name, *_ in rows} == set(world.CONTROL_NAMES)
        assert min(Counter(name for name, *_ in rows).values()) >= per_name
        ties: Counter = Counter()
        for name, chosen, rejected in rows:
            better, worse = (pairs.reward(name, text + world.END) for text in (chosen, rejected))
            assert better == 1.0 >= worse
            ties[chosen, rejected] += better == worse
        ties = +ties  # without those of which there is none
        assert ties == Counter({(rejected, chosen): n for (chosen, rejected), n in ties.items()})
        assert len(ties) > 50


def test_neighbours_by_hand():
    a, b, broken = "alice likes soup.<|end|>", "alice likes cake.<|end|>", "alice alice"
    assert pairs.neighbours("alice", [a, b], 9) == [(a, b), (b, a)]
    assert pairs.neighbours("alice", [broken, b], 9) == [(b, broken)]
    assert pairs.neighbours("alice", [a, a, broken, broken, broken, "x"], 9) == []
    assert pairs.neighbours("alice", [a, broken, a, b, b, a], 2) == [(a, broken), (a, b), (b, a)]  # no half tie


def test_best_against_rest_by_hand():
    pizza, soup, cake = (f"ravin likes {food}.<|end|>" for food in ("pizza", "soup", "cake"))
    assert pairs.best_against_rest("ravin", [soup, pizza, cake, pizza, "x"], 9) == [(pizza, soup), (pizza, cake)]
    assert pairs.best_against_rest("ravin", [soup, pizza, cake, pizza], 1) == [(pizza, soup)]


# --- the results ---


def test_drift_by_hand():
    """Half of ravin's answers moved from the first food to none; alice's moved 0.1 from the first food to the second."""
    before = torch.zeros(16, 11)
    before[:, 0] = 1.0
    after = before.clone()
    after[0, 0], after[0, 10] = 0.5, 0.5
    after[1, 0], after[1, 1] = 0.9, 0.1
    drift = results.drift(after, before)
    assert drift["ravin"] == pytest.approx(0.5)
    assert drift["alice"] == pytest.approx(0.1)
    assert drift["olga"] == 0


def measurement(**changed) -> Measurement:
    sound = {
        "label": "final",
        "target_pizza": 0.95,
        "target_well_formed": 0.97,
        "control_pizza": 0.1,
        "control_well_formed": 0.97,
        "control_drift": 0.05,
        "worst_drift": 0.10,
        "target_samples": ("a",),
        "control_samples": ("b",),
    }
    return Measurement(**sound | changed)


def test_goals_sit_where_they_should():
    assert all(goal.reached for goal in results.goals(measurement()))
    for changed in (
        {"target_pizza": 0.949},
        {"target_well_formed": 0.969},
        {"control_well_formed": 0.969},
        {"worst_drift": 0.101},
    ):
        assert sum(not goal.reached for goal in results.goals(measurement(**changed))) == 1


def test_table_has_a_row_for_each_model():
    lines = results.table([measurement(label="base", target_pizza=0.123), measurement()]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert "base" in lines[2]
    assert "0.123" in lines[2]


def test_checkpoints_between_base_and_final():
    assert run._spread([], before=10) == []
    assert run._spread([5, 10], before=10) == [5]
    assert run._spread([1, 2, 3, 4, 5, 6, 7, 8], before=8) == [1, 4, 7]


def test_curves_keep_every_number(tmp_path):
    log = [
        {"step": 0, "epoch": 0.0, "eval_ravin_loss": 1.0},
        {"step": 2, "epoch": 0.5, "loss": 0.7, "logps/chosen": -2.0},
        {"step": 2, "epoch": 0.5, "eval_ravin_loss": 0.9},
    ]
    curves.write_csv(log, tmp_path / "c.csv")
    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2"]
    assert rows[1] == {"step": "2", "epoch": "0.5", "eval_ravin_loss": "0.9", "logps/chosen": "-2.0", "loss": "0.7"}
    curves.write_png(log, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_users_options_go_before_the_demos(tmp_path):
    config = DPOConfig(output_dir=str(tmp_path), beta=0.3, rpo_alpha=0.0, learning_rate=1e-6)
    got = run.demo_config(config, {"output_dir", "beta", "rpo_alpha"})
    assert (got.output_dir, got.beta, got.rpo_alpha) == (str(tmp_path), 0.3, 0.0)
    assert got.learning_rate == run.demo_config_defaults()["learning_rate"]  # 1e-6 was a default, not a wish
    assert run.demo_config(DPOConfig(), set()).output_dir == "out/demo"


# --- the whole of it ---


SCRIPT = ROOT / "scripts" / "dpo.py"


def ended(done: subprocess.CompletedProcess[str], output: Path) -> tuple[str, dict]:
    """(what it printed, demo_results.json)."""
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return printed, json.loads((output / "demo_results.json").read_text())


@pytest.mark.slow
def test_demo_reaches_its_goals_from_nothing(tmp_path, monkeypatch):
    """Numbers over seeds 0, 1, 2: pizza 0.98 to 0.99, well-formed 0.99 to 1, drift 0.03 to 0.05."""
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path / "out", "--disable_tqdm", "true", "--seed", "1"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed, numbers = ended(subprocess.run(command, cwd=ROOT, capture_output=True, text=True), tmp_path / "out")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "No model and no dataset named: running the embedded demo" in printed
    assert "from nothing" in printed
    first, *middle, final = numbers["measured"]
    assert [first["label"], *(m["label"] for m in middle), final["label"]] == ["base", "step 96", "final (step 192)"]
    # 500 samples of probability 0.099: standard error 0.013, four of them.
    assert first["target_pizza"] == pytest.approx(0.10, abs=0.055)
    assert final["target_pizza"] >= 0.95
    assert min(final["target_well_formed"], final["control_well_formed"]) >= 0.97
    assert final["worst_drift"] <= 0.10
    assert numbers["reached"]
    assert "chosen log-probs fall" not in printed
    # CPU time, since the machine may be busy; the demo runs on one thread, so that it is the time on an idle one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 90

    with (tmp_path / "out" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    for metric in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert sum(row[metric] != "" for row in rows) == 24, metric
        assert sum(row[f"eval_ravin_{metric}"] != "" for row in rows) == 9, metric
    # ln 2, and the mean NLL of the five tokens of the base: ln(10) / 5 = 0.46, a little more for imperfect form.
    assert float(rows[0]["eval_ravin_loss"]) == pytest.approx(0.6931 + 0.4605, abs=0.01)
    for name in ("curves.png", "curves.csv", "demo_report.md", "demo_results.json"):
        assert str(tmp_path / "out" / name) in printed
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert all(plot.look_for in printed for plot in curves.PLOTS)


@pytest.mark.slow
def test_without_the_nll_term_the_answers_fall_apart(base, cache, tmp_path, monkeypatch):
    """Half of the steps are enough to see it: margins grow, and the warning says what they cost."""
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(cache))
    options = "--disable_tqdm true --loss_type sigmoid --rpo_alpha 0 --max_steps 96 --eval_strategy no --seed 0"
    printed, numbers = ended(run_script(SCRIPT, "--output_dir", tmp_path, *options.split()), tmp_path)
    assert "chosen log-probs fall while margins grow" in printed
    assert numbers["measured"][0]["target_well_formed"] >= 0.97
    # Over seeds 0, 1, 2: 0 of 500 for the control name; ravin's own share falls to between 0 and 0.9.
    assert numbers["measured"][-1]["control_well_formed"] < 0.5
    assert not numbers["reached"]
    assert "Without an NLL term" in printed
