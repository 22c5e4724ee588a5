"""How long rows are for a tokenizer and what a length cuts, for `align check`: nothing is trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.checks import Finding
from align.errors import AlignError
from align.language_config import LanguageConfig
from align.preferences import PreferenceSet, load_preferences
from align.rluf_config import RLUFConfig
from align.seeding import permutation
from trainers.language_model import load_processor, over_positions
from trainers.preference_data import encode, tokenise

ROWS = 2000
"""Rows that are looked at, drawn from all."""


def describe_lengths(
    rows: PreferenceSet, tokenizer: Any, *, max_length: int, max_prompt_length: int | None = None
) -> dict[str, Any]:
    """Return tokens of the rows and what `max_length` does to them, from `ROWS` of them.

    Args:
        rows: labelled or not.
        tokenizer: of transformers, or a processor of images and text.
        max_length, max_prompt_length: see `tokenise`.

    Returns:
        rows looked at; median, 95 % and longest tokens of a row; the share cut at its end, by class; rows dropped.

    Raises:
        DataError: see `tokenise`.
    """
    drawn = sorted(permutation(len(rows), "lengths")[:ROWS])
    part = PreferenceSet(tuple(rows.rows[i] for i in drawn), rows.source)
    length = np.array([len(p) + len(c) for p, c in encode(part.rows, tokenizer)])
    kept = tokenise(part, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    return {
        "rows": len(part), "max_length": max_length, "median": int(np.median(length)),
        "p95": int(np.percentile(length, 95)), "longest": int(length.max()), "truncated": kept.truncated,
        "dropped": kept.dropped,
    }  # fmt: skip


def length_findings(config: LanguageConfig) -> list[Finding]:
    """Return what the lengths of a config's rows say; its model and data have to be on this machine.

    Nothing of rows that may be prompts alone: their completions are drawn.
    """
    if isinstance(config, RLUFConfig) and config.prompts_alone:
        return []
    data = config.data
    try:
        found = describe_lengths(
            load_preferences(data.path), load_processor(config.model.path, config.model.chat_template),
            max_length=data.max_length, max_prompt_length=data.max_prompt_length,
        )  # fmt: skip
    except AlignError as error:
        return [Finding("error", "lengths", str(error).removesuffix("."), "", "data.max_length")]
    long = over_positions(min(found["longest"], data.max_length), config.model.path)
    beyond = [Finding("warning", "positions", long, "Lower data.max_length to that", "data.max_length")] if long else []
    return [_finding(found), *beyond]


def _finding(found: dict[str, Any]) -> Finding:
    worst = max(found["truncated"].values(), default=0.0)
    text = lengths_text(found)
    if worst > 0.05 or sum(found["dropped"].values()) > 0.01 * found["rows"]:
        do = "Raise data.max_length, or set data.max_prompt_length"
        return Finding("warning", "truncation", text, do, "data.max_length")
    return Finding("note", "lengths", text, "", "data.max_length")


def lengths_text(found: dict[str, Any]) -> str:
    """Return lengths as a sentence."""
    cut = ", ".join(f"{share:.1%} of {name}" for name, share in found["truncated"].items() if share)
    dropped = ", ".join(f"{count} {reason}" for reason, count in found["dropped"].items())
    return (
        f"Of {found['rows']} rows half have over {found['median']} tokens, 5 % over {found['p95']}, the longest "
        f"{found['longest']}; max_length {found['max_length']} cuts {cut or 'none'}"
        + (f", and drops {dropped}" if dropped else "")
    )
