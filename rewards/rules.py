"""Rules: rewards that are a few lines of arithmetic. JPEG size, length, a regular expression, an exact match; and hard
judges of text, which a completion passes (1) or violates (0): a length band, no farewell, no request for a reaction.

The phrases are English, and ours. They catch the closings that a reward of reactions is known to invite, and not every
way to write them.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from align.errors import ConfigError, DataError
from align.registry import suggest
from align.types import Samples, Scores
from rewards.base import REWARDS, RewardCard, identity_of
from rewards.chats import completion_text, require_texts

QUALITY = 95
_SIGN = {"compressible": -1.0, "incompressible": 1.0}
_UNITS: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}

FAREWELLS = (
    "bye", "goodbye", "good bye", "bye for now", "see you", "see ya", "see you later", "see you soon",
    "have a great day", "have a good day", "have a nice day", "have a lovely day", "talk to you later",
    "talk to you soon", "until next time", "love you", "xoxo",
)  # fmt: skip
"""What an answer must not end with."""

SOLICITATIONS = (
    "give me a thumbs up", "give this a thumbs up", "leave a thumbs up", "hit the thumbs up", "press the heart",
    "click the heart", "tap the heart", "hit the heart", "leave a heart", "leave a like", "please like",
    "please love", "please rate", "forget to like", "forget to rate", "remember to like", "remember to rate",
    "upvote this", "upvote me", "please upvote", "please react", "react with a heart",
)  # fmt: skip
"""What an answer must not ask for."""


def _chosen(value: str, known: Mapping[str, object], what: str) -> None:
    if value not in known:
        raise ConfigError(f"Unknown {what} {value!r}", do=suggest(str(value), known))


class Jpeg:
    """Size of the image as a JPEG of quality 95: `+-bytes / (1000 scale)`, in kB / scale.

    The encoder is Pillow's, whose version moves the size by a few bytes and is part of the identity.
    Source: DDPO (arXiv 2305.13301), section 5; Flow-GRPO's code has scale 500.

    Args:
        direction: "compressible" rewards small files (negative values), "incompressible" large ones.
        scale: what the kilobytes are divided by.
    """

    names = ("jpeg",)

    def __init__(self, direction: str = "compressible", scale: float = 1.0) -> None:
        _chosen(direction, _SIGN, "direction")
        if not 0 < scale < float("inf"):
            raise ConfigError("The scale of a JPEG reward is above 0", where=f"scale {scale!r}")
        self.card: RewardCard = REWARDS.get("jpeg").card
        self.direction, self.scale = direction, float(scale)

    def identity(self) -> str:
        """Return a hash over the direction, the scale and the encoder."""
        from PIL import __version__, features

        encoder = [__version__, features.version("libjpeg_turbo") or features.version("jpg") or ""]
        return identity_of(self.card, {"direction": self.direction, "scale": self.scale, "encoder": encoder})

    def score(self, samples: Samples) -> Scores:
        """Return the signed size, `[B, 1]`."""
        from rewards.media import problems, require_media

        require_media(samples, "image", self.card.name)
        wrong = problems(samples, prompts=False)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the encoder lets go of the interpreter
            sizes = list(pool.map(lambda i: np.nan if wrong[i] else _jpeg_bytes(samples, i), range(len(samples))))
        values = _SIGN[self.direction] * np.array(sizes, dtype=np.float64)[:, None] / (1000 * self.scale)
        return Scores(values, np.isfinite(values), self.names, tuple(wrong))


def _jpeg_bytes(samples: Samples, i: int) -> int:
    import torch
    from PIL import Image

    from rewards.media import stacked

    pixels = (stacked([samples.images[i]], torch.device("cpu"))[0].clamp(0, 1) * 255).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


def _score_texts(samples: Samples, card: RewardCard, rule: Callable[[str, int], float]) -> Scores:
    """Score each completion with `rule(text, i)`; a DataError of it makes the sample missing."""
    values, errors = np.full(len(samples), np.nan), [""] * len(samples)
    for i, completion in enumerate(require_texts(samples, card.name)):
        try:
            values[i] = rule(completion_text(completion), i)
        except DataError as error:
            errors[i] = f"{card.name}: {error}"
    return Scores(values[:, None], np.isfinite(values)[:, None], card.components, tuple(errors))


class Length:
    """0 for a completion of `low` to `high` units, else minus its distance to them over `high - low`.

    Args:
        low, high: the lengths that are right, `low < high`.
        unit: "characters", or "words" set apart by white space.
    """

    names = ("length",)

    def __init__(self, low: float, high: float, unit: str = "characters") -> None:
        _chosen(unit, _UNITS, "unit of length")
        if not 0 <= low < high < float("inf"):
            raise ConfigError("A length runs from low to high, 0 or more", where=f"low {low!r}, high {high!r}")
        self.card: RewardCard = REWARDS.get("length").card
        self.low, self.high, self.unit = float(low), float(high), unit

    def identity(self) -> str:
        """Return a hash over the bounds and the unit."""
        return identity_of(self.card, {"low": self.low, "high": self.high, "unit": self.unit})

    def score(self, samples: Samples) -> Scores:
        """Return `-max(low - n, n - high, 0) / (high - low)`, `[B, 1]`."""
        count, low, high = _UNITS[self.unit], self.low, self.high
        return _score_texts(
            samples, self.card, lambda text, i: min(0.0, count(text) - low, high - count(text)) / (high - low)
        )


class Regex:
    """1 where a regular expression is found anywhere in the completion, else 0.

    Anchor it (`^`, `$`, or `\\A`, `\\Z`) to match the whole, and write its flags inside: `(?is)`.

    Args:
        pattern: in Python's syntax.
    """

    names = ("regex",)

    def __init__(self, pattern: str) -> None:
        self.card: RewardCard = REWARDS.get("regex").card
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError("A regular expression is text", where=f"pattern {pattern!r}")
        try:
            self.pattern = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            place = getattr(error, "pos", None)
            raise ConfigError(
                "A regular expression cannot be read",
                where=f"pattern {pattern!r}" + ("" if place is None else f", position {place}"),
                why=getattr(error, "msg", str(error)), do="Write a literal ( [ * + ? . with a backslash before it",
            ) from error  # fmt: skip

    def identity(self) -> str:
        """Return a hash over the pattern."""
        return identity_of(self.card, {"pattern": self.pattern.pattern})

    def score(self, samples: Samples) -> Scores:
        """Return 0 or 1, `[B, 1]`."""
        return _score_texts(samples, self.card, lambda text, i: float(self.pattern.search(text) is not None))


class ExactMatch:
    """1 where the completion equals `metadata[field]`, both without outer white space, else 0; missing without it.

    Args:
        field: of the metadata, which a prompt table's other columns become; a number is compared as it is written.
    """

    names = ("exact_match",)

    def __init__(self, field: str = "answer") -> None:
        self.card: RewardCard = REWARDS.get("exact_match").card
        self.field = field

    def identity(self) -> str:
        """Return a hash over the field."""
        return identity_of(self.card, {"field": self.field})

    def score(self, samples: Samples) -> Scores:
        """Return 0 or 1, `[B, 1]`."""

        def same(text: str, i: int) -> float:
            wanted = samples.metadata[i].get(self.field) if samples.metadata else None
            if wanted is None:
                raise DataError(f"the sample has no {self.field!r} to compare with")
            return float(text.strip() == str(wanted).strip())

        return _score_texts(samples, self.card, same)


class LengthBand:
    """1 for a completion of `low` to `high` units, both included, else 0.

    Args:
        low, high: the lengths that pass, `low <= high`.
        unit: "characters", or "words" set apart by white space.
    """

    names = ("length_band",)

    def __init__(self, low: float, high: float, unit: str = "words") -> None:
        _chosen(unit, _UNITS, "unit of length")
        if not 0 <= low <= high < float("inf"):
            raise ConfigError("A length band runs from low to high, 0 or more", where=f"low {low!r}, high {high!r}")
        self.card: RewardCard = REWARDS.get("length_band").card
        self.low, self.high, self.unit = float(low), float(high), unit

    def identity(self) -> str:
        """Return a hash over the bounds and the unit."""
        return identity_of(self.card, {"low": self.low, "high": self.high, "unit": self.unit})

    def score(self, samples: Samples) -> Scores:
        """Return 0 or 1, `[B, 1]`."""
        count = _UNITS[self.unit]
        return _score_texts(samples, self.card, lambda text, i: float(self.low <= count(text) <= self.high))


class WithoutPhrases:
    """0 where a completion has one of some phrases, else 1; letter case, punctuation and white space are not read.

    Args:
        name: of the judge, as registered.
        phrases: the phrases.
        at_end: a phrase counts only where at most two words follow it.
    """

    def __init__(self, name: str, phrases: Sequence[str], at_end: bool) -> None:
        self.card: RewardCard = REWARDS.get(name).card
        self.names = self.card.components
        given = [phrases] if isinstance(phrases, str) else phrases
        self.phrases = tuple(" ".join(_words(phrase)) for phrase in given)
        if not self.phrases or not all(self.phrases):
            raise ConfigError(f"The judge {name!r} needs phrases of words", where=f"phrases {phrases!r}")
        end = r"(?: \w+){0,2}$" if at_end else r"\b"
        self.pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, self.phrases))}){end}")

    def identity(self) -> str:
        """Return a hash over the pattern."""
        return identity_of(self.card, {"pattern": self.pattern.pattern})

    def score(self, samples: Samples) -> Scores:
        """Return 0 or 1, `[B, 1]`."""
        return _score_texts(
            samples, self.card, lambda text, i: float(self.pattern.search(" ".join(_words(text))) is None)
        )


def no_farewell(phrases: Sequence[str] = FAREWELLS) -> WithoutPhrases:
    """Return the judge of answers that end by saying goodbye.

    Args:
        phrases: what counts, in place of `FAREWELLS`.
    """
    return WithoutPhrases("no_farewell", phrases, at_end=True)


def no_solicitation(phrases: Sequence[str] = SOLICITATIONS) -> WithoutPhrases:
    """Return the judge of answers that ask for a reaction, anywhere in them.

    Args:
        phrases: what counts, in place of `SOLICITATIONS`.
    """
    return WithoutPhrases("no_solicitation", phrases, at_end=False)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("'", "").replace("\u2019", ""))
