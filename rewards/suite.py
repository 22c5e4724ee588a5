"""Rewards and hard judges by the names a configuration gives them: one number a sample and name.

A reward's components are added up by their weights, after its transforms and, to be shown, before them. A judge (role
gate) passes where that number is above 0. A judge that gives no number has failed to answer: the sample does not pass,
and the failure is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config import RewardConfig
from align.errors import ConfigError
from align.types import Samples, Scores
from rewards.base import get_reward
from rewards.panel import Panel


@dataclass(frozen=True)
class Judgement:
    """What a suite says of B samples.

    Args:
        rewards: `[B, K]`, after transforms; NaN where missing.
        shown: `[B, K]`, before transforms.
        passed: bool `[B, J]`, of each judge.
        failed: bool `[B, J]`, where a judge gave no answer.
    """

    rewards: np.ndarray
    shown: np.ndarray
    passed: np.ndarray
    failed: np.ndarray

    @property
    def all_passed(self) -> np.ndarray:
        """Whether every judge passes a sample, `[B]`; true of all samples where there is no judge."""
        return self.passed.all(1)


class Suite:
    """K rewards and J judges.

    Args:
        configs: by name; role gate makes a judge.
        where: the part of a configuration that they stand in.

    Raises:
        ConfigError: no reward, a weight below 0, weights that are all 0, or a reward that cannot be built.
    """

    def __init__(self, configs: Mapping[str, RewardConfig], where: str = "rewards") -> None:
        self.names = tuple(name for name, config in configs.items() if config.role == "utility")
        self.judges = tuple(name for name, config in configs.items() if config.role == "gate")
        weights = np.array([configs[name].weight for name in self.names], dtype=np.float64)
        if not len(weights) or (weights < 0).any() or weights.sum() == 0:
            raise ConfigError(
                "A suite needs rewards with weights of 0 or more, one above 0", where=where,
                why=f"found {dict(zip(self.names, weights.tolist(), strict=True))}",
                do="Give a reward role: utility and a weight",
            )  # fmt: skip
        self.weights = weights / weights.sum()
        self._panels = {
            name: Panel([get_reward(config.name, **config.args)], [1.0], [config]) for name, config in configs.items()
        }

    def require_media(self, made: str, maker: str) -> None:
        """Refuse rewards and judges that do not score what a model makes; see `rewards.base.require_makes`."""
        for panel in self._panels.values():
            panel.require_media(made, maker)

    def score(self, samples: Samples) -> Scores:
        """Score B samples: `[B, K + J]`, the rewards and then the judges; what fails is missing.

        Numbers before transforms are in `extras`, by name.
        """
        parts, errors, shown = [], [""] * len(samples), {}
        for name in (*self.names, *self.judges):
            panel = self._panels[name]
            scores = panel.score(samples)
            parts.append(panel.total(scores))
            shown[name] = (scores.values * panel.weights).sum(1)
            errors = ["; ".join(filter(None, pair)) for pair in zip(errors, scores.errors, strict=True)]
        values = np.stack(parts, 1)
        return Scores(values, np.isfinite(values), (*self.names, *self.judges), tuple(errors), shown)

    def judge(self, scores: Scores) -> Judgement:
        """Take what `score` returned apart."""
        count = len(self.names)
        valid, shown = scores.valid[:, count:], np.stack([scores.extras[name] for name in self.names], 1)
        passed = valid & (np.nan_to_num(scores.values[:, count:]) > 0)
        return Judgement(scores.values[:, :count], shown, passed, ~valid)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return what a run's record keeps of each reward and judge, by name."""
        return {name: {**panel.describe()[0], "role": panel.configs[0].role, "weight": panel.configs[0].weight}
                for name, panel in self._panels.items()}  # fmt: skip
