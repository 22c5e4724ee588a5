"""Binary signals: a reward's score cut at a threshold, thumb up or thumb down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from align.types import Samples, Scores
from rewards.base import REWARDS, RewardCard, get_reward, identity_of


class Threshold:
    """1 where another reward's score is above a threshold, else 0, component by component.

    A score that is missing stays missing: it is no thumb down. Groups in which all members agree teach
    nothing and are counted (`zero_std_groups`); a run warns when fewer than 10 % or more than 90 % of the
    samples are above the threshold, and says where their middle lies.

    Args:
        reward: the registered name of the other reward.
        at: the threshold, in its units.
        args: arguments of the other reward.
    """

    def __init__(self, reward: str, at: float, args: Mapping[str, Any] | None = None) -> None:
        self.card: RewardCard = REWARDS.get("threshold").card
        self.inner, self.at, self.arguments = get_reward(reward, **(args or {})), float(at), dict(args or {})
        self.names = tuple(f"{name}_above_{self.at:g}" for name in self.inner.names)

    def identity(self) -> str:
        """Return a hash over the other reward and the threshold."""
        return identity_of(self.card, {"inner": self.inner.identity(), "at": self.at})

    def score(self, samples: Samples) -> Scores:
        """Return 0 and 1, `[B, K]`; the scores behind them are the extra `raw/<component>`."""
        raw = self.inner.score(samples)
        extras = {f"raw/{name}": raw.column(name) for name in raw.names}
        return Scores(
            np.where(raw.values > self.at, 1.0, 0.0), raw.valid, self.names, raw.errors, {**raw.extras, **extras}
        )
