"""P[Love]: the probability that somebody who is shown an output reacts to it, from a log of what was shown.

A log is not a data set: silence is not a thumb down, people differ more than outputs do, some reactions are mistakes
and some accounts are coordinated. Each of these is a function here; `rewards.fit` puts them together.

Notation. `z = f(x)` is a logit, y what was seen, 1 a reaction; `rho_up = P(seen 0 | 1)`, `rho_down = P(seen 1 | 0)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.errors import ConfigError, DataError
from align.seeding import uniform
from rewards.fit_losses import binary

Loss = Callable[[Tensor], Tensor]
CLIP_RATE = 0.02
"""Rates of single people are kept this far from 0 and 1 before their logit is taken."""


def sigmoid_loss(z: Tensor) -> Tensor:
    """Return `sigmoid(-z)`, the loss of a positive under nnPU's own choice."""
    return torch.sigmoid(-z)


def logistic_loss(z: Tensor) -> Tensor:
    """Return `log(1 + exp(-z))`, the loss of a positive as cross-entropy has it."""
    return F.softplus(-z)


# --- silence ----------------------------------------------------------------------------------------


def keep_negatives(keys: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Return which negatives are kept: each with probability `share`, by a hash of its key, whatever else is there.

    Raises:
        ConfigError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError("A share of the negatives is above 0 and at most 1", where=f"negative_share {share!r}")
    return np.array([share == 1 or uniform(seed, "negative", key) < share for key in keys], dtype=bool)


def nnpu(
    positive: Tensor, unlabelled: Tensor, prior: float, *, loss: Loss = sigmoid_loss, beta: float = 0.0,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Positive and unlabelled: what was not reacted to is a mixture, of which a share `prior` is positive.

        R = prior E_P[l(z)] + max(-beta, E_U[l(-z)] - prior E_P[l(-z)])

    Where the second term is below -beta, the model has begun to call unlabelled positives negative: the gradient is
    then that of -gamma times this term alone.

    Returns:
        the risk, and the value whose gradient is to be taken.

    Raises:
        DataError: no positive or no unlabelled rows.
        ConfigError: a prior that is not strictly between 0 and 1.

    Source: Kiryo et al. (arXiv 1703.00593), algorithm 1.
    """
    _require_prior(prior)
    if not len(positive) or not len(unlabelled):
        raise DataError(
            "Learning from positives and silence needs both", why=f"{len(positive)} reactions, {len(unlabelled)} silent"
        )
    up = prior * loss(positive).mean()
    down = loss(-unlabelled).mean() - prior * loss(-positive).mean()
    if down.item() < -beta:
        return up - beta, -gamma * down
    return up + down, up + down


def pnu(
    positive: Tensor, unlabelled: Tensor, negative: Tensor, prior: float, *, eta: float = 0.5,
    loss: Loss = logistic_loss,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Positives, negatives and silence.

        R    = (1 - eta) R_PN + eta R_nnPU
        R_PN = prior E_P[l(z)] + (1 - prior) E_N[l(-z)]

    Returns:
        the risk, and the value whose gradient is to be taken.

    Source: Sakai et al. (arXiv 1605.06955), section 3.
    """
    both = prior * loss(positive).mean() + (1 - prior) * loss(-negative).mean()
    risk, objective = nnpu(positive, unlabelled, prior, loss=loss)
    return (1 - eta) * both + eta * risk, (1 - eta) * both + eta * objective


# --- mistakes ---------------------------------------------------------------------------------------


def forward_corrected(
    logit: Tensor, target: Tensor, rho_up: Tensor | float, rho_down: Tensor | float, shift: Tensor | float = 0.0
) -> Tensor:
    """Cross-entropy of what was seen under rates of mistakes; the logit stays that of the truth.

        P(seen 1) = (1 - rho_up) p + rho_down (1 - p),   p = sigmoid(z)
        loss      = -q log P - (1 - q) log(1 - P)

    Args:
        shift: added to the log-odds of what was seen; see `rewards.fit_losses.binary`.

    Raises:
        ConfigError: rates that are not from 0, or not below 1 together.

    Source: Patrini et al. (arXiv 1609.03683), forward correction.
    """
    _require_rates(rho_up, rho_down)
    if rho_up == 0 and rho_down == 0:
        return binary(logit, target, shift)
    p = torch.sigmoid(logit)
    up = (1 - rho_up) * p + rho_down * (1 - p)
    down = rho_up * p + (1 - rho_down) * (1 - p)
    tiny = torch.finfo(p.dtype).tiny
    return binary(torch.log(up.clamp(min=tiny)) - torch.log(down.clamp(min=tiny)), target, shift)


def mistake_rates(free: Tensor) -> Tensor:
    """Return the rates (rho_up, rho_down) of free numbers: `sigmoid(t) / 2`, so that together they stay below 1."""
    return torch.sigmoid(free) / 2


def mistake_prior(rates: Tensor) -> Tensor:
    """Return minus the log-density of Beta(1.5, 20), without its constant, summed over the rates: few mistakes.

    A log says little of its mistakes: only thumbs of which the reward is very sure tell them from chance.
    """
    return -(0.5 * torch.log(rates) + 19 * torch.log1p(-rates)).sum()


def unbiased_corrected(logit: Tensor, target: Tensor, rho_up: float, rho_down: float) -> Tensor:
    """Loss whose mean over mistakes is the clean cross-entropy; it can be negative.

        loss = [(1 - rho_{not y}) l(z, y) - rho_y l(z, not y)] / (1 - rho_up - rho_down)

    Source: Natarajan et al. (2013), lemma 1.
    """
    _require_rates(rho_up, rho_down)
    own, other = binary(logit, target), binary(logit, 1 - target)
    rates = logit.new_tensor([rho_down, rho_up])
    mine, theirs = rates[(target > 0.5).long()], rates[(target <= 0.5).long()]
    return ((1 - theirs) * own - mine * other) / (1 - rho_up - rho_down)


# --- people -----------------------------------------------------------------------------------------


def start_effects(count_U: np.ndarray, rate_U: np.ndarray, base: float, kappa: float = 5.0) -> np.ndarray:
    """Return where each person's effect starts: `n / (n + kappa) (logit rate - logit base)`, rates clipped."""
    rate = np.clip(rate_U, CLIP_RATE, 1 - CLIP_RATE)
    return count_U / (count_U + kappa) * (_logit(rate) - _logit(np.float64(base)))


def fit_effects(
    offset_N: np.ndarray, seen_N: np.ndarray, user_N: np.ndarray, weight_N: np.ndarray | None = None, *,
    iterations: int = 100,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Return each person's effect b_U and their variance tau^2, given the logits of what they were shown.

        y ~ sigmoid(offset + b_u),   b_u ~ N(0, tau^2)

    tau^2 maximises the marginal likelihood by expectation-maximisation, with the posterior of each b_u taken as normal
    around its mode (Laplace): `tau^2 <- mean(b_u^2 + 1 / (sum p (1 - p) + 1 / tau^2))`.

    Args:
        user_N: index of who, from 0.
        weight_N: of each row, such as 1 / share for negatives that were subsampled.
    """
    users = int(user_N.max(initial=-1)) + 1
    weight = np.ones(len(seen_N)) if weight_N is None else weight_N
    effect, variance = np.zeros(users), 1.0
    for _ in range(iterations):
        before = variance
        for _ in range(4):
            p = 1 / (1 + np.exp(-(offset_N + effect[user_N])))
            slope = np.bincount(user_N, weights=weight * (seen_N - p), minlength=users) - effect / variance
            curve = np.bincount(user_N, weights=weight * p * (1 - p), minlength=users) + 1 / variance
            effect = effect + np.clip(slope / curve, -2, 2)
        variance = max(float(np.mean(effect**2 + 1 / curve)), 1e-4)
        if abs(variance - before) < 1e-6 * before:
            break
    return effect, variance


def out_of_fold(
    features_ID: Tensor, seen_N: Tensor, fold_N: np.ndarray, *, item_N: np.ndarray | None = None, ridge: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return logits of a ridge logistic regression that was fitted to the other folds, and the losses they cost.

    Args:
        fold_N: label of each row; all rows of a person go together.
        item_N: which features each row has; None is its own.
        ridge: weight of `|w|^2 / 2` beside the summed loss.

    Raises:
        DataError: fewer than two folds.
    """
    folds = np.unique(fold_N)
    if len(folds) < 2:
        raise DataError("Judging people by others needs two folds", why=f"{len(folds)} given")
    features, seen = features_ID.double(), seen_N.double()
    item = torch.arange(len(seen)) if item_N is None else torch.from_numpy(item_N)
    logit = torch.zeros(len(seen), dtype=torch.float64)
    for fold in folds:
        rows = torch.from_numpy(fold_N != fold)
        weight = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")
        place, y = item[rows], seen[rows]

        def closure(
            place: Tensor = place, y: Tensor = y, weight: Tensor = weight, optimizer: Any = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            z = (features @ weight[:-1])[place] + weight[-1]
            loss = binary(z, y).sum() + ridge / 2 * weight[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            logit[~rows] = (features @ weight[:-1])[item[~rows]] + weight[-1]
    return logit, binary(logit, seen)


@dataclass(frozen=True)
class Trimmed:
    """Who is left out: indices of people, the loss above which they are, and each person's mean loss."""

    users: np.ndarray
    at: float
    loss_U: np.ndarray


def trim_users(loss_N: np.ndarray, user_N: np.ndarray, share: float) -> Trimmed:
    """Return the `share` of people whose rows cost most on average, under a model that was not fitted to them.

    A person's mean is shrunk to that of all by 5 rows, so that a few unlucky ones do not make an adversary.

    Raises:
        ConfigError: a share that is not from 0 and below .5: a majority cannot be outliers.
    """
    if not 0 <= share < 0.5:
        raise ConfigError("The share of people to trim is from 0 and below .5", where=f"users.trim {share!r}")
    count = np.bincount(user_N)
    total = np.bincount(user_N, weights=loss_N)
    mean = (total + 5 * loss_N.mean()) / (count + 5)
    size = int(np.floor(share * len(count)))
    worst = np.sort(np.argsort(-mean, kind="stable")[:size])
    return Trimmed(worst, float(np.sort(mean)[::-1][size - 1]) if size else float("inf"), mean)


# --- calibration ------------------------------------------------------------------------------------


def fit_temperature(logit_N: np.ndarray, seen_N: np.ndarray, weight_N: np.ndarray | None = None) -> tuple[float, float]:
    """Return (a, b) of `P = sigmoid(a z + b)` by maximum likelihood: 1 / a is the temperature.

    The intercept takes up what a sum over people with effects of their own does to a logit at effect 0.

    Raises:
        DataError: one class only.
    """
    _require_both(seen_N)
    weight = np.ones(len(seen_N)) if weight_N is None else weight_N
    centre, scale = float(np.average(logit_N, weights=weight)), float(np.std(logit_N)) or 1.0
    x = np.column_stack([(logit_N - centre) / scale, np.ones(len(logit_N))])
    at = np.zeros(2)

    def loss(at: np.ndarray) -> float:
        z = x @ at
        return float(np.sum(weight * (np.logaddexp(0, z) - seen_N * z))) + 1e-6 * float(at @ at)

    for _ in range(100):
        p = np.exp(-np.logaddexp(0, -(x @ at)))
        slope = x.T @ (weight * (p - seen_N)) + 2e-6 * at
        curve = (x * (weight * p * (1 - p))[:, None]).T @ x + 2e-6 * np.eye(2)
        step, size = np.linalg.solve(curve, slope), 1.0
        while loss(at - size * step) > loss(at) and size > 1e-8:
            size /= 2
        at = at - size * step
        if np.abs(step).max() < 1e-10:
            break
    return float(at[0] / scale), float(at[1] - at[0] * centre / scale)


def fit_isotonic(logit_N: np.ndarray, seen_N: np.ndarray, weight_N: np.ndarray | None = None) -> dict[str, list[float]]:
    """Return points (x, y) of the rising step function closest to what was seen, by pooling adjacent violators.

    What lies between two points is read linearly, what lies beyond them is flat: the `isotonic` transform.

    Raises:
        DataError: one class only.

    Source: Zadrozny and Elkan (2002); the algorithm of Ayer et al. (1955).
    """
    _require_both(seen_N)
    weight = np.ones(len(seen_N)) if weight_N is None else weight_N
    level, index = np.unique(logit_N, return_inverse=True)
    mass = np.bincount(index, weights=weight)
    mean = np.bincount(index, weights=weight * seen_N) / mass
    blocks: list[list[float]] = []  # mean, mass, sum of mass times logit
    for x, y, w in zip(level, mean, mass, strict=True):
        blocks.append([float(y), float(w), float(w * x)])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            last = blocks.pop()
            total = blocks[-1][1] + last[1]
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + last[0] * last[1]) / total, total, blocks[-1][2] + last[2]]
    return {"x": [x / w for _, w, x in blocks], "y": [y for y, _, _ in blocks]}


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-p)


def _require_prior(prior: float) -> None:
    if not 0 < prior < 1:
        raise ConfigError("The share of positives lies strictly between 0 and 1", where=f"prior {prior!r}")


def _require_rates(rho_up: Tensor | float, rho_down: Tensor | float) -> None:
    if rho_up < 0 or rho_down < 0 or rho_up + rho_down >= 1:
        raise ConfigError(
            "Rates of mistakes are from 0 and below 1 together", where=f"rho_up {rho_up!r}, rho_down {rho_down!r}",
            why="at 1 what is seen says nothing about the truth",
        )  # fmt: skip


def _require_both(seen_N: np.ndarray) -> None:
    up, rows = int((seen_N > 0.5).sum()), len(seen_N)
    if not 0 < up < rows:
        raise DataError(
            "A calibration needs both classes", why=f"{up} of {rows} rows are positive",
            do="Hold out more rows, or set calibration: none",
        )  # fmt: skip
