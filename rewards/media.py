"""Pixels in: checked one sample at a time, resized as each recipe says, scored in batches of one shape.

The exact and the differentiable path are one: everything works on `[0, 1]` tensors. Resizing is bicubic with
antialiasing, clamped and rounded to 8 bits after each direction with a straight-through gradient, which is what a PIL
pipeline does to an 8-bit image: one pixel in ten thousand differs from PIL's, by one level.
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
    if not torch.is_tensor(pixels):
        return f"the image is a {type(pixels).__name__}, not a tensor of pixels"
    channels = pixels.shape[-3] if pixels.ndim >= 3 else 0
    if channels not in (1, 3):
        return f"{channels or 'no'} channels; convert to RGB" + (" (an alpha channel has no colour)" * (channels == 4))
    if not pixels.is_floating_point():
        return f"pixels are {str(pixels.dtype).removeprefix('torch.')}, not floats in 0 to 1; divide by 255"
    if not pixels.numel():
        return f"the image has no pixels, {tuple(pixels.shape)}"
    if not bool(pixels.isfinite().all()):
        return "the image has pixels that are not numbers"
    low, high = (float(edge) for edge in pixels.detach().aminmax())
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
            image = samples.images[i]
            flat = torch.is_tensor(image) and image.ndim != 3
            found.append(f"the image has shape {tuple(image.shape)}, not [C, H, W]" if flat else pixel_problem(image))
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
            first = samples.select(rows[:1] * 2)
            size = placement.rows(
                str(shape), lambda two=first: forward(two.select([0]))[0], lambda two=first: forward(two)[0], modules
            )
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


def _to_levels(levels: Tensor) -> Tensor:  # written over where no graph needs it: images are large
    if not levels.requires_grad:
        return levels.add_(0.5).floor_().clamp_(0, 255)
    clamped = levels.clamp(0, 255)
    return clamped + ((clamped + 0.5).floor() - clamped).detach()


def resize(images: Tensor, height: int, width: int, *, resample: str = "bicubic", eight_bit: bool = True) -> Tensor:
    """Resize `[B, C, h, w]` with antialiasing, as PIL does the 8-bit image that these pixels would be saved as.

    PIL resizes rows, then columns, and clamps and rounds half up after each: so does this, in whole levels of 0 to
    255, which floats hold exactly.

    Args:
        resample: "bicubic" or "bilinear".
        eight_bit: clamp and round; without it, as torchvision resizes a float tensor.
    """
    levels = _to_levels(images * 255) if eight_bit else images
    for size in ((images.shape[-2], width), (height, width)):
        if tuple(levels.shape[-2:]) != size:
            levels = F.interpolate(levels, size, mode=resample, antialias=True, align_corners=False)
            levels = _to_levels(levels) if eight_bit else levels
    return levels / 255 if eight_bit else levels


def normalise(images: Tensor, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD) -> Tensor:
    """Return `(images - mean) / std`, channel by channel."""
    shape = (1, -1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


FITS = ("shortest", "longest", "squash")
CROPS = ("half_even", "floor")


def clip_pixels(
    images: Tensor,
    size: int = 224,
    *,
    fit: str = "shortest",
    crop: str = "half_even",
    resample: str = "bicubic",
    eight_bit: bool = True,
) -> Tensor:
    """Return what a CLIP tower sees of images `[B, 3, h, w]`: `[B, 3, size, size]`, normalised.

    Args:
        fit: "shortest" scales the shorter side to `size` and crops the centre (CLIP, PickScore, ImageReward);
            "longest" scales the longer side to `size` and pads the rest with black *before* normalising (HPS);
            "squash" scales both sides to `size` (DFN5B).
        crop: where the centre of an odd remainder is: rounded "half_even", as torchvision and CLIP crop, or to the
            "floor", as transformers' image processors do.
        resample, eight_bit: see `resize`.

    Raises:
        DataError: another `fit` or `crop`.
    """
    for value, known, what in ((fit, FITS, "fit"), (crop, CROPS, "crop")):
        if value not in known:
            raise DataError(f"Unknown {what} {value!r}", do=f"Choose one of: {', '.join(known)}")
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    if fit == "shortest":  # torchvision truncates the other side
        sides = [size if side == short else size * side // short for side in (height, width)]
    elif fit == "longest":  # open_clip rounds it, half to even
        sides = [size if side == long else max(1, round(side / (long / size))) for side in (height, width)]
    else:
        sides = [size, size]
    resized = resize(images, *sides, resample=resample, eight_bit=eight_bit)
    spare_h, spare_w = (side - size for side in sides)
    if fit == "longest":
        top, left = -spare_h // 2, -spare_w // 2
        return normalise(F.pad(resized, (left, -spare_w - left, top, -spare_h - top)))
    top, left = (round(spare / 2) if crop == "half_even" else spare // 2 for spare in (spare_h, spare_w))
    return normalise(resized[..., top : top + size, left : left + size])
