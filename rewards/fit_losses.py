"""Observation models of one latent reward: what people said in, a loss a row out.

Notation. `f` is the latent reward of an output, `delta = f_a - f_b` the difference of two. Every function returns one
loss a row, in nats, so that callers weigh rows; none of them averages.

| what people said | functions |
|---|---|
| which of two is better | `bradley_terry`, `pick`, with ties `rao_kupper` and `davidson` |
| an order of several | `plackett_luce` |
| a thumb, a reaction or silence | `binary`, with `shift_prior` and `unsubsample` |
| a rating | `ordinal`, `squared`, `sigmoid_squared` |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from align.errors import DataError

# --- comparisons ------------------------------------------------------------------------------------


def bradley_terry(delta: Tensor, target: Tensor | float = 1.0, margin: Tensor | float = 0.0) -> Tensor:
    """Cross-entropy of a comparison, with a margin and soft labels.

        z    = delta - margin
        loss = -q log sigmoid(z) - (1 - q) log sigmoid(-z)

    Args:
        delta: `[B]`, f_a - f_b.
        target: q, the share of people who prefer a: 1, 0, or .5 for a tie.
        margin: by how much a is said to be better than b, in units of f; negative where b is.

    Raises:
        DataError: a target outside [0, 1].

    Source: Bradley and Terry (1952); the margin as in Llama 2 (arXiv 2307.09288), eq. 2.
    """
    q = _share(delta, target)
    z = delta - margin
    return -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)


def pick(delta: Tensor, target: Tensor | float = 1.0) -> Tensor:
    """PickScore's loss: the divergence of the softmax over two scores from what was said.

        p    = (sigmoid(delta), sigmoid(-delta)),  y = (q, 1 - q)
        loss = sum y log y - sum y log p

    It is the cross-entropy less its least value, so that a tie whose scores agree costs 0.

    Source: Pick-a-Pic (arXiv 2305.01569), section 4.
    """
    q = _share(delta, target)
    return bradley_terry(delta, q) + torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)


def rao_kupper(delta: Tensor, outcome: Tensor, log_theta: Tensor | float) -> Tensor:
    """Comparison with ties that take a band of differences.

        P(a)   = sigmoid(delta - log theta)
        P(b)   = sigmoid(-delta - log theta)
        P(tie) = (theta^2 - 1) P(a) P(b)

    Args:
        delta: `[B]`.
        outcome: `[B]`, 1 where a was preferred, -1 where b was, 0 for a tie.
        log_theta: above 0; the half-width of the band in units of f.

    Raises:
        DataError: a log_theta that is not above 0.

    Source: Rao and Kupper (1967); VideoAlign (arXiv 2501.13918), section 3.2.
    """
    width = torch.as_tensor(log_theta, dtype=delta.dtype, device=delta.device)
    if not bool((width > 0).all()):
        raise DataError("The tie parameter of Rao and Kupper is above 1", why=f"log theta is {float(width.min()):g}")
    a, b = F.logsigmoid(delta - width), F.logsigmoid(-delta - width)
    tie = 2 * width + torch.log(-torch.expm1(-2 * width)) + a + b
    return -torch.where(outcome > 0, a, torch.where(outcome < 0, b, tie))


def davidson(delta: Tensor, outcome: Tensor, log_nu: Tensor | float) -> Tensor:
    """Comparison with ties that are likeliest between equals.

        (P(a), P(tie), P(b)) = softmax(delta / 2, log nu, -delta / 2)

    Args:
        delta, outcome: see `rao_kupper`.
        log_nu: how common ties are.

    Source: Davidson (1970).
    """
    nu = torch.as_tensor(log_nu, dtype=delta.dtype, device=delta.device).expand_as(delta)
    logp = torch.stack([-delta / 2, nu, delta / 2], -1).log_softmax(-1)
    return -logp.gather(-1, outcome.sign().long()[..., None] + 1)[..., 0]


def plackett_luce(score_BM: Tensor, rank_BM: Tensor) -> Tensor:
    """Order of up to M outputs: the best is drawn first, then the best of what is left.

        loss = -sum_i [ f_i - log sum_{j: rank_j >= rank_i} exp f_j ]

    Outputs that share a rank share the set they are drawn from, so that a ranking of equals costs least where their
    scores agree. Of two outputs without a tie it is `bradley_terry`.

    Args:
        score_BM: `[B, M]`.
        rank_BM: `[B, M]`, 1 the best; 0 stands for no output.

    Source: Plackett (1975); ties as Breslow (1974) has them in the same likelihood.
    """
    there = rank_BM > 0
    left = (rank_BM[:, None, :] >= rank_BM[:, :, None]) & there[:, None, :] & there[:, :, None]
    score = score_BM.masked_fill(~there, 0.0)
    none = torch.full_like(score[:, None, :], -math.inf)
    drawn = torch.where(left, score[:, None, :], none)
    whole = torch.where(there[:, :, None], drawn, torch.zeros_like(drawn)).logsumexp(-1)
    return ((whole - score) * there).sum(-1)


def centre(score_a: Tensor, score_b: Tensor, weight: float = 0.01) -> Tensor:
    """Pull of the two scores of a pair to a mean of 0: `weight (f_a + f_b)^2`.

    Differences say nothing about a constant; this chooses one.

    Source: Eisenstein et al. (arXiv 2312.09244), section 4.
    """
    return weight * (score_a + score_b).square()


# --- thumbs -----------------------------------------------------------------------------------------


def binary(logit: Tensor, target: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Cross-entropy of a thumb.

        z    = logit + shift
        loss = -q log sigmoid(z) - (1 - q) log sigmoid(-z)

    Args:
        logit: `[B]`, of what is said by the population.
        target: q, in [0, 1].
        shift: by how much the log-odds of these rows exceed the population's; `-log(share)` where only a `share` of
            the negatives was kept. The logit is then the population's, with nothing to undo.

    Raises:
        DataError: a target outside [0, 1].
    """
    q = _share(logit, target)
    z = logit + shift
    return -q * F.logsigmoid(z) - (1 - q) * F.logsigmoid(-z)


def shift_prior(logit: Tensor, fitted_rate: float, true_rate: float) -> Tensor:
    """Return the logit under another base rate: `logit - logit(fitted_rate) + logit(true_rate)`.

    Raises:
        DataError: a rate that is not strictly between 0 and 1.
    """
    for rate in (fitted_rate, true_rate):
        if not 0 < rate < 1:
            raise DataError("A base rate lies strictly between 0 and 1", why=f"got {rate!r}")
    return logit - math.log(fitted_rate / (1 - fitted_rate)) + math.log(true_rate / (1 - true_rate))


def unsubsample(logit: Tensor, share: float) -> Tensor:
    """Return the logit over all rows of one fitted with a `share` of the negatives: `logit + log(share)`.

    The same as `p = share p' / (1 - p' + share p')`.

    Raises:
        DataError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise DataError("A share of the negatives is above 0 and at most 1", why=f"got {share!r}")
    return logit + math.log(share)


# --- ratings ----------------------------------------------------------------------------------------


def ordered(first: Tensor, gaps: Tensor) -> Tensor:
    """Return thresholds `[K-1]` that rise: `first + cumsum(0, softplus(gaps))`."""
    return torch.cat([first.reshape(1), first + F.softplus(gaps).cumsum(0)])


def log_sigmoid_difference(x: Tensor, y: Tensor) -> Tensor:
    """Return `log(sigmoid(x) - sigmoid(y))` for `x > y`, without cancellation.

    = log sigmoid(x) + log sigmoid(-y) + log(1 - exp(y - x))
    """
    return F.logsigmoid(x) + F.logsigmoid(-y) + torch.log(-torch.expm1(y - x))


def ordinal(score: Tensor, level: Tensor, thresholds: Tensor) -> Tensor:
    """Cumulative logit of a rating.

        P(y > k) = sigmoid(f - theta_k),   loss = -log P(y = level)

    Args:
        score: `[B]`, f.
        level: `[B]`, whole numbers from 0, the lowest of the K levels.
        thresholds: `[K-1]`, rising.

    Raises:
        DataError: a level beyond the thresholds.

    Source: McCullagh (1980), proportional odds.
    """
    level = level.long()
    if bool((level < 0).any()) or bool((level > len(thresholds)).any()):
        raise DataError("A rating lies outside its scale", why=f"{len(thresholds) + 1} levels are known")
    above = score[:, None] - thresholds
    first, last = F.logsigmoid(-above[:, :1]), F.logsigmoid(above[:, -1:])
    logp = torch.cat([first, log_sigmoid_difference(above[:, :-1], above[:, 1:]), last], -1)
    return -logp.gather(-1, level[:, None])[:, 0]


def squared(score: Tensor, target: Tensor) -> Tensor:
    """Squared error of a rating: `(f - y)^2`."""
    return (score - target).square()


def sigmoid_squared(score: Tensor, target: Tensor) -> Tensor:
    """Squared error of a rating in 0 to 1 as a sigmoid: `(sigmoid(f) - y)^2`.

    Source: Peering Through Preferences (arXiv 2308.15812), with y = (rating - 1) / 6.
    """
    return (score.sigmoid() - target).square()


COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "bradley_terry": bradley_terry, "pick": pick, "rao_kupper": rao_kupper, "davidson": davidson,
}  # fmt: skip
"""Losses of comparisons by name; the last two have a probability of a tie, and a parameter for it."""


def _share(like: Tensor, target: Tensor | float) -> Tensor:
    q = torch.as_tensor(target, dtype=like.dtype, device=like.device).expand_as(like)
    if bool(((q < 0) | (q > 1) | q.isnan()).any()):
        raise DataError("A label lies within 0 to 1", why=f"found {float(q.min()):g} to {float(q.max()):g}")
    return q
