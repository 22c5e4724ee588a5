"""Agreement of raters: Cohen's kappa (weighted), Fleiss' kappa, Krippendorff's alpha, a majority, a judge against it.

Raters answer units. `Answers` holds one entry an answer, so that a log of a million events and ten thousand raters
fits; a table of units by raters becomes one by `answers_of_table`. Categories are declared, in order, because weights
depend on those nobody used.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.resampling import DRAWS, NO_INTERVAL, Interval, bootstrap_sums
from align.registry import suggest

WEIGHTS = ("none", "linear", "quadratic")
LEVELS = ("nominal", "ordinal", "interval")
MISSING = -1


@dataclass(frozen=True)
class Coefficient:
    """A coefficient with its 95 % bootstrap interval; `reason` says why the value is NaN."""

    value: float
    ci: Interval = NO_INTERVAL
    n_items: int = 0
    n_raters: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return value, ci, n_items, n_raters and, where there is one, the reason."""
        found = {"value": self.value, "ci": list(self.ci), "n_items": self.n_items, "n_raters": self.n_raters}
        return {**found, "reason": self.reason} if self.reason else found


def is_missing(label: Any) -> bool:
    """Whether a label stands for no answer: None or NaN."""
    return label is None or (isinstance(label, (float, np.floating)) and bool(np.isnan(label)))


def encode(labels_UR: Sequence[Sequence[Any]], categories: Sequence[Hashable]) -> np.ndarray:
    """Return `codes_UR` of a table of labels, None or NaN being missing.

    Raises:
        DataError: rows of different lengths, categories that repeat, or a label that is none of them.
    """
    index = {category: i for i, category in enumerate(categories)}
    if len(index) < len(categories):
        raise DataError("Categories must differ", why=f"got {list(categories)}")
    width = len(labels_UR[0]) if len(labels_UR) else 0
    codes = np.full((len(labels_UR), width), MISSING, dtype=np.int64)
    for u, row in enumerate(labels_UR):
        if len(row) != width:
            raise DataError("Every unit needs one cell a rater", where=f"unit {u}", why=f"{len(row)} for {width}")
        for r, label in enumerate(row):
            if is_missing(label):
                continue
            if label not in index:
                raise DataError(
                    "A label is none of the declared categories", where=f"unit {u}, rater {r}", why=f"found {label!r}",
                    do=suggest(str(label), map(str, categories)),
                )  # fmt: skip
            codes[u, r] = index[label]
    return codes


def categories_of(labels_UR: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the labels that occur, numbers in order before texts; missing ones left out."""
    found = {label for row in labels_UR for label in row if not is_missing(label)}
    return sorted(found, key=lambda c: (isinstance(c, str), c if not isinstance(c, str) else 0.0, str(c)))


def counts_of(codes_UR: np.ndarray, n_categories: int) -> np.ndarray:
    """Return `counts_UC`: how many raters put each unit into each category."""
    return np.stack([(codes_UR == c).sum(1) for c in range(n_categories)], axis=1) if n_categories else codes_UR[:, :0]


# --- Cohen ------------------------------------------------------------------------------------------


def disagreement_weights(n_categories: int, weights: str) -> np.ndarray:
    """Return `w_ij`: [i != j], |i - j| or (i - j)^2.

    Raises:
        DataError: weights of another name.
    """
    if weights not in WEIGHTS:
        raise DataError(f"Unknown weights {weights!r} of a kappa", do=suggest(weights, WEIGHTS))
    gap = np.abs(np.arange(n_categories)[:, None] - np.arange(n_categories)[None, :]).astype(np.float64)
    return {"none": (gap > 0).astype(np.float64), "linear": gap, "quadratic": gap**2}[weights]


def kappa_of_matrix(matrix_CC: np.ndarray, weights: str = "none") -> np.ndarray:
    """Return Cohen's kappa of confusion matrices `[..., C, C]`: `1 - sum w O / sum w E`, NaN where `sum w E` is 0.

    With weights [i != j] this is `(p_o - p_e) / (1 - p_e)` (Cohen 1960, 1968).
    """
    matrix = np.asarray(matrix_CC, dtype=np.float64)
    w, n = disagreement_weights(matrix.shape[-1], weights), matrix.sum((-1, -2))
    expected = (w * matrix.sum(-1)[..., :, None] * matrix.sum(-2)[..., None, :]).sum((-1, -2))
    observed = (w * matrix).sum((-1, -2)) * n
    return 1 - np.divide(observed, expected, out=np.full(np.shape(expected), np.nan), where=expected > 0)


def cohen_kappa(
    a: Sequence[Any],
    b: Sequence[Any],
    categories: Sequence[Hashable] | None = None,
    *,
    weights: str = "none",
    clusters: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Coefficient:
    """Return Cohen's kappa of two raters on the units that both answered.

    Args:
        categories: all categories in their order; needed for weights, read off the data without.
        weights: "none", "linear" or "quadratic".
        clusters: label of each unit for the bootstrap, such as its prompt.

    Raises:
        DataError: different lengths, weights without categories, or a label outside them.
    """
    if len(a) != len(b):
        raise DataError("Two raters need one answer each a unit", why=f"got {len(a)} and {len(b)}")
    labels = list(zip(a, b, strict=True))
    if categories is None and weights != "none":
        raise DataError("A weighted kappa needs its categories declared", do="List all of them, in order")
    categories = categories_of(labels) if categories is None else categories
    codes = encode(labels, categories)
    if not len(codes):
        codes = np.zeros((0, 2), dtype=np.int64)
    return _cohen(codes, len(categories), weights, None if clusters is None else np.asarray(clusters), draws, seed)


def _cohen(
    codes_U2: np.ndarray, size: int, weights: str, clusters: np.ndarray | None, draws: int, seed: int
) -> Coefficient:
    both = (codes_U2 >= 0).all(1)
    cells = codes_U2[both, 0] * size + codes_U2[both, 1]
    matrix = np.bincount(cells, minlength=size * size).reshape(size, size)
    value, n = float(kappa_of_matrix(matrix, weights)) if size else float("nan"), int(both.sum())
    if not np.isfinite(value):
        reason = "no unit has both answers" if n == 0 else "both raters used one and the same category"
        return Coefficient(float("nan"), NO_INTERVAL, n, 2, reason)
    tables = np.zeros((n, size * size))
    tables[np.arange(n), cells] = 1
    interval = bootstrap_sums(
        tables, lambda s: kappa_of_matrix(s.reshape(-1, size, size), weights),
        None if clusters is None else clusters[both], draws=draws, seed=seed,
    )  # fmt: skip
    return Coefficient(value, interval, n, 2)


# --- Fleiss -----------------------------------------------------------------------------------------


def fleiss_kappa(
    counts_UC: Sequence[Sequence[int]] | np.ndarray,
    *,
    clusters: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Coefficient:
    """Return Fleiss' kappa of counts of raters a category, the same number of raters n for every unit.

    `P_i = (sum_j n_ij^2 - n) / (n(n-1))`, `P_e = sum_j p_j^2`, `(mean P - P_e) / (1 - P_e)` (Fleiss 1971).

    Raises:
        DataError: units with different numbers of raters, or with fewer than two.
    """
    counts = np.asarray(counts_UC, dtype=np.float64)
    if counts.ndim != 2 or not len(counts):
        raise DataError("Fleiss' kappa needs counts of raters, a row a unit", why=f"got the shape {counts.shape}")
    raters = counts.sum(1)
    n = raters[0]
    if (raters != n).any() or n < 2:
        u = int(np.argmax(raters != n)) if n >= 2 else 0
        raise DataError(
            "Fleiss' kappa needs the same number of raters, two or more, for every unit", where=f"unit {u}",
            why=f"it has {raters[u]:g}, the first has {n:g}", do="Use Krippendorff's alpha, which allows gaps",
        )  # fmt: skip
    agreements = ((counts**2).sum(1) - n) / (n * (n - 1))

    def statistic(sums: np.ndarray) -> np.ndarray:
        units = sums[:, -1]
        chance = ((sums[:, 1:-1] / (n * units)[:, None]) ** 2).sum(1)
        out = np.full(len(sums), np.nan)
        return np.divide(sums[:, 0] / units - chance, 1 - chance, out=out, where=chance < 1 - 1e-12)

    tables = np.column_stack([agreements, counts, np.ones(len(counts))])
    value = float(statistic(tables.sum(0, keepdims=True))[0])
    reason = "" if np.isfinite(value) else "all raters used one and the same category"
    labels = None if clusters is None else np.asarray(clusters)
    interval = NO_INTERVAL if reason else bootstrap_sums(tables, statistic, labels, draws=draws, seed=seed)
    return Coefficient(value, interval, len(counts), int(n), reason)


# --- Krippendorff -----------------------------------------------------------------------------------


def alpha_of_coincidences(o_CC: np.ndarray, values_C: np.ndarray, level: str) -> np.ndarray:
    """Return alpha of coincidence matrices `[..., C, C]`: `1 - (n-1) sum o d2 / sum n_c n_k d2`, NaN where undefined.

    `d2` is [c != k] (nominal), `(sum_{g=c..k} n_g - (n_c + n_k)/2)^2` (ordinal) or `(v_c - v_k)^2` (interval)
    (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").
    """
    if level not in LEVELS:
        raise DataError(f"Unknown level {level!r} of an alpha", do=suggest(level, LEVELS))
    o = np.asarray(o_CC, dtype=np.float64)
    n_c = o.sum(-1)
    size = o.shape[-1]
    if level == "ordinal":
        middle = np.cumsum(n_c, -1) - n_c / 2
        d2 = (middle[..., :, None] - middle[..., None, :]) ** 2
    elif level == "interval":
        d2 = np.broadcast_to((values_C[:, None] - values_C[None, :]) ** 2, o.shape)
    else:
        d2 = np.broadcast_to(1.0 - np.eye(size), o.shape)
    expected = (n_c[..., :, None] * n_c[..., None, :] * d2).sum((-1, -2))
    observed = (o * d2).sum((-1, -2)) * (n_c.sum(-1) - 1)
    return 1 - np.divide(observed, expected, out=np.full(np.shape(expected), np.nan), where=expected > 0)


def krippendorff_alpha(
    labels_UR: Sequence[Sequence[Any]],
    level: str = "nominal",
    *,
    categories: Sequence[Any] | None = None,
    clusters: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Coefficient:
    """Return Krippendorff's alpha of units by raters, None or NaN where a rater gave no answer.

    Units with fewer than two answers drop out. The interval resamples units, or whole clusters of them.

    Raises:
        DataError: an unknown level, an interval level over labels that are no numbers, or a bad table.
    """
    categories = categories_of(labels_UR) if categories is None else list(categories)
    codes = encode(labels_UR, categories)
    units = (codes >= 0).sum(1) >= 2
    raters = int((codes[units] >= 0).any(0).sum()) if units.any() else 0
    counts = counts_of(codes, len(categories))
    return alpha_of_counts(counts, categories, level, clusters, n_raters=raters, draws=draws, seed=seed)


def alpha_of_counts(
    counts_UC: np.ndarray,
    categories: Sequence[Any],
    level: str = "nominal",
    clusters: Sequence[Any] | np.ndarray | None = None,
    *,
    n_raters: int = 0,
    draws: int = DRAWS,
    seed: int = 0,
) -> Coefficient:
    """Return Krippendorff's alpha of how many raters put each unit into each category; see `krippendorff_alpha`."""
    if level == "interval" and any(isinstance(c, (str, bool)) for c in categories):
        raise DataError("An interval alpha needs numbers as categories", why=f"got {list(categories)[:5]}")
    values = np.asarray(categories, dtype=np.float64) if level == "interval" else np.arange(len(categories))
    counts = np.asarray(counts_UC, dtype=np.float64)
    m = counts.sum(1)
    kept = m >= 2
    counts, m, size = counts[kept], m[kept], len(categories)
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs[:, np.arange(size), np.arange(size)] -= counts
    tables = (pairs / (m - 1)[:, None, None]).reshape(len(counts), size * size)

    def statistic(sums: np.ndarray) -> np.ndarray:
        return alpha_of_coincidences(sums.reshape(-1, size, size), values, level)

    value = float(statistic(tables.sum(0, keepdims=True))[0]) if len(counts) else float("nan")
    if not np.isfinite(value):
        reason = "every answer is the same category" if len(counts) else "no unit has two answers"
        return Coefficient(float("nan"), NO_INTERVAL, len(counts), n_raters, reason)
    labels = None if clusters is None else np.asarray(clusters)[kept]
    interval = bootstrap_sums(tables, statistic, labels, draws=draws, seed=seed)
    return Coefficient(value, interval, len(counts), n_raters)


# --- a whole table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Who answered what, one entry an answer: of unit `unit_N[i]`, rater `rater_N[i]` gave category `code_N[i]`.

    Args:
        unit_N, rater_N, code_N: indices, no two entries of one unit and rater.
        raters: name of each rater.
        categories: the categories, in order where they have one.
        n_units: how many units there are, answered or not.
        cluster_U: label of each unit for the bootstrap; empty makes each unit its own.
        ordered: whether the order of the categories means something.
    """

    unit_N: np.ndarray
    rater_N: np.ndarray
    code_N: np.ndarray
    raters: tuple[str, ...]
    categories: tuple[Any, ...]
    n_units: int
    cluster_U: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ordered: bool = False

    @property
    def clusters(self) -> np.ndarray | None:
        """The cluster labels, None where each unit is its own."""
        return self.cluster_U if len(self.cluster_U) else None

    def counts(self) -> np.ndarray:
        """Return `counts_UC`: how many raters put each unit into each category."""
        found = np.zeros((self.n_units, len(self.categories)), dtype=np.int64)
        np.add.at(found, (self.unit_N, self.code_N), 1)
        return found

    def column(self, rater: int) -> np.ndarray:
        """Return one rater's code of every unit, -1 where there is none."""
        found = np.full(self.n_units, MISSING, dtype=np.int64)
        mine = self.rater_N == rater
        found[self.unit_N[mine]] = self.code_N[mine]
        return found


def answers_of_table(
    labels_UR: Sequence[Sequence[Any]],
    raters: Sequence[str],
    *,
    categories: Sequence[Any] | None = None,
    ordered: bool = False,
    clusters: Sequence[Any] | None = None,
) -> Answers:
    """Return the answers of a table of units by raters, None or NaN where a rater gave none."""
    categories = categories_of(labels_UR) if categories is None else list(categories)
    codes = encode(labels_UR, categories)
    unit, rater = np.nonzero(codes >= 0)
    labels = np.zeros(0, dtype=np.int64) if clusters is None else np.unique(list(clusters), return_inverse=True)[1]
    return Answers(
        unit, rater, codes[unit, rater], tuple(raters), tuple(categories), len(codes), np.asarray(labels), ordered
    )


def all_coefficients(
    answers: Answers, *, draws: int = DRAWS, seed: int = 0, busiest: int = 10
) -> dict[str, Coefficient]:
    """Return every coefficient that the answers allow, by name.

    `krippendorff_nominal` always, `_ordinal` and `_interval` where the categories are ordered numbers; `fleiss` over
    the units with the most common number of answers; `cohen:A:B` for each two of the `busiest` raters with a unit in
    common, with `cohen_linear:A:B` and `cohen_quadratic:A:B` where the categories are ordered.
    """
    counts, options = answers.counts(), {"draws": draws, "seed": seed}
    m = counts.sum(1)
    raters = len(np.unique(answers.rater_N[m[answers.unit_N] >= 2]))
    numbers = not any(isinstance(c, (str, bool)) for c in answers.categories)
    levels = LEVELS if answers.ordered and numbers else LEVELS[: 2 if answers.ordered else 1]
    found = {
        f"krippendorff_{level}": alpha_of_counts(
            counts, answers.categories, level, answers.clusters, n_raters=raters, **options
        )
        for level in levels
    }
    if (m >= 2).any():
        chosen = m == int(np.bincount(m[m >= 2]).argmax())
        labels = None if answers.clusters is None else answers.clusters[chosen]
        found["fleiss"] = fleiss_kappa(counts[chosen], clusters=labels, **options)
    answered = np.bincount(answers.rater_N, minlength=len(answers.raters))
    chosen_raters = sorted(np.argsort(-answered, kind="stable")[:busiest].tolist())
    columns = {r: answers.column(r) for r in chosen_raters}
    for weights in WEIGHTS if answers.ordered else WEIGHTS[:1]:
        name = "cohen" if weights == "none" else f"cohen_{weights}"
        for i, j in combinations(chosen_raters, 2):
            codes = np.stack([columns[i], columns[j]], axis=1)
            if (codes >= 0).all(1).any():
                kappa = _cohen(codes, len(answers.categories), weights, answers.clusters, draws, seed)
                found[f"{name}:{answers.raters[i]}:{answers.raters[j]}"] = kappa
    return found


def majority(counts_UC: np.ndarray) -> np.ndarray:
    """Return the code that more raters gave than any other, -1 where two share the lead or nobody answered."""
    if not counts_UC.size:
        return np.full(len(counts_UC), MISSING)
    top = counts_UC.max(1)
    alone = (counts_UC == top[:, None]).sum(1) == 1
    return np.where(alone & (top > 0), counts_UC.argmax(1), MISSING)


def classification_report(truth: np.ndarray, guess: np.ndarray, n_categories: int) -> dict[str, Any]:
    """Return how a judge does against a truth: accuracy, macro precision, recall and F1, and the matrix [truth, guess].

    Units where either is missing (-1) are left out and counted. Precision of a category nobody guessed is 0, and so is
    the recall of one that never occurs; the macro means run over the categories that occur on either side.
    """
    kept = (truth >= 0) & (guess >= 0)
    matrix = np.zeros((n_categories, n_categories), dtype=np.int64)
    np.add.at(matrix, (truth[kept], guess[kept]), 1)
    hits, guessed, real = np.diag(matrix).astype(float), matrix.sum(0), matrix.sum(1)
    used = (guessed + real) > 0
    precision = np.divide(hits, guessed, out=np.zeros_like(hits), where=guessed > 0)
    recall = np.divide(hits, real, out=np.zeros_like(hits), where=real > 0)
    f1 = np.divide(2 * hits, guessed + real, out=np.zeros_like(hits), where=used)
    n = int(kept.sum())
    mean = (lambda v: float(v[used].mean())) if n else (lambda v: float("nan"))
    return {
        "n": n,
        "left_out": int(len(truth) - n),
        "accuracy": float(hits.sum() / n) if n else float("nan"),
        "macro_precision": mean(precision),
        "macro_recall": mean(recall),
        "macro_f1": mean(f1),
        "matrix": matrix.tolist(),
    }


def majority_counts(answers: Answers) -> dict[str, int]:
    """Return how many units each category won by majority, and how many have none (`"none"`)."""
    winners = majority(answers.counts())
    found = {str(category): int((winners == i).sum()) for i, category in enumerate(answers.categories)}
    return {**found, "none": int((winners == MISSING).sum())}
