"""scripts/dpo_vlm.py and scripts/dpo.py on a model that sees, from files alone, as a user starts them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import vision_rows
import zoo
from transformers import AutoModelForImageTextToText

SCRIPTS = Path(__file__).parents[2] / "scripts"
OPTIONS = ["--max_steps", "2", "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]


def run(script: str, *arguments: str) -> None:
    main = runpy.run_path(str(SCRIPTS / script), run_name="a script")["main"]
    main([*arguments, *OPTIONS])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A LLaVA with its processor, a model that reads text alone, and rows with images."""
    folder = tmp_path_factory.mktemp("files")
    for made in zoo.ZOO["llava"]():
        made.save_pretrained(folder / "llava")
    tiny.llama().save_pretrained(folder / "llama")
    tiny.tokenizer().save_pretrained(folder / "llama")
    vision_rows.dataset().to_parquet(folder / "rows.parquet")
    tiny.dataset().to_json(folder / "text.jsonl")
    return folder


@pytest.mark.parametrize("script", ["dpo.py", "dpo_vlm.py"])
def test_trains_a_model_that_sees(script, files, tmp_path):
    given = ["--model_name_or_path", str(files / "llava"), "--dataset_name", str(files / "rows.parquet")]
    run(script, *given, "--output_dir", str(tmp_path))
    assert (tmp_path / "train_results.json").is_file()
    assert (tmp_path / "processor_config.json").is_file()
    trained = tiny.weights(AutoModelForImageTextToText.from_pretrained(tmp_path))
    began = tiny.weights(AutoModelForImageTextToText.from_pretrained(files / "llava"))
    assert any(not weight.equal(trained[name]) for name, weight in began.items() if "vision" in name)


def test_refuses_a_model_that_reads_text_alone(files, tmp_path):
    given = ["--model_name_or_path", str(files / "llama"), "--dataset_name", str(files / "text.jsonl")]
    with pytest.raises(SystemExit, match="reads text alone"):
        run("dpo_vlm.py", *given, "--output_dir", str(tmp_path))


def test_images_are_refused_where_nobody_looks(files, tmp_path):
    given = ["--model_name_or_path", str(files / "llama"), "--dataset_name", str(files / "rows.parquet")]
    with pytest.raises(SystemExit, match=r"Row 0 .*images.*reads text alone"):
        run("dpo.py", *given, "--output_dir", str(tmp_path))


def test_paligemma_wants_its_processor(tmp_path):
    """Without it, answers would see their own end: a log-prob of an early word moved by 0.26 nats with the last word."""
    model, processor = zoo.ZOO["paligemma"]()
    with pytest.raises(ValueError, match="pass that as processing_class"):
        tiny.trainer(tmp_path, model=model, parts={"processing_class": processor.tokenizer})
