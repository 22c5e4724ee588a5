"""Pixels in: checked one sample at a time, resized as each recipe says, scored in batches of one shape.

The exact and the differentiable path are one: everything works on `[0, 1]` tensors. Resizing is bicubic with
antialiasing, clamped, and rounded to 8 bits with a straight-through gradient, which is what a PIL pipeline does to
an 8-bit image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.errors import DataError
from align.types import Samples, Scores
from rewards.placement import Placement

if TYPE_CHECKING:
    from torch import nn

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_MEDIA = {"image": "images", "video": "videos", "text": "texts"}

Forward = Callable[[Samples], "tuple[Tensor, Mapping[str, Sequence[object]]]"]
"""Scores some samples of one shape: values `[b, K]`, and extras with one value a sample."""


def require_media(samples: Samples, media: str, name: str) -> None:
    """Refuse samples of another kind than a reward scores.

    Raises:
        DataError: naming both kinds.
    """
    if media != "any" and samples.media != _MEDIA[media]:
        raise DataError(f"The reward {name!r} scores {_MEDIA[media]}", why=f"it was given {samples.media}")


def pixel_problem(pixels: Tensor) -> str:
    """Return what is wrong with the pixels `[..., C, H, W]` of one sample, empty when nothing is."""
    channels = pixels.shape[-3] if pixels.ndim >= 3 else 0
    if channels not in (1, 3):
        return f"{channels or 'no'} channels; convert to RGB" + (" (an alpha channel has no colour)" * (channels == 4))
    if not pixels.is_floating_point():
        return f"pixels are {str(pixels.dtype).removeprefix('torch.')}, not floats in 0 to 1; divide by 255"
    if not bool(pixels.isfinite().all()):
        return "the image has pixels that are not numbers"
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1e-4 or high > 1 + 1e-4:
        return f"pixels run from {low:.2f} to {high:.2f}, not within 0 to 1"
    return ""


def problems(samples: Samples, *, prompts: bool = True) -> list[str]:
    """Return for each sample what makes it impossible to score, empty when nothing does.

    Args:
        prompts: whether the prompt is read, so that an empty one is a problem.
    """
    found = []
    for i, prompt in enumerate(samples.prompts):
        if prompts and not prompt.strip():
            found.append("the prompt is empty")
        elif samples.media == "images":
            found.append(pixel_problem(samples.images[i]))
        elif samples.media == "videos":
            found.append(pixel_problem(samples.videos[i].frames))
        else:
            found.append("")
    return found


def _shape(samples: Samples, i: int) -> tuple[object, ...]:
    if samples.media == "images":
        return tuple(samples.images[i].shape)
    if samples.media == "videos":
        return (*samples.videos[i].frames.shape, samples.videos[i].fps)
    return ()


def score_samples(
    samples: Samples,
    names: Sequence[str],
    forward: Forward,
    placement: Placement,
    modules: Sequence[nn.Module] = (),
    *,
    wrong: Sequence[str] | None = None,
) -> Scores:
    """Score B samples without gradient: what is `wrong` is missing, the rest goes forward in batches of one shape.

    Args:
        names: the K components.
        forward: scores some samples of one shape, on the placement's device.
        modules: what must be on that device meanwhile.
        wrong: one message a sample, from `problems` when None.

    Returns:
        scores `[B, K]` in the order of `samples`, whatever the batches were.
    """
    wrong = list(problems(samples) if wrong is None else wrong)
    values = np.full((len(samples), len(names)), np.nan)
    extras: dict[str, list[object]] = {}
    shapes: dict[tuple[object, ...], list[int]] = {}
    for i, message in enumerate(wrong):
        if not message:
            shapes.setdefault(_shape(samples, i), []).append(i)
    with placement.active(*modules):
        for shape, rows in shapes.items():
            size = placement.rows(str(shape), lambda rows=rows: forward(samples.select(rows[:1]))[0])
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                with torch.no_grad():
                    scored, found = forward(samples.select(part))
                values[part] = scored.double().cpu().numpy().reshape(len(part), len(names))
                for key, column in found.items():
                    kept = extras.setdefault(key, [None] * len(samples))
                    for i, value in zip(part, column, strict=True):
                        kept[i] = value
    for i in range(len(samples)):
        if not wrong[i] and not np.isfinite(values[i]).all():
            bad = [name for name, value in zip(names, values[i], strict=True) if not np.isfinite(value)]
            wrong[i] = f"{', '.join(bad)}: the model returned a value that is not a number"
    return Scores(values, np.isfinite(values), tuple(names), tuple(wrong), extras)


def stacked(images: Tensor | Sequence[Tensor], device: torch.device) -> Tensor:
    """Return images of one size as `[B, 3, H, W]` float32 on `device`; gray ones get three equal channels."""
    batch = images if torch.is_tensor(images) else torch.stack(list(images))
    batch = batch.to(device, torch.float64 if batch.dtype == torch.float64 else torch.float32)
    return batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch


def to_8_bit(pixels: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to multiples of 1/255, with the gradient of the clamp alone."""
    clamped = pixels.clamp(0, 1)
    return clamped + ((clamped * 255).round() / 255 - clamped).detach()


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize `[B, C, h, w]` as PIL does an 8-bit image: bicubic, antialiased, clamped, rounded."""
    if tuple(images.shape[-2:]) == (height, width):
        return to_8_bit(images)
    return to_8_bit(F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False))


def normalise(images: Tensor, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD) -> Tensor:
    """Return `(images - mean) / std`, channel by channel."""
    shape = (1, -1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def clip_pixels(images: Tensor, size: int = 224, *, fit: str = "shortest") -> Tensor:
    """Return what a CLIP tower sees of images `[B, 3, h, w]`: `[B, 3, size, size]`, normalised.

    Args:
        fit: "shortest" scales the shorter side to `size` and crops the centre (CLIP, PickScore, ImageReward);
            "longest" scales the longer side to `size` and pads the rest with black *before* normalising (HPS).

    Raises:
        DataError: another `fit`.
    """
    height, width = images.shape[-2:]
    if fit not in ("shortest", "longest"):
        raise DataError(f"Unknown fit {fit!r}", do="Choose shortest or longest")
    scale = size / (min if fit == "shortest" else max)(height, width)
    # torchvision's arithmetic: the other side is truncated, not rounded.
    sides = [size if side * scale == size else max(1, int(side * scale + 1e-9)) for side in (height, width)]
    if fit == "longest":
        sides = [size if side == max(height, width) else max(1, round(side * scale)) for side in (height, width)]
    resized = resize(images, *sides)
    top, left = (sides[0] - size) / 2, (sides[1] - size) / 2
    if fit == "shortest":
        top, left = round(top), round(left)
        return normalise(resized[..., top : top + size, left : left + size])
    pad_left, pad_top = int(-left), int(-top)
    return normalise(F.pad(resized, (pad_left, size - sides[1] - pad_left, pad_top, size - sides[0] - pad_top)))
