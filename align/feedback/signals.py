"""Which signal may be trained on, and whether an offline metric says what happens online."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.audit import concentration
from align.feedback.bias import pearson, spearman
from align.feedback.resampling import NO_INTERVAL, Interval, percentile_interval
from align.feedback.views import Shown

# --- signal selection -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignalGates:
    """What a signal must reach before anything is trained on it. The values are ours; set them to your product.

    Args:
        min_reacted: reactions in all.
        min_coverage: reactions an exposure.
        max_top_user_share: largest share of the reactions that the most active 1 % of users may have made.
        needs_outcome: whether the interval of the correlation with a delayed outcome must lie above 0.
    """

    min_reacted: int = 200
    min_coverage: float = 0.001
    max_top_user_share: float = 0.5
    needs_outcome: bool = True


@dataclass(frozen=True)
class SignalReport:
    """A signal measured against the gates: `verdict` is "pass", "fail" or "unproven" (no outcome to compare with).

    `gates` lists each gate with what was measured, what was asked for, and whether it holds (None: not measured).
    """

    key: str
    n_shown: int
    n_reacted: int
    coverage: float
    base_rate: float
    corr_with_outcome: float
    ci: Interval
    by_user_concentration: float
    verdict: str
    gates: tuple[Mapping[str, Any], ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self) | {"ci": list(self.ci), "gates": [dict(gate) for gate in self.gates]}


def select_signal(
    key: str,
    shown: Shown,
    *,
    outcome: Mapping[str, float] | None = None,
    gates: SignalGates | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> SignalReport:
    """Measure a signal against the gates.

    Args:
        outcome: of each user, a delayed outcome such as retention or a session score. Correlated (Spearman) with the
            user's share of positive reactions among what they were shown; the interval resamples users.
    """
    gates, n, reacted = gates or SignalGates(), len(shown.value_N), shown.reacted_N
    count, positive = int(reacted.sum()), float(np.nansum(shown.value_N)) if n else 0.0
    share = concentration(shown.user_N[reacted])
    corr, ci, users = float("nan"), NO_INTERVAL, 0
    if outcome:
        corr, ci, users = _outcome_correlation(shown, outcome, draws, seed)
    coverage = count / n if n else float("nan")
    enough = count >= gates.min_reacted
    checks: list[dict[str, Any]] = [
        {"gate": "n_reacted", "measured": count, "asked": f">= {gates.min_reacted}", "holds": enough},
        {"gate": "coverage", "measured": coverage, "asked": f">= {gates.min_coverage:g}",
         "holds": coverage >= gates.min_coverage if n else None},
        {"gate": "top_user_share", "measured": share, "asked": f"<= {gates.max_top_user_share:g}",
         "holds": share <= gates.max_top_user_share if count else None},
    ]  # fmt: skip
    if gates.needs_outcome:
        measured = bool(np.isfinite(ci[0]))
        asked = "interval above 0"
        holds = ci[0] > 0 if measured else None
        checks.append({"gate": "outcome", "measured": corr, "asked": asked, "holds": holds, "users": users})
    held = [check["holds"] for check in checks]
    verdict = "fail" if False in held else "unproven" if None in held else "pass"
    base = positive / n if n else float("nan")
    return SignalReport(key, n, count, coverage, base, corr, ci, share, verdict, tuple(checks))


def gates_not_held(report: SignalReport, *, measured: bool = False) -> list[str]:
    """Return the gates that a signal does not pass, in words; with `measured` only those that were measured."""
    return [
        f"{gate['gate']} is {gate['measured']:.3g}, asked {gate['asked']}"
        for gate in report.gates
        if not gate["holds"] and not (measured and gate["holds"] is None)
    ]


def require_trainable(report: SignalReport, *, override: bool = False) -> None:
    """Refuse to train on a signal that did not pass, unless that is overridden.

    Raises:
        DataError: with the gates that do not hold.
    """
    if report.verdict == "pass" or override:
        return
    raise DataError(
        f"The signal {report.key!r} is not to be trained on", why="; ".join(gates_not_held(report)),
        do="Collect more, or override it knowingly; it can always be audited",
    )  # fmt: skip


def _outcome_correlation(
    shown: Shown, outcome: Mapping[str, float], draws: int, seed: int
) -> tuple[float, Interval, int]:
    names, index = np.unique(shown.user_N.astype(str), return_inverse=True)
    n = np.bincount(index, minlength=len(names))
    rate = np.bincount(index, weights=np.nan_to_num(shown.value_N), minlength=len(names)) / np.maximum(n, 1)
    y = np.array([outcome.get(name, np.nan) for name in names.tolist()], dtype=float)
    kept = np.isfinite(y)
    rate, y = rate[kept], y[kept]
    if len(y) < 10:
        return float("nan"), NO_INTERVAL, len(y)
    rng = np.random.default_rng(seed)
    picks = (rng.integers(0, len(y), len(y)) for _ in range(draws))
    found = np.array([spearman(rate[pick], y[pick]) for pick in picks])
    return spearman(rate, y), percentile_interval(found), len(y)


# --- offline against online -------------------------------------------------------------------------


def offline_online(
    offline: Mapping[str, float],
    online: Mapping[str, float],
    *,
    scores: Mapping[str, Sequence[float]] | None = None,
    min_lower: float = 0.0,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Ask whether an offline metric predicts an online rate, over k policies (or their differences to one control).

    Args:
        offline: mean offline score of each policy, on the same prompts, with user effects at 0.
        online: online rate of each policy.
        scores: per policy, the scores behind its offline mean; they are resampled too, without which the interval
            takes every offline mean as exact.
        min_lower: the lower end of the interval of r from which the metric is called predictive.

    Returns:
        k, r (Pearson), rho (Spearman), sign_accuracy, ci (bootstrap of policies, k >= 5), ci_items (policies and their
        items), leave_one_out (smallest and largest r with one policy left out), verdict: "insufficient" for 3 or 4
        policies whatever r is, else "predictive" or "not shown to be predictive".

    Raises:
        DataError: fewer than 3 policies, or policies that are not the same on both sides.
    """
    if offline.keys() != online.keys():
        odd = sorted(offline.keys() ^ online.keys())
        raise DataError("Offline scores and online rates are of different policies", why=f"only one side has {odd[:5]}")
    names = sorted(offline)
    x, y = (np.array([side[name] for name in names], dtype=float) for side in (offline, online))
    k = len(names)
    if k < 3:
        raise DataError(
            "A metric cannot be validated on so few policies", why=f"got {k}, and two points always lie on a line",
            do="Measure 5 policies or more",
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {"k": k, "r": pearson(x, y), "rho": spearman(x, y)}
    found["sign_accuracy"] = float(np.mean(np.sign(x) == np.sign(y)))
    left_out = [pearson(np.delete(x, i), np.delete(y, i)) for i in range(k)]
    found["leave_one_out"] = [float(np.nanmin(left_out)), float(np.nanmax(left_out))] if k > 3 else list(NO_INTERVAL)
    if k < 5:
        return {**found, "ci": list(NO_INTERVAL), "ci_items": list(NO_INTERVAL), "verdict": "insufficient"}
    picks = rng.integers(0, k, (draws, k))
    found["ci"] = list(percentile_interval(np.array([pearson(x[p], y[p]) for p in picks])))
    found["ci_items"] = list(NO_INTERVAL)
    if scores:
        rows = [np.asarray(scores[name], dtype=float) for name in names]
        noisy = np.array([[row[rng.integers(0, len(row), len(row))].mean() for row in rows] for _ in range(draws)])
        found["ci_items"] = list(
            percentile_interval(np.array([pearson(n[p], y[p]) for n, p in zip(noisy, picks, strict=True)]))
        )
    lower = (
        min(end for end in (found["ci"][0], found["ci_items"][0]) if np.isfinite(end))
        if np.isfinite(found["ci"][0])
        else float("nan")
    )
    found["verdict"] = "predictive" if lower > min_lower else "not shown to be predictive"
    return found
