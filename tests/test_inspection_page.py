"""Hostile data on the page and in the terminal, and the page in a browser: nothing runs, nothing is fetched, a phone can read it."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from rich.console import Console

from dpo_trainer.cli import ModelArguments
from dpo_trainer.inspection import Inspection, InspectionArguments, inspect
from dpo_trainer.inspection.page import page, write_page
from dpo_trainer.inspection.parts import in_order
from dpo_trainer.inspection.terminal import print_inspection

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</textarea></title></style><img src=x onerror=document.title='owned'>",
    "\" onmouseover=\"document.title='owned'",
    "{{7*7}}{% for x in y %}",
    "<!--",
    "]]>&lt;b&gt;",
]
ESCAPES = ["\x1b]0;owned\x07", "\x1b[2J\x1b[1;1H", "\x9b31m", "[red]markup[/red]", ":smile:", "\u202egnp"]
LONG = "x" * 300


def hostile_tokenizer():
    """Each hostile text is one token, so that it reaches the page in one piece."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([*HOSTILE, *ESCAPES, LONG])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>", "<script>alert(1)</script>"]})
    return tokenizer


def hostile_rows() -> list[dict]:
    """Every text as prompt, chosen and rejected; a row that cannot be read; a control token with a bad name."""
    texts = [*HOSTILE, *ESCAPES, LONG]
    rows: list[dict] = [
        {"prompt": text, "chosen": f" {text} yes", "rejected": f" no {other}", "weight": None}
        for text, other in zip(texts, texts[1:] + texts[:1], strict=True)
    ]
    rows += [{"prompt": "q <script>alert(1)</script>", "chosen": " a", "rejected": " b", "weight": None}]
    bad = [{"prompt": "q", "chosen": None, "rejected": text, "weight": None} for text in texts]
    return rows + bad + [{"prompt": "q", "chosen": "a", "rejected": "b", "weight": -1.0}]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Inspection:
    """Names of files and models are data too."""
    folder = tmp_path_factory.mktemp("inspection")
    tokenizer = hostile_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    name = f"<script>document.title='owned'</script>\x1b[31m{LONG}.jsonl"
    return inspect(
        in_order([name], [Dataset.from_list(hostile_rows())]),
        tokenizer,
        tiny.config(folder),
        ModelArguments(model_name_or_path=str(folder / "model")),
        InspectionArguments(show=20),
    )


class Elements(HTMLParser):
    """Names of elements, addresses, attributes, and the text outside of <style>."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.text += data


def shown(text: str) -> str:
    """As the page writes it: spaces of tokens are dots."""
    return text.replace(" ", "·")


def check_harmless(text: str) -> None:
    elements = Elements(text)
    known = set(
        "html head meta title style body h1 h2 h3 p ul li b div table thead tr th tbody td img span wbr".split()
    )
    assert set(elements.tags) == known
    assert not [name for name in elements.attributes if name.startswith("on")]
    assert elements.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in elements.addresses)
    assert "@import" not in text
    assert "url(" not in text
    for hostile in HOSTILE:
        assert shown(hostile) in elements.text, hostile
    assert "\x1b" not in text


def test_the_page_is_text_and_pictures_alone(found):
    """As Python's parser reads it, which is not the browser's: that comes below."""
    text = page(found)
    check_harmless(text)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "49" not in re.findall(r'class="t[^>]*>([^<]*)<', text), "a template in the data was run"


def test_no_template_marks_data_as_safe():
    template = (Path(__file__).parents[1] / "dpo_trainer" / "inspection" / "page.html").read_text()
    assert "safe" not in re.findall(r"\|\s*(\w+)", template)
    assert "autoescape" not in template


def test_the_same_numbers_give_the_same_page(found):
    assert page(found) == page(found)


# --- in a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=5000"
).split()


def dom(text: str, folder: Path, name: str = "page.html") -> str:
    """The document after the browser has read it, and run what it runs."""
    (folder / name).write_text(text, encoding="utf-8")
    profile = folder / f"profile-{name}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", (folder / name).as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.lstrip().startswith("<!DOCTYPE html>"), done.stderr[-2000:]
    return done.stdout


def title(document: str) -> str:
    return html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1])


@needs_browser
def test_no_script_runs_in_a_browser(found, tmp_path):
    """The title is still the page's, and the browser sees the elements that the template has and no others."""
    document = dom(page(found), tmp_path)
    assert title(document) == title(page(found)) != "owned"
    check_harmless(document)


@needs_browser
def test_a_script_would_run_and_the_policy_would_stop_it(found, tmp_path):
    """Else the test above proved nothing: the same script, not escaped, without the policy and with it."""
    open_ = page(found).replace("<h1>", f"{HOSTILE[0]}<h1>", 1)
    assert title(dom(re.sub(r"<meta http-equiv=[^\n]*\n", "", open_), tmp_path, "open.html")) == "owned"
    assert title(dom(open_, tmp_path, "guarded.html")) == title(page(found))


WIDTHS = "<script>parent.postMessage(document.documentElement.scrollWidth + ' of ' + innerWidth, '*')</script></body>"
PHONE = (
    "<!doctype html><title>not heard</title><script>onmessage = heard => { document.title = heard.data }</script>"
    '<iframe src="inner.html" style="width: 390px; height: 800px; border: 0"></iframe>'
)


def widths(text: str, folder: Path, name: str) -> tuple[int, int]:
    """(width of the content, width of the window) on a phone: in a frame, as the window of a browser is not that narrow.

    Measured by a script, in a copy of the page that lets it run.
    """
    inner = re.sub(r"<meta http-equiv=[^\n]*\n", "", text).replace("</body>", WIDTHS)
    (folder / "inner.html").write_text(inner, encoding="utf-8")
    content, window = map(int, title(dom(PHONE, folder, name)).split(" of "))
    return content, window


@needs_browser
def test_a_phone_shows_the_whole_width(found, tmp_path):
    """With a token and a name of 300 letters, nothing sticks out of 390 pixels."""
    text = page(found)
    content, window = widths(text, tmp_path, "phone.html")
    assert content <= window == 390
    content, _ = widths(text.replace("overflow-wrap: anywhere", ""), tmp_path, "wide.html")
    assert content > window, "nothing on this page could stick out, so the lines above prove nothing"


# --- the terminal and the file ---


def printed(found: Inspection, **options) -> str:
    file = io.StringIO()
    print_inspection(found, Console(file=file, width=100, highlight=False, markup=False, emoji=False, **options))
    return file.getvalue()


def test_data_does_not_drive_the_terminal(found):
    """What is left without rich's own colours has no control character but line breaks, and says what the data says."""
    coloured = printed(found, force_terminal=True, color_system="truecolor", legacy_windows=False)
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert plain != coloured
    assert plain == printed(found)
    assert all(char.isprintable() or char == "\n" for char in plain)
    for text in (r"\x1b]0;owned\x07", r"\x1b[2J\x1b[1;1H", r"\x9b31m", "[red]markup[/red]", ":smile:", r"\u202egnp"):
        assert text in plain


def test_marks_in_the_terminal_do_not_need_colours(found):
    text = printed(found)
    assert "[[<|end|>]]" in text
    assert "chosen: " in text
    assert "{{" in text


def test_numbers_are_plain_json(found, tmp_path):
    numbers = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert numbers == found.to_json() | {"parts": []}
    assert numbers["format"] == 1
    assert numbers["rows"]["read"] == len(hostile_rows())
    assert numbers["rows"]["bad"] == len(HOSTILE) + len(ESCAPES) + 2  # LONG, and the weight
    assert numbers["control_text"] == {"<script>alert(1)</script>": {"rows": 1, "first": [13]}}
    write_page(found, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page(found)
