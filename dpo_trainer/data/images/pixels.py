"""Files of images -> 8 bit RGB, as a viewer shows them; what is no whole image is refused.

    alpha               over white
    16 bit grey         scaled to 8 bit: 65535 is white (PIL's own conversion makes all above 255 white)
    32 bit integers     grey levels of 8 bit where none is above 255, else of 16 bit
    floats              shares of white where none is above 1, else grey levels of 8 bit
    EXIF orientation    applied
    colour profiles     not read

A size comes from the header where that says it, and is the size of the decoded image; files that end too early are found
without their pixels where the format allows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import PIL.Image
from PIL import ExifTags, ImageFile

from ..errors import clean

Size = tuple[int, int]
"""Width and height in pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Those that PIL reads by itself: for EPS it would start Ghostscript."""

TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; from 5 on width and height change places."""

MAY_TURN = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""PNG chunks that say how an image stands: they may come after its pixels."""

JPEG_END, RUBBISH, TAIL = b"\xff\xd9", 32, 65536

INSTEAD = (
    (rb"^\s*<(!doctype html|html)", "is a web page", "Give the image that it shows"),
    (rb"<svg", "is an SVG drawing", "Render it to PNG first, for example with cairosvg"),
    (rb"^version https://git-lfs", "is a pointer of Git LFS", "Fetch the file that it stands for: git lfs pull"),
    (rb"^....ftyp(hei|hev|mif1|msf1)", "is a HEIC photo", "Save it as JPEG or PNG"),
    (rb"^....ftyp(?!avi)|^\x1aE\xdf\xa3|^RIFF....AVI ", "is a video", "Give frames as images"),
    (rb"^%PDF|^%!PS", "is a document", "Render its pages to PNG first"),
)
"""Beginnings of files that are often found where an image should be."""


class Unfit(Exception):
    """What is wrong with an image, before it is said with which."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy


@contextmanager
def refusals(where: str, name: str) -> Iterator[None]:
    """Whatever goes wrong with an image inside, as a ValueError that begins with its row."""
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # grey for what is missing
    try:
        yield
    except Exception as error:  # PIL's decoders raise of every kind
        unfit = _unfit(error)
        raise ValueError(f"{where}: {name} {unfit.problem}. {unfit.remedy}.") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _unfit(error: Exception) -> Unfit:
    if isinstance(error, Unfit):
        return error
    if isinstance(error, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning):
        found = re.search(r"\d+", str(error))
        return _bomb(found[0] if found else "too many")
    reason = clean(f"{type(error).__name__}: {error}")
    if isinstance(error, OSError) and error.errno is not None:
        return Unfit(f"cannot be read ({reason})", "Make it readable for this process")
    if "truncated" in str(error).lower():
        return Unfit("is truncated", "Fetch the file again, or leave the row out")
    return Unfit(f"cannot be decoded ({reason})", "Fetch the file again, or leave the row out")


def _bomb(pixels: object) -> Unfit:
    return Unfit(
        f"has {pixels} pixels, and more than {PIL.Image.MAX_IMAGE_PIXELS} may be an attack on memory",
        "Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the data",
    )


def size_of(image: PIL.Image.Image | BinaryIO) -> Size:
    """As it will be decoded: (width, height)."""
    if isinstance(image, PIL.Image.Image):
        return rgb_of(image).size
    file = _opened(image)
    if not _header_is_enough(file, image):
        return rgb_of(file).size
    width, height = file.size
    turned = (
        file.format != "PNG" and _orientation(file) >= 5
    )  # PIL would decode a PNG to look for notes, and it has none
    return (height, width) if turned else (width, height)


def rgb_of(image: PIL.Image.Image | BinaryIO) -> PIL.Image.Image:
    """The decoded image [height, width, 3], 8 bit each, without notes that would turn it again."""
    image = image if isinstance(image, PIL.Image.Image) else _opened(image)
    _check(image)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        shown = PIL.Image.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    elif image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        shown = PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    else:
        shown = image.convert("RGB")
    turn = TURNS.get(_orientation(image))
    shown = shown if turn is None else shown.transpose(turn)
    shown.info.clear()
    return shown


# --- files ---


def _opened(stream: BinaryIO) -> PIL.Image.Image:
    """Its header is read; its pixels are not."""
    image = _identified(stream)
    _check(image)
    if image.format == "PNG":
        image.verify()  # the checksum of each chunk, and that there is a last one
        image = _identified(stream)
    return image


def _identified(stream: BinaryIO) -> PIL.Image.Image:
    PIL.Image.init()
    formats = [name for name in FORMATS if name in PIL.Image.OPEN]  # a build of PIL may lack some
    try:
        return PIL.Image.open(stream, formats=formats)
    except PIL.UnidentifiedImageError:
        stream.seek(0)
        head = stream.read(1024)
    for pattern, problem, remedy in INSTEAD:
        if re.search(pattern, head, re.IGNORECASE | re.DOTALL):
            raise Unfit(problem, remedy)
    if not head:
        raise Unfit("holds no bytes", "Fetch it again, or leave the row out")
    raise Unfit(
        f"is not a supported image, or only the beginning of one (it begins with {head[:8]!r})",
        f"Supported formats: {', '.join(formats)}",
    )


def _check(image: PIL.Image.Image) -> None:
    width, height = image.size
    if not width * height:
        raise Unfit(f"is {width} x {height} pixels", "Leave the row out")
    if PIL.Image.MAX_IMAGE_PIXELS is not None and width * height > PIL.Image.MAX_IMAGE_PIXELS:
        raise _bomb(width * height)
    # A photo of a phone may be an MPO: the picture, then its depth or a smaller one.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Unfit(f"holds several frames or pages ({image.format})", "Give the frame that is meant")


def _header_is_enough(image: PIL.Image.Image, stream: BinaryIO) -> bool:
    """Whether size and orientation are known, and the file is whole, without its pixels."""
    if image.format == "PNG":
        stream.seek(0)
        data = stream.read()
        return not any(name in data for name in MAY_TURN)
    if image.format in ("JPEG", "MPO"):
        length = stream.seek(0, 2)
        stream.seek(max(length - TAIL, 0))
        return JPEG_END in stream.read().rstrip(b"\0")[-RUBBISH:]
    return image.format == "WEBP"  # read whole when it was opened


def _orientation(image: PIL.Image.Image) -> int:
    """1 to 8; 1, as it stands, also where EXIF cannot be read: so viewers have it."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as many kinds as there are broken notes
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """Grey levels [height, width] of another range, scaled."""
    high = values.max()
    tops = (65535,) if values.dtype.itemsize == 2 else (255, 65535) if values.dtype.kind == "i" else (1, 255)
    top = next((top for top in tops if high <= top), None)
    if top is None or not values.min() >= 0:  # or it is not a number
        raise Unfit(
            f"has grey levels from {values.min()} to {high}", f"Scale them to 0 ... {tops[-1]}, or give 8 bit pixels"
        )
    return np.rint(values.astype(np.float32) * np.float32(255 / top)).astype(np.uint8)
