"""What a dataset holds as an image -> a PIL image, from where it may be read.

    a PIL image, or uint8 [height, width, 3] or [height, width]
    the bytes of a file
    a path, or an address that begins with http:// or https://
    {"bytes": ..., "path": ...}, as `datasets.Image(decode=False)` gives it: the bytes if there are any

The data is not trusted: paths stay below --image_root, addresses are only fetched with --allow_image_urls, from
public servers, and once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import datasets
import numpy as np
import PIL.Image

from ..errors import bad, clean
from .download import downloaded, forget
from .pixels import Size, Unfit, refusals, rgb_of, size_of

KINDS = 'Give a PIL image, the bytes of a file, a path, or {"bytes": ..., "path": ...}'
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://|(data|file|ftp|https?):", re.IGNORECASE)
LONGEST_PATH, LONGEST_NAME = 4096, 255


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """One image that has not been looked into: one of `image`, `data` and `path`."""

    where: str
    name: str  # in errors: "the file 'cats/1.png'"
    image: PIL.Image.Image | None = None
    data: bytes | None = None
    path: str | None = None
    downloaded: bool = False

    def size(self) -> Size:
        with self._reading() as readable:
            return size_of(readable)

    def open(self) -> PIL.Image.Image:
        with self._reading() as readable:
            return rgb_of(readable)

    @contextmanager
    def _reading(self) -> Iterator[PIL.Image.Image | BinaryIO]:
        try:
            with refusals(self.where, self.name):
                if self.image is not None:
                    yield self.image
                    return
                with open(self.path, "rb") if self.path is not None else io.BytesIO(self.data or b"") as stream:
                    yield stream
        except ValueError:
            if self.downloaded and self.path is not None:
                forget(self.path)
            raise


@dataclass(frozen=True, kw_only=True)
class ImageAccess:
    """From where images of a dataset may be read. Picklable.

    Args:
        root: relative paths start here, and none may leave it, links followed; None: they start at the current folder.
        allow_urls: whether addresses are fetched.
        allow_private_urls: also those of servers on loopback, link-local, private and reserved addresses.
    """

    root: str | None = None
    allow_urls: bool = False
    allow_private_urls: bool = False

    def source(self, value: Any, where: str) -> ImageSource:
        """The image that `value` stands for, fetched if it is an address.

        Raises:
            ValueError: that begins with `where`, as all that is said about images.
        """
        name = _name(value)
        with refusals(where, name):
            if isinstance(value, Mapping):
                value = _of_struct(value)
            if isinstance(value, np.ndarray):
                value = _of_array(value)
            if isinstance(value, PIL.Image.Image):
                return ImageSource(where=where, name=name, image=value)
            if isinstance(value, bytes | bytearray | memoryview):
                return ImageSource(where=where, name=name, data=bytes(value))
            if not isinstance(value, str | Path):
                raise Unfit(f"is of type {type(value).__name__}", KINDS)
            scheme = SCHEME.match(value) if isinstance(value, str) else None
            if scheme is None:
                return ImageSource(where=where, name=name, path=str(self._file(value)))
            self._check_address(str(value), (scheme[1] or scheme[2]).lower())
            file = downloaded(str(value), private=self.allow_private_urls)
            return ImageSource(where=where, name=name, path=str(file), downloaded=True)

    def size(self, value: Any, where: str) -> Size:
        """(width, height) of what `open` would return; found without decoding where the format allows that."""
        return self.source(value, where).size()

    def open(self, value: Any, where: str) -> PIL.Image.Image:
        """Decoded: 8 bit RGB, standing upright."""
        return self.source(value, where).open()

    def _file(self, value: str | Path) -> Path:
        if not str(value):
            raise Unfit("is an empty string", "Give None for no image")
        if len(str(value)) > LONGEST_PATH or max(map(len, Path(value).parts), default=0) > LONGEST_NAME:
            raise Unfit("is too long for a path", "If it is base64, give base64.b64decode(...) of it")
        path, start = Path(value), Path.cwd()
        if self.root is not None:
            start = Path(self.root).resolve()
            path = (start / path).resolve()
            if not path.is_relative_to(start):
                raise Unfit(f"lies outside of --image_root {clean(start)}", "Move it there, or set another root")
        if not path.exists():
            remedy = f"Mend the path, or say with --image_root where paths start: now at {clean(start)}"
            raise Unfit("does not exist", remedy)
        if not path.is_file():
            raise Unfit(f"is {'a folder' if path.is_dir() else 'no regular file'}", "Give the path of a file")
        return path

    def _check_address(self, url: str, scheme: str) -> None:
        if scheme == "data":
            raise Unfit("is a data: address", "Decode it, and give the bytes")
        if scheme not in ("http", "https"):
            raise Unfit(f"is a {scheme}: address", "Give a path, or an address that begins with https://")
        if not self.allow_urls:
            raise Unfit("is an address", "Download the images first, or pass --allow_image_urls to fetch them")
        try:
            server = urlsplit(url).hostname
        except ValueError:  # whose words may hold the password
            server = None
        if not server:
            raise Unfit("names no server", "Mend the address")


def _name(value: Any) -> str:
    """What an error calls it. Of an address neither the password nor the query, which may be a key."""
    if isinstance(value, Mapping):
        return _name(value.get("path"))
    if not isinstance(value, str | Path):
        return "the image"
    text = str(value)
    if isinstance(value, str) and SCHEME.match(text):
        scheme, _, rest = re.split("[?#]", text)[0].partition(":")
        server, slash, path = rest.removeprefix("//").partition("/")
        text = f"{scheme}://{server.rpartition('@')[2]}{slash}{path}" if rest.startswith("//") else f"{scheme}:..."
    return f"the image '{clean(text)}'"


def _of_struct(value: Mapping[str, Any]) -> Any:
    """Its bytes or its path."""
    for key, kinds in (("bytes", bytes | bytearray | memoryview), ("path", str | Path)):
        held = value.get(key)
        if isinstance(held, kinds):
            return held
        if held is not None:
            raise Unfit(f"has {key!r} of type {type(held).__name__}", KINDS)
    keys = ", ".join(map(str, value))
    raise Unfit(f"has neither bytes nor a path (it has: {clean(keys) or 'nothing'})", KINDS)


def _of_array(value: np.ndarray) -> PIL.Image.Image:
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        raise Unfit(
            f"is an array of {value.dtype} {list(value.shape)}", "Give uint8 [height, width, 3] or [height, width]"
        )
    if not value.size:
        raise Unfit(f"is {value.shape[1]} x {value.shape[0]} pixels", "Leave the row out")
    return PIL.Image.fromarray(value)


# --- rows ---


def images_of(row: Mapping[str, Any], where: str) -> list[Any]:
    """The images of a row as it holds them: of its column `image`, or of `images`, which may hold one or a list.

    Raises:
        ValueError: for a video or a sound, which would go unseen; for both columns filled, and for a None among images.
    """
    for column in REFUSED:
        if not _is_empty(row.get(column), list | tuple | str):
            remedy = f"Take the column out, dataset.remove_columns({column!r}), or give frames as images"
            raise bad(where, column, f"holds what cannot be trained on here ({column})", remedy)
    one, several = (None if _is_empty(row.get(column)) else row[column] for column in IMAGES)
    if one is not None and several is not None:
        raise bad(where, "images", "is filled, and so is 'image'", "Put all images of the row into 'images'")
    if isinstance(one, list | tuple):
        raise bad(where, "image", f"is a list of {len(one)}", "Call the column 'images', which may hold several")
    if several is None:
        return [] if one is None else [one]
    images = list(several) if isinstance(several, list | tuple) else [several]
    for number, image in enumerate(images):
        if image is None:
            raise bad(where, f"images[{number}]", "is None", "Give the image, or take its place out of the list")
    return images


def _is_empty(value: Any, kinds: Any = list | tuple) -> bool:
    return value is None or (isinstance(value, kinds) and not value)


def encoded(value: Any, where: str = "Images") -> dict[str, Any]:
    """{"bytes", "path"} that `ImageAccess` reads as it reads `value`; pixels become the bytes of a PNG, which loses nothing."""
    if isinstance(value, PIL.Image.Image | np.ndarray):
        return datasets.Image().encode_example(ImageAccess().open(value, where))
    with refusals(where, _name(value)):
        held = _of_struct(value) if isinstance(value, Mapping) else value
        if isinstance(held, str | Path):
            return {"bytes": None, "path": str(held)}
        if not isinstance(held, bytes | bytearray | memoryview):
            raise Unfit(f"is of type {type(held).__name__}", KINDS)
        path = value.get("path") if isinstance(value, Mapping) else None
        return {"bytes": bytes(held), "path": None if path is None else str(path)}


IMAGES = ("image", "images")


REFUSED = ("video", "videos", "audio", "audios")
"""Read only to say that they cannot be trained on: a model would answer for what it never saw."""


def check_count(places: int, images: int, where: str, what: str) -> None:
    if places != images:
        remedy = f"Give one {what} in the prompt for each image" if images else "Give the images in a column 'images'"
        raise bad(
            where, "images", f"holds {images} images, and the prompt has {places} places for them ({what})", remedy
        )
