"""What travels between a reward server and its clients: JSON, with pixels as base64. Nothing is ever unpickled.

    POST /score    {reward, identity?, items: [item]}
                -> {names, ids, values, valid, errors, extras, identity, ms}
    GET  /rewards  -> {rewards: [{reward, args, names, identity, card}]}
    GET  /health   -> {status, rewards}

    item    {id, prompt, metadata?, and one of}
            image   a PNG of 8 bits a channel as base64, or {shape: [C, H, W], float32: base64}
            video   {fps, frames: [PNG]}, or {fps, frames: {shape: [F, C, H, W], float32: base64}}
            text    the completion
            chat    [{role, content}]

An answer holds one row an item, each with the item's `id`, so that a row can never be taken for another's. A missing
score is `null` and not valid. `float32` is little-endian, in C order. Two things happen to pixels on their way as PNG:
they are rounded to multiples of 1/255, and a value k/255 arrives as exactly that float32.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from align.errors import DataError
from align.types import Samples, Scores, Video
from rewards.media import pixel_problem

ENCODINGS = ("png", "float32")
MOST_NUMBERS = 1 << 28
"""Numbers in the pixels of one item, about 1 GB: more is refused before it is decoded."""

_KINDS = {"image": "images", "video": "videos", "text": "texts", "chat": "texts"}


@dataclass(frozen=True)
class Answer:
    """What is said of one sample: K values, NaN where missing, a message, and what else was found out."""

    values: tuple[float, ...]
    error: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def valid(self) -> tuple[bool, ...]:
        """Which of the values are there."""
        return tuple(math.isfinite(value) for value in self.values)


# --- items ------------------------------------------------------------------------------------------


def pack_item(samples: Samples, i: int, encoding: str = "png") -> bytes:
    """Return sample `i` as the JSON of an item whose id is `i`.

    Raises:
        DataError: pixels that are no image, or metadata that JSON has no form for.
    """
    item: dict[str, Any] = {"id": i, "prompt": samples.prompts[i]}
    medium: Any = getattr(samples, samples.media)[i]
    if samples.media == "images":
        item["image"] = _pack_pixels(medium, encoding)
    elif samples.media == "videos":
        item["video"] = {"fps": medium.fps, "frames": _pack_pixels(medium.frames, encoding)}
    elif isinstance(medium, str):
        item["text"] = medium
    else:
        item["chat"] = [dict(turn) for turn in medium]
    if samples.metadata:
        item["metadata"] = dict(samples.metadata[i])
    try:
        return json.dumps(item, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise DataError("The metadata of a sample cannot be sent", why=str(error)) from error


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as JSON has them."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"JSON has no form for a {type(value).__name__}")


def _pack_pixels(pixels: Tensor, encoding: str) -> Any:
    if problem := pixel_problem(pixels):
        raise DataError(problem[:1].upper() + problem[1:])
    if encoding == "png":
        return _pack_png(pixels) if pixels.ndim == 3 else [_pack_png(frame) for frame in pixels]
    array = np.ascontiguousarray(pixels.detach().float().cpu().numpy(), dtype="<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


def _pack_png(pixels: Tensor) -> str:
    array = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    with io.BytesIO() as file:
        image.save(file, "PNG", compress_level=1)
        return base64.b64encode(file.getvalue()).decode()


def unpack_items(items: Sequence[Any]) -> tuple[Samples | None, list[int], list[str]]:
    """Return the samples of those items that can be read, their places among `items`, and one message an item.

    Raises:
        DataError: items of different kinds, of which no reward scores both.
    """
    wrong, found = [""] * len(items), {}
    for i, item in enumerate(items):
        try:
            found[i] = _unpack_item(item)
        except DataError as error:
            wrong[i] = str(error)
    kinds = sorted({kind for kind, *_ in found.values()})
    if len(kinds) > 1:
        raise DataError("The items of a request are of one kind", why=f"it holds {' and '.join(kinds)}")
    if not found:
        return None, [], wrong
    media: Any = [medium for _, _, medium, _ in found.values()]
    if kinds[0] == "images" and len({image.shape for image in media}) == 1:
        media = torch.stack(media)
    samples = Samples(
        prompts=[prompt for _, prompt, _, _ in found.values()],
        metadata=[metadata for *_, metadata in found.values()],
        **{kinds[0]: media},
    )
    return samples, list(found), wrong


def _unpack_item(item: Any) -> tuple[str, str, Any, Mapping[str, Any]]:
    if not isinstance(item, dict):
        raise DataError("An item must be an object", why=f"got a {type(item).__name__}")
    prompt, metadata = item.get("prompt", ""), item.get("metadata", {})
    if not isinstance(prompt, str) or not isinstance(metadata, dict):
        raise DataError("An item needs its prompt as text and its metadata as an object")
    given = [name for name in _KINDS if name in item]
    if len(given) != 1:
        raise DataError(f"An item holds one of {', '.join(_KINDS)}", why=f"got {', '.join(given) or 'none'}")
    kind, medium = given[0], item[given[0]]
    if kind == "image":
        medium = _unpack_pixels(medium, 3)
    elif kind == "video":
        medium = _unpack_video(medium)
    elif kind == "text" and not isinstance(medium, str):
        raise DataError("The text of an item must be text", why=f"got a {type(medium).__name__}")
    elif kind == "chat" and not _is_chat(medium):
        raise DataError("A chat is a list of turns with role and content")
    return _KINDS[kind], prompt, medium, metadata


def _is_chat(turns: Any) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )


def _unpack_video(video: Any) -> Video:
    if not isinstance(video, dict):
        raise DataError("A video is an object of fps and frames")
    frames = video.get("frames")
    if isinstance(frames, list):
        pixels, left = [], MOST_NUMBERS
        for frame in frames:
            pixels.append(_unpack_pixels(frame, 3, left))
            left -= pixels[-1].numel()
        if not pixels or len({frame.shape for frame in pixels}) != 1:
            raise DataError("A video needs frames of one size", why=f"got {len(pixels)} frames")
        frames = torch.stack(pixels)
    else:
        frames = _unpack_pixels(frames, 4)
    fps: Any = video.get("fps")
    return Video(frames, fps)


def _unpack_pixels(given: Any, axes: int, most: int | None = None) -> Tensor:
    most = MOST_NUMBERS if most is None else most
    if isinstance(given, dict):
        return _unpack_float32(given, axes, most)
    if not isinstance(given, str):
        raise DataError("Pixels are a PNG as base64, or an object of shape and float32")
    data = _bytes(given)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in ("L", "RGB"):
                raise DataError("A PNG must be gray or RGB, 8 bits a channel", why=f"this one is {image.mode}")
            if image.width * image.height * len(image.getbands()) > most:
                raise DataError("An image is too large", why=f"{image.width} x {image.height}")
            array = np.array(image)
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        zlib.error,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError("A PNG cannot be read", why=str(error).strip().rstrip(".")) from error
    pixels = torch.from_numpy(array)
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).contiguous().float() / 255


def _unpack_float32(given: Mapping[str, Any], axes: int, most: int) -> Tensor:
    shape, text = given.get("shape"), given.get("float32")
    if (
        not isinstance(shape, list)
        or len(shape) != axes
        or not all(type(n) is int and n > 0 for n in shape)
        or not isinstance(text, str)
        or math.prod(shape) > most
    ):
        raise DataError(f"Raw pixels need a shape of {axes} sizes and float32 as base64", why=f"the shape is {shape}")
    data = _bytes(text)
    if len(data) != 4 * math.prod(shape):
        raise DataError("Raw pixels disagree with their shape", why=f"{len(data)} bytes for {shape}")
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(shape))


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("Pixels are no base64", why=str(error)) from error


# --- scores -----------------------------------------------------------------------------------------


def read_scores(scores: Scores) -> list[Answer]:
    """Return scores sample by sample, with those extras that have one value a sample."""
    columns = {
        name: column
        for name, column in scores.extras.items()
        if isinstance(column, (list, tuple, np.ndarray)) and len(column) == len(scores)
    }
    return [
        Answer(tuple(row), scores.errors[i], {name: _json_value(column[i]) for name, column in columns.items()})
        for i, row in enumerate(scores.values.tolist())
    ]


def pack_answers(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what a server says of its items in turn: values, valid, errors and extras."""
    names = dict.fromkeys(name for answer in answers for name in answer.extras)
    return {
        "values": [[_number_or_none(value) for value in answer.values] for answer in answers],
        "valid": [list(answer.valid) for answer in answers],
        "errors": [answer.error for answer in answers],
        "extras": {name: [answer.extras.get(name) for answer in answers] for name in names},
    }


def _number_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json_value(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) or (torch.is_tensor(value) and value.numel() == 1) else value
    if isinstance(value, float):
        return _number_or_none(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def unpack_scores(document: Any, names: Sequence[str], ids: Sequence[int]) -> dict[int, Answer]:
    """Return what an answer says of each id, whatever the order of its rows.

    A value that is `null`, not a finite number, or not valid is missing.

    Raises:
        DataError: an answer that is not about these ids and components, one row each.
    """
    if not isinstance(document, dict):
        raise DataError("The answer is no JSON object")
    if document.get("names") != list(names):
        raise DataError("The answer has other components", why=f"{document.get('names')} instead of {list(names)}")
    for key in ("ids", "values", "valid", "errors"):
        column = document.get(key)
        if not isinstance(column, list) or len(column) != len(ids):
            found = len(column) if isinstance(column, list) else "no"
            raise DataError("The answer has another length", why=f"{found} {key} for {len(ids)} samples")
    if not all(type(i) is int for i in document["ids"]) or sorted(document["ids"]) != sorted(ids):
        raise DataError("The answer is about other samples than were sent", why=f"ids {document['ids']}"[:200])
    extras: Any = document.get("extras")
    extras = extras.items() if isinstance(extras, dict) else ()
    columns = {name: column for name, column in extras if isinstance(column, list) and len(column) == len(ids)}
    answers = {}
    for row, i in enumerate(document["ids"]):
        given, valid, error = (document[key][row] for key in ("values", "valid", "errors"))
        if not isinstance(given, list) or not isinstance(valid, list) or not len(given) == len(valid) == len(names):
            raise DataError("The answer has rows of another length", why=f"row {row} is {given!r}"[:200])
        values = [_number(value) if good is True else math.nan for value, good in zip(given, valid, strict=True)]
        lost = [n for n, v, good in zip(names, values, valid, strict=True) if good is True and math.isnan(v)]
        error = error if isinstance(error, str) else ""
        if lost:
            error = "; ".join(filter(None, (error, f"{', '.join(lost)}: the server sent no finite number")))
        if not error and any(map(math.isnan, values)):
            error = "missing, and the server gave no reason"
        answers[i] = Answer(tuple(values), error, {name: column[row] for name, column in columns.items()})
    return answers


def _number(value: Any) -> float:
    """The number `value` is, NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def gather_answers(answers: Mapping[int, Answer], names: Sequence[str], count: int) -> Scores:
    """Put the answers about samples 0 to count - 1 together; what an extra lacks is NaN among numbers, else None."""
    rows = [answers[i] for i in range(count)]
    values = np.array([row.values for row in rows], dtype=np.float64).reshape(count, len(names))
    extras: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row.extras):
        column = [row.extras.get(key) for row in rows]
        numeric = all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in column)
        extras[key] = np.array([_number(v) for v in column]) if numeric else column
    return Scores(values, np.isfinite(values), tuple(names), tuple(row.error for row in rows), extras)
