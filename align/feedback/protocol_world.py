"""Simulated annotators whose ratings and rankings of the same answers differ, and whose two tastes are known.

An answer has an accuracy (right less wrong words) and a density (words of detail). Rating one answer alone, people
see its density; comparing two, they look for the more accurate one (the direction is that of Bansal, Dang, Grover
2024; the sizes are ours):

    rating    round(4 + u_R + severity + noise), cut to 1..7,   u_R = accuracy + d_R density
    ranking   P(first wins) = sigmoid(2 (u_K(first) - u_K(second)) + first_place),   u_K = accuracy + d_K density

Every pair is compared in both orders; two answers that contradict each other make a tie by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from align.feedback.events import FeedbackEvent, Item

RIGHT = ("correct", "exact", "proven", "sourced")
WRONG = ("mistaken", "invented", "garbled", "outdated")
DETAIL = ("moreover", "namely", "specifically", "furthermore", "additionally", "likewise")
PLAIN = ("the", "answer", "is", "that", "one", "may")
SCALE = (1, 7)
CLARITY = 2.0
RATERS_OF_PROMPT = 2
START = 1_760_000_000_000


@dataclass(frozen=True)
class Truth:
    """The two tastes for one answer: what is rated, and what is ranked."""

    rating: float
    ranking: float


class ProtocolWorld:
    """The world: draws answers, rates them, compares them. The same arguments give the same world.

    Args:
        density_in_ratings, density_in_rankings: d_R and d_K.
        raters, severity: how many annotators, and the standard deviation of their severities in points.
        rating_noise: standard deviation of a rating's noise in points.
        first_place: what being shown first is worth, in nats.
    """

    def __init__(
        self, *, density_in_ratings: float = 0.8, density_in_rankings: float = -0.3, raters: int = 12,
        severity: float = 0.3, rating_noise: float = 0.7, first_place: float = 0.5, seed: int = 0,
    ) -> None:  # fmt: skip
        self.weights = density_in_ratings, density_in_rankings
        self.rating_noise, self.first_place = rating_noise, first_place
        self.rng = np.random.default_rng(seed)
        self.severity = self.rng.normal(0, severity, raters)
        self.truth: dict[str, Truth] = {}

    def answers(self, prompts: int, each: int, policy: str = "simulated", first: int = 0) -> list[Item]:
        """Return `each` answers to every prompt, prompts numbered from `first`; their truth is known from now on."""
        items = []
        for p in range(first, first + prompts):
            for r in range(each):
                right, wrong, detail = self.rng.integers(0, (4, 4, 7))
                words = [*self.rng.choice(RIGHT, right, replace=False), *self.rng.choice(WRONG, wrong, replace=False)]
                words += [*self.rng.choice(DETAIL, detail, replace=False), *self.rng.choice(PLAIN, 4), f"n{p}x{r}"]
                accuracy, density = float(right - wrong) / 1.6, float(detail - 3) / 2
                item = Item(f"Question {p}", " ".join(self.rng.permutation(words)), metadata={"policy": policy})
                self.truth[item.id] = Truth(*(accuracy + weight * density for weight in self.weights))
                items.append(item)
        return items

    def rate(self, item: str, rater: int) -> int:
        """Return one annotator's rating of one answer."""
        seen = 4 + self.truth[item].rating + self.severity[rater] + self.rng.normal(0, self.rating_noise)
        return int(np.clip(round(seen), *SCALE))

    def compare(self, a: str, b: str) -> str:
        """Return "a", "b" or "tie" of two answers that are asked about in both orders."""
        gap = CLARITY * (self.truth[a].ranking - self.truth[b].ranking)
        first = [self.rng.random() < 1 / (1 + np.exp(-(s * gap + self.first_place))) for s in (1, -1)]
        return "a" if first == [True, False] else "b" if first == [False, True] else "tie"

    def events(self, items: Sequence[Item]) -> list[FeedbackEvent]:
        """Return what annotators say of answers: two of them rate every one of a prompt, and compare all its pairs."""
        by_prompt: dict[str, list[str]] = {}
        for item in items:
            by_prompt.setdefault(item.prompt_id, []).append(item.id)
        found: list[FeedbackEvent] = []
        for names in by_prompt.values():
            chosen = self.rng.permutation(len(self.severity))[:RATERS_OF_PROMPT]
            for rater in map(int, chosen):
                who = {"annotator": f"rater-{rater:02d}", "source": "human"}
                for name in names:
                    about = {**who, "ts": START + 1000 * len(found)}
                    found.append(FeedbackEvent("ordinal", (name,), self.rate(name, rater), scale=SCALE, **about))
                for a, b in combinations(names, 2):
                    said = self.compare(a, b)
                    about = {**who, "ts": START + 1000 * len(found)}
                    about |= {"tie_origin": "position_swap"} if said == "tie" else {}
                    found.append(FeedbackEvent("pairwise", (a, b), said, **about))
        return found

    def tastes(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return both tastes for some answers, `[N]` each."""
        return {
            "ratings": np.array([self.truth[name].rating for name in names]),
            "rankings": np.array([self.truth[name].ranking for name in names]),
        }
