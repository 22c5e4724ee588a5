"""Accounts that act together: found by what they answer and by answers that do not depend on it, and listed by name.

One account that likes everything is a lenient person, whom an effect of their own takes up. Several that like
everything, and the same things, are a campaign. An account is listed where both are beyond chance:

    together      the outputs that two accounts both answered, against what their activity and the outputs' popularity
                  give: `P(Poisson(sum_i p_ui p_vi) >= shared)`, `p_ui = min(1, n_u d_i / D)`; over the other accounts
                  `min_k (U - 1) p_(k) / k` (Simes). n_u are the answers of u, d_i those to i, D all of them
    of no content for a group g of accounts that are linked so,
                  H0: every u is honest, `y ~ sigmoid(a_u z + b_u)`, `a_u ~ N(m, s^2)`, `b_u ~ tau t_3`
                  H1: they answer as one, whatever it is, `y ~ Bernoulli(r_g)`, `r_g ~ U(0, 1)`
                  with z the logit under a model of other people. The statistic is the log Bayes factor
                  `log B(K_g + 1, N_g - K_g + 1) - sum_u log m_u`, K of N thumbs up,
                  `m_u = int int prod_i sigmoid(+-(a z_i + b)) dP(a, b)`; its p-value is by drawing answers under H0

A member is not listed with its group where an honest person's answers are ten times likelier than answers at the rate
of the others: `log m_u > log 10 + log B(K_g + 1, ..) - log B(K_g - k_u + 1, ..)`. The p-value of an account is the
larger of the two (an intersection-union test), and Benjamini and Hochberg's rule keeps the expected share of wrongly
listed accounts below a rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from align.feedback.audit import answered_together
from align.feedback.resampling import benjamini_hochberg
from rewards.plove import fit_temperature

TAILS = 3.0
"""Degrees of freedom of people's effects: heavy tails, so that a very lenient person is not out of the ordinary."""
MOST_DRAWS = 200_000
ODDS = 10.0
"""By how much an honest person must be likelier for a member of a group not to be listed with it."""
SLOPES = np.array([0.2, 0.6, 1.0, 1.4, 1.8, 2.2])
EFFECTS = np.linspace(-12, 12, 49)


@dataclass(frozen=True)
class Listed:
    """An account that is listed, and why.

    Args:
        account: its name.
        p: the larger of `p_together` and `p_content`.
        p_together: how likely it would share as many outputs with another account by chance.
        p_content: how likely the answers of its whole group would be so much alike and so little about the outputs,
            were they honest.
        n, up: its thumbs, and those that are up.
        expected: thumbs up that people at large would have given the same outputs.
        shared, closest: outputs it answered that the account `closest` answered too.
        group: accounts that are linked by what they answered, itself included.
        reason: the same in words.
    """

    account: str
    p: float
    p_together: float
    p_content: float
    n: int
    up: int
    expected: float
    shared: int
    closest: str
    group: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class People:
    """The distribution of honest people: mean and spread of slopes, scale of effects, and the share without content."""

    slope: float = 1.0
    slope_spread: float = 0.3
    effect_scale: float = 1.0
    without_content: float = 0.02


def find_campaigns(
    logit_N: np.ndarray, seen_N: np.ndarray, user_N: np.ndarray, item_N: np.ndarray, names: Sequence[str], *,
    rate: float = 0.1, answered_N: np.ndarray | None = None, seed: int = 0,
) -> list[Listed]:  # fmt: skip
    """Return the accounts of campaigns, the likeliest first; see the head of this file.

    Args:
        logit_N: of each thumb, under a model that was not fitted to who gave it.
        seen_N: 1 for up.
        user_N, item_N: index of who and of what, from 0.
        names: of the accounts.
        rate: largest expected share of wrongly listed accounts among those listed.
        answered_N: which thumbs were given, where others are silence that counts as down; None is all.

    Raises:
        DataError: thumbs of one class only.
    """
    given = np.ones(len(user_N), dtype=bool) if answered_N is None else answered_N
    together = answered_together(user_N[given], item_N[given], users=len(names))
    groups = [members for members in together.groups() if len(members) > 1]
    if not groups:
        return []
    slope, bias = fit_temperature(logit_N, seen_N)
    logit = slope * logit_N + bias
    honest = Honest.fit(logit, seen_N, user_N, len(names))
    p_content, p = np.ones(len(names)), np.ones(len(names))
    size = np.ones(len(names), dtype=int)
    for members in groups:
        draws = int(np.clip(4 * len(names) / (rate * len(members)), 2000, MOST_DRAWS))
        chance, alike = honest.judge(members, draws, seed)
        for u, fits in zip(members, alike, strict=True):
            size[u] = len(members)
            if fits:
                p_content[u], p[u] = chance, max(together.p_U[u], chance)
    found = []
    for u in sorted(benjamini_hochberg(p, rate).tolist(), key=lambda u: (p[u], names[u])):
        rows = user_N == u
        n, up, expected = int(rows.sum()), int(seen_N[rows].sum()), float((1 / (1 + np.exp(-logit[rows]))).sum())
        shared, closest = int(together.shared_U[u]), names[together.closest_U[u]]
        reason = (
            f"{up} of {n} thumbs are up where people at large give {expected:.1f}, whatever the output, and {shared} "
            f"outputs are those of {closest}, in a group of {size[u]}"
        )
        found.append(Listed(
            names[u], float(p[u]), float(together.p_U[u]), float(p_content[u]), n, up, expected, shared, closest,
            int(size[u]), reason,
        ))  # fmt: skip
    return found


@dataclass(frozen=True)
class Honest:
    """Everybody's answers under honest people: of each node (a, b) of a grid its log-prior, of each account its logits.

    Args:
        logits: calibrated for people at large, an array an account.
        n_U, k_U: thumbs, and those that are up.
        m_U: log-likelihood of each account's answers, were it honest.
    """

    slope_J: np.ndarray
    effect_J: np.ndarray
    prior_J: np.ndarray
    logits: list[np.ndarray]
    n_U: np.ndarray
    k_U: np.ndarray
    m_U: np.ndarray

    @classmethod
    def fit(cls, logit_N: np.ndarray, seen_N: np.ndarray, user_N: np.ndarray, users: int) -> Honest:
        """Return how people differ, fitted to all of them beside a share whose answers have no content."""
        slope, effect = (grid.ravel() for grid in np.meshgrid(SLOPES, EFFECTS, indexing="ij"))
        order = np.argsort(user_N, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(user_N, minlength=users))[:-1])
        likelihood = np.zeros((users, len(slope)))
        for u, rows in enumerate(parts):
            z = logit_N[rows, None] * slope + effect
            likelihood[u] = (seen_N[rows, None] * z - np.logaddexp(0, z)).sum(0)
        n = np.bincount(user_N, minlength=users)
        k = np.bincount(user_N, weights=seen_N, minlength=users)
        prior = _log_prior(fit_people(likelihood, log_beta(k + 1, n - k + 1), slope, effect), slope, effect)
        logits = [logit_N[rows] for rows in parts]
        return cls(slope, effect, prior, logits, n, k, _log_sum(likelihood + prior))

    def judge(self, members: Sequence[int], draws: int, seed: int) -> tuple[float, list[bool]]:
        """Return the p-value of a group under honest people, and whether each member's answers are the group's."""
        at = np.array(members)
        n, k = self.n_U[at], self.k_U[at]
        whole = log_beta(k.sum() + 1, (n - k).sum() + 1)
        rest = log_beta(k.sum() - k + 1, (n - k).sum() - (n - k) + 1)
        ups, honest = np.zeros(draws), np.zeros(draws)
        for u in members:
            rng = np.random.default_rng([seed, u])
            for start in range(0, draws, 5000):
                part = slice(start, min(start + 5000, draws))
                said, likelihood = self._draw(u, part.stop - part.start, rng)
                ups[part] += said
                honest[part] += likelihood
        drawn = log_beta(ups + 1, n.sum() - ups + 1) - honest
        factor = whole - self.m_U[at].sum()
        return float((1 + (drawn >= factor - 1e-9).sum()) / (1 + draws)), (
            whole - rest + np.log(ODDS) > self.m_U[at]
        ).tolist()

    def _draw(self, u: int, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw what an honest person would say of what u answered: thumbs up, and their log-likelihood."""
        z = self.logits[u][:, None] * self.slope_J + self.effect_J
        person = rng.choice(len(self.slope_J), draws, p=np.exp(self.prior_J))
        answers = rng.random((draws, len(z))) < 1 / (1 + np.exp(-z[:, person].T))
        return answers.sum(1), _log_sum(answers @ z - np.logaddexp(0, z).sum(0) + self.prior_J)


def fit_people(likelihood_UJ: np.ndarray, free_U: np.ndarray, slope_J: np.ndarray, effect_J: np.ndarray) -> People:
    """Return how honest people differ, by expectation-maximisation of a mixture with answers of no content.

    Every node of the grid (a_j, b_j) has the likelihood of a person's answers; t's scale is updated with the weights
    `(nu + 1) / (nu + b^2 / tau^2)` of Lange, Little and Taylor (1989).
    """
    people = People()
    for _ in range(40):
        joint = likelihood_UJ + _log_prior(people, slope_J, effect_J)
        honest = _log_sum(joint)
        odds = np.log1p(-people.without_content) + honest - np.log(people.without_content) - free_U
        weight = 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
        at = np.exp(joint - honest[:, None]).T @ weight / max(weight.sum(), 1e-9)
        heavy = (TAILS + 1) / (TAILS + (effect_J / people.effect_scale) ** 2)
        mean = float(at @ slope_J)
        people = People(
            mean, max(float(np.sqrt(at @ (slope_J - mean) ** 2)), 0.1),
            max(float(np.sqrt(at @ (heavy * effect_J**2))), 0.05), min(max(float(1 - weight.mean()), 1e-3), 0.3),
        )  # fmt: skip
    return people


def _log_prior(people: People, slope_J: np.ndarray, effect_J: np.ndarray) -> np.ndarray:
    normal = -((slope_J - people.slope) ** 2) / (2 * people.slope_spread**2)
    tailed = -(TAILS + 1) / 2 * np.log1p((effect_J / people.effect_scale) ** 2 / TAILS)
    return normal + tailed - _log_sum((normal + tailed)[None])[0]


def log_beta(a: Any, b: Any) -> Any:
    """Return `log B(a, b)`."""
    x, y = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return (torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)).numpy()


def _log_sum(values_BJ: np.ndarray) -> np.ndarray:
    top = values_BJ.max(1)
    return top + np.log(np.exp(values_BJ - top[:, None]).sum(1))
