"""Rows of prompts and images with what people thought of them.

    {"prompt": ..., "image": "a.png", "label": true}                    a thumb; `completion` may stand for `image`
    {"prompt": ..., "chosen": "a.png", "rejected": "b.png"}             a pair, or two thumbs

An image is a path, relative to the file or to the folder that is named, or `{"bytes": ..., "path": ...}` as data
sets in Parquet have it. Other fields are left alone, so that what `align feedback export` and `convert` write reads as
it is.

How an image becomes one of the model's size: turned as its EXIF says, scaled (bicubic) until it covers that size, and
cropped at its centre. An image that would be enlarged more than twice, or of which the crop would leave less than half,
is refused, and so is one that is transparent in parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import DataError
from align.images import ImageFile, image_file
from align.preferences import THUMBS, read_thumb
from align.prompts import PromptSet, read_rows, require_apart, short_repr, split_heldout
from align.registry import suggest

if TYPE_CHECKING:
    import numpy as np

ENLARGED_AT_MOST, KEPT_AT_LEAST = 2.0, 0.5
_VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
_FIELDS = ("prompt", "image", "label", "chosen", "rejected")


def fitted(image: ImageFile, height: int, width: int) -> np.ndarray:
    """Return an image at the model's size, float32 `[3, height, width]` in [0, 1]; see the module on how.

    Raises:
        DataError: an image that cannot be decoded, or is too far off that size.
    """
    import numpy as np
    from PIL import Image

    upright = Image.fromarray(image.pixels())
    box = covering(upright.width, upright.height, width, height, image.place)
    if upright.size != (width, height):
        upright = upright.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(upright, dtype=np.float32).transpose(2, 0, 1) / 255


def covering(
    width: int, height: int, to_width: int, to_height: int, where: str = ""
) -> tuple[float, float, float, float]:
    """Return the central part of an image that is scaled to another size: `(left, top, right, bottom)`.

    Raises:
        DataError: an image that is far smaller, or of another shape.
    """
    scale = max(to_width / width, to_height / height)
    kept_width, kept_height = to_width / scale, to_height / scale
    kept, problem = kept_width * kept_height / (width * height), ""
    if scale > ENLARGED_AT_MOST:
        problem = f"it would be enlarged {scale:.3g} times, and {ENLARGED_AT_MOST:g} is the most"
    elif kept < KEPT_AT_LEAST:
        problem = f"the crop would leave {kept:.0%} of it, and {KEPT_AT_LEAST:.0%} is the least"
    if problem:
        raise DataError(
            f"An image of {width}x{height} is far from the model's {to_width}x{to_height}", where=where, why=problem,
            do="Remove the row, or set sampler.height and sampler.width nearer to the images",
        )  # fmt: skip
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


@dataclass(frozen=True)
class ImageRow:
    """One prompt with one image and its thumb, or with two images, the chosen one first, and no label."""

    prompt: str
    images: tuple[ImageFile, ...]
    label: bool | None
    place: str


@dataclass(frozen=True)
class ImageFeedback:
    """Rows in file order, and where they came from."""

    rows: tuple[ImageRow, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> dict[str, int]:
        """Return how many rows are thumbs up, thumbs down and pairs."""
        labels = [row.label for row in self.rows]
        return {"up": labels.count(True), "down": labels.count(False), "pairs": labels.count(None)}

    def for_loss(self, loss: str, *, both: bool = True) -> ImageFeedback:
        """Return the rows that a loss learns from: pairs for dpo; for kto thumbs, a pair being two.

        Args:
            both: refuse thumbs of one kind.

        Raises:
            DataError: no pair, or thumbs of one kind.
        """
        if loss == "dpo":
            pairs = tuple(row for row in self.rows if row.label is None)
            if not pairs:
                raise DataError(
                    "There is no pair in the data", where=self.source, why="dpo needs the fields chosen and rejected",
                    do="Set objective.loss: kto to learn from thumbs, or `align feedback convert --to pairs`",
                )  # fmt: skip
            return replace(self, rows=pairs)
        thumbs: list[ImageRow] = []
        for row in self.rows:
            labels = (True, False) if row.label is None else (row.label,)
            thumbs += [replace(row, images=(i,), label=v) for i, v in zip(row.images, labels, strict=True)]
        found = replace(self, rows=tuple(thumbs))
        up, down = found.counts()["up"], found.counts()["down"]
        if both and not (up and down):
            raise DataError(
                f"There is no thumb {'down' if up else 'up'} in the data", where=f"{self.source}, field 'label'",
                why=f"found {up} up and {down} down; kto learns from the difference",
                do=f"Add rows that people {'disliked' if up else 'liked'}",
            )  # fmt: skip
        return found

    def split(self, fraction: float) -> tuple[ImageFeedback, ImageFeedback]:
        """Return (training, held-out): whole prompts, chosen by a hash of their text as `split_heldout` does."""
        numbered = tuple({"row": i} for i in range(len(self)))
        sides = split_heldout(PromptSet(tuple(r.prompt for r in self.rows), (), numbered, self.source), fraction)
        return tuple(replace(self, rows=tuple(self.rows[m["row"]] for m in s.metadata)) for s in sides)


def load_image_feedback(
    source: str | Path | Iterable[Mapping[str, Any]], *, root: str | Path | None = None
) -> ImageFeedback:
    """Return the rows of a JSONL, CSV or Parquet file, or of mappings.

    Args:
        root: the folder that image paths are relative to; that of the file when None.

    Raises:
        DataError: a file that cannot be read; a row without prompt or image, with a label that is no thumb, with a
            video, or that is neither of the two forms. Each names the file, the row and the field.
    """
    if isinstance(source, (str, Path)):
        rows, name, base = read_rows(source), str(source), Path(source).parent
    else:
        rows, name, base = ((f"item {i}", row) for i, row in enumerate(source)), "given rows", Path()
    base = base if root is None else Path(root)
    found = tuple(_row(row, f"{name}, {place}", base) for place, row in rows)
    if not found:
        raise DataError("There is no row", where=name, why="it is empty")
    return ImageFeedback(found, name)


def training_and_heldout_rows(
    rows: ImageFeedback, heldout: ImageFeedback | None, fraction: float
) -> tuple[ImageFeedback, ImageFeedback]:
    """Return (training, held-out) rows; with neither a held-out file nor a fraction, the training rows twice.

    Raises:
        DataError: a prompt on both sides, or too few prompts.
    """
    if heldout is not None:
        require_apart([r.prompt for r in rows.rows], [r.prompt for r in heldout.rows], heldout.source)
        return rows, heldout
    return rows.split(fraction) if fraction else (rows, rows)


def _row(row: Any, where: str, base: Path) -> ImageRow:
    if not isinstance(row, Mapping):
        raise DataError("A row is not an object with named fields", where=where, why=f"found {short_repr(row)}")
    given = {str(k): v for k, v in row.items() if v is not None and v != ""}
    if "video" in given:
        raise DataError(
            "A row has a video", where=f"{where}, field 'video'", why="only images can be learnt from here",
            do="Remove the row, or train with rewards: trainer dance_grpo or forward",
        )  # fmt: skip
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        why = f"found {short_repr(prompt)}" if "prompt" in given else "it is missing or empty"
        raise DataError("A row has no prompt", where=f"{where}, field 'prompt'", why=why, do="Write the text there")
    if "chosen" in given or "rejected" in given:
        images = tuple(_image(given, field, where, base) for field in ("chosen", "rejected"))
        return ImageRow(prompt, images, None, where)
    field = "image" if "image" in given or "completion" not in given else "completion"
    image = _image(given, field, where, base)
    label = read_thumb(given["label"]) if "label" in given else None
    if label is None:
        found = short_repr(given["label"]) if "label" in given else "nothing"
        raise DataError(
            "A row has no thumb", where=f"{where}, field 'label'", why=f"found {found}, expected {THUMBS}",
            do="Write one of these, or remove the row; silence is not a thumb down",
        )  # fmt: skip
    return ImageRow(prompt, (image,), label, where)


def _image(given: Mapping[str, Any], field: str, where: str, base: Path) -> ImageFile:
    place, value = f"{where}, field {field!r}", given.get(field)
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        near = [name for name in given if name not in _FIELDS]
        hint = suggest(field, near) if near else ""
        raise DataError(
            "A row has no image", where=place, why=f"its fields are {', '.join(given)}",
            do=hint if hint.startswith("Did") else "Give a path, or remove the row",
        )  # fmt: skip
    if isinstance(value, (bytes, bytearray)):
        return image_file(bytes(value), place)
    if not isinstance(value, str):
        raise DataError("An image is a path or bytes", where=place, why=f"found {short_repr(value)}")
    path = base / value
    if path.suffix.lower() in _VIDEOS:
        raise DataError(
            "A row has a video", where=place, why=f"{value}; only images can be learnt from here",
            do="Remove the row, or train with rewards: trainer dance_grpo or forward",
        )  # fmt: skip
    if len(value) > 4096 or not path.is_file():
        raise DataError(
            "There is no such image", where=place, why=short_repr(str(path)),
            do="Paths are relative to the file; set data.root where they are relative to another folder",
        )  # fmt: skip
    return image_file(path, place)


def distinct_prompts(rows: Sequence[ImageRow]) -> list[str]:
    """Return the prompts of rows, each once, in order."""
    return list(dict.fromkeys(row.prompt for row in rows))
