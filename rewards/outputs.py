"""Outputs that people spoke of, as samples: what a reward is fitted on, and what it is asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.errors import DataError
from align.feedback.events import Item
from align.images import image_file
from align.types import Samples
from align.weights import file_sha256
from rewards.chats import read_turns

TEXTS = ("text", "chat")


def sample_of(item: Item) -> tuple[str, Any]:
    """Return the prompt as a text, and the response; of a chat the whole conversation."""
    response = item.response
    if isinstance(item.prompt, str):
        asked = f"{item.prompt}\n{item.input}" if item.input else item.prompt
        return asked, response if isinstance(response, str) else read_turns(response)
    turns = read_turns(item.prompt)
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else read_turns(response)
    return "\n".join(turn["content"] for turn in turns), [*turns, *answer]


def load_outputs(items: Sequence[Item], folders: Mapping[str, Path]) -> Samples:
    """Return outputs as samples, images decoded.

    Args:
        folders: where the path of an image begins, by the id of its item.

    Raises:
        DataError: an image that cannot be read.
    """
    pairs = [sample_of(item) for item in items]
    if all(item.media in TEXTS for item in items):
        return Samples([prompt for prompt, _ in pairs], texts=[text for _, text in pairs])
    images = []
    for item in items:
        pixels = image_file(_image_file(item, folders), str(item.response)).pixels()
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return Samples([str(prompt) for prompt, _ in pairs], images=images)


def require_images(items: Sequence[Item], folders: Mapping[str, Path]) -> None:
    """Refuse images that are not there.

    Args:
        folders: where the path of an image begins, by the id of its item.

    Raises:
        DataError: naming the first of them, with how many.
    """
    files = {_image_file(item, folders) for item in items if item.media not in TEXTS}
    if gone := sorted(file for file in files if not file.is_file()):
        raise DataError(
            "Some images are not there", where=str(gone[0]), why=f"{len(gone)} of {len(files)} are missing",
            do="Say in which folder their paths begin (data.folder, --images)" if len(gone) == len(files)
            else "Put them back, or leave out the rows that name them",
        )  # fmt: skip


def content_keys(items: Sequence[Item], folders: Mapping[str, Path]) -> list[str]:
    """Return hashes of prompts and content, an image's being that of its file.

    Raises:
        DataError: see `require_images`.
    """
    if all(item.media in TEXTS for item in items):
        return [item.id for item in items]
    require_images(items, folders)
    digests = [file_sha256(_image_file(item, folders)) for item in items]
    return [f"{item.prompt_id}{digest[:24]}" for item, digest in zip(items, digests, strict=True)]


def _image_file(item: Item, folders: Mapping[str, Path]) -> Path:
    return folders[item.id] / str(item.response)
