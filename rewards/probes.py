"""What else a reward goes by: the length of a text, the brightness of an image, and whether it reads the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from align.errors import DataError
from align.feedback.bias import pearson, spearman
from align.types import Samples
from rewards.base import Reward, score_safely


def probe_length(scores_B: np.ndarray, texts: Sequence[str]) -> dict[str, float]:
    """Return how a reward of texts goes with their length: Spearman and Pearson over samples that have a score."""
    length = np.array([len(text) for text in texts], dtype=np.float64)
    kept = np.isfinite(scores_B)
    return {
        "n": int(kept.sum()), "spearman": spearman(scores_B[kept], length[kept]),
        "pearson": pearson(scores_B[kept], length[kept]),
    }  # fmt: skip


def probe_brightness(
    reward: Reward, samples: Samples, factors: Sequence[float] = (0.8, 1.25), *, component: int = 0
) -> dict[str, float]:
    """Return by how much a reward of images changes when their pixels are multiplied, in its standard deviations.

    Raises:
        DataError: samples that are no images, or none with a score.
    """
    if samples.images is None:
        raise DataError("Brightness is a matter of images", why=f"got {samples.media}")
    plain = _column(reward, samples, component)
    found = {}
    for factor in factors:
        images = [(image * factor).clamp(0, 1) for image in samples.images]
        changed = _column(reward, replace(samples, images=images), component)
        both = _scored(plain, changed)
        spread = float(plain[both].std()) or 1.0
        found[f"x{factor:g}"] = float((changed[both] - plain[both]).mean()) / spread
    return found


def probe_prompts(
    reward: Reward, samples: Samples, seed: int = 0, *, component: int = 0,
    pairs: Sequence[tuple[int, int, float]] = (),
) -> dict[str, float]:  # fmt: skip
    """Return the mean score under the prompts and under each other's prompts, and the share of samples that lose.

    A reward that does not read the prompt loses nothing: `changed` is 0.

    Args:
        pairs: places of two samples of one prompt, with the sign of what people said; their accuracy under the right
            and under the wrong prompt is then `accuracy_own` and `accuracy_other`.

    Raises:
        DataError: one prompt only, or no sample with a score.
    """
    own, other = _column(reward, samples, component), _column(reward, swap_prompts(samples, seed), component)
    both = _scored(own, other)
    found = {
        "n": int(both.sum()), "own": float(own[both].mean()), "other": float(other[both].mean()),
        "changed": float((own[both] != other[both]).mean()),
        "lose": float(np.mean(own[both] > other[both])),
    }  # fmt: skip
    told = [(i, j, sign) for i, j, sign in pairs if sign and both[i] and both[j]]
    if told:
        for name, column in (("own", own), ("other", other)):
            right = [(1 + np.sign((column[i] - column[j]) * sign)) / 2 for i, j, sign in told]
            found[f"accuracy_{name}"] = float(np.mean(right))
        found["pairs"] = len(told)
    return found


def swap_prompts(samples: Samples, seed: int = 0) -> Samples:
    """Return the samples under each other's prompts: all samples of a prompt get the same other one.

    Raises:
        DataError: one prompt only.
    """
    known = sorted(set(samples.prompts))
    if len(known) < 2:
        raise DataError("Shuffling prompts needs two prompts", why=f"got {len(known)}")
    cycle = np.random.default_rng(seed).permutation(len(known))
    other = {known[i]: known[j] for i, j in zip(cycle, np.roll(cycle, 1), strict=True)}
    return replace(samples, prompts=[other[prompt] for prompt in samples.prompts])


def _column(reward: Reward, samples: Samples, component: int) -> np.ndarray:
    scores = score_safely(reward, samples)
    return np.where(scores.valid[:, component], scores.values[:, component], np.nan)


def _scored(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    both = np.isfinite(one) & np.isfinite(other)
    if not both.any():
        raise DataError("No sample of a probe has a score", why=f"of {len(one)}")
    return both
