"""The rewards of a run, side by side: built from the configuration, scored together, composed, described once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.config import CombineConfig, RewardConfig
from align.errors import ConfigError
from align.registry import suggest
from align.types import Samples, Scores, join_scores
from rewards.base import Reward, get_reward, require_makes, score_safely
from rewards.compose import (
    Composed,
    allowed_missing,
    build_transforms,
    combine,
    fill_missing,
    require_scored,
    transform,
    worst_missing,
)


class Panel:
    """K reward components with their weights, transforms and roles.

    Args:
        rewards: the rewards; one may have several components.
        weights: one a reward, given to each of its components.
        configs: the rest of what the configuration says of each reward; plain utilities when None.
        combined: how components become one.

    Raises:
        ConfigError: a component that a reward does not have, or an unknown transform.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float],
        configs: Sequence[RewardConfig] | None = None,
        combined: CombineConfig = CombineConfig(),
    ) -> None:
        self.rewards, self.combined, self._reward_weights = list(rewards), combined, tuple(weights)
        self.configs = list(configs or [RewardConfig(name=r.card.name) for r in rewards])
        self.limits = [config.hung_after_seconds for config in self.configs]
        columns: list[tuple[str, int, float, RewardConfig]] = []
        place = 0
        for reward, weight, config in zip(rewards, weights, self.configs, strict=True):
            wanted: Mapping[str, float] = config.components or dict.fromkeys(reward.names, 1.0)
            for name in wanted:
                if name not in reward.names:
                    raise ConfigError(
                        f"The reward {config.name!r} has no component {name!r}", do=suggest(name, reward.names)
                    )
            for i, name in enumerate(reward.names):
                if name in wanted:
                    columns.append((name, place + i, weight * wanted[name], config))
            place += len(reward.names)
        self._columns = [column for _, column, _, _ in columns]
        self.names = tuple(name for name, _, _, _ in columns)
        self.weights = tuple(weight for _, _, weight, _ in columns)
        self._gates = [config.role == "gate" for *_, config in columns]
        self._transforms = [build_transforms(c.transform, f"{c.name}, transform") for *_, c in columns]

    @classmethod
    def build(cls, configs: Sequence[RewardConfig], combined: CombineConfig = CombineConfig()) -> Panel:
        """Build the rewards a configuration names."""
        return cls([get_reward(c.name, **c.args) for c in configs], [c.weight for c in configs], configs, combined)

    def __bool__(self) -> bool:
        return bool(self.rewards)

    def require_media(self, made: str, maker: str) -> None:
        """Refuse rewards that do not score what a model makes; see `rewards.base.require_makes`."""
        for reward, config in zip(self.rewards, self.configs, strict=True):
            require_makes(config.name, reward.card.media, made, maker)

    def score(self, samples: Samples) -> Scores:
        """Score B samples with every reward: `[B, K]`, raw. What fails is missing."""
        asked = zip(self.rewards, self.limits, strict=True)
        return self.joined([score_safely(reward, samples, limit) for reward, limit in asked])

    def joined(self, scored: Sequence[Scores]) -> Scores:
        """Return the panel's components of what each of its rewards said of the same samples."""
        joined = join_scores(scored)
        keep = self._columns
        return Scores(joined.values[:, keep], joined.valid[:, keep], self.names, joined.errors, joined.extras)

    def transformed(self, scores: Scores, group_size: int) -> Scores:
        """Return the scores of whole groups after their transforms, with what is missing filled if so configured."""
        found = transform(scores, group_size, self._transforms)
        return fill_missing(found, group_size) if self.combined.missing == "fill" else found

    def compose(self, scores: Scores, group_size: int) -> Composed:
        """Turn the raw scores of whole groups into what advantages are made of."""
        return combine(
            self.transformed(scores, group_size), group_size, self.weights, mode=self.combined.mode, gates=self._gates,
            floor=self.combined.gate_floor,
        )  # fmt: skip

    def too_many_missing(self, scores: Scores) -> bool:
        """Whether more scores of one component are missing than `combine` allows."""
        return worst_missing(scores)[1] > allowed_missing(self.combined.missing, self.combined.max_fail_frac)

    def require_scored(self, scores: Scores, where: str) -> None:
        """Refuse scores of which more are missing than `combine` allows."""
        require_scored(scores, missing=self.combined.missing, max_fail_frac=self.combined.max_fail_frac, where=where)

    def total(self, scores: Scores, group_size: int = 1) -> np.ndarray:
        """Return one number a sample `[B]`, NaN where it is missing: the weighted sum, or what a gate or min says."""
        mode = self.combined.mode if self.combined.mode in ("gate", "min") else "weighted_sum"
        found = combine(
            self.transformed(scores, group_size), group_size, self.weights, mode=mode, gates=self._gates,
            floor=self.combined.gate_floor,
        )  # fmt: skip
        return found.scores.values[:, 0]

    def describe(self) -> list[dict[str, Any]]:
        """Return what the run's record keeps of each reward."""
        return [
            {
                "name": reward.card.name,
                "components": list(config.components or reward.names),
                "weight": weight,
                "identity": reward.identity(),
                "definition": reward.card.definition,
                "range": reward.card.range,
                "role": config.role,
                "transform": [dict(spec) for spec in config.transform],
            }
            for reward, weight, config in zip(self.rewards, self._reward_weights, self.configs, strict=True)
        ]
