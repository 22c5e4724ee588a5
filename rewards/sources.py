"""What is to be scored: images of a folder, images named in a table, or completions of a table, with their prompts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import DataError
from align.images import MOST_FILE_BYTES, decode_image, rgb_array
from align.prompts import PromptSet, load_prompts
from align.registry import suggest

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Source:
    """One sample to be scored: a prompt with an image file, or with a completion."""

    prompt: str
    image: Path | None = None
    completion: str | list[Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A sample that was read: the key of its content, its pixels `[H, W, 3]` uint8, or what is wrong with it."""

    key: str = ""
    pixels: np.ndarray | None = None
    problem: str = ""


def read_sources(
    kind: str,
    prompts: str | Path | None,
    images: str | Path | None = None,
    *,
    image_column: str | None = None,
    completion_column: str = "completion",
) -> list[Source]:
    """Return the samples, in the order of the prompt table, else of the image names.

    Args:
        kind: "images" or "texts".
        prompts: a txt, JSONL, CSV or Parquet file; None scores images without a prompt.
        images: a folder. Its images go with the prompts one by one, in the natural order of their names (2 before
            10), unless the table names them.
        image_column: of the table, "image" where there is one. Paths are relative to `images`, else to the table.
        completion_column: of the table: texts, or lists of turns.

    Raises:
        DataError: nothing to score, counts that differ, or a row that names no image or holds no completion.
    """
    if kind == "texts":
        return _texts(_table(prompts, "completions"), completion_column)
    table = None if prompts is None else _table(prompts, "prompts")
    column = image_column or "image"
    if table is not None and (image_column is not None or any(column in row for row in table.metadata)):
        folder = Path(images) if images is not None else Path(str(prompts)).parent
        return [
            Source(prompt, folder / _named(row, column, f"{table.source}, row {i}"), None, _rest(row, column))
            for i, (prompt, row) in enumerate(zip(table.prompts, _rows(table), strict=True), 1)
        ]  # fmt: skip
    files = _folder(images, table, column)
    if table is None:
        return [Source("", file) for file in files]
    if len(files) != len(table):
        raise DataError(
            "Prompts and images do not pair up", where=f"{table.source}, {images}",
            why=f"{len(table)} prompts but {len(files)} images",
            do=f"Write one prompt an image, in the order of the names, or name each image in a column {column!r}",
        )  # fmt: skip
    return [Source(p, f, None, row) for p, f, row in zip(table.prompts, files, _rows(table), strict=True)]


def _table(prompts: str | Path | None, what: str) -> PromptSet:
    if prompts is None:
        raise DataError(f"A table of {what} is needed", do="Give --prompts FILE")
    return load_prompts(prompts)


def _rows(table: PromptSet) -> Sequence[Mapping[str, Any]]:
    return table.metadata or [{}] * len(table)


def _texts(table: PromptSet, column: str) -> list[Source]:
    found = []
    for i, (prompt, row) in enumerate(zip(table.prompts, _rows(table), strict=True), 1):
        where = f"{table.source}, row {i}"
        if column not in row:
            raise DataError(f"A row has no completion in a field {column!r}", where=where, do=suggest(column, row))
        completion = row[column]
        if not isinstance(completion, (str, list)):
            why = f"found {completion!r}"[:80]
            raise DataError("A completion is neither text nor a list of turns", where=where, why=why)
        found.append(Source(prompt, None, completion, _rest(row, column)))
    return found


def _named(row: Mapping[str, Any], column: str, where: str) -> str:
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise DataError(f"A row names no image in its field {column!r}", where=where, why=f"found {name!r}")
    return name


def _rest(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != column}


def _folder(images: str | Path | None, table: PromptSet | None, column: str) -> list[Path]:
    if images is None:
        where = "" if table is None else table.source
        raise DataError("There are no images to score", where=where, do=f"Give --images DIR, or a column {column!r}")
    folder = Path(images)
    if not folder.is_dir():
        raise DataError("There is no such folder of images", where=str(folder))
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES and not file.name.startswith(".")]
    if not files:
        raise DataError("The folder holds no images", where=str(folder), do=f"It may hold {', '.join(IMAGES)}")
    return sorted(files, key=lambda file: natural(file.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Return the sorting key of a name by which 2 stands before 10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [*((int(part) if part.isdecimal() else -1, part) for part in parts), (-2, name)]


def load(source: Source, known: Callable[[str], bool] = lambda key: False) -> Loaded:
    """Read one sample; what cannot be read is said, not raised. What is `known` by its key is not decoded."""
    if source.image is None:
        return Loaded(_key(source, json.dumps(source.completion, sort_keys=True).encode()))
    try:
        if source.image.stat().st_size > MOST_FILE_BYTES:
            return Loaded(problem=f"the image is refused: its file has more than {MOST_FILE_BYTES // 10**6} MB")
        raw = source.image.read_bytes()
    except OSError as error:
        return Loaded(problem=f"the image cannot be read: {error.strerror or error}")
    key = _key(source, raw)
    return Loaded(key) if known(key) else Loaded(key, *_decoded(raw))


def _key(source: Source, content: bytes) -> str:
    text = json.dumps([source.prompt, source.metadata], sort_keys=True, default=str)
    return hashlib.sha256(hashlib.sha256(content).digest() + text.encode()).hexdigest()[:24]


def _decoded(raw: bytes) -> tuple[np.ndarray | None, str]:
    image, problem = decode_image(raw)
    return None if image is None else rgb_array(image), problem


def shapes(loaded: Sequence[Loaded]) -> dict[tuple[int, ...], list[int]]:
    """Return which samples have pixels of one shape; texts have the shape ()."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(loaded):
        found.setdefault(() if sample.pixels is None else sample.pixels.shape, []).append(i)
    return found
