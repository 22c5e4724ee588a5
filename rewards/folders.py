"""Folders of transformers models that score: looked at first, then loaded with every weight from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align.errors import ModelError, first_line
from align.weights import load_tensors, require_inert

_FOREIGN = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError)


def read_model_config(folder: Path, what: str) -> Any:
    """Return the configuration of a folder that is safe to give to transformers.

    Args:
        what: the folder should hold, "a language model".

    Raises:
        ModelError: it asks for code, or is no such folder.
    """
    from transformers import AutoConfig

    require_inert(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _FOREIGN as error:
        raise ModelError(f"This is no folder of {what}", where=str(folder), why=first_line(error)) from error


def load_whole(folder: Path, config: Any, auto: str, what: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return a model with every weight from the folder, and those weights; one that would be made up is an error.

    Args:
        auto: the class of transformers that knows the architecture, "AutoModelForCausalLM".
        what: for messages, "a causal language model".

    Raises:
        ModelError: the weights cannot be read, or are not those of such a model.
    """
    import transformers

    state = load_tensors(folder)
    try:
        with torch.device("meta"):
            kind = type(getattr(transformers, auto).from_config(config, trust_remote_code=False))
        model, found = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except _FOREIGN as error:
        raise ModelError(f"These weights do not make {what}", where=str(folder), why=first_line(error)) from error
    if found["missing_keys"]:
        raise ModelError(
            f"These are not the weights of {what}", where=str(folder), why=f"they lack {min(found['missing_keys'])}",
            do="Give a folder that such a model was saved into",
        )  # fmt: skip
    return model, state
