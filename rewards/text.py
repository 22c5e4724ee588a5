"""Text rewards from sequence classifiers: a reward model (one logit), and safety (1 - P(unsafe))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.errors import ConfigError
from align.registry import suggest
from align.types import Samples, Scores
from rewards.base import REWARDS, RewardCard
from rewards.classifier import Classifier

ACTIVATIONS = ("sigmoid", "softmax")


class RewardModel:
    """The one logit of a sequence classifier on the conversation: a Bradley-Terry score, known up to a constant.

    A sample whose beginning did not fit into `max_length` tokens is scored by its end, and flagged in the extra
    `truncated`.

    Args:
        path, template, max_length, placement, dtype, batch_size: see `Classifier`.
        component: the name of its scores, to tell several reward models apart.
    """

    def __init__(
        self, path: str, template: str = "chat", max_length: int | None = None, placement: str = "resident",
        dtype: str = "fp32", batch_size: int | None = None, component: str = "reward_model",
    ) -> None:  # fmt: skip
        self.card: RewardCard = REWARDS.get("text/reward_model").card
        self.names = (component,)
        self.classifier = Classifier(path, template, max_length, placement, dtype, batch_size, labels=1)

    def identity(self) -> str:
        """Return a hash over the folder's files and how it is asked."""
        return self.classifier.identity(self.card, {})

    def score(self, samples: Samples) -> Scores:
        """Return the logit, `[B, 1]`."""
        values, wrong, truncated = self.classifier.logits(samples, self.card.name)
        return Scores(values, np.isfinite(values), self.names, tuple(wrong), {"truncated": truncated})


class Safety:
    """`1 - P(unsafe)` of a classifier with some labels that mean unsafe.

    With a softmax, one label applies and P(unsafe) is the sum over the unsafe ones. With a sigmoid, labels apply
    independently of one another and P(unsafe) is the largest of theirs. The extras `p/<label>` hold each.

    Args:
        path, template, max_length, placement, dtype, batch_size: see `Classifier`.
        unsafe: the labels that mean unsafe, by name or number; the others mean safe.
        activation: "sigmoid" or "softmax"; None takes what the folder's `problem_type` says, and without one what
            transformers does: a sigmoid for one label, a softmax for several.
        component: the name of its scores.

    Raises:
        ConfigError: no unsafe label, or one that the classifier does not have.
    """

    def __init__(
        self, path: str, unsafe: Sequence[str | int] | str | int, template: str = "chat", max_length: int | None = None,
        placement: str = "resident", dtype: str = "fp32", batch_size: int | None = None,
        activation: str | None = None, component: str = "safety",
    ) -> None:  # fmt: skip
        if activation is not None and activation not in ACTIVATIONS:
            raise ConfigError(f"Unknown activation {activation!r}", do=suggest(str(activation), ACTIVATIONS))
        self.card: RewardCard = REWARDS.get("text/safety").card
        self.names = (component,)
        self.classifier = Classifier(path, template, max_length, placement, dtype, batch_size)
        config = self.classifier.config
        labels = {str(name): i for i, name in config.id2label.items()}
        wanted: list[Any] = [unsafe] if isinstance(unsafe, (str, int)) else list(unsafe)
        for label in wanted:
            if label not in labels and label not in labels.values():
                raise ConfigError(f"The classifier has no label {label!r}", where=path, do=suggest(str(label), labels))
        self.unsafe = sorted({int(labels.get(str(label), label)) for label in wanted})
        single = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        self.activation = activation or ("sigmoid" if single else "softmax")
        if not self.unsafe or (self.activation == "softmax" and len(self.unsafe) == config.num_labels):
            raise ConfigError(
                "Safety needs some labels that mean unsafe, and a softmax some that do not", where=path,
                why=f"unsafe {wanted}", do=f"Choose among {', '.join(labels)}",
            )  # fmt: skip

    def identity(self) -> str:
        """Return a hash over the folder's files, how it is asked, and what is unsafe."""
        return self.classifier.identity(self.card, {"unsafe": self.unsafe, "activation": self.activation})

    def score(self, samples: Samples) -> Scores:
        """Return `1 - P(unsafe)`, `[B, 1]`."""
        logits, wrong, truncated = self.classifier.logits(samples, self.card.name)
        if self.activation == "sigmoid":
            p = 0.5 + 0.5 * np.tanh(logits / 2)
            unsafe = p[:, self.unsafe].max(1, keepdims=True)
        else:
            odds = np.exp(logits - logits.max(1, keepdims=True))
            p = odds / odds.sum(1, keepdims=True)
            unsafe = p[:, self.unsafe].sum(1, keepdims=True)
        names = self.classifier.config.id2label
        extras = {f"p/{names[i]}": p[:, i] for i in self.unsafe}
        return Scores(1 - unsafe, np.isfinite(unsafe), self.names, tuple(wrong), {"truncated": truncated, **extras})
