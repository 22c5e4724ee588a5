"""KTO (arXiv 2402.01306): language models from single thumbs, against a reference point shared by a microbatch.

Where this differs from the paper
1. Microbatches mix both classes and are reshuffled every epoch, whatever the order of the data.
2. A prompt's mismatched completion is that of a row with another prompt wherever the microbatch allows it. As in the
   paper the mismatched completions are those of the microbatch; z0 is the same whichever way they are dealt.
3. z0 is a sum over a count of all processes, clamped after averaging; an empty completion is not counted.
4. `z0: ema` (a running mean of the unclamped z0) lets a microbatch hold one row; `z0: zero` leaves it out.
5. Class weights are worked out from the rows that are left after truncation, unless they are given.
6. The loss is the mean over the optimizer batch of all processes, never a mean of means.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config import load_config
from align.language_config import KTOConfig
from align.launch import World
from trainers.language import LanguageRun
from trainers.language_objective import Models, RowLosses, Totals, log_ratios
from trainers.preference import (
    RunningPoint,
    auto_class_weights,
    humanline,
    kto,
    kto_reference_point,
    mismatch_mean,
    mismatch_sums,
    state_to_json,
    weight_ratio_message,
)
from trainers.preference_data import Tokens


def KTO(config: KTOConfig | str | Path | Mapping[str, Any], **options: Any) -> LanguageRun:
    """Return a KTO run, ready to `train()`.

    Args:
        config: a `KTOConfig`, or a recipe name, a path or a mapping for `load_config`.
        options: see `LanguageRun`.
    """
    config = config if isinstance(config, KTOConfig) else load_config(config, kind=KTOConfig)
    return LanguageRun(config, KTOObjective(config), **options)


class KTOObjective:
    """KTO and its variants on microbatches; see `trainers.language.Objective`."""

    paired, labelled, referenced, oversample, soft, online = False, True, True, False, False, False

    def __init__(self, config: KTOConfig) -> None:
        self.config, self.beta = config.objective, config.objective.beta
        self.mismatched = self.config.loss == "kto" and self.config.z0 != "zero"
        self.weights = (1.0, 1.0)
        self.running = RunningPoint(self.config.z0_decay)
        self._sums: list[Tensor] = []
        self._points: list[float] = []
        self._means: list[float] = []

    def prepare(self, tokens: Tokens) -> dict[str, Any]:
        """Work out the class weights."""
        up, config = int(tokens.desirable.sum()), self.config
        down = len(tokens) - up
        if up and down:
            self.weights = auto_class_weights(
                up, down, weight_D=config.weight_desirable, weight_U=config.weight_undesirable,
                ratio=config.weight_ratio,
            )  # fmt: skip
        else:
            self.weights = (config.weight_desirable or 1.0, config.weight_undesirable or 1.0)
        message = weight_ratio_message(up, down, *self.weights)
        return {
            "weights": {"desirable": self.weights[0], "undesirable": self.weights[1], "up": up, "down": down},
            "warnings": [message] if message and up and down else [],
        }

    def losses(self, models: Models, batch: Mapping[str, Any], totals: Totals, world: World) -> RowLosses:
        """Return the KTO losses of a microbatch."""
        clamp = (lambda t: humanline(t, *self.config.humanline)) if self.config.humanline else None
        log_ratio, mismatched, logp = log_ratios(models, batch, clamp)
        z0 = self._reference_point(mismatched, world)
        label, weight = batch["label"], batch["weight"]
        terms = kto(log_ratio, label, z0, beta=self.beta, weight_D=self.weights[0], weight_U=self.weights[1])
        rows = terms.loss * weight
        return RowLosses(
            rows.sum() / totals.rows, rows,
            {
                "log_ratio": log_ratio.detach(), "desirable": label, "logp": logp, "reward": terms.stats["reward"],
                "accuracy": terms.stats["correct"],
            },
        )  # fmt: skip

    def _reference_point(self, mismatched: Tensor | None, world: World) -> Tensor | float:
        if mismatched is None:
            return 0.0
        sums = mismatch_sums(mismatched)
        if self.config.z0 == "ema":
            self._sums.append(sums)
            return self.running.value
        sums = world.add(sums)
        z0 = kto_reference_point(sums)
        self._points.append(float(z0))
        self._means.append(float(mismatch_mean(sums)))
        return z0

    def finish(self, world: World) -> dict[str, float]:
        """Update the running z0, and say what z0 was in this step."""
        if not self.mismatched:
            return {}
        if self.config.z0 == "ema":
            sums = world.add(torch.stack(self._sums).sum(0))
            used, self._sums = self.running.value, []
            self.running = self.running.update(sums)
            return {"z0": used, "z0_mean": float(mismatch_mean(sums)), "z0_at_zero": float(used == 0)}
        points, means, self._points, self._means = self._points, self._means, [], []
        return {
            "z0": sum(points) / len(points), "z0_mean": sum(means) / len(means),
            "z0_at_zero": sum(p == 0 for p in points) / len(points),
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return the running z0."""
        return {"z0": state_to_json(self.running)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the running z0."""
        self.running = RunningPoint(**state["z0"])
