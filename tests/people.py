"""A small world of texts whose quality is known: what people say of them through each protocol."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from align.feedback.events import FeedbackEvent, Item

GOOD, BAD, PLAIN = ("clear", "exact", "kind", "short"), ("vague", "wrong", "rude", "long"), ("the", "of", "it", "as")
START = 1_760_000_000_000


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def world(prompts: int = 60, each: int = 4, seed: int = 0) -> tuple[list[Item], np.ndarray]:
    """Items, `each` of a prompt, and their quality: what their good words weigh less what their bad ones do."""
    rng = np.random.default_rng(seed)
    value = {
        **dict(zip(GOOD, (1.0, 0.8, 0.6, 0.4), strict=True)),
        **dict(zip(BAD, (-1.0, -0.8, -0.6, -0.4), strict=True)),
    }
    items, quality = [], []
    for p in range(prompts):
        for r in range(each):
            words = [*rng.choice([*GOOD, *BAD], rng.integers(1, 5), replace=False), *rng.choice(PLAIN, 4), f"w{p}x{r}"]
            items.append(Item(f"question {p}", " ".join(words), metadata={"model": f"m{r}"}))
            quality.append(sum(value.get(w, 0.0) for w in words))
    return items, np.array(quality)


def thumbs(items, quality, *, users: int = 40, shown: int = 60, base: float = -0.5, spread: float = 0.0,
           slope: float = 1.5, seed: int = 1, reaction: str = "") -> list[FeedbackEvent]:  # fmt: skip
    """Every user is shown some items; with `reaction` they react or are silent, else they thumb up or down."""
    rng = np.random.default_rng(seed)
    events = []
    for u in range(users):
        effect = rng.normal(0, spread) if spread else 0.0
        for n, i in enumerate(rng.permutation(len(items))[:shown]):
            about = {
                "annotator": f"user{u:03d}",
                "source": "user",
                "session": f"s{n}",
                "ts": START + (u * shown + n) * 1000,
            }
            up = bool(rng.random() < sigmoid(slope * quality[i] + base + effect))
            events.append(FeedbackEvent("exposure", (items[i].id,), key="shown", exposure="shown", **about))
            if reaction:
                if up:
                    events.append(
                        FeedbackEvent("reaction", (items[i].id,), reaction, key=reaction, exposure="shown", **about)
                    )
            else:
                events.append(FeedbackEvent("binary", (items[i].id,), up, key="thumb", exposure="shown", **about))
    return events


def ratings(items, quality, *, raters: int = 6, seed: int = 2) -> list[FeedbackEvent]:
    """Every rater rates half of the items from 1 to 5."""
    rng = np.random.default_rng(seed)
    events = []
    for r in range(raters):
        for i in rng.permutation(len(items))[: len(items) // 2]:
            at = quality[i] + rng.logistic(0, 0.5)
            events.append(FeedbackEvent(
                "ordinal", (items[i].id,), 1 + int(np.sum(at > np.array([-1.5, -0.5, 0.5, 1.5]))), scale=(1, 5),
                annotator=f"rater{r}", ts=START + len(events),
            ))  # fmt: skip
    return events


def pairs(items, quality, *, count: int = 600, each: int = 4, seed: int = 3, tie: float = 0.0) -> list[FeedbackEvent]:
    """Comparisons within prompts; differences below `tie` are ties."""
    rng = np.random.default_rng(seed)
    events = []
    for n in range(count):
        p = int(rng.integers(len(items) // each)) * each
        a, b = p + rng.permutation(each)[:2]
        d = 2 * (quality[a] - quality[b])
        value = "tie" if abs(d) < tie else "a" if rng.random() < sigmoid(d) else "b"
        events.append(
            FeedbackEvent(
                "pairwise", (items[a].id, items[b].id), value, annotator=f"judge{n % 5}", session=f"{n}", ts=START + n
            )
        )
    return events


def rankings(items, quality, *, each: int = 4, seed: int = 4) -> list[FeedbackEvent]:
    """One ranking of each prompt's items."""
    rng = np.random.default_rng(seed)
    events = []
    for p in range(0, len(items), each):
        noisy = 2 * quality[p : p + each] + rng.gumbel(size=each)
        ranks = [int(1 + (noisy > x).sum()) for x in noisy]
        events.append(
            FeedbackEvent(
                "ranking", tuple(i.id for i in items[p : p + each]), ranks, annotator=f"judge{p % 3}", ts=START + p
            )
        )
    return events


def accounted(card: dict) -> int:
    """Return of how many rows a card of a fit says what became of them."""
    held = sum(card["split"][part]["rows"] for part in ("calibration", "heldout"))
    return sum(card["left_out"].values()) + card["trained_on"] + held


def write_rows(path: Path, rows) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
