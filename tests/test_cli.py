"""The command line: a YAML file, flags over it, refusals by name; and scripts/dpo.py from end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_trainer.cli import make_peft_config, merged_init_kwargs, parse_args
from dpo_trainer.cli.data import load_data
from dpo_trainer.config import DPOConfig
from dpo_trainer.data.files.mixture import parse_mixture
from dpo_trainer.online.config import OnlineDPOConfig

ROOT = Path(__file__).parents[1]
CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true"]
NAMED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def parse(*argv: str):
    return parse_args([*argv, *CPU])


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


# --- values ---


def test_flags_override_the_file_and_both_count_as_given(yaml_file):
    file = yaml_file("beta: 0.3\nloss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\nmax_length: 64\n")
    for argv in ([file, "--beta", "0.2"], ["--beta", "0.2", "--config", file], [f"--config={file}", "--beta=0.2"]):
        _, _, config, given = parse(*argv)
        assert (config.beta, config.loss_type, config.max_length) == (0.2, ["sigmoid", "sft"], 64)
        assert given == {
            "beta",
            "loss_type",
            "loss_weights",
            "max_length",
            *(flag.removeprefix("--") for flag in CPU if flag.startswith("--")),
        }
    assert parse(file)[2].beta == 0.3


def test_nothing_given_is_the_default_everywhere():
    script, model, config, given = parse()
    assert (script.dataset_train_split, model.dtype, config.beta) == ("train", "float32", 0.1)
    assert "beta" not in given
    assert parse("--beta", "0.1")[3] >= {"beta"}, "a default that the user wrote out is given"


def test_yaml_values_keep_their_types(yaml_file):
    text = """
        model_name_or_path: m
        dataset_name: d
        use_peft: true
        lora_target_modules: [q_proj, v_proj]
        model_init_kwargs: {max_position_embeddings: 64, rope_parameters: {rope_theta: 5.0, rope_type: default}}
        lr_scheduler_kwargs: {num_cycles: 2}
        max_length: null
        learning_rate: 1e-5
        warmup_steps: 0.1
        eval_strategy: no
        loss_type: ipo
        beta: 1
        columns: {prompt: question}
    """
    script, model, config, _ = parse(yaml_file(text))
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert config.model_init_kwargs["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "default"}
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (config.max_length, config.learning_rate, config.warmup_steps) == (None, 1e-5, 0.1)
    assert (config.eval_strategy, config.loss_type, config.beta) == ("no", ["ipo"], 1)
    assert script.columns == {"prompt": "question"}


def test_a_mixture_in_the_file_and_as_a_flag(yaml_file):
    """1e-1 is text to YAML, and 0.1 to everybody else."""
    text = """
        model_name_or_path: m
        datasets:
          - name: a
            fraction: 1e-1
            columns: {prompt: question, chosen: best}
          - b
    """
    flag = '[{"name": "a", "fraction": 0.1, "columns": "prompt=question,chosen=best"}, "b"]'
    scripts = [parse(yaml_file(text))[0], parse("--model_name_or_path", "m", "--datasets", flag)[0]]
    in_file, as_flag = (parse_mixture(script.datasets) for script in scripts)
    assert in_file == as_flag
    assert [(source.name, source.fraction) for source in in_file] == [("a", 0.1), ("b", 1.0)]


def test_flags_for_booleans_lists_and_mappings():
    argv = ["--no_disable_dropout", "--streaming", "--lora_target_modules", "all-linear", "--use_peft", "true"]
    script, model, config, _ = parse(*NAMED, *argv, "--model_init_kwargs", '{"dtype": "bfloat16"}')
    assert (config.disable_dropout, script.streaming, config.bf16) == (False, True, False)
    assert make_peft_config(model).target_modules == "all-linear"
    assert merged_init_kwargs(model, config) == {"dtype": "bfloat16"}
    assert parse("--gradient_checkpointing")[2].gradient_checkpointing is True
    assert parse("--gradient_checkpointing", "false")[2].gradient_checkpointing is False


def test_model_arguments_reach_from_pretrained_and_lora():
    lora = (
        "--use_peft --lora_r 3 --lora_alpha 5 --lora_dropout 0 --lora_modules_to_save lm_head --use_rslora --use_dora"
    )
    init = "--dtype bfloat16 --attn_implementation eager --model_revision v1"
    _, model, config, _ = parse(*NAMED, *lora.split(), *init.split())
    peft = make_peft_config(model)
    assert (peft.r, peft.lora_alpha, peft.lora_dropout, peft.modules_to_save) == (3, 5, 0, ["lm_head"])
    assert (peft.use_rslora, peft.use_dora, peft.task_type) == (True, True, "CAUSAL_LM")
    assert merged_init_kwargs(model, config) == {
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "revision": "v1",
    }
    assert make_peft_config(parse(*NAMED)[1]) is None


# --- refusals ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnign_rate", "1"], r"Unknown argument '--learnign_rate'\. Did you mean '--learning_rate'\?"),
        (["--lr", "1"], r"Unknown argument '--lr'"),  # argparse would take a unique beginning for the whole
        (["--beta", "0.2", "stray.yaml", "other"], r"Unknown argument 'other'"),
        (["missing.yaml"], r"no file of options 'missing\.yaml'"),
        (["--model_init_kwargs", "{dtype"], r"--model_init_kwargs '\{dtype' is not valid JSON"),
        (["--beta", "0"], r"--beta must be above 0"),
        (["--dataset_name", "d"], r"--dataset_name without --model_name_or_path"),
        (["--datasets", '["d"]'], r"--datasets without --model_name_or_path"),
        (["--model_name_or_path", "m"], r"--model_name_or_path without --dataset_name \(or --datasets\)"),
        ([*NAMED, "--datasets", '["d"]'], r"--datasets and --dataset_name exclude each other"),
        ([*NAMED[:2], "--datasets", '["d"]', "--columns", "prompt=q"], r"--datasets and --columns exclude each other"),
        ([*NAMED[:2], "--datasets", '["d"]', "--dataset_config", "en"], r"--datasets and --dataset_config exclude"),
        ([*NAMED[:2], "--datasets", '["d"'], r"--datasets '\[\"d\"' is not valid JSON"),
        ([*NAMED[:2], "--datasets", "d.jsonl"], r"--datasets 'd\.jsonl' is not valid JSON: .*Write a list such as"),
        (
            [*NAMED[:2], "--datasets", '[{"name": "d", "frac": 1}]'],
            r"entry 0: unknown key 'frac'\. Did you mean 'fraction'",
        ),
        ([*NAMED, "--columns", "promt=q"], r"--columns: there is no column 'promt' of ours\. Did you mean 'prompt'"),
        ([*NAMED, "--columns", "prompt"], r"--columns 'prompt' cannot be read\. Write ours=theirs"),
        (["--columns", "prompt=q"], r"--columns needs --model_name_or_path and --dataset_name"),
        (["--use_peft"], r"--use_peft needs --model_name_or_path and --dataset_name"),
        (["--streaming", "false"], r"--streaming needs --model_name_or_path"),
        ([*NAMED, "--load_in_4bit", "--load_in_8bit"], r"--load_in_4bit and --load_in_8bit exclude each other"),
        ([*NAMED, "--lora_r", "8", "--use_dora"], r"--lora_r, --use_dora without --use_peft would do nothing"),
        ([*NAMED, "--load_in_8bit", "--bnb_4bit_quant_type", "fp4"], r"--bnb_4bit_quant_type without --load_in_4bit"),
        ([*NAMED, "--dtype", "float61"], r"--dtype 'float61' is not one of float32"),
        ([*NAMED, "--use_peft", "--lora_r", "0"], r"--lora_r must be at least 1, got 0"),
        ([*NAMED, "--use_peft", "--lora_dropout", "1"], r"--lora_dropout must be in \[0, 1\)"),
        (
            [*NAMED, "--dtype", "bfloat16", "--model_init_kwargs", '{"dtype": "float16"}'],
            r"--dtype and --model_init_kwargs 'dtype' set the same thing",
        ),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.1", r"run\.yaml: unknown option 'betta'\. Did you mean 'beta'\?"),
        ("learning-rate: 1.0", r"unknown option 'learning-rate'\. Did you mean 'learning_rate'\?"),
        ("beta: strong", r"run\.yaml: beta: expected float, got 'strong'"),
        ("beta: yes", r"beta: expected float, got True"),
        ("beta:", r"beta: expected float, got None"),
        ("max_steps: 2.5", r"max_steps: expected int, got 2\.5"),
        ("loss_weights: [1, heavy]", r"loss_weights: expected float, got 'heavy'"),
        ("report_to: {a: 1}", r"report_to: expected .*, got \{'a': 1\}"),
        ("run_name: yes", r"run_name: expected .* got True \(quote it if you mean the text\)"),
        ("use_peft: maybe", r"use_peft: expected bool, got 'maybe'"),
        ("columns: [prompt]", r"run\.yaml: columns: expected dict or str or nothing, got \['prompt'\]"),
        ("columns: {promt: q}", r"--columns: there is no column 'promt' of ours"),
        ("columns: {prompt: no}", r"--columns: 'prompt' and False must both be names"),
        ("datasets: {name: a}", r"run\.yaml: datasets: expected list or str or nothing, got \{'name': 'a'\}"),
        ("datasets: [{name: 7}]", r"--datasets, entry 0: name must be text, got 7 \(quote it"),
        ("- beta", r"must hold `option: value` lines, got a list"),
        ("beta: [", r"run\.yaml is not valid YAML: .*line 1"),
    ],
)
def test_bad_files(yaml_file, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        parse(yaml_file(text))


def test_two_files(yaml_file):
    with pytest.raises(ValueError, match="Two files of options"):
        parse(yaml_file("beta: 0.2"), "--config", "other.yaml")


def test_help_shows_every_option_by_section(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    at = [shown.index(f"\n{section}:") for section in ("data", "model", "DPO")]
    assert at[0] < shown.index("--dataset_name", at[0]) < at[1] < shown.index("--use_peft", at[1]) < at[2]
    assert at[2] < shown.index("  --beta", at[2]) < shown.index("\ntraining (transformers.TrainingArguments):")
    assert "(default: 1e-06)" in " ".join(shown.split())


@pytest.mark.parametrize("file", sorted((ROOT / "scripts" / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_parse(file):
    script, kind = ("dpo_online", OnlineDPOConfig) if file.stem == "online" else ("dpo", DPOConfig)
    _, model, config, given = parse_args([str(file), "--optim", "adamw_torch", *CPU], kind)
    assert given >= set(yaml.safe_load(file.read_text()))
    assert model.use_peft == (file.stem != "full")
    assert model.load_in_4bit == (file.stem == "qlora")
    assert f"scripts/{script}.py scripts/configs/{file.name}" in file.read_text(), "the file begins with its command"
    assert config.learning_rate >= 1e-6


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configs(file):
    assert load_config_from_file(str(file)).num_processes >= 1
    assert f"accelerate launch --config_file accelerate_configs/{file.name}" in file.read_text(), (
        "headed by its command"
    )


# --- scripts/dpo.py ---


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.llama(hidden_size=64, intermediate_size=64).save_pretrained(
        folder
    )  # bitsandbytes packs 4 bits in blocks of 32 rows
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, n in {"train": 12, "test": 5}.items():
        lines = [json.dumps(row) for row in tiny.rows(n)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def options(model_folder, data_folder, tmp_path, monkeypatch):
    """Two steps on 8 pairs, in plain words."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for a process of its own, and for this one:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return {
        "model_name_or_path": str(model_folder),
        "dataset_name": str(data_folder),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }


def load_script():
    spec = importlib.util.spec_from_file_location("dpo_script", ROOT / "scripts" / "dpo.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def run_in_process(folder: Path, options: dict, *flags: str) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    load_script().main([str(folder / "run.yaml"), *flags])
    return Path(options["output_dir"])


def train_losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def change(got: torch.nn.Module, want: torch.nn.Module) -> float:
    """Largest change of a logit between two models."""
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        return (got.eval()(input_ids=ids).logits - want.eval()(input_ids=ids).logits).abs().max().item()


def test_full_training_saves_a_model_that_plain_transformers_loads(tmp_path, options, model_folder):
    out = run_in_process(tmp_path, options)
    losses = train_losses(out)
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)  # ln 2, logged with 4 to 6 digits
    assert losses[1] != losses[0]
    assert json.loads((out / "train_results.json").read_text())["train_loss"] > 0
    evaluated = json.loads((out / "eval_results.json").read_text())
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= set(evaluated)

    saved, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, model_folder))
    assert change(saved, base) > 1e-3, "the saved model is the untrained one"
    assert AutoTokenizer.from_pretrained(out)("cat").input_ids == tiny.tokenizer()("cat").input_ids
    assert list(out.glob("*.safetensors"))
    assert not list(out.glob("pytorch_model*"))


def test_resuming_and_splitting_off_evaluation_rows(tmp_path, options, data_folder):
    options |= {"dataset_name": str(data_folder / "train.jsonl"), "test_split_size": 4, "save_steps": 1}
    uninterrupted = train_losses(run_in_process(tmp_path, options))
    checkpoint = Path(options["output_dir"]) / "checkpoint-1"
    options |= {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": str(checkpoint)}
    assert train_losses(run_in_process(tmp_path, options)) == uninterrupted

    options |= {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": "true", "max_steps": 3}
    assert train_losses(run_in_process(tmp_path, options))[:2] == uninterrupted  # from the last one, checkpoint-2


def test_streaming_with_a_second_dataset_to_evaluate_on(tmp_path, options, data_folder):
    train, test = data_folder / "train.jsonl", data_folder / "test.jsonl"
    options |= {"dataset_name": str(train), "eval_dataset": str(test), "streaming": True}
    out = run_in_process(tmp_path, options)
    assert train_losses(out)[0] == pytest.approx(0.693147, abs=1e-4)
    assert (out / "eval_results.json").is_file()


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_mixture_of_files_with_other_columns(tmp_path, options, data_folder, streaming):
    """From the YAML file to the trained model: the second dataset has other names and gives half of its 6 rows."""
    lines = [f"{row['prompt']},{row['chosen']},{row['rejected']}" for row in tiny.rows(6)]
    (tmp_path / "other.csv").write_text("question,best,worst\n" + "\n".join(lines))
    del options["dataset_name"]
    options["datasets"] = [
        str(data_folder),
        {
            "name": str(tmp_path / "other.csv"),
            "fraction": 0.5,
            "columns": {"prompt": "question", "chosen": "best", "rejected": "worst"},
        },
    ]
    out = run_in_process(tmp_path, options | {"streaming": streaming})
    assert train_losses(out)[0] == pytest.approx(0.693147, abs=1e-4)
    assert "eval_loss" in json.loads((out / "eval_results.json").read_text())


def test_what_the_script_loads(data_folder):
    """A list for a mixture, one dataset else; and the rows to evaluate on go the same way."""
    model = ["--model_name_or_path", "m"]
    one = parse(*model, "--dataset_name", str(data_folder), "--columns", "chosen=rejected,rejected=chosen")[0]
    train, test = load_data(one, seed=1)
    assert (len(train), len(test)) == (12, 5)
    assert train[0]["chosen"] == tiny.rows(1)[0]["rejected"]
    entries = json.dumps([{"name": str(data_folder), "fraction": 0.5}, str(data_folder)])
    mixture = parse(*model, "--datasets", entries, "--eval_dataset", str(data_folder / "test.jsonl"))[0]
    train, test = load_data(mixture, seed=1)
    assert ([len(part) for part in train], [len(part) for part in test]) == ([6, 12], [5])


def test_a_reference_of_its_own(tmp_path, options, model_folder):
    """With another model as the reference the first loss is not ln 2."""
    other = tmp_path / "other"
    tiny.llama(seed=5, hidden_size=64, intermediate_size=64).save_pretrained(other)
    assert (
        abs(train_losses(run_in_process(tmp_path, options | {"ref_model_name_or_path": str(other)}))[0] - 0.6931)
        > 0.01
    )


@pytest.mark.slow
def test_qlora(tmp_path, options, model_folder):
    pytest.importorskip("bitsandbytes")
    out = run_in_process(
        tmp_path, options | {"use_peft": True, "load_in_4bit": True}, "--lora_target_modules", "q_proj"
    )
    assert train_losses(out)[0] == pytest.approx(0.693147, abs=1e-4)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), out)
    grown = [p.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name]
    assert len(grown) == 2
    assert min(grown) > 0, "the adapter did not train"


@pytest.mark.slow
def test_the_command_with_lora_from_a_file_and_a_flag(tmp_path, options, model_folder):
    """As a user runs it, in a process of its own and from another folder."""
    options |= {"use_peft": True, "lora_target_modules": ["all-linear"], "beta": 0.3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, str(ROOT / "scripts" / "dpo.py"), "run.yaml", "--beta", "0.2", "--lora_r", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    out = Path(options["output_dir"])
    assert train_losses(out)[0] == pytest.approx(0.693147, abs=1e-4)
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    untouched = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, out)
    assert model.peft_config["default"].r == 4
    assert change(model, untouched) > 1e-3, "the saved adapter does nothing"


def test_a_bad_flag_ends_the_script_in_one_line():
    with pytest.raises(SystemExit, match=r"^dpo\.py: Unknown argument '--bta'\. Did you mean '--beta'\?$"):
        load_script().main(["--bta", "1"])


def test_no_model_and_no_data_runs_the_demo(monkeypatch):
    import dpo_trainer.demo

    called = []
    monkeypatch.setattr(dpo_trainer.demo, "run_demo", lambda config, given: called.append((config, given)))
    load_script().main(["--beta", "0.7", *CPU])
    [(config, given)] = called
    assert config.beta == 0.7
    assert given >= {"beta", "use_cpu"}
    assert "loss_type" not in given
