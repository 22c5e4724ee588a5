"""Prompts as vectors, for matching their distributions: bags of hashed words, or a model's mean hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.wordbags import WORDS, embed_words
from rewards.embeddings import HiddenStates
from trainers.language_model import quiet, resolve_language_model

__all__ = ["WORDS", "embed_with_model", "embed_words"]


def embed_with_model(texts: Sequence[str], folder: str | Path, *, batch: int = 32) -> np.ndarray:
    """Return the mean last hidden state of each text, `[N, H]`, of unit length.

    Args:
        texts: cut to what the model reads, 512 tokens at most.
        folder: of a transformers model, an encoder or a decoder, with its tokenizer; or `tiny`.
        batch: texts at once; those of like length go together.

    Raises:
        ModelError: not such a folder.
    """
    with quiet():
        return HiddenStates(resolve_language_model(str(folder))).embed_texts(texts, batch=batch)
