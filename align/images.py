"""Image files that people give: named by their content, decoded in one place into upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded. Pillow knows forty more, among them one (EPS) that it hands to a program."""
MOST_PIXELS = 64_000_000
"""Pixels of an image; decoded they are 256 MB."""
MOVING = ("GIF", "WEBP", "PNG")
MOST_FILE_BYTES = 200_000_000
"""Bytes of the file of one; so many pixels take 192 MB without any compression."""
ASPECT_TOLERANCE = 0.1
_UPRIGHT = 0x0112  # EXIF's orientation: 5 to 8 lie on their side
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)


@dataclass(frozen=True)
class ImageFile:
    """An image as it was given: a file, or the content of one.

    Args:
        digest: sha256 of the content.
        path: where it is read again, when `data` is None.
        data: its content.
        place: what it belongs to, for messages.
    """

    digest: str
    path: Path | None = None
    data: bytes | None = None
    place: str = ""

    def pixels(self) -> np.ndarray:
        """Return its pixels `[H, W, 3]` uint8.

        Raises:
            DataError: it cannot be read, or is no longer what it was.
        """
        raw = self.data if self.data is not None else _read(self.path, self.place)
        if hashlib.sha256(raw).hexdigest() != self.digest:
            raise DataError(
                "An image has changed since it was read", where=f"{self.place}, {self.path}",
                do="Start a run of its own with the new image",
            )  # fmt: skip
        found, problem = decode_image(raw)
        if found is None:
            raise DataError("An image is refused", where=self.place, why=problem, do="Replace the image")
        return rgb_array(found)


def image_file(source: Path | bytes, place: str) -> ImageFile:
    """Return an image, of which the header alone is looked at.

    Args:
        source: a file, or the content of one.
        place: what it belongs to, for messages.

    Raises:
        DataError: there is no such file, it is no image, or it is too large.
    """
    path = source if isinstance(source, Path) else None
    raw = source if isinstance(source, bytes) else _read(source, place)
    problem, _ = _header(io.BytesIO(raw))
    if problem:
        raise DataError("An image is refused", where=place, why=problem, do="Replace the image")
    return ImageFile(hashlib.sha256(raw).hexdigest(), path, None if path is not None else raw, place)


def decode_image(raw: bytes) -> tuple[Image | None, str]:
    """Return the bytes of an image file as an upright RGB image, or None and what is wrong with it.

    Gray becomes three equal channels, and CMYK what Pillow makes of it. More than 8 bits a channel and transparency
    are refused, since how they become RGB is a choice; so are more than `MOST_PIXELS`, before they are decoded.
    """
    from PIL import Image, ImageOps

    problem, _ = _header(io.BytesIO(raw))
    if problem:
        return None, problem
    try:
        with _opened(io.BytesIO(raw)) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            opened.load()
            upright = opened
        if upright.has_transparency_data and _transparent(upright):
            return None, "the image is transparent in parts, which have no colour; put it on a background"
        if upright.mode == "RGB":
            return upright, ""
        pixels = rgb_array(upright)
        upright.close()  # one copy at a time: an image of `MOST_PIXELS` has 256 MB
        return Image.fromarray(pixels), ""
    except _BROKEN as error:
        return None, _unreadable(error)


def rgb_array(image: Image) -> np.ndarray:
    """Return the pixels of an image as RGB, `[H, W, 3]` uint8, made in strips: Pillow's own way holds three copies."""
    found = np.empty((image.height, image.width, 3), np.uint8)
    for strip, rows in _strips(image):
        found[rows] = np.asarray(strip.convert("RGB"))
    return found


def _strips(image: Image) -> Iterator[tuple[Image, slice]]:
    for top in range(0, image.height, 256):
        end = min(top + 256, image.height)
        yield image.crop((0, top, image.width, end)), slice(top, end)


def _transparent(image: Image) -> bool:
    return any(strip.convert("RGBA").getchannel("A").getextrema()[0] < 255 for strip, _ in _strips(image))


def require_readable(path: Path, where: str) -> None:
    """Refuse a file that is no image, by its header and its checksums alone.

    Raises:
        DataError: no image of a format that is read, one that is damaged, or one of too many pixels.
    """
    problem, _ = _header(path)
    if not problem:
        try:
            with _opened(path) as image:
                image.verify()
            return
        except _BROKEN as error:
            problem = _unreadable(error)
    raise DataError("An image cannot be read", where=where, why=f"{path}: {problem}", do="Replace the file")


def require_first_frame(path: Path, height: int, width: int) -> None:
    """Refuse an image that a video of these proportions cannot start from, by its header alone.

    Args:
        height, width: of the video, in any unit.

    Raises:
        DataError: no readable image, too many pixels or bits, or a ratio of width to height that differs from the
            video's by more than `ASPECT_TOLERANCE`.
    """
    problem, (columns, rows) = _header(path, upright=True)
    if problem:
        raise DataError("A first frame cannot be used", where=str(path), why=problem, do="Replace it, or its row")
    found, wanted = columns / rows, width / height
    if not 1 / (1 + ASPECT_TOLERANCE) <= found / wanted <= 1 + ASPECT_TOLERANCE:
        raise DataError(
            "A first frame would be squeezed", where=str(path),
            why=f"width over height is {found:.2f} in its {columns}x{rows} pixels and {wanted:.2f} in the video",
            do="Crop it, or give sampler.width and sampler.height its proportions",
        )  # fmt: skip


def read_first_frame(path: Path, height: int, width: int) -> Image:
    """Return the image that a video of these proportions starts from, in its own size.

    Raises:
        DataError: see `require_first_frame`; or it cannot be decoded, or is transparent.
    """
    require_first_frame(path, height, width)
    image, problem = decode_image(_read(path, str(path)))
    if image is None:
        raise DataError("A first frame cannot be used", where=str(path), why=problem, do="Replace it, or its row")
    return image


def _read(path: Path, place: str) -> bytes:
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise DataError(
                "An image is refused", where=place, why=f"{path} has more than {MOST_FILE_BYTES // 10**6} MB",
                do="Replace the image",
            )  # fmt: skip
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            "There is no such image" if isinstance(error, FileNotFoundError) else "An image cannot be read",
            where=place, why=str(path) if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}",
            do="Paths are relative to the file that names them",
        ) from error  # fmt: skip


def _opened(source: Path | io.BytesIO) -> Image:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is stricter
        return Image.open(source, formats=FORMATS)


def _header(source: Path | io.BytesIO, *, upright: bool = False) -> tuple[str, tuple[int, int]]:
    """Return what the header says is wrong with an image, empty when nothing is, and its width and height.

    Args:
        upright: turn the two as its EXIF says, for which some formats are read whole.
    """
    from PIL import Image

    try:
        with _opened(source) as opened:
            columns, rows = opened.size
            lies = upright and opened.getexif().get(_UPRIGHT) in (5, 6, 7, 8)
            mode, moves = opened.mode, opened.format in MOVING and getattr(opened, "is_animated", False)
            frames = 1 if not moves else "several" if opened.format == "GIF" else opened.n_frames  # a GIF does not say
    except (*_BROKEN, Image.DecompressionBombError) as error:
        return _unreadable(error), (0, 0)
    if columns * rows > MOST_PIXELS:
        return f"the image has {columns}x{rows} pixels, more than {MOST_PIXELS // 10**6} million", (0, 0)
    if moves:
        return f"the image has {frames} frames, and one is wanted", (0, 0)
    if mode in ("I", "F") or mode.startswith("I;"):
        return f"the image has more than 8 bits a channel (mode {mode}); convert it to RGB", (0, 0)
    return "", (rows, columns) if lies else (columns, rows)


def _unreadable(error: Exception) -> str:
    return "the image cannot be read: " + re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))[:120]
