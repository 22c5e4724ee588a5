"""The rank and spectrum of an update, matrix by matrix, beside what rounding would have made of it.

Convolutions are read as [out, in * height * width], every other tensor as [first, rest]; vectors have no spectrum.
One matrix and two Gram matrices of its smaller side are held at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ConfigError
from align.sparsity import spectrum
from align.sparsity.formats import FORMATS
from align.sparsity.pairs import TensorPair, load_pair
from align.sparsity.spectrum import Count, Matrix, Vector

LEVELS = ("fast", "full")
TOPS = (1, 8, 64)
MOST_VALUES = 64
WHOLE = 1024
"""Smaller side up to which all singular values are worked out at every level."""
_STEP = 1 << 20


@dataclass(frozen=True)
class Update:
    """E = W1 - W0 as stored, at least as tall as wide, and what is known of its rounding.

    Args:
        matrix: E, in single precision where that is exact.
        turned: whether it was transposed.
        edge: the noise edge of `align.sparsity.spectrum`.
        hidden: sqrt(sum u^2 / 12), the norm that independent rounding errors have.
        structural: the smaller of the numbers of rows and columns that changed at all: an upper bound of the rank.
    """

    matrix: Matrix
    turned: bool
    edge: float
    hidden: float
    structural: int


def rank(base: str | Path, tuned: str | Path, *, level: str = "fast") -> dict[str, Any]:
    """Measure rank and spectrum of the update of every matrix.

    Args:
        base, tuned: files or folders as for `align.sparsity.compare.compare`.
        level: "fast": what stands above the noise edge, stable rank, and the 64 largest singular values; "full" adds
            all singular values, the rank of the first paper, the spectral shift, and principal angles. Matrices of at
            most `WHOLE` rows or columns always have all singular values.

    Raises:
        ModelError: a side that cannot be read, or different models.
        ConfigError: another level.
    """
    if level not in LEVELS:
        raise ConfigError(f"There is no level {level!r}", do=f"Choose one of {', '.join(LEVELS)}")
    began = time.perf_counter()
    pairing = load_pair(base, tuned)
    pairs = [pair for pair in pairing.iter_tensors() if is_matrix(pair)]
    found: dict[str, Any] = {
        "base": pairing.base.path, "tuned": pairing.tuned.path, "level": level,
        "matrices": [rank_of(pair, level) for pair in pairs],
        "vectors": len(pairing.pairs) - len(pairs), "coverage": pairing.coverage,
    }  # fmt: skip
    found |= {"summary": summary(found["matrices"]), "seconds": time.perf_counter() - began}
    return found | {"notes": notes(found)}


def is_matrix(pair: TensorPair) -> bool:
    """Return whether a tensor has a spectrum: two axes or more, and two entries or more along both sides."""
    return len(pair.shape) > 1 and min(_sides(pair)) > 1


def _sides(pair: TensorPair) -> tuple[int, int]:
    return pair.shape[0], math.prod(pair.shape[1:])


def rank_of(pair: TensorPair, level: str = "fast") -> dict[str, Any]:
    """Measure one matrix; see `rank`.

    `status` is "above the edge", "below the precision floor" (something changed, and nothing of it stands above what
    rounding alone would make), "unchanged", or "not measured" (NaN or infinity). `above_edge` is then the number of
    singular values above the edge, and a lower bound of the rank of the update before it was rounded.
    """
    began = time.perf_counter()
    rows, columns = _sides(pair)
    row: dict[str, Any] = {"name": pair.name, "shape": [rows, columns], "dtype": pair.format.name}
    row["factors"] = _of_factors(pair)
    update = read_update(pair)
    if isinstance(update, str):
        row |= {"status": "not measured", "why": update}
    else:
        row |= {"noise_edge": update.edge, "rounding_norm": update.hidden, "structural_rank": update.structural}
        row |= _measured(update, level)
        if level == "full" and update.structural:
            row |= _against_base(pair, update)
    pair.release()
    return row | {"seconds": time.perf_counter() - began}


def read_update(pair: TensorPair) -> Update | str:
    """Return the update of a matrix, or why it has none."""
    rows, columns = _sides(pair)
    e: Matrix = np.empty((rows, columns), np.float32)
    by_row, by_column = np.zeros(rows), np.zeros(columns)
    moved_rows, moved_columns = np.zeros(rows, bool), np.zeros(columns, bool)
    spacings = [FORMATS[side.dtype].spacing() for side in (pair.base, pair.tuned)]
    step = max(1, _STEP // columns)
    for a in range(0, rows, step):
        b = min(a + step, rows)
        codes = [side.read(a * columns, b * columns) for side in (pair.base, pair.tuned)]
        forms = [FORMATS[side.dtype] for side in (pair.base, pair.tuned)]
        old, new = (form.values(c) for form, c in zip(forms, codes, strict=True))
        with np.errstate(invalid="ignore", over="ignore"):
            part = (new - old).reshape(b - a, columns)
            if not np.isfinite(part).all():
                return "it has entries that are NaN or infinite"
            narrow = part.astype(e.dtype)
        if e.dtype == np.float32 and not np.array_equal(narrow, part):
            wide = np.empty((rows, columns))
            wide[:a] = e[:a]
            e, narrow = wide, part
        e[a:b] = narrow
        coarse = np.maximum(*(s[form.exponent(c)] for s, form, c in zip(spacings, forms, codes, strict=True)))
        square = np.square(coarse).reshape(b - a, columns)
        by_row[a:b] = square.sum(axis=1)
        by_column += square.sum(axis=0)
        moved_rows[a:b] = part.any(axis=1)
        moved_columns |= part.any(axis=0)
    turned = rows < columns
    return Update(
        np.ascontiguousarray(e.T) if turned else e, turned, spectrum.noise_edge(by_row, by_column),
        math.sqrt(float(by_row.sum()) / 12), int(min(moved_rows.sum(), moved_columns.sum())),
    )  # fmt: skip


def _measured(update: Update, level: str) -> dict[str, Any]:
    """Return what E itself says."""
    if not update.structural:
        return {
            "status": "unchanged",
            "norm": 0.0,
            "above_edge": 0,
            "certificate": spectrum.EXACT,
            "proof": "E is zero",
        }
    matrix, scale = spectrum.unit_scaled(update.matrix)
    m, n = matrix.shape
    edge, whole = update.edge * scale, level == "full" or n <= WHOLE
    product = spectrum.gram(matrix, np.float64 if whole else np.float32)
    energy = sum(float(np.vdot(part, part)) for part in spectrum.blocks(matrix))
    row: dict[str, Any] = {"norm": math.sqrt(energy) / scale}
    if whole:
        values, count = spectrum.spectrum_above(matrix, product, edge)
        row |= {
            "effective_rank": spectrum.effective_rank(values),
            "matrix_rank": int(np.sum(values > max(m, n) * np.finfo(np.float32).eps * values[0])),
        }
    else:
        values = spectrum.largest_values(matrix, product, MOST_VALUES)
        count = spectrum.count_above(matrix, edge, single=product, many=bool(values[-1] > edge))
    row |= {
        "all_values": whole,
        "stable_rank": energy / float(values[0] ** 2),
        "participation_rank": spectrum.participation_rank(product),
        "top_energy": {str(k): min(1.0, float(np.sum(values[:k] ** 2)) / energy) for k in TOPS if k <= len(values)},
        "singular_values": _thinned(values / scale),
        "above_edge": count.above, "certificate": count.certificate, "proof": count.proof,
    }  # fmt: skip
    status = "above the edge" if count.above else "below the precision floor"
    return row | {"status": status, "reading": _reading(count, update, row["norm"], n)}


def _thinned(values: Vector) -> list[list[float]]:
    """Return (index from 1, singular value) of the 64 largest, and of fewer and fewer after them."""
    later = np.geomspace(MOST_VALUES, max(len(values), MOST_VALUES + 1), 64).astype(int)
    held = [i for i in sorted({*range(MOST_VALUES), *(later - 1).tolist()}) if i < len(values)]
    return [[i + 1, float(values[i])] for i in held]


def _reading(count: Count, update: Update, norm: float, most: int) -> str:
    """Return what the count says, in words."""
    if not count.above:
        return "below the precision floor: rounding alone would make singular values as large as any of these"
    sure = "" if count.certificate == spectrum.EXACT else "about "
    found = f"{sure}{count.above} of {most} directions stand above the rounding noise"
    if norm < update.hidden:
        found += "; more may be hidden, as rounding can hide more than is seen"
    return found


def _of_factors(pair: TensorPair) -> dict[str, Any] | None:
    """Return the spectrum of scale B A from its factors: s(R_B R_A^T) with B = Q_B R_B and A^T = Q_A R_A."""
    if pair.tuned.factors is None:
        return None
    up, down = pair.tuned.factors
    if not (np.isfinite(up).all() and np.isfinite(down).all()):
        return None
    values = np.linalg.svd(np.linalg.qr(up)[1] @ np.linalg.qr(down.T)[1].T, compute_uv=False)
    floor = max(_sides(pair)) * np.finfo(np.float32).eps * values[0]
    energy = float(np.sum(values**2))
    return {
        "rank": int(np.sum(values > floor)),
        "norm": math.sqrt(energy),
        "stable_rank": energy / float(values[0] ** 2) if energy else None,
        "singular_values": values.tolist(),
    }


def _against_base(pair: TensorPair, update: Update) -> dict[str, Any]:
    """Return the spectral shift, and principal angles of the top subspaces of W0, W1 and E, in double precision."""
    sides = [_dense(pair, side, update.turned) for side in (pair.base, pair.tuned)]
    if not all(np.isfinite(side).all() for side in sides):
        return {}
    spectra = [np.linalg.eigh(spectrum.gram(m)) for m in (*sides, update.matrix)]
    before, after = (np.sqrt(np.maximum(values, 0.0))[::-1] for values, _ in spectra[:2])
    m, n = update.matrix.shape
    k = max(1, min(MOST_VALUES, n // 8))
    right = [vectors[:, ::-1][:, :k] for _, vectors in spectra]
    left = [np.linalg.qr(spectrum.times(a, v))[0] for a, v in zip((*sides, update.matrix), right, strict=True)]
    norm = float(np.linalg.norm(before))
    size = math.sqrt(sum(float(np.vdot(part, part)) for part in spectrum.blocks(update.matrix)))
    found: dict[str, Any] = {
        "nss": spectrum.spectral_shift(before, after),
        "nss_bound": size / norm if norm else None,
        "nss_if_isotropic": size / (norm * math.sqrt(m)) if norm else None,
        "gap_at_k": float((before[k - 1] - before[k]) / before[0]) if before[0] and k < n else None,
        "k": k,
    }
    found["angle"] = [spectrum.largest_angle(s[0], s[1]) for s in (left, right)]
    found["shared_with_base"] = [float(np.mean(spectrum.subspace_cosines(s[0], s[2]) ** 2)) for s in (left, right)]
    found["shared_by_chance"] = [k / m, k / n]
    inside = left[0].T @ spectrum.times(update.matrix, right[0])
    found["principal_energy"] = (float(np.linalg.norm(inside)) / size) ** 2
    found["principal_by_chance"] = (k / m) * (k / n)
    if update.turned:
        for key in ("angle", "shared_with_base", "shared_by_chance"):
            found[key] = found[key][::-1]
    return found


def _dense(pair: TensorPair, side: Any, turned: bool) -> NDArray[Any]:
    rows, columns = _sides(pair)
    values = FORMATS[side.dtype].values(side.read(0, pair.count)).reshape(rows, columns)
    return np.ascontiguousarray(values.T) if turned else values


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how many matrices there are of each status, and means over them, each matrix counting once."""
    status = {s: sum(r["status"] == s for r in rows) for s in STATUSES}
    above = [r["above_edge"] for r in rows if r["status"] == "above the edge"]
    certain = sum(r.get("certificate") == spectrum.EXACT for r in rows)
    paper = [r["matrix_rank"] / min(r["shape"]) for r in rows if "matrix_rank" in r]
    shift = [r["nss"] for r in rows if r.get("nss") is not None]
    return {
        "matrices": len(rows), "status": status, "exact": certain,
        "above_edge": {"least": min(above), "median": float(np.median(above)), "most": max(above)} if above else None,
        "matrix_rank_share": float(np.mean(paper)) if paper else None, "matrix_rank_of": len(paper),
        "nss": float(np.mean(shift)) if shift else None,
    }  # fmt: skip


STATUSES = ("above the edge", "below the precision floor", "unchanged", "not measured")


def notes(found: dict[str, Any]) -> list[str]:
    """Return what a reader must know before quoting a rank, a sentence each."""
    total, said = found["summary"], []
    if total["status"]["below the precision floor"]:
        said.append(
            f"{total['status']['below the precision floor']} matrices changed, but nothing of it stands above what "
            "rounding alone would make: their rank is unknown, not zero and not full."
        )
    narrow = any(FORMATS[row["dtype"]].bits == 16 for row in found["matrices"])
    if narrow and total["matrix_rank_share"] is not None:
        said.append(
            "By the rank of the first paper (float32 tolerance) the updates have "
            f"{100 * total['matrix_rank_share']:.1f} % of full rank; rounding makes almost any "
            "update so, and so would 1 % of entries changed at random."
        )
    unsure = total["matrices"] - total["exact"] - total["status"]["not measured"]
    if unsure:
        said.append(f"{unsure} counts are uncertified: a singular value lies within rounding of the edge.")
    odd = total["status"]["not measured"]
    if odd:
        said.append(f"Not measured, as they hold NaN or infinity: {odd} matrices.")
    if any(r["factors"] for r in found["matrices"]):
        said.append(
            "An adapter has its own spectrum beside that of the merged, rounded weights, which is what is deployed."
        )
    return said


def as_text(found: dict[str, Any]) -> str:
    """Return ranks as people read them, a line a matrix."""
    lines = [f"{'above edge':>10}  {'stable':>7}  {'top 1':>6}  {'s1/edge':>8}  matrix"]
    for r in found["matrices"]:
        if "singular_values" not in r:
            lines.append(f"{'–':>10}  {'–':>7}  {'–':>6}  {'–':>8}  {r['name']}: {r.get('why', r['status'])}")
            continue
        above = f"{r['above_edge']}" + ("" if r["certificate"] == spectrum.EXACT else "?")
        above = above if r["above_edge"] else "below"
        ratio = r["singular_values"][0][1] / r["noise_edge"] if r["noise_edge"] else math.inf
        lines.append(
            f"{above:>10}  {r['stable_rank']:>7.1f}  {100 * r['top_energy']['1']:>5.1f}%  {ratio:>8.2f}  "
            f"{r['name']} {r['shape'][0]} x {r['shape'][1]}"
            + (f"; adapter of rank {r['factors']['rank']}" if r["factors"] else "")
        )
    total = found["summary"]
    status = ", ".join(f"{n} {s}" for s, n in total["status"].items() if n)
    said = f"{status}; {total['exact']} counts certified exact" if status else "nothing here has a spectrum"
    lines.append(f"{total['matrices']} matrices: {said}")
    lines += [f"note: {note}" for note in found["notes"]]
    if found["coverage"] < 1:
        lines.append(f"note: {100 * (1 - found['coverage']):.1f} % of the entries have no counterpart and are left out")
    return "\n".join([*lines, f"in {found['seconds']:.2f} s"])
