"""The suite's arithmetic, its names, its verdicts, and that the tables say what the records say. Nothing is timed here."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_blocks import ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_data
import cases
import floor
import gpu_first
import gpu_first_report
import jobs
import one_run
import plots
import report
import suite
import targets
import watching

OPTIONS = Namespace(seed=0, threads=1, repeats=2, steps=None)
TINY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# --- the floor ---


def test_flops_by_hand():
    """N = 10, h = 4, p = 5, c + r = 3: policy 6*10*8 + 6*4*3 = 552, reference 2*10*8 + 2*4*3 = 184, checkpointing 2*10*8."""
    weights = floor.Weights(layers=10, head=4)
    assert floor.useful_flops(weights, 5, 3, reference=False) == 552
    assert floor.useful_flops(weights, 5, 3) == 552 + 184
    assert floor.useful_flops(weights, 5, 3, checkpointing=True) == 552 + 184 + 160


def test_flops_of_lora_by_hand():
    """A = 2: policy (4*10 + 6*2)*8 + 4*4*3 = 464; the reference has no adapter; checkpointing repeats (10 + 2)*8 twice."""
    weights = floor.Weights(layers=10, head=4, adapter=2)
    assert floor.useful_flops(weights, 5, 3, reference=False) == 464
    assert floor.useful_flops(weights, 5, 3) == 464 + 184
    assert floor.useful_flops(weights, 5, 3, checkpointing=True) == 464 + 184 + 192


def test_weights_are_those_of_the_model():
    """Every parameter of two dimensions, but the embedding, multiplies a token."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, tie_word_embeddings=False, **TINY))
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}
    head = matrices.pop("lm_head.weight")
    assert matrices.pop("model.embed_tokens.weight") == head == 400
    assert floor.weights_of(TINY, 50) == floor.Weights(sum(matrices.values()), 400)


def test_lora_weights_are_those_of_peft():
    from peft import LoraConfig, get_peft_model

    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, **TINY))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert floor.weights_of(TINY, 50, lora_rank=2).adapter == trained > 0


def test_rate_is_the_best_of_the_shapes():
    """By a clock that says what each product took: 2 s, then 1 s, for 2 * 1024 * 4 * 4 FLOP each."""
    times = iter([0.0, 8.0, 10.0, 14.0])
    assert floor.matmul_rate([(4, 4), (4, 4)], torch.float32, clock=lambda: next(times)) == 2 * 1024 * 4 * 4


# --- cases ---


def test_names_say_what_a_case_is():
    for name, case in cases.CASES.items():
        assert case.name == name
        assert case.lora == ("-lora" in name)
        assert case.checkpointing == name.endswith(("-gc", "-gc-cached", "-gc-best"))
        if name.endswith("-best"):
            assert case.steps // 4 >= 4, "transformers sorts by length within so many batches"
        assert (case.device == "cuda") == name.startswith("gpu-")
        for side in case.sides.values():
            assert side.beside is None or side.beside in case.sides
    grid = [name for name in cases.CASES if name.startswith(cases.DATA)]
    assert len(grid) == 3 * 4 * 2 * 2 * 3
    assert cases.CASES["sharegpt-b4-lora-gc-cached"].batch == 4


def test_a_warm_run_follows_the_cold_one_that_fills_its_cache():
    warm = 0
    for case in cases.CASES.values():
        before: list[tuple] = []
        for side in case.sides.values():
            if side.warm:
                warm += 1
                assert (suite.cache_of(side), False) in before, case.name
            if side.cached:
                before.append((suite.cache_of(side), side.warm))
    assert warm


def test_selection():
    assert [case.name for case in cases.select(["hh-b8", "ranked-*"])] == ["hh-b8", "ranked-2", "ranked-4", "ranked-8"]
    assert {case.name for case in cases.select(cases.HEADLINE)} == set(cases.HEADLINE)
    assert set(report.README.values()) <= set(cases.HEADLINE)
    with pytest.raises(ValueError, match="Did you mean hh-b8"):
        cases.select(["hh-b88"])


def test_unknown_case_ends_the_command(capsys):
    with pytest.raises(SystemExit):
        suite.main(["hh-b8", "nothing-like-it-*"])
    assert "nothing-like-it-*" in capsys.readouterr().err


@pytest.mark.parametrize("name", cases.CASES)
def test_both_sides_are_told_the_same(name):
    """But for what the side is about."""
    case = cases.CASES[name]
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    prepared = {"rows": rows, "lengths": [7], "seed": 3}
    told = [jobs.job_of(case, side, prepared, Path("cache")) for side in case.sides.values()]
    own = {"ref_cache_dir", "per_device_train_batch_size", "per_device_eval_batch_size"}
    for side, job in zip(case.sides.values(), told, strict=True):
        shared = {key: value for key, value in job["arguments"].items() if key not in own | set(side.arguments)}
        first = {key: value for key, value in told[0]["arguments"].items() if key in shared}
        assert shared == first
        assert len(shared) >= 9
        grouped = "train_sampling_strategy" in side.arguments and case.warm_up == 0
        assert [row.get("length") for row in job["rows"]] == [7 if grouped else None]


# --- data ---


@given(st.integers(2, 6))
def test_pairs_of_a_ranked_list(count):
    """All k (k - 1) / 2 of them, better first."""
    pairs = bench_data.as_pairs([{"prompt": "p", "completions": [str(place) for place in range(count)]}])
    assert len(pairs) == len({tuple(pair.values()) for pair in pairs}) == count * (count - 1) // 2
    assert all(pair["chosen"] < pair["rejected"] for pair in pairs)


def test_ranked_and_pairwise_rows_have_the_same_content():
    """So the suite compares their losses; other completions, or another prompt, are not the same."""
    ranked = {
        "prompt_ids": [1, 2],
        "chosen_ids": [3],
        "rejected_ids": [4, 5],
        "more_ids": [[6]],
        "pairs": [[0, 1]] * 3,
    }
    pairwise = [{"prompt_ids": [1, 2], "chosen_ids": a, "rejected_ids": b} for a, b in (([3], [4, 5]), ([3], [6]))]
    want = watching.content([ranked], 9)
    assert want == watching.content([*pairwise, {**pairwise[0], "chosen_ids": [4, 5], "rejected_ids": [6]}], 9)
    assert (want["pairs"], want["prompt"], want["completion"]) == (3, 2, 4)
    assert watching.content(pairwise[:1], 9)["digest"] != want["digest"]
    assert watching.content([{**ranked, "prompt_ids": [1]}], 9)["digest"] != want["digest"]


def test_content_is_what_truncation_leaves():
    """Our rows are cut before they are collated, TRL's while: 2 + 3 tokens at most."""
    row = {"prompt_ids": [1, 2], "rejected_ids": [9]}
    cut, whole = ({**row, "chosen_ids": list(range(length))} for length in (3, 7))
    assert watching.content([whole], 5) == watching.content([cut], 5)
    assert watching.content([whole], 6) != watching.content([cut], 6)


@pytest.mark.parametrize("completions", [2, 4])
def test_synthetic_rows_have_their_lengths(completions):
    tokenizer = word_tokenizer()
    for row in bench_data.rows_of_length(tokenizer, 3, 11, 5, 0, completions):
        assert len(tokenizer(row["prompt"])["input_ids"]) == 11
        for answer in row.get("completions") or (row["chosen"], row["rejected"]):
            assert len(tokenizer(answer)["input_ids"]) == 5 - 1  # and the end token
        assert len(row.get("scores", [1, 0])) == completions


def word_tokenizer():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(
        [" many words stand here, other words stand there"] * 9, vocab_size=400, show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer)


# --- the cost of a run ---


def test_evaluation_is_taken_out_of_the_clock(monkeypatch):
    """Steps end at 10 and 30 s, evaluation takes the 5 s after the first: 15 s between them."""
    now = iter([0.0, 10.0, 15.0, 30.0])
    monkeypatch.setattr(watching.time, "process_time", lambda: next(now))
    monkeypatch.setattr(watching.time, "perf_counter", lambda: 0.0)
    clock = watching.Clock()
    clock.on_train_begin(None, None, None)
    clock.on_step_end(None, None, None)
    clock.on_evaluate(None, None, None, metrics={"eval_rewards/accuracies": 0.5})
    clock.on_step_end(None, None, None)
    assert clock.cost()[0] == 15.0
    assert clock.cost(warm_up=0)[0] == 25.0
    assert clock.accuracy == [(10.0, 0.0, 0.5)]


def test_costs_by_hand():
    """Two steps of 2 and 3 pairs, the first not counted: 4 s of training and 3/5 of 10 s of precomputing, for 3 pairs.

    N = 10, h = 4 and 5 + 3 tokens are 552 FLOP without a reference (above): 552 / 10 s of 110.4 FLOP/s is one half.
    """
    job = {"warm_up": 1, "warm": True, "weights": {"layers": 10, "head": 4}, "device": "cpu"}
    job["arguments"] = {"gradient_checkpointing": False}
    clock, precompute = watching.Clock(), watching.Precompute()
    clock.at, clock.counts = [(0.0, 0.0), (1.0, 1.0), (5.0, 3.0)], [(0, 0), (6, 6), (14, 20)]
    precompute.cpu_s, precompute.wall_s = 10.0, 5.0
    steps = [{"pairs": 2, "prompt": 9, "completion": 9}, {"pairs": 3, "prompt": 5, "completion": 3}]
    got = one_run.costs(job, clock, precompute, steps, rate=110.4)
    assert (got["cpu_s"], got["wall_s"], got["pairs"]) == (10.0, 5.0, 3)
    assert got["pairs_per_cpu_s"] == pytest.approx(0.3)
    assert got["share_of_floor"] == pytest.approx(0.5)
    assert (got["policy_tokens"], got["reference_tokens"], got["useful_tokens"]) == (8, 14, 8)


# --- verdicts ---


def run_of(side: str, rate: float = 1.0, losses=(0.7, 0.6), order: str = "a", **more) -> dict:
    figures = dict.fromkeys(suite.FIGURES, 1.0) | {
        "pairs_per_cpu_s": rate,
        "policy_tokens": 20,
        "useful_tokens": 19,
        "pairs": 4,
    }
    about = {"version": "1", "torch": "2", "transformers": "5", "parameters": 10**6, "matmul_rate": 1e11}
    return {
        "side": side,
        "trainer": side.split()[0],
        "order": order,
        "losses": list(losses),
        **about,
        **figures,
        **more,
    }


def record_of(name: str, runs: list[dict], failed: dict | None = None) -> dict:
    return suite.record_of(cases.CASES[name], runs, failed or {}, OPTIONS)


def test_agreeing_runs_are_summed_up():
    runs = [
        run_of("ours", 6),
        run_of("trl", 1, (0.7, 0.60005)),
        run_of("ours", 9),
        run_of("ours", 8),
        run_of("trl", 3),
    ]
    record = record_of("hh-b8", runs)
    assert record["void"] is None
    assert record["loss_difference"] == pytest.approx(5e-5)
    assert record["summary"]["ours"]["pairs_per_cpu_s"] == 8
    assert (record["summary"]["ours"]["lowest"], record["summary"]["ours"]["highest"]) == (6, 9)
    assert record["summary"]["ratio"]["pairs_per_cpu_s"] == 4
    assert suite.ratios(record) == "ours 4.00x trl"


@pytest.mark.parametrize("last", [0.6002, float("nan")])
def test_losses_that_differ_make_a_case_void(last):
    assert "losses differ" in record_of("hh-b8", [run_of("ours"), run_of("trl", losses=(0.7, last))])["void"]


def test_runs_of_other_batches_are_not_compared():
    """Rows grouped by length train on other batches: their losses say nothing about ours, and make nothing void."""
    runs = [run_of("ours"), run_of("ours warm"), run_of("trl grouped", losses=(9.0, 9.0), order="b")]
    record = record_of("hh-b8-best", runs)
    assert record["void"] is None
    assert record["loss_difference"] == 0
    assert "same batches" in record_of("hh-b8", [run_of("ours"), run_of("trl", order="b")])["void"]


def test_later_losses_of_a_long_run_may_drift_apart():
    early, late = [0.7] * 5 + [0.3], [0.7] * 5 + [0.4]
    assert record_of("quality-hh", [run_of("ours", losses=early), run_of("trl", losses=late)])["void"] is None
    assert record_of("hh-b8", [run_of("ours", losses=early), run_of("trl", losses=late)])["void"]


def test_void_cases_exit_with_1(monkeypatch, capsys):
    verdicts = {"hh-b8": {"void": None}, "ranked-8": {"void": "void: why"}}
    monkeypatch.setattr(suite, "measured", lambda case, options: verdicts[case.name])
    assert suite.main(["hh-b8"]) == 0
    assert suite.main(["hh-b8", "ranked-8"]) == 1
    assert "VOID: ranked-8" in capsys.readouterr().out


def test_only_a_lack_of_memory_is_a_result():
    assert suite.reason(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory"
    with pytest.raises(RuntimeError, match="a mistake"):
        suite.reason(RuntimeError("a mistake"))


# --- tables ---


@pytest.fixture
def results(tmp_path):
    """Two records: both trainers, and one that is void."""
    (tmp_path / "suite").mkdir()
    runs = [run_of("ours", 6.2), run_of("trl", 1)]
    valid, void = (
        record_of("hh-b8", runs),
        record_of("ultrafeedback-b8", [run_of("ours"), run_of("trl", losses=(0.7, 9))]),
    )
    for record in (valid, void):
        (tmp_path / "suite" / f"{record['case']}.json").write_text(json.dumps(record))
    return tmp_path


def test_tables_say_what_the_records_say(results):
    text = report.as_markdown(report.read(results))
    assert "| hh-b8 | ours | 6.200 | one run | **6.20x** trl | 1.00 | 100% | 5 | 1.0 | 0e+00 |" in text
    assert "| HH, batch 8, reference online, over TRL | >= 6 | 6.20 | reached |" in text
    assert "| HH, batch 8, peak memory, of TRL's | <= 0.2 | 1.00 | **not reached** |" in text
    assert "| ranked list of 8 over pairwise rows | >= 4 |  | not measured |" in text


def test_a_void_case_shows_no_figure(results):
    text = report.as_markdown(report.read(results))
    (row,) = [line for line in text.splitlines() if line.startswith("| ultrafeedback-b8")]
    assert "void: losses differ" in row
    assert "1.000" not in row
    assert "| UltraFeedback, batch 8, over TRL | >= 3.5 |  | not measured |" in text


def test_a_side_without_memory_is_shown(results):
    record = record_of("hh-b8", [run_of("ours")], {"trl": "out of memory"})
    assert record["void"] is None
    assert report.case_rows(record)[1][:3] == ["hh-b8", "trl", "**out of memory**"]
    assert not report.shows_both(record)


def test_warm_cache_is_measured_over_online_of_the_same_case():
    """1.5 over 1.2 pairs per second; the case without a cache is another run, and says nothing about it."""
    runs = [run_of("ours", 1.2), run_of("ours warm", 1.5), run_of("trl warm")]
    records = {"hh-b8-cached": record_of("hh-b8-cached", runs), "hh-b8": record_of("hh-b8", [run_of("ours", 9)])}
    (row,) = [line for line in targets.target_table(records) if line.startswith("| HH, warm cache")]
    assert row.endswith("| 1.25 | **not reached** |")


def test_check_notices_what_is_stale(results, capsys):
    assert report.main(["--check", "--results", str(results)]) == 1
    assert "suite.md is stale" in capsys.readouterr().out
    assert not (results / "suite.md").exists()

    assert report.main(["--results", str(results)]) == 0
    assert report.main(["--check", "--results", str(results)]) == 0
    assert json.loads((results / "hh.json").read_text())["case"] == "hh-b8"
    assert not (results / "ultrafeedback.json").exists()  # void

    (results / "suite.md").write_text((results / "suite.md").read_text().replace("6.200", "6.300"))
    assert report.main(["--check", "--results", str(results)]) == 1


def test_a_record_of_no_case_is_refused(results):
    (results / "suite" / "gone.json").write_text("{}")
    with pytest.raises(ValueError, match=r"gone\.json"):
        report.read(results)


def test_tables_of_this_repository_are_fresh():
    assert report.stale(report.RESULTS) == {}, "run python benchmarks/report.py, then python docs/generate.py"


def test_plots_of_hand_made_records(tmp_path):
    """Growth where two points are, accuracy where a run has it; the same records give the same file."""
    records = {
        name: record_of(name, [run_of("ours"), run_of("trl")]) for name in ("length-256", "length-512", "vocab-16k")
    }
    curve = {"accuracy": [(0.0, 0.0, 0.5), (60.0, 61.0, 0.6)]}
    records["quality-hh"] = record_of("quality-hh", [run_of(side, **curve) for side in ("ours", "trl")])
    paths = plots.draw(records, tmp_path)
    assert [path.name for path in paths] == ["growth-length.svg", "quality.svg"]
    assert re.findall(r"\((growth-.*\.svg)\)", report.as_markdown(records)) == ["growth-length.svg"]
    first = paths[0].read_bytes()
    plots.draw(records, tmp_path)
    assert paths[0].read_bytes() == first


# --- the first run on a GPU ---


@pytest.mark.slow
def test_the_first_run_on_a_gpu_goes_through_without_one(tmp_path):
    """Tiny shapes on a CPU. A part that fails is written down, and costs no other."""
    places = ["--results", str(tmp_path / "results"), "--cache", str(tmp_path), "--trl-python", str(tmp_path / "none")]
    assert gpu_first.main(["--dry_run", "--only", "trl", "steps", "trace", *places]) == 1
    record = json.loads((tmp_path / "results" / "gpu-first-dry-run.json").read_text())
    assert list(record["parts"]) == ["trl", "steps", "trace"]
    assert [part for part, figures in record["parts"].items() if "failed" in figures] == ["trl"]
    assert record["parts"]["steps"]["losses"][0] == pytest.approx(0.6931, abs=1e-4)
    assert record["parts"]["trace"]["attention_calls_per_step"]
    table = (tmp_path / "results" / "gpu-first-dry-run.md").read_text()
    assert "A dry run" in table
    assert "## trl failed" in table
    assert (tmp_path / "results" / "gpu-first-dry-run.trace.json.gz").stat().st_size > 10_000


def test_a_part_of_the_first_run_that_takes_too_long_is_ended(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (tmp_path / "log").open("w") as log:
        assert gpu_first.ended_within(0.5, command, log, {}) == "ended after 0.5 seconds"
        assert gpu_first.ended_within(30, [sys.executable, "-c", "raise SystemExit(3)"], log, {}) == "exit code 3"
    assert sum(gpu_first.LIMITS.values()) <= 11 * 60


def test_losses_of_the_first_run_are_compared():
    steps = {"losses": [0.69, 0.5], "pairs_per_wall_s": 1.0, "useful_tokens": 10, "wall_s": 2.0, "share_of_floor": 0.5}
    steps |= {"useful_flops": 1e12, "peak_rss_gb": 3.0, "first_step_s": 4.0}
    for losses, said in (
        ([0.69, 0.52], "agree, by at most 2.0e-02"),
        ([0.69, 0.7], "**differ**"),
        ([0.69], "**differ**"),
    ):
        parts = {
            "steps": steps,
            "trl": steps | {"losses": losses},
            "machine": {"rate": 1e12, "kernels": ["varlen_attn"]},
        }
        table = gpu_first_report.as_markdown({"date": "2026-01-01", "dry_run": False, "parts": parts})
        assert f"| losses here beside TRL | {said}" in table
        assert "5 tokens/s, 50% of the rate of products of its own shapes, 50% of that of large ones" in table
