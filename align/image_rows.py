"""The images of a row of preferences: its columns `image` and `images`, and the parts of its messages they go with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.images import ImageFile, image_file
from align.prompts import short_repr

Messages = Sequence[Mapping[str, Any]]


def row_images(row: Mapping[str, Any], where: str, folder: Path) -> tuple[ImageFile, ...]:
    """Return the images of a row, from its column `image` or `images`.

    Args:
        row: a path, the mapping `{"bytes": ..., "path": ...}`, or in `images` a list of them or its JSON.
        where: file and row, for messages.
        folder: where paths begin.

    Raises:
        DataError: both columns, another value, or an image that cannot be read.
    """
    given = [name for name in ("image", "images") if row.get(name) is not None]
    if len(given) > 1:
        raise DataError("A row has both image and images", where=where, do="Keep one of the two columns")
    if not given:
        return ()
    name, value = given[0], row[given[0]]
    if name == "images" and isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value)
    values = value if name == "images" else [value]
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise _wrong(f"{where}, field {name!r}", value, "a list of images")
    several = len(values) > 1
    return tuple(
        _image(item, f"{where}, field {name!r}" + (f", image {i}" if several else ""), folder)
        for i, item in enumerate(values)
    )


def _image(value: Any, where: str, folder: Path) -> ImageFile:
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, value)
    if isinstance(content, bytes) and content:
        return image_file(content, where)
    if content is not None or not isinstance(path, str) or not path:
        raise _wrong(where, value, 'a path or {"bytes": ..., "path": ...}')
    return image_file(folder / path, where)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _wrong(where: str, found: Any, expected: str) -> DataError:
    return DataError("A field is wrong", where=where, why=f"found {short_repr(found)}, expected {expected}")


def checked_parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the parts of a message whose content is a list, without null keys, as Parquet adds them.

    Raises:
        DataError: a part that is neither `{"type": "image"}` nor `{"type": "text", "text": ...}`.
    """
    found = []
    for j, part in enumerate(content):
        kept = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
        image = kept == {"type": "image"}
        if not image and (kept.get("type") != "text" or not isinstance(kept.get("text"), str)):
            raise DataError(
                "A part of a message is wrong", where=f"{where}, part {j}",
                why=f'found {short_repr(part)}, expected {{"type": "image"}} or {{"type": "text", "text": ...}}',
                do="Name files in the column images" if kept.get("type") == "image" else "",
            )  # fmt: skip
        found.append(kept)
    return found


def count_images(messages: str | Messages) -> int:
    """Return how many parts of type image there are."""
    if isinstance(messages, str):
        return 0
    contents = [message.get("content") for message in messages]
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def with_image_parts(prompt: str | Messages, images: int, where: str) -> Any:
    """Return a prompt with a part of type image for each of so many images.

    A prompt with such parts is returned as it is. In one without, they stand at the beginning of the first message of
    the user, as in TRL.

    Raises:
        DataError: a prompt of plain text, one without a message of the user, or another number of parts.
    """
    parts = count_images(prompt)
    if not images and not parts:
        return prompt
    if isinstance(prompt, str):
        raise _wrong(f"{where}, field 'prompt'", prompt, "a list of messages, as the row has images")
    if images and not parts:
        first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
        if first is None:
            raise _wrong(f"{where}, field 'prompt'", prompt, "a message of the user to put the images into")
        content = text_parts(prompt[first])
        message = {**prompt[first], "content": [{"type": "image"}] * images + content}
        return (*prompt[:first], message, *prompt[first + 1 :])
    if parts != images:
        raise DataError(
            "The images of a row are not those of its prompt", where=f"{where}, field 'images'",
            why=f"found {images}, expected {parts}, one for each part of type image",
            do="Name as many images as the messages of the prompt show",
        )  # fmt: skip
    return prompt


def text_parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the content of a message as a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or [])
