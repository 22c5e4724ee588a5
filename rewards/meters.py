"""Meters of images: what a hacked reward usually bends, whatever it was. They reward nothing and are only watched.

Pixels in [0, 1], gray ones are equal channels. Each is one number an image:

    brightness   mean of the luminance Y = .299 R + .587 G + .114 B; of the digits, which are gray, their ink
    saturation   mean over pixels of max_c - min_c: 0 is gray
    clipped      share of pixel values within 1/255 of 0 or 1
    contrast     standard deviation of Y
    sharpness    mean square of the 4-neighbour Laplacian of Y
    edges        mean absolute difference of Y to the right and lower neighbours
    border       mean absolute difference of Y between the outermost ring of pixels and the next one
    distance     root mean square difference, at 32 pixels a side at most, from the next sample of the same prompt, the
                 last being before the first: near 0 they are duplicates; missing for a prompt's only sample
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.types import Samples

SMALL = 32
NAMES = ("brightness", "saturation", "clipped", "contrast", "sharpness", "edges", "border")


def measure_images(images: Tensor | Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Return every meter of B images, float64 `[B]` each, NaN for an image with pixels that are not numbers.

    Args:
        images: `[B, C, H, W]`, or B tensors `[C, H, W]`, of 3 pixels a side or more.
    """
    rows = [_meters(image.detach().double()) for image in images]
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(NAMES)}


def measure_pixels(samples: Samples, frames: int = 8) -> dict[str, np.ndarray]:
    """Return every meter of B samples, float64 `[B]`: of images, or the mean over up to `frames` frames of a video."""
    if samples.videos is None:
        shown = [image[None] for image in samples.images]
    else:
        shown = [video.spread(frames) for video in samples.videos]
    parts = [measure_images(pixels) for pixels in shown]
    found = {name: np.array([part[name].mean() for part in parts]) for name in NAMES}
    return {**found, "distance": _distances(shown, [str(prompt) for prompt in samples.prompts])}


def _distances(shown: Sequence[Tensor], prompts: Sequence[str]) -> np.ndarray:
    small = [
        F.adaptive_avg_pool2d(pixels.detach().float(), [min(SMALL, side) for side in pixels.shape[-2:]]).flatten()
        for pixels in shown
    ]
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    found = np.full(len(small), np.nan)
    for rows in groups.values():
        for i, j in zip(rows, rows[1:] + rows[:1], strict=True):
            if i != j and small[i].shape == small[j].shape:
                found[i] = float((small[i] - small[j]).square().mean().sqrt())
    return found


def _meters(image: Tensor) -> list[float]:
    rgb = image.expand(3, -1, -1) if image.shape[0] == 1 else image
    y = (rgb * rgb.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    laplacian = y[1:-1, :-2] + y[1:-1, 2:] + y[:-2, 1:-1] + y[2:, 1:-1] - 4 * y[1:-1, 1:-1]
    across, down = (y[:, 1:] - y[:, :-1]).abs(), (y[1:] - y[:-1]).abs()
    ring = torch.cat([across[:, 0], across[:, -1], down[0], down[-1]])
    clipped = ((rgb <= 1 / 255) | (rgb >= 254 / 255)).double().mean()
    values = (
        y.mean(), rgb.amax(0).sub(rgb.amin(0)).mean(), clipped, y.std(unbiased=False), laplacian.square().mean(),
        torch.cat([across.flatten(), down.flatten()]).mean(), ring.mean(),
    )  # fmt: skip
    finite = bool(image.isfinite().all())
    return [float(v) if finite else float("nan") for v in values]
