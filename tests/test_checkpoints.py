"""A checkpoint is whole, or it is not there: whatever is damaged, killed or full."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_trainer.checkpointing import (
    ASIDE,
    MANIFEST,
    CheckpointError,
    broken_file,
    checked_checkpoint,
    fresh_aside,
    last_complete_checkpoint,
    publish,
    recover,
    retire,
    saving,
    seal,
    tidy,
)

FILES = {
    "model.safetensors": b"\x01" * 5000,
    "trainer_state.json": b"{}",
    "optimizer/shard-0.bin": b"\x02" * 300,
    "empty": b"",
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def checkpoint(output_dir: Path, step: int = 1, files: dict[str, bytes] = FILES) -> Path:
    """A checkpoint, written as the trainer does it."""
    final = output_dir / f"checkpoint-{step}"
    with saving(final):
        aside = write(fresh_aside(output_dir, final.name), files)
        seal(aside)
        publish(aside, final)
    return final


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {name: path.read_bytes() for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST}


# --- whole ---


def test_published_checkpoint_is_whole_and_alone(tmp_path):
    final = checkpoint(tmp_path / "new" / "out")
    assert broken_file(final) is None
    assert contents(final) == FILES
    assert os.listdir(final.parent) == [final.name]  # nothing is left aside


def test_checksum_is_xxh3_of_the_content(tmp_path):
    """The published digest of no bytes; a file of several blocks has one digest, whatever the size of the blocks."""
    final = checkpoint(tmp_path)
    listed = json.loads((final / MANIFEST).read_bytes())["files"]
    assert listed["empty"] == {"size": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}
    assert listed.keys() == FILES.keys()


def test_content_of_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_trainer.checkpointing.manifest.BLOCK", 999)
    final = checkpoint(tmp_path)
    monkeypatch.undo()
    assert broken_file(final) is None


def test_files_that_are_added_do_no_harm(tmp_path):
    final = checkpoint(tmp_path)
    write(final, {"README.md": b"my best run", "notes/today.txt": b""})
    assert broken_file(final) is None


def test_linked_files_and_folders_are_content(tmp_path):
    shared = write(tmp_path / "shared")
    aside = fresh_aside(tmp_path / "out", "checkpoint-1")
    (aside / "model.safetensors").symlink_to(shared / "model.safetensors")
    (aside / "all").symlink_to(shared)
    seal(aside)
    publish(aside, tmp_path / "out" / "checkpoint-1")
    assert broken_file(tmp_path / "out" / "checkpoint-1") is None
    (shared / "trainer_state.json").write_bytes(b"[]")
    assert "'all/trainer_state.json' has other content" in broken_file(tmp_path / "out" / "checkpoint-1")


def test_sealed_again_after_a_change(tmp_path):
    folder = write(tmp_path / "a")
    seal(folder)
    flipped(folder)
    assert broken_file(folder)
    seal(folder)
    assert broken_file(folder) is None
    assert MANIFEST not in json.loads((folder / MANIFEST).read_bytes())["files"]


def test_what_cannot_be_sealed(tmp_path):
    with pytest.raises(ValueError, match="holds no file: write the checkpoint before"):
        seal(fresh_aside(tmp_path, "checkpoint-1"))
    os.mkfifo(write(tmp_path / "a") / "pipe")  # reading it would wait for ever
    with pytest.raises(ValueError, match=r"a/pipe is not a file, nor a link to one"):
        seal(tmp_path / "a")


def test_publish_refuses_what_is_not_sealed(tmp_path):
    aside = write(fresh_aside(tmp_path, "checkpoint-1"))
    with pytest.raises(ValueError, match=rf"has no {MANIFEST}: seal it before"):
        publish(aside, tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()


def test_everything_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut cannot be tested here; the order that guards against one can."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def path_of(descriptor: int) -> str:
        inode = os.fstat(descriptor).st_ino
        paths = [tmp_path, *tmp_path.rglob("*")]
        return next(p.relative_to(tmp_path).as_posix() for p in paths if p.stat().st_ino == inode)

    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(path_of(descriptor)), fsync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to)))
    checkpoint(tmp_path)

    aside = f"{ASIDE}/checkpoint-1"
    content = {f"{aside}/{name}" for name in FILES} | {aside, f"{aside}/optimizer"}
    assert set(events[: len(content)]) == content
    assert events[len(content) :] == [f"{aside}/{MANIFEST}", aside, "rename", ".", ASIDE]


# --- broken ---


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4999)


def emptied(folder: Path) -> None:
    (folder / "optimizer/shard-0.bin").write_bytes(b"")


def grown(folder: Path) -> None:
    (folder / "empty").write_bytes(b"x")


def flipped(folder: Path) -> None:
    data = bytearray(FILES["model.safetensors"])
    data[4321] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def missing(folder: Path) -> None:
    (folder / "optimizer/shard-0.bin").unlink()


def missing_folder(folder: Path) -> None:
    shutil.rmtree(folder / "optimizer")


def file_for_folder(folder: Path) -> None:
    missing_folder(folder)
    (folder / "optimizer").write_bytes(b"")


def folder_for_file(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()
    (folder / "trainer_state.json").mkdir()


def dangling_link(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()
    (folder / "trainer_state.json").symlink_to("nowhere")


def no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def manifest_is_folder(folder: Path) -> None:
    no_manifest(folder)
    (folder / MANIFEST).mkdir()


def manifest_cut(folder: Path) -> None:
    os.truncate(folder / MANIFEST, (folder / MANIFEST).stat().st_size // 2)


def manifest_holds(text: str | bytes) -> Callable[[Path], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / MANIFEST).write_bytes(data) and None


def manifest_lists(name: str, **entry: object) -> Callable[[Path], None]:
    """A true entry for a file, under another name or with other values."""
    true = {"size": 2, "xxh3_128": "0" * 32}
    return manifest_holds(json.dumps({"files": {name: {**true, **entry}}}))


BREAKAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, r"'model.safetensors' has 4999 bytes instead of 5000$"),
    "emptied": (emptied, r"'optimizer/shard-0.bin' has 0 bytes instead of 300$"),
    "grown": (grown, r"'empty' has 1 bytes instead of 0$"),
    "flipped byte": (flipped, r"'model.safetensors' has other content than was written"),
    "missing": (missing, r"'optimizer/shard-0.bin' is missing$"),
    "missing folder": (missing_folder, r"'optimizer/shard-0.bin' is missing$"),
    "file for folder": (file_for_folder, r"'optimizer/shard-0.bin' is missing$"),
    "folder for file": (folder_for_file, r"'trainer_state.json' is not a file$"),
    "dangling link": (dangling_link, r"'trainer_state.json' is missing$"),
    "no manifest": (no_manifest, r"it has no manifest.json: not written by DPOTrainer, or not finished$"),
    "empty folder": (empty_folder, r"it has no manifest.json"),
    "a file": (a_file, r"it is not a folder$"),
    "manifest is a folder": (manifest_is_folder, r"it has no manifest.json"),
    "manifest cut": (manifest_cut, r"manifest.json is damaged"),
    "manifest empty": (manifest_holds(""), r"manifest.json is damaged"),
    "manifest garbage": (manifest_holds(b"\xff\x00\xfe"), r"manifest.json is damaged"),
    "manifest a list": (manifest_holds("[1]"), r"manifest.json is damaged \(it lists no files\)"),
    "manifest without files": (manifest_holds("{}"), r"manifest.json is damaged \(it lists no files\)"),
    "manifest with no files": (manifest_holds('{"files": {}}'), r"manifest.json is damaged \(it lists no files\)"),
    "files a list": (manifest_holds('{"files": ["a"]}'), r"manifest.json is damaged \(it lists no files\)"),
    "entry a list": (manifest_holds('{"files": {"a": [1]}}'), r"does not tell size and checksum of 'a'"),
    "deep": (manifest_holds("[" * 100_000), r"manifest.json is damaged \(maximum recursion depth"),
    "long number": (
        manifest_holds('{"files": ' + "9" * 10_000 + "}"),
        r"manifest.json is damaged \(Exceeds the limit",
    ),
    "huge": (manifest_holds(b" " * (16 << 20) + b"{}"), r"manifest.json is damaged \(it has more than 16777216 bytes"),
    "path upwards": (manifest_lists("../outside"), r"'../outside' is not a path inside the checkpoint"),
    "path down and up": (manifest_lists("a/../../outside"), r"is not a path inside the checkpoint"),
    "path absolute": (manifest_lists("/etc/hostname"), r"'/etc/hostname' is not a path inside the checkpoint"),
    "path empty": (manifest_lists(""), r"'' is not a path inside the checkpoint"),
    "path of the folder": (manifest_lists("."), r"'.' is not a path inside the checkpoint"),
    "path with a zero byte": (manifest_lists("a\0b"), r"'a\\x00b' is not a path inside the checkpoint"),
    "path no file can have": (manifest_lists("\ud800"), r"'\\ud800' is missing"),
    "path too long": (manifest_lists("a" * 300), r"'a+' (cannot be read \(File name too long\)|is missing)"),
    "size a text": (manifest_lists("empty", size="0"), r"does not tell size and checksum of 'empty'"),
    "size a truth value": (manifest_lists("empty", size=False), r"does not tell size and checksum of 'empty'"),
    "size not a number": (manifest_lists("empty", size=float("nan")), r"does not tell size and checksum"),
    "size negative": (manifest_lists("empty", size=-1), r"'empty' has 0 bytes instead of -1"),
    "checksum a number": (manifest_lists("empty", size=0, xxh3_128=0), r"does not tell size and checksum of 'empty'"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_checkpoint_names_the_file_and_is_skipped(breakage, tmp_path, caplog):
    first, second, third = (checkpoint(tmp_path, step) for step in (2, 10, 9))
    assert last_complete_checkpoint(tmp_path) == second  # by number: not by name (9), not by time (9)
    damage, reason = BREAKAGES[breakage]
    write(tmp_path, {"outside": b"{}"})  # where a path that escapes would lead
    damage(second)
    assert re.search(reason, broken_file(second) or "whole")
    assert not caplog.records

    assert last_complete_checkpoint(tmp_path) == third
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.getMessage().startswith(f"{second} is skipped: ")
    assert re.search(reason.rstrip("$"), warning.getMessage())

    with pytest.raises(ValueError, match=reason.rstrip("$")) as error:
        checked_checkpoint(second)
    assert str(second) in str(error.value)
    assert f"Complete ones: {third}, {first}." in str(error.value)


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..", MANIFEST)
)
trees = st.dictionaries(names, st.binary(max_size=50), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(tree=trees, data=st.data())
def test_any_change_of_any_file_is_found(tree, data):
    with tempfile.TemporaryDirectory() as made:
        folder = write(Path(made), {f"sub/{name}": content for name, content in tree.items()})
        seal(folder)
        assert broken_file(folder) is None
        name = data.draw(st.sampled_from(sorted(tree)))
        other = data.draw(st.none() | st.binary(max_size=50).filter(lambda content: content != tree[name]))
        if other is None:
            (folder / "sub" / name).unlink()
        else:
            (folder / "sub" / name).write_bytes(other)
        assert repr(f"sub/{name}") in broken_file(folder)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    manifest=anything
    | st.fixed_dictionaries({"files": anything})
    | st.fixed_dictionaries({"files": st.dictionaries(st.text(max_size=5), anything, max_size=3)})
)
def test_no_manifest_from_elsewhere_passes_or_crashes(manifest):
    """None of these lists a true file with its true checksum."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_text(json.dumps(manifest))
        assert broken_file(Path(folder))


def test_unreadable_content_is_a_reason(tmp_path, monkeypatch):
    final = checkpoint(tmp_path)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("dpo_trainer.checkpointing.manifest.content", fail)
    assert broken_file(final) == "'empty' cannot be read (Input/output error)"
    assert broken_file(final, read=False) is None  # else the above would be no matter of reading


# --- the last one, and the one that the user named ---


def test_nothing_to_resume_from(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path / "not there") is None
    assert last_complete_checkpoint(tmp_path) is None
    write(
        tmp_path,
        {"checkpoint-x/a": b"", "my-checkpoint-3/a": b"", "checkpoint-3-old/a": b"", "model.safetensors": b""},
    )
    assert last_complete_checkpoint(tmp_path) is None
    assert not caplog.records


def test_checked_checkpoint(tmp_path, caplog, monkeypatch):
    final = checkpoint(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (final, str(final), f"{final}/", "~/checkpoint-1"):
        assert checked_checkpoint(path) == final
    renamed = final.rename(tmp_path / "the one before dinner")
    assert checked_checkpoint(renamed) == renamed
    assert not caplog.records


def test_a_folder_of_checkpoints_is_not_a_checkpoint(tmp_path):
    one, two = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=f"it has no {MANIFEST}.*Complete ones: {two}, {one}"):
        checked_checkpoint(tmp_path)


@pytest.mark.parametrize("force", [False, True])
def test_a_path_that_is_no_folder_is_refused_even_by_force(force, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint-7 .* it does not exist.*no complete one beside it"):
        checked_checkpoint(tmp_path / "checkpoint-7", force=force)
    write(tmp_path, {"checkpoint-7": b""})
    with pytest.raises(ValueError, match="it is not a folder") as error:
        checked_checkpoint(tmp_path / "checkpoint-7", force=force)
    assert "--force_resume" not in str(error.value)


def test_force_only_warns(tmp_path, caplog):
    foreign = write(tmp_path / "checkpoint-5")
    with pytest.raises(
        ValueError, match=r"not written by DPOTrainer, or not finished.*--force_resume uses it as it is"
    ):
        checked_checkpoint(foreign)
    assert not caplog.records
    assert checked_checkpoint(foreign, force=True) == foreign
    assert "not written by DPOTrainer" in caplog.text


# --- replaced, left behind ---


def test_fresh_aside_starts_empty(tmp_path):
    write(fresh_aside(tmp_path, "checkpoint-1"))
    write(tmp_path / ASIDE / "checkpoint-40")
    aside = fresh_aside(tmp_path, "checkpoint-1")
    assert aside == tmp_path / ASIDE / "checkpoint-1"
    assert os.listdir(aside) == []
    assert os.listdir(tmp_path / ASIDE) == ["checkpoint-1"]


def a_link(path: Path) -> None:
    path.symlink_to(write(path.parent / "elsewhere"))


@pytest.mark.parametrize("there", [write, a_file, a_link], ids=["folder", "file", "link"])
def test_what_has_the_name_is_replaced(there, tmp_path):
    final = tmp_path / "checkpoint-1"
    if there is a_file:
        final.mkdir()
    there(final)
    assert checkpoint(tmp_path, files={"new": b"1"}) == final
    assert contents(final) == {"new": b"1"}
    assert not final.is_symlink()
    assert not (tmp_path / ASIDE).exists()
    assert there is not a_link or contents(tmp_path / "elsewhere") == FILES  # what a link leads to is not ours


def test_killed_between_the_two_renames(tmp_path, caplog):
    """The old one gets its name back, whoever looks first; the unfinished one does not."""
    for look in (
        lambda: last_complete_checkpoint(tmp_path),
        lambda: checked_checkpoint(tmp_path / "checkpoint-2"),
        lambda: fresh_aside(tmp_path, "checkpoint-3") and tmp_path / "checkpoint-2",
    ):
        old = checkpoint(tmp_path, 2)
        aside = fresh_aside(tmp_path, "checkpoint-2")
        old.rename(tmp_path / ASIDE / "checkpoint-2.old")
        write(aside, {"new": b""})
        caplog.clear()
        assert look() == old
        assert "has its name again" in caplog.text
        assert broken_file(old) is None
        assert contents(old) == FILES


def test_killed_after_the_two_renames(tmp_path, caplog):
    """The new one stays, and the old one goes, whole or half removed."""
    new = checkpoint(tmp_path, files={"new": b"1"})
    write(tmp_path / ASIDE / "checkpoint-1.old")
    assert last_complete_checkpoint(tmp_path) == new
    assert contents(new) == {"new": b"1"}
    assert not (tmp_path / ASIDE).exists()
    assert not caplog.records


def test_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    final = checkpoint(tmp_path)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if target == final and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt):
        checkpoint(tmp_path, files={"new": b"1"})
    assert contents(final) == FILES
    assert os.listdir(tmp_path) == [final.name]


def test_what_cannot_be_removed_is_told(tmp_path, monkeypatch, caplog):
    checkpoint(tmp_path)

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    write(tmp_path / ASIDE / "checkpoint-1.old")
    recover(tmp_path)
    assert "checkpoint-1.old could not be removed" in caplog.text
    assert "to have its space back" in caplog.text


# --- killed ---

TWO_CONTENTS = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from dpo_trainer.checkpointing import fresh_aside, publish, saving, seal

    def save(output_dir, step, value):
        final = output_dir / f"checkpoint-{step}"
        with saving(final):
            aside = fresh_aside(output_dir, final.name)
            (aside / "optimizer").mkdir()
            for name in ("a", "b", "optimizer/c"):
                (aside / name).write_bytes(value * 20_000)
            seal(aside)
            publish(aside, final)
""")


def python(script: str, *arguments: object, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


def test_killed_at_every_step(tmp_path):
    """The process dies at its k-th opening, renaming or removing, for every k until it ends by itself.

    The first checkpoint replaces one of its name, the second is new. Each time what is left is all old or all new.
    """
    script = TWO_CONTENTS + textwrap.dedent("""
        left = [-1]

        def die(event, arguments):
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree"):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        output_dir = Path(sys.argv[1])
        save(output_dir / "warm", 1, b"-")
        sys.addaudithook(die)
        for k in range(1, 1000):
            folder = output_dir / str(k)
            save(folder, 1, b"old")
            if not (child := os.fork()):
                left[0] = k
                save(folder, 1, b"new")
                save(folder, 2, b"new")
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                break
        print(k)
    """)
    out, _ = python(script, tmp_path).communicate(timeout=60)
    moments = int(out)
    assert moments > 30  # else hardly anything was interrupted
    seen = []
    for k in range(1, moments + 1):
        folder = tmp_path / str(k)
        last = last_complete_checkpoint(folder)
        assert last is not None
        present = sorted(path for path in folder.iterdir() if path.name != ASIDE)
        assert [broken_file(path) for path in present] == [None] * len(present)
        values = ["".join(sorted({content[:3].decode() for content in contents(path).values()})) for path in present]
        seen.append(values)
    in_order = [["old"], ["new"], ["new", "new"]]
    assert [values for values, before in zip(seen, [None, *seen]) if values != before] == in_order


def test_killed_at_random_moments(tmp_path):
    """10 times -9, over one folder that goes on growing from where it was left."""
    script = TWO_CONTENTS + textwrap.dedent("""
        output_dir, step = Path(sys.argv[1]), int(sys.argv[2])
        while True:
            save(output_dir, step, bytes([step % 256]))
            print(step, flush=True)
            step += 1
    """)
    draw = random.Random(0)
    reached, unfinished = 0, 0
    for _ in range(10):
        process = python(script, tmp_path, reached + 1)
        assert process.stdout.readline()  # it has begun
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        lines = process.communicate()[0].split("\n")
        unfinished += (tmp_path / ASIDE).exists()
        reported = int(lines[-2]) if len(lines) > 1 else reached + 1
        last = last_complete_checkpoint(tmp_path)
        reached = int(last.name.removeprefix("checkpoint-"))
        assert reached >= reported
    whole = [broken_file(path) for path in tmp_path.glob("checkpoint-*")]
    assert whole == [None] * reached
    assert unfinished  # else no kill ever hit a save


# --- a full disk ---

WRITERS = textwrap.dedent("""
    import json, os, resource, signal, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from dpo_trainer.checkpointing import CheckpointError, broken_file, fresh_aside, publish, saving, seal

    output_dir = Path(sys.argv[1])
    # 4 MB and more each, on a disk of 2 MB, or with files of at most 0.3 MB.
    large = {"w": torch.zeros(1_000_000)}
    tokens = Tokenizer(models.BPE(vocab={f"token {i:09d}": i for i in range(150_000)}, merges=[]))

    def through_a_stream(path):
        with open(path, "wb") as stream:
            torch.save(large, stream)

    def many_small(folder):
        folder.mkdir()
        for i in range(2000):
            torch.save(torch.zeros(500 + i), folder / str(i))

    WRITERS = {
        "safetensors": lambda aside: save_file(large, aside / "x"),
        "torch": lambda aside: torch.save(large, aside / "x"),
        "torch, stream": lambda aside: through_a_stream(aside / "x"),
        "torch, old format": lambda aside: torch.save(large, aside / "x", _use_new_zipfile_serialization=False),
        "tokenizers": lambda aside: tokens.save(str(aside / "x")),
        "python": lambda aside: (aside / "x").write_bytes(bytes(4_000_000)),
    }
    if sys.argv[2] == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        WRITERS["torch, small"] = lambda aside: torch.save({str(i): torch.zeros(99) for i in range(2000)}, aside / "x")
    else:
        WRITERS["torch, many files"] = lambda aside: many_small(aside / "x")

    def save(step, write):
        final = output_dir / f"checkpoint-{step}"
        with saving(final):
            aside = fresh_aside(output_dir, final.name)
            write(aside)
            seal(aside)
            publish(aside, final)

    save(1, lambda aside: save_file({"w": torch.ones(10)}, aside / "x"))
    for name, write in WRITERS.items():
        if sys.argv[2] == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        try:
            save(2, write)
            told = None
        except CheckpointError as error:
            told = str(error)
        except Exception as error:
            told = f"not translated: {error!r}"
        whole = broken_file(output_dir / "checkpoint-1") is None
        print(json.dumps([name, told, os.listdir(output_dir), whole]))
""")


def assert_told(lines: list[str], cause: str) -> None:
    results = [json.loads(line) for line in lines]
    assert len(results) == 7
    for writer, told, left, whole in results:
        assert told, f"{writer}: no error, so nothing was full"
        cut_short = writer.startswith("torch") and "old format" not in writer
        assert re.search(
            r"^The checkpoint .*/checkpoint-2 could not be written: "
            # torch before 2.15 loses the cause.
            + (rf"(a file was cut short, as on a full disk.*ulimit -f|{cause})" if cut_short else cause)
            + r".*--save_only_model.*--output_dir.* Free there now: \d+\.\d\d GB. "
            r"Earlier checkpoints are intact; the last one is .*/checkpoint-1\.$",
            told,
        ), f"{writer}: {told}"
        assert (left, whole) == (["checkpoint-1"], True), writer


def test_limit_of_file_sizes(tmp_path):
    """Real safetensors, torch and tokenizers, each stopped in the middle of a file."""
    process = python(WRITERS, tmp_path / "out", "limit")
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    assert_told(lines, "File too large")


def test_full_disk(tmp_path):
    """The same on a disk of 2 MB, in a name space of its own, where the system lets us mount one."""
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"', str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*inside, sys.executable, "-c", WRITERS, str(tmp_path / "out"), "disk"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_told(done.stdout.splitlines(), "No space left on device")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        ("ENOSPC", r"Free space .*--save_total_limit"),
        ("EDQUOT", r"Free space .*--save_total_limit"),
        ("EFBIG", r"Raise the limit of file sizes \(ulimit -f\)"),
        *((name, "Mend that, or give another --output_dir") for name in ("EIO", "EROFS", "EACCES", "EPERM", "ESTALE")),
    ],
)
def test_errors_of_the_disk(number, advice, tmp_path):
    code = getattr(errno, number)
    for error in (
        OSError(code, os.strerror(code), "x"),
        Exception(f"{os.strerror(code)} (os error {code})"),
        RuntimeError(f"[enforce fail at inline_container.cc:7] . open file failed with strerror: {os.strerror(code)}"),
    ):
        with (
            pytest.raises(
                CheckpointError, match=f"{os.strerror(code)}. {advice}.*There is no earlier checkpoint"
            ) as told,
            saving(tmp_path / "not yet" / "checkpoint-1"),
        ):
            raise error
        assert told.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        ValueError("a bug"),
        RuntimeError("Parent directory x does not exist."),
        RuntimeError("No space left on device, it says here, but the text goes on"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        ConnectionError("the hub is out of reach"),
        MemoryError(),
        CheckpointError("another process could not write"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("main", [True, False])
def test_other_errors_pass_unchanged_and_nothing_is_left(main, error, tmp_path):
    last = checkpoint(tmp_path)
    with pytest.raises(type(error)) as told, saving(tmp_path / "checkpoint-2", main=main):
        write(fresh_aside(tmp_path, "checkpoint-2"))
        raise error
    assert told.value is error
    assert (tmp_path / ASIDE).exists() != main  # only the main process removes what all of them write to
    assert last_complete_checkpoint(tmp_path) == last


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "basic_ios::clear: iostream error",
        "PytorchStreamWriter failed writing file data/0: file write failed",
    ],
)
def test_files_that_torch_cut_short(text, tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"cut short.*ulimit -f.*--save_total_limit"),
        saving(tmp_path / "checkpoint-1"),
    ):
        raise RuntimeError(text)
    with pytest.raises(ValueError, match=re.escape(text)), saving(tmp_path / "checkpoint-1"):
        raise ValueError(text)  # torch raises no such thing


def test_intact_is_said_of_intact_ones_only(tmp_path):
    checkpoint(tmp_path, 1)
    truncated(checkpoint(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"the last one is .*checkpoint-1\."), saving(tmp_path / "checkpoint-3"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- removing one ---


def test_retire_takes_the_name_first(tmp_path, monkeypatch):
    """A kill in the middle of the removal leaves nothing under the name, and the next save clears the rest away."""
    whole = checkpoint(tmp_path, 4)
    with monkeypatch.context() as cut:
        cut.setattr(shutil, "rmtree", lambda *args, **how: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            retire(whole)
    assert not whole.exists()
    assert any((tmp_path / ASIDE).iterdir()), "cut off before it was gone"
    assert last_complete_checkpoint(tmp_path) is None
    tidy(tmp_path)
    assert not (tmp_path / ASIDE).exists()


def test_tidy_puts_back_what_a_replacement_had_moved(tmp_path):
    whole = checkpoint(tmp_path, 4)
    (tmp_path / ASIDE).mkdir()
    whole.rename(tmp_path / ASIDE / "checkpoint-4.old")
    tidy(tmp_path)
    assert last_complete_checkpoint(tmp_path) == whole
    assert not (tmp_path / ASIDE).exists()
