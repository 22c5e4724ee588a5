"""Supervised fine-tuning on completions: the mean negative log-prob of their tokens.

Where this differs from the paper
1. The mean is over the completion tokens of the optimizer batch of all processes; prompts are not learnt.
2. Of rows with thumbs, those that are up are learnt from; of pairs, the chosen ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config import load_config
from align.language_config import SFTConfig
from align.launch import World
from trainers.language import LanguageRun
from trainers.language_objective import Models, RowLosses, Totals
from trainers.preference_data import Tokens


def SFT(config: SFTConfig | str | Path | Mapping[str, Any], **options: Any) -> LanguageRun:
    """Return a supervised run, ready to `train()`.

    Args:
        config: an `SFTConfig`, or a recipe name, a path or a mapping for `load_config`.
        options: see `LanguageRun`.
    """
    config = config if isinstance(config, SFTConfig) else load_config(config, kind=SFTConfig)
    return LanguageRun(config, SFTObjective(config), **options)


class SFTObjective:
    """Supervised fine-tuning on microbatches; see `trainers.language.Objective`."""

    paired = mismatched = labelled = referenced = oversample = soft = online = False
    beta = 1.0

    def __init__(self, config: SFTConfig) -> None:
        """Be made like every objective; supervised fine-tuning has nothing to set."""

    def prepare(self, tokens: Tokens) -> dict[str, Any]:
        """Count the tokens learnt."""
        return {"completion_tokens": sum(map(len, tokens.completions))}

    def losses(self, models: Models, batch: Mapping[str, Any], totals: Totals, world: World) -> RowLosses:
        """Return the negative log-probs of a microbatch."""
        rows = -models.logps(batch["sequences"]).per_row()
        weighted = rows * batch["weight"]
        return RowLosses(weighted.sum() / totals.tokens, rows, {"logp": -rows.detach()})

    def finish(self, world: World) -> dict[str, float]:
        """Supervised fine-tuning has no running state."""
        return {}

    def state(self) -> dict[str, Any]:
        """Supervised fine-tuning has no running state."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Supervised fine-tuning has no running state."""
