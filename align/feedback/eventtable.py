"""Events as columns, for statistics over a million of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.feedback.events import Item
from align.feedback.schema import COLUMNS, decode_items, decode_value


@dataclass(frozen=True)
class EventTable:
    """Current events as columns: entry i of every column belongs to event i.

    Args:
        columns: NumPy arrays by name: numbers for seq, ts, tombstone, position and latency_ms (-1 is none) and
            propensity (NaN is none); objects for scale, items (tuples of ids) and value; texts for every other field
            of `FeedbackEvent`.
        content: the items by id; empty where they were not asked for.
    """

    columns: Mapping[str, np.ndarray]
    content: Mapping[str, Item]

    def __len__(self) -> int:
        return len(self.columns["seq"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


_NUMBERS: Mapping[str, tuple[type, float]] = {
    "seq": (np.int64, 0),
    "ts": (np.int64, 0),
    "tombstone": (np.int64, 0),
    "position": (np.int64, -1),
    "latency_ms": (np.int64, -1),
    "propensity": (np.float64, np.nan),
}
_UNIQUE = ("id", "identifier", "reply")


def event_columns(pages: Iterable[Sequence[Sequence[Any]]]) -> dict[str, np.ndarray]:
    """Return the columns of pages of rows of (seq, *COLUMNS). A text that repeats is held once."""
    names = ("seq", *COLUMNS)
    shared: dict[Any, Any] = {}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "scale")}
    for page in pages:
        raw = dict(zip(names, zip(*page, strict=True), strict=True))
        scales = zip(raw.pop("scale_low"), raw.pop("scale_high"), strict=True)
        for name, (kind, none) in _NUMBERS.items():
            cells = raw.pop(name)
            parts[name].append(np.array([none if cell is None else cell for cell in cells], dtype=kind))
        made: dict[str, Iterable[Any]] = {
            "scale": (None if pair[0] is None else shared.setdefault(pair, pair) for pair in scales),
            "items": map(decode_items, raw.pop("items")),
            "value": map(decode_value, raw.pop("value")),
            **{name: raw.pop(name) for name in _UNIQUE},
            **{name: [shared.setdefault(cell, cell) for cell in cells] for name, cells in raw.items()},
        }
        for name, values in made.items():
            parts[name].append(np.fromiter(values, dtype=object, count=len(page)))
    kinds = {name: _NUMBERS.get(name, (object, 0))[0] for name in parts if not name.startswith("scale_")}
    return {
        name: np.concatenate(parts.pop(name)) if parts[name] else np.array([], dtype=kind)
        for name, kind in kinds.items()
    }
