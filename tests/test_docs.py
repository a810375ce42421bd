"""The documentation is true: generated regions are fresh, Python blocks run and print what the pages say, commands parse,
links lead somewhere, and what the pages list by hand is what the code has.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from markdown_blocks import ROOT, Block, assert_prints, blocks, commands, enter_checkout, run_python, same_line
from transformers import HfArgumentParser, TrainingArguments

from dpo_trainer import inspection
from dpo_trainer.cli import parse_args
from dpo_trainer.cli.caching import CacheArguments
from dpo_trainer.config import DPOConfig
from dpo_trainer.inspection.arguments import InspectionArguments
from dpo_trainer.losses import LOSSES
from dpo_trainer.metrics import METRICS
from dpo_trainer.online.config import OnlineDPOConfig
from dpo_trainer.online.feedback.protocol import JUDGES
from dpo_trainer.online.metrics import ONLINE_METRICS, TALLIED

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *DOCS]


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


judge_win_rate = load_script("judge_win_rate")


def page_id(page: Path) -> str:
    return page.name


@pytest.fixture
def checkout(tmp_path, tmp_path_factory, monkeypatch):
    return enter_checkout(tmp_path, tmp_path_factory.getbasetemp(), monkeypatch)


# --- generated regions ---


def test_generated_regions_are_fresh():
    assert generate.stale() == {}, "run python docs/generate.py"


def test_every_region_is_on_a_page():
    """Else the test above would prove nothing about it."""
    on_pages = {match["name"] for page in generate.pages() for match in generate.REGION.finditer(page.read_text())}
    assert on_pages == set(generate.REGIONS)


@pytest.fixture
def copied(tmp_path):
    """README and docs, apart from the checkout."""
    (tmp_path / "docs").mkdir()
    for page in generate.pages():
        (tmp_path / page.relative_to(ROOT)).write_text(page.read_text())
    return tmp_path


def test_check_notices_a_stale_page_and_changes_nothing(copied, capsys):
    page = copied / "docs" / "losses.md"
    page.write_text(page.read_text().replace("L = max(0, 1 - b D)", "L = max(0, 2 - b D)"))
    before = page.read_text()
    assert generate.main(["--check"], copied) == 1
    said = capsys.readouterr().out
    assert "losses.md is stale" in said
    assert "python docs/generate.py" in said
    assert page.read_text() == before

    assert generate.main([], copied) == 0
    assert page.read_text() == (ROOT / "docs" / "losses.md").read_text()
    assert generate.main(["--check"], copied) == 0


def test_a_loss_of_the_user_is_not_documented(monkeypatch):
    monkeypatch.setitem(LOSSES._items, "mine", type(LOSSES["sigmoid"])(name="mine", function=lambda p, r, *, beta: p))
    assert "mine" in LOSSES
    assert "mine" not in generate.builtin_losses()
    assert set(generate.builtin_losses()) >= {"sigmoid", "simpo", "aot"}


@pytest.mark.parametrize("text", ["<!-- generated: nothing -->\n<!-- end -->\n", "<!-- generated: losses -->\n"])
def test_a_bad_mark_is_named(text):
    with pytest.raises(SystemExit, match=r"page\.md"):
        generate.filled(text, "page.md")


def test_a_metric_without_a_description_is_named(monkeypatch):
    monkeypatch.setitem(METRICS, "surprise", lambda parts: None)
    with pytest.raises(SystemExit, match="surprise"):
        generate.metrics()


def test_speed_without_records_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert "python benchmarks/beside_trl.py" in generate.speed()


def rows_of(table: str) -> list[str]:
    return re.findall(r"^\| `([\w/]+)`", table, re.MULTILINE)


def own_options(kind: type, without: type) -> set[str]:
    """Names that a class of options adds to another, with those of the classes it puts together."""
    names = {name for own in kind.__mro__ if own not in without.__mro__ for name in own.__annotations__}
    return {name for name in names if name[0] != "_"}


def test_tables_have_every_loss_metric_and_option():
    assert rows_of(generate.losses()) == [name for name in LOSSES if LOSSES[name].builtin]
    assert set(rows_of(generate.metrics())) >= set(METRICS)
    assert set(rows_of(generate.config())) == own_options(DPOConfig, TrainingArguments)
    own = own_options(OnlineDPOConfig, DPOConfig)
    assert set(rows_of(generate.online_config())) == own - {"beta"}, "beta is in the text"
    assert set(rows_of(generate.online_metrics())) >= {*TALLIED, *ONLINE_METRICS} - set(METRICS)
    assert set(rows_of(generate.judges())) >= {"llm", "length", "pair_model"}
    for name in rows_of(generate.losses()):
        equation, paper = re.split(r"(?<!\\)\|", generate.losses().split(f"| `{name}`")[1])[1:3]
        assert re.fullmatch(r" `L\S* = .+` ", equation), name
        assert "arxiv.org" in paper, name


# --- code ---


@pytest.mark.parametrize("page", [page for page in DOCS if "```python" in page.read_text()], ids=page_id)
def test_python_blocks_run_and_print_what_the_page_says(page, checkout):
    registered = dict(LOSSES._items), dict(JUDGES._items)
    try:
        ran = run_python(page, checkout)
    finally:
        LOSSES._items, JUDGES._items = registered  # without what the page registers
    assert ran
    for block, printed in ran:
        assert (block.output is None) == (not printed.strip()), f"{block.where}: shown and printed output differ"
        if block.output is not None:
            assert_prints(block, printed)


def script_commands() -> list:
    return [
        pytest.param(command, id=f"{block.where}-{number}")
        for page in PAGES
        for block in blocks(page)
        if block.info == "sh"
        for number, command in enumerate(commands(block))
    ]


@pytest.mark.parametrize("command", script_commands())
def test_commands_name_files_and_flags_that_exist(command, checkout):
    """Runs nothing: models of the hub and GPUs are not here. test_readme.py runs what can be run."""
    words = shlex.split(command)
    if words[0] == "make":
        assert subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
        return
    for word in words:
        if "/" in word and word.endswith((".py", ".yaml")):
            assert (ROOT / word).is_file(), word
    if "scripts/dpo_online.py" in words:
        parse_args(words[words.index("scripts/dpo_online.py") + 1 :], OnlineDPOConfig)
    elif words[1:2] == ["scripts/judge_win_rate.py"]:
        HfArgumentParser(judge_win_rate.Arguments, allow_abbrev=False).parse_args_into_dataclasses(words[2:])
    elif words[1:2] == ["scripts/plot_scaling.py"]:
        assert set(re.findall("--([a-z]+)", command)) <= {"output", "title"}
    elif "scripts/dpo.py" in words:
        (checkout / "my_losses.py").write_text(loss_of_the_page())
        registered = dict(LOSSES._items)
        parse_args(words[words.index("scripts/dpo.py") + 1 :])
        LOSSES._items = registered
    elif words[1:2] == ["scripts/inspect_data.py"]:
        inspection.parse(words[2:])
    elif words[1:2] == ["scripts/cache_reference.py"]:
        parser = HfArgumentParser(CacheArguments, allow_abbrev=False)
        own, rest = parser.parse_args_into_dataclasses(words[2:], return_remaining_strings=True)
        assert not rest or not (own.stats or own.prune)
        parse_args(rest)
    elif words[1:2] == ["docs/generate.py"]:
        assert set(words[2:]) <= {"--check"}
    else:
        assert words[0] in OTHER_PROGRAMS, f"{command}: nothing checks this command"


OTHER_PROGRAMS = {"python3", ".venv/bin/pip", "python", ".venv/bin/python", "git", "pytest", ".venv-trl/bin/pip"}


def loss_of_the_page() -> str:
    page = ROOT / "docs" / "extending.md"
    return next(block.text for block in blocks(page) if block.info == "python file:my_losses.py")


def test_the_comparison_of_output_can_fail():
    """Numbers with a point may differ by 5 %, everything else not at all."""
    assert same_line("step 3: loss 0.6931, x", "step 3: loss 0.6935, x")
    assert same_line("{'loss': 0.5, 'more': 7}", "{'loss': 0.51, ...")
    for line in ("step 4: loss 0.6931, x", "step 3: loss 0.8, x", "step 3: loss 0.6931, y", "", "step 3"):
        assert not same_line(line, "step 3: loss 0.6931, x"), line
    with pytest.raises(AssertionError, match="should print"):
        assert_prints(Block("python", "", "page.md:1", "one\ntwo\n"), "two\none\n")
    assert_prints(Block("python", "", "page.md:1", "one\ntwo\n"), "zero\none\nother\ntwo\n")


# --- prose ---


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_that_pages_name_exist(page):
    """`--flag` in the prose is a flag of the script, of a command of this repository, or TRL's own (changelog)."""
    scripts = {"check", "config", "help", "config_file", "num_processes", "nproc_per_node", "data", "data-dir"}
    scripts |= {"signal", "requeue"}  # Slurm's
    scripts |= set(
        "nnodes nproc-per-node rdzv-backend rdzv-endpoint rdzv-id rdzv_backend max-restarts max_restarts".split()
    )
    scripts |= {"main_process_ip", "deepspeed_multinode_launcher", "dry_run"}
    known = {option.name for kind in generate_kinds() for option in fields(kind)} | scripts
    if page.name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        known |= {"float64", "gradient-checkpointing", "markers"}
    text = re.sub(r"<!--.*?-->", "", page.read_text())
    assert set(re.findall(r"(?<![\w-])--([a-z]\w+(?:-\w+)*)", text)) - known == set()


def generate_kinds() -> list[type]:
    ours = [OnlineDPOConfig, generate.ScriptArguments, generate.ModelArguments, InspectionArguments, CacheArguments]
    return [*ours, judge_win_rate.Arguments, TrainingArguments]


def test_every_page_is_linked_from_the_readme_and_has_a_title():
    readme = (ROOT / "README.md").read_text()
    for page in DOCS:
        assert f"(docs/{page.name})" in readme, page.name
        assert page.read_text().startswith("# ")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_name_no_machine(page):
    """No absolute paths of a machine, no addresses but public pages."""
    text = page.read_text()
    assert not re.search(r"(?<![\w.~])/(?:work|home|tmp|root|usr)/", text)
    hosts = set(re.findall(r"https?://([^/\s)]+)", text))
    assert hosts <= {"arxiv.org", "keepachangelog.com", "semver.org", "www.apache.org"}


def test_layouts_page_names_the_models_that_are_tested():
    text = (ROOT / "docs" / "layouts.md").read_text()
    tested = importlib.import_module("test_architectures")
    listed = {kind: re.search(rf"^\| {kind} \| (.+) \|$", text, re.MULTILINE)[1] for kind in ("flat", "padded")}
    for kind, names in (("flat", tested.FLAT), ("padded", tested.PADDED)):
        for name in names:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", listed[kind]), (kind, name)


def test_losses_page_names_the_losses_that_a_term_is_for():
    text = " ".join((ROOT / "docs" / "losses.md").read_text().split())
    divergence = re.search(r"For ([^.]+)\. \* \*\*Mixtures of experts", text)[1]
    assert set(re.findall(r"`(\w+)`", divergence)) == set(LOSSES.taking("divergence"))
    not_ld = re.search(r"Not for ([^,]+(?:, `\w+`)*), whose", text)[1]
    assert set(re.findall(r"`(\w+)`", not_ld)) == {n for n in generate.builtin_losses() if not LOSSES[n].takes_ld}


def test_license_is_the_one_of_the_package():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
