"""What changed between two arrays of codes: exact counts, in one pass, whatever the chunks.

Two kernels, numpy's and numba's, do the same thing: they tell equal from different codes, count 16-bit pairs of one
sign and exponent in a table of (sign and exponent, difference of codes), and set the few others aside. Every
measure is then worked out from those counts by `account`, so both kernels give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ConfigError
from align.sparsity.formats import FORMATS, Codes, Format

CHUNK = 1 << 17
ULP_BINS = ("1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128", ">=129")
_FINE, _LOWEST, _OCTAVES = 8, -152, 284
TOLERANCE = 1e-5
Counts = NDArray[np.int64]


def _zeros(size: int) -> Any:
    return field(default_factory=lambda: np.zeros(size, np.int64))


@dataclass
class Measures:
    """Additive measures of one or more tensors of a format; E = W1 - W0 as stored.

    Args:
        parameters: entries compared.
        different: entries with another code; = zero_sign + nan + sum(ulp).
        zero_sign: +0 to -0 or back.
        nan: changed entries of which one is NaN.
        ulp: entries by |difference of ordered codes|, in the bins of `ULP_BINS`.
        magnitude: the same entries by |E|, eight bins an octave, each open below and closed above.
        beyond: entries with |E| > 1e-5, exactly.
        beyond_authors: entries that `isclose(rtol=0, atol=1e-5)` in the format itself calls different, NaN included.
        sign_flips: entries that changed from below 0 to above or back.
        nan_base, nan_tuned, infinite: entries that are NaN on a side; changed entries with an infinite side.
        l1, energy, base_energy, largest: sum |E|, sum E^2, sum W0^2, max |E|; over finite entries.
        exponents, exponents_changed, exponents_tuned: entries by the biased exponent of W0, those of them that
            changed (any bit), and entries by that of W1.
        equal_exactly: of sides stored in two formats, entries that agree exactly.
    """

    format: str
    parameters: int = 0
    different: int = 0
    zero_sign: int = 0
    nan: int = 0
    beyond: int = 0
    beyond_authors: int = 0
    sign_flips: int = 0
    nan_base: int = 0
    nan_tuned: int = 0
    infinite: int = 0
    equal_exactly: int = 0
    l1: float = 0.0
    energy: float = 0.0
    base_energy: float = 0.0
    largest: float = 0.0
    ulp: Counts = _zeros(len(ULP_BINS))
    magnitude: Counts = _zeros(_FINE * _OCTAVES)
    exponents: Counts = _zeros(0)
    exponents_changed: Counts = _zeros(0)
    exponents_tuned: Counts = _zeros(0)

    def __post_init__(self) -> None:
        for name in ("exponents", "exponents_changed", "exponents_tuned"):
            if not len(getattr(self, name)):
                setattr(self, name, np.zeros(FORMATS[self.format].exponents, np.int64))

    def __add__(self, other: Measures) -> Measures:
        """Return the measures of both together, of one format."""
        found = Measures(self.format)
        for f in fields(self):
            if f.name == "largest":
                found.largest = max(self.largest, other.largest)
            elif f.name != "format":
                setattr(found, f.name, getattr(self, f.name) + getattr(other, f.name))
        return found

    def within(self, exponent: int) -> int:
        """Return how many entries have |E| <= 2^exponent, exactly."""
        top = min(max((exponent - _LOWEST) * _FINE, 0), len(self.magnitude))
        return self.parameters - self.different + self.zero_sign + int(self.magnitude[:top].sum())

    def top_energy(self, share: float) -> float:
        """Return the share of the energy that lies in the `share` of all entries that moved most, from the bins."""
        middles = np.exp2((np.arange(len(self.magnitude)) + 0.5) / _FINE + _LOWEST)[::-1]
        counts = self.magnitude[::-1].astype(np.float64)
        with np.errstate(over="ignore"):
            energy = np.where(counts > 0, counts * middles**2, 0.0)
        total = float(energy.sum())
        if not total or not math.isfinite(total):
            return math.nan
        left = np.clip(share * self.parameters - (np.cumsum(counts) - counts), 0, counts)
        return float(np.sum(energy * left / np.maximum(counts, 1)) / total)


def authors_limit(form: Format) -> float:
    """Return the largest |E| that rounds, in `form`, to no more than 1e-5 rounded to `form`: half a step above it."""
    near = form.encode(np.array([TOLERANCE], np.float64 if form.bits == 64 else np.float32))
    low, high = form.values(np.concatenate([near, near + near.dtype.type(1)]))
    return float((low + high) / 2) if form.bits < 64 else TOLERANCE


def ulp_distance(form: Format, old: Codes, new: Codes) -> NDArray[np.uint64]:
    """Return the number of steps between codes; +0 and -0 are one step-free place."""
    a, b = (form.magnitude(c).astype(np.uint64) for c in (old, new))
    apart = (old ^ new) >> (form.bits - 1) != 0
    return np.where(apart, a + b, np.maximum(a, b) - np.minimum(a, b))


def account(found: Measures, old: Codes, new: Codes, weight: Counts | None = None) -> None:
    """Add changed pairs of codes to `found`, each `weight` times."""
    form = FORMATS[found.format]
    many = np.ones(len(old), np.int64) if weight is None else weight
    found.exponents_changed += _count(form.exponent(old), many, form.exponents)
    found.exponents_tuned += _count(form.exponent(new), many, form.exponents)
    found.exponents_tuned -= _count(form.exponent(old), many, form.exponents)
    nan_old, nan_new = form.is_nan(old), form.is_nan(new)
    found.different += int(many.sum())
    found.nan_tuned += int(many[nan_new].sum()) - int(many[nan_old].sum())
    found.nan += int(many[nan_old | nan_new].sum())
    found.beyond_authors += int(many[nan_new & ~nan_old].sum())
    zero = (form.magnitude(old) == 0) & (form.magnitude(new) == 0)
    found.zero_sign += int(many[zero].sum())
    keep = ~(nan_old | nan_new | zero)
    old, new, many = old[keep], new[keep], many[keep]
    steps = np.searchsorted(np.array([1, 2, 4, 8, 16, 32, 64, 128], np.uint64), ulp_distance(form, old, new))
    found.ulp += _count(steps, many, len(ULP_BINS))
    a, b = form.values(old), form.values(new)
    found.sign_flips += int(many[(a < 0) & (b > 0) | (a > 0) & (b < 0)].sum())
    with np.errstate(over="ignore", invalid="ignore"):
        difference = b - a
        # What rounding of the difference itself lost (Knuth's two-sum): it decides at exact powers of two.
        rest = difference + a
        lost = (b - rest) - (a - (rest - difference))
    size = np.abs(difference)
    larger = np.isfinite(difference) & (lost * np.sign(difference) > 0)
    bins = ((size.view(np.int64) - 1 + larger) >> 49) - ((1023 + _LOWEST) << 3)
    found.magnitude += _count(np.clip(bins, 0, len(found.magnitude) - 1), many, len(found.magnitude))
    found.beyond += int(many[size > TOLERANCE].sum())
    found.beyond_authors += int(many[size > authors_limit(form)].sum())
    finite = np.isfinite(size)
    found.infinite += int(many[~finite].sum())
    size, many = size[finite], many[finite]
    with np.errstate(over="ignore"):
        found.l1 += float(np.sum(size * many))
        found.energy += float(np.sum(size * size * many))
    found.largest = max(found.largest, float(size.max(initial=0.0)))


def _count(bins: NDArray[Any], many: Counts, size: int) -> Counts:
    # Weighted bincount works in doubles, which are exact up to 2^53.
    return np.bincount(bins, weights=many, minlength=size).astype(np.int64)


def account_base(found: Measures, codes: Codes, many: Counts) -> None:
    """Add entries of W0, each `many` times: their exponents, norm and NaN; W1 is taken to be the same."""
    form = FORMATS[found.format]
    values = form.values(codes)
    finite, by = np.isfinite(values), _count(form.exponent(codes), many, form.exponents)
    nan = int(many[form.is_nan(codes)].sum())
    found.parameters += int(many.sum())
    found.exponents += by
    found.exponents_tuned += by
    found.nan_base += nan
    found.nan_tuned += nan
    found.beyond_authors += nan
    with np.errstate(over="ignore"):
        found.base_energy += float(np.sum(values[finite] ** 2 * many[finite]))


@dataclass
class Scratch:
    """The tables and buffers of one pass over 16-bit codes; `aside` pairs wait in the buffers."""

    cells: Counts
    codes: Counts
    old: Codes
    new: Codes
    aside: int = 0


def new_scratch() -> Scratch:
    """Return empty tables: 2^17 cells of changed pairs, 2^16 codes of W0, buffers of four chunks."""
    old, new = np.zeros(4 * CHUNK, np.uint16), np.zeros(4 * CHUNK, np.uint16)
    return Scratch(np.zeros(1 << 17, np.int64), np.zeros(1 << 16, np.int64), old, new)


Scan = Callable[[Codes, Codes, int, Scratch], None]


def scan_numpy(old: Codes, new: Codes, mantissa: int, scratch: Scratch) -> None:
    """Count one chunk into `scratch`; pairs of two signs or exponents are set aside in its buffers.

    A cell is (sign and exponent) * 2^(m + 1) + (new - old) + 2^m. Cells of equal codes are not read, so they may be
    counted or not.
    """
    scratch.codes += np.bincount(old, minlength=1 << 16)
    where = np.flatnonzero(old != new)
    a, b = old[where], new[where]
    near = (a ^ b) >> mantissa == 0
    c = a[near].astype(np.int64)
    cell = ((c >> mantissa) << (mantissa + 1)) + (b[near].astype(np.int64) - c) + (1 << mantissa)
    scratch.cells += np.bincount(cell, minlength=1 << 17)
    begin, end = scratch.aside, scratch.aside + len(a) - len(c)
    scratch.old[begin:end], scratch.new[begin:end], scratch.aside = a[~near], b[~near], end


def count_numpy(old: Codes, new: Codes) -> int:
    """Return how many codes differ."""
    return int(np.count_nonzero(old != new))


@dataclass(frozen=True)
class Kernels:
    """The two functions that go over every entry, and what they are made with."""

    name: str
    scan: Scan
    count: Callable[[Codes, Codes], int]


def kernels(name: str = "auto") -> Kernels:
    """Return the kernels of numba where it is installed (`align[fast]`), else numpy's; or those asked for."""
    if name in ("auto", "numba"):
        try:
            from align.sparsity.fast import count_numba, scan_numba
        except ImportError as error:
            if name == "numba":
                raise ConfigError("numba is not here", why=str(error), do="pip install 'align[fast]'") from error
        else:
            return Kernels("numba", scan_numba, count_numba)
    return Kernels("numpy", scan_numpy, count_numpy)


class Pass:
    """One pass over a tensor: chunks in, measures out."""

    def __init__(self, form: Format, use: Kernels, scratch: Scratch) -> None:
        self.found, self._form, self._use, self._scratch = Measures(form.name), form, use, scratch
        scratch.cells[:], scratch.codes[:], scratch.aside = 0, 0, 0

    def add(self, old: Codes, new: Codes) -> None:
        """Take in one chunk of at most `CHUNK` entries."""
        form = self._form
        if form.bits == 16:
            self._use.scan(old, new, form.mantissa, self._scratch)
            if self._scratch.aside > len(self._scratch.old) - CHUNK:
                self._flush()
            return
        where = np.flatnonzero(old != new)
        account(self.found, old[where], new[where])
        account_base(self.found, old, np.ones(len(old), np.int64))

    def _flush(self) -> None:
        scratch = self._scratch
        pairs = scratch.old[: scratch.aside].astype(np.uint32) << np.uint32(16) | scratch.new[: scratch.aside]
        pairs.sort()  # the same few pairs come back thousands of times, and are worked out once
        first = np.flatnonzero(np.diff(pairs, prepend=~pairs[:1]))
        distinct, many = pairs[first], np.diff(first, append=len(pairs))
        account(self.found, (distinct >> np.uint32(16)).astype(np.uint16), distinct.astype(np.uint16), many)
        scratch.aside = 0

    def finish(self) -> Measures:
        """Return the measures, the tables worked in."""
        form, scratch = self._form, self._scratch
        if form.bits == 16:
            self._flush()
            held = np.flatnonzero(scratch.cells)
            held = held[held & ((2 << form.mantissa) - 1) != 1 << form.mantissa]
            row, step = held >> (form.mantissa + 1), (held & ((2 << form.mantissa) - 1)) - (1 << form.mantissa)
            first = np.maximum(0, -step)  # any pair of the cell has the same difference, and this one exists
            old = ((row << form.mantissa) + first).astype(np.uint16)
            account(self.found, old, (old + step).astype(np.uint16), scratch.cells[held])
            codes = np.flatnonzero(scratch.codes)
            account_base(self.found, codes.astype(np.uint16), scratch.codes[codes])
        return self.found
