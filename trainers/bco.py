"""BCO (arXiv 2404.04656): language models from single thumbs, as a classifier on the implicit reward.

Where this differs from the paper
1. The decay of the reward shift is not given there; here it is .99 a step (`objective.delta_decay`), and less in the
   first hundreds of steps, as the first rewards are 0.
2. A step sees the shift the step before it left, so that it is the same in all its microbatches and processes. It is 0
   until both classes have been seen.
3. `delta: cumulative_pooled` is the shift of TRL 1.13, of its last release with BCO; `zero` is plain cross-entropy.
4. Scores from 0 to 1 may stand for labels (`soft_labels`).
5. Weights that match the prompts of the two classes (underlying distribution matching, v1 of the paper) are read from
   the column `udm_weight`.
6. A class that is absent from an optimizer batch adds 0 to its loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config import load_config
from align.language_config import BCOConfig
from align.launch import World
from trainers.language import LanguageRun
from trainers.language_objective import Models, RowLosses, Totals, log_ratios
from trainers.preference import BalancedDelta, PooledDelta, bco, class_sums, row_shares, state_to_json
from trainers.preference_data import Tokens


def BCO(config: BCOConfig | str | Path | Mapping[str, Any], **options: Any) -> LanguageRun:
    """Return a BCO run, ready to `train()`.

    Args:
        config: a `BCOConfig`, or a recipe name, a path or a mapping for `load_config`.
        options: see `LanguageRun`.
    """
    config = config if isinstance(config, BCOConfig) else load_config(config, kind=BCOConfig)
    return LanguageRun(config, BCOObjective(config), **options)


class BCOObjective:
    """BCO on microbatches; see `trainers.language.Objective`."""

    paired, mismatched, labelled, referenced, online = False, False, True, True, False

    def __init__(self, config: BCOConfig) -> None:
        self.config, self.beta = config.objective, config.objective.beta
        self.soft = config.objective.soft_labels
        self.oversample = self.config.balance == "oversample"
        pooled = self.config.delta == "cumulative_pooled"
        self.delta: BalancedDelta | PooledDelta = PooledDelta() if pooled else BalancedDelta(self.config.delta_decay)
        self._sums: list[Tensor] = []

    def prepare(self, tokens: Tokens) -> dict[str, Any]:
        """Say how uneven the classes are."""
        up = int(tokens.desirable.sum())
        down = len(tokens) - up
        uneven = bool(up and down) and max(up, down) > 4 * min(up, down) and not self.oversample
        message = f"{up} thumbs up and {down} down; the paper repeats the smaller class (objective.balance: oversample)"
        return {"classes": {"up": up, "down": down}, "warnings": [message] if uneven else []}

    def losses(self, models: Models, batch: Mapping[str, Any], totals: Totals, world: World) -> RowLosses:
        """Return the BCO losses of a microbatch."""
        log_ratio, _, logp = log_ratios(models, batch)
        label = batch["label"]
        desirable = label > 0.5
        sums = class_sums(self.beta * log_ratio, desirable)
        if isinstance(self.delta, PooledDelta):
            self.delta = self.delta.update(world.add(sums))
        else:
            self._sums.append(sums)
        terms = bco(log_ratio, label, self.shift, beta=self.beta, weight=batch["weight"])
        shares = row_shares(desirable, totals.up, totals.down, self.config.balance)
        return RowLosses(
            (terms.loss * shares).sum(), terms.loss,
            {
                "log_ratio": log_ratio.detach(), "desirable": desirable.float(), "logp": logp,
                "reward": terms.stats["reward"], "accuracy": terms.stats["correct"],
            },
        )  # fmt: skip

    @property
    def shift(self) -> float:
        """Delta as losses see it now."""
        return 0.0 if self.config.delta == "zero" else self.delta.value

    def finish(self, world: World) -> dict[str, float]:
        """Update the running class means, and say what delta was in this step."""
        used = self.shift
        if isinstance(self.delta, PooledDelta):
            return {"delta": used}
        self.delta = self.delta.update(world.add(torch.stack(self._sums).sum(0)))
        self._sums = []
        nan = float("nan")
        means = {"delta/mean_up": self.delta.mean_D, "delta/mean_down": self.delta.mean_U}
        return {"delta": used, **{name: nan if value is None else value for name, value in means.items()}}

    def state(self) -> dict[str, Any]:
        """Return the reward shift."""
        return {"delta": state_to_json(self.delta)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the reward shift."""
        self.delta = type(self.delta)(**state["delta"])
