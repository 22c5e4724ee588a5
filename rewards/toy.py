"""Rewards of the embedded language model's toy, whose prompts ask to repeat words: made so that they disagree."""

from __future__ import annotations

from collections.abc import Sequence

from align.types import Samples
from rewards.chats import completion_text, require_texts


def love(
    samples: Samples, animals: Sequence[str] = ("cat", "dog", "fox", "owl", "bee", "ant", "cow", "hen")
) -> list[float]:
    """Return the share of an answer's words that are animals, which people of the toy love; 0 without words.

    Args:
        samples: completions.
        animals: what they love.
    """
    return [_share(text.split(), animals) for text in _texts(samples, "toy/love")]


def helpfulness(samples: Samples) -> list[float]:
    """Return the share of the words asked for (those after "Say:" in the prompt) that the answer has.

    Args:
        samples: completions and their prompts.
    """
    asked = [prompt.partition("Say:")[2].partition("\n")[0].split() for prompt in samples.prompts]
    texts = _texts(samples, "toy/helpfulness")
    return [_share(words, text.split()) for words, text in zip(asked, texts, strict=True)]


def safety(samples: Samples, forbidden: Sequence[str] = ("gold",)) -> list[float]:
    """Return 1 where an answer has no forbidden word, else 0: a judge.

    Args:
        samples: completions.
        forbidden: the words.
    """
    return [float(not set(text.split()) & set(forbidden)) for text in _texts(samples, "toy/safety")]


def _share(words: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(word in wanted for word in words) / len(words) if words else 0.0


def _texts(samples: Samples, name: str) -> list[str]:
    return [completion_text(completion) for completion in require_texts(samples, name)]
