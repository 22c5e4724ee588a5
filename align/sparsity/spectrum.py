"""How many directions of an update stand above what rounding alone would make, with the proof beside the number.

Stored is E = W1 - W0 = D + N: the update D, and N that rounding to spacings u_ij added. Where rounding errors are
independent and uniform over a spacing, ||N||_2 stays, to leading order, below the noise edge

    tau = max_i sqrt(sum_j u_ij^2 / 12) + max_j sqrt(sum_i u_ij^2 / 12)

(Bandeira and van Handel 2016, Theorem 1.1; with equal spacings (sqrt m + sqrt n) u / sqrt 12, the edge of Marchenko
and Pastur). By Weyl s_{r+1}(E) <= s_{r+1}(D) + ||N||_2, so no more singular values than D has rank pass tau.

They are counted without being worked out. With G = E^T E and sigma = tau^2, a factorisation P L B L^T P^T = A of a
matrix A near G - sigma I has as many positive eigenvalues in its blocks B as A has (Sylvester), and G - sigma I has as
many as A if

    ||A - (G - sigma I)||_2 <= eta   and   min |lambda(A)| >= gap > eta       (Weyl: no eigenvalue can reach zero)

Both norms are bounded from above by twelve Gaussian vectors z: ||M^q||_2 <= 10 max ||M^q z|| for q = 1, and for q = 2
where that is too coarse, but for a chance of P(|g| < 0.1)^12 = 7e-14 each (Halko, Martinsson and Tropp 2011, Lemma
4.1). eta is that of M = A - (E^T E - sigma I), applied in double precision to E itself, so that it has in it every
rounding error of the Gram matrix and of the factorisation; gap is that of M = A^-1. So single precision may do the
work, and double precision is used where that proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]
Vector = NDArray[np.float64]
PROBES, CHANCE = 12, 10.0
PANEL, ROWS = 512, 1024
EXACT, UNCERTIFIED = "exact", "uncertified"
_UNIT = 2.0**-53


@dataclass(frozen=True)
class Count:
    """How many singular values lie above an edge.

    Args:
        certificate: "exact", or "uncertified".
        proof: why it is exact, or why that could not be shown.
    """

    above: int
    certificate: str
    proof: str


def noise_edge(row_squares: Vector, column_squares: Vector) -> float:
    """Return tau = sqrt(max of sums of u^2 over a row / 12) + the same over a column.

    Args:
        row_squares, column_squares: sums of squared spacings by row and by column.
    """
    return math.sqrt(float(row_squares.max(initial=0.0)) / 12) + math.sqrt(float(column_squares.max(initial=0.0)) / 12)


def gram(matrix: Matrix, kind: Any = np.float64) -> Matrix:
    """Return E^T E in a precision, of a matrix with at least as many rows as columns."""
    if matrix.dtype == kind and matrix.flags.c_contiguous:
        return matrix.T @ matrix
    total = np.zeros((matrix.shape[1], matrix.shape[1]), kind)
    for part in blocks(matrix, kind):
        total += part.T @ part
    return total


def blocks(matrix: Matrix, kind: Any = np.float64) -> Iterator[Matrix]:
    """Return a matrix in pieces of a precision."""
    # Blocks of at least as many rows as columns, so that adding them up costs little beside them.
    step = max(ROWS, matrix.shape[1])
    for start in range(0, len(matrix), step):
        yield np.ascontiguousarray(matrix[start : start + step], kind)


def times_gram(matrix: Matrix, vectors: Matrix) -> Matrix:
    """Return E^T (E Z) in double precision."""
    total = np.zeros((matrix.shape[1], vectors.shape[1]))
    for start in range(0, len(matrix), ROWS):
        part = matrix[start : start + ROWS].astype(np.float64)
        total += part.T @ (part @ vectors)
    return total


def times(matrix: Matrix, vectors: Matrix) -> Matrix:
    """Return E Z in double precision."""
    return np.concatenate([part @ vectors for part in blocks(matrix)])


def unit_scaled(matrix: Matrix) -> tuple[Matrix, float]:
    """Return a matrix times a power of two that brings its root mean square near 1, and that power; nothing rounds."""
    square = sum(float(np.vdot(part, part)) for part in blocks(matrix)) / max(matrix.size, 1)
    scale = 2.0 ** -round(math.log2(square) / 2) if square else 1.0
    kind = np.float64 if abs(math.log2(scale)) > 100 else matrix.dtype.type  # 2^100 is within single precision
    return matrix.astype(kind, copy=False) * kind(scale), scale


# --- counts ------------------------------------------------------------------------------------------


def count_in_spectrum(eigenvalues: Vector, edge: float, rows: int) -> Count:
    """Count the eigenvalues of a Gram matrix of double precision above edge^2.

    Exact if none lies within eta = (m + 10 n) 2^-53 ||E||_F^2 of it: forming the Gram matrix errs by at most
    m 2^-53 ||E||_F^2 (Higham 2002, section 3.5), a backward stable eigensolver by p(n) 2^-53 ||G||_2 with p(n) taken as
    10 n.
    """
    eta = (rows + 10 * len(eigenvalues)) * _UNIT * float(eigenvalues.sum())
    gap = float(np.min(np.abs(eigenvalues - edge**2)))
    return _verdict(int(np.sum(eigenvalues > edge**2)), gap, eta, edge**2, "all eigenvalues of the Gram matrix")


def count_in_values(values: Vector, edge: float, size: int) -> Count:
    """Count singular values of double precision above `edge`, exact if none lies within 10 max(m, n) 2^-53 s_1 of it.

    A backward stable decomposition errs by p(m, n) 2^-53 s_1; p is taken as 10 max(m, n).
    """
    eta = 10 * size * _UNIT * float(values[0])
    return _verdict(int(np.sum(values > edge)), float(np.min(np.abs(values - edge))), eta, edge, "all singular values")


def _verdict(above: int, gap: float, eta: float, at: float, how: str) -> Count:
    gap, eta = gap / at, eta / at
    if gap > eta:
        return Count(above, EXACT, f"{how}: none within {gap:.1e} of the edge, and errors stay below {eta:.1e} of it")
    near = max(eta, gap)
    return Count(above, UNCERTIFIED, f"{how}: one may lie within {near:.1e} of the edge, where rounding decides")


def count_above(matrix: Matrix, edge: float, *, single: Matrix | None = None, many: bool = False) -> Count:
    """Count the singular values of a matrix above `edge`, by inertia.

    Args:
        matrix: m x n, m >= n, of finite numbers, scaled by `unit_scaled`.
        edge: above zero.
        single: its Gram matrix in single precision, where there is one already.
        many: many values are above the edge, so that their spacing there is finer than single precision resolves.

    Returns:
        the count; "uncertified" where a singular value lies so near the edge that double precision cannot tell.
    """
    rungs = [(np.float32, np.float32), (np.float32, np.float64), (np.float64, np.float64)] if _has_lapack() else []
    product = single
    for kind, solver in rungs[1 if many else 0 :]:
        if product is None or product.dtype != kind:
            product = gram(matrix, kind)
        found = _by_inertia(matrix, product, edge**2, solver)
        if found.certificate == EXACT:
            return found
    return spectrum_above(matrix, gram(matrix), edge)[1]


def spectrum_above(matrix: Matrix, product: Matrix, edge: float) -> tuple[Vector, Count]:
    """Return all singular values, largest first, and how many are above `edge`.

    They are worked out from the Gram matrix, and where that cannot tell, as an edge below sqrt(2^-53) s_1, from E.

    Args:
        product: E^T E in double precision.
    """
    eigenvalues = np.linalg.eigvalsh(product)
    count = count_in_spectrum(eigenvalues, edge, len(matrix))
    if count.certificate == EXACT:
        return np.sqrt(np.maximum(eigenvalues, 0.0))[::-1], count
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return values, count_in_values(values, edge, max(matrix.shape))


def _has_lapack() -> bool:
    try:
        import scipy.linalg.lapack  # noqa: F401
    except ImportError:
        return False
    return True


def _by_inertia(matrix: Matrix, product: Matrix, sigma: float, solver: Any) -> Count:
    factors = Factors.of(product, sigma, solver)
    name = f"inertia of E^T E - edge^2 in {np.dtype(solver).name}, E^T E in {product.dtype.name}"
    if factors is None:
        return Count(0, UNCERTIFIED, f"{name}: a pivot is exactly zero")
    n, rng = len(product), np.random.default_rng(0)
    error, solved = (rng.standard_normal((n, PROBES)) for _ in range(2))
    # What evaluating the residual itself may round.
    slack = (len(matrix) + n) * _UNIT * (float(np.trace(product, dtype=np.float64)) + sigma)
    eta, gap, lost = math.inf, 0.0, []
    for power in (1, 2):
        error = factors.times(error) - times_gram(matrix, error) + sigma * error
        eta = _root(CHANCE * _longest(error), power) + slack
        before, solved = solved, factors.solve(solved)
        lost.append(CHANCE * _longest(before - factors.times(solved)))
        gap = _gap(CHANCE * _longest(solved), lost)
        if gap > eta:
            break
    return _verdict(factors.positive, gap, eta, sigma, name)


def _root(value: float, power: int) -> float:
    return value ** (1 / power) if math.isfinite(value) else math.inf


def _longest(vectors: Matrix) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.max(np.sum(vectors * vectors, axis=0))))


def _gap(longest: float, lost: list[float]) -> float:
    """Return 1 / h with h >= ||A^-1||_2, from x = A^-q z as solved with residuals r_1 to r_q; 0 where nothing is shown.

    With norms tenfold, A^-1 z = x + A^-1 r_1 gives (1 - r_1) h <= x, and A^-2 z = x + A^-2 r_1 + A^-1 r_2 gives
    (1 - r_1) h^2 - r_2 h - x <= 0.
    """
    a = 1 - lost[0]
    if not (a > 0 and math.isfinite(longest + sum(lost)) and longest > 0):
        return 0.0
    if len(lost) == 1:
        return a / longest
    return 2 * a / (lost[1] + math.sqrt(lost[1] ** 2 + 4 * a * longest))


@dataclass(frozen=True)
class Factors:
    """A = P L B L^T P^T by Bunch and Kaufman: L of unit diagonal, B of blocks of one and of two."""

    lower: Matrix
    order: NDArray[np.int64]
    diagonal: Vector
    beside: Vector
    positive: int

    @classmethod
    def of(cls, product: Matrix, sigma: float, kind: Any) -> Factors | None:
        """Factorise product - sigma I in a precision; None where a pivot is zero."""
        from scipy.linalg.lapack import get_lapack_funcs

        factorise, convert = get_lapack_funcs(("sytrf", "syconv"), dtype=np.dtype(kind))
        a = np.array(product, kind).T  # symmetric: the transpose is the same matrix in the order of LAPACK
        n = len(a)
        a[np.arange(n), np.arange(n)] -= kind(sigma)
        a, pivots, info = factorise(a, lower=1, lwork=64 * n, overwrite_a=1)
        if info:
            return None
        a, beside, _ = convert(a, pivots, lower=1, way=0, overwrite_a=1)
        order, i = np.arange(n), 0
        while i < n:
            wide = int(pivots[i] < 0)
            j = abs(int(pivots[i])) - 1
            order[[i + wide, j]] = order[[j, i + wide]]
            i += 1 + wide
        diagonal, beside = np.diag(a).astype(np.float64), beside.astype(np.float64)
        first = np.flatnonzero(beside[:-1])
        single = np.ones(n, bool)
        single[first] = single[first + 1] = False
        blocks = np.stack([[diagonal[first], beside[first]], [beside[first], diagonal[first + 1]]]).transpose(2, 0, 1)
        positive = int(np.sum(diagonal[single] > 0)) + int(np.sum(np.linalg.eigvalsh(blocks) > 0))
        return cls(a, order, diagonal, beside, positive)

    def times(self, vectors: Matrix) -> Matrix:
        """Return A Z in double precision."""
        x = vectors[self.order]
        u = x.copy()
        for start, panel in self._panels():
            u[start : start + panel.shape[1]] += panel.T @ x[start:]
        v = self.diagonal[:, None] * u
        v[1:] += self.beside[:-1, None] * u[:-1]
        v[:-1] += self.beside[:-1, None] * u[1:]
        found, total = np.empty_like(v), v.copy()
        for start, panel in self._panels():
            total[start:] += panel @ v[start : start + panel.shape[1]]
        found[self.order] = total
        return found

    def _panels(self) -> Iterator[tuple[int, Matrix]]:
        for start in range(0, len(self.lower), PANEL):
            panel = self.lower[start:, start : start + PANEL].astype(np.float64)
            panel[: panel.shape[1]] = np.tril(panel[: panel.shape[1]], -1)
            yield start, panel

    def solve(self, vectors: Matrix) -> Matrix:
        """Return A^-1 Z in the precision of the factors."""
        from scipy.linalg.blas import get_blas_funcs

        solve = get_blas_funcs("trsm", (self.lower,))
        x = solve(1.0, self.lower, vectors[self.order].astype(self.lower.dtype), lower=1, diag=1).astype(np.float64)
        d, e = self.diagonal, self.beside
        first = np.flatnonzero(e[:-1])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            y = x / d[:, None]
            det = (d[first] * d[first + 1] - e[first] ** 2)[:, None]
            y[first] = (d[first + 1, None] * x[first] - e[first, None] * x[first + 1]) / det
            y[first + 1] = (d[first, None] * x[first + 1] - e[first, None] * x[first]) / det
            z = solve(1.0, self.lower, y.astype(self.lower.dtype), lower=1, diag=1, trans_a=1)
        found = np.empty_like(y)
        found[self.order] = z
        return found


# --- spectra -----------------------------------------------------------------------------------------


def largest_values(matrix: Matrix, product: Matrix, many: int, *, rounds: int = 4) -> Vector:
    """Return lower bounds of the `many` largest singular values, of a subspace found by iterating the Gram matrix.

    The values of E Q for an orthonormal Q never exceed those of E (Cauchy), whatever the precision Q was found in;
    each round multiplies twice (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    n = len(product)
    vectors = np.random.default_rng(1).standard_normal((n, min(n, many + 16))).astype(product.dtype)
    for _ in range(rounds):
        vectors = np.linalg.qr(product @ (product @ vectors))[0]
    basis = np.linalg.qr(vectors.astype(np.float64))[0]
    return singular_values(basis.T @ times_gram(matrix, basis))[:many]


def singular_values(product: Matrix) -> Vector:
    """Return the singular values of E from E^T E, largest first; each within sqrt(m 2^-53) s_1, and closer if large."""
    return np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0.0))[::-1]


def effective_rank(values: Vector) -> float | None:
    """Return exp(-sum p log p), p = s / sum s (Roy and Vetterli 2007); None where all are zero."""
    total = float(values.sum())
    p = values[values > 0] / total if total else values[:0]
    return math.exp(-float(np.sum(p * np.log(p)))) if len(p) else None


def participation_rank(values_or_product: Matrix) -> float | None:
    """Return (sum s^2)^2 / sum s^4, the rank of as many equal singular values; at most exp(entropy of s^2 / sum s^2).

    Args:
        values_or_product: singular values, or E^T E, of which it needs none.
    """
    if values_or_product.ndim == 1:
        second, fourth = (float(np.sum(values_or_product**k)) for k in (2, 4))
    else:
        second = float(np.trace(values_or_product, dtype=np.float64))
        fourth = sum(
            float(np.sum(np.square(values_or_product[a : a + PANEL], dtype=np.float64)))
            for a in range(0, len(values_or_product), PANEL)
        )
    return second**2 / fourth if fourth else None


def spectral_shift(before: Vector, after: Vector) -> float | None:
    """Return NSS = ||s(W1) - s(W0)||_2 / ||s(W0)||_2 <= ||E||_F / ||W0||_F (Mirsky)."""
    norm = float(np.linalg.norm(before))
    return float(np.linalg.norm(after - before)) / norm if norm else None


def subspace_cosines(first: Matrix, second: Matrix) -> Vector:
    """Return the cosines of the principal angles of two subspaces given by orthonormal columns, largest first.

        cos theta_i = s_i(U^T V)        (Bjorck and Golub 1973)
    """  # fmt: skip
    return np.clip(np.linalg.svd(first.T @ second, compute_uv=False), 0.0, 1.0)


def largest_angle(first: Matrix, second: Matrix) -> float:
    """Return the largest principal angle in degrees, by its sine where it is small.

    sin theta = ||V - U U^T V||_2, exact for small angles, which a cosine near 1 cannot tell apart.
    """
    sine = float(np.linalg.norm(second - first @ (first.T @ second), 2))
    return math.degrees(math.asin(min(sine, 1.0)))
