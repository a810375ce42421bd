"""The date that a chat template writes: one per run, kept by its checkpoints, and told by an option."""

from __future__ import annotations

import copy
import shutil
from datetime import datetime

import pytest
import tiny
import transformers.utils.chat_template_utils as chat_templates
from datasets import Dataset

from dpo_trainer import DPOConfig
from dpo_trainer.data import DataOptions, prepare_dataset
from dpo_trainer.data.tokens.dates import dated, writes_date
from dpo_trainer.data.tokens.encode import tokenizer_fingerprint
from dpo_trainer.inspection.run import inspect
from dpo_trainer.training import template_date

DATED = (
    "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASK = [{"role": "user", "content": "x"}]


def tokenizer(template: str = DATED):
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def clock(monkeypatch, day: str) -> None:
    """The day as the package sees it, and as transformers does."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.strptime(day, "%Y-%m-%d")

    monkeypatch.setattr(template_date, "datetime", Clock)
    monkeypatch.setattr(chat_templates, "datetime", Clock)


def first_line(trainer) -> str:
    return trainer.processing_class.decode(trainer.train_dataset[0]["prompt_ids"]).partition("\n")[0]


def made(folder, **how):
    train = Dataset.from_list(tiny.chat_rows(12))
    return tiny.trainer(folder, train=train, parts={"processing_class": tokenizer()}, **how)


# --- what a template writes ---


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "\n  {% if strftime_now is defined %}A {{ strftime_now('%Y-%m-%d') }}{% endif %}",
        "{%- macro m(x) %}{{ x }} {{ strftime_now('%B %-d, %Y 100%%d %A') }}{% endmacro %}{% for i in [1, 2] %}{{ m(i) }}{% endfor %}",
        "  {{ strftime_now('%d')|int - 1 }} {% set t = strftime_now(format='%Y') %}{{ t|int }}",
        "{% block b %}{{ strftime_now('%H:%M:%S %j') }}{% endblock %}",
        "{% set f = '%d/' ~ '%m' %}{{ strftime_now(f) }}\n\n",
        "{#- a comment -#}\n{{ strftime_now('it\\'s %c %x %p') }}",
    ],
)
def test_a_dated_template_writes_what_transformers_writes_on_that_day(template, monkeypatch):
    clock(monkeypatch, "2026-03-05")
    own = tokenizer(template)
    want = own.apply_chat_template(ASK, tokenize=False)
    monkeypatch.undo()
    assert dated(own, "2026-03-05").apply_chat_template(ASK, tokenize=False) == want
    assert own.chat_template == template


def test_what_a_row_says_of_the_date_goes_before(monkeypatch):
    own = dated(
        tokenizer(
            "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
        ),
        "2026-03-05",
    )
    assert own.apply_chat_template(ASK, tokenize=False) == "2026"
    assert own.apply_chat_template(ASK, tokenize=False, date_string="1999") == "1999"


def test_the_fingerprint_knows_the_date_and_nothing_else_changes():
    own = tokenizer()
    one, other, again = (tokenizer_fingerprint(dated(own, f"2026-03-0{day}")) for day in (5, 6, 5))
    assert one == again != other
    plain = tokenizer(tiny.CHAT_TEMPLATE + "{# strftime_now #}")
    assert not writes_date(plain)
    assert dated(plain, "2026-03-05") is plain
    assert dated(own, None) is own


def test_one_of_several_templates():
    own = tokenizer()
    own.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": DATED}
    twin = dated(own, "2026-03-05")
    assert twin.chat_template["default"] == tiny.CHAT_TEMPLATE
    assert "05 Mar 2026" in twin.apply_chat_template(ASK, chat_template="tool_use", tokenize=False)


def test_beside_the_text_of_control_tokens_and_generation_markers():
    """Such rows go other ways through the template."""
    talk = {"prompt": ASK, "chosen": [{"role": "assistant", "content": "a <|end|> b"}], "rejected": "c"}
    several = {
        "prompt": ASK,
        "chosen": [{"role": "assistant", "content": "a"}, *ASK, {"role": "assistant", "content": "b"}],
        "rejected": "c",
    }
    marked = DATED.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}")
    options = DataOptions(template_date="2026-03-05", disable_tqdm=True, max_length=500)
    for template in (DATED, marked):
        rows, _ = prepare_dataset(Dataset.from_list([talk]), tokenizer(template), options)
        more, _ = prepare_dataset(Dataset.from_list([several]), tokenizer(template), options)
        for row in (*rows, *more):
            assert tiny.tokenizer().decode(row["prompt_ids"]).startswith("Today: 05 Mar 2026\n")


# --- which date a run has ---


def test_the_date_is_said_once_and_set_by_the_option(tmp_path, caplog, monkeypatch):
    clock(monkeypatch, "2026-11-29")
    assert first_line(made(tmp_path / "a")) == "Today: 29 Nov 2026"
    assert caplog.text.count("The chat template writes the date: 2026-11-29 in all of this run, today's") == 1
    assert first_line(made(tmp_path / "b", template_date="2026-01-02")) == "Today: 02 Jan 2026"


def test_a_run_is_resumed_on_another_day(tmp_path, monkeypatch):
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    clock(monkeypatch, "2026-11-29")
    whole = made(tmp_path / "run", **steps)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    clock(monkeypatch, "2026-11-30")
    resumed = made(tmp_path / "run", **steps)
    assert first_line(resumed) == "Today: 29 Nov 2026"
    resumed.train(resume_from_checkpoint="auto")
    tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))
    # Into another folder: told by the option that says where to resume from, or refused with the option that mends it.
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    named = made(tmp_path / "named", resume_from_checkpoint=checkpoint, **steps)
    assert first_line(named) == "Today: 29 Nov 2026"
    with pytest.raises(ValueError, match=r"--template_date: 2026-11-29 there, 2026-11-30 here"):
        made(tmp_path / "other", **steps).train(resume_from_checkpoint=checkpoint)
    made(tmp_path / "told", template_date="2026-11-29", **steps).train(resume_from_checkpoint=checkpoint)


def test_the_cache_of_the_reference_is_found_on_another_day(tmp_path, monkeypatch):
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    for day, computed in (("2026-11-29", 24), ("2026-11-30", 0)):
        clock(monkeypatch, day)
        (filled,) = made(tmp_path / day, **cached).precompute_reference()
        assert filled.computed == computed
    (filled,) = made(tmp_path / "told", template_date="2026-11-30", **cached).precompute_reference()
    assert filled.computed == 24
    assert first_line(made(tmp_path / "then", **cached)) == "Today: 30 Nov 2026"  # as it was last filled


def test_data_to_evaluate_on_have_the_date_too(tmp_path):
    trainer = made(tmp_path, template_date="2026-01-02")
    rows = trainer.data.prepare(tiny.chat_rows(2), "eval")
    assert trainer.processing_class.decode(rows[0]["prompt_ids"]).startswith("Today: 02 Jan 2026")
    assert trainer.processing_class.chat_template == DATED  # which is saved


def test_the_inspection_shows_the_same_tokens(tmp_path):
    config = tiny.config(tmp_path, template_date="2026-01-02")
    tiny.llama().save_pretrained(tmp_path / "model")
    found = inspect(Dataset.from_list(tiny.chat_rows(4)), tokenizer(), config, str(tmp_path / "model"))
    assert found.template.changes_with_the_day
    assert "".join(token.text for token in found.shown[0].stretches[0].tokens)[:18].startswith("Today:")
    other = inspect(Dataset.from_list(tiny.chat_rows(4)), tokenizer(), tiny.config(tmp_path), str(tmp_path / "model"))
    assert found.shown[0].stretches[0] != other.shown[0].stretches[0]
    assert found.options["template_date"] == "2026-01-02"


@pytest.mark.parametrize("value", ["30.11.2026", "2026-11-31", "2026-1-2", "today", 20261130])
def test_what_is_no_day_is_refused(value):
    with pytest.raises(ValueError, match=r"--template_date must be a day as YYYY-MM-DD"):
        DPOConfig(template_date=value)


def test_a_date_that_no_template_writes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--template_date 2026-01-02 would be ignored"):
        tiny.trainer(tmp_path, template_date="2026-01-02")


def test_all_ranks_have_the_date_of_the_first(tmp_path, monkeypatch):
    """Whatever the clock of another one says."""
    args = copy.copy(tiny.config(tmp_path))
    asked = []

    def broadcast(answer):
        asked.append(answer[0])
        answer[0] = ("2026-11-29", "today's")

    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setattr(type(args), "process_index", 1)
    monkeypatch.setattr(template_date, "broadcast_object_list", broadcast)
    assert template_date.settle_date(args, tokenizer()) == "2026-11-29"
    assert asked == [None]
