"""Best of N, rejection sampling, and data mined from what was selected: the default use of a reward of people's taste.

N candidates of a prompt, scored by a reward r, the highest kept. Nothing is trained. What a larger N would bring, and
what a judge that does not rank makes of it, is read from the candidates at hand.

    reward of the best of n   E[max of n] = sum_i C(i-1, n-1) / C(N, n) r_(i),   r_(1) <= ... <= r_(N)
    a judge's of the same     E[j of the best of n] = sum_i C(i-1, n-1) / C(N, n) j_[i],   [i] in the order of r
    distance to the model     KL(best of n || model) <= log n - (n - 1) / n
    rejection sampling        KL(accepted || model) = -log P(accept)

Both sums run over all subsets of n of the N candidates, so they are unbiased and use every candidate.

Where this differs from the papers:
1. The KL of best of n is stated as the upper bound that it is (Beirami et al. 2024); for outputs of which no two are
   alike it is an equality.
2. Equal scores are broken by the place in the file, the first one wins, and prompts whose best is shared are counted.

Sources: Stiennon et al. (arXiv 2009.01325), best of n and its KL; Nakano et al. (arXiv 2112.09332), the estimator;
Gao, Schulman, Hilton (arXiv 2210.10760), a gold reward beside the proxy; Beirami et al. (arXiv 2401.01879), the bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from align.errors import ConfigError
from align.groupstats import bootstrap_mean
from align.registry import suggest
from align.seeding import uniform
from align.types import Scores
from rewards.panel import Panel
from trainers.advantages import group_advantages

PAIRS = ("best-worst", "best-random", "all")
COVERED = 0.9
"""Share of the prompts that must have n candidates for the curve to reach n."""


# --- order statistics -------------------------------------------------------------------------------


@cache
def best_of_weights(count: int, n: int) -> np.ndarray:
    """Return the chance of each of `count` candidates, the lowest score first, to be the best of n of them, `[count]`.

    `w_i = C(i-1, n-1) / C(count, n)`: candidate i is the best of the subsets that it makes with lower ones.

    Raises:
        ConfigError: n outside of 1..count.
    """
    if not 1 <= n <= count:
        raise ConfigError("The best of n needs n candidates", why=f"n {n}, {count} candidates")
    weights = np.zeros(count)
    weights[-1] = n / count
    for i in range(count - 1, n - 1, -1):  # C(i-1, n-1) = C(i, n-1) (i - n + 1) / i
        weights[i - 1] = weights[i] * (i - n + 1) / i
    weights.flags.writeable = False
    return weights


def expected_best(score_N: np.ndarray, n: int, of_N: np.ndarray | None = None) -> float:
    """Return the mean, over all n of the N candidates, of the best one's score; or of what `of_N` says of that one.

    Equal scores: the first candidate is the better one.
    """
    score = np.asarray(score_N, dtype=np.float64)
    values = score if of_N is None else np.asarray(of_N, dtype=np.float64)
    return float(best_of_weights(len(score), n) @ values[best_first(score)[::-1]])


def kl_bound(n: int) -> float:
    """Return the upper bound `log n - (n - 1) / n` of the KL divergence of the best of n from the model, in nats."""
    return math.log(n) - (n - 1) / n


def best_first(score_N: np.ndarray) -> np.ndarray:
    """Return places from the highest score to the lowest, the first of equal ones first; missing ones are left out."""
    score = np.asarray(score_N, dtype=np.float64)
    there = np.flatnonzero(np.isfinite(score))
    return there[np.argsort(-score[there], kind="stable")]


# --- one number a candidate -------------------------------------------------------------------------


def combined(panel: Panel, scores: Scores, group_B: Sequence[int]) -> np.ndarray:
    """Return one number a candidate `[B]`, NaN where a component is missing, from the scores of whole prompts.

    One component, or combine.mode weighted_sum, min or gate: what `Panel.total` says, in the reward's units. Several
    under sum_of_advantages or gdpo: the weighted sum of each component's z-score within the prompt, as in training.
    Prompts may have any number of candidates: short ones are filled up with missing ones, which no statistic sees.
    """
    groups = prompt_members(group_B)
    widest = max(map(len, groups))
    places = np.full((len(groups), widest), -1)
    for g, members in enumerate(groups):
        places[g, : len(members)] = members
    flat = places.reshape(-1)
    values, valid = scores.values[flat].copy(), scores.valid[flat] & (flat >= 0)[:, None]
    values[flat < 0] = np.nan
    padded = Scores(values, valid, scores.names)
    mode = panel.combined.mode
    if len(panel.names) > 1 and mode in ("sum_of_advantages", "gdpo"):
        ready = panel.transformed(padded, widest)
        whole = ready.valid.all(1)
        total = np.zeros(len(flat))
        if widest > 1:
            total = group_advantages(ready, widest, panel.weights, mode=mode, clip=None).values.reshape(-1)
        total = np.where(whole, total, np.nan)
    else:
        total = panel.total(padded, widest)
    found = np.full(len(scores), np.nan)
    found[flat[flat >= 0]] = total[flat >= 0]
    return found


def prompt_members(group_B: Sequence[int]) -> list[np.ndarray]:
    """Return the places of each prompt's candidates, in file order."""
    group = np.asarray(group_B)
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


# --- what is selected -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Which candidates are kept: those from the threshold up, and of them the best.

    Args:
        best: most of each prompt.
        share: most of each prompt as a share of its scored candidates, one at least; with `across`, of all candidates.
        threshold: least score; None is none.
        across: rank all candidates together. Only for scores that mean the same for every prompt.
    """

    best: int | None = None
    share: float | None = None
    threshold: float | None = None
    across: bool = False

    def __post_init__(self) -> None:
        if self.best is not None and self.share is not None:
            raise ConfigError("The best of a prompt are a number or a share", do="Give best or share")
        if self.across and self.share is None:
            raise ConfigError("Ranking across prompts is of a share", do="Give share too")

    def keep(self, score_B: np.ndarray, group_B: Sequence[int]) -> np.ndarray:
        """Return which candidates are kept, bool `[B]`; a missing score is not."""
        score = np.asarray(score_B, dtype=np.float64)
        kept = np.zeros(len(score), bool)
        for members in [np.arange(len(score))] if self.across else prompt_members(group_B):
            order = members[best_first(score[members])]
            most = len(order)
            if self.best is not None:
                most = self.best
            elif self.share is not None:
                most = max(1, math.floor(self.share * len(order) + 1e-9))
            kept[order[:most]] = True
        return kept & (score >= self.threshold) if self.threshold is not None else kept


def mine_pairs(
    score_B: np.ndarray, group_B: Sequence[int], content_B: Sequence[str], how: str = "best-worst", *,
    margin: float = 0.0, seed: int = 0,
) -> tuple[list[tuple[int, int, float]], Counter[str]]:  # fmt: skip
    """Return (chosen, rejected, margin) by place, margins above `margin`, and how many pairs were left out and why.

    Args:
        how: "best-worst", "best-random" (one other of the prompt, drawn by a hash) or "all" pairs of a prompt.
        content_B: what is the same content makes no pair, nor what is empty, "", which trainers on pairs refuse.

    Raises:
        ConfigError: an unknown way.
    """
    if how not in PAIRS:
        raise ConfigError(f"There is no way {how!r} to make pairs", do=suggest(how, PAIRS))
    score = np.asarray(score_B, dtype=np.float64)
    found: list[tuple[int, int, float]] = []
    left: Counter[str] = Counter()
    for g, members in enumerate(prompt_members(group_B)):
        order = [int(i) for i in members[best_first(score[members])]]
        if len(order) < 2:
            left["prompts with fewer than two scores"] += 1
            continue
        if how == "all":
            pairs: Iterable[tuple[int, int]] = combinations(order, 2)
        elif how == "best-worst":
            pairs = [(order[0], next(i for i in order if score[i] == score[order[-1]]))]
        else:
            pairs = [(order[0], order[1 + int(uniform(seed, "pair", g) * (len(order) - 1))])]
        for chosen, rejected in pairs:
            gap = float(score[chosen] - score[rejected])
            if gap <= max(margin, 0.0):
                left["ties" if gap == 0 else "margins too small"] += 1
            elif content_B[chosen] == content_B[rejected]:
                left["two of the same content"] += 1
            elif not (content_B[chosen] and content_B[rejected]):
                left["with an empty answer"] += 1
            else:
                found.append((chosen, rejected, gap))
    return found, left


def label(score_B: np.ndarray, up_from: float, down_to: float | None = None) -> np.ndarray:
    """Return 1 for scores from `up_from`, 0 for those up to `down_to` (below `up_from` when None), else NaN, `[B]`.

    Raises:
        ConfigError: bounds that cross.
    """
    if down_to is not None and not down_to < up_from:
        raise ConfigError("Thumbs down end below thumbs up", why=f"down to {down_to:g}, up from {up_from:g}")
    score = np.asarray(score_B, dtype=np.float64)
    down = score < up_from if down_to is None else score <= down_to
    return np.where(score >= up_from, 1.0, np.where(down, 0.0, np.nan))


# --- what n buys ------------------------------------------------------------------------------------


def curve(
    score_B: np.ndarray, group_B: Sequence[int], judges: Mapping[str, np.ndarray] = {}, *, seed: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Return the expected score of the best of n, n from 1 up, and each judge's of the same candidates.

    The same prompts stand behind every n: those that have as many candidates as the last n asks for, which at least
    `COVERED` of them do. Candidates that anyone's score is missing of are left out.

    Returns:
        n_max, prompts and prompts_left_out, points (n, kl_bound, reward and judges with 95 % intervals by prompt), and
        for each judge its gain from 1 to n_max, the n at which it is highest, its change from there to n_max, and
        `over_optimised`: that change's interval lies below 0.
    """
    columns = {"reward": np.asarray(score_B, dtype=np.float64), **judges}
    there = np.isfinite(np.stack(list(columns.values()))).all(0)
    groups = [members[there[members]] for members in prompt_members(group_B)]
    sizes = np.array([len(members) for members in groups])
    scored = np.sort(sizes[sizes > 0])
    if not len(scored):
        return {"n_max": 0, "prompts": 0, "prompts_left_out": len(groups), "points": [], "judges": {}}
    n_max = int(scored[math.floor((1 - COVERED) * len(scored) + 1e-9)])
    used = [members for members in groups if len(members) >= n_max]
    steps = list(range(1, n_max + 1)) if n_max <= 16 else sorted({2**i for i in range(n_max.bit_length())} | {n_max})
    values = {
        name: np.array([[expected_best(columns["reward"][m], n, column[m]) for m in used] for n in steps])
        for name, column in columns.items()
    }
    points = []
    for i, n in enumerate(steps):
        told = {name: bootstrap_mean(v[i], seed=seed).as_dict() for name, v in values.items()}
        reward = told.pop("reward")
        points.append({"n": n, "kl_bound": kl_bound(n), "reward": reward, "judges": told})
    found: dict[str, Any] = {"n_max": n_max, "prompts": len(used), "prompts_left_out": len(groups) - len(used)}
    verdicts = {}
    for name in judges:
        mean = values[name].mean(1)
        peak = int(mean.argmax())
        after = bootstrap_mean(values[name][-1] - values[name][peak], seed=seed)
        verdicts[name] = {
            "gain": bootstrap_mean(values[name][-1] - values[name][0], seed=seed).as_dict(), "peak": steps[peak],
            "after_peak": after.as_dict(), "over_optimised": bool(peak < len(steps) - 1 and after.ci_high < 0),
        }  # fmt: skip
    return {**found, "points": points, "judges": verdicts}
