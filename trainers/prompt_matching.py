"""Underlying distribution matching: weights that make the prompts of thumbs down look like those of thumbs up.

Thumbs arrive on different prompts: people complain about some things and praise others. A classifier of the label from
the prompt alone gives the density ratio; its odds, clamped, weigh the rows that are down. It is fitted once, every row
gets a weight, and the weights are a column (`udm_weight`) of the data.

Where this differs from the paper (BCO, arXiv 2404.04656 v1; v2 repeats the smaller class instead)
1. Weights are worked out once for all rows, not from an embedding in every step.
2. Prompts are drawn without replacement, and the fit is the same for any order of the rows that are drawn.
3. The share of clamped weights, the effective sample size and the classifier's AUC are reported: at an AUC near .5 both
   classes have the same prompts, the weights are near 1, and matching is not worth its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from align.errors import DataError
from align.seeding import permutation
from trainers.language_measures import auc
from trainers.preference import effective_sample_size, udm_weights


@dataclass(frozen=True)
class Matching:
    """Weights `[N]`, 1 for rows that are up; the classifier; and what they are worth.

    Args:
        weights: of every row.
        coefficients, intercept: of the classifier, numbers that JSON holds.
        auc: of the classifier on all rows.
        effective_rows: rows down that would weigh as unevenly as little: `(sum w)^2 / sum w^2`.
        clamped: share of the rows down whose weight met a bound.
    """

    weights: np.ndarray
    coefficients: np.ndarray
    intercept: float
    auc: float
    effective_rows: float
    clamped: float

    def describe(self) -> dict[str, Any]:
        """Return the classifier and the figures as JSON."""
        return {
            "auc": self.auc, "effective_rows": self.effective_rows, "clamped": self.clamped,
            "intercept": self.intercept, "coefficients": self.coefficients.tolist(),
        }  # fmt: skip


def fit_balanced_logistic(features: Tensor, label: Tensor, *, strength: float = 1.0) -> tuple[Tensor, float]:
    """Return coefficients and intercept of a logistic regression with balanced classes.

        minimise  |w|^2 / 2 + C sum_i (N / (2 n_class(i))) BCE(w x_i + b, y_i)

    Args:
        features: `[N, D]`.
        label: `[N]`, 0 or 1, both present.
        strength: C, the inverse of the regularisation.
    """
    x, y = features.double(), label.double()
    up = y.sum()
    weight = strength * torch.where(y > 0.5, len(y) / (2 * up), len(y) / (2 * (len(y) - up)))
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = functional.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y, weight=weight, reduction="sum")
        loss = fit + w[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()[:-1], float(w.detach()[-1])


def match_prompts(
    features: np.ndarray,
    desirable: np.ndarray,
    *,
    sample: int = 1024,
    low: float = 0.5,
    high: float = 10.0,
    seed: int = 0,
) -> Matching:
    """Return the weights of N rows from features of their prompts.

    Args:
        features: `[N, D]` floats, such as the embeddings of a sentence model.
        desirable: bool `[N]`.
        sample: prompts of each class that the classifier is fitted on at most.
        low, high: bounds of the weights.
        seed: of the draw.

    Raises:
        DataError: features that are not finite, or one class only.
    """
    features, desirable = np.asarray(features, dtype=np.float64), np.asarray(desirable, dtype=bool)
    if features.ndim != 2 or len(features) != len(desirable) or not np.isfinite(features).all():
        raise DataError("Prompt features are finite numbers [N, D], a row each", why=f"got {features.shape}")
    sides = [np.flatnonzero(desirable), np.flatnonzero(~desirable)]
    if not all(map(len, sides)):
        raise DataError("Matching needs rows of both classes", why=f"{len(sides[0])} up and {len(sides[1])} down")
    drawn = np.concatenate([
        side[sorted(permutation(len(side), "prompt matching", seed, i)[:sample])] for i, side in enumerate(sides)
    ])  # fmt: skip
    w, b = fit_balanced_logistic(torch.from_numpy(features[drawn]), torch.from_numpy(desirable[drawn]))
    probability = torch.sigmoid(torch.from_numpy(features) @ w + b)
    found = udm_weights(probability, low, high)
    weights = np.where(desirable, 1.0, found.numpy())
    down = found[torch.from_numpy(~desirable)]
    return Matching(
        weights, w.numpy(), b, auc(probability.numpy(), desirable), effective_sample_size(down),
        float(((down <= low) | (down >= high)).double().mean()),
    )  # fmt: skip
