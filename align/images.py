"""Image files as pixels: the one door through which a picture that somebody made is read."""

from __future__ import annotations

import io
import re
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000
ASPECT_TOLERANCE = 0.1
_UPRIGHT = 0x0112  # EXIF's orientation: 5 to 8 lie on their side


def decode_image(raw: bytes) -> tuple[Image | None, str]:
    """Return the bytes of an image file as an upright RGB image, or None and what is wrong with it.

    Gray becomes three equal channels, and CMYK what Pillow makes of it. More than 8 bits a channel and transparency
    are refused, since how they become RGB is a choice; so are more than `MOST_PIXELS`, before they are decoded.
    """
    from PIL import Image, ImageOps

    try:
        with _opened(io.BytesIO(raw)) as opened:
            if problem := _problem(opened):
                return None, problem
            upright = ImageOps.exif_transpose(opened)
            upright.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        return None, "the image cannot be read: " + re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))[:120]
    alpha = "A" in upright.getbands() or "transparency" in upright.info
    if alpha and upright.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        return None, "the image is transparent in parts, which have no colour; put it on a background"
    return upright.convert("RGB"), ""


def require_first_frame(path: Path, height: int, width: int) -> None:
    """Refuse an image that a video of these proportions cannot start from, by its header alone.

    Args:
        height, width: of the video, in any unit.

    Raises:
        DataError: no readable image, too many pixels or bits, or a ratio of width to height that differs from the
            video's by more than `ASPECT_TOLERANCE`.
    """
    from PIL import Image

    try:
        with _opened(path) as opened:
            problem, (columns, rows) = _problem(opened), opened.size
            if opened.getexif().get(_UPRIGHT) in (5, 6, 7, 8):
                columns, rows = rows, columns
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        problem = f"the image cannot be read: {str(error)[:160]}"
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
    image, problem = decode_image(path.read_bytes())
    if image is None:
        raise DataError("A first frame cannot be used", where=str(path), why=problem, do="Replace it, or its row")
    return image


def _opened(source: Path | io.BytesIO) -> Image:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is stricter
        return Image.open(source)


def _problem(opened: Image) -> str:
    if opened.width * opened.height > MOST_PIXELS:
        return f"the image has {opened.width}x{opened.height} pixels, more than {MOST_PIXELS // 10**6} million"
    if opened.mode in ("I", "F") or opened.mode.startswith("I;"):
        return f"the image has more than 8 bits a channel (mode {opened.mode}); convert it to RGB"
    return ""
