"""What a language model said to the same prompts at every evaluation, from generations.jsonl."""

from __future__ import annotations

import json
from typing import Any

from align.reports.page import count, finite, signed
from align.reports.runfiles import Row

BETWEEN = 10
"""Answers to a prompt between its first and its last that the page shows."""


def answers_of(rows: list[Row]) -> list[Row]:
    """Return each prompt with what the model said to it at the first and the last step, and in between."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if isinstance(row.get("step"), int) and isinstance(row.get("completion"), str):
            found.setdefault(row.get("index"), []).append(row)
    result = []
    for said in found.values():
        said.sort(key=lambda row: row["step"])
        first, last = said[0], said[-1]
        result.append(
            {
                "prompt": _turns(first.get("prompt")),
                "first": first,
                "last": last,
                "between": _thinned(said[1:-1]),
                "same": first["completion"] == last["completion"],
            }
        )
    return result


def _thinned(rows: list[Row]) -> list[Row]:
    """Return at most `BETWEEN` of the rows, evenly."""
    return rows if len(rows) <= BETWEEN else [rows[i * len(rows) // BETWEEN] for i in range(BETWEEN)]


def changed(answers: list[Row]) -> str:
    """Say how many answers changed, and how their mean log-ratio did."""
    later = [a for a in answers if a["last"]["step"] != a["first"]["step"]]
    if not later:
        return ""
    other = sum(not a["same"] for a in later)
    text = f"At step {later[0]['last']['step']}, {count(other)} of {count(len(later))} differ from step "
    text += f"{later[0]['first']['step']}."
    ratios = [r for a in later if (r := finite(a["last"].get("log_ratio"))) is not None]
    if ratios:
        mean = sum(ratios) / len(ratios)
        text += f" Their mean log-ratio, log-prob now − log-prob before training, is {signed(mean, 2)} nats an answer."
    return text


def _turns(prompt: Any) -> list[Row]:
    """Return a prompt as turns with the role of each; text is one turn without a role."""
    if not isinstance(prompt, list):
        return [{"role": "", "text": str(prompt)}]
    turns = [turn for turn in prompt if isinstance(turn, dict)]
    return [{"role": str(turn.get("role", "")), "text": _said(turn.get("content"))} for turn in turns]


def _said(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
