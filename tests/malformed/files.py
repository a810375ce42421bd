"""Files and folders that are not what they must be."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value

from .case import BOS, EOS, NO, SO, TEXT, Make, becomes, gives, lines, logs, raw, refused

WHY = [BOS, "Why?"]
GOOD = json.dumps(TEXT)
LINES = f"{GOOD}\n" * 50
MEND = "mend or delete this one"
AN_OBJECT = 'Write {"prompt"'


def line(text: str, wrong: str, remedy: str = MEND, **how: Any):
    return refused(raw(f"{GOOD}\n{text}\n"), wrong, remedy, at="line 2", **how)


def array(text: str, wrong: str, remedy: str = "mend it", *, at: str = "line 1", **how: Any):
    return refused(raw(text, "pairs.json"), wrong, remedy, at=at, **how)


def fine(content: str | bytes, rows: int = 2, name: str = "pairs.jsonl"):
    return becomes(raw(content, name), gives(WHY, SO, NO), rows=rows)


UTF8 = "save it as UTF-8"
NO_ROWS = "Write one preference pair per row"
INFINITE = raw(f'{GOOD}\n{GOOD[:-1]}, "a": Infinity, "b": -Infinity, "c": NaN, "d": 1e999}}\n')

JSON = {
    "line cut off": line('{"prompt": "x", ', "not valid JSON .*column 16"),
    "last line cut off": refused(raw(LINES[:-9]), "not valid JSON", MEND, at="line 50"),
    "line of an array": line('["x"]', "a row must be a JSON object .*got list", AN_OBJECT),
    "line of a number": line("7", "got int", AN_OBJECT),
    "line of a string": line('"x"', "got str", AN_OBJECT),
    "line of null": line("null", "got NoneType", AN_OBJECT),
    "line of NaN": line("NaN", "got float", AN_OBJECT),
    "line of Infinity": line("-Infinity", "got float", AN_OBJECT),
    "line of an empty object": line("{}", "row|empty", AN_OBJECT),
    "line of Python": line("{'prompt': 'x'}", "not valid JSON"),
    "line of a comment": line("// x", "not valid JSON"),
    "line of HTML": line("<p>Not found</p>", "not valid JSON"),
    "a pointer in place of the file": refused(
        raw("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "not valid JSON", MEND, at="line 1"
    ),
    "comma after a line": line(f"{GOOD},", "Extra data"),
    "two objects on a line": line(GOOD + GOOD, "Extra data"),
    "double key": line('{"prompt": "x", "prompt": "y"}', "'prompt' stands twice"),
    "double key in a message": line('{"prompt": [{"role": "user", "role": "x"}]}', "'role' stands twice"),
    "integer beyond 64 bits": line(
        '{"a": 123456789012345678901}', "does not fit into 64 bits", "write it as a string"
    ),
    "integer of 5,000 digits": line(f'{{"a": {"9" * 5000}}}', "does not fit into 64 bits", "write it as a string"),
    "NaN and Infinity in a user's own column": becomes(INFINITE, gives(WHY, SO, NO)),
    "large integers beside fractions": becomes(
        lines(*[TEXT | {"a": 0.5}] * 300, TEXT | {"a": 2**53 + 1}), gives(WHY, SO, NO), rows=301
    ),
    "columns that differ": becomes(
        lines(TEXT | {"a": 1}, TEXT | {"b": [{"c": None}]}, TEXT), gives(WHY, SO, NO), rows=3
    ),
    "a column of every type": becomes(
        lines(*(TEXT | {"a": value} for value in (1, "x", None, [1], ["x"], {"y": 1}, True, 0.5, []))),
        gives(WHY, SO, NO),
        rows=9,
    ),
    "empty file": refused(raw(""), "no rows", NO_ROWS),
    "only blank lines": refused(raw("\n\n  \r\n\t\n"), "no rows", NO_ROWS),
    "only a byte order mark": refused(raw("\ufeff"), "no rows", NO_ROWS),
    "blank lines between": fine(f"\n{GOOD}\n \n\n{GOOD}\n\n"),
    "byte order mark": fine(f"\ufeff{GOOD}\n{GOOD}"),
    "Windows line ends": fine(f"{GOOD}\r\n{GOOD}\r\n"),
    "UTF-16": refused(raw(LINES.encode("utf-16")), "not UTF-8", "iconv -f UTF-16", at="line 1"),
    "UTF-16 without its mark": refused(raw(LINES.encode("utf-16-le")), "UTF-16", "iconv -f UTF-16", at="line 1"),
    "Latin-1": refused(raw(f"{GOOD}\n".encode() + '{"prompt": "é"}'.encode("latin1")), "not UTF-8", UTF8, at="line 2"),
    "nothing but null bytes": refused(raw(bytes(1000)), "null byte", "remove it", at="line 1"),
    "array that does not end": array(f"[{GOOD},\n{GOOD}", "',' or ']' expected", at="line 2"),
    "array with a broken object": array(f'[{GOOD},\n{GOOD},\n{{"prompt": }}]', "Expecting value", at="line 3"),
    "array with a number": array(f"[{GOOD},\n7]", r"row 1 of the array \(line 2\).*got int", AN_OBJECT, at="line 2"),
    "array with null": array(f"[{GOOD}, null]", "got NoneType", AN_OBJECT),
    "array in an array": array(f"[[{GOOD}]]", "got list", AN_OBJECT),
    "array with something behind": array(f"[{GOOD}]\n{GOOD}", "something follows the array", at="line 2"),
    "array with double keys": array(f'[{GOOD}, {{"prompt": "a", "prompt": "b"}}]', "'prompt' stands twice"),
    "array with half a surrogate pair": array('[{"prompt": "\\ud800"}]', "half of a character", "remove it"),
    "empty array": refused(raw("[]", "pairs.json"), "no rows", NO_ROWS),
    "an object around the rows": refused(
        raw(f'{{\n"data": [\n{GOOD}\n]}}', "pairs.json"),
        "one object whose 'data' holds the rows",
        "Save the rows alone",
    ),
    "an object around the rows, on one line": refused(
        raw(f'{{"data": [{GOOD}]}}', "pairs.json"), "one object whose 'data' holds the rows", "Save the rows alone"
    ),
    "lists as columns": refused(
        raw('{"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}', "pairs.json"),
        "'prompt': is a list of texts",
        "Only 'rejected' and 'completions'",
        at="Row 0",
    ),
}

HEADER = "prompt,chosen,rejected\n"
ROW = "Why?,So.,No.\n"
QUOTES = "between quotes"
CELL_OF_MESSAGES = '"[{""role"": ""user"", ""content"": ""q""}]"'


def csv(content: str | bytes, wrong: str, remedy: str, *, at: str | None = "line 3", **how: Any):
    return refused(raw(content, "pairs.csv"), wrong, remedy, at=at, **how)


def cells(content: str, prompt: str, rows: int = 1):
    return becomes(raw(HEADER + content, "pairs.csv"), gives([BOS, prompt], SO, NO), rows=rows)


CSV = {
    "too few cells": csv(HEADER + ROW + "a,b\n", "2 cells, and the first line names 3", QUOTES),
    "too many cells": csv(HEADER + ROW + "a,b,c,d\n", "4 cells, and the first line names 3", QUOTES),
    "quote that is not closed": csv(HEADER + ROW + '"a,b,c\n', "unexpected end of data", QUOTES),
    "quote in the middle of a quoted cell": csv(HEADER + ROW + '"a"b,c,d\n', "not valid CSV", QUOTES),
    "null byte": csv(HEADER + ROW + "a\0,b,c\n", "null byte", "remove it"),
    "Latin-1": csv((HEADER + ROW + "é,b,c\n").encode("latin1"), "not UTF-8", UTF8),
    "UTF-16": csv((HEADER + ROW).encode("utf-16"), "not UTF-8", "iconv -f UTF-16", at="line 1"),
    "empty cell": csv(HEADER + ROW + "a,,c\n", "'chosen': is None", "Fill it in", at="Row 1"),
    "column name twice": csv("prompt,chosen,chosen\na,b,c\n", "'chosen' stands twice", "Rename one", at=None),
    "semicolons": csv("prompt;chosen;rejected\na;b;c\n", "one column", "Separate columns by commas", at=None),
    "tabs": csv("prompt\tchosen\trejected\na\tb\tc\n", "one column", "Separate columns by commas", at=None),
    "spaces in names": csv(
        "prompt, chosen, rejected\na,b,c\n", "' chosen' and ' rejected' meant", "rename_column", at=None
    ),
    "no first line": csv(ROW + ROW, "no column 'chosen'", "A row needs", at=None),
    "only a first line": csv(HEADER, "no rows", NO_ROWS, at=None),
    "nothing": csv("", "no names of columns", "Its first line must be such as", at=None),
    "weight that is no number": csv(
        "prompt,chosen,rejected,weight\na,b,c,1\na,b,c,much\n",
        "'weight': a number is needed, got 'much'",
        "Write|Give",
    ),
    "weight NaN": csv(
        "prompt,chosen,rejected,weight\na,b,c,1\na,b,c,nan\n", "'weight': is nan", "Give a finite", at="Row 1"
    ),
    "lists in cells": csv(
        'prompt,completions,scores\nq,"[""a"", ""b""]","[1, 2]"\n', "'completions'", "Give a list", at="Row 0"
    ),
    "ids in cells": csv(
        'prompt_ids,chosen_ids,rejected_ids\n"[1]","[2]","[3]"\n', r"'\[1\]'", "Give at least", at="Row 0"
    ),
    "messages in cells stay text": cells(f"{CELL_OF_MESSAGES},So.,No.\n", '[{"role": "user", "content": "q"}]'),
    "numbers, dates and N/A stay text": becomes(
        raw(HEADER + "007,N/A,2024-01-01\n", "pairs.csv"),
        gives([BOS, "007"], ["N/A", EOS], ["2024-01-01", EOS]),
        rows=1,
    ),
    "None and nan stay text": becomes(
        raw(HEADER + "None,nan,null\n", "pairs.csv"), gives([BOS, "None"], ["nan", EOS], ["null", EOS]), rows=1
    ),
    "formulas stay text": cells("=1+1,So.,No.\n", "=1+1"),
    "line break in a cell": cells('"Why\r\n?",So.,No.\n', "Why\r\n?"),
    "quotes and commas in a cell": cells('"""Why"", he asks",So.,No.\n', '"Why", he asks'),
    "quote in the middle of a plain cell": cells('a"c,So.,No.\n', 'a"c'),
    "blank lines": cells(f"\n\n{ROW}\n{ROW}", "Why?", rows=2),
    "byte order mark": becomes(raw("\ufeff" + HEADER + ROW, "pairs.csv"), gives(WHY, SO, NO), rows=1),
    "cell of 200 KB": cells(f"{'x' * 200_000},So.,No.\n", "x" * 200_000),  # the csv module's own limit is 128 KiB
}

DAMAGED = "Download or compress it again"
GZ = gzip.compress(LINES.encode())
FLIPPED = GZ[:-8] + bytes([GZ[-8] ^ 255]) + GZ[-7:]  # in its checksum
RENAME = "rename or convert it"


def gz(content: bytes, wrong: str, remedy: str = DAMAGED, *, at: str | None = None):
    return refused(raw(content, "pairs.jsonl.gz"), wrong, remedy, at=at)


def parquet(columns: Mapping[str, Any]) -> Make:
    def make(folder: Path) -> str:
        pq.write_table(pa.table(dict(columns)), folder / "pairs.parquet")
        return str(folder / "pairs.parquet")

    return make


def broken_images(folder: Path, column: str = "photo") -> str:
    features = Features({name: Value("string") for name in TEXT} | {column: Image()})
    row = TEXT | {column: {"bytes": b"garbage", "path": None}}
    Dataset.from_list([row, row], features=features).to_parquet(folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


PLAIN = {name: pa.array([value, value]) for name, value in TEXT.items()}
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok")]
)
BYTES = pa.array([b"q", b"q"])

OTHER_FILES = {
    "gz cut off": gz(GZ[:-20], "damaged"),
    "gz with a wrong bit": gz(FLIPPED, "damaged"),
    "gz that is none": gz(b"not gz", "damaged, or no gzip"),
    "gz with something behind": gz(GZ + b"behind", "damaged, or no gzip"),
    "gz of nothing": gz(gzip.compress(b""), "no rows", NO_ROWS),
    "gz twice": gz(gzip.compress(GZ), "not UTF-8", "UTF-8|gzip", at="line 1"),
    "gz under another name": refused(raw(GZ), "not UTF-8", "UTF-8|gz", at="line 1"),
    "csv.gz cut off": refused(
        raw(gzip.compress((HEADER + ROW * 50).encode())[:-9], "pairs.csv.gz"), "damaged", DAMAGED
    ),
    "parquet of garbage": refused(
        raw(b"garbage" * 9, "pairs.parquet"), "cannot be read as parquet", "Download or write"
    ),
    "parquet of nothing": refused(
        raw(b"", "pairs.parquet"), "cannot be read as parquet", "Download or write it again"
    ),
    "parquet whose middle is missing": refused(
        raw(b"PAR1" + bytes(99) + b"PAR1", "pairs.parquet"), "cannot be read as parquet", "Download or write it again"
    ),
    "parquet without rows": refused(
        parquet({name: column[:0] for name, column in PLAIN.items()}), "no rows", "Remove it, or write it again"
    ),
    "parquet of bytes": refused(
        parquet(PLAIN | {"prompt": BYTES}), "'prompt': is of type bytes", "Give a string", at="Row 0"
    ),
    "parquet of strings that are not UTF-8": refused(
        parquet(PLAIN | {"prompt": NOT_UTF8}), "UTF-8", "Write|Save|Mend"
    ),
    "parquet of None": refused(
        parquet(PLAIN | {"chosen": pa.nulls(2)}), "'chosen': is None", "Fill it in", at="Row 0"
    ),
    "parquet of token ids beyond int64": refused(
        parquet(
            {"prompt_ids": pa.array([[2**64 - 1]], pa.list_(pa.uint64())), "chosen_ids": [[1]], "rejected_ids": [[2]]}
        ),
        "18446744073709551615",
        "Give at least one token id",
        at="Row 0",
    ),
    "parquet of dictionaries and large strings": becomes(
        parquet(
            PLAIN | {"prompt": PLAIN["prompt"].dictionary_encode(), "chosen": PLAIN["chosen"].cast(pa.large_string())}
        ),
        gives(WHY, SO, NO),
    ),
    "parquet with broken images in a user's own column": becomes(broken_images, gives(WHY, SO, NO)),
    "parquet with images that the model would not see": refused(
        lambda folder: broken_images(folder, "image"), "Row 0 .* reads text alone", "take the images out"
    ),
    "parquet with a column no dataset can hold": refused(
        parquet(PLAIN | {"a": pa.array([[("k", 1)]] * 2, pa.map_(pa.string(), pa.int8()))}),
        "map",
        "[Rr]emove|[Ll]eave out",
    ),
    "unknown ending": refused(raw(LINES, "pairs.txt"), "ends in none of .json", RENAME),
    "no ending": refused(raw(LINES, "pairs"), "ends in none of .json", RENAME),
    "another compression": refused(raw(LINES, "pairs.jsonl.zst"), "ends in none of .json", RENAME),
    "tab-separated": refused(raw(LINES, "pairs.tsv"), "ends in none of .json", RENAME),
    "name with jokers": fine(LINES, 50, name="a [1]*?.jsonl"),
    "name with colons": fine(LINES, 50, name="a::b.jsonl"),
}


def folder(**files: str | bytes) -> Make:
    """A folder of files; `__` in a name stands for a dot."""

    def make(inside: Path) -> str:
        (inside / "data").mkdir()
        for name, content in files.items():
            raw(content, name.replace("__", "."))(inside / "data")
        return str(inside / "data")

    return make


def folder_named_as_file(inside: Path) -> str:
    path = inside / "pairs.jsonl"
    path.mkdir()
    raw(LINES)(path)
    return str(path)


def circle(inside: Path) -> str:
    os.symlink(inside / "b.jsonl", inside / "a.jsonl")
    os.symlink(inside / "a.jsonl", inside / "b.jsonl")
    return str(inside / "a.jsonl")


def locked(inside: Path) -> str:
    path = raw(LINES)(inside)
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read every file")
    return path


def pipe(inside: Path) -> str:
    os.mkfifo(inside / "pairs.jsonl")
    return str(inside / "pairs.jsonl")


def saved(**broken: bytes | None) -> Make:
    """What `save_to_disk` wrote, with some files replaced or removed."""

    def make(inside: Path) -> str:
        Dataset.from_list([TEXT] * 50).save_to_disk(inside / "data")
        for name, content in broken.items():
            (path,) = (inside / "data").glob(name.replace("__", "."))
            path.unlink() if content is None else path.write_bytes(content)
        return str(inside / "data")

    return make


def reader(inside: Path) -> str:
    """The name of a reader inside `datasets`, in a folder with files for it."""
    raw(LINES, "private.json")(inside)
    return "json"


def no_name(inside: Path) -> str:
    raw(LINES)(inside)
    return ""


AGAIN = "Save it again"

FOLDERS = {
    "named like a file": becomes(folder_named_as_file, gives(WHY, SO, NO), rows=50),
    "empty": refused(folder(), "has no dataset in it .it is empty", "[Pp]ut|[Gg]ive|[Ss]ave"),
    "without data": refused(folder(notes__docx="x"), "No .supported. data files", "Give one of its files"),
    "with a broken description": refused(
        folder(README__md="---\nconfigs: [\n---\n", pairs__jsonl=LINES),
        "cannot be read as a dataset",
        "Give one of its files",
    ),
    "with one broken file": refused(
        folder(a__jsonl=LINES, b__jsonl="{"), "b.jsonl, line 1: not valid JSON", "mend it"
    ),
    "with a file of other columns": refused(
        folder(a__jsonl=LINES, b__jsonl='{"a": 1}\n'), "'prompt': is None", "Fill it in", at="Row 50"
    ),
    "with an unknown compression": refused(
        folder(a__jsonl__zip="x"), "a.jsonl.zip is not a plain json file", "unpack it"
    ),
    "with two kinds of files": becomes(
        folder(a__jsonl=LINES, b__csv=HEADER + ROW), logs("Not read from the folder .*: b.csv"), rows=50
    ),
    "with a file beside a split": becomes(
        folder(train__jsonl=LINES, b__jsonl=LINES), logs("Not read from the folder .*: b.jsonl"), rows=50
    ),
    "with an empty file": becomes(folder(a__jsonl=LINES, b__jsonl=""), gives(WHY, SO, NO), rows=50),
    "symlinks in a circle": refused(circle, "leads nowhere, or in a circle", "Give what it should lead to"),
    "a file that may not be read": refused(
        locked, "cannot be read .Permission denied", "Check that .*you may read it"
    ),
    "a pipe": refused(pipe, "neither a file nor a folder", "save the rows to a file"),
    "a name like that of a file": refused(
        lambda inside: raw(LINES)(inside).replace("pairs", "pars"),
        "no dataset file or folder",
        "Did you mean 'pairs.jsonl'",
    ),
    "a name too long": refused(
        lambda inside: str(inside / ("a" * 300 + ".jsonl")), "cannot be read.*File name too long", "Check"
    ),
    "the name of a reader": refused(reader, "it is one of a reader", "Check|[Gg]ive"),
    "no name": refused(no_name, "The name of the dataset is empty", "Give a file, a folder", names_file=False),
    "saved, half written": refused(saved(state__json=b"{"), "empty or damaged", AGAIN),
    "saved, rows missing": refused(saved(**{"*__arrow": None}), "empty or damaged", AGAIN),
    "saved, rows cut off": refused(saved(**{"*__arrow": b"ARROW1\0\0garbage"}), "empty or damaged", AGAIN),
    "saved, description missing": refused(saved(dataset_info__json=None), "empty or damaged", AGAIN),
    "saved without a row": refused(
        lambda inside: Dataset.from_list([TEXT]).select([]).save_to_disk(inside / "data") or str(inside / "data"),
        "empty or damaged|no rows",
        AGAIN,
    ),
}
