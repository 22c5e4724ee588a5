"""The rewards of a run, side by side: built from the configuration, scored together, described once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.config import RewardConfig
from align.types import Samples, Scores, join_scores
from rewards.base import Reward, get_reward, score_safely


class Panel:
    """K reward components with their weights.

    Args:
        rewards: the rewards; one may have several components.
        weights: one a reward, given to each of its components.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self.rewards = list(rewards)
        self.names = tuple(name for reward in rewards for name in reward.names)
        self.weights = tuple(w for reward, w in zip(rewards, weights, strict=True) for _ in reward.names)
        self._reward_weights = tuple(weights)

    @classmethod
    def build(cls, configs: Sequence[RewardConfig]) -> Panel:
        """Build the rewards a configuration names."""
        return cls([get_reward(c.name, **c.args) for c in configs], [c.weight for c in configs])

    def __bool__(self) -> bool:
        return bool(self.rewards)

    def score(self, samples: Samples) -> Scores:
        """Score B samples with every reward: `[B, K]`. What fails is missing."""
        return join_scores([score_safely(reward, samples) for reward in self.rewards])

    def total(self, scores: Scores) -> np.ndarray:
        """Return `sum_k w_k r_k` `[B]`, NaN where a component is missing."""
        return scores.values @ np.asarray(self.weights)

    def describe(self) -> list[dict[str, Any]]:
        """Return what the run's record keeps of each reward."""
        return [
            {
                "name": reward.card.name,
                "components": list(reward.names),
                "weight": weight,
                "identity": reward.identity(),
                "definition": reward.card.definition,
                "range": reward.card.range,
            }
            for reward, weight in zip(self.rewards, self._reward_weights, strict=True)
        ]
