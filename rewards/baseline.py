"""A reward against the scores that a baseline's outputs got for the same prompt: `sigmoid(r - r_base)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import ConfigError, DataError
from align.scoretable import read_scores_of
from align.types import Samples, Scores
from rewards.base import REWARDS, RewardCard, get_reward, identity_of


class Calibrated:
    """Another reward on a scale of 0 to 1 that depends on its units' size alone: 0.5 is as good as the baseline.

    Args:
        reward: the registered name of the other reward.
        baseline: the table that `align score` wrote of a baseline's outputs; several of a prompt are averaged.
        args: arguments of the other reward.
        scale: what the difference is multiplied by before the sigmoid.

    Raises:
        ConfigError: a reward of several components, or a scale that is not above 0.
        DataError: a table without this reward's scores, or with those of another version of it.

    Source: CGPO (arXiv 2409.20370), eq. 5; the mean over several baseline outputs is ours.
    """

    def __init__(
        self, reward: str, baseline: str | Path, args: Mapping[str, Any] | None = None, scale: float = 1.0
    ) -> None:
        self.inner, self.scale = get_reward(reward, **(args or {})), float(scale)
        if len(self.inner.names) != 1:
            raise ConfigError("A reward of one component can be calibrated", where=reward, why=str(self.inner.names))
        if not 0 < self.scale < float("inf"):
            raise ConfigError("The scale of a calibrated reward is above 0", where=f"scale {scale!r}")
        self.names = (f"{self.inner.names[0]}_calibrated",)
        self.base = _means(str(baseline), self.inner.names[0], self.inner.identity())
        recorded = f"{REWARDS.get('calibrated').card.definition}; here of {len(self.base)} prompts"
        self.card: RewardCard = dataclasses.replace(REWARDS.get("calibrated").card, definition=recorded)

    def identity(self) -> str:
        """Return a hash over the other reward, the baseline's means and the scale."""
        what = {"inner": self.inner.identity(), "base": self.base, "scale": self.scale}
        return identity_of(REWARDS.get("calibrated").card, what)

    def score(self, samples: Samples) -> Scores:
        """Return `sigmoid(scale (r - r_base))`, `[B, 1]`; missing where r is, or where the prompt has no baseline."""
        raw = self.inner.score(samples)
        base = np.array([self.base.get(prompt, np.nan) for prompt in samples.prompts])
        values = 0.5 * (1 + np.tanh(0.5 * self.scale * (raw.values[:, 0] - base)))
        errors = tuple(
            said or ("" if np.isfinite(b) else "calibrated: the baseline has no score of this prompt")
            for said, b in zip(raw.errors, base, strict=True)
        )
        shown = {**raw.extras, f"raw/{self.inner.names[0]}": raw.values[:, 0]}
        return Scores(values[:, None], np.isfinite(values)[:, None], self.names, errors, shown)


def _means(table: str, name: str, identity: str) -> dict[str, float]:
    """Return the mean score of each prompt in a table."""
    rows = read_scores_of(table, identity, "baseline")
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(name)
        if isinstance(value, (int, float)) and np.isfinite(value):
            found.setdefault(str(row.get("prompt") or ""), []).append(float(value))
    if not found:
        raise DataError(f"The baseline has no score of {name!r}", where=table, why=f"{len(rows)} rows")
    return {prompt: float(np.mean(values)) for prompt, values in found.items()}
