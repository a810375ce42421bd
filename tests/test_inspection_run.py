"""The script from end to end: what it prints and writes, what it exits with, which options it takes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import tiny

from dpo_trainer.cli import ModelArguments
from dpo_trainer.data.report import DROPPED
from dpo_trainer.inspection import Inspection, InspectionArguments, inspect, parse
from dpo_trainer.inspection.findings import GOOD, NOTICE, PROBLEM, Finding, findings
from dpo_trainer.inspection.parts import in_order
from dpo_trainer.inspection.words import count, row_list, share, size

ROOT = Path(__file__).parents[1]


def load_script():
    spec = importlib.util.spec_from_file_location("inspect_data_script", ROOT / "scripts" / "inspect_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main = load_script().main


@pytest.fixture
def model(tmp_path) -> Path:
    """A tokenizer and a config; no weights."""
    folder = tmp_path / "model"
    tiny.tokenizer().save_pretrained(folder)
    tiny.llama().config.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, rows: list[dict], *words: str) -> tuple[int, dict, str]:
    """(exit code, inspection.json, index.html)"""
    data, out = write_rows(model.parent / "pairs.jsonl", rows), model.parent / "out"
    code = main(["--dataset_name", str(data), "--model_name_or_path", str(model), "--output_dir", str(out), *words])
    return code, json.loads((out / "inspection.json").read_text()), (out / "index.html").read_text()


def test_from_end_to_end(model, capsys):
    code, numbers, page = run(model, tiny.rows(22), "--max_length", "64", "--per_device_train_batch_size", "4")
    printed = capsys.readouterr().out
    assert code == 0
    assert numbers["rows"]["read"] == numbers["rows"]["kept"] == numbers["rows"]["of"] == 22
    assert numbers["rows"]["forms"] == {"text": 22}
    assert numbers["options"]["max_length"] == 64
    assert (numbers["steps"]["total"], numbers["layout"]) == (18, "flat")  # 6 steps of an epoch, 3 epochs
    assert numbers["memory"]["parameters"] == tiny.llama().num_parameters()
    assert len(re.findall("<h3>Row", page)) == 3
    assert "All 22 rows can be read" in printed
    assert "inspection.json" in printed
    assert not list(model.glob("*.safetensors"))


def test_a_bad_row_is_listed_and_exits_with_1(model, capsys):
    rows = [*tiny.rows(5), {"prompt": "q", "chosen": None, "rejected": "r"}]
    code, numbers, page = run(model, rows)
    printed = capsys.readouterr().out
    assert code == 1
    assert (numbers["rows"]["bad"], numbers["rows"]["kept"]) == (1, 5)
    assert numbers["rows"]["errors"][0]["row"] == 5
    assert "is None" in numbers["rows"]["errors"][0]["error"]
    assert "1 of 6 rows cannot be read: training would stop" in printed
    assert "Rows that cannot be read" in page


def test_twenty_errors_are_listed_and_all_are_counted(model):
    rows = [*tiny.rows(2), *[{"prompt": "q", "chosen": None, "rejected": "r"}] * 30]
    _, numbers, page = run(model, rows)
    assert (numbers["rows"]["bad"], len(numbers["rows"]["errors"])) == (30, 20)
    assert "And 10 more." in page


def test_nothing_but_bad_rows(model):
    code, numbers, _ = run(model, [{"prompt": "q", "chosen": None, "rejected": "r"}])
    assert code == 1
    assert numbers["rows"]["kept"] == 0
    assert [numbers[key] for key in ("batches", "steps", "memory", "histogram", "length_bias")] == [None] * 5
    assert numbers["no_memory"] == "no row is left to train on"


def test_a_tokenizer_alone_is_enough(model, capsys):
    (model / "config.json").unlink()
    code, numbers, page = run(model, tiny.rows(5))
    assert code == 0
    assert numbers["memory"] is None
    assert "no config.json of a model" in numbers["no_memory"]
    assert "no config.json of a model" in page
    assert numbers["batches"]["ratio"] > 1


def test_shows_as_many_rows_as_asked_for(model):
    assert "<h3>Row" not in run(model, tiny.rows(5), "--show", "0")[2]
    assert len(re.findall("<h3>Row", run(model, tiny.rows(5), "--show", "9")[2])) == 5


def test_a_part_of_the_rows(model):
    """Half of the rows are read, and the steps are those of all."""
    _, numbers, page = run(model, tiny.rows(22), "--max_rows", "11", "--per_device_train_batch_size", "4")
    assert (numbers["rows"]["read"], numbers["rows"]["of"]) == (11, 22)
    assert numbers["steps"]["rows"] == 22
    assert "Only 11 of 22 rows were read" in page


def test_streams_and_mixtures(model):
    data = str(write_rows(model.parent / "pairs.jsonl", tiny.rows(6)))
    out = model.parent / "mixed"
    mixture = json.dumps([{"name": data}, {"name": data}])
    where = ["--model_name_or_path", str(model), "--output_dir", str(out)]
    assert main(["--datasets", mixture, *where]) == 0
    numbers = json.loads((out / "inspection.json").read_text())
    assert numbers["rows"]["read"] == 12
    assert numbers["parts"] == [[data, 0], [data, 6]]
    assert numbers["repeats"]["first_duplicate_rows"] == [[row + 6, row] for row in range(6)]

    assert main(["--dataset_name", data, "--streaming", "--max_steps", "3", "--max_rows", "4", *where]) == 0
    numbers = json.loads((out / "inspection.json").read_text())
    assert (numbers["rows"]["read"], numbers["rows"]["of"]) == (4, None)


def test_the_seed_decides_and_the_time_does_not(model):
    first, again = (run(model, tiny.rows(30), "--seed", "5")[1] for _ in range(2))
    assert first | {"seconds": 0} == again | {"seconds": 0}


def test_the_documentation_has_every_key(model):
    """Of the file, and of the objects in it."""
    page = (ROOT / "docs" / "inspecting.md").read_text()
    keys = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", page.split("## inspection.json")[1], re.MULTILINE)
    _, numbers, _ = run(model, tiny.chat_rows(12))
    assert {key for line in keys for key in re.findall(r"\w+", line)} == set(numbers)
    inner = set()
    for key in ("rows", "length_bias", "similar", "endings", "template", "unknown_ids", "steps", "memory"):
        inner |= set(numbers[key])
    assert {key for key in inner if f"`{key}`" not in page} == set()


# --- options ---


def test_a_training_file_is_taken_as_it_is(model):
    """Its output_dir is the model's, and stays so; the flag is the inspection's."""
    data = write_rows(model.parent / "pairs.jsonl", tiny.rows(3))
    file = model.parent / "run.yaml"
    file.write_text(
        f"dataset_name: {data}\nmodel_name_or_path: {model}\noutput_dir: out/model\nmax_length: 99\nbeta: 0.3\n"
    )
    inspection, script, parsed, config = parse([str(file), "--show", "1", "--learning_rate", "1e-4"])
    assert (inspection.output_dir, inspection.show) == ("out/inspection", 1)
    assert (script.dataset_name, parsed.model_name_or_path, config.max_length) == (str(data), str(model), 99)
    assert parse([str(file), "--output_dir", "look"])[0].output_dir == "look"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "What shall be inspected"),
        (["--dataset_name", "x.jsonl"], "--model_name_or_path"),
        (["--shw", "3"], "Unknown argument"),
        (["--show", "-1"], "--show must be 0 or more"),
        (["--max_rows", "0"], "--max_rows must be at least 1"),
    ],
)
def test_wrong_arguments_say_what_to_do(words, message):
    with pytest.raises(ValueError, match=message):
        parse(words)


def test_the_script_ends_with_the_error(model):
    with pytest.raises(SystemExit, match=r"inspect_data\.py: .*nowhere"):
        main(["--dataset_name", "./nowhere.jsonl", "--model_name_or_path", str(model)])


def test_help_has_the_options_of_both(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--show", "--max_rows", "--max_length", "--dataset_name"):
        assert option in printed


# --- findings ---


def inspected(rows: list[dict], tmp_path: Path, tokenizer=None, **options) -> Inspection:
    from datasets import Dataset

    return inspect(
        in_order(["pairs.jsonl"], [Dataset.from_list(rows)]),
        tokenizer or tiny.tokenizer(),
        tiny.config(tmp_path, **options),
        ModelArguments(model_name_or_path=str(tmp_path)),
        InspectionArguments(show=0),
    )


def said(found: Inspection, level: str) -> str:
    return " ".join(finding.text for finding in findings(found) if finding.level == level)


def test_sound_data_has_no_problem(tmp_path):
    found = inspected(tiny.chat_rows(40), tmp_path)
    assert said(found, PROBLEM) == ""
    assert "All 40 rows can be read, and none is cut or dropped." in said(found, GOOD)


def test_every_trouble_is_said(tmp_path):
    """One row of each kind; problems come first."""
    pair = {"prompt": "q?", "chosen": " yes", "rejected": " no"}
    long = " " + "y" * 60
    rows = [
        pair,
        pair,
        {**pair, "chosen": " no", "rejected": " yes"},
        {**pair, "rejected": " yes"},
        {**pair, "rejected": "  "},
        {**pair, "prompt": "p" * 70},
        {**pair, "chosen": long, "rejected": long[:-1] + "z"},
        {**pair, "prompt": "<|user|>"},
    ]
    found = inspected(rows, tmp_path, max_length=50)
    problems, notices = said(found, PROBLEM), said(found, NOTICE)
    assert "3 (37.5 %) of the rows prefer what another row rejects" in problems
    assert "1 (12.5 %) of the rows repeat an earlier row word for word (rows 1 and 0)" in notices
    assert f"{DROPPED['identical'].words} (row 3" in notices or f"{DROPPED['identical'].words} (rows 3, 6" in notices
    assert DROPPED["empty_completion"].words in notices
    assert DROPPED["no_room"].words in notices
    assert "nearly identical" in notices
    assert "<|user|> in 1 row" in notices
    levels = [finding.level for finding in findings(found)]
    assert levels == sorted(levels, key=[PROBLEM, NOTICE, GOOD].index)


def test_length_bias_is_said_where_it_is_more_than_chance(tmp_path):
    """30 of 30 pairs have the longer answer chosen; 2 of 2 could be chance."""
    rows = [{"prompt": "q?", "chosen": f" yes yes {n}", "rejected": f" no {n}"} for n in range(30)]
    assert "longer one in 30 (100.0 %) of the pairs, by 5 tokens on average" in said(inspected(rows, tmp_path), NOTICE)
    assert "longer one" not in said(inspected(rows[:2], tmp_path), NOTICE)


def test_missing_eos_is_a_problem(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("<|end|>", "")
    text = said(inspected(tiny.chat_rows(4), tmp_path, tokenizer), PROBLEM)
    assert "8 (100.0 %) of the completions do not end in EOS" in text


def test_the_speed_up_is_that_of_the_layout(tmp_path):
    found = inspected(tiny.chat_rows(40), tmp_path)
    ratio = f"{found.batches.ratio:.2f} times the tokens"
    assert ratio in said(found, GOOD)
    assert "this run takes padded" in said(inspected(tiny.chat_rows(40), tmp_path, layout="padded"), NOTICE)


def test_an_architecture_that_rules_flat_rows_out(tmp_path):
    """MPT has ALiBi: the run would take padded rows, and memory is reckoned for these."""
    from transformers import MptConfig

    MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=tiny.VOCABULARY).save_pretrained(tmp_path)
    found = inspected(tiny.chat_rows(12), tmp_path)
    assert found.layout == "padded"


# --- words ---


def test_words():
    assert (count(1, "row"), count(1234, "row"), count(1234)) == ("1 row", "1,234 rows", "1,234")
    assert (share(1, 3), share(1, 100_000), share(0, 10), share(3, 0)) == (
        "1 (33.3 %)",
        "1 (<0.1 %)",
        "0 (0.0 %)",
        "3",
    )
    assert (row_list([3], 1), row_list([3, 8], 2), row_list(list(range(9)), 20)) == (
        "row 3",
        "rows 3, 8",
        "rows 0, 1, 2, 3, 4, ...",
    )
    assert (size(2**30), size(3 * 2**19), size(512)) == ("1.0 GiB", "1.5 MiB", "0.5 KiB")
    assert Finding(GOOD, "x") == Finding(GOOD, "x")
