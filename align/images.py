"""Image files that people give: named by their content, decoded in one place into upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


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
        found, problem = decode(raw)
        if found is None:
            raise DataError("An image is refused", where=self.place, why=problem, do="Replace the image")
        return found


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
    problem = header_problem(raw)
    if problem:
        raise DataError("An image is refused", where=place, why=problem, do="Replace the image")
    return ImageFile(hashlib.sha256(raw).hexdigest(), path, None if path is not None else raw, place)


def _read(path: Path, place: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            "There is no such image" if isinstance(error, FileNotFoundError) else "An image cannot be read",
            where=place, why=str(path) if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}",
            do="Paths are relative to the file that names them",
        ) from error  # fmt: skip


_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def header_problem(raw: bytes) -> str:
    """Return what the header of an image file says is wrong with it, empty when nothing is."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw)):
            return ""
    except (*_BROKEN, Image.DecompressionBombError) as error:
        return _unreadable(error)


def decode(raw: bytes) -> tuple[np.ndarray | None, str]:
    """Return the pixels `[H, W, 3]` uint8 of an image file, turned upright, or what is wrong with it.

    More than 8 bits a channel and transparent parts are refused: neither has one meaning in RGB.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(raw)) as opened:
            upright = ImageOps.exif_transpose(opened)
            upright.load()
    except (*_BROKEN, Image.DecompressionBombError) as error:
        return None, _unreadable(error)
    return _rgb(upright)


def _unreadable(error: Exception) -> str:
    return "the image cannot be read: " + re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))[:120]


def _rgb(image: Image) -> tuple[np.ndarray | None, str]:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return None, f"the image has more than 8 bits a channel (mode {image.mode}); convert it to RGB"
    alpha = "A" in image.getbands() or "transparency" in image.info
    if alpha and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        return None, "the image is transparent in parts, which have no colour; put it on a background"
    return np.asarray(image.convert("RGB")).copy(), ""
