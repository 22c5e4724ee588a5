"""Whether two fine-tunes came out alike: overall, where a mask lets them move, and beside what no training would show.

A fine-tune of a subnetwork agrees with a full one wherever neither moved, by construction. So each share of entries
with |A - B| <= tolerance stands beside the same share within the mask, and beside that of the model before training
and the full fine-tune: a tolerance at which those agree as well tells nothing apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from align.errors import DataError
from align.sparsity.adapters import plain
from align.sparsity.masks import read_mask
from align.sparsity.measure import CHUNK
from align.sparsity.pairs import TensorPair, load_pair
from align.sparsity.sources import Entry

TOLERANCES = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
POWER = 0.5
"""A tolerance that lets more than this share of the mask pass, though training moved it, tells nothing apart."""


def equality(
    first: str | Path, second: str | Path, *, mask: str | Path, init: str | Path, full: str | Path | None = None
) -> dict[str, Any]:
    """Compare two fine-tunes of one model.

        agree(X, Y) = share of entries with |x - y| <= tolerance, of all of them and of those in the mask

    Tolerance 0 is equality of the stored codes' values. `low_power` says that the null agrees within the mask as often
    as the fine-tunes do, or that more than half of the mask's entries pass although training moved them.

    Args:
        first, second: the fine-tunes.
        mask: the entries that one of them, or both, were limited to.
        init: the model before training.
        full: the fine-tune of all weights; `first` when None.

    Returns:
        `entries`, `in_mask`, and of every tolerance `agree`, `agree_in_mask`, `null`, `null_in_mask`, `low_power`.

    Raises:
        ModelError: a side that cannot be read, or different models.
        DataError: a mask of another model.
    """
    found, null = load_pair(first, second), load_pair(init, first if full is None else full)
    held = read_mask(mask)
    names = {plain(name): name for name in held.names} | {name: name for name in held.names}
    others = {plain(pair.name): pair for pair in null.pairs}
    # rows: the fine-tunes and the null; columns: everywhere and in the mask; then by tolerance
    counts = np.zeros((2, 2, len(TOLERANCES)), np.int64)
    entries = inside = 0
    for pair in found.iter_tensors():
        other, name = others.get(plain(pair.name)), names.get(pair.name) or names.get(plain(pair.name))
        if other is None or name is None or other.count != pair.count:
            raise DataError("A mask, or the model before training, is another model's", where=str(mask), why=pair.name)
        bits = held.source.entries[name]
        if int(held.exponents(name)[0].sum()) != pair.count:
            raise DataError("A mask is of another model", where=f"{mask}, {name}", why="its size differs")
        entries += pair.count
        for start in range(0, pair.count, CHUNK):
            stop = min(start + CHUNK, pair.count)
            chosen = _chosen(bits, start, stop)
            inside += int(np.count_nonzero(chosen))
            for row, two in enumerate((pair, other)):
                counts[row] += _agree(two, start, stop, chosen)
        pair.release()
        other.release()
    if not entries:
        raise DataError("There is nothing to compare", where=str(first))
    rows = []
    for i, tolerance in enumerate(TOLERANCES):
        (everywhere, within), (null_all, null_in) = counts[:, :, i].tolist()
        share = within / inside if inside else None
        chance = null_in / inside if inside else None
        low = bool(share is not None and (chance >= share or chance > POWER))
        rows.append({
            "tolerance": tolerance, "agree": everywhere / entries, "agree_in_mask": share,
            "null": null_all / entries, "null_in_mask": chance, "low_power": low,
        })  # fmt: skip
    return {
        "first": str(first), "second": str(second), "mask": str(mask), "init": str(init),
        "full": str(first if full is None else full), "entries": entries, "in_mask": inside,
        "density": inside / entries, "coverage": found.coverage, "tolerances": rows,
    }  # fmt: skip


def _chosen(bits: Entry, start: int, stop: int) -> np.ndarray:
    # chunks begin at multiples of eight
    return np.unpackbits(bits.read(start // 8, -(-stop // 8)), count=stop - start, bitorder="little").astype(bool)


def _agree(pair: TensorPair, start: int, stop: int, chosen: np.ndarray) -> np.ndarray:
    a, b = pair.read_exact(start, stop)
    with np.errstate(invalid="ignore"):
        distance = np.abs(a - b)
    distance[a == b] = 0.0  # infinities
    found = np.zeros((2, len(TOLERANCES)), np.int64)
    for i, tolerance in enumerate(TOLERANCES):
        near = distance <= tolerance
        found[:, i] = np.count_nonzero(near), np.count_nonzero(near & chosen)
    return found


def as_text(found: dict[str, Any]) -> str:
    """Return the table as people read it."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.2f} %"

    lines = [
        f"{found['in_mask']:,} of {found['entries']:,} entries are in the mask ({share(found['density'])})",
        f"{'within':>8} {'agree':>10} {'in mask':>10} {'init/full':>10} {'in mask':>10}",
    ]
    for row in found["tolerances"]:
        cells = " ".join(f"{share(row[k]):>10}" for k in ("agree", "agree_in_mask", "null", "null_in_mask"))
        told = "  low power" if row["low_power"] else ""
        lines.append(f"{row['tolerance'] or 'equal':>8} {cells}{told}")
    if found["coverage"] < 1:
        lines.append(f"note: {100 * (1 - found['coverage']):.1f} % of the entries have no counterpart and are left out")
    return "\n".join(lines)
