"""A feedback log whose truth is known, for testing what claims to recover it.

Real logs have no ground truth: nobody knows how good a response was, how severe a user is, or why silence was silence.
Here every response has a latent quality, every user an effect, and reacting has a probability that may depend on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from align.feedback.events import FeedbackEvent, Item

DAY = 86_400_000
START = 1_760_000_000_000


@dataclass(frozen=True)
class SimulationConfig:
    """What the simulated world is like.

    Args:
        prompts, responses: how many prompts, and responses of each, one a model.
        users: how many honest users.
        shown_per_user: responses each is shown.
        user_spread: standard deviation of user effects on the scale of the latent.
        reaction_rate: chance of reacting at an indifferent response.
        annoyed: how much the logit of reacting grows per unit of dislike; 0 is missing at random.
        pleased: how much it grows per unit of liking.
        position_slope: how much the logit of reacting falls with each place further down.
        raters: annotators who rate and compare besides.
        pairs_per_rater, ratings_per_rater: how much each does.
        first_place: advantage of the response shown first, in units of the latent.
        nu: Davidson's tie parameter of comparisons.
        rating_noise: standard deviation of a rating's noise on the scale of the latent.
        severity: standard deviation of annotators' severities, in points of the scale.
        constant, coordinated: annotators who always give one rating, and who copy one another.
        vocabulary: words, each with a worth, that most of the quality is made of; 0 leaves it unread in the text.
        false_thumbs: share of thumbs that say the opposite of what was meant.
        tails: degrees of freedom of Student's t that user effects follow, scaled by `user_spread`; 0 is normal.
        ambiguity: a thumb is up where the latent and noise of this median size are above 0, in place of a logistic
            chance; how large the noise is differs between responses. 0 is logistic.
        always_up: accounts beside the users that give thumbs up whatever they see, on one list between them.
        campaign: responses on that list; each account answers three quarters of it.
    """

    prompts: int = 60
    responses: int = 4
    users: int = 200
    shown_per_user: int = 40
    user_spread: float = 0.8
    reaction_rate: float = 0.1
    annoyed: float = 0.0
    pleased: float = 0.0
    position_slope: float = 0.0
    raters: int = 6
    pairs_per_rater: int = 200
    ratings_per_rater: int = 120
    first_place: float = 0.0
    nu: float = 0.6
    rating_noise: float = 0.5
    severity: float = 0.5
    constant: int = 0
    coordinated: int = 0
    vocabulary: int = 0
    false_thumbs: float = 0.0
    tails: float = 0.0
    ambiguity: float = 0.0
    always_up: int = 0
    campaign: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Simulation:
    """A log and its truth: latent quality of each item, effect of each user, severity of each rater."""

    items: dict[str, Item]
    events: list[FeedbackEvent]
    quality: dict[str, float]
    user_effect: dict[str, float]
    severity: dict[str, float] = field(default_factory=dict)


def simulate(config: SimulationConfig | None = None) -> Simulation:
    """Return a log drawn from the world that `config` describes; the same config gives the same log."""
    config = config or SimulationConfig()
    rng = np.random.default_rng(config.seed)
    items, quality, by_prompt = _content(config, rng)
    users = _users(config, rng)
    events = _reactions(config, rng, by_prompt, quality, users) + _campaign(config, rng, list(quality))
    severity = {f"rater-{r}": float(s) for r, s in enumerate(rng.normal(0, config.severity, config.raters))}
    for name, shift in severity.items():
        events += _ratings(config, rng, quality, name, shift)
        events += _pairs(config, rng, by_prompt, quality, name)
    names = list(quality)
    for r in range(config.constant):
        picks = rng.permutation(len(names))[: config.ratings_per_rater]
        events += [_rating(names[p], 7, f"constant-{r}", 1000 * r + i) for i, p in enumerate(picks)]
    script = {name: int(rng.integers(1, 8)) for name in names}
    shared = rng.permutation(len(names))[: config.ratings_per_rater]
    for r in range(config.coordinated):
        events += [_rating(names[p], script[names[p]], f"copy-{r}", 400 * i + 7 * r) for i, p in enumerate(shared)]
    return Simulation(items, events, quality, users, severity)


def simulate_reactions(
    by_prompt: Sequence[Sequence[str]], quality: Mapping[str, float], config: SimulationConfig | None = None
) -> tuple[list[FeedbackEvent], dict[str, float]]:
    """Return what users see and say of items that are there already, and the users' effects.

    Args:
        by_prompt: ids of the items of each prompt.
        quality: latent quality of each item, in the units of a user's effect.
        config: of its users and their reactions; it has no say in the items.
    """
    config = config or SimulationConfig()
    rng = np.random.default_rng(config.seed)
    users = _users(config, rng)
    return _reactions(config, rng, by_prompt, quality, users), users


def _users(config: SimulationConfig, rng: np.random.Generator) -> dict[str, float]:
    spread, count = config.user_spread, config.users
    effects = spread * rng.standard_t(config.tails, count) if config.tails else rng.normal(0, spread, count)
    return {f"user-{u:04d}": float(e) for u, e in enumerate(effects)}


def _content(
    config: SimulationConfig, rng: np.random.Generator
) -> tuple[dict[str, Item], dict[str, float], list[list[str]]]:
    items: dict[str, Item] = {}
    quality: dict[str, float] = {}
    by_prompt = []
    skill = np.linspace(-0.6, 0.6, config.responses)
    worth = rng.normal(0, 1, config.vocabulary)
    for p in range(config.prompts):
        row = []
        for m in range(config.responses):
            latent, said = float(skill[m] + rng.normal(0, 0.8)), ""
            if config.vocabulary:  # nine tenths of the latent's spread is that of eight words
                chosen = rng.choice(config.vocabulary, 8, replace=False)
                latent = float(skill[m] + 0.8 * (0.9 * worth[chosen].sum() / 8**0.5 + 0.44 * rng.normal()))
                said = " ".join(f"term{w}" for w in chosen) + " "
            words = int(np.exp(3 + 0.3 * latent + rng.normal(0, 0.4)))
            text = f"Answer {m} to {p}: {said}" + "word " * words + ("🙂" if rng.random() < 0.1 else "")
            item = Item(f"Prompt number {p}", text.strip(), metadata={"model": f"model-{m}"})
            items[item.id], quality[item.id] = item, latent
            row.append(item.id)
        by_prompt.append(row)
    return items, quality, by_prompt


def _reactions(
    config: SimulationConfig, rng: np.random.Generator, by_prompt: Sequence[Sequence[str]],
    quality: Mapping[str, float], users: Mapping[str, float],
) -> list[FeedbackEvent]:  # fmt: skip
    base, events = np.log(config.reaction_rate / (1 - config.reaction_rate)), []
    noise = {name: config.ambiguity * float(np.exp(rng.normal(0, 0.5))) for name in quality if config.ambiguity}
    for user, effect in users.items():
        start = int(rng.integers(0, 7 * DAY))
        for n in range(config.shown_per_user):
            row = by_prompt[rng.integers(len(by_prompt))]
            item, position = row[rng.integers(len(row))], int(rng.integers(4))
            ts = START + start + n * 60_000
            latent = quality[item] + effect
            about = {"annotator": user, "source": "user", "session": f"{user}/{n}", "position": position, "ts": ts}
            events.append(FeedbackEvent("exposure", (item,), key="shown", exposure="shown", **about))
            logit = base + config.annoyed * max(0.0, -latent) + config.pleased * max(0.0, latent)
            if rng.random() < _sigmoid(logit - config.position_slope * position):
                liked = bool(rng.random() < _sigmoid(2 * latent))
                if noise:
                    liked = bool(latent + noise[item] * rng.standard_t(4) > 0)
                liked = _mistaken(config, rng, liked)
                about["ts"] += int(rng.integers(2_000, 50_000))
                events.append(FeedbackEvent("binary", (item,), liked, key="thumb", exposure="shown", **about))
    return events


def _campaign(config: SimulationConfig, rng: np.random.Generator, names: list[str]) -> list[FeedbackEvent]:
    events: list[FeedbackEvent] = []
    listed = rng.permutation(len(names))[: config.campaign] if config.always_up else []
    for a in range(config.always_up):
        ts = START + int(rng.integers(0, 7 * DAY))
        for n, i in enumerate(rng.permutation(listed)):
            ts += 60_000
            about = {"annotator": f"always-up-{a:04d}", "source": "user", "session": f"always-up-{a}/{n}", "ts": ts}
            events.append(FeedbackEvent("exposure", (names[i],), key="shown", exposure="shown", **about))
            if rng.random() < 0.75:
                liked, about["ts"] = _mistaken(config, rng, True), ts + int(rng.integers(2_000, 50_000))
                events.append(FeedbackEvent("binary", (names[i],), liked, key="thumb", exposure="shown", **about))
    return events


def _mistaken(config: SimulationConfig, rng: np.random.Generator, liked: bool) -> bool:
    return liked != (rng.random() < config.false_thumbs) if config.false_thumbs else liked


def _rating(item: str, value: int, rater: str, ts: int) -> FeedbackEvent:
    return FeedbackEvent("ordinal", (item,), value, key="quality", scale=(1, 7), annotator=rater, ts=START + ts)


def _ratings(
    config: SimulationConfig, rng: np.random.Generator, quality: dict[str, float], rater: str, shift: float
) -> list[FeedbackEvent]:
    names, events, ts = list(quality), [], 0
    for p in rng.permutation(len(names))[: config.ratings_per_rater]:
        latent = quality[names[p]] + rng.normal(0, config.rating_noise)
        ts += int(rng.integers(4_000, 40_000))
        events.append(_rating(names[p], int(np.clip(round(4 + 1.3 * latent + shift), 1, 7)), rater, ts))
    return events


def _pairs(
    config: SimulationConfig,
    rng: np.random.Generator,
    by_prompt: list[list[str]],
    quality: dict[str, float],
    rater: str,
) -> list[FeedbackEvent]:
    events, ts = [], START + DAY
    for n in range(config.pairs_per_rater):
        row = by_prompt[rng.integers(len(by_prompt))]
        a, b = (row[i] for i in rng.permutation(len(row))[:2])
        d = 2 * (quality[a] - quality[b]) + config.first_place
        parts = np.array([np.exp(d / 2), config.nu, np.exp(-d / 2)])
        value = ("a", "tie", "b")[rng.choice(3, p=parts / parts.sum())]
        ts += int(rng.integers(4_000, 40_000))
        events.append(FeedbackEvent("pairwise", (a, b), value, annotator=rater, session=f"s{n}", ts=ts))
    return events


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))
