"""DPO (arXiv 2305.18290): language models from pairs.

Where this differs from the paper
1. `objective.label_smoothing` is that of conservative DPO; 0, the default, is the paper's loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from align.config import load_config
from align.language_config import DPOConfig
from align.launch import World
from trainers.language import LanguageRun
from trainers.language_objective import Models, RowLosses, Totals, log_ratios
from trainers.preference import dpo
from trainers.preference_data import Tokens


def DPO(config: DPOConfig | str | Path | Mapping[str, Any], **options: Any) -> LanguageRun:
    """Return a DPO run, ready to `train()`.

    Args:
        config: a `DPOConfig`, or a recipe name, a path or a mapping for `load_config`.
        options: see `LanguageRun`.
    """
    config = config if isinstance(config, DPOConfig) else load_config(config, kind=DPOConfig)
    return LanguageRun(config, DPOObjective(config), **options)


class DPOObjective:
    """DPO on microbatches of pairs; see `trainers.language.Objective`."""

    paired, referenced = True, True
    mismatched = labelled = oversample = soft = online = False

    def __init__(self, config: DPOConfig) -> None:
        self.config, self.beta = config.objective, config.objective.beta

    def prepare(self, tokens: Tokens) -> dict[str, Any]:
        """Count the pairs."""
        return {"pairs": len(tokens) // 2}

    def losses(self, models: Models, batch: Mapping[str, Any], totals: Totals, world: World) -> RowLosses:
        """Return the DPO losses of a microbatch."""
        log_ratio, _, logp = log_ratios(models, batch)
        chosen, rejected = log_ratio.chunk(2)
        terms = dpo(chosen, rejected, beta=self.beta, label_smoothing=self.config.label_smoothing)
        weight = batch["weight"].chunk(2)[0]
        rows = terms.loss * weight
        return RowLosses(
            rows.sum() / totals.rows, rows,
            {
                "log_ratio": log_ratio.detach(), "desirable": batch["label"], "logp": logp,
                "reward": self.beta * log_ratio.detach(), "accuracy": torch.cat([terms.stats["accuracy"]] * 2),
            },
        )  # fmt: skip

    def finish(self, world: World) -> dict[str, float]:
        """DPO has no running state."""
        return {}

    def state(self) -> dict[str, Any]:
        """DPO has no running state."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """DPO has no running state."""
