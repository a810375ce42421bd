"""Callbacks of a run, on a real trainer that has the two attributes they live on."""

from __future__ import annotations

import html
import io
import json
import logging
import re
from types import SimpleNamespace

import pytest
import tiny
from rich.console import Console

from dpo_trainer import DPOTrainer
from dpo_trainer.data.errors import LONGEST
from dpo_trainer.online import callbacks, completions
from dpo_trainer.online.callbacks import LogCompletionsCallback, WinRateCallback
from dpo_trainer.online.completions import as_markdown, print_completions
from dpo_trainer.online.feedback.protocol import FeedbackUnavailable
from dpo_trainer.online.feedback.win_rate import WinRate
from dpo_trainer.online.samples import Completion, Sampled

HOSTILE = "[bold red]x[/] \x1b[2J|<script>alert(1)</script>\n# h `c` *b* [a](http://b) :smile: \u202e"


def sampled(prompt="p", texts=("a", "b"), example_id=0) -> Sampled:
    completions = [Completion(ids=[ord(char) for char in text], text=text, finished=True) for text in texts]
    return Sampled(example_id=example_id, prompt=prompt, prompt_ids=[1], completions=completions)


class Online(DPOTrainer):
    """Samples nothing, and has what a trainer has that does."""

    last_samples: list = []
    asked: list

    def training_step(self, *args, **kwargs):
        step = self.state.global_step + 1
        self.last_samples = [(sampled(f"prompt {step}.{row}", example_id=row), [0.25, 1.0]) for row in range(3)]
        return super().training_step(*args, **kwargs)

    def sample_answers(self, prompts, *, reference=False, max_new_tokens):
        self.asked = [*getattr(self, "asked", []), (self.state.global_step, reference, len(prompts), max_new_tokens)]
        return ["ref" if reference else "x" * self.state.global_step for _ in prompts]


def online(folder, *added, kind=Online, eval_dataset=None, **options):
    trainer = kind(
        model=tiny.llama(),
        args=tiny.config(folder, **options),
        train_dataset=tiny.dataset(),
        eval_dataset=eval_dataset,
        processing_class=tiny.tokenizer(),
        callbacks=list(added),
    )
    for callback in added:
        if hasattr(callback, "bind"):
            callback.bind(trainer)
    return trainer


def longer(samples):
    return [[len(c.text) for c in s.completions] for s in samples]


def lines(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def show(callback, folder, samples, *, report_to=(), step=3, main=True, handlers=()):
    """One log line, without a run around it."""
    trainer = SimpleNamespace(last_samples=samples, callback_handler=SimpleNamespace(callbacks=list(handlers)))
    callback.bind(trainer)
    state = SimpleNamespace(global_step=step, is_world_process_zero=main)
    callback.on_log(SimpleNamespace(output_dir=str(folder), report_to=list(report_to)), state, None)


# --- completions: when ---


def test_each_log_line_once(tmp_path):
    """A step that is logged and evaluated is shown once, also by an evaluation after the run."""
    how = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = online(tmp_path, LogCompletionsCallback(n=2, to=["jsonl"]), eval_dataset=tiny.dataset(4), **how)
    trainer.train()
    trainer.evaluate()
    assert [(row["step"], row["example_id"]) for row in lines(tmp_path)] == [
        (s, i) for s in (2, 4) for i in (0, 0, 1, 1)
    ]
    assert lines(tmp_path)[5] == {
        "step": 4,
        "example_id": 0,
        "prompt": "prompt 4.0",
        "completion": "b",
        "score": 1.0,
        "outcome": "chosen",
    }


def test_every_so_many_steps(tmp_path):
    online(tmp_path, LogCompletionsCallback(n=1, every=3, to="jsonl"), max_steps=4).train()
    assert [row["step"] for row in lines(tmp_path)] == [3, 3]


def test_a_resumed_run_goes_on_with_the_file(tmp_path):
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    online(tmp_path, LogCompletionsCallback(n=1, to="jsonl"), **how).train()
    whole = (tmp_path / "completions.jsonl").read_text()
    assert [row["step"] for row in lines(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4]
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('not json\n{"step": 1, "prom')  # as a kill may leave it
    trainer = online(tmp_path, LogCompletionsCallback(n=1, to="jsonl"), **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "completions.jsonl").read_text() == whole


def test_a_new_run_begins_the_file_anew(tmp_path):
    for _ in range(2):
        online(tmp_path, LogCompletionsCallback(n=1, to="jsonl"), max_steps=1).train()
    assert len(lines(tmp_path)) == 2


def test_main_process_alone_and_not_before_there_are_samples(tmp_path, capsys):
    show(LogCompletionsCallback(), tmp_path, [(sampled(), [1.0, 0.0])], main=False)
    show(LogCompletionsCallback(), tmp_path, [])
    assert (list(tmp_path.iterdir()), capsys.readouterr().out) == ([], "")


def test_full_disk_is_a_warning(tmp_path, caplog):
    (tmp_path / "completions.jsonl").mkdir()  # cannot be opened as a file
    with caplog.at_level(logging.WARNING):
        show(LogCompletionsCallback(to="jsonl"), tmp_path, [(sampled(), [1.0, 0.0])])
    assert "were not written" in caplog.text


# --- completions: what ---


@pytest.mark.parametrize(
    ("texts", "scores", "outcomes"),
    [
        ("abc", [0.5, 2, 1], ["rejected", "chosen", None]),
        ("abc", [1, 1, 1], ["tie"] * 3),
        ("abc", [1, None, 1], ["tie", None, "tie"]),
        ("abc", [None, 1, None], [None] * 3),
        ("abc", [3, None, 1], ["chosen", None, "rejected"]),
        ("abcd", [0, 1, 1, 0], [None, "chosen", None, "rejected"]),  # the first of the best, the last of the worst
        ("aab", [None, 1, 0], [None, "chosen", "rejected"]),  # the same answer twice, judged once
        ("aa", [1, 0], ["tie", "tie"]),  # nothing to prefer between equal answers
    ],
)
def test_outcomes(tmp_path, texts, scores, outcomes):
    show(LogCompletionsCallback(to="jsonl"), tmp_path, [(sampled(texts=texts), scores)])
    assert [row["outcome"] for row in lines(tmp_path)] == outcomes
    assert [row["score"] for row in lines(tmp_path)] == scores


def test_file_keeps_text_and_messages_as_they_are(tmp_path):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": HOSTILE + "\ud800"}]
    show(LogCompletionsCallback(to="jsonl"), tmp_path, [(sampled(prompt, ("y" * 5000, "")), [1.0, 0.0])])
    first, second = lines(tmp_path)
    assert (first["prompt"], first["completion"], second["completion"]) == (prompt, "y" * 5000, "")


def test_rows_that_only_fill_a_batch_are_not_shown(tmp_path):
    filler = Sampled(**{**vars(sampled("filler")), "weight": 0.0})
    show(LogCompletionsCallback(n=1, to="jsonl"), tmp_path, [(filler, [1.0, 0.0]), (sampled("real"), [1.0, 0.0])])
    assert {row["prompt"] for row in lines(tmp_path)} == {"real"}


def printed(text, width=200):
    out = io.StringIO()
    # Colours and a terminal: nothing is stripped on the way.
    console = Console(file=out, width=width, force_terminal=True, color_system="truecolor", markup=True, emoji=True)
    callback = SimpleNamespace(global_step=3)
    print_completions(completions.rows_of(callback.global_step, sampled(text, (text, "b")), [1.0, None]), console)
    return out.getvalue()


def test_console_obeys_no_text():
    shown = printed(HOSTILE)
    assert "[bold red]x[/]" in shown
    assert ":smile:" in shown
    assert r"\x1b[2J" in shown
    assert r"\u202e" in shown
    assert "\u202e" not in shown
    # The only escape sequences are those that rich writes for its own styles: text comes with none.
    assert set(re.findall(r"\x1b\[[0-9;]*[A-Za-z]", shown)) == set(
        re.findall(r"\x1b\[[0-9;]*[A-Za-z]", printed("plain"))
    )


def test_console_cuts_long_text():
    shown = printed("z" * 10_000)
    assert shown.count("z") == 3 * LONGEST  # twice as the prompt, once as a completion
    assert shown.count("...") == 3


def test_console_through_the_callback(tmp_path, capsys):
    show(
        LogCompletionsCallback(n=1, to="console"), tmp_path, [(sampled("Why?", ("Because.", "So.")), [2.0, None])] * 2
    )
    out = capsys.readouterr().out
    assert out.count("Why?") == 2  # the prompt of each completion, of one sample
    assert "Because." in out
    assert list(tmp_path.iterdir()) == []


# --- completions: trackers ---


@pytest.mark.parametrize("text", [HOSTILE, "a|b", "&lt;", "1. x", "- x", "<!-- -->", "``", "\\|", "| a | b |"])
def test_markdown_shows_the_text_itself(text):
    plugin = pytest.importorskip("tensorboard.plugin_util")
    table = f"| text |\n| --- |\n| {as_markdown(text)} |"
    cells = re.findall(r"<td>(.*?)</td>", plugin.markdown_to_safe_html(table), re.S)
    assert [html.unescape(cell) for cell in cells] == [completions.clean(text).strip()]
    assert not re.search(r"<(?!/?td)[a-zA-Z!/]", "".join(cells))


def test_tensorboard_for_real(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = LogCompletionsCallback(n=1, to="report_to")
    online(tmp_path / "out", callback, max_steps=2, report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"tensors": 0})
    events.Reload()
    found = events.Tensors("completions/text_summary")
    assert [event.step for event in found] == [1, 2]
    text = found[1].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| prompt | completion | score | outcome |"
    assert text.splitlines()[3] == f"| {as_markdown('prompt 2.0')} | b | {as_markdown('1')} | chosen |"
    assert not (tmp_path / "out" / "completions.jsonl").exists()


def test_wandb_table(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged = []
    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "log", logged.append)
    show(
        LogCompletionsCallback(to="report_to"),
        tmp_path,
        [(sampled("p", (HOSTILE, "b")), [0.5, None])],
        report_to=["wandb"],
    )
    (line,) = logged
    assert line["train/global_step"] == 3
    assert line["completions"].columns == ["step", "prompt", "completion", "score", "outcome"]
    assert line["completions"].data == [[3, "p", HOSTILE, "0.5", "-"], [3, "p", "b", "-", "-"]]


def test_wandb_without_a_run(tmp_path, caplog):
    pytest.importorskip("wandb")
    with caplog.at_level(logging.WARNING):
        show(LogCompletionsCallback(to="report_to"), tmp_path, [(sampled(), [1.0, 0.0])], report_to=["wandb"])
    assert "no run has begun" in caplog.text


def test_trackio_table(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    logged = []
    monkeypatch.setattr(trackio, "log", logged.append)
    samples = [(sampled("p", ("<b>x</b>", "b")), [0.5, 0.0])]
    show(LogCompletionsCallback(to="report_to"), tmp_path, samples, report_to=["trackio"])
    (line,) = logged
    first = line["completions"].data[0]
    assert (first["step"], first["outcome"]) == (3, "chosen")
    assert "<" not in first["completion"]
    assert html.unescape(first["completion"]) == "<b>x</b>"


def test_only_trackers_that_the_run_reports_to(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        callbacks, "TRACKERS", {name: lambda *_, name=name: told.append(name) for name in ("wandb", "trackio")}
    )
    show(LogCompletionsCallback(to="report_to"), tmp_path, [(sampled(), [1.0, 0.0])], report_to=["trackio", "mlflow"])
    show(LogCompletionsCallback(to="jsonl"), tmp_path, [(sampled(), [1.0, 0.0])], report_to=["wandb"])
    assert told == ["trackio"]


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"every": 0}, "every=0"),
        ({"to": ["consle"]}, "Did you mean 'console'"),
        ({"to": ()}, "to is empty"),
    ],
)
def test_options_of_completions(options, message):
    with pytest.raises(ValueError, match=message):
        LogCompletionsCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"every": -1}, "every=-1"),
        ({"level": 95}, "WinRateCallback: level is 95"),
        ({"reference_answers": ["a"]}, "1 reference_answers for 2 prompts"),
        ({"columns": [{}] * 3}, "3 columns for 2 prompts"),
        ({"prompts": []}, "at least one"),
        ({"prompts": "pq"}, "must be a list"),
        ({"feedback": "llm"}, "'llm' cannot be called"),
    ],
)
def test_options_of_win_rate(options, message):
    with pytest.raises(ValueError, match=message):
        WinRateCallback(**{"feedback": longer, "prompts": ["p", "q"], **options})


@pytest.mark.parametrize(
    "callback", [LogCompletionsCallback(), WinRateCallback(longer, ["p"])], ids=["shown", "win rate"]
)
def test_a_trainer_that_samples_nothing_is_refused(tmp_path, callback):
    trainer = online(tmp_path, callback, kind=DPOTrainer)
    with pytest.raises(ValueError, match=r"a DPOTrainer, which has no .* OnlineDPOTrainer"):
        trainer.train()
    callback.bind(None)
    with pytest.raises(ValueError, match="got no trainer"):
        trainer.train()


# --- the win rate ---


def win_rates(trainer):
    return [
        {
            key.removeprefix("eval_greedy_win_rate"): value
            for key, value in line.items()
            if key.startswith("eval_greedy_win_rate")
        }
        | {"step": line["step"]}
        for line in trainer.state.log_history
        if "eval_greedy_win_rate_failed" in line and "eval_loss" not in line
    ]


def test_win_rate_at_each_evaluation(tmp_path):
    """Answers of 1 to 4 letters against 3: lost, lost, a tie, won."""
    callback = WinRateCallback(longer, ["p"] * 9, n=4, max_new_tokens=5, level=0.9)
    how = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = online(tmp_path, callback, eval_dataset=tiny.dataset(4), **how)
    trainer.train()
    expected = [WinRate(0, 0, 4), WinRate(0, 0, 4), WinRate(0, 4, 0), WinRate(4, 0, 0)]
    for step, (line, found) in enumerate(zip(win_rates(trainer), expected, strict=True), start=1):
        low, high = found.interval(0.9)
        assert line == {"step": step, "": found.rate, "_low": low, "_high": high, "_ties": found.ties, "_failed": 0}
    # The reference is asked once.
    assert trainer.asked == [(1, False, 4, 5), (1, True, 4, 5), (2, False, 4, 5), (3, False, 4, 5), (4, False, 4, 5)]


def test_given_reference_answers_and_columns(tmp_path):
    seen = []

    def feedback(samples):
        seen.extend((s.prompt, s.columns, s.completions[1].text) for s in samples)
        return longer(samples)

    given = {"reference_answers": ["", "zz", "unused"], "columns": [{"c": 1}, {"c": 2}, {"c": 3}]}
    trainer = online(tmp_path, WinRateCallback(feedback, ["p", "q", "r"], n=2, every=1, **given), max_steps=1)
    trainer.train()
    assert seen == [("p", {"c": 1}, ""), ("q", {"c": 2}, "zz")]
    assert [reference for _, reference, *_ in trainer.asked] == [False]
    assert win_rates(trainer)[0][""] == 0.5  # one longer than "", one shorter than "zz"


def test_every_so_many_steps_leaves_the_lines_of_training(tmp_path):
    """A log line at the end of a step takes away the mark that one of training is due."""
    trainer = online(tmp_path, WinRateCallback(longer, ["p"], every=2), max_steps=4)
    trainer.train()
    assert [line["step"] for line in win_rates(trainer)] == [2, 4]
    assert [line["step"] for line in tiny.log_lines(trainer)] == [1, 2, 3, 4]


def test_the_best_model_can_be_chosen_by_it(tmp_path):
    callback = WinRateCallback(longer, ["p"], reference_answers=["xx"])
    how = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "metric_for_best_model": "eval_greedy_win_rate"}
    trainer = online(
        tmp_path, callback, eval_dataset=tiny.dataset(4), save_strategy="best", greater_is_better=True, **how
    )
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1.0, 3)


def test_several_evaluation_datasets_are_one_measurement(tmp_path):
    callback = WinRateCallback(longer, ["p"])
    both = {"a": tiny.dataset(4), "b": tiny.dataset(4, seed=1)}
    trainer = online(tmp_path, callback, eval_dataset=both, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert [line["step"] for line in win_rates(trainer)] == [2, 4]
    assert trainer.evaluate()["eval_greedy_win_rate"] == 1.0  # after the run anew: other weights may have been loaded
    assert len(win_rates(trainer)) == 3


def test_unavailable_feedback_is_a_warning_and_counted(tmp_path, caplog):
    calls = []

    def sometimes(samples):
        calls.append(len(samples))
        if len(calls) < 3:
            raise FeedbackUnavailable("the judge at http://localhost:1 is down")
        return longer(samples)

    callback = WinRateCallback(sometimes, ["p", "q"], every=1)
    trainer = online(tmp_path, callback, max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert callback.unavailable == 2
    assert caplog.text.count("localhost:1 is down") == 2
    first, second, third = win_rates(trainer)
    assert (first, second) == ({"step": 1, "_ties": 0, "_failed": 2}, {"step": 2, "_ties": 0, "_failed": 2})
    assert (third["_failed"], third["_ties"], third[""]) == (0, 2, 0.5)


def test_other_errors_of_feedback_stop_the_run(tmp_path):
    trainer = online(tmp_path, WinRateCallback(lambda samples: [[float("nan"), 1.0]], ["p"], every=1), max_steps=1)
    with pytest.raises(ValueError, match="nan"):
        trainer.train()


def test_only_the_main_process_asks(tmp_path, monkeypatch):
    """The others get what it found."""
    given = []
    monkeypatch.setattr(
        callbacks,
        "broadcast_object_list",
        lambda found: given.append(list(found)) or found.__setitem__(0, WinRate(1, 2, 3)),
    )
    callback = WinRateCallback(lambda samples: 1 / 0, ["p"], reference_answers=["r"])
    callback.bind(SimpleNamespace(sample_answers=lambda prompts, max_new_tokens: ["a"]))
    assert callback.measure(main_process=False) == WinRate(1, 2, 3)
    assert given == [[None]]
