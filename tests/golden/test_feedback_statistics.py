"""Statistics of feedback against values worked by hand or printed in textbooks, to their printed precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.errors import DataError
from align.feedback.aggregate import MODELS, Comparisons, crowd_probability, fit, fit_crowd, from_table, probabilities
from align.feedback.agreement import (
    all_coefficients,
    answers_of_table,
    classification_report,
    cohen_kappa,
    encode,
    fleiss_kappa,
    kappa_of_matrix,
    krippendorff_alpha,
    majority_counts,
)
from align.feedback.consistency import Joined, consistency, transitivity
from align.feedback.resampling import wilson
from align.feedback.signals import offline_online
from align.feedback.winrate import both_protocols, win_rate

A = [1, 2, 3, 3, 2, 1, 4, 1, 2, 4]
B = [1, 2, 3, 2, 2, 2, 4, 1, 3, 3]
FLEISS = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip
FOUR = """1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""
UNITS = list(zip(*([None if x == "." else int(x) for x in row.split()] for row in FOUR.split("\n")), strict=True))
TOY = [[4, 2, 1], [1, 5, 1], [0, 2, 4]]
THREE = from_table([("A", "B", 12, 5, 3), ("A", "C", 14, 4, 2), ("B", "C", 9, 6, 5)])


def near(value: float, printed: str) -> bool:
    """Equal up to half a unit of the last digit printed."""
    digits = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-digits + 1e-15


@pytest.mark.parametrize(
    ("weights", "printed"), [("none", ".4594594595"), ("linear", ".6428571429"), ("quadratic", ".8019801980")]
)
def test_cohen(weights: str, printed: str):
    found = cohen_kappa(A, B, [1, 2, 3, 4], weights=weights)
    assert near(found.value, printed) and (found.n_items, found.n_raters) == (10, 2)
    assert found.ci[0] < found.value < found.ci[1]


def test_cohen_of_a_two_by_two_table():
    assert kappa_of_matrix(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4, abs=1e-15)


def test_categories_nobody_used_change_no_kappa_but_the_order_does():
    wider = cohen_kappa(A, B, [1, 2, 3, 4, 5, 6, 7], weights="quadratic").value
    assert near(wider, ".8019801980")
    assert not near(cohen_kappa(A, B, [2, 1, 3, 4], weights="quadratic").value, ".8019801980")


def test_a_kappa_without_chance_is_nan_with_a_reason_and_not_one():
    found = cohen_kappa([1, 1], [1, 1])
    assert math.isnan(found.value) and found.reason == "both raters used one and the same category"
    assert cohen_kappa([1, None], [None, 1], [1]).reason == "no unit has both answers"
    with pytest.raises(DataError, match="categories declared"):
        cohen_kappa(A, B, weights="linear")


def test_fleiss():
    found = fleiss_kappa(FLEISS)
    assert near(found.value, ".2099307044") and (found.n_items, found.n_raters) == (10, 14)
    with pytest.raises(DataError, match=r"unit 1\): it has 3, the first has 2. Use Krippendorff's alpha"):
        fleiss_kappa([(1, 1), (2, 1)])


@pytest.mark.parametrize(
    ("level", "four", "two"),
    [
        ("nominal", ".7434210526", ".4794520548"),
        ("ordinal", ".8153875038", ".8084552846"),
        ("interval", ".8491071429", ".8118811881"),
    ],
)
def test_krippendorff(level: str, four: str, two: str):
    found = krippendorff_alpha(UNITS, level)
    assert near(found.value, four) and (found.n_items, found.n_raters) == (11, 4)
    assert near(krippendorff_alpha(list(zip(A, B, strict=True)), level).value, two)


def test_alpha_and_fleiss_with_complete_data():
    rows = [[c for c, n in enumerate(row) for _ in range(n)] for row in FLEISS]
    n, kappa = sum(map(sum, FLEISS)), fleiss_kappa(FLEISS).value
    assert 1 - krippendorff_alpha(rows).value == pytest.approx((1 - kappa) * (n - 1) / n, abs=1e-12)


def test_bootstrap_is_seeded_and_wider_by_clusters():
    rows = [row for row in UNITS for _ in range(6)]
    labels = [u for u in range(len(UNITS)) for _ in range(6)]
    alone, by_cluster = krippendorff_alpha(rows, seed=1), krippendorff_alpha(rows, clusters=labels, seed=1)
    assert alone.value == by_cluster.value and krippendorff_alpha(rows, seed=1).ci == alone.ci
    assert by_cluster.ci[1] - by_cluster.ci[0] > 1.5 * (alone.ci[1] - alone.ci[0])


def test_all_coefficients_of_a_table_name_their_raters():
    answers = answers_of_table(UNITS, list("ABCD"), categories=[1, 2, 3, 4, 5], ordered=True)
    found = all_coefficients(answers)
    assert near(found["krippendorff_ordinal"].value, ".8153875038")
    assert found["krippendorff_ordinal"].n_raters == 4 and found["fleiss"].n_items == 8
    assert {"cohen:A:B", "cohen_quadratic:C:D"} <= found.keys() and found["cohen:A:B"].n_items == 9
    assert majority_counts(answers) == {"1": 3, "2": 3, "3": 3, "4": 1, "5": 1, "none": 1}


def test_a_judge_against_a_truth_worked_by_hand():
    truth, guess = np.array([0, 0, 1, 1, 2, -1]), np.array([0, 1, 1, 1, -1, 0])
    found = classification_report(truth, guess, 3)
    assert (found["n"], found["left_out"], found["accuracy"]) == (4, 2, 0.75)
    assert found["macro_precision"] == pytest.approx((1 + 2 / 3) / 2) and found["macro_recall"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_labels_outside_the_categories_are_refused():
    with pytest.raises(DataError, match=r"unit 1, rater 0\): found 'tie'. Did you mean 'ties'"):
        encode([["ties"], ["tie"]], ["ties", "a"])


# --- protocols against each other -----------------------------------------------------------------------


def toy() -> Joined:
    rows = [(i, r, c) for i, (r, c) in enumerate((r, c) for r in range(3) for c in range(3) for _ in range(TOY[r][c]))]
    prompt, inferred, ranked = (np.array(column) for column in zip(*rows, strict=True))
    gaps = np.array([0.0, 2.0, -2.0])[inferred]
    return Joined(prompt, 2 * prompt, 2 * prompt + 1, 4 + gaps, np.full(len(rows), 4.0), ranked)


def test_the_consistency_report_of_the_worked_matrix():
    found = consistency(toy())
    assert (found["n"], found["skipped"], found["consistent"], found["matrix"]) == (20, 0, 13, TOY)
    assert near(found["kappa"], ".4736842105") and found["inconsistency"] == pytest.approx(0.35)
    assert (found["both_strict"], found["flips"]) == (12, 3)
    assert (found["rating_tie_strict_ranking"], found["strict_rating_ranking_tie"]) == (3, 1)
    assert near(found["ci"][0], ".181192") and near(found["ci"][1], ".567146")
    assert found["decisive_ratings"] == {"n": 13, "consistency": pytest.approx(9 / 13)}
    assert found["ranking_ties_dropped"] == {"n": 15, "consistency": pytest.approx(9 / 15)}
    assert [(row["gap"], row["n"], row["consistent"], row["flips"]) for row in found["by_gap"]] == [
        (0, 7, 4, 0),
        (2, 13, 9, 3),
    ]
    assert found["ci_cluster"][0] < 0.35 < found["ci_cluster"][1]


def test_a_tie_band_turns_close_ratings_into_ties():
    found = consistency(toy(), tie_band=2)
    assert [sum(row) for row in found["matrix"]] == [20, 0, 0]


def test_wilson():
    low, high = wilson(7, 20)
    assert near(low, ".181192") and near(high, ".567146")
    assert wilson(0, 10)[0] == 0 and all(map(math.isnan, wilson(0, 0)))


@pytest.mark.parametrize(
    ("pairs", "circles", "ties"),
    [
        ([(0, 1, 1), (1, 2, 1), (0, 2, 1)], 0, 0),
        ([(0, 1, 1), (1, 2, 1), (0, 2, 2)], 1, 0),
        ([(0, 1, 1), (1, 2, 1), (2, 0, 1)], 1, 0),
        ([(0, 1, 0), (1, 2, 0), (0, 2, 1)], 0, 1),
        ([(0, 1, 1), (1, 2, 1), (0, 2, 0)], 0, 1),
        ([(0, 1, 0), (1, 2, 1), (0, 2, 1)], 0, 0),
        ([(0, 1, 0), (1, 2, 0), (0, 2, 0)], 0, 0),
        ([(0, 1, 1), (1, 0, 1), (1, 2, 1), (0, 2, 1)], 0, 0),
    ],
)
def test_triads(pairs: list[tuple[int, int, int]], circles: int, ties: int):
    a, b, ranked = (np.array(column) for column in zip(*pairs, strict=True))
    found = transitivity(Joined(np.zeros(len(a), int), a, b, a * 0.0, a * 0.0, ranked))
    assert (found["triads"], found["intransitive"], found["tie_violations"]) == (1, circles, ties)


def test_win_rate():
    found = win_rate([1, 1, 1, 0.5, 0])
    assert (f"{100 * found['rate']:.1f}", f"{100 * found['half']:.1f}") == ("70.0", "39.2")
    assert (found["win"], found["tie"], found["loss"]) == (3, 1, 1)


def test_both_protocols_on_shared_prompts():
    found = both_protocols({"p": 1.0, "q": 0.5, "r": 0.0, "only": 1.0}, {"p": 1.0, "q": 0.0, "r": 0.0})
    assert found["shared"]["matrix"] == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert found["shared"]["agreement"] == pytest.approx(2 / 3) and found["ratings"]["n"] == 4


# --- strengths ----------------------------------------------------------------------------------------------


def test_probabilities():
    davidson, rao = probabilities("davidson", 0.8, 1.1), probabilities("rao_kupper", 0.8, 0.5)
    assert all(near(p, t) for p, t in zip(davidson, (".45731407", ".33720147", ".20548446"), strict=True))
    assert all(near(p, t) for p, t in zip(rao, (".57444252", ".21139247", ".21416502"), strict=True))
    assert near(probabilities("davidson", 0, 1.1)[1], ".3548387097")
    assert near(probabilities("rao_kupper", 0, 0.5)[1], ".2449186624")
    assert near(float(crowd_probability(0.8, 0.9)), ".6519795849")
    assert near(float(crowd_probability(0.8, 0.3)), ".4240102075")


@pytest.mark.parametrize(
    ("model", "ties", "b", "c", "theta", "nll"),
    [
        ("bradley_terry", "drop", -1.377293, -1.958346, None, 22.659256),
        ("bradley_terry", "half", -0.973119, -1.381671, None, 35.231742),
        ("davidson", "half", -1.400710, -1.987180, 0.836302, 56.153949),
        ("rao_kupper", "half", -1.064936, -1.514656, 0.660546, 56.133188),
    ],
)
def test_fits(model: str, ties: str, b: float, c: float, theta: float | None, nll: float):
    found = fit(THREE, model, ties=ties)
    assert found.strengths == pytest.approx([0, b, c], abs=1e-5) and found.nll == pytest.approx(nll, abs=1e-5)
    assert (
        found.log_theta is None if theta is None else math.exp(found.log_theta or 0) == pytest.approx(theta, abs=1e-5)
    )


@pytest.mark.parametrize("model", MODELS)
def test_standard_errors_are_the_inverse_of_the_numerical_information(model: str):
    found = fit(THREE, model, position=True)
    at = np.array([*found.strengths[1:], found.intercept, *([found.log_theta] if found.log_theta is not None else [])])

    def nll(x: np.ndarray) -> float:
        total = 0.0
        for i, j, *counts in THREE.weighted().tolist():
            r = [0.0, x[0], x[1]]
            d = r[int(i)] - r[int(j)] + x[2]
            win, tie, loss = probabilities(model, d, math.exp(x[3]) if len(x) > 3 else 0.0)
            if model == "bradley_terry":
                counts, tie = [counts[0] + counts[1] / 2, 0, counts[2] + counts[1] / 2], 1.0
            total -= sum(n * math.log(p) for n, p in zip(counts, (win, tie, loss), strict=True))
        return total

    step, size = 1e-4, len(at)
    hessian = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            ei, ej = np.eye(size)[i] * step, np.eye(size)[j] * step
            hessian[i, j] = (nll(at + ei + ej) - nll(at + ei - ej) - nll(at - ei + ej) + nll(at - ei - ej)) / (
                4 * step**2
            )
    errors = np.sqrt(np.diag(np.linalg.inv(hessian)))
    expected = [*found.errors[1:], found.intercept_error, *([found.log_theta_error] if size > 3 else [])]
    assert errors == pytest.approx(expected, rel=1e-4) and nll(at) == pytest.approx(found.nll, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("A", "B", 3, 0, 1), ("C", "D", 1, 0, 1), ("A", "C", 2, 0, 0)], r"\(A, B\): they only ever won"),
        ([("A", "B", 3, 0, 1), ("C", "A", 0, 0, 4)], r"\(C\): it only ever lost"),
        ([("A", "B", 3, 0, 1), ("C", "D", 1, 0, 1)], r"\(A, B\): they never met the rest"),
    ],
)
def test_a_graph_that_falls_apart_is_named(rows: list[tuple[str, str, int, int, int]], sentence: str):
    with pytest.raises(DataError, match=sentence):
        fit(from_table(rows))
    assert np.isfinite(fit(from_table(rows), prior=1.0).strengths).all()


def test_ties_connect_and_models_with_ties_need_them():
    assert np.isfinite(fit(from_table([("A", "B", 3, 1, 0)])).strengths).all()
    with pytest.raises(DataError, match="needs ties"):
        fit(from_table([("A", "B", 3, 0, 1)]), "davidson")
    with pytest.raises(DataError, match="only ever won"):
        fit(from_table([("A", "B", 3, 1, 0)]), ties="drop")


def test_cluster_bootstrap_of_strengths_covers_the_fit():
    found = fit(THREE, "davidson", bootstrap=60, seed=2)
    assert all(low <= value <= high for value, (low, high) in zip(found.strengths, found.ci, strict=True))
    assert found.ci[1][0] < found.ci[1][1]


def test_reliability_of_raters_is_recovered_and_nobody_is_turned_around():
    rng, true = np.random.default_rng(0), np.array([0, 0.5, 1, -0.5, 1.5])
    eta, size = np.array([0.95] * 6 + [0.5, 0.1]), 6000
    i = rng.integers(0, 5, size)
    j, rater = (i + rng.integers(1, 5, size)) % 5, rng.integers(0, 8, size)
    outcome = np.where(rng.random(size) < crowd_probability(true[i] - true[j], eta[rater]), 1, -1)
    found = fit_crowd(Comparisons(i, j, outcome, tuple("ABCDE"), rater_N=rater), 8)
    assert np.abs(found.reliability - eta).max() < 0.12 and found.flagged.tolist() == [False] * 6 + [True, True]
    assert np.corrcoef(found.strengths, true)[0, 1] > 0.99


# --- offline against online -----------------------------------------------------------------------------------


def test_offline_online():
    offline, online = (0.01, 0.03, 0.02, 0.05, 0.08), (0.02, 0.05, -0.01, 0.09, 0.12)
    x, y = (dict(zip("abcde", side, strict=True)) for side in (offline, online))
    found = offline_online(x, y)
    assert near(found["r"], ".9207772481") and found["rho"] == pytest.approx(0.9) and found["sign_accuracy"] == 0.8
    assert found["verdict"] == "predictive" and found["leave_one_out"][0] < found["r"] < found["leave_one_out"][1]
    noisy = offline_online(x, y, scores={k: np.random.default_rng(0).normal(v, 0.2, 30) for k, v in x.items()})
    assert noisy["ci_items"][0] < found["ci"][0] and noisy["verdict"] == "not shown to be predictive"
    four = offline_online({k: x[k] for k in "abcd"}, {k: y[k] for k in "abcd"})
    assert four["verdict"] == "insufficient" and four["k"] == 4
    with pytest.raises(DataError, match="got 2"):
        offline_online({"a": 1, "b": 2}, {"a": 1, "b": 2})
    with pytest.raises(DataError, match="only one side has"):
        offline_online(x, {k: y[k] for k in "abcd"})
