"""Binary signals: a person's thumb, and a reward's score cut at a threshold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import ConfigError, DataError
from align.types import Samples, Scores
from rewards.base import REWARDS, RewardCard, get_reward, identity_of

_UP = {"up", "true", "1", "+1"}
_DOWN = {"down", "false", "0", "-1"}


class Thumbs:
    """A person's thumb, carried in the metadata: 1 is up, 0 is down, missing where there is none.

    Up is `true`, 1, +1 or "up"; down is `false`, 0, -1 or "down"; a table's text counts like the value it spells.
    Null and an empty cell mean that nobody gave a thumb. Anything else is missing too, with a message of its own.

    Args:
        field: of the metadata.
    """

    names = ("thumbs",)

    def __init__(self, field: str = "label") -> None:
        self.card: RewardCard = REWARDS.get("thumbs").card
        self.field = field

    def identity(self) -> str:
        """Return a hash over the field."""
        return identity_of(self.card, {"field": self.field})

    def score(self, samples: Samples) -> Scores:
        """Return 0 or 1, `[B, 1]`."""
        read = [self._thumb(row) for row in samples.metadata or [{}] * len(samples)]
        values = np.array([value for value, _ in read], dtype=np.float64)[:, None]
        return Scores(values, np.isfinite(values), self.names, tuple(message for _, message in read))

    def _thumb(self, row: Mapping[str, Any]) -> tuple[float, str]:
        found = row.get(self.field)
        number = isinstance(found, (bool, int, float, np.bool_, np.integer, np.floating))
        word = f"{float(found or 0):g}" if number else found.strip().lower() if isinstance(found, str) else ""
        if word in _UP or word in _DOWN:
            return float(word in _UP), ""
        if found is None or found == "" or (number and math.isnan(found)):
            return math.nan, f"thumbs: the sample has no {self.field!r}"
        return math.nan, f"thumbs: {self.field!r} is {found!r}, neither up nor down"


class Threshold:
    """1 where another reward's score is above a threshold, else 0, component by component.

    The threshold is a number, or the q-quantile of a frozen reference set, the same for the whole run:

        tau = inf {t : at least a share q of the reference scores is <= t}

    A score that is missing stays missing: it is no thumb down. Groups in which all members agree teach
    nothing and are counted (`zero_std_groups`); a run warns when fewer than 10 % or more than 90 % of the
    samples are above the threshold, and says where their middle lies.

    Args:
        reward: the registered name of the other reward.
        at: the threshold, in its units.
        args: arguments of the other reward.
        quantile: in place of `at`, a share strictly between 0 and 1.
        reference: with `quantile`, the file of scores that `align score` wrote of the reference set.

    Raises:
        ConfigError: both or neither of `at` and `quantile`.
        DataError: a reference without this reward's scores, or with those of another version of it.
    """

    def __init__(
        self,
        reward: str,
        at: float | None = None,
        args: Mapping[str, Any] | None = None,
        quantile: float | None = None,
        reference: str | Path | None = None,
    ) -> None:
        if (at is None) == (quantile is None) or (quantile is None) != (reference is None):
            raise ConfigError(
                "A threshold is at a number, or at a quantile of a reference set",
                why=f"got at {at!r}, quantile {quantile!r}, reference {reference!r}",
                do="Give at, or quantile and reference",
            )
        self.card: RewardCard = REWARDS.get("threshold").card
        self.inner, self.arguments = get_reward(reward, **(args or {})), dict(args or {})
        if at is not None:
            self.thresholds = [_number(at)] * len(self.inner.names)
        else:
            self.thresholds = _quantiles(str(reference), quantile or 0.0, self.inner.names, self.inner.identity())
            found = ", ".join(f"{name} {at:g}" for name, at in zip(self.inner.names, self.thresholds, strict=True))
            recorded = f"{self.card.definition}; here above the {quantile:g} quantile of its reference set: {found}"
            self.card = dataclasses.replace(self.card, definition=recorded)
        self.at = self.thresholds[0]
        self.names = tuple(f"{name}_above_{at:g}" for name, at in zip(self.inner.names, self.thresholds, strict=True))

    def identity(self) -> str:
        """Return a hash over the other reward and the thresholds."""
        at = self.thresholds if len(set(self.thresholds)) > 1 else self.at
        return identity_of(REWARDS.get("threshold").card, {"inner": self.inner.identity(), "at": at})

    def score(self, samples: Samples) -> Scores:
        """Return 0 and 1, `[B, K]`; the scores behind them are the extra `raw/<component>`."""
        raw = self.inner.score(samples)
        extras = {f"raw/{name}": raw.column(name) for name in raw.names}
        above = np.where(raw.values > np.array(self.thresholds), 1.0, 0.0)
        return Scores(above, raw.valid, self.names, raw.errors, {**raw.extras, **extras})


def _number(at: Any) -> float:
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at):
        raise ConfigError("A threshold is a finite number", where=f"at {at!r}")
    return float(at)


def _quantiles(reference: str, quantile: float, names: Sequence[str], identity: str) -> list[float]:
    from align.scoretable import read_scores_of

    if not 0 < quantile < 1:
        raise ConfigError("A quantile lies strictly between 0 and 1", where=f"quantile {quantile!r}")
    rows = read_scores_of(reference, identity, "reference set")
    found = []
    for name in names:
        values = [v for row in rows if isinstance(v := row.get(name), (int, float)) and math.isfinite(v)]
        if not values:
            raise DataError(f"The reference set has no score of {name!r}", where=reference, why=f"{len(rows)} rows")
        found.append(float(np.quantile(values, quantile, method="inverted_cdf")))
    return found
