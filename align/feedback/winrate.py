"""Win rates of one model over another, under ratings and under rankings side by side.

A policy trained on one protocol may win under it and lose under the other, so both are always given, each with n, wins,
ties, losses and an interval, and how far the two agree on the prompts they share (Bansal, Dang, Grover 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.agreement import kappa_of_matrix
from align.feedback.columns import Row, cell, number_cell, text_cell
from align.feedback.consistency import A, B, read_preference
from align.feedback.events import content_id
from align.feedback.resampling import wilson
from align.registry import suggest

Z = 1.96


def win_rate(wins_N: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return the mean of wins (1, tie .5, loss 0) with `1.96 SEM`, SEM from the standard deviation with n - 1.

    Returns:
        n, win, tie, loss, rate, half (half width), ci, and wilson (an interval that stays within 0 and 1).
    """
    wins = np.asarray(wins_N, dtype=np.float64)
    n = len(wins)
    rate = float(wins.mean()) if n else float("nan")
    half = float(Z * wins.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    counts = {"win": int((wins > 0.5).sum()), "tie": int((wins == 0.5).sum()), "loss": int((wins < 0.5).sum())}
    interval = list(wilson(wins.sum(), n))
    return {"n": n, **counts, "rate": rate, "half": half, "ci": [rate - half, rate + half], "wilson": interval}


def both_protocols(by_rating: Mapping[str, float], by_ranking: Mapping[str, float]) -> dict[str, Any]:
    """Return win rates by ratings and by rankings, and their 3x3 agreement on the prompts that have both.

    Args:
        by_rating, by_ranking: 1, .5 or 0 (or a mean of several) for each prompt.

    Returns:
        ratings, rankings (see `win_rate`), and shared: n, matrix (rows rating-based, columns rank-based: win, tie,
        loss), agreement with its Wilson interval, kappa, and both rates on the shared prompts.
    """
    shared = sorted(by_rating.keys() & by_ranking.keys())
    matrix = np.zeros((3, 3), dtype=int)
    for prompt in shared:
        matrix[_outcome(by_rating[prompt]), _outcome(by_ranking[prompt])] += 1
    n, same = len(shared), int(np.trace(matrix))
    return {
        "ratings": win_rate(list(by_rating.values())),
        "rankings": win_rate(list(by_ranking.values())),
        "shared": {
            "n": n,
            "matrix": matrix.tolist(),
            "agreement": same / n if n else float("nan"),
            "ci": list(wilson(same, n)),
            "kappa": float(kappa_of_matrix(matrix)),
            "rating_rate": win_rate([by_rating[p] for p in shared])["rate"],
            "ranking_rate": win_rate([by_ranking[p] for p in shared])["rate"],
        },
    }


def _outcome(win: float) -> int:
    return 0 if win > 0.5 else 1 if win == 0.5 else 2


def rating_wins(scores: Mapping[tuple[str, str], float], ours: str, theirs: str) -> dict[str, float]:
    """Return 1, .5 or 0 for each prompt that has a rating of both models: the higher rating wins, equal ones tie.

    Args:
        scores: mean rating of each (prompt, model).
    """
    prompts = [prompt for prompt, model in scores if model == ours and (prompt, theirs) in scores]
    return {p: (float(np.sign(scores[p, ours] - scores[p, theirs])) + 1) / 2 for p in prompts}


def wins_of_rows(
    ratings: Iterable[Row], rankings: Iterable[Row], ours: str, theirs: str
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Return wins by ratings, wins by rankings and counts of what was left out, from rows of two files.

    Ratings need prompt, model and rating; rankings need prompt, model_a, model_b and preference; both may have input,
    which is part of what a prompt is. Several answers about one prompt are averaged.

    Raises:
        DataError: a missing field, an unreadable cell, or a model that no row names.
    """
    rated: dict[tuple[str, str], list[float]] = {}
    ranked: dict[str, list[float]] = {}
    notes = {"ratings_missing": 0, "preferences_missing": 0, "other_models": 0}
    models: set[str] = set()
    for place, row in ratings:
        model = str(cell(row, "model", place))
        models.add(model)
        score = number_cell(cell(row, "rating", place), "rating", place)
        if np.isnan(score):
            notes["ratings_missing"] += 1
        else:
            rated.setdefault((_prompt(row, place), model), []).append(score)
    for place, row in rankings:
        pair = str(cell(row, "model_a", place)), str(cell(row, "model_b", place))
        models.update(pair)
        choice = read_preference(cell(row, "preference", place), place)
        if choice is None:
            notes["preferences_missing"] += 1
        elif set(pair) != {ours, theirs}:
            notes["other_models"] += 1
        else:
            won = {A: 1.0, B: 0.0}.get(choice, 0.5)
            ranked.setdefault(_prompt(row, place), []).append(won if pair[0] == ours else 1 - won)
    require_models(models, ours, theirs)
    scores = {key: float(np.mean(values)) for key, values in rated.items()}
    return rating_wins(scores, ours, theirs), {p: float(np.mean(v)) for p, v in ranked.items()}, notes


def require_models(models: Iterable[str], *wanted: str) -> None:
    """Refuse a model that no answer is about.

    Raises:
        DataError: with the closest name.
    """
    known = set(models)
    for name in wanted:
        if name not in known:
            raise DataError(f"No answer is about the model {name!r}", do=suggest(name, known))


def _prompt(row: Mapping[str, Any], place: str) -> str:
    return content_id(text_cell(cell(row, "prompt", place)), text_cell(row.get("input")))
