"""From comparisons to one strength an item: Bradley-Terry, Davidson and Rao-Kupper, with standard errors.

With `d = r_i - r_j`, plus an intercept for the place shown first where it is asked for:

| model         | P(i wins), P(tie), P(j wins)                                                    | `log_theta` is |
|---------------|---------------------------------------------------------------------------------|----------------|
| bradley_terry | sigma(d), -, sigma(-d)                                                          | (none)         |
| davidson      | (e^(d/2), nu, e^(-d/2)) / sum                                                   | log nu         |
| rao_kupper    | sigma(d - theta), the rest, sigma(-d - theta), theta > 0                        | log theta      |

(Bradley and Terry 1952; Davidson 1970; Rao and Kupper 1967.) The log-likelihoods leave the multinomial constant out.
The first item is fixed at 0 and standard errors are of the differences to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.resampling import percentile_interval
from align.registry import suggest

MODELS = ("bradley_terry", "davidson", "rao_kupper")
TIES = ("drop", "half")
STEPS = 200
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Comparisons:
    """What was compared with what, one entry a comparison.

    Args:
        i_N, j_N: index of the item shown first and second.
        outcome_N: 1 where i won, 0 a tie, -1 where j won.
        names: name of each item; the first is the one fixed at 0.
        cluster_N: label for the bootstrap, such as the prompt; empty makes each comparison its own.
        rater_N: index of who compared, for `fit_crowd`.
    """

    i_N: np.ndarray
    j_N: np.ndarray
    outcome_N: np.ndarray
    names: tuple[str, ...]
    cluster_N: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rater_N: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def weighted(self, weight_N: np.ndarray | None = None) -> np.ndarray:
        """Return rows (i, j, wins, ties, losses), one a pair in the order shown."""
        weight = np.ones(len(self.i_N)) if weight_N is None else weight_N
        pair, index = np.unique(self.i_N * len(self.names) + self.j_N, return_inverse=True)
        columns = [np.bincount(index, weights=weight * (self.outcome_N == o), minlength=len(pair)) for o in (1, 0, -1)]
        return np.column_stack([pair // len(self.names), pair % len(self.names), *columns])


def from_table(rows: Sequence[tuple[str, str, int, int, int]]) -> Comparisons:
    """Return comparisons of rows (item, item, wins, ties, losses)."""
    names = tuple(dict.fromkeys(name for row in rows for name in row[:2]))
    index = {name: i for i, name in enumerate(names)}
    columns: list[list[int]] = [[], [], []]
    for a, b, *counts in rows:
        for outcome, count in zip((1, 0, -1), counts, strict=True):
            columns[0] += [index[a]] * count
            columns[1] += [index[b]] * count
            columns[2] += [outcome] * count
    i, j, outcome = (np.array(column, dtype=np.int64) for column in columns)
    return Comparisons(i, j, outcome, names)


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    Args:
        strengths, errors: of each item, the first fixed at 0; errors are NaN where a prior stands in for data.
        log_theta, log_theta_error: the tie parameter of Davidson (log nu) and Rao-Kupper (log theta), else None.
        intercept, intercept_error: advantage of the place shown first, in units of strength, else None.
        nll: negative log-likelihood without the multinomial constant.
        ci: percentile bootstrap interval of each strength, where it was asked for.
    """

    model: str
    names: tuple[str, ...]
    strengths: np.ndarray
    errors: np.ndarray
    nll: float
    n: float
    log_theta: float | None = None
    log_theta_error: float | None = None
    intercept: float | None = None
    intercept_error: float | None = None
    ci: tuple[tuple[float, float], ...] = ()
    failed_draws: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fit as JSON-ready numbers, the strongest item first."""
        rows = [
            {"name": name, "strength": float(self.strengths[k]), "error": float(self.errors[k])}
            | ({"ci": list(self.ci[k])} if self.ci else {})
            for k, name in enumerate(self.names)
        ]
        rows.sort(key=lambda row: -row["strength"])
        extra = {
            name: getattr(self, name)
            for name in ("log_theta", "log_theta_error", "intercept", "intercept_error")
            if getattr(self, name) is not None
        }
        return {"model": self.model, "items": rows, "nll": self.nll, "n": self.n, **extra, "failed": self.failed_draws}


def probabilities(model: str, d: float, theta: float = 0.0) -> tuple[float, float, float]:
    """Return P(win), P(tie), P(loss) at a difference of strengths; `theta` is Davidson's nu or Rao-Kupper's theta."""
    if model == "davidson":
        parts = np.array([np.exp(d / 2), theta, np.exp(-d / 2)])
        return tuple((parts / parts.sum()).tolist())
    shift = theta if model == "rao_kupper" else 0.0
    win, loss = float(np.exp(_log_sigmoid(d - shift))), float(np.exp(_log_sigmoid(-d - shift)))
    return win, 1 - win - loss, loss


def fit(
    comparisons: Comparisons,
    model: str = "bradley_terry",
    *,
    ties: str = "half",
    position: bool = False,
    prior: float = 0.0,
    bootstrap: int = 0,
    seed: int = 0,
) -> Fit:
    """Fit strengths by maximum likelihood (Newton's method), with standard errors from the inverse information.

    Args:
        model: "bradley_terry", "davidson" or "rao_kupper".
        ties: what Bradley-Terry does with ties: "half" a win each way, or "drop".
        position: fit an intercept for the item shown first.
        prior: precision of a normal prior of strengths around 0; needed where the win graph falls apart.
        bootstrap: draws of whole clusters for `ci`; 0 leaves it out.

    Raises:
        DataError: nothing to compare, an unknown model, no tie where one is modelled, or, without a prior, items that
            no chain of wins connects both ways (the component is named).
    """
    for word, known, what in ((model, MODELS, "model of comparisons"), (ties, TIES, "tie policy")):
        if word not in known:
            raise DataError(f"Unknown {what} {word!r}", do=suggest(word, known))
    rows = comparisons.weighted()
    if model == "bradley_terry" and ties == "drop":
        rows = rows * np.array([1, 1, 1, 0, 1])
    rows = rows[rows[:, 2:].sum(1) > 0]
    if not len(rows):
        raise DataError("There is nothing to fit", why="no comparison with an outcome was given")
    if model != "bradley_terry" and not rows[:, 3].sum():
        raise DataError(f"{model} needs ties", why="there is none", do="Use bradley_terry")
    if prior <= 0:
        require_connected(rows, comparisons.names)
    found = _newton(rows, len(comparisons.names), model, position, prior)
    if bootstrap:
        found["ci"], found["failed_draws"] = _intervals(comparisons, model, ties, position, prior, bootstrap, seed)
    return Fit(model, comparisons.names, **found)


def require_connected(rows: np.ndarray, names: Sequence[str]) -> None:
    """Refuse comparisons under which some strengths are infinite or unrelated.

    Strengths are finite and unique when the graph with an edge from each winner to the loser, and both ways for a tie,
    is strongly connected (Ford 1957).

    Raises:
        DataError: it is not; the smallest component that only wins, only loses or never meets the rest is named.
    """
    edges: list[set[int]] = [set() for _ in names]
    for i, j, win, tie, loss in rows.tolist():
        if win or tie:
            edges[int(i)].add(int(j))
        if loss or tie:
            edges[int(j)].add(int(i))
    parts = _components(edges)
    if len(parts) == 1:
        return
    part = min(parts, key=lambda p: (len(p), p))
    inside = set(part)
    beats = any(t not in inside for i in part for t in edges[i])
    beaten = any(t in inside for i in range(len(names)) if i not in inside for t in edges[i])
    story = {(True, False): "only ever won", (False, True): "only ever lost", (False, False): "never met"}
    verb = story.get((beats, beaten), "never both beat and were beaten by")
    shown = ", ".join(names[i] for i in part[:5]) + (f" and {len(part) - 5} more" if len(part) > 5 else "")
    raise DataError(
        "Strengths cannot be compared", where=shown, why=f"{'it' if len(part) == 1 else 'they'} {verb}"
        f"{' against' if verb.startswith('only') else ''} the rest",
        do="Collect comparisons across the gap, leave these out, or give a prior",
    )  # fmt: skip


def _components(edges: Sequence[set[int]]) -> list[list[int]]:
    """Return strongly connected components (Tarjan 1972, without recursion)."""
    order, low, stack, on, found = {}, {}, [], set(), []
    for root in range(len(edges)):
        if root in order:
            continue
        work = [(root, iter(sorted(edges[root])))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on.add(root)
        while work:
            node, following = work[-1]
            for target in following:
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    on.add(target)
                    work.append((target, iter(sorted(edges[target]))))
                    break
                if target in on:
                    low[node] = min(low[node], order[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    part = []
                    while not part or part[-1] != node:
                        part.append(stack.pop())
                        on.discard(part[-1])
                    found.append(sorted(part))
    return found


def _log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0.0, -np.asarray(x, dtype=np.float64))


def _terms(model: str, d: np.ndarray, t: float, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the log-likelihood of each row with its first and second derivatives in (d, t)."""
    win, tie, loss = rows[:, 2], rows[:, 3], rows[:, 4]
    n, zero = win + tie + loss, np.zeros(len(rows))
    if model == "bradley_terry":
        p, y = np.exp(_log_sigmoid(d)), win + tie / 2
        value = y * _log_sigmoid(d) + (n - y) * _log_sigmoid(-d)
        return value, y - n * p, zero, -n * p * (1 - p), zero, zero
    if model == "davidson":
        logits = np.stack([d / 2, np.full(len(d), t), -d / 2])
        total = np.logaddexp.reduce(logits, axis=0)
        p = np.exp(logits - total)
        value = win * logits[0] + tie * logits[1] + loss * logits[2] - n * total
        slope = (p[0] - p[2]) / 2
        return (
            value, (win - loss) / 2 - n * slope, tie - n * p[1],
            -n * ((p[0] + p[2]) / 4 - slope**2), n * slope * p[1], -n * p[1] * (1 - p[1]),
        )  # fmt: skip
    theta = np.exp(t)
    a, b = np.exp(_log_sigmoid(d - theta)), np.exp(_log_sigmoid(-d - theta))
    u, v = win + tie, loss + tie
    grown = np.log(np.expm1(2 * theta)) if theta < 300 else 2 * theta
    value = u * _log_sigmoid(d - theta) + v * _log_sigmoid(-d - theta) + tie * grown
    rate = 2 / -np.expm1(-2 * theta)
    by_d, by_theta = u * (1 - a) - v * (1 - b), -u * (1 - a) - v * (1 - b) + tie * rate
    dd = -u * a * (1 - a) - v * b * (1 - b)
    cross = u * a * (1 - a) - v * b * (1 - b)
    curve = dd - tie * rate * (rate - 2)
    return value, by_d, theta * by_theta, dd, theta * cross, theta * by_theta + theta**2 * curve


def _newton(rows: np.ndarray, size: int, model: str, position: bool, prior: float) -> dict[str, Any]:
    tied, m = model != "bradley_terry", len(rows)
    design = np.zeros((m, size + 1))
    design[np.arange(m), rows[:, 0].astype(int)] += 1
    design[np.arange(m), rows[:, 1].astype(int)] -= 1
    design[:, size] = 1
    free = [*range(1, size), *([size] if position else [])]
    ridge = np.array([prior] * (size - 1) + [0.0] * (position + tied))
    x_mat, x = design[:, free], np.zeros(len(free) + tied)

    def value(at: np.ndarray) -> float:
        d = x_mat @ at[: len(free)]
        return float(_terms(model, d, at[-1] if tied else 0.0, rows)[0].sum() - (ridge * at**2).sum() / 2)

    def slopes(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, by_d, by_t, dd, dt, tt = _terms(model, x_mat @ at[: len(free)], at[-1] if tied else 0.0, rows)
        gradient = x_mat.T @ by_d
        hessian = x_mat.T @ (dd[:, None] * x_mat)
        if tied:
            edge = x_mat.T @ dt
            gradient = np.append(gradient, by_t.sum())
            hessian = np.block([[hessian, edge[:, None]], [edge[None, :], np.array([[tt.sum()]])]])
        return gradient - ridge * at, hessian - np.diag(ridge)

    for _ in range(STEPS):
        gradient, hessian = slopes(x)
        if np.abs(gradient).max(initial=0.0) < TOLERANCE * max(1.0, rows[:, 2:].sum()):
            break
        step = _ascent(hessian, gradient)
        length, now = 1.0, value(x)
        while length > 1e-8 and not value(x + length * step) >= now - 1e-12 * abs(now):
            length /= 2
        x = x + length * step
    if not np.isfinite(x).all() or np.abs(x).max(initial=0.0) > 50:
        raise DataError(
            "The fit has no finite solution", why="a strength, the tie parameter or the intercept runs away",
            do="Give a prior, or leave the position out",
        )  # fmt: skip
    covariance = np.linalg.pinv(-slopes(x)[1])
    error = np.sqrt(np.maximum(np.diag(covariance), 0))
    at, where = len(free), size - 1
    d = x_mat @ x[:at]
    return {
        "strengths": np.concatenate([[0.0], x[:where]]),
        "errors": np.concatenate([[0.0], error[:where]]),
        "nll": -float(_terms(model, d, x[-1] if tied else 0.0, rows)[0].sum()),
        "n": float(rows[:, 2:].sum()),
        "log_theta": float(x[-1]) if tied else None,
        "log_theta_error": float(error[-1]) if tied else None,
        "intercept": float(x[where]) if position else None,
        "intercept_error": float(error[where]) if position else None,
    }


def _ascent(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Return Newton's step, damped until the curvature points down."""
    damping = 0.0
    for _ in range(30):
        try:
            lower = np.linalg.cholesky(damping * np.eye(len(gradient)) - hessian)
            return np.linalg.solve(lower.T, np.linalg.solve(lower, gradient))
        except np.linalg.LinAlgError:
            damping = max(1e-8, 10 * damping)
    return gradient


def _intervals(
    comparisons: Comparisons, model: str, ties: str, position: bool, prior: float, draws: int, seed: int
) -> tuple[tuple[tuple[float, float], ...], int]:
    labels = comparisons.cluster_N if len(comparisons.cluster_N) else np.arange(len(comparisons.i_N))
    _, index = np.unique(labels, return_inverse=True)
    count, rng = index.max() + 1, np.random.default_rng(seed)
    found, failed = [], 0
    for _ in range(draws):
        weight = np.bincount(rng.integers(0, count, count), minlength=count)[index].astype(float)
        rows = comparisons.weighted(weight)
        if model == "bradley_terry" and ties == "drop":
            rows = rows * np.array([1, 1, 1, 0, 1])
        rows = rows[rows[:, 2:].sum(1) > 0]
        try:
            if prior <= 0:
                require_connected(rows, comparisons.names)
            found.append(_newton(rows, len(comparisons.names), model, position, prior)["strengths"])
        except DataError:
            failed += 1
    table = np.array(found) if found else np.full((1, len(comparisons.names)), np.nan)
    return tuple(percentile_interval(column) for column in table.T), failed


# --- raters who differ in reliability ---------------------------------------------------------------


@dataclass(frozen=True)
class CrowdFit:
    """Strengths with the reliability `eta` of each rater: below .5 a rater is flagged, and not turned around."""

    names: tuple[str, ...]
    strengths: np.ndarray
    reliability: np.ndarray
    flagged: np.ndarray
    n_R: np.ndarray


def crowd_probability(d: Any, eta: Any) -> Any:
    """Return `P(i > j | rater) = eta sigma(d) + (1 - eta) sigma(-d)` (Chen et al. 2013, CrowdBT)."""
    p = np.exp(_log_sigmoid(d))
    return eta * p + (1 - eta) * (1 - p)


def fit_crowd(
    comparisons: Comparisons,
    n_raters: int,
    *,
    prior: float = 0.1,
    hits: float = 4.0,
    misses: float = 1.0,
    steps: int = 100,
) -> CrowdFit:
    """Fit strengths and a reliability a rater by expectation maximisation; ties count half each way.

    Reliabilities have a Beta(hits + 1, misses + 1) prior, which decides which of the two mirror images (everybody
    wrong, or everybody right) is meant. Strengths have a normal prior of precision `prior`.
    """
    if len(comparisons.rater_N) != len(comparisons.i_N):
        raise DataError("Reliability needs a rater for every comparison")
    i, j, rater = comparisons.i_N, comparisons.j_N, comparisons.rater_N
    twice = np.concatenate([i, j]), np.concatenate([j, i])
    weight = np.concatenate([comparisons.outcome_N == 1, comparisons.outcome_N == -1]).astype(float)
    weight += np.tile(comparisons.outcome_N == 0, 2) / 2
    who, size = np.tile(rater, 2), len(comparisons.names)
    eta, r = np.full(n_raters, (hits + 1) / (hits + misses + 2)), np.zeros(size)
    for _ in range(steps):
        p = np.exp(_log_sigmoid(r[twice[0]] - r[twice[1]]))
        right = eta[who] * p
        q = right / (right + (1 - eta[who]) * (1 - p))
        soft = np.zeros((size, size))
        np.add.at(soft, twice, weight * q)
        np.add.at(soft, twice[::-1], weight * (1 - q))
        a, b = np.nonzero(np.triu(soft + soft.T, 1))
        rows = np.column_stack([a, b, soft[a, b], np.zeros(len(a)), soft[b, a]])
        new = _newton(rows, size, "bradley_terry", False, prior)["strengths"]
        total = np.bincount(who, weights=weight, minlength=n_raters)
        eta = (np.bincount(who, weights=weight * q, minlength=n_raters) + hits) / (total + hits + misses)
        moved, r = np.abs(new - r).max(), new
        if moved < 1e-6:
            break
    return CrowdFit(comparisons.names, r, eta, eta < 0.5, np.bincount(rater, minlength=n_raters))
