"""Whatever a dataset holds as an image becomes 8 bit RGB or an error that begins with its row; nothing is read elsewhere."""

from __future__ import annotations

import io
import ipaddress
import os
import pickle
import re
import socket
import struct
import threading
import time
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFile

from dpo_trainer.data.images import download as image_download
from dpo_trainer.data.images import pixels as image_pixels
from dpo_trainer.data.images import server as image_server
from dpo_trainer.data.images.source import ImageAccess, ImageSource, encoded, images_of

WHERE = "Row 7 of train, images[1]"
ANYWHERE = ImageAccess()
ONLINE = ImageAccess(allow_urls=True, allow_private_urls=True)  # the server of the tests is on loopback
PUBLIC = ImageAccess(allow_urls=True)
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PHOTO = PIL.Image.fromarray(NOISE)


def file_of(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(value: Any, access: ImageAccess = ANYWHERE) -> np.ndarray:
    """[height, width, 3]; on the way, what holds of every image."""
    image = access.open(value, WHERE)
    assert (image.mode, type(image), image.info) == ("RGB", PIL.Image.Image, {})
    assert access.size(value, WHERE) == image.size
    return np.asarray(image)


def refusal(value: Any, access: ImageAccess = ANYWHERE) -> str:
    """What `size` and `open` say of a value: the same."""
    said = []
    for read in (access.size, access.open):
        with pytest.raises(ValueError) as error:
            read(value, WHERE)
        assert type(error.value) is ValueError  # comes out of a worker process as it is
        said.append(str(error.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{WHERE}: the image")
    assert said[0].endswith(".")
    assert said[0].isprintable()
    return said[0].removeprefix(f"{WHERE}: ")


def attempt(read: Any, data: bytes) -> Any:
    """What comes of it, or what the ValueError says."""
    try:
        return read(data, WHERE)
    except ValueError as error:
        return str(error) if type(error) is ValueError else repr(error)


PNG, JPEG = file_of(PHOTO), file_of(PHOTO, "JPEG")


# --- kinds of values ---


@pytest.mark.parametrize(
    "kind", ["image", "bytes", "bytearray", "path", "Path", "struct", "struct of a path", "array"]
)
def test_every_kind_of_value_gives_the_same_pixels(kind, tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(PNG)
    value = {
        "image": PHOTO,
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "path": str(file),
        "Path": file,
        "struct": {"bytes": PNG, "path": "not there.png"},
        "struct of a path": {"bytes": None, "path": str(file)},
        "array": NOISE,
    }[kind]
    np.testing.assert_array_equal(pixels(value), NOISE)


def test_grey_array():
    np.testing.assert_array_equal(pixels(NOISE[..., 0]), NOISE[..., [0, 0, 0]])


def test_result_is_a_copy_of_a_given_image():
    image = PHOTO.copy()
    image.info["comment"] = "x"
    ANYWHERE.open(image, WHERE).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), NOISE)
    assert image.info == {"comment": "x"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, "is of type int. Give a PIL image"),
        ([PHOTO], "is of type list"),
        ({}, "has neither bytes nor a path (it has: nothing)"),
        ({"url": "x"}, "has neither bytes nor a path (it has: url)"),
        ({"bytes": None, "path": None}, "has neither bytes nor a path"),
        ({"bytes": [1, 2], "path": None}, "has 'bytes' of type list"),
        ({"bytes": None, "path": 3}, "has 'path' of type int"),
        (np.zeros((4, 4, 3), np.float32), "is an array of float32 [4, 4, 3]. Give uint8"),
        (np.zeros((3, 4, 4), np.uint8), "is an array of uint8 [3, 4, 4]"),
        (np.zeros((4, 0, 3), np.uint8), "is 0 x 4 pixels"),
        (PIL.Image.new("RGB", (0, 5)), "is 0 x 5 pixels"),
        ("", "is an empty string. Give None"),
        ("A" * 5000, "is too long for a path. If it is base64"),
        ("A" * 300, "is too long for a path. If it is base64"),
        (b"", "holds no bytes"),
    ],
)
def test_values_that_are_no_image(value, says):
    assert says in refusal(value)


# --- paths ---


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert f"'{tmp_path}/a.png' does not exist. Mend the path, or say with --image_root" in refusal(
        f"{tmp_path}/a.png"
    )
    assert "is a folder" in refusal(tmp_path)
    assert "holds no bytes" in refusal(tmp_path / "empty.png")
    assert "is no regular file" in refusal(tmp_path / "pipe.png")  # opened, it would never end
    # Python 3.13 calls it a null character.
    assert (
        re.search("null (byte|character)", refusal("a\0b.png", ImageAccess(root=str(tmp_path)))) or os.name != "posix"
    )


def test_control_characters_are_shown_not_sent():
    assert r"'a\x1b[31m\nb.png' does not exist" in refusal("a\x1b[31m\nb.png")


def test_relative_paths_start_at_the_root_or_here(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(PNG)
    root = ImageAccess(root=str(tmp_path))
    for value in ("sub/x.png", "sub/../sub/x.png", tmp_path / "sub" / "x.png", {"path": "sub/x.png"}):
        np.testing.assert_array_equal(pixels(value, root), NOISE)
    monkeypatch.chdir(tmp_path)
    pixels("sub/x.png")
    pixels("x.png", ImageAccess(root="sub"))


def test_no_path_leaves_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "x.png").write_bytes(PNG)
    (tmp_path / "root-2.png").write_bytes(PNG)  # begins like the root
    (root / "link.png").symlink_to(outside / "x.png")
    (root / "folder").symlink_to(outside)
    (root / "own.png").write_bytes(PNG)
    (root / "inside.png").symlink_to("own.png")
    access = ImageAccess(root=str(root))
    leaving = ["../outside/x.png", outside / "x.png", "link.png", "folder/x.png", "../root-2.png", "/etc/passwd"]
    for value in [*leaving, {"bytes": None, "path": "../outside/x.png"}]:
        assert f"lies outside of --image_root {root}" in refusal(value, access)
    pixels("inside.png", access)


def test_no_path_is_looked_for_outside(tmp_path):
    """Else errors would tell which files there are."""
    assert "lies outside" in refusal("../not there.png", ImageAccess(root=str(tmp_path)))


# --- files that are no images ---


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            b"hello, world",
            "is not a supported image, or only the beginning of one (it begins with b'hello, w')",
        ),
        (PNG[:5], "only the beginning"),
        (PNG[:20], "is truncated"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "is an SVG drawing. Render it to PNG"),
        (b"  <!DOCTYPE html><html><svg>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS. Fetch"),
        (b"\0\0\0\x18ftypheic\0\0", "is a HEIC photo. Save it as JPEG"),
        (b"\0\0\0\x18ftypisom\0\0", "is a video. Give frames"),
        (b"%PDF-1.7", "is a document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is a document"),  # PIL would start Ghostscript
    ],
)
def test_files_that_are_no_images(data, says):
    assert says in refusal(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_formats(kind):
    if kind not in PIL.Image.SAVE:
        pytest.skip(f"pillow {PIL.__version__} has no {kind}")
    whole = file_of(PHOTO.resize((64, 48)), kind)
    assert pixels(whole).shape == (48, 64, 3)
    assert refusal(whole[: len(whole) * 2 // 3])  # of all, `size` finds that they are cut short


def test_every_cut_is_found_by_the_size_alone():
    """A PNG and a JPEG cut at every byte: what `size` lets through lacks no pixel."""
    # What may be missing: the checksum of a PNG's last chunk; a JPEG's last marker, and bits of its blocks beyond the edge.
    for whole, closing in ((PNG, 4), (JPEG, 8)):
        for end in range(1, len(whole)):
            if not isinstance(attempt(ANYWHERE.size, whole[:end]), str):
                assert end >= len(whole) - closing
                np.testing.assert_array_equal(pixels(whole[:end]), pixels(whole))


def test_sound_files_are_not_decoded_for_their_size(monkeypatch):
    files = [file_of(PHOTO, kind) for kind in ("PNG", "JPEG", "WEBP")]
    files.append(JPEG + bytes(1000))
    files.append(JPEG + b"some rubbish")
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.format) or load(image))
    assert [ANYWHERE.size(file, WHERE) for file in files] == [(30, 20)] * 5
    assert decoded == []
    assert ANYWHERE.size(JPEG + b"film" * 1000, WHERE) == (30, 20)  # a phone's moving photo: whole, says the decoder
    assert set(decoded) == {"JPEG"}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_thumbnail_is_not_taken_for_the_end():
    """A thumbnail among the notes ends as a JPEG ends."""
    exif = b"Exif\0\0II*\0" + bytes(60) + JPEG[-200:]
    whole = file_of(PHOTO, "JPEG", exif=exif)
    pixels(whole)
    for end in range(whole.index(b"\xff\xd9") + 2, len(whole) - 2, 7):
        refusal(whole[:end])


def test_truncated_files_are_refused_though_pil_may_be_told_to_fill_them_up(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for whole in (PNG, JPEG):
        assert "is truncated. Fetch the file again" in refusal(whole[:-300])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # another's choice


def test_changed_png_is_corrupt():
    middle = PNG.index(b"IDAT") + 500
    changed = PNG[:middle] + bytes([PNG[middle] ^ 1]) + PNG[middle + 1 :]
    assert "cannot be decoded" in refusal(changed)


@pytest.mark.parametrize("strict", [False, True], ids=["", "warnings are errors"])
@pytest.mark.parametrize("side", [11, 15], ids=["PIL warns", "PIL refuses"])
def test_bombs(side, strict, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        for image in (file_of(PIL.Image.new("RGB", (side, side))), PIL.Image.new("RGB", (side, side))):
            assert f"has {side * side} pixels, and more than 100 may be an attack on memory" in refusal(image)
    assert PIL.Image.MAX_IMAGE_PIXELS == 100


def test_a_bomb_is_not_decoded():
    """A PNG of 20000 x 20000 whose pixels are missing: the header is enough."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    data = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    assert "has 400000000 pixels" in refusal(data)


def test_bombs_are_welcome_where_pil_was_told_so(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert ANYWHERE.size(PNG, WHERE) == (30, 20)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused_and_one_is_not(kind):
    other = PHOTO.transpose(PIL.Image.Transpose.ROTATE_180)
    several = file_of(PHOTO, kind, save_all=True, append_images=[other])
    assert f"holds several frames or pages ({kind}). Give the frame that is meant" in refusal(several)
    assert "holds several frames" in refusal(PIL.Image.open(io.BytesIO(several)))
    assert pixels(file_of(PHOTO, kind, save_all=True)).shape == (20, 30, 3)


def test_photos_of_phones_are_their_first_picture():
    both = file_of(PHOTO, "MPO", save_all=True, append_images=[PHOTO.resize((8, 8))])
    assert PIL.Image.open(io.BytesIO(both)).format == "MPO"
    np.testing.assert_array_equal(pixels(both), pixels(JPEG))


def test_files_are_closed(tmp_path):
    (tmp_path / "whole.jpg").write_bytes(JPEG)
    (tmp_path / "cut.jpg").write_bytes(JPEG[:-300])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        pixels(tmp_path / "whole.jpg")
        refusal(tmp_path / "cut.jpg")
    assert len(os.listdir("/proc/self/fd")) == before


# --- pixels ---


def colours(image: Any) -> list[tuple[int, ...]]:
    return [tuple(map(int, colour)) for row in pixels(image) for colour in row]


def of(mode: str, *values: Any) -> PIL.Image.Image:
    """One row of pixels."""
    image = PIL.Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def greys(*values: int) -> list[tuple[int, int, int]]:
    return [(value, value, value) for value in values]


def test_alpha_is_over_white():
    """(c a + 255 (255 - a)) / 255: at a = 128 nothing gives 127 and all gives 255."""
    rgba = of("RGBA", (255, 0, 0, 128), (0, 0, 0, 0), (1, 2, 3, 255))
    want = [(255, 127, 127), (255, 255, 255), (1, 2, 3)]
    assert colours(rgba) == colours(file_of(rgba)) == want
    la = of("LA", (0, 64), (200, 0), (200, 255))
    assert colours(la) == colours(file_of(la)) == greys(191, 255, 200)


def test_palettes():
    image = of("P", 0, 1, 2)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    want = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    assert colours(file_of(image)) == want
    assert colours(file_of(image, transparency=1)) == [want[0], (255, 255, 255), want[2]]
    assert colours(file_of(image, "GIF", transparency=1)) == [want[0], (255, 255, 255), want[2]]
    with_alpha = colours(file_of(image, transparency=bytes([255, 255, 0])))
    assert with_alpha == [want[0], want[1], (255, 255, 255)]


def test_a_transparent_colour():
    assert colours(file_of(of("RGB", (1, 2, 3), (4, 5, 6)), transparency=(4, 5, 6))) == [(1, 2, 3), (255, 255, 255)]


def test_cmyk():
    """(255 - c) (255 - k) / 255: no cyan and no black is full red."""
    ink = of("CMYK", (0, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 100), (255, 0, 0, 55))
    want = [(255, 0, 0), (255, 255, 255), (0, 0, 0), (155, 155, 155), (0, 200, 200)]
    assert colours(ink) == colours(file_of(ink, "TIFF")) == want
    jpeg = file_of(PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(pixels(jpeg), np.full((16, 16, 3), (255, 0, 0)), atol=2)  # JPEG rounds


def test_black_and_white():
    assert colours(of("1", 0, 1)) == colours(file_of(of("1", 0, 1))) == greys(0, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_is_scaled(mode):
    """By 255 / 65535 = 1 / 257; PIL itself would make all above 255 white."""
    image = of(mode, 0, 257, 128 * 257, 1000, 65535)
    assert colours(image) == greys(0, 1, 128, 4, 255)
    assert colours(file_of(image, "TIFF")) == greys(0, 1, 128, 4, 255)


def test_16_bit_png():
    assert colours(file_of(of("I;16", 0, 257, 65535))) == greys(0, 1, 255)


def test_32_bit_integers_go_by_their_range():
    assert colours(of("I", 0, 7, 255)) == colours(file_of(of("I", 0, 7, 255), "TIFF")) == greys(0, 7, 255)
    assert colours(of("I", 0, 7 * 257, 65535)) == greys(0, 7, 255)
    assert "has grey levels from 0 to 65536. Scale them to 0 ... 65535" in refusal(of("I", 0, 65536))
    assert "has grey levels from -1 to 5" in refusal(of("I", -1, 5))


def test_floats_go_by_their_range():
    """51 is a fifth of 255."""
    assert colours(of("F", 0.0, 0.2, 1.0)) == colours(file_of(of("F", 0.0, 0.2, 1.0), "TIFF")) == greys(0, 51, 255)
    assert colours(of("F", 0.0, 51.2, 255.0)) == greys(0, 51, 255)
    for wrong in (256.0, -0.5, float("nan"), float("inf")):
        assert "has grey levels from" in refusal(of("F", wrong, 0.5))


TURNED = {  # by numpy, what the standard says of each orientation: which side of the stored image is the top
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def exif(orientation: int) -> PIL.Image.Exif:
    notes = PIL.Image.Exif()
    notes[0x0112] = orientation
    return notes


@pytest.mark.parametrize("orientation", TURNED)
def test_orientation(orientation):
    want, notes = TURNED[orientation](NOISE), exif(orientation)
    np.testing.assert_array_equal(pixels(file_of(PHOTO, exif=notes)), want)
    np.testing.assert_array_equal(pixels(file_of(PHOTO, "TIFF", exif=notes)), want)
    np.testing.assert_array_equal(pixels(file_of(PHOTO, "WEBP", lossless=True, exif=notes)), want)
    jpeg = pixels(file_of(PHOTO, "JPEG", exif=notes))
    np.testing.assert_array_equal(jpeg, TURNED[orientation](pixels(JPEG)))
    np.testing.assert_array_equal(pixels(PIL.Image.open(io.BytesIO(file_of(PHOTO, exif=notes)))), want)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "after them"])
def test_orientation_anywhere_in_a_png(late):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    notes = {
        "eXIf": chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")),
        "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }
    place = PNG.index(b"IEND" if late else b"IDAT") - 4
    for note in notes.values():
        np.testing.assert_array_equal(pixels(PNG[:place] + note + PNG[place:]), np.rot90(NOISE, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("notes", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(99).tobytes()])
def test_broken_notes_turn_nothing(notes):
    np.testing.assert_array_equal(pixels(file_of(PHOTO, "JPEG", exif=notes)), pixels(JPEG))


# --- addresses ---


class Server(ThreadingHTTPServer):
    """Answers by path: "/x.png" the picture, "/404" that status, "/slow" nothing for long; counts what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.busy, self.login, self.page = 0, "", b"<html>"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server: Any = self.server
        server.asked.append(self.path)
        server.login = self.headers.get("Authorization", "")
        path = self.path.partition("?")[0]
        if path == "/slow":
            time.sleep(2)
        if path in ("/drip", "/dripping-headers"):
            self.drip(path)
            return
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if path == "/busy" and len(server.asked) <= server.busy:
            self.send_error(503)
        elif path in ("/404", "/500"):
            self.send_error(int(path[1:]))
        else:
            content = {"/page": server.page, "/empty": b"", "/cut": PNG[:-300]}.get(path, PNG)
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG) if path == "/broken" else len(content)))
            self.end_headers()
            self.wfile.write(content[:50] if path == "/broken" else content)

    def drip(self, path: str) -> None:
        """A byte now and then, for ten seconds: no single one comes late."""
        head = b"HTTP/1.1 200 OK\r\n" + (b"" if path == "/dripping-headers" else b"Content-Length: 9999\r\n\r\n")
        try:
            self.wfile.write(head)
            for _ in range(200):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:  # the client has given up
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(image_download, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_is_fetched_once(server, capfd):
    for value in (f"{server.address}/x.png", {"bytes": None, "path": f"{server.address}/x.png"}):
        np.testing.assert_array_equal(pixels(value, ONLINE), NOISE)
    assert server.asked == ["/x.png"]
    assert capfd.readouterr() == ("", "")


def test_what_was_fetched_is_there_offline(server, monkeypatch):
    pixels(f"{server.address}/x.png", ONLINE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pixels(f"{server.address}/x.png", ONLINE)
    assert "cannot be fetched with HF_HUB_OFFLINE set" in refusal(f"{server.address}/y.png?key=secret", ONLINE)


@pytest.mark.parametrize("access", [ANYWHERE, ImageAccess(root="/")])
def test_addresses_need_the_option(server, access):
    assert "is an address. Download the images first, or pass --allow_image_urls" in refusal(server.address, access)
    assert server.asked == []


@pytest.mark.parametrize("address", ["ftp://a/x.png", "file:///etc/passwd", "file:x.png", "s3://a/x.png", "FILE:///x"])
def test_other_schemes(address):
    assert f"is a {address.split(':')[0].lower()}: address" in refusal(address, ONLINE)


def test_addresses_of_nothing():
    assert "Decode it, and give the bytes" in refusal("data:image/png;base64,iVBORw0KGgo=", ONLINE)
    for address in ("http://", "https:x", "http://[", "http:///x.png"):
        assert "names no server" in refusal(address, ONLINE)


def test_servers_that_fail(server):
    for path, says, attempts in (
        ("404", "could not be fetched (HTTP 404). Mend the address", 1),
        ("500", "could not be fetched (HTTP 500). Try again later", 3),
        ("broken", "could not be fetched (", 3),
        ("empty", "holds no bytes", 1),
        ("cut", "is truncated", 1),
    ):
        server.asked.clear()
        assert f"'{server.address}/{path}' {says}" in refusal(f"{server.address}/{path}", ONLINE)
        assert len(server.asked) == 2 * attempts  # of size and of open
    assert list(Path(datasets.config.DOWNLOADED_DATASETS_PATH).rglob("*.*")) == []


def test_a_busy_server_is_asked_again(server):
    server.busy = 2
    pixels(f"{server.address}/busy", ONLINE)
    assert server.asked == ["/busy"] * 3


def test_a_page_in_place_of_an_image_is_not_kept(server):
    assert "is a web page" in refusal(f"{server.address}/page", ONLINE)
    server.page = PNG
    pixels(f"{server.address}/page", ONLINE)


def test_a_silent_server(server, monkeypatch):
    monkeypatch.setattr(image_download, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(image_download, "PAUSES_S", ())
    assert "could not be fetched (ReadTimeout after 0.2 s)" in refusal(f"{server.address}/slow", ONLINE)


@pytest.mark.parametrize("path", ["drip", "dripping-headers"])
def test_a_server_that_sends_a_byte_now_and_then(server, monkeypatch, path):
    monkeypatch.setattr(image_download, "TIMEOUT_S", 0.4)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"could not be fetched \(ReadTimeout after 0.4 s\)"):
        ONLINE.open(f"{server.address}/{path}", WHERE)
    assert time.monotonic() - began < 2
    assert len(server.asked) == 1, "the time is over"


def test_the_time_is_that_of_all_attempts(server, monkeypatch):
    monkeypatch.setattr(image_download, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(image_download, "PAUSES_S", (0.3, 0.3, 0.3, 0.3))
    with pytest.raises(ValueError, match=r"could not be fetched \(HTTP 500\)"):
        ONLINE.open(f"{server.address}/500", WHERE)
    assert len(server.asked) == 2


@pytest.mark.parametrize("proxy", [False, True])
def test_a_name_that_takes_long_to_resolve(server, monkeypatch, proxy):
    """The server of names is often the dataset's own."""
    monkeypatch.setattr(image_download, "TIMEOUT_S", 0.3)
    over = threading.Event()
    if proxy:
        monkeypatch.setenv("http_proxy", server.address)
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: (over.wait(3), [])[1])
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"could not be fetched \(ConnectTimeout after 0.3 s\)"):
            PUBLIC.open("http://slow.test/x.png", WHERE)
        took = time.monotonic() - began
        over.set()
    assert took < 2
    assert server.asked == []


# --- servers that are not public ---

NOT_PUBLIC = r"leads to an address that is not public .* pass --allow_private_image_urls"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "0.0.0.0"])
def test_servers_that_are_not_public_are_not_asked(server, host):
    with pytest.raises(ValueError, match=NOT_PUBLIC):
        PUBLIC.open(f"http://{host}:{server.server_port}/x.png", WHERE)
    assert server.asked == []


@pytest.mark.parametrize(
    "host", ["10.1.2.3", "192.168.0.1", "169.254.169.254", "[::1]", "[fe80::1]", "[::ffff:7f00:1]"]
)
def test_addresses_that_are_not_public_are_not_connected_to(server, host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", None)
    with pytest.raises(ValueError, match=NOT_PUBLIC):
        PUBLIC.open(f"http://{host}/x.png", WHERE)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("64:ff9b::5db8:d822", True),  # NAT64 of 93.184.216.34
        ("64:ff9b::a9fe:a9fe", False),  # of 169.254.169.254
        ("2002:7f00:1::", False),  # 6to4 of 127.0.0.1
        ("::ffff:10.0.0.1", False),
        ("100.64.0.1", False),
        ("172.16.0.1", False),
        ("192.0.2.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
    ],
)
def test_what_is_public(address, public):
    assert image_server.is_public(ipaddress.ip_address(address)) is public


def resolving(monkeypatch, *answers: list[str]) -> list[str]:
    """Names resolve to these addresses, one list after the other; the last one from then on. What is connected to."""
    left, connected, connect = list(answers), [], socket.create_connection

    def resolve(host, port, *_, **__):
        if host == "127.0.0.1":  # asked for by the connection itself, below
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        found = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def note(address, *args, **kwargs):
        connected.append(address[0])
        return connect(("127.0.0.1", address[1]), *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", note)
    return connected


def test_the_address_that_was_checked_is_the_one_that_is_asked(server, monkeypatch):
    """A name that resolves to another address a moment later: to the server of the tests go only connections to the first."""
    with monkeypatch.context() as patch:
        connected = resolving(patch, ["93.184.216.34"], ["127.0.0.1"])
        PUBLIC.open(f"http://rebinding.test:{server.server_port}/x.png", WHERE)
    assert connected == ["93.184.216.34"]
    assert server.asked == ["/x.png"]


def test_one_private_address_among_public_ones_is_enough(server, monkeypatch):
    with monkeypatch.context() as patch:
        connected = resolving(patch, ["93.184.216.34", "127.0.0.1"])
        with pytest.raises(ValueError, match=NOT_PUBLIC):
            PUBLIC.open(f"http://both.test:{server.server_port}/x.png", WHERE)
    assert connected == []


def test_redirects_are_followed_to_public_servers_alone(server, monkeypatch):
    np.testing.assert_array_equal(pixels(f"{server.address}/to/{server.address}/x.png", ONLINE), NOISE)
    server.asked.clear()
    with monkeypatch.context() as patch:
        connected = resolving(patch, ["93.184.216.34"], ["127.0.0.1"])
        with pytest.raises(ValueError, match=NOT_PUBLIC):
            PUBLIC.open(f"http://public.test:{server.server_port}/to/http://inner.test:{server.server_port}/y", WHERE)
    assert connected == ["93.184.216.34"]
    assert [path[:4] for path in server.asked] == ["/to/"]
    for place, says in ((f"{server.address}/to/file:///etc/passwd", "is a redirect to no web address"),):
        assert says in refusal(place, ONLINE)


def test_redirects_have_an_end(server, monkeypatch):
    monkeypatch.setattr(image_server, "MOST_REDIRECTS", 2)
    url = f"{server.address}/x.png"
    for _ in range(3):
        url = f"{server.address}/to/{url}"
    assert "is redirected more than 2 times" in refusal(url, ONLINE)


def test_a_redirect_to_another_server_takes_no_password_along(server):
    other = server.address.replace("127.0.0.1", "localhost")
    pixels(f"{server.address.replace('://', '://me:word@')}/to/{other}/x.png", ONLINE)
    assert server.login == ""


def test_a_proxy_of_the_environment_is_asked(server, monkeypatch):
    """It may stand on a private address; an address in the URL, and a name that is known here, must be public all the same."""
    monkeypatch.setenv("http_proxy", server.address)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    PUBLIC.open("http://unknown.invalid/x.png", WHERE)
    assert server.asked == ["http://unknown.invalid/x.png"]
    with pytest.raises(ValueError, match=NOT_PUBLIC):
        PUBLIC.open("http://169.254.169.254/x.png", WHERE)
    assert len(server.asked) == 1


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + b"!"])
def test_a_damaged_download_is_fetched_again(server, spoil, caplog):
    pixels(f"{server.address}/x.png", ONLINE)
    (file,) = [path for path in Path(datasets.config.DOWNLOADED_DATASETS_PATH).rglob("*") if len(path.name) == 64]
    file.write_bytes(spoil(file.read_bytes()))
    np.testing.assert_array_equal(pixels(f"{server.address}/x.png", ONLINE), NOISE)
    assert server.asked == ["/x.png"] * 2
    assert "is damaged" in caplog.text


def test_nobody_there(server):
    assert "could not be fetched (ConnectError)" in refusal("http://127.0.0.1:1/x.png", ONLINE)


def test_a_download_has_an_end(server, monkeypatch):
    monkeypatch.setattr(image_download, "LARGEST", 1000)
    assert "has more than 0 MB" in refusal(f"{server.address}/x.png", ONLINE)


def test_secrets_of_an_address_are_used_and_not_shown(server):
    address = server.address.replace("://", "://me:word@")
    pixels(f"{address}/x.png?key=secret", ONLINE)
    assert (server.asked, server.login) == (["/x.png?key=secret"], "Basic bWU6d29yZA==")
    for path in ("404?key=secret", "500?key=secret#secret", "page?key=secret"):
        said = refusal(f"{address}/{path}", ONLINE)
        assert f"'{server.address}/{path[: path.index('?')]}'" in said
        assert "secret" not in said
        assert "word" not in said
    assert "word" not in refusal(f"{address}/x.png?key=secret")


# --- rows ---

ROW = "Row 7 of train"


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({}, []),
        ({"image": None, "images": None}, []),
        ({"image": None, "images": []}, []),
        ({"image": [], "video": None, "audios": []}, []),
        ({"image": "a"}, ["a"]),
        ({"image": {"bytes": b"a"}, "images": []}, [{"bytes": b"a"}]),
        ({"images": "a"}, ["a"]),
        ({"images": ["a", PHOTO]}, ["a", PHOTO]),
        ({"image": None, "images": ("a",)}, ["a"]),
    ],
)
def test_images_of_a_row(row, images):
    assert images_of(row, ROW) == images


def test_arrays_of_a_row():
    assert [image.shape for image in images_of({"image": NOISE}, ROW)] == [(20, 30, 3)]
    assert [image.shape for image in images_of({"images": NOISE, "video": ""}, ROW)] == [(20, 30, 3)]


@pytest.mark.parametrize(
    ("row", "column", "says"),
    [
        ({"image": "a", "images": ["b"]}, "images", "is filled, and so is 'image'"),
        ({"images": ["a", None]}, "images[1]", "is None"),
        ({"image": ["a", "b"]}, "image", "is a list of 2. Call the column 'images'"),
        ({"video": "a.mp4"}, "video", r"dataset.remove_columns('video'), or give frames as images"),
        ({"videos": ["a.mp4"], "image": "a"}, "videos", "cannot be trained on here"),
        ({"audio": {"array": NOISE}}, "audio", "cannot be trained on here"),
        ({"audios": NOISE}, "audios", "cannot be trained on here"),
    ],
)
def test_rows_that_are_refused(row, column, says):
    with pytest.raises(ValueError) as error:
        images_of(row, ROW)
    assert str(error.value).startswith(f"{ROW}, column {column!r}: ")
    assert says in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "HSV"])
def test_encoded_pixels_are_read_as_the_image_is(mode):
    colour = PHOTO.convert("RGB") if mode in ("YCbCr", "HSV", "CMYK", "RGBA", "P") else PHOTO.convert("L")
    image = colour.convert(mode)
    struct_ = encoded(image)
    assert struct_["path"] is None
    assert PIL.Image.open(io.BytesIO(struct_["bytes"])).format == "PNG"
    np.testing.assert_array_equal(pixels(struct_), pixels(image))


def test_encoded_loses_nothing_of_a_file(tmp_path):
    """Neither to JPEG a second time, nor its orientation, nor by naming a file that may be gone."""
    (tmp_path / "x.jpg").write_bytes(file_of(PHOTO, "JPEG", exif=exif(6)))
    with PIL.Image.open(tmp_path / "x.jpg") as image:
        struct_ = encoded(image)
    want = pixels(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").unlink()
    np.testing.assert_array_equal(pixels(struct_), want)
    np.testing.assert_array_equal(pixels(encoded(NOISE)), NOISE)


def test_encoded_leaves_files_as_they_are():
    assert encoded("a/b.png") == encoded(Path("a/b.png")) == {"bytes": None, "path": "a/b.png"}
    assert encoded({"path": "https://x/a.png"}) == {"bytes": None, "path": "https://x/a.png"}
    assert encoded(PNG) == encoded(bytearray(PNG)) == {"bytes": PNG, "path": None}
    assert encoded({"bytes": PNG, "path": __file__}) == {"bytes": PNG, "path": __file__}


@pytest.mark.parametrize("value", [3, None, {}, {"bytes": 3}, of("F", 999.0)])
def test_encoded_refuses(value):
    with pytest.raises(ValueError, match=f"^{ROW}: the image "):
        encoded(value, ROW)


# --- for all ---


def test_all_is_picklable():
    access = ImageAccess(root="a", allow_urls=True)
    assert pickle.loads(pickle.dumps(access)) == access
    for value in (PNG, PHOTO, Path(__file__)):
        source = pickle.loads(pickle.dumps(ANYWHERE.source(value, WHERE)))
        assert isinstance(source, ImageSource)
    assert pickle.loads(pickle.dumps(ANYWHERE.source(PHOTO, WHERE))).open().size == (30, 20)


SMALL = PHOTO.resize((9, 7))
WHOLE = {
    "PNG": file_of(SMALL, exif=exif(6)),
    "palette": file_of(SMALL.quantize(8), transparency=3),
    "16 bit": file_of(of("I;16", 1, 1000, 65535)),
    "JPEG": file_of(SMALL, "JPEG", exif=exif(6)),
    "progressive": file_of(SMALL, "JPEG", progressive=True),
    "WEBP": file_of(SMALL, "WEBP"),
    "GIF": file_of(SMALL, "GIF"),
    "TIFF": file_of(SMALL, "TIFF", exif=exif(5)),
    "BMP": file_of(SMALL, "BMP"),
}


def check_any(data: bytes) -> None:
    """An image or a ValueError with the row, from `open` and from `size`, which agree where both find an image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF
        size, image = (attempt(read, data) for read in (ANYWHERE.size, ANYWHERE.open))
    for said in (size, image):
        assert not isinstance(said, str) or (said.startswith(f"{WHERE}: the image ") and said.isprintable())
    if not isinstance(image, str):
        assert image.mode == "RGB"
        assert np.asarray(image).shape == (image.height, image.width, 3)
        assert isinstance(size, str) or size == image.size


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes(data):
    check_any(data)


@given(st.sampled_from([whole[:12] for whole in WHOLE.values()]), st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes_after_a_beginning(head, data):
    check_any(head + data)


@pytest.mark.parametrize("kind", WHOLE)
def test_damaged_files(kind):
    """Half of them are lucky to stay an image; the other half must say so."""
    whole = WHOLE[kind]
    check_any(whole)

    @given(st.integers(0, len(whole) - 1), st.one_of(st.integers(0, 255), st.sampled_from(["cut", "drop"])))
    @settings(max_examples=150)
    def damage(place, how):
        if how == "cut":
            check_any(whole[:place])
        elif how == "drop":
            check_any(whole[:place] + whole[place + 1 :])
        else:
            check_any(whole[:place] + bytes([how]) + whole[place + 1 :])

    damage()


def test_builds_of_pil_without_a_format(monkeypatch):
    PIL.Image.init()
    monkeypatch.delitem(PIL.Image.OPEN, "AVIF", raising=False)
    assert "AVIF" not in refusal(b"hello")
    assert "AVIF" in image_pixels.FORMATS
