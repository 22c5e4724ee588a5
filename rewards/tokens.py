"""Tokenizers: from a folder or the hub, and a hash of all they do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from align.errors import ModelError, first_line
from align.weights import require_inert

_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")


def tokenizer_source(asked: str | None, folder: Path, published: str) -> str:
    """Return where a tokenizer comes from: as asked, else the folder of the weights if it holds one, else the hub."""
    if asked is not None:
        return asked
    return str(folder) if any((folder / name).is_file() for name in _FILES) else published


def load_tokenizer(source: str, kind: str = "AutoTokenizer") -> Any:
    """Return the transformers tokenizer of a folder or a hub repository.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    import transformers

    require_inert(source)
    try:
        return getattr(transformers, kind).from_pretrained(source, padding_side="right", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:  # what transformers raises for a foreign folder
        raise ModelError(
            "A tokenizer cannot be read", where=source, why=first_line(error),
            do="Give a folder with tokenizer.json, or a hub repository that can be reached",
        ) from error  # fmt: skip


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the sha256 of a tokenizer's vocabulary, merges, rules and chat template."""
    state = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(state.encode()).hexdigest()
