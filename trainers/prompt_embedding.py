"""Prompts as vectors, for matching their distributions: bags of hashed words, or a model's mean hidden states."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from align.errors import ModelError
from trainers.language_model import quiet, resolve_language_model

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
    return _unit(np.array(rows).reshape(-1, dimensions))


def embed_with_model(texts: Sequence[str], folder: str | Path, *, batch: int = 32) -> np.ndarray:
    """Return the mean last hidden state of each text, `[N, H]`, of unit length.

    Args:
        texts: cut to what the model reads, 512 tokens at most.
        folder: of a transformers model, an encoder or a decoder, with its tokenizer; or `tiny`.
        batch: texts at once; those of like length go together.

    Raises:
        ModelError: not such a folder.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    if folder != "tiny" and not (Path(folder) / "config.json").is_file():
        raise ModelError(
            "This is no folder of a transformers model", where=str(folder), why="it has no config.json",
            do="Give a folder that save_pretrained wrote, or leave --model out for bags of words",
        )  # fmt: skip
    path = resolve_language_model(str(folder))
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a decoder's output layer is not needed, which is no news
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        raise ModelError("A model that is to embed prompts cannot be loaded", where=str(folder), why=why) from error
    finally:
        logging.set_verbosity(level)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model.to(device)
    longest = min(512, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    tokens = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            width = max(1, *(len(tokens[i]) for i in part))
            ids, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width)
            for row, i in enumerate(part):
                ids[row, : len(tokens[i])], mask[row, : len(tokens[i])] = torch.tensor(tokens[i]).long(), 1
            hidden = model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state.cpu()
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            found.update(zip(part, mean.double().numpy(), strict=True))
    return _unit(np.stack([found[i] for i in range(len(tokens))]))


def _unit(features: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)
