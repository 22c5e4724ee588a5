"""Which weights move while training runs: over one update, over k steps, since the beginning; what was to be expected.

The base stays in its files, mapped, and is read once an event. One copy of the codes is kept, in the format that is
measured: those before the update of the last event. Just before the next event's first update they are compared with
the weights as they stand, k steps later, and replaced; just after that update, once more. No copy in single precision
is made, and between events nothing is done at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ModelError
from align.sparsity.compare import compare, summary
from align.sparsity.formats import FORMATS
from align.sparsity.measure import CHUNK, Measures, kernels
from align.sparsity.nulls import visible_after_sign_step, visible_after_steps
from align.sparsity.pairs import Pairing, TensorPair, load_pair
from align.sparsity.sources import Source, open_source


class Travelled:
    """How far AdamW's steps may have carried a weight: the sum of their rates, and the root of that of the squares."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.path = self.squares = 0.0
        self.updates = 0
        for row in rows:
            rate, updates = row.get("lr"), row.get("updates", 1)
            if isinstance(rate, (int, float)) and math.isfinite(rate) and isinstance(updates, int):
                self.add(float(rate), updates)

    def add(self, rate: float, updates: int = 1) -> None:
        """Take `updates` steps of one rate."""
        self.path += rate * updates
        self.squares += rate**2 * updates
        self.updates += updates

    @property
    def spread(self) -> float:
        """The root of the sum of the squares of the rates."""
        return math.sqrt(self.squares)


class Tracker:
    """Measures a model in training.

    Args:
        base: the model before training, a file or a folder, or what finds it.
        current: returns the model as it stands, adapters as adapters.
        every: steps between events.
        form: the format that is measured in; that of the base when empty.
        travelled: what a resumed run has behind it.
        whole: whether all weights train, which is what the predictions are of.

    `base` may be unreadable; `why` then says so, and what needs it is not measured.
    """

    def __init__(
        self, base: str | Path | Callable[[], str | Path], current: Callable[[], Source], *, every: int, form: str = "",
        travelled: Travelled | None = None, whole: bool = True,
    ) -> None:  # fmt: skip
        self.current, self.every, self.form, self.whole = current, every, form, whole
        self.travelled, self.why = travelled or Travelled(), ""
        self._base: Source | None = None
        try:
            self._base = open_source(base() if callable(base) else base)
            load_pair(self._base, current(), form=form)
        except ModelError as error:
            self._base, self.why = None, str(error)
        self._blind = self._base is None and current().adapter
        self._kept: dict[str, NDArray[Any]] = {}
        self._found: dict[str, float] = {}
        self._count = kernels().count
        self._seconds = 0.0
        self._asked = False

    def before_update(self, step: int) -> None:
        """Before the first update of a step that is due, keep the weights and compare with those kept before."""
        if self._blind or step % self.every or self._found:
            return
        began = time.perf_counter()
        pairing = self._pairing()
        had = bool(self._kept)
        different = sum(self._against_kept(pair, keep=True) for pair in moving(pairing))
        self._found = {"sparsity/window": 1 - different / _entries(pairing)} if had else {}
        self._asked, self._seconds = True, time.perf_counter() - began

    def after_update(self, rate: float) -> None:
        """After an update with this learning rate; the first of a step that is due is measured."""
        self.travelled.add(rate)
        if not self._asked:
            return
        began = time.perf_counter()
        pairing = self._pairing()
        different = sum(self._against_kept(pair, keep=False) for pair in moving(pairing))
        self._found["sparsity/step"] = 1 - different / _entries(pairing)
        self._rate, self._asked = rate, False
        self._seconds += time.perf_counter() - began

    def row(self) -> dict[str, float]:
        """Return what the step that was just taken adds to the log; nothing where none was due."""
        if not self._found:
            return {}
        found, began = self._found, time.perf_counter()
        if self._base is not None:
            compared = compare(self._base, self.current(), form=self.form)
            parts = [(pair, measures) for pair, measures in compared.tensors]
            whole = summary([measures for _, measures in parts])
            start = "" if aligned(parts) else "_unaligned"
            found |= {
                "sparsity/cumulative": whole["bit_identical"],
                "sparsity/if_dense": whole[f"expected_bit_identical_if_dense{start}"],
                "sparsity/norm": whole["relative_norm"] or 0.0,
            }
            if self.whole and not compared.pairing.tuned.layout.startswith("adapter"):
                found |= predictions(parts, self.travelled, self._rate)
        self._found = {}
        return {**found, "sparsity/seconds": self._seconds + time.perf_counter() - began}

    def _pairing(self) -> Pairing:
        now = self.current()
        return load_pair(now if self._base is None else self._base, now, form=self.form)

    def _against_kept(self, pair: TensorPair, *, keep: bool) -> int:
        """Return how many codes of a tensor differ from those kept; with `keep`, keep what is there now."""
        held = self._kept.get(pair.name)
        if held is None or len(held) != pair.count:
            held = self._kept[pair.name] = np.empty(pair.count, pair.format.code)
        different = 0
        for start in range(0, pair.count, CHUNK):
            stop = min(start + CHUNK, pair.count)
            now = pair.format.of(pair.tuned.dtype, pair.tuned.read(start, stop))
            different += self._count(held[start:stop], now)
            if keep:
                held[start:stop] = now
        return different


def moving(pairing: Pairing) -> list[TensorPair]:
    """Return the tensors that training can move: all but those whose entry is the base's own, beside adapters."""
    return [p for p in pairing.pairs if (p.tuned.file, p.tuned.offset) != (p.base.file, p.base.offset)] or pairing.pairs


def _entries(pairing: Pairing) -> int:
    return max(1, sum(pair.count for pair in pairing.pairs))


def aligned(parts: Sequence[tuple[TensorPair, Measures]]) -> bool:
    """Return whether the base is stored in the format it is measured in, or in a coarser one."""
    large = max(parts, key=lambda part: part[0].count)[0]
    return large.format.holds(FORMATS[large.base.dtype])


def predictions(parts: Sequence[tuple[TensorPair, Measures]], travelled: Travelled, rate: float) -> dict[str, float]:
    """Return the shares that AdamW's steps are to leave as they were, by the learning rates alone.

    One step starts from where training stands, between two values of a format coarser than single precision.

    Args:
        rate: of the last update.
    """
    start, total, found = aligned(parts), 0, np.zeros(3)
    for pair, measures in parts:
        held, spacing = measures.exponents[:-1], pair.format.spacing()[:-1]
        fine = pair.format.holds(FORMATS[pair.tuned.dtype])
        one = visible_after_sign_step(rate, held, spacing, aligned=fine)
        found += held.sum() * np.array(
            [one, *visible_after_steps(travelled.path, travelled.spread, held, spacing, aligned=start)]
        )
        total += int(held.sum())
    one, cancelling, agreeing = (1 - found / max(total, 1)).tolist()
    return {
        "sparsity/predicted_step": one, "sparsity/predicted_cancelling": cancelling,
        "sparsity/predicted_agreeing": agreeing,
    }  # fmt: skip
