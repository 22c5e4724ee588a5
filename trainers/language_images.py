"""Images of rows as a vision-language model reads them, made by the model's own processor when a batch needs them.

A batch holds, for each of its rows, what the processor returns beside token ids and their mask: values a token, such as
`mm_token_type_ids`, as further `[B, T]` tensors, and the rest, such as `pixel_values` and `image_grid_thw`, under
`images`, one mapping a row, which `model_inputs` joins along the first dimension.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.errors import DataError, first_line
from align.images import ImageFile


def has_images(processor: Any) -> bool:
    """Return whether this is the processor of a vision-language model, rather than a tokenizer."""
    return hasattr(processor, "image_processor")


def image_tokens(processor: Any) -> set[int]:
    """Return the token ids that stand for images."""
    found = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return {int(token) for token in found if token is not None}


def image_inputs(images: Sequence[ImageFile], text: str, processor: Any, place: str) -> dict[str, Tensor]:
    """Return what the processor makes of a prompt with images: `input_ids [1, T]`, images expanded, and the rest.

    Raises:
        DataError: an image that cannot be read, or images that the processor refuses.
    """
    from PIL import Image

    pictures = [Image.fromarray(image.pixels()) for image in images]
    try:
        found = processor(text=[text], images=[pictures], add_special_tokens=False, return_tensors="pt")
    except ValueError as error:
        raise DataError(
            "Images do not fit the model's processor", where=place, why=first_line(error),
            do="Look at the images' shapes, and for the model's image token in the text",
        ) from error  # fmt: skip
    return dict(found)


@dataclass(frozen=True)
class Pictures:
    """The images of N rows.

    Args:
        images: of each row, empty for a row of text.
        texts: each row's prompt, the model's image token standing where an image goes.
        places: where each row stands, for messages.
        processor: of transformers.
    """

    images: list[tuple[ImageFile, ...]]
    texts: list[str]
    places: list[str]
    processor: Any

    def digest(self, row: int) -> bytes:
        """Return 16 bytes that name what a row's images are to the model, none for a row of text."""
        if not self.images[row]:
            return b""
        text = "|".join([self._settings, *(image.digest for image in self.images[row])])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @functools.cached_property
    def _settings(self) -> str:
        return self.processor.image_processor.to_json_string()

    @property
    def mixed(self) -> bool:
        """Whether some rows have images and others do not."""
        return len({bool(images) for images in self.images}) > 1

    def added(self, batch: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Any]:
        """Return a batch of `collate` with what the images of the given rows, one each, add to it."""
        made = {row: self._inputs(row) for row in dict.fromkeys(rows)}
        found: dict[str, Any] = dict(batch)
        for name in self._token_names:
            found[name] = torch.zeros_like(batch["input_ids"])
            for i, row in enumerate(rows):
                values = made[row][0].get(name, ())
                found[name][i, : len(values)] = torch.as_tensor(values)
        found["images"] = [made[row][1] for row in rows]
        return found

    @functools.cached_property
    def _token_names(self) -> list[str]:
        """What the processor says of every token, of text alone too."""
        return [n for n in self.processor(text=["a"]) if n not in ("input_ids", "attention_mask")]

    def _inputs(self, row: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the values of each prompt token `[T]`, and those of the images."""
        if not self.images[row]:
            return {}, {}
        made = image_inputs(self.images[row], self.texts[row], self.processor, self.places[row])
        a_token = {name: made.pop(name)[0] for name in self._token_names if name in made}
        return a_token, {n: v for n, v in made.items() if n not in ("input_ids", "attention_mask")}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the arguments of a model's forward: a batch without its labels, images joined along dimension 0.

    Where rows differ in another dimension, such as the number of tiles, the smaller ones end in zeros, as processors
    pad them.
    """
    found = {name: value for name, value in batch.items() if name not in ("labels", "images")}
    rows = [row for row in batch.get("images", ()) if row]
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        sizes = [max(sides) for sides in zip(*(value.shape[1:] for value in values), strict=True)]
        found[name] = torch.cat([_padded(value, sizes) for value in values])
    return found


def _padded(value: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [(0, size - side) for side, size in zip(value.shape[1:], sizes, strict=True)]
    return torch.nn.functional.pad(value, [edge for pair in reversed(missing) for edge in pair])
