"""Win rate against model size: what is drawn, read back from the figure."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from dpo_trainer.online.feedback.win_rate import WinRate

ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("plot_scaling_script", ROOT / "scripts" / "plot_scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def result(parameters, wins=3, losses=1, **more):
    return WinRate(wins, 0, losses).to_dict() | {"parameters": parameters, "model": "m", "judge": "length"} | more


def written(folder, *results):
    files = [folder / f"{number}.json" for number in range(len(results))]
    for file, found in zip(files, results, strict=True):
        file.write_text(json.dumps(found))
    return [str(file) for file in files]


def drawn(*results, title=""):
    (axes,) = script.draw(list(results), title).axes
    return axes


def test_points_and_bars():
    small, large = result(1e8, 30, 70), result(7e9, 60, 40)
    axes = drawn(large, small)  # in whichever order the files come
    assert axes.get_xscale() == "log"
    (container,) = axes.containers
    line, _, (bars,) = container
    assert list(line.get_xdata()) == [1e8, 7e9]
    assert list(line.get_ydata()) == [0.3, 0.6]
    for segment, found in zip(bars.get_segments(), (small, large), strict=True):
        assert segment[:, 0].tolist() == [found["parameters"]] * 2
        assert segment[:, 1] == pytest.approx([found["low"], found["high"]], abs=1e-12)
    assert axes.get_ylabel() == "win rate (95 % interval)"
    assert axes.get_legend() is None


def test_the_line_at_half():
    levels = [line.get_ydata() for line in drawn(result(1e8)).lines if list(line.get_xdata()) == [0, 1]]
    assert levels == [[0.5, 0.5]]


def test_a_line_per_series():
    axes = drawn(
        result(1e8, series="online"), result(1e9, series="offline"), result(2e9, series="online"), result(3e9)
    )
    found = {
        text.get_text(): list(container[0].get_xdata())
        for text, container in zip(axes.get_legend().get_texts(), axes.containers, strict=True)
    }
    assert found == {"online": [1e8, 2e9], "offline": [1e9], "no series": [3e9]}


def test_names_are_not_obeyed(tmp_path):
    """Mathematics that does not parse, a name that matplotlib would hide, control characters."""
    results = [result(1e8, series=r"$\frac{$"), result(1e9, series="_hidden"), result(1e10, series="a\nb\x1b")]
    figure = script.draw(results, r"$\nonsense{$")
    figure.savefig(tmp_path / "a.png")  # where mathematics would be parsed
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [r"$\frac{$", "_hidden", r"a\nb\x1b"]
    assert axes.get_title() == r"$\nonsense{$"


def test_several_levels_are_named():
    assert drawn(result(1e8), result(1e9, level=0.9)).get_ylabel() == "win rate (90 % or 95 % interval)"


@pytest.mark.parametrize("found", [(5, 0), (0, 5)])
def test_a_rate_at_the_edge_has_a_bar(found):
    """Rounding must not make the length of a bar negative, which matplotlib refuses."""
    axes = drawn(result(1e8, *found))
    assert axes.containers[0][0].get_ydata()[0] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("parameters", "words"), [(7e9, "7B"), (5e8, "500M"), (2e3, "2K"), (12, "12"), (1.5e12, "1.5T")]
)
def test_sizes_in_words(parameters, words):
    assert script.size_in_words(parameters) == words


def test_tick_labels_within_one_decade(tmp_path):
    figure = script.draw([result(2e9), result(6e9)])
    figure.savefig(tmp_path / "a.png")
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    labels = {tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high}
    assert {"2B", "5B"} <= labels


def test_the_command(tmp_path, capsys):
    output = tmp_path / "new" / "scaling.png"
    script.main([*written(tmp_path, result(1e8), result(1e9)), "--output", str(output), "--title", "t"])
    assert imread(output).shape[:2] == (630, 960)  # 6.4 x 4.2 inches at 150 dots
    assert str(output) in capsys.readouterr().out


def test_runs_as_a_script(tmp_path):
    (file,) = written(tmp_path, result(1e8))
    command = [sys.executable, str(ROOT / "scripts" / "plot_scaling.py"), file, "--output", str(tmp_path / "a.svg")]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert "<svg" in (tmp_path / "a.svg").read_text()


# --- refusals ---


@pytest.mark.parametrize("field", ["parameters", "win_rate", "low", "high", "level"])
@pytest.mark.parametrize("how", ["missing", "null"])
def test_a_field_that_is_not_there(tmp_path, field, how):
    broken = result(1e9)
    if how == "null":
        broken[field] = None
    else:
        del broken[field]
    with pytest.raises(SystemExit, match=rf"1\.json has no '{field}'"):
        script.main([*written(tmp_path, result(1e8), broken), "--output", str(tmp_path / "a.png")])
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": "7B"}, "'parameters' is '7B'. It must be a number"),
        ({"parameters": 0}, "'parameters' is 0"),
        ({"parameters": -7}, "'parameters' is -7"),
        ({"win_rate": True}, "'win_rate' is True"),
        ({"win_rate": math.nan}, "'win_rate' is nan"),
        ({"low": 0.9, "win_rate": 0.5}, "must lie between"),
        ({"high": 1.5}, "between 0 and 1"),
        ({"series": 3}, "'series' is 3"),
    ],
)
def test_a_field_that_does_not_fit(tmp_path, change, message):
    with pytest.raises(SystemExit, match=r"0\.json.*" + message.replace(".", r"\.")):
        script.main([*written(tmp_path, result(1e8) | change), "--output", str(tmp_path / "a.png")])


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 100_000])
def test_no_result_at_all(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(SystemExit, match=r"bad\.json .*files of judge_win_rate\.py"):
        script.main([str(tmp_path / "bad.json")])


def test_no_such_file_and_no_such_format(tmp_path):
    with pytest.raises(SystemExit, match=r"gone\.json cannot be read"):
        script.main([str(tmp_path / "gone.json")])
    with pytest.raises(SystemExit, match="must end in"):
        script.main([*written(tmp_path, result(1e8)), "--output", "a.exe"])
