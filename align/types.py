"""Values that cross the borders between rooms: small frozen dataclasses, axes in their names.

Axis letters: B batch, P prompt, G group member, S solver step, K reward component, F frame,
C channel, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Video:
    """Frames `[F, C, H, W]` with pixels in [0, 1], and the true frame rate in frames a second.

    A frame rate is never guessed: what a container claims and what a model generates differ, and a video reward
    that is told the wrong one scores another video.
    """

    frames: torch.Tensor
    fps: float

    def __post_init__(self) -> None:
        if getattr(self.frames, "ndim", 0) != 4 or not len(self.frames):
            raise DataError("A video needs frames [F, C, H, W]", why=f"got {tuple(getattr(self.frames, 'shape', ()))}")
        if not isinstance(self.fps, (int, float)) or not 0 < self.fps < float("inf"):
            raise DataError("A video needs its frame rate", why=f"got {self.fps!r}", do="Give Video(frames, fps=24.0)")

    def spread(self, count: int) -> torch.Tensor:
        """Return up to `count` frames `[N, C, H, W]`, evenly spread from the first to the last; of one, the first."""
        last, kept = len(self.frames) - 1, min(count, len(self.frames))
        return self.frames[[round(i * last / max(1, kept - 1)) for i in range(kept)]]


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt and the image file that its video starts from."""

    text: str
    image: Path

    def __str__(self) -> str:
        return f"{self.text} ({self.image})"


Prompt = str | ImagePrompt
"""What a visual model is asked for."""


def text_of(prompt: Prompt) -> str:
    """Return the words of a prompt."""
    return prompt if isinstance(prompt, str) else prompt.text


MEDIA = ("images", "videos", "texts")


@dataclass(frozen=True)
class Samples:
    """What a model produced, and for which prompt: the input of every reward.

    Exactly one of `images`, `videos` and `texts` is given. Pixels are floats in [0, 1].

    Args:
        prompts: the B prompts.
        images: `[B, C, H, W]`, or B tensors `[C, H, W]` of any sizes.
        videos: B videos, each with its own frame rate.
        texts: B completions: text, or a chat as a list of `{"role": ..., "content": ...}` turns.
        metadata: B mappings carried along from the prompt file.
    """

    prompts: Sequence[str]
    images: torch.Tensor | Sequence[torch.Tensor] | None = None
    videos: Sequence[Video] | None = None
    texts: Sequence[str | Sequence[Mapping[str, str]]] | None = None
    metadata: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        given = [n for n in MEDIA if getattr(self, n) is not None]
        if len(given) != 1:
            raise DataError(
                "Samples hold exactly one kind of output",
                why=f"got {', '.join(given) or 'none'}",
                do="Give one of images=, videos= or texts=",
            )
        for name, count in ((given[0], len(getattr(self, given[0]))), ("metadata", len(self.metadata))):
            if count != len(self.prompts) and not (name == "metadata" and count == 0):
                raise DataError(
                    "Samples disagree in length",
                    why=f"{len(self.prompts)} prompts but {count} {name}",
                )
        if self.videos is not None and not all(isinstance(video, Video) for video in self.videos):
            raise DataError("A video needs its frame rate", do="Give Samples(videos=[Video(frames, fps=24.0), ...])")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def media(self) -> str:
        """What was produced: "images", "videos" or "texts"."""
        return next(name for name in MEDIA if getattr(self, name) is not None)

    def select(self, indices: Sequence[int]) -> Samples:
        """Return the samples at `indices`, in that order."""
        index = [int(i) for i in indices]

        def pick(rows: Any) -> Any:
            return rows[index] if hasattr(rows, "ndim") else None if rows is None else [rows[i] for i in index]

        return Samples(
            prompts=[self.prompts[i] for i in index],
            images=pick(self.images),
            videos=pick(self.videos),
            texts=pick(self.texts),
            metadata=[self.metadata[i] for i in index] if self.metadata else (),
        )


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Put samples of one kind one after another."""
    import torch

    kind = parts[0].media
    rows = [getattr(part, kind) for part in parts]
    whole = torch.cat(rows) if all(hasattr(r, "ndim") for r in rows) else [row for part in rows for row in part]
    return Samples(
        prompts=[p for part in parts for p in part.prompts],
        metadata=[m for part in parts for m in part.metadata],
        **{kind: whole},
    )


@dataclass(frozen=True)
class Scores:
    """What a reward says of B samples. A score that could not be computed is missing, never 0.

    Args:
        values: float64 `[B, K]`; NaN wherever `valid` is False.
        valid: bool `[B, K]`.
        names: the K component names.
        errors: one message per sample, empty when nothing failed; it names the component that did.
        extras: anything else worth logging, by name; what has one value a sample follows its sample.
    """

    values: np.ndarray
    valid: np.ndarray
    names: tuple[str, ...]
    errors: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import numpy as np

        values = np.asarray(self.values, dtype=np.float64)
        valid = np.asarray(self.valid, dtype=bool)
        if values.ndim != 2 or values.shape != valid.shape or values.shape[1] != len(self.names):
            raise DataError(
                "Scores need values and valid of one shape [B, K]",
                why=f"got values {values.shape}, valid {valid.shape}, {len(self.names)} names",
            )
        if self.errors and len(self.errors) != len(values):
            raise DataError("Scores need one error message per sample", why=f"got {len(self.errors)} for {len(values)}")
        valid = valid & np.isfinite(values)
        object.__setattr__(self, "values", np.where(valid, values, np.nan))
        object.__setattr__(self, "valid", valid)
        object.__setattr__(self, "errors", tuple(self.errors) or ("",) * len(values))

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> np.ndarray:
        """Return component `name` as float64 `[B]`, NaN where missing."""
        if name not in self.names:
            raise DataError(f"No component {name!r} in these scores", why=f"they hold {', '.join(self.names)}")
        return self.values[:, self.names.index(name)]


def stack_scores(parts: Sequence[Scores]) -> Scores:
    """Put the scores of parts of a batch one below the other, `[sum B, K]`, with extras of one value a sample."""
    import numpy as np

    if len(parts) == 1:
        return parts[0]
    parts = [p for p in parts if len(p)] or parts[:1]  # a process may hold no sample
    return Scores(
        values=np.concatenate([p.values for p in parts]),
        valid=np.concatenate([p.valid for p in parts]),
        names=parts[0].names,
        errors=tuple(message for p in parts for message in p.errors),
        extras={
            name: np.concatenate([np.asarray(p.extras[name]) for p in parts])
            for name in parts[0].extras
            if all(np.shape(p.extras.get(name)) == (len(p),) for p in parts)
        },
    )


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Put the components of several rewards on the same B samples side by side, `[B, sum K]`."""
    import numpy as np

    if len({len(part) for part in parts}) != 1:
        raise DataError("Scores of different samples cannot be joined", why=f"lengths {[len(p) for p in parts]}")
    return Scores(
        values=np.concatenate([p.values for p in parts], axis=1),
        valid=np.concatenate([p.valid for p in parts], axis=1),
        names=tuple(name for p in parts for name in p.names),
        errors=tuple("; ".join(filter(None, row)) for row in zip(*(p.errors for p in parts), strict=True)),
        extras={key: value for p in parts for key, value in p.extras.items()},
    )


@dataclass(frozen=True)
class Advantages:
    """Advantages of P groups of G members, `[P, G]`, with what was dropped and why.

    `values` is 0 wherever `kept` is False: a dropped member moves nothing. `unselected` counts the members
    that best-of-N left out.
    """

    values: np.ndarray
    kept: np.ndarray
    zero_std_groups: int = 0
    invalid_members: int = 0
    dropped_groups: int = 0
    unselected: int = 0


@dataclass
class StepStats:
    """Sums over the trained (sample, solver step) terms of one training step; `mean(name)` divides by `count`.

    `first_ratio_error` is max |ratio - 1| over the terms replayed before the first update, and
    `first_ratio_scaled` the error its guard looks at.
    """

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    first_ratio_error: float = 0.0
    first_ratio_scaled: float = 0.0

    def add(
        self, count: int, *, sums: Mapping[str, float] = {}, extremes: Mapping[str, tuple[float, float]] = {}
    ) -> None:
        """Add `count` terms: their sums, and the (min, max) of each quantity in `extremes`."""
        self.count += count
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, (low, high) in extremes.items():
            self.minima[name] = min(self.minima.get(name, low), low)
            self.maxima[name] = max(self.maxima.get(name, high), high)

    def mean(self, name: str) -> float:
        """Return the mean of `name` over the terms seen so far, NaN when there were none."""
        return self.sums[name] / self.count if self.count and name in self.sums else float("nan")


def merge_stats(parts: Sequence[StepStats]) -> StepStats:
    """Add up the statistics of one step over processes."""
    whole = StepStats()
    for part in parts:
        whole.add(part.count, sums=part.sums)
        for name, value in part.minima.items():
            whole.minima[name] = min(whole.minima.get(name, value), value)
        for name, value in part.maxima.items():
            whole.maxima[name] = max(whole.maxima.get(name, value), value)
        whole.first_ratio_error = max_or_nan(whole.first_ratio_error, part.first_ratio_error)
        whole.first_ratio_scaled = max_or_nan(whole.first_ratio_scaled, part.first_ratio_scaled)
    return whole


def max_or_nan(a: float, b: float) -> float:
    """Return the larger number, NaN when one of them is: `max` would drop it."""
    return a if a != a else b if b != b else max(a, b)
