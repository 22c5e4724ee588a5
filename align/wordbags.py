"""Texts as vectors without a model: bags of hashed words."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

WORDS = 512
"""Dimensions of a bag of words."""


def embed_words(texts: Iterable[str], dimensions: int = WORDS) -> np.ndarray:
    """Return a bag of hashed words for each text, `[N, D]`, of unit length: the same on every machine, for any order.

        x_d = sum over words with hash d of sign(word) (1 + log count(word)),   then  x / |x|

    Words are runs of letters and digits, without case. A text without any is 0.

    Source: Weinberger et al. (2009), feature hashing with signs.
    """
    known: dict[str, tuple[int, float]] = {}
    rows = []
    for text in texts:
        row = np.zeros(dimensions)
        for word, count in Counter(re.findall(r"\w+", text.casefold())).items():
            if word not in known:
                number = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")
                known[word] = (number // 2 % dimensions, 1.0 if number % 2 else -1.0)
            place, sign = known[word]
            row[place] += sign * (1 + np.log(count))
        rows.append(row)
    return unit_rows(np.array(rows).reshape(-1, dimensions))


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Return rows scaled to unit length; a row of zeros stays one."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)
