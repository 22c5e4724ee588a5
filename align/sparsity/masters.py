"""The update as the optimizer holds it, in fp32, beside what the stored weights show of it.

D = M1 - M0 is the change of the masters, E = W1 - W0 that of the weights as stored. Rounding to nearest moves no entry
by more than half a spacing, hence the certificate

    ||E - D|| <= 1/2 ||ulp(W1)|| + 1/2 ||ulp(W0)||

where the last term is 0 if M0 is exact in the format of the weights, as it is at the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.sparsity.formats import FORMATS
from align.sparsity.measure import CHUNK, Kernels, Measures, Pass, Scratch
from align.sparsity.nulls import identical_at
from align.sparsity.pairs import TensorPair


@dataclass
class MasterMeasures:
    """Measures of D in single precision, and sums over finite entries of D and E together.

    Args:
        visible: of the weights as stored.
        as_stored: whether M0 is the base's weights, for want of masters of its own.
        exact: entries of which M0 is W0.
        dot, fine, coarse, hidden: sum D E, sum D^2, sum E^2, sum (E - D)^2.
        agree: entries of which the tuned master, rounded, is the tuned weight.
    """

    found: Measures
    visible: Measures
    as_stored: bool
    dot: float = 0.0
    fine: float = 0.0
    coarse: float = 0.0
    hidden: float = 0.0
    agree: int = 0
    exact: int = 0

    @property
    def aligned(self) -> bool:
        """Whether the update began on values of the format that is compared."""
        return self.exact == self.found.parameters


def measure_masters(pair: TensorPair, visible: Measures, use: Kernels, scratch: Scratch) -> MasterMeasures | None:
    """Return the measures of a pair's masters, None where it has none."""
    if pair.masters is None:
        return None
    work = Pass(pair.masters.format, use, scratch)
    found = MasterMeasures(work.found, visible, pair.masters.base is pair.base)
    fine, form = pair.masters.format, pair.format
    for start in range(0, pair.count, CHUNK):
        stop = min(start + CHUNK, pair.count)
        old, new = pair.masters.read(start, stop)
        before, after = pair.read(start, stop)
        work.add(old, new)
        found.agree += int(np.count_nonzero(form.encode(fine.values(new).astype(np.float32)) == after))
        with np.errstate(invalid="ignore", over="ignore"):
            start_fine, start_seen = fine.values(old), form.values(before)
            found.exact += int(np.count_nonzero(start_fine == start_seen))
            d, e = fine.values(new) - start_fine, form.values(after) - start_seen
        held = np.isfinite(d) & np.isfinite(e)
        d, e = d[held], e[held]
        found.dot += float(d @ e)
        found.fine += float(d @ d)
        found.coarse += float(e @ e)
        found.hidden += float((e - d) @ (e - d))
    work.finish()
    pair.masters.release()
    pair.release()
    return found


def describe_masters(parts: Sequence[MasterMeasures], own: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of masters as JSON values.

    Args:
        parts: of the tensors that have masters.
        own: what `align.sparsity.compare.summary` makes of their measures.
    """
    n = sum(m.found.parameters for m in parts)
    norm, hidden = math.sqrt(sum(m.fine for m in parts)), math.sqrt(sum(m.hidden for m in parts))
    seen = math.sqrt(sum(m.coarse for m in parts))
    limit = _half_spacings([(m.visible.format, m.visible.exponents_tuned) for m in parts])
    limit += _half_spacings([(m.visible.format, m.visible.exponents) for m in parts if not m.aligned])
    still = sum(m.visible.parameters - m.visible.different for m in parts)
    dense = 0.0
    for m in parts:
        finite = m.visible.exponents.copy()
        finite[-1] = 0
        scale = math.sqrt(m.fine / max(m.found.parameters, 1))
        dense += identical_at(scale, finite, FORMATS[m.visible.format].spacing(), aligned=m.aligned)
        dense += int(m.visible.exponents[-1])
    kept = ("bit_identical", "density", "sparsity_1e-5", "sign_flips", "norm", "relative_norm", "largest")
    begins = {"weights as stored" if m.as_stored else "masters" for m in parts}
    return {
        "tensors": len(parts), "parameters": n, "base": " and ".join(sorted(begins)),
        **{key: own[key] for key in kept},
        "bit_identical_as_stored": still / n if n else 1.0,
        "expected_bit_identical_if_dense": dense / n if n else 1.0,
        "cosine": sum(m.dot for m in parts) / (norm * seen) if norm and seen else None,
        "norm_seen": seen / norm if norm else None, "hidden": hidden / norm if norm else None,
        "certificate": limit / norm if norm else None, "certificate_holds": hidden <= limit * (1 + 1e-6),
        "round_to_weights": sum(m.agree for m in parts) / n if n else 1.0,
    }  # fmt: skip


def _half_spacings(histograms: Sequence[tuple[str, Any]]) -> float:
    total = sum(float(np.sum(many[:-1] * FORMATS[kind].spacing()[:-1] ** 2)) for kind, many in histograms)
    return math.sqrt(total) / 2


def masters_as_text(found: dict[str, Any]) -> str:
    """Return the line that stands below the headline."""
    share = found["norm_seen"]
    return (
        f"fp32 masters of {found['parameters']:,} weights: {100 * found['bit_identical']:.2f} % bit-identical, "
        f"|change| <= 1e-5 in {100 * found['sparsity_1e-5']:.2f} %, norm {found['norm']:.4g}"
        + ("" if share is None else f"; as stored {share:.2f} times that")
        + ("" if found["cosine"] is None else f", cosine {found['cosine']:.3f}")
    )


def master_notes(found: dict[str, Any]) -> list[str]:
    """Return what a reader must know of the masters, a sentence each."""
    notes, odd = [], 1 - found["round_to_weights"]
    fine, stored = (100 * found[key] for key in ("bit_identical", "bit_identical_as_stored"))
    if fine < stored:
        notes.append(
            f"Of the weights with fp32 masters, {stored:.2f} % are bit-identical as stored and {fine:.2f} % in fp32 "
            f"(base: {found['base']}); the difference is rounding."
        )
    if odd:
        notes.append(
            f"{100 * odd:.2f} % of the weights are not their masters rounded; the two may be of different steps."
        )
    return notes
